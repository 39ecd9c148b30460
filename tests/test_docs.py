"""The commands of README.md and docs/ run as they are written, or say why not.

Each fenced ``bash`` and ``python`` block runs, in the order of its page, in one temporary folder
with a small training run. A block after a comment ``<!-- not run: REASON -->`` is not run, but its
``llama-jax`` commands must name existing commands and options.
"""

import contextlib
import importlib.util
import io
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import jax
import pytest
import quick_options
from whole_way_tools import write_dumps

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "CONTRIBUTING.md"]
BLOCK = re.compile(
    r"(?:^<!-- not run: (?P<reason>[^\n]+?) -->\n)?^```(?P<language>\w+)\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
SMALL = (
    "train.steps=2", "train.batch_size=2", "data.seq_len=192", "train.eval_batches=1",
    "data.val_fraction=0.02", 'train.sample_prompts=["a"]',
)  # fmt: skip
"""Overrides of every training command of a page, so that it takes seconds."""


class Block(NamedTuple):
    language: str
    text: str
    reason: str | None
    """why it is not run"""


def blocks(path: Path) -> list[Block]:
    return [
        Block(m["language"], m["text"], m["reason"])
        for m in BLOCK.finditer(path.read_text(encoding="utf-8"))
        if m["language"] in ("bash", "python", "toml", "console")
    ]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a small training run, recipes, and a ``llama-jax`` command on its PATH."""
    folder = tmp_path_factory.mktemp("docs")
    (folder / "configs").symlink_to(ROOT / "configs")
    (folder / "bin").mkdir()
    command = folder / "bin" / "llama-jax"
    command.write_text(
        f'#!/bin/sh\nif [ "$1" = train ] && [ "$2" != --help ]; then set -- "$@" '
        f"{shlex.join(SMALL)}; fi\nexec "
        f'{shlex.join([sys.executable, str(ROOT / "tests/page_command.py")])} "$@"\n'
    )
    command.chmod(0o755)
    python = folder / "bin" / "python"  # no link: python would miss its environment
    python.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n')
    python.chmod(0o755)
    run(folder, "llama-jax train")
    (folder / "tokenizer.model").write_bytes(
        (folder / "checkpoints/tiny/tokenizer.model").read_bytes()
    )
    lines = "".join(f'{{"text": "page {i} of the web, with some words"}}\n' for i in range(200))
    zstd(folder / "web.jsonl.zst", lines.encode())
    record = lambda i: {"instruction": f"Say {i}.", "input": "", "output": f"It is {i}."}
    (folder / "instructions.json").write_text(json.dumps([record(i) for i in range(300)]))
    piqa = folder / "benchmark_data" / "piqa"
    piqa.mkdir(parents=True)
    question = '{"goal": "Which way do you cut a big loaf?", "sol1": "So.", "sol2": "Not so."}\n'
    (piqa / "valid.jsonl").write_text(question)
    (piqa / "valid-labels.lst").write_text("0\n")
    write_dumps(folder / "dumps")
    (folder / "books").mkdir()
    (folder / "books" / "a.txt").write_text("Call me Ishmael. Some years ago. " * 40)
    return folder


def zstd(path: Path, data: bytes) -> None:
    import pyarrow

    path.write_bytes(pyarrow.Codec("zstd").compress(data, asbytes=True))


def run(folder: Path, text: str, *command: str) -> None:
    env = os.environ | {
        "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        # Programs take longer to compile than to run.
        "XLA_FLAGS": quick_options.FLAGS,
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "true",
        "JAX_COMPILATION_CACHE_DIR": jax.config.values["jax_compilation_cache_dir"],
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    done = subprocess.run(
        command or ("bash", "-euo", "pipefail", "-c", text),
        cwd=folder, env=env, capture_output=True, text=True, timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, f"{text}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"


@pytest.mark.skipif(
    not find_spec("sphinx"), reason="minutes; runs where the docs extra is installed"
)
@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.name)
def test_commands_of_a_page(path, place):
    pieces = blocks(path)
    script = "\n".join(b.text for b in pieces if b.language == "bash" and not b.reason)
    if script:
        run(place, script)
    program = "\n".join(b.text for b in pieces if b.language == "python" and not b.reason)
    if program:
        run(place, program, sys.executable, "-c", program)
    for block in pieces:
        assert block.language != "console", f"{path.name}: use bash, so that it can be run"
        if block.language == "toml":
            tomllib.loads(block.text)


def commands(path: Path) -> list[list[str]]:
    """Words of each ``llama-jax`` command of a page's blocks that are not run."""
    out = []
    for block in blocks(path):
        if block.language == "bash" and block.reason:
            text = block.text.replace("\\\n", " ")
            for line in text.splitlines():
                words = shlex.split(line, comments=True)
                if words[:1] == ["llama-jax"] and len(words) > 1:
                    out.append(words[1:])
    return out


# Commands with options of their own, and help that needs the extra corpus.
WITH_EXTRA = [["corpus", "models"], ["corpus", "report"]]


@pytest.fixture(scope="module")
def helps() -> dict[str, str]:
    from llama_jax.__main__ import VERBS, main
    from llama_jax.config import help_text

    texts = dict.fromkeys(VERBS, "")
    for verb, *words in [*([verb] for verb in VERBS), *WITH_EXTRA]:
        with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
            main([verb, *words, "--help"])
        texts[verb] += out.getvalue()
    texts["train"] += help_text("all", 100)
    return texts


def test_commands_that_are_not_run_exist(helps):
    found = [(path, words) for path in PAGES for words in commands(path)]
    assert len(found) > 5
    has_corpus = importlib.util.find_spec("datatrove") is not None
    with_extra = [words for _, words in found if words[:2] in WITH_EXTRA]
    for path, (verb, *words) in found:
        if [verb, *words[:1]] in WITH_EXTRA and not has_corpus:
            continue
        assert verb in helps, f"{path.name}: no command {verb}"
        for word in words:
            option = word.partition("=")[0]
            if option.startswith("--"):
                assert re.search(rf"{option}\b", helps[verb]), (
                    f"{path.name}: {verb} has no {option}"
                )
            elif "=" in word and verb == "train":
                option = re.sub(r"^data\.sources\.\w+\.", "data.sources.NAME.", option)
                assert option in helps[verb], f"{path.name}: no setting {option}"
    if with_extra and not has_corpus:
        pytest.skip("the options of corpus models and corpus report need the extra corpus")


def test_links_point_to_existing_pages():
    for path in PAGES:
        text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
        for target in re.findall(r"\]\((?!https?:)([^)#\s]+)[^)]*\)", text):
            # Pages below api/ are generated when the documentation is built.
            if not target.startswith("api/"):
                assert (path.parent / target).exists(), f"{path.name}: {target}"


def test_the_documentation_builds_without_warnings(tmp_path):
    pytest.importorskip("sphinx", reason="needs the docs extra")
    command = [sys.executable, "-m", "sphinx", "-W", "-q", str(ROOT / "docs"), str(tmp_path)]
    env = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "LLM" in (tmp_path / "api" / "llama_jax.generate.llm.html").read_text()
