"""Sphinx settings: ``sphinx-build -W docs docs/_build`` (see CONTRIBUTING.md)."""

import pathlib

import llama_jax

project = "llama_jax"
author = "The llama_jax authors"
copyright = "2026, the llama_jax authors"
version = release = getattr(llama_jax, "__version__", "0.1.0")

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
exclude_patterns = ["_build", "api/modules.rst"]
html_theme = "furo"
html_title = f"llama_jax {version}"

myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3
copybutton_prompt_text = "$ "

# An attribute's docstring "word: text" is taken for a type by napoleon; such words have no target.
suppress_warnings = ["ref.python"]
autodoc_default_options = {"ignore-module-all": True}
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True  # fields in "Attributes:" of a class are not documented twice

# The API reference and the settings reference are generated from the code.
HERE = pathlib.Path(__file__).parent
extensions.append("sphinx.ext.apidoc")
apidoc_modules = [
    {
        "path": str(HERE.parent / "llama_jax"),
        "destination": "api",
        "separate_modules": True,
        "module_first": True,
        "exclude_patterns": ["**/__main__.py", "**/template_worker.py"],
    }
]


def write_settings(app):
    """``api/settings.md``: every setting of a recipe, from the config classes."""
    from llama_jax.config.help import SECTIONS, settings

    lines = ["# Settings", "", "Settings of a recipe, or of the command line: `section.key=value`."]
    rows = settings()
    for section in SECTIONS:
        lines += ["", f"## [{section}]", "", "| setting | type | default | meaning |"]
        lines += ["|---|---|---|---|"]
        for s in rows:
            if s.name.rpartition(".")[0] == section:
                cells = (f"`{s.name}`", s.type, s.default, " ".join(s.meaning.split()))
                lines.append("| " + " | ".join(c.replace("|", "\\|") for c in cells) + " |")
    (HERE / "api").mkdir(exist_ok=True)
    (HERE / "api" / "settings.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def examples_as_code(app, what, name, obj, options, lines):
    """Show the code of an ``Example:`` section as code; napoleon would make it a paragraph."""
    for i in reversed(range(len(lines))):
        if lines[i].strip() == "Example:":
            lines[i : i + 1] = [lines[i] + ":", ""]


def collapse_sidebar(app, page, template, context, doctree):
    """The sidebar shows the modules of the current package alone: the whole tree of modules on
    every page is most of the time of a build."""
    toctree = context["toctree"]
    context["toctree"] = lambda **options: toctree(**options | {"collapse": True})


def setup(app):
    app.connect("builder-inited", write_settings)
    app.connect("autodoc-process-docstring", examples_as_code, priority=400)  # before napoleon
    app.connect("html-page-context", collapse_sidebar, priority=400)  # before furo
