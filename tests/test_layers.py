"""Who may import whom: down only, and nothing heavy at the top."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted([*ROOT.glob("llama_jax/**/*.py"), *ROOT.glob("pallas_kernels/**/*.py")])
HEAVY = {"torch", "transformers", "matplotlib", "tensorboard", "safetensors", "pandas"}

# Floors, from the ground up. A room not listed here stands with `train`, above what it imports.
FLOORS = [
    {"io", "model_config", "tiktoken_text"},
    {"config"},
    {"sharding", "tokenizer", "optim", "manifest"},
    {"model", "prepare", "data"},
    {"checkpoint"},
    # A run ends with a sample: train stands on generate.
    {"convert", "generate"},
    {"train"},
    {"plan"},
]


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


def room_of(path: Path) -> str:
    """A file's room: its own name, or that of the folder it lies in."""
    return path.relative_to(ROOT / "llama_jax").parts[0].removesuffix(".py")


def graph() -> dict[str, set[str]]:
    """Each room of llama_jax and the rooms it imports."""
    files = [path for path in FILES if path.is_relative_to(ROOT / "llama_jax")]
    out: dict[str, set[str]] = {room_of(path): set() for path in files}
    for path in files:
        names = {name.split(".")[1] for name in imports(path) if name.startswith("llama_jax.")}
        out[room_of(path)] |= (names & out.keys()) - {room_of(path)}
    return out


GRAPH = graph()


def reach(room: str) -> set[str]:
    """Every room that a room needs, directly or through others."""
    seen: set[str] = set()
    pending = [room]
    while pending:
        new = GRAPH[pending.pop()] - seen
        seen |= new
        pending.extend(new)
    return seen


@pytest.mark.parametrize("floor", range(len(FLOORS)))
def test_imports_go_down_only(floor):
    here_and_above = set().union(*FLOORS[floor:])
    for room in FLOORS[floor] & GRAPH.keys():
        same = {"config"} if room == "model_config" else {"model_config"}
        assert not (reach(room) & here_and_above) - same, f"{room} reaches up or sideways"


def test_no_room_needs_itself():
    for room in GRAPH:
        assert room not in reach(room), f"a circle through {room}"


def test_kernels_need_jax_alone():
    allowed = {"jax", "numpy", "pallas_kernels"} | set(sys.stdlib_module_names)
    for path in FILES:
        if path.is_relative_to(ROOT / "pallas_kernels"):
            assert {name.split(".")[0] for name in imports(path)} <= allowed, path.name


def test_config_needs_the_standard_library_and_its_parsers():
    own = {"pydantic", "tomli_w", "llama_jax", "typing_extensions"}
    allowed = own | set(sys.stdlib_module_names)
    lowest = FLOORS[0] | FLOORS[1]
    for name in lowest & GRAPH.keys():
        path = ROOT / "llama_jax" / f"{name}.py"
        assert {module.split(".")[0] for module in imports(path)} <= allowed
        assert GRAPH[name] <= lowest


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_heavy_imports_stand_in_functions(path):
    assert not {name.split(".")[0] for name in imports(path, everywhere=False)} & HEAVY


def test_the_checker_sees_a_lazy_import(tmp_path):
    """The two ways of looking differ where they should."""
    path = tmp_path / "a.py"
    path.write_text("import os\ndef f():\n    import torch\nif os:\n    import json\n")
    assert imports(path) == {"os", "torch", "json"}
    assert imports(path, everywhere=False) == {"os", "json"}


def test_import_is_light():
    """`import llama_jax` brings no jax; the settings neither."""
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
