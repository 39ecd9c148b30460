"""Answers in a file: complete after a kill at any byte, never those of another model."""

import json
import os

import pytest

from llama_jax.evaluate.journal import Answer, Journal

REQUESTS = [("loglikelihood", ("a", " b"), 0), ("generate_until", ("a", {"until": ["\n"]}), 1)]


def filled(path):
    journal = Journal(path, "weights float32")
    keys = [journal.key(*request) for request in REQUESTS]
    journal.add([(keys[0], Answer([-1.5, True], False))])
    journal.add([(keys[1], Answer("é\n", True))])
    return keys


def test_a_file_cut_at_any_byte(tmp_path):
    path = tmp_path / "answers.jsonl"
    keys = filled(path)
    content = path.read_bytes()
    lines = content.splitlines(keepends=True)
    for size in range(len(content) + 1):
        path.write_bytes(content[:size])
        journal = Journal(path, "weights float32")
        complete = content[:size].count(b"\n")
        assert [key in journal for key in keys] == [i < complete for i in range(2)]
        journal.add((key, Answer([0.0, False], False)) for key in keys[complete:])
        assert path.read_bytes().startswith(b"".join(lines[:complete]))
        assert [json.loads(line)["key"] for line in path.read_text().splitlines()] == keys
    assert Journal(path)[keys[1]] == Answer("é\n", True)


@pytest.mark.parametrize(
    "damage",
    [b"\xff\n", b"[]\n", b"null\n", b'{"key": "x"}\n', b"\n", b"[" * 100_000 + b"\n"],
    ids=range(6),
)
def test_damaged_lines_are_ignored(tmp_path, damage):
    path = tmp_path / "answers.jsonl"
    keys = filled(path)
    first, second = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(first + damage + second)
    journal = Journal(path, "weights float32")
    assert [journal[key].truncated for key in keys] == [False, True]


def test_answers_of_another_model_or_request_have_other_keys(tmp_path):
    keys = set()
    for identity in ("weights float32", "weights bfloat16"):
        journal = Journal(None, identity)
        keys |= {journal.key(*request) for request in REQUESTS}
        keys |= {journal.key("loglikelihood", ("a ", "b"), 0)}
        keys |= {journal.key("generate_until", ("a", {"until": ["\n"]}), 0)}
        keys |= {journal.key("loglikelihood_rolling", ("a",), 0)}
    assert len(keys) == 10


def test_the_file_is_a_pipe(tmp_path):
    os.mkfifo(tmp_path / "answers.jsonl")
    with pytest.raises(ValueError, match="is not a regular file"):
        Journal(tmp_path / "answers.jsonl")
