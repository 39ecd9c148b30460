"""Lines that several documents of a group have are dropped from all of them, as CCNet does it."""

import hashlib
import json

import numpy as np
import pytest

pytest.importorskip("datatrove", reason="needs the extra corpus")
from datatrove.data import Document

from llama_jax.corpus import line_dedup
from llama_jax.corpus.line_dedup import Comparison, FindRepeated
from llama_jax.corpus.steps import is_dropped

# Three files; the third one is in another group.
FILES = [
    ["Menu\nfirst 12\nonly a\nMENU\nin both files", "menu\nFirst 34\nonly b\nonly b"],
    ["“Menu”\n \nonly c\nnever seen before", "…\n\nonly d\nIn both files", "Menu\nfirst 99"],
    ["Menu\nonly a\nmore"],
]


def documents(texts, **metadata):
    return [
        Document(text=text, id=f"{i}", metadata={k: v[i] for k, v in metadata.items()})
        for i, text in enumerate(texts)
    ]


def run_dedup(folder, files, group_size):
    for rank, texts in enumerate(files):
        list(line_dedup.LineHashes(folder).run(documents(texts), rank))
    comparison = Comparison.plan(folder, len(files), group_size)
    for rank in range(comparison.tasks):
        assert list(FindRepeated(comparison).run(None, rank)) == []
    drop = line_dedup.DropRepeatedLines(comparison)
    return [list(drop.run(documents(texts), rank)) for rank, texts in enumerate(files)]


def test_normalized_lines():
    assert line_dedup.normalize_line("  Call 0-800 „NOW“…\t! ") == "call 0-000 now!"
    (value,) = line_dedup.line_hashes(["ABC 1"]).tolist()
    assert value == int.from_bytes(hashlib.sha1(b"abc 0").digest()[:8], "little")


def test_every_copy_of_a_repeated_line_is_dropped(tmp_path):
    first, second, third = run_dedup(tmp_path, FILES, group_size=2)
    # "first 12" and "First 34" are the same line: case and digits do not matter. A line that is
    # repeated only within its document stays once. Lines without text are all the same.
    assert [d.text for d in first] == ["only a", "only b"]
    assert [d.metadata["line_ids"] for d in first] == [[2], [2]]
    assert [d.metadata["original_nlines"] for d in first] == [5, 4]
    assert second[0].text == "only c\nnever seen before"
    assert second[0].metadata["line_ids"] == [2, 3]
    assert second[1].text == "only d"
    assert is_dropped(second[2])
    assert second[2].metadata["dropped"]["reason"] == "every line is repeated"
    assert third[0].text == "Menu\nonly a\nmore"


def test_the_result_does_not_depend_on_the_size_of_tasks(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    whole = run_dedup(tmp_path / "a", FILES, group_size=3)
    monkeypatch.setattr(line_dedup, "HASHES_PER_TASK", 3)
    monkeypatch.setattr(line_dedup, "_HASHES_PER_RUN", 2)
    parts = run_dedup(tmp_path / "b", FILES, group_size=3)
    assert Comparison.plan(tmp_path / "b", 3, 3).parts > 3
    assert len(list(tmp_path.glob("b/00000.*.npy"))) > 1
    assert [[d.text for d in file] for file in parts] == [[d.text for d in file] for file in whole]


def test_hashes_at_the_ends_of_the_range_are_compared(tmp_path):
    ends = np.array([0, (1 << 64) - 1, 5, 1 << 63], np.uint64)
    for rank in range(2):
        file = line_dedup.HashFile(tmp_path, rank, copies=2)
        file.add(ends[rank:])
        file.write()
    comparison = Comparison(tmp_path, [[0, 1]], parts=3, hashes=7)
    for rank in range(3):
        list(FindRepeated(comparison).run(None, rank))
    assert comparison.repeated(0).tolist() == [5, 1 << 63, (1 << 64) - 1]


def test_memory_of_a_dump_is_bounded_and_reported(tmp_path):
    lines = 2250 * 1_500_000  # a group of files of a dump
    comparison = Comparison(tmp_path, [range(2250)], parts=-(-lines // (1 << 24)), hashes=lines)
    memory = comparison.memory()
    assert memory["disk_bytes"] == 27_000_000_000
    assert memory["bytes_of_memory_per_task"] < 1 << 30


def test_the_first_page_with_a_digest_is_kept(tmp_path):
    digests = [["a", "b", "a"], ["c", "a"], ["b", "d", "d", None]]
    files = [documents([f"{i}" for i in range(len(d))], digest=d) for d in digests]
    for rank, file in enumerate(files):
        list(line_dedup.PageHashes(tmp_path).run(file, rank))
    comparison = Comparison.plan(tmp_path, 3, group_size=3)
    list(FindRepeated(comparison, keep_first=True).run(None, 0))
    kept = [
        [
            d.id
            for d in line_dedup.DropRepeatedPages(comparison).run(file, rank)
            if not is_dropped(d)
        ]
        for rank, file in enumerate(files)
    ]
    assert kept == [["0", "1"], ["0"], ["1", "3"]]
    assert json.dumps(comparison.memory())
