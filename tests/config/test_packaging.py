"""What the package installs, and that the lists of dependencies agree."""

import re
import sys
import tomllib
import types
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
REQUIREMENTS = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()


def names(lines):
    """Names of packages, normalized, of lines such as ``name>=1.0``."""
    found = (re.match(r"[A-Za-z0-9._-]+", line) for line in lines if line[:1] not in ("#", "-", ""))
    return {re.sub(r"[-_.]+", "-", match[0]).lower() for match in found}


@pytest.fixture
def setup_arguments(monkeypatch):
    """The arguments of setup.py's call of setup()."""
    given = {}
    setuptools = types.ModuleType("setuptools")
    setuptools.setup, setuptools.find_packages = given.update, lambda include: include
    monkeypatch.setitem(sys.modules, "setuptools", setuptools)
    monkeypatch.chdir(ROOT)
    exec(compile((ROOT / "setup.py").read_text(), "setup.py", "exec"), {})
    return given


def test_test_requirements_are_not_run_time_dependencies(setup_arguments):
    run_time, everything = names(setup_arguments["install_requires"]), names(REQUIREMENTS)
    assert everything - run_time == {"pytest", "hypothesis", "pytest-xdist"}
    assert run_time < everything


def test_the_wheel_carries_packages_and_recipes_but_no_tests(setup_arguments):
    assert setup_arguments["packages"] == ["llama_jax*", "pallas_kernels*", "llama_jax.configs"]
    assert setup_arguments["package_dir"] == {"llama_jax.configs": "configs"}
    assert setup_arguments["package_data"]["llama_jax.configs"] == ["*.toml", "corpus/*.toml"]
    assert setup_arguments["package_data"]["llama_jax.data"] == ["templates/*.jinja"]
    for package in ("llama_jax", "pallas_kernels"):
        assert (ROOT / package / "py.typed").is_file()
        folders = {path.parent for path in (ROOT / package).glob("**/*.py")}
        assert all((folder / "__init__.py").is_file() for folder in folders)


def test_every_direct_dependency_has_an_upper_bound():
    constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    assert "-c constraints.txt" in REQUIREMENTS
    assert names(REQUIREMENTS) <= names(constraints)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for extra in project["optional-dependencies"].values():
        assert names(line for line in extra if "==" not in line) <= names(constraints)
    assert all(re.fullmatch(r"#.*|\S+<=[\w.]+", line) for line in constraints)


def test_conftest_names_existing_files(pytestconfig):
    """A renamed file would lose its position in the order and its fast compilation."""
    # Not `import conftest`: tests/serve has a module of that name too.
    conftest = pytestconfig.pluginmanager.get_plugin(str(ROOT / "tests" / "conftest.py"))
    stems = {path.stem for path in ROOT.glob("tests/**/test_*.py")}
    assert {*conftest.FIRST, *conftest.RUN_ONCE} <= stems


def test_files_of_tests_have_different_names():
    """pytest imports them as modules without their folder."""
    names = [path.name for path in ROOT.glob("tests/**/*.py") if path.name != "conftest.py"]
    assert len(set(names)) == len(names)
