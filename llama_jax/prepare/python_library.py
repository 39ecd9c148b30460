"""Text of the standard library of the running Python: an example that needs no download.

``python:code`` is the modules, ``python:prose`` their docstrings, ``python:instructions`` questions
about functions and classes with answers from their docstrings.
"""

import ast
import functools
import inspect
import re
import sysconfig
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

PATHS = ("python:code", "python:prose", "python:instructions")
# Folders of the standard library that are tests, installed packages, or tables. The tables in
# encodings are near-copies of one another: validation text would be in training.
LEFT_OUT = {
    "test", "tests", "idle_test", "lib2to3", "site-packages", "dist-packages", "encodings",
    "pydoc_data",
}  # fmt: skip
_MAX_ANSWER_CHARS = 600


class Instruction(NamedTuple):
    """A question and its answer."""

    question: str
    answer: str


def root() -> Path:
    """The folder of the standard library."""
    return Path(sysconfig.get_path("stdlib"))


def is_module(file: Path) -> bool:
    """Whether a file of the standard library is read."""
    return file.suffix == ".py" and not file.name.startswith("_sysconfigdata")


@functools.lru_cache(maxsize=4096)
def read_module(file: Path, path: str) -> tuple[str, tuple[Any, ...]]:
    """The code of a module, and the texts of it.

    Args:
      file: a module of the standard library.
      path: one of :data:`PATHS`: the code, the docstrings as one text, or instructions.
    """
    try:
        with tokenize.open(file) as f:
            code = f.read()
        if path == "python:code":
            return code, (code,)
        tree = ast.parse(code)
    except (SyntaxError, UnicodeDecodeError):  # the standard library has some invalid files
        return "", ()
    if path == "python:prose":
        return code, ("\n\n".join(_docstrings(tree)),)
    return code, tuple(_instructions(file, tree))


def _instructions(file: Path, tree: ast.AST) -> Iterator[Instruction]:
    """A question for each public function, method and class that has a docstring."""
    parts = file.relative_to(root()).with_suffix("").parts
    if any(p.startswith("_") and p != "__init__" for p in parts):
        return
    module = ".".join(parts).removesuffix(".__init__")
    for name, node in _public_definitions(tree, module):
        text = inspect.cleandoc(ast.get_docstring(node, clean=False) or "")
        answer = re.sub(r"\s+", " ", text.split("\n\n")[0]).strip()
        if not 20 <= len(answer) <= _MAX_ANSWER_CHARS:
            continue
        if isinstance(node, ast.ClassDef):
            yield Instruction(f"What is the class `{name}` of Python?", answer)
        else:
            yield Instruction(f"What does `{name}({_arguments(node)})` do in Python?", answer)


def _public_definitions(
    node: ast.AST, prefix: str
) -> Iterator[tuple[str, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]]:
    for child in getattr(node, "body", ()):
        if not isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if not child.name.startswith("_"):
            name = f"{prefix}.{child.name}"
            yield name, child
            if isinstance(child, ast.ClassDef):
                yield from _public_definitions(child, name)


def _arguments(node: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    names = [a.arg for a in (*node.args.posonlyargs, *node.args.args)]
    return ", ".join(n for n in names if n not in ("self", "cls"))


def _docstrings(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        text = inspect.cleandoc(ast.get_docstring(node, clean=False) or "")
        if text:
            yield text
    for field in ("body", "orelse", "handlers", "finalbody"):  # definitions are statements
        children = getattr(node, field, None)
        for child in children if isinstance(children, list) else ():
            yield from _docstrings(child)
