"""Damaged manifests, tokenizers and lines: a ValueError or OSError, never anything else.

HYPOTHESIS_PROFILE=long python -m pytest tests/data/test_fuzz_data.py  # minutes
"""

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import tiktoken_tools
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llama_jax.config import DataConfig, SourceConfig
from llama_jax.data import tiktoken_text
from llama_jax.data.manifest import verify
from llama_jax.data.mixture import TrainData, open_mixture
from llama_jax.data.tokenizer import Tokenizer
from llama_jax.prepare import records
from llama_jax.prepare.mixture import prepare_mixture
from llama_jax.prepare.records import BadLine, parse_line
from llama_jax.prepare.text import _text_field, find_files, read_documents
from llama_jax.prepare.tokenizer import first_change, train_tokenizer

TEXTS = [f"text {i}: every good boy does fine and then some\n" for i in range(60)]
SHARED_FOLDER = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
    | st.sampled_from(["", "..", "/etc/passwd", "../a", "\0", 2**63, 10**400, -1, 0, "0" * 64]),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=5,
)  # fmt: skip


def places(tree: Any, path: tuple = ()) -> list[tuple]:
    """Every place in nested values."""
    found = []
    if isinstance(tree, dict | list):
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            found += [(*path, key), *places(value, (*path, key))]
    return found


@st.composite
def mutated(draw, content: bytes) -> bytes:
    """Bytes with some replaced, removed, repeated or inserted."""
    data = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data)))
        size = draw(st.sampled_from([1, 2, 8, 100, len(data)]))
        kind = draw(st.sampled_from(["replace", "remove", "repeat", "insert"]))
        if kind == "replace":
            some = draw(st.binary(min_size=1, max_size=8))
            data[at : at + len(some)] = some
        elif kind == "remove":
            del data[at : at + size]
        elif kind == "repeat":
            data[at:at] = data[at : at + size]
        else:
            data[at:at] = draw(st.sampled_from([b"\0", b"[", b"{", b'"', b"\xff", b"9" * 30, b"-"]))
    return bytes(data)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz")
    train_tokenizer(TEXTS, 290, folder / "t.model")
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in TEXTS))
    found = [{"prompt": t, "response": t[::-1].strip()} for t in TEXTS]
    (folder / "c.jsonl").write_text("".join(json.dumps(r) + "\n" for r in found))
    prepare_mixture(config(folder), 290, folder / "out")
    return folder


def config(folder: Path) -> DataConfig:
    sources = {name: SourceConfig(path=str(folder / f"{name}.jsonl")) for name in "ac"}
    return DataConfig(
        sources=sources, tokenizer=str(folder / "t.model"), seq_len=120, val_fraction=0.1,
        packing="examples", template="vicuna",
    )  # fmt: skip


@settings(suppress_health_check=SHARED_FOLDER)
@given(data=st.data())
def test_manifests(folder, data):
    """One value changed or removed, or bytes; with or without the hash of the content."""
    path = folder / "out" / data.draw(st.sampled_from([".", "a", "c"])) / "manifest.json"
    before = path.read_bytes()
    if data.draw(st.booleans()):
        tree = json.loads(before)
        tree.pop("sha256", None)
        *parents, last = data.draw(st.sampled_from(places(tree)))
        inside = tree
        for key in parents:
            inside = inside[key]
        if data.draw(st.booleans()):
            del inside[last]
        else:
            inside[last] = data.draw(VALUES)
        path.write_text(json.dumps(tree))
    else:
        path.write_bytes(data.draw(mutated(before)))
    try:
        assert isinstance(verify(folder / "out"), list)
        with contextlib.suppress(ValueError, OSError):
            mixture = open_mixture(folder / "out")
            feed = TrainData(mixture, config(folder), 2)
            next(feed)
            feed.close()
    finally:
        path.write_bytes(before)


def use(path: Path) -> None:
    """Load a tokenizer and use every method."""
    with contextlib.suppress(ValueError, OSError):
        tokenizer = Tokenizer.load(path)
        ids = tokenizer.encode("every  good é☃ <s>\n")
        tokenizer.decode([*ids, 0, 5, 10**6])
        first_change(tokenizer, "every good boy")
        assert len(tokenizer.bytes_of_id_V) == tokenizer.vocab_size
        tokenizer.encode_marked("<s>every")
        tokenizer.mark(tokenizer.eos_id)
        tokenizer.encode("a b " * 20_000)


@settings(suppress_health_check=SHARED_FOLDER)
@given(data=st.data())
def test_tokenizers(folder, data):
    kinds = {
        "sentencepiece": lambda: (folder / "t.model").read_bytes(),
        "json": lambda: json.dumps(
            tiktoken_text.to_json(tiktoken_tools.ranks(), newer=True), indent=0
        ).encode(),
        "tiktoken": tiktoken_tools.content,
    }
    content = kinds[data.draw(st.sampled_from(sorted(kinds)))]()
    path = folder / "fuzzed" / "tokenizer.model"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data.draw(mutated(content)))
    use(path)


@settings(suppress_health_check=SHARED_FOLDER)
@given(line=mutated(b'{"text": "every \\u00e9 good", "n": [1, 2.5, null]}') | st.binary())
def test_lines(line):
    record = parse_line(line, "a.jsonl line 1")
    found = record if isinstance(record, BadLine) else _text_field(*record)
    assert isinstance(found, str) or (found.reason and "a.jsonl line 1" in found.message)
    assert len(found.message if not isinstance(found, str) else "") < 600


RECORDS = [{"instruction": "é " * 9, "output": "x"}, {"conversations": [{"from": "gpt"}]}, {}, 5]


@settings(suppress_health_check=SHARED_FOLDER)
@given(
    content=st.sampled_from(RECORDS).flatmap(
        lambda first: mutated(json.dumps([first, *RECORDS], ensure_ascii=False).encode())
    ),
    format=st.sampled_from(["auto", "alpaca", "sharegpt", "messages"]),
    skip_bad_lines=st.booleans(),
    block=st.sampled_from([1, 7, 2**20]),
)
def test_arrays(folder, content, format, skip_bad_lines, block):
    path = folder / "array.json"
    path.write_bytes(content)
    records._BLOCK_CHARS, before = block, records._BLOCK_CHARS
    message = str(path)
    try:
        source = find_files("a", str(path), skip_bad_lines, format)
        documents = list(read_documents(source, source.files))
        assert all(d.size for d in documents)
    except ValueError as e:
        message = str(e)
    finally:
        records._BLOCK_CHARS = before
    assert str(path) in message
    assert len(message) < 1500
