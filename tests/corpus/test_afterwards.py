"""The commands that read finished corpora, as a user runs them."""

import json

import pytest

pytest.importorskip("datatrove", reason="needs the extra corpus")

import inline
from corpus_tools import tree
from finished_corpora import all_lines, write_corpus

from llama_jax.corpus.__main__ import main

WIKIPEDIA = "the quick brown fox jumps over the lazy dog while the cat sleeps in the warm sun"
QUESTION = "Which of the seven hills of Rome is the one that has the oldest houses of all?"


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """Runs ``llama-jax corpus`` in ``tmp_path``; returns status, output and errors."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        return main(list(map(str, arguments))), *capsys.readouterr()

    return run


@pytest.fixture
def corpora(tmp_path):
    files = {"00000": [{"id": "w/1", "text": WIKIPEDIA}, {"id": "w/2", "text": "a short one"}]}
    write_corpus(tmp_path / "corpora/wikipedia", files)
    files = {
        "head/00000": [{"id": "c/1", "text": WIKIPEDIA + "!"}, {"id": "c/2", "text": QUESTION}],
        "tail/00001": [{"id": "c/3", "text": WIKIPEDIA.upper()}, {"id": "c/4", "text": "another"}],
    }
    write_corpus(tmp_path / "corpora/commoncrawl", files)
    (tmp_path / "questions").mkdir()
    (tmp_path / "questions/test.jsonl").write_text(json.dumps({"question": QUESTION}))
    return tmp_path / "corpora"


def documents_and_log(folder):
    return {name: all_lines(folder / name) for name in ("documents", "dropped")}


def test_any_number_of_workers_and_one_command_after_another(run, corpora, tmp_path):
    settings = ("buckets=2", "hashes=4")
    inline.run("deduplicate", [corpora], tmp_path / "out1", overrides=settings)
    expected = documents_and_log(tmp_path / "out1")
    assert [d["id"] for found in expected["documents"].values() for d in found] == [
        "c/2", "c/4", "w/1", "w/2",
    ]  # fmt: skip
    for workers in (2, 4):
        out = ("--output", f"out{workers}", "--workers", workers)
        assert run("deduplicate", corpora, *out, *settings)[0] == 0
        assert documents_and_log(tmp_path / f"out{workers}") == expected
    assert tree(tmp_path / "out2") == tree(tmp_path / "out4")
    manifest = json.loads((tmp_path / "out4/manifest.json").read_text())
    assert manifest["notes"]["deduplication"]["signature_bytes"] > 0

    assert run("decontaminate", "out4", "questions", "--output", "clean")[0] == 0
    assert run("report", "clean")[0] == 0
    rows = json.loads((tmp_path / "clean/report/report.json").read_text())["sources"]
    assert {name: row["documents"] for name, row in rows.items()} == {
        "commoncrawl": 1, "wikipedia": 2,
    }  # fmt: skip
    assert rows["commoncrawl"]["text_bytes"] == len("another")
    _, shown, _ = run("decontaminate", "--output", "clean", "--explain", "c/2")
    assert "contains text of questions/test.jsonl; question: questions/test.jsonl: line 1" in shown


def test_bad_input(run, corpora, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/notes.txt").write_text("no corpus")
    status, _, errors = run("deduplicate", "empty", "--output", "out")
    assert status == 1
    assert "no finished corpus" in errors
    status, _, errors = run("decontaminate", corpora, "--output", "out")
    assert status == 1
    assert "no files of evaluation sets" in errors
    assert not (tmp_path / "out/manifest.json").exists()
