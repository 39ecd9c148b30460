"""NaturalQuestions and TriviaQA: prompts, cleaning of answers, and the published formats."""

import json

import pytest
from task_tools import requests, scores, shared, write

from llama_jax.evaluate.local_data import MissingData
from llama_jax.evaluate.paper_task import TaskOptions
from llama_jax.evaluate.tasks import closed_book
from llama_jax.evaluate.tasks.closed_book import _NQ, _TRIVIAQA, TASKS, is_match

NQ = [
    {"question": "who  sang  my way", "answer": ["Frank Sinatra", "Sinatra"]},
    {"question": "how many people live in st louis?", "answer": ["300,000"]},
]
NQ_TRAIN = [{"question": f"question {i}", "answer": [f"{i}", "x"]} for i in range(70)]


def trivia(question="Which musical opened in 1993?", value="Sunset Boulevard"):
    answer = {"Value": value, "Aliases": ["Sunset Blvd.", value], "Type": "WikipediaEntity"}
    return {"Question": question, "QuestionId": "tc_33", "Answer": answer}


def trivia_hub(question="Which musical opened in 1993?", value="Sunset Boulevard"):
    answer = {"value": value, "aliases": ["Sunset Blvd.", value], "type": "WikipediaEntity"}
    return {"question": question, "question_id": "tc_33", "answer": answer}


TRIVIA_DOC = {
    "question": "Q: Which musical opened in 1993?\nA:",
    "answers": ["Sunset Boulevard", "Sunset Blvd.", "Sunset Boulevard"],
}


@pytest.mark.parametrize(
    ("text", "answers", "right"),
    [
        (" St. Louis", ["St. Louis"], True),
        (" St. Louis.", ["st louis"], True),
        (" 1,000", ["1000"], True),
        (" 1,000,", ["1,000"], True),
        (" 1", ["1,000"], False),  # what the harness's own tasks make of "1,000"
        (" the Beatles\nQ: Who", ["Beatles"], True),
        (" Beatles\nthe Rolling Stones", ["Rolling Stones"], False),
        (" A Tale of  Two Cities", ["tale of two cities"], True),
        (" Theodore", ["odore"], False),  # "The" is an article only as a word
        (" “Don’t Look Back” ", ["Don't look back"], True),
        (" sunset blvd.", ["Sunset Boulevard", "Sunset Blvd"], True),
        (" Sunset", ["Sunset Boulevard", "Sunset Blvd"], False),
        (" The The", ["The The"], True),
        (" the", ["A"], False),
        ("", ["?"], False),
        (" . ", ["!"], False),
        (" $5", ["5"], True),
        (" İstanbul", ["i̇stanbul"], True),
    ],
)
def test_exact_match(text, answers, right):
    assert is_match(text, answers) == right


def test_prompts_and_generation(tmp_path):
    pytest.importorskip("lm_eval")
    write(tmp_path, "nq/NQ-open.dev.jsonl", NQ)
    write(tmp_path, "nq/NQ-open.train.jsonl", NQ_TRAIN)
    options = TaskOptions(data=tmp_path)
    for shots in (0, 1, 5, 64):
        expected = "Answer these questions:\n"
        expected += "".join(f"Q: question {i}?\nA: {i}\n" for i in range(shots))
        (first, settings), (second, _) = requests(TASKS[f"paper_nq_{shots}shot"].make(options))
        assert first == expected + "Q: who sang my way?\nA:"
        assert second == expected + "Q: how many people live in st louis?\nA:"
        assert settings == {
            "until": ["\n"], "max_gen_toks": 64, "do_sample": False, "temperature": 0.0,
        }  # fmt: skip


def test_accuracy(tmp_path):
    pytest.importorskip("lm_eval")
    write(tmp_path, "nq/NQ-open.dev.jsonl", NQ)
    task = TASKS["paper_nq_0shot"].make(TaskOptions(data=tmp_path))
    assert scores(task, [" Sinatra.", " 300"]) == {"exact_match": 0.5}
    assert scores(task, [" the Frank Sinatra", " 300,000"]) == {"exact_match": 1.0}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("triviaqa-rc/qa/wikipedia-dev.json", {"Data": [trivia()], "Version": 1.0}),
        ("triviaqa/rc.nocontext/validation-00000-of-00001.parquet", [trivia_hub()]),
        ("triviaqa/validation.jsonl", [trivia_hub()]),
    ],
)
def test_formats_of_triviaqa(tmp_path, name, content):
    write(tmp_path, name, json.dumps(content, indent=1) if isinstance(content, dict) else content)
    read = closed_book._read(_TRIVIAQA, TaskOptions(data=tmp_path), _TRIVIAQA.evaluation)
    assert read == [TRIVIA_DOC]


def test_both_files_of_the_filtered_set_and_each_question_once(tmp_path):
    def questions(*texts):
        return json.dumps({"Data": [trivia(text) for text in texts]})

    write(tmp_path, "triviaqa/qa/web-dev.json", questions("a?", "b?"))
    write(tmp_path, "triviaqa/qa/wikipedia-dev.json", questions("b?", "c?"))
    write(tmp_path, "triviaqa/qa/verified-web-dev.json", questions("d?"))
    write(tmp_path, "triviaqa/unfiltered/unfiltered-web-dev.json", questions("e?"))
    write(tmp_path, "triviaqa/qa/wikipedia-train.json", questions("f?", "g?"))
    options = TaskOptions(data=tmp_path)
    read = closed_book._read(_TRIVIAQA, options, _TRIVIAQA.evaluation)
    assert [doc["question"] for doc in read] == [f"Q: {x}?\nA:" for x in "abc"]
    read = closed_book._read(_TRIVIAQA, options, _TRIVIAQA.training, 1)
    assert [doc["question"] for doc in read] == ["Q: f?\nA:"]


def test_parts_of_a_parquet_data_set_are_read_once(tmp_path):
    for i in range(2):
        write(tmp_path, f"nq/validation-0000{i}-of-00002.parquet", NQ[i : i + 1])
    read = closed_book._read(_NQ, TaskOptions(data=tmp_path), _NQ.evaluation)
    assert [doc["answers"] for doc in read] == [["Frank Sinatra", "Sinatra"], ["300,000"]]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("nq/NQ-open.dev.jsonl", [{"question": "a", "answer": "b"}],
         'NQ-open.dev.jsonl line 1: field "answer" must be a list'),
        ("nq/NQ-open.dev.jsonl", [NQ[0], {"question": "a", "answer": []}],
         'line 2: field "answer" must be a list of at least 1 strings'),
        ("nq/NQ-open.dev.jsonl", [{"answer": ["b"]}], 'line 1: field "question" must be a string'),
        ("triviaqa/web-dev.json", json.dumps({"Data": [trivia(), {"Question": "a"}]}),
         r'web-dev.json, "Data" record 2: field "Answer" must be an object'),
        ("triviaqa/web-dev.json", json.dumps({"Data": [3]}), '"Data" record 1: expected an object'),
        ("triviaqa/web-dev.json", json.dumps({"Data": {}}), 'field "Data" must be a list'),
        ("triviaqa/dev.jsonl", [{"question": "a", "answer": {"value": "b", "aliases": 3}}],
         'dev.jsonl line 1, "answer": field "aliases" must be a list'),
    ],
)  # fmt: skip
def test_bad_records(tmp_path, name, content, message):
    write(tmp_path, name, content)
    data_set = _NQ if name.startswith("nq") else _TRIVIAQA
    with pytest.raises(ValueError, match=message):
        closed_book._read(data_set, TaskOptions(data=tmp_path), data_set.evaluation)


def test_missing_and_few_training_questions(tmp_path):
    write(tmp_path, "nq/NQ-open.dev.jsonl", NQ)
    options = TaskOptions(data=tmp_path)
    with pytest.raises(MissingData, match=r"download NQ-open\.dev\.jsonl"):
        TASKS["paper_nq_5shot"].make(options)
    write(tmp_path, "nq/NQ-open.train.jsonl", NQ_TRAIN[:4])
    with pytest.raises(MissingData, match="has 4 questions; expected at least 5"):
        TASKS["paper_nq_5shot"].make(options)


def test_real_sample():
    data = shared("triviaqa").parent
    (doc,) = closed_book._read(_TRIVIAQA, TaskOptions(data=data), _TRIVIAQA.evaluation)
    assert doc["question"].startswith("Q: Which Lloyd Webber musical premiered")
    assert is_match(" Sunset Blvd.", doc["answers"])
