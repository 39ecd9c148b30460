"""Import layers: imports go downward only, and importing the package loads nothing heavy."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted([*ROOT.glob("llama_jax/**/*.py"), *ROOT.glob("pallas_kernels/**/*.py")])
HEAVY = {
    "torch", "transformers", "matplotlib", "tensorboard", "safetensors", "pandas", "lm_eval",
    "datasets",
}  # fmt: skip

# Packages and single modules of llama_jax, lowest first. A module may import those below its own
# layer, and modules of its own package as long as no circle results.
LAYERS = [
    {"storage"},
    {"io", "versions"},
    {"config", "chips"},
    {"model"},
    {"data"},
    {"checkpoint"},
    {"prepare", "corpus", "convert"},
    {"generate"},
    {"evaluate"},
    {"train"},
    {"serve"},
    {"plan", "verify", "report"},
    {"__main__", "__init__"},
]

# Imports that still go up or sideways: (module, imported package). To be removed, never extended.
KNOWN: set[tuple[str, str]] = set()


def imports(path: Path, everywhere: bool = True) -> set[str]:
    """Modules that a file names in its imports; only those that run on import if not everywhere."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found: set[str] = set()
    pending: list[ast.AST] = [tree]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports by full name"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        lazy = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        if everywhere or not lazy:
            pending.extend(ast.iter_child_nodes(node))
    return found


def module_of(path: Path) -> str:
    """``llama_jax/model/llama.py`` -> ``model.llama``; a package is named by its folder."""
    name = ".".join(path.relative_to(ROOT / "llama_jax").with_suffix("").parts)
    return name.removesuffix(".__init__")


def graph() -> dict[str, set[str]]:
    """Each module of llama_jax and the modules of llama_jax that it imports."""
    files = [path for path in FILES if path.is_relative_to(ROOT / "llama_jax")]
    modules = {module_of(path) for path in files}
    out: dict[str, set[str]] = {}
    for path in files:
        names = {n.removeprefix("llama_jax.") for n in imports(path) if n.startswith("llama_jax.")}
        out[module_of(path)] = (names & modules) - {module_of(path)}
    return out


GRAPH = graph()
LAYER_OF = {name: i for i, layer in enumerate(LAYERS) for name in layer}


@pytest.mark.parametrize("module", sorted(GRAPH))
def test_imports_go_down_only(module):
    package = module.partition(".")[0]
    assert package in LAYER_OF, f"{module} is in no layer: add it to LAYERS"
    for name in GRAPH[module]:
        other = name.partition(".")[0]
        if other == package or (module, other) in KNOWN:
            continue
        assert LAYER_OF[other] < LAYER_OF[package], f"{module} imports {name}, which is not below"


def test_known_exceptions_exist():
    for module, other in KNOWN:
        assert any(n.partition(".")[0] == other for n in GRAPH[module]), (module, other)


def test_no_circular_imports():
    for start in GRAPH:
        seen: set[str] = set()
        pending = [start]
        while pending:
            new = GRAPH[pending.pop()] - seen
            seen |= new
            pending.extend(new)
        assert start not in seen, f"a circle through {start}"


def test_kernels_need_jax_alone():
    allowed = {"jax", "numpy", "pallas_kernels"} | set(sys.stdlib_module_names)
    for path in FILES:
        if path.is_relative_to(ROOT / "pallas_kernels"):
            assert {name.split(".")[0] for name in imports(path)} <= allowed, path.name


def test_config_needs_the_standard_library_and_its_parsers():
    own = {"pydantic", "tomli_w", "llama_jax", "typing_extensions"}
    allowed = own | set(sys.stdlib_module_names)
    for path in FILES:
        if path.is_relative_to(ROOT / "llama_jax") and module_of(path).startswith(("io", "config")):
            assert {module.split(".")[0] for module in imports(path)} <= allowed


def test_only_the_server_needs_its_extra():
    extra = {"starlette", "uvicorn", "llguidance", "prometheus_client"}
    for path in FILES:
        if not path.is_relative_to(ROOT / "llama_jax/serve"):
            assert not {name.split(".")[0] for name in imports(path)} & extra, path


def test_only_corpus_needs_its_extra():
    extra = {"datatrove", "py7zr", "kenlm", "fasttext", "warcio", "zstandard"}
    for path in FILES:
        if not path.is_relative_to(ROOT / "llama_jax/corpus"):
            used = {name.split(".")[0] for name in imports(path)} & extra
            assert used <= {"zstandard"}, path


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_heavy_imports_are_inside_functions(path):
    # A subclass of the harness's model, imported inside functions.
    if path.name == "harness_model.py":
        return
    assert not {name.split(".")[0] for name in imports(path, everywhere=False)} & HEAVY


def test_the_checker_sees_a_lazy_import(tmp_path):
    """Imports inside functions are found only on request."""
    path = tmp_path / "a.py"
    path.write_text("import os\ndef f():\n    import torch\nif os:\n    import json\n")
    assert imports(path) == {"os", "torch", "json"}
    assert imports(path, everywhere=False) == {"os", "json"}


def test_import_is_light():
    """`import llama_jax` does not import jax; neither do the settings."""
    code = (
        "import sys, time; start = time.perf_counter(); import llama_jax; "
        "took = time.perf_counter() - start; import llama_jax.config; "
        "print(took, sorted({'jax', 'numpy', 'flax', 'torch'} & set(sys.modules)))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    took, modules = run.stdout.split(maxsplit=1)
    assert modules.strip() == "[]"
    assert float(took) < 0.5
