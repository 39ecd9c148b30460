"""What the tests of corpora share: a source for tests, its input, reading of its output."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parents[1]
PYTHONPATH = os.pathsep.join(map(str, (TESTS.parent, TESTS, TESTS / "corpus")))

FILES = {
    "a": b"one\ntwo\none\n",
    "b": b"two\n\xff\nfar too long\n",
    "c": b"three\n",
}


def write_inputs(folder, files=FILES):
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / f"{name}.txt").write_bytes(content)
    return folder


def lines(path):
    import zstandard

    with zstandard.open(path, "rb") as file:
        return [json.loads(line) for line in io.BufferedReader(file)]


def tree(folder):
    """Content of every file of a corpus, by name; without its work folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.relative_to(folder).parts[0] not in ("work", ".lock")
    }


def use_toy_source(monkeypatch, folder):
    """Makes ``toy.py`` a source of the package, with settings in a file in ``folder``."""
    from corpus import toy

    from llama_jax.corpus import recipe

    (folder / "corpus").mkdir(parents=True, exist_ok=True)
    common = (recipe.recipes_folder() / "corpus/common.toml").read_bytes()
    (folder / "corpus/common.toml").write_bytes(common)
    (folder / "corpus/toy.toml").write_text("max_characters = 5\nsleep = 0.0\n")
    monkeypatch.setattr(recipe, "recipes_folder", lambda: folder)
    monkeypatch.setitem(sys.modules, "llama_jax.corpus.toy", toy)
    monkeypatch.setitem(recipe.SOURCES, "toy", "text files")


def start(folder, *arguments):
    """Starts ``llama-jax corpus`` with the toy source as a process."""
    command = [sys.executable, TESTS / "corpus/toy_main.py", folder, *arguments]
    environment = os.environ | {"PYTHONPATH": PYTHONPATH}
    return subprocess.Popen(
        command, cwd=folder, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE,
        text=True,
    )  # fmt: skip
