"""RACE: prompts, the rule of the choice, and the published formats."""

import json

import pytest
from task_tools import requests, scores, write

from llama_jax.evaluate.local_data import MissingData
from llama_jax.evaluate.paper_task import TaskOptions
from llama_jax.evaluate.tasks import reading
from llama_jax.evaluate.tasks.reading import TASKS

OPTIONS = [["Red.", "Blue.", "Green.", "It is not said."], ["two", "three", "four", " "]]
PASSAGE = {
    "article": "The sky is blue.\nIt has 2 suns.", "id": "middle1.txt", "answers": ["B", "A"],
    "options": OPTIONS, "questions": ["What color is the sky?", "The sky has  _  suns."],
}  # fmt: skip
PROBLEMS = [
    {"question": q, "options": o, "answer": a}
    for q, o, a in zip(PASSAGE["questions"], OPTIONS, "BA", strict=True)
]
HEAD = "Article:\nThe sky is blue.\nIt has 2 suns.\n\nQ: What color is the sky?\n\nA:"
DOCS = [
    {"query": HEAD, "choices": OPTIONS[0], "gold": 1},
    {
        "query": HEAD + " Blue.\n\nQ: The sky has  _  suns.\n\nA:",
        "choices": OPTIONS[1],
        "gold": 0,
    },
]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("RACE/test/middle/1.txt", json.dumps(PASSAGE)),
        ("race/middle/test-00000-of-00001.parquet",
         [{"article": PASSAGE["article"], "example_id": "middle1.txt", **p} for p in PROBLEMS]),
        ("race/middle/test-00000-of-00001.parquet",
         [{"article": PASSAGE["article"], "problems": str(PROBLEMS)}]),
        ("race_middle_test.jsonl", [PASSAGE]),
    ],
)  # fmt: skip
def test_published_formats(tmp_path, name, content):
    write(tmp_path, name, content)
    write(tmp_path, "race/test/high/2.txt", json.dumps({**PASSAGE, "answers": ["A", "A"]}))
    write(tmp_path, "race/train/middle/3.txt", "{}")
    options = TaskOptions(data=tmp_path)
    assert reading._docs("middle", options) == DOCS
    assert [doc["gold"] for doc in reading._docs("high", options)] == [0, 0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"answers": ["B"]},
            r"1\.txt: expected as many options and answers as questions; .* 2, 2, 1",
        ),
        ({"answers": ["B", "E"]}, r"1\.txt, question 2: the answer must be a letter of ABCD"),
        ({"options": [["a", 3], ["b"]]}, "question 1: the options must be strings"),
        ({"options": ["ab", "cd"]}, 'question 1: field "options" must be a list'),
        ({"questions": ["a", ""]}, 'question 2: field "question" must be a string'),
        ({"article": None}, r'1\.txt: field "article" must be a string'),
        ({"problems": "os.getcwd()"}, 'field "problems" must be a list of questions'),
        ({"problems": [3]}, 'field "problems" must be a list of questions'),
    ],
)
def test_bad_records(tmp_path, change, message):
    write(tmp_path, "race/test/high/1.txt", json.dumps({**PASSAGE, **change}))
    with pytest.raises(ValueError, match=message):
        reading._docs("high", TaskOptions(data=tmp_path))


def test_missing(tmp_path):
    with pytest.raises(MissingData, match=r"download RACE\.tar\.gz .* to DIR/race/$"):
        reading._docs("high", TaskOptions(data=tmp_path))


def test_options_are_normalized_by_the_answer_context(tmp_path):
    pytest.importorskip("lm_eval")
    write(tmp_path, "race/test/middle/1.txt", json.dumps(PASSAGE))
    task = TASKS["paper_race_middle"].make(TaskOptions(data=tmp_path))
    asked = requests(task)
    for doc, of_doc in zip(DOCS, (asked[:8], asked[8:]), strict=True):
        continuations = [f" {option}" for option in doc["choices"]]
        assert of_doc == [
            *((doc["query"], continuation) for continuation in continuations),
            *(("Answer:", continuation) for continuation in continuations),
        ]
    # The sum chooses the first option, the difference the second, which is right once.
    assert scores(task, [-1, -2, -3, -4, -1, -9, -3, -4] * 2) == {
        "acc_mutual_info": 0.5,
        "acc": 0.5,
    }
    assert scores(task, [-1, -2, -3, -4, -3, -3, -4, -5] * 2) == {
        "acc_mutual_info": 0.5,
        "acc": 0.5,
    }
    assert scores(task, [-1, -2, -3, -4, -1, -9, -3, -4], limit=1) == {
        "acc_mutual_info": 1.0,
        "acc": 0.0,
    }
