"""MMLU: prompts of the stock tasks, per-subject examples, and the averages of the paper."""

import csv
import json

import pytest
from task_tools import requests, scores, shared, stock_task

from llama_jax.evaluate.local_data import MissingData
from llama_jax.evaluate.paper_task import TaskOptions
from llama_jax.evaluate.tasks import knowledge
from llama_jax.evaluate.tasks.knowledge import GROUP_OF, GROUPS, TASKS

TASK = TASKS["paper_mmlu"]


def rows(subject, split, count):
    return [
        [f" {subject} {split} {i}? ", f"a{i}", "b, c", "1", "d", "ABCD"[i % 4]]
        for i in range(count)
    ]


def write_csv(folder, subject, count=2, examples=5, answer=None):
    for split, number in (("dev", examples), ("test", count)):
        path = folder / "mmlu" / split / f"{subject}_{split}.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", newline="") as f:
            table = rows(subject, split, number)
            if answer and split == "test":
                table[-1][-1] = answer
            csv.writer(f).writerows(table)


def write_parquet(folder, subjects):
    from pyarrow import Table, parquet

    for split, count in (("dev", 5), ("test", 2)):
        records = [
            {"question": q, "subject": s, "choices": choices, "answer": "ABCD".index(answer)}
            for s in subjects
            for q, *choices, answer in rows(s, split, count)
        ]
        path = folder / "mmlu" / "all" / f"{split}-00000-of-00001.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        parquet.write_table(Table.from_pylist(records), path)


def test_groups():
    assert [len(subjects) for subjects in GROUPS.values()] == [13, 18, 12, 14]
    assert len(GROUP_OF) == 57
    assert GROUP_OF["anatomy"] == "other"
    assert len(set(TASK.metrics)) == 1 + 4 + 57


def test_both_published_forms_give_the_same_documents(tmp_path):
    subjects = ("anatomy", "high_school_us_history")
    for subject in subjects:
        write_csv(tmp_path / "csv", subject)
    write_parquet(tmp_path / "hub", subjects)
    from_csv, from_hub = (
        knowledge._documents(TaskOptions(data=tmp_path / name)) for name in ("csv", "hub")
    )
    assert from_csv == from_hub
    questions, examples = from_csv
    assert questions["anatomy"][1] == {
        "subject": "anatomy",
        "description": "The following are multiple choice questions (with answers) about anatomy."
        "\n\n",
        "query": "anatomy test 1?\nA. a1\nB. b, c\nC. 1\nD. d\nAnswer:",
        "choices": ["A", "B", "C", "D"],
        "gold": 1,
    }
    assert [len(docs) for docs in examples.values()] == [5, 5]


def test_bad_data(tmp_path):
    options = TaskOptions(data=tmp_path)
    with pytest.raises(MissingData, match=r"download data\.tar"):
        knowledge._documents(options)
    write_csv(tmp_path, "anatomy", answer="E")
    with pytest.raises(ValueError, match=r"anatomy_test\.csv line 2: the answer must be A, B"):
        knowledge._documents(options)
    write_csv(tmp_path, "anatomy", examples=4)
    with pytest.raises(ValueError, match=r"anatomy has 4 examples .*expected 5"):
        knowledge._documents(options)
    (tmp_path / "mmlu/dev/anatomy_dev.csv").unlink()
    with pytest.raises(MissingData, match=r"anatomy_dev\.csv"):
        knowledge._documents(options)
    write_csv(tmp_path, "anatomy")
    path = tmp_path / "mmlu/test/anatomy_test.csv"
    path.write_text(path.read_text() + "only,three,columns\n")
    with pytest.raises(ValueError, match=r"anatomy_test\.csv line 3 has 3 columns; expected 6"):
        knowledge._documents(options)
    write_csv(tmp_path, "anatomy")
    write_csv(tmp_path, "cooking")
    with pytest.raises(ValueError, match=r"'cooking' is not one of MMLU's 57 subjects"):
        knowledge._documents(options)


def test_requests_are_those_of_the_stock_tasks(tmp_path):
    pytest.importorskip("lm_eval")
    subjects = ("anatomy", "high_school_us_history")
    for subject in subjects:
        write_csv(tmp_path, subject, count=3)
    task = TASK.make(TaskOptions(data=tmp_path))
    ours = requests(task)
    stock = {}
    for subject in subjects:
        splits = {
            split: [
                {"question": q, "choices": choices, "answer": "ABCD".index(answer)}
                for q, *choices, answer in rows(subject, split, count)
            ]
            for split, count in (("dev", 5), ("test", 3))
        }
        of_subject = stock_task(f"mmlu/default/mmlu_{subject}.yaml", splits)
        of_subject.set_config("num_fewshot", 5)
        stock[subject] = requests(of_subject)
    assert (
        ours
        == [
            request
            for i in range(3)  # the subjects alternate
            for subject in subjects
            for request in stock[subject][4 * i : 4 * i + 4]
        ]
    )
    assert requests(task, limit=2) == ours[:8]


def test_averages_are_over_questions(tmp_path, capsys):
    """Anatomy, of the group Other, has 3 questions, Astronomy 1; right: A of anatomy's A, B, C."""
    pytest.importorskip("lm_eval")
    write_csv(tmp_path, "anatomy", count=3)
    write_csv(tmp_path, "astronomy", count=1)
    task = TASK.make(TaskOptions(data=tmp_path))
    note = task.config.metadata["note"]
    assert note == (
        "averages are over the 2 of MMLU's 57 subjects that are in the data folder, only anatomy, "
        "astronomy"
    )
    assert capsys.readouterr().err == note + "\n"
    assert scores(task, [-1, -2, -3, -4] * 4) == {
        "average": 0.5,
        "other": pytest.approx(1 / 3),
        "anatomy": pytest.approx(1 / 3),
        "stem": 1.0,
        "astronomy": 1.0,
    }


def test_a_missing_subject_is_named(tmp_path, capsys):
    pytest.importorskip("lm_eval")
    for subject in GROUP_OF:
        if subject != "virology":
            write_csv(tmp_path, subject, count=1)
    task = TASK.make(TaskOptions(data=tmp_path))
    assert "the 56 of MMLU's 57 subjects that" in task.config.metadata["note"]
    assert task.config.metadata["note"].endswith("folder, without virology")
    write_csv(tmp_path, "virology")
    capsys.readouterr()
    assert TASK.make(TaskOptions(data=tmp_path)).config.metadata is None
    assert capsys.readouterr().err == ""


def test_prompts_and_accuracy_of_a_real_model():
    pytest.importorskip("lm_eval")
    folder = shared("smollm2")
    lines = (folder / "mmlu_5shot.jsonl").read_text().splitlines()
    golden = [json.loads(line) for line in lines]
    log_likelihoods = json.loads((folder / "golden_eval.json").read_text())["mmlu_5shot"]
    task = TASK.make(TaskOptions(data=folder.parent))
    task.build_all_requests()
    by_prompt = {}
    for instance in task.instances:
        by_prompt.setdefault(instance.args[0], []).append(instance)
    correct = []
    for doc, values in zip(golden, log_likelihoods["loglikelihoods"], strict=True):
        instances = by_prompt[doc["query"]]
        assert [i.args[1] for i in instances] == [" A", " B", " C", " D"]
        assert instances[0].doc["gold"] == doc["gold"]
        result = task.process_results(instances[0].doc, [(value, False) for value in values])
        assert result["average"] == result[doc["subject"]]
        correct.append(result["average"])
    assert sum(correct) / len(correct) == pytest.approx(log_likelihoods["acc"])
