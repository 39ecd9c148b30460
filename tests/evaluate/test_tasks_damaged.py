"""Every field of a record replaced: a document, or an error that names the place."""

import copy
import json

import pytest

from llama_jax.evaluate.tasks import closed_book, commonsense, reading
from llama_jax.prepare.records import Record

LETTERED = {"text": ["sun", "moon"], "label": ["A", "B"]}
NESTED = [{"text": "sun", "label": "A"}, {"text": "moon", "label": "B"}]
PROBLEM = {"question": "What?", "options": ["a", "b", "c", "d"], "answer": "B"}


READERS = [
    (commonsense._boolq, {"question": "is it", "passage": "It is.", "answer": True}),
    (commonsense._boolq, {"question": "is it", "passage": "It is.", "label": 1}),
    (commonsense._piqa, {"goal": "a", "sol1": "b", "sol2": "c", "label": 1}),
    (commonsense._siqa, {"context": "a", "question": "b", "options": ["c", "d"], "answer": "d"}),
    (commonsense._siqa, {"context": "a", "question": "b", "answerA": "c", "answerB": "d",
                         "answerC": "e", "label": "3"}),
    (commonsense._siqa, {"context": "a", "question": "b", "answerA": "c", "answerB": "d",
                         "answerC": "e", "correct": "C"}),
    (commonsense._hellaswag, {"activity_label": "a", "ctx_a": "b", "ctx_b": "c",
                              "endings": ["d", "e"], "label": 1}),
    (commonsense._winogrande, {"sentence": "a _ b", "option1": "c", "option2": "d", "answer": "2"}),
    (commonsense._winogrande, {"context_options": ["a", "b"], "continuation": "c", "gold": 1}),
    (commonsense._arc, {"question": {"stem": "a", "choices": NESTED}, "answerKey": "B"}),
    (commonsense._arc, {"question": "a", "choices": LETTERED, "answerKey": "B"}),
    (commonsense._openbookqa, {"question_stem": "a", "choices": LETTERED, "answerKey": "B"}),
    (commonsense._openbookqa, {"Question Stem": "a", "Choices": "(A) a (B) b (C) c (D) d",
                               "Answer Key": "B"}),
    (commonsense.reshaped, {"query": "a", "choices": ["b", "c"], "gold": 1}),
    (closed_book._nq, {"question": "a", "answer": ["b"]}),
    (closed_book._triviaqa, {"question": "a", "answer": {"value": "b", "aliases": ["c"]}}),
    (closed_book._triviaqa, {"Data": [{"Question": "a", "Answer": {"Value": "b",
                                                                   "Aliases": ["c"]}}]}),
    (lambda record: list(reading._questions(record)), {"article": "a", **PROBLEM}),
    (lambda record: list(reading._questions(record)), {"article": "a", "problems": [PROBLEM]}),
    (lambda record: list(reading._questions(record)),
     {"article": "a", "questions": ["b"], "options": [["c", "d"]], "answers": ["A"]}),
]  # fmt: skip
VALUES = (None, "", " ", "x", -1, 2, 9**99, 0.5, float("nan"), True, [], [[]], {}, ["x"], [None],
          [{}], {"x": 1}, {"text": [1], "label": [[]]}, "[" * 999, "\ud800",
          ["a", "\ud800"])  # fmt: skip


def paths(value, path=()):
    """All places in a value."""
    yield path
    keys = (
        value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    )
    for key in keys:
        yield from paths(value[key], (*path, key))


def replaced(record, path, value):
    record = copy.deepcopy(record)
    place = record
    for key in path[:-1]:
        place = place[key]
    if value is ...:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return record


@pytest.mark.parametrize("number", range(len(READERS)))
def test_every_field_replaced(number):
    read, record = READERS[number]
    assert read(Record("file.jsonl line 7", record))
    messages = []
    for path in list(paths(record))[1:]:
        for value in (..., *VALUES):
            damaged = replaced(record, path, value)
            try:
                doc = read(Record("file.jsonl line 7", damaged))
                json.dumps(doc, ensure_ascii=False).encode()  # text that can be tokenized
            except ValueError as e:
                messages.append(str(e))
    assert [m for m in messages if not m.startswith("file.jsonl line 7") or "\n" in m] == []
    assert messages
