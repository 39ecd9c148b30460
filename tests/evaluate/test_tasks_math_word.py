"""GSM8K and MATH: prompts, extraction of answers, majority votes, published formats."""

import json
from decimal import Decimal

import pytest
from task_tools import requests, scores, shared, stock_task, write

from llama_jax.evaluate.local_data import MissingData
from llama_jax.evaluate.paper_task import TaskOptions
from llama_jax.evaluate.tasks import math_word
from llama_jax.evaluate.tasks.math_word import TASKS, gsm8k_answer, majority, number

GSM8K = [
    {"question": "What is 2 + 2?", "answer": "2 + 2 = <<2+2=4>>4\n#### 4"},
    {"question": "What is 500 * 2?", "answer": "It is 1000.\n#### 1,000"},
]
MATH = {
    "problem": "What is $1/2$?", "level": "Level 1", "type": "Algebra",
    "solution": "It is $\\boxed{\\frac{1}{2}}$.",
}  # fmt: skip
HALF = " So.\nFinal Answer: The final answer is $0.5$. I hope it is correct.\n\n"


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("2 + 2 = 4. The answer is 4.", 4),
        ("The answer is 1,000.", 1000),
        ("The answer is $1,000.50.", Decimal("1000.5")),
        ("The answer is -3", -3),
        ("The answer is 18.0. The answer is 5.", 18),
        ("The answer is four.", None),
        ("4", None),
        ("The answer is 1.2.3.", None),
        ("", None),
    ],
)
def test_numbers(text, answer):
    assert gsm8k_answer(text) == answer


def test_values_of_numbers():
    assert number("$1,234") == number("1234.00") == 1234
    assert number(".5") == Decimal("0.5")
    for text in ("", "-", ".", "1e5", "NaN", "Infinity", "1/2", "٣"):
        assert number(text) is None


def test_majority():
    assert majority([1, 2, 2, None, None, None]) == 2
    assert majority([3, 1, 1, 3]) == 3  # the earliest of equals
    assert majority([None, None]) is None
    assert majority([]) is None


@pytest.mark.parametrize(
    "name",
    ["gsm8k/test.jsonl", "gsm8k/main/test-00000-of-00001.parquet", "GSM8K/gsm8k_test.jsonl"],
)
def test_formats_of_gsm8k(tmp_path, name):
    write(tmp_path, name, GSM8K)
    write(tmp_path, "gsm8k/train.jsonl", [{"bad": 1}])
    write(tmp_path, "gsm8k/socratic/test-00000-of-00001.parquet", [{"bad": 1}])
    assert math_word._gsm8k_docs(TaskOptions(data=tmp_path)) == [
        {"query": "Q: What is 2 + 2?\nA:", "target": "4"},
        {"query": "Q: What is 500 * 2?\nA:", "target": "1,000"},
    ]


def test_bad_gsm8k(tmp_path):
    options = TaskOptions(data=tmp_path)
    write(tmp_path, "gsm8k/train.jsonl", GSM8K)  # training questions are not evaluated
    with pytest.raises(MissingData, match=r"download test\.jsonl"):
        math_word._gsm8k_docs(options)
    write(tmp_path, "gsm8k/test.jsonl", [GSM8K[0], {**GSM8K[0], "answer": "####"}])
    with pytest.raises(ValueError, match=r'test\.jsonl line 2: field "answer" must end with'):
        math_word._gsm8k_docs(options)


def test_gsm8k_asks_what_the_stock_task_asks(tmp_path):
    pytest.importorskip("lm_eval")
    write(tmp_path, "gsm8k/test.jsonl", GSM8K)
    ours = requests(TASKS["paper_gsm8k"].make(TaskOptions(data=tmp_path)))
    stock = requests(stock_task("gsm8k/gsm8k-cot.yaml", {"test": GSM8K}))
    assert [prompt for prompt, _ in ours] == [prompt for prompt, _ in stock]
    assert all(settings == {**stock[0][1], "temperature": 0.0} for _, settings in ours)


def test_greedy_and_majority(tmp_path):
    """The greedy answer to the first question is right, the majority of samples to the second."""
    pytest.importorskip("lm_eval")
    write(tmp_path, "gsm8k/test.jsonl", GSM8K)
    greedy = {"2 + 2": "4", "500": "7"}
    sampled = {"2 + 2": ["5", "4", "5.0"], "500": ["1,000.", "?", "1000"]}

    def answer(args, number):
        question = next(q for q in greedy if q in args[0].rpartition("Q:")[2])
        if not args[1]["do_sample"]:
            assert args[1]["temperature"] == 0
            return f"The answer is {greedy[question]}."
        assert args[1] == {
            "until": ["Q:", "</s>", "<|im_end|>"], "do_sample": True, "temperature": 0.6,
            "top_p": 0.95,
        }  # fmt: skip
        return f"The answer is {sampled[question][number - 1]}"  # after the greedy one

    task = TASKS["paper_gsm8k"].make(TaskOptions(data=tmp_path, samples=3))
    assert scores(task, answer) == {"exact_match": 0.5, "maj1@k": 0.5}
    assert [(i.idx, i.repeats) for i in task.instances] == [(0, 1), (1, 3)] * 2
    task = TASKS["paper_gsm8k"].make(TaskOptions(data=tmp_path))
    assert scores(task, answer) == {"exact_match": 0.5}


@pytest.mark.parametrize(
    "name", ["MATH/test/algebra/1.json", "math/test.jsonl",
             "math/algebra/test-00000-of-00001.parquet"],
)  # fmt: skip
def test_math(tmp_path, name):
    pytest.importorskip("lm_eval")
    write(tmp_path, name, json.dumps(MATH, indent=1) if name.endswith(".json") else [MATH])
    if name.startswith("MATH/"):
        write(tmp_path, "MATH/train/algebra/1.json", "{}")
    options = TaskOptions(data=tmp_path, samples=3)
    task = TASKS["paper_math"].make(options)
    ours = requests(task)
    (stock,) = requests(stock_task("minerva_math/minerva_math_algebra.yaml", {"test": [MATH]}))
    assert [prompt for prompt, _ in ours] == [stock[0]] * 2
    assert ours[0][1]["until"] == ["Problem:"]
    wrong = HALF.replace("0.5", "7")
    assert scores(task, [HALF, wrong, wrong, HALF]) == {"exact_match": 1.0, "maj1@k": 0.0}
    assert scores(task, ["It is 0.5.", "?", "?", HALF]) == {"exact_match": 0.0, "maj1@k": 1.0}


def test_a_limit_keeps_all_subjects_of_math(tmp_path):
    pytest.importorskip("lm_eval")
    for subject, count in (("algebra", 3), ("geometry", 1)):
        for i in range(count):
            record = {**MATH, "problem": f"{subject} {i}"}
            write(tmp_path, f"MATH/test/{subject}/{i}.json", json.dumps(record))
    docs = math_word._math_docs(TaskOptions(data=tmp_path))
    assert [doc["query"].split("\n")[1] for doc in docs] == [
        "algebra 0", "geometry 0", "algebra 1", "algebra 2",
    ]  # fmt: skip


def test_bad_math(tmp_path):
    pytest.importorskip("lm_eval")
    options = TaskOptions(data=tmp_path)
    with pytest.raises(MissingData, match=r"download MATH\.tar"):
        TASKS["paper_math"].make(options)
    write(tmp_path, "MATH/test/algebra/1.json", json.dumps({**MATH, "solution": "It is 5."}))
    with pytest.raises(
        ValueError, match=r"algebra/1\.json: field \"solution\" must have an answer"
    ):
        TASKS["paper_math"].make(options)
    write(tmp_path, "MATH/test/algebra/1.json", '{"problem": "a"}')
    with pytest.raises(ValueError, match=r'1\.json: field "solution" must be a string'):
        TASKS["paper_math"].make(options)


def test_real_questions(tmp_path):
    text = (shared("gsm8k") / "train_head1000.jsonl").read_text()
    write(tmp_path, "gsm8k/test.jsonl", text)
    docs = math_word._gsm8k_docs(TaskOptions(data=tmp_path))
    assert len(docs) == 1000
    assert docs[0]["target"] == "72"
