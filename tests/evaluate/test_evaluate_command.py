"""The command: names of tasks, local data, answers kept after a kill, errors in one line."""

import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import convert_tools
import numpy as np
import pytest
import quick_options
from harness_tools import CFG, CHATML, chatml_folder, llama_folder, tiny

pytest.importorskip("lm_eval")
import llama_jax.evaluate.load as load
import llama_jax.evaluate.run as run
from llama_jax.__main__ import main as command
from llama_jax.evaluate.paper_task import TaskOptions
from llama_jax.evaluate.run import ANSWERS, evaluate, identity
from llama_jax.evaluate.selection import select_tasks
from llama_jax.evaluate.task_sets import TASKS

ROOT = Path(__file__).parents[2]
CHOICE = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_choice: ["yes", "no", "maybe so"]
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
GENERATE = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
output_type: generate_until
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_target: "yes"
generation_kwargs: {{until: ["."], max_gen_toks: 6}}
metric_list: [{{metric: exact_match}}]
"""
DOCS = [dict(question=f"the cat saw {i} mats", answer=i % 3) for i in range(6)]


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    import datasets
    import huggingface_hub.constants

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    return tiny(llama_folder(tmp_path_factory.mktemp("llama")))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Task files, and the data that they name."""
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "my_bad.yaml").write_text("task: [")
    (folder / "my_nameless.yaml").write_text("output_type: multiple_choice")
    data = folder / "docs.jsonl"
    data.write_text("".join(json.dumps(doc) + "\n" for doc in DOCS))
    for name, text in (("my_choice", CHOICE), ("my_text", GENERATE)):
        (folder / f"{name}.yaml").write_text(text.format(name=name, data=data))
    return folder


@pytest.fixture
def ask(llm, monkeypatch, capsys, tmp_path):
    """The command on a small model: exit status, standard output, error output."""
    monkeypatch.setattr(load, "load_model", lambda checkpoint, **_: llm)
    monkeypatch.chdir(tmp_path)

    def ask(*args):
        status = command(["evaluate", "checkpoints/tiny", *map(str, args)])
        return status, *capsys.readouterr()

    return ask


def test_the_command_writes_a_report(ask, files, tmp_path):
    tasks = f"{files}/my_choice.yaml, {files}/my_text.yaml"
    status, out, err = ask("--tasks", tasks, "--limit", 5)
    assert status == 0, err
    assert "my_choice" in out
    report = json.loads((tmp_path / "evaluations/tiny/report.json").read_text())
    text = (tmp_path / "evaluations/tiny/report.md").read_text()
    assert "--limit 5" in text
    assert "llama-jax evaluate checkpoints/tiny" in text
    assert list(report["data"]) == [str(files / "docs.jsonl")]
    answers = (tmp_path / "evaluations/tiny" / ANSWERS).read_text().splitlines()
    assert len(answers) == 5 * 3 + 5
    assert [line for line in err.splitlines() if "written to" not in line] == [""]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--tasks", "hellaswga"], "no task 'hellaswga'; the nearest names are hellaswag"),
        (["--tasks", "comonsense"], "commonsense"),
        (["--tasks", "nothing.yaml"], "nothing.yaml does not exist"),
        (["--tasks", ","], "no tasks were named"),
        (["--tasks", "hellaswag"], "datasets/Rowan/hellaswag, save it as DIR/hellaswag/"),
        (["--tasks", "humaneval"], "without a sandbox; use paper_humaneval or paper_mbpp"),
        (["--tasks", "paper_piqa"], "paper_piqa: no data folder was given"),
        (["--tasks", "commonsense"], "no task of commonsense can run"),
        (["--tasks", "commonsense", "--data", "nowhere"], "such as nowhere/piqa"),
        (["--tasks", "my_bad.yaml"], "my_bad.yaml cannot be loaded"),
        (["--tasks", "my_nameless.yaml"], "my_nameless.yaml cannot be loaded"),
        (["--tasks", "my_choice.yaml", "--chat-template"], "no chat template"),
        (["--output", "my_choice.yaml"], "my_choice.yaml is a file"),
        (["--output", "my_choice.yaml/folder"], "my_choice.yaml is a file"),
        (["--tasks", "my_choice.yaml", "--limit", "0"], "--limit 0 must be 1 or more"),
    ],
)
def test_errors_are_one_line(ask, files, args, words):
    args = [f"{files}/{arg}" if arg.startswith("my_") else arg for arg in args]
    status, out, err = ask(*args)
    assert (status, out) == (2, "")
    assert words in err
    assert err.startswith("error: ")
    assert len(err.splitlines()) == 1


def test_tasks_of_the_harness_read_local_files(llm, tmp_path):
    """PIQA of the harness, whose questions are in DIR/piqa/validation.csv."""
    docs = "goal,sol1,sol2,label\n" + "".join(f"the cat {i},sat,saw,{i % 2}\n" for i in range(4))
    (tmp_path / "piqa").mkdir()
    (tmp_path / "piqa/validation.csv").write_text(docs)
    options = TaskOptions(tmp_path)
    results = evaluate(llm, ["piqa"], options, tmp_path / "out", limit=3)
    samples = results["samples"]["piqa"]
    assert [s["doc"]["goal"] for s in samples] == ["the cat 0", "the cat 1", "the cat 2"]
    assert str(tmp_path / "piqa/validation.csv") in (tmp_path / "out/report.md").read_text()
    # A split that the task does not use may have other columns.
    (tmp_path / "piqa/test.csv").write_text("goal,sol1,sol2\na,b,c\n")
    selection = select_tasks(["piqa"], options)
    assert selection.files == [tmp_path / "piqa/validation.csv"]
    (tmp_path / "piqa/test.csv").unlink()
    damaged = tmp_path / "damaged/piqa/validation.jsonl"
    damaged.parent.mkdir(parents=True)
    damaged.write_text('{"goal": "a", "sol1": "b", "sol2": "c", "label": 0}\n{"goal": "a')
    with pytest.raises(ValueError, match=r"piqa cannot be loaded: .*validation\.jsonl line 2"):
        select_tasks(["piqa"], TaskOptions(tmp_path / "damaged"))
    (tmp_path / "piqa/validation.csv").rename(tmp_path / "piqa/test.csv")
    with pytest.raises(ValueError, match="needs the split 'validation'"):
        select_tasks(["piqa"], options)


def test_a_task_that_is_a_class_reads_local_files(tmp_path):
    with pytest.raises(ValueError, match=r"hazyresearch/based-squad, .*squad_completion/SPLIT\.j"):
        select_tasks(["squad_completion"], TaskOptions(tmp_path))
    (tmp_path / "squad_completion").mkdir()
    path = tmp_path / "squad_completion/validation.jsonl"
    path.write_text('{"text": "The cat sat on the", "value": "mat"}\n')
    selection = select_tasks(["squad_completion"], TaskOptions(tmp_path))
    (task,) = selection.loaded["tasks"].values()
    task.build_all_requests()
    assert [request.args[0] for request in task.instances] == ["The cat sat on the"]
    assert selection.files == [path]


def test_words_for_nothing_in_a_local_table_are_text(tmp_path):
    """ "None" is a possible answer; pandas takes it for a missing value."""
    folder = tmp_path / "data [1]*"  # its name is not a pattern
    (folder / "piqa").mkdir(parents=True)
    (folder / "piqa/validation.csv").write_text("goal,sol1,sol2,label\nNA,None,null,1\n")
    selection = select_tasks(["piqa"], TaskOptions(folder))
    assert selection.files == [folder / "piqa/validation.csv"]
    task = selection.loaded["tasks"]["piqa"]
    task.build_all_requests()
    assert [request.args for request in task.instances] == [
        ("Question: NA\nAnswer:", " None"), ("Question: NA\nAnswer:", " null"),
    ]  # fmt: skip


def test_examples_are_not_taken_from_the_questions(tmp_path):
    """Without its training split, the harness would take them from the validation split."""
    docs = "".join(f'{{"goal": "a{i}", "sol1": "b", "sol2": "c", "label": 0}}\n' for i in range(9))
    (tmp_path / "data/my_piqa").mkdir(parents=True)
    (tmp_path / "data/my_piqa/validation.jsonl").write_text(docs)
    stock = Path(pytest.importorskip("lm_eval.tasks").__file__).parent / "piqa/piqa.yaml"
    text = f"include: {stock}\ntask: my_piqa\nnum_fewshot: 2\n"
    (tmp_path / "my_piqa.yaml").write_text(text)
    task = [str(tmp_path / "my_piqa.yaml")]
    with pytest.raises(ValueError, match="needs the split 'train'"):
        select_tasks(task, TaskOptions(tmp_path / "data"))
    (tmp_path / "data/my_piqa/train.jsonl").write_text(docs.replace('"a', '"shot'))
    (loaded,) = select_tasks(task, TaskOptions(tmp_path / "data")).loaded["tasks"].values()
    loaded.set_fewshot_seed(0)
    loaded.build_all_requests()
    assert all(request.args[0].count("Question: shot") == 2 for request in loaded.instances)


def test_a_perplexity_beyond_the_range_of_numbers(llm, tmp_path):
    """The harness takes exp of the log-likelihood per word; a text may have a single long word."""
    task = """
task: my_texts
dataset_path: json
dataset_kwargs: {data_files: {test: %s}}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
"""
    (tmp_path / "docs.jsonl").write_text(json.dumps({"text": "thecatsat" * 60}))
    (tmp_path / "my_texts.yaml").write_text(task % (tmp_path / "docs.jsonl"))
    evaluate(llm, [str(tmp_path / "my_texts.yaml")], TaskOptions(), tmp_path / "out")
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert list(report["tasks"]["my_texts"]["metrics"]) == ["bits_per_byte"]
    assert report["notes"] == ["my_texts: word_perplexity is inf, and has no row."]


def test_a_set_without_some_of_its_data(tmp_path):
    """The tasks that have their data are evaluated; a task named itself is an error."""
    record = dict(goal="a", sol1="b", sol2="c", label=0)
    (tmp_path / "piqa").mkdir()
    (tmp_path / "piqa/valid.jsonl").write_text(json.dumps(record))
    (tmp_path / "piqa/valid-labels.lst").write_text("0\n")
    selection = select_tasks(["paper", "commonsense"], TaskOptions(tmp_path))
    assert list(selection.loaded["tasks"]) == ["paper_piqa"]
    assert set(selection.missing) == set(TASKS) - {"paper_piqa"}
    with pytest.raises(ValueError, match="paper_boolq: "):
        select_tasks(["commonsense", "paper_boolq"], TaskOptions(tmp_path))


def table(folder):
    report = json.loads((folder / "report.json").read_text())
    return {name: value for name, value in report.items() if name in ("scores", "tasks", "results")}


def test_an_interrupted_run_continues(llm, files, tmp_path, monkeypatch):
    """Interrupted after any number of answers: the same table, and no answer computed twice."""
    tasks = [str(files / "my_choice.yaml"), str(files / "my_text.yaml")]
    evaluate(llm, tasks, TaskOptions(), tmp_path / "whole")
    lines = (tmp_path / "whole" / ANSWERS).read_bytes()
    assert len(lines.splitlines()) == 6 * 3 + 6
    for size in random.Random(0).sample(range(len(lines)), 3):
        folder = tmp_path / str(size)
        folder.mkdir()
        (folder / ANSWERS).write_bytes(lines[:size])
        evaluate(llm, tasks, TaskOptions(), folder)
        keys = [json.loads(x)["key"] for x in (folder / ANSWERS).read_text().splitlines()]
        assert len(keys) == len(set(keys)) == 24
        assert table(folder) == table(tmp_path / "whole")


def test_answers_of_another_model_are_not_used(llm, files, tmp_path):
    folder = llama_folder(tmp_path)
    other = tiny(folder)
    other._engine = llm._engine.with_params({**llm.params, "norm": llm.params["norm"] * 2})
    same = tiny(folder)
    assert identity(same) == identity(llm)
    assert identity(other) != identity(llm)
    eos = tiny(folder, eos_ids=[5])
    assert identity(eos) != identity(llm)
    rotary = tiny(folder)
    rotary.cfg = dataclasses.replace(CFG, rope=dataclasses.replace(CFG.rope, theta=5e5))
    assert identity(rotary) != identity(llm)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "add_bos_token": False}))
    assert identity(tiny(folder)) != identity(llm)


def test_groups_of_the_harness_have_standard_errors(llm, files, tmp_path):
    group = dict(group="my_group", task=["my_choice"], aggregate_metric_list=[dict(metric="acc")])
    (tmp_path / "my_group.yaml").write_text(json.dumps(group))
    shutil.copy(files / "my_choice.yaml", tmp_path)
    evaluate(llm, [str(tmp_path / "my_group.yaml")], TaskOptions(), tmp_path / "out")
    tasks = json.loads((tmp_path / "out/report.json").read_text())["tasks"]
    score = tasks["my_group"]["metrics"]["acc"]
    assert score == pytest.approx(tasks["my_choice"]["metrics"]["acc"])
    assert score["n"] == 6
    mean = score["value"]
    assert 0 < mean < 1
    assert score["standard_error"] == pytest.approx((mean * (1 - mean) / 5) ** 0.5)


def test_two_processes_do_not_share_a_folder(llm, files, tmp_path):
    (tmp_path / "out").mkdir()
    with run.folder_lock(tmp_path / "out", "evaluating"), pytest.raises(ValueError, match="in use"):
        evaluate(llm, [str(files / "my_choice.yaml")], TaskOptions(), tmp_path / "out")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A small model on disk in the format of Hugging Face, with a chat template."""
    folder = tmp_path_factory.mktemp("hf") / "model"
    state = convert_tools.meta_state(CFG, np.dtype("float32"), make=convert_tools.random_values)
    convert_tools.make_hf(folder, state, CFG)
    for path in folder.glob("token*"):
        path.unlink()
    chatml_folder(folder)
    (folder / "chat_template.jinja").write_text(CHATML)
    return folder


def process(module, *args, **more):
    env = os.environ | {
        "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1", "XLA_FLAGS": quick_options.FLAGS,
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }  # fmt: skip
    line = [sys.executable, "-m", module, *map(str, args)]
    return subprocess.Popen(
        line, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **more
    )


def test_a_killed_process_continues(checkpoint, files, tmp_path):
    output = tmp_path / "out"
    args = (checkpoint, "--tasks", files / "my_choice.yaml", "--output", output)
    with process("llama_jax.evaluate", *args) as killed:
        while killed.poll() is None and not (
            (output / ANSWERS).exists() and (output / ANSWERS).stat().st_size
        ):
            time.sleep(0.001)
        killed.send_signal(signal.SIGKILL)
    before = (output / ANSWERS).read_bytes()
    with process("llama_jax.evaluate", *args) as again:
        out, err = again.communicate()
    assert again.returncode == 0, err
    assert "my_choice" in out
    content = (output / ANSWERS).read_bytes()
    assert content.startswith(before[: before.rfind(b"\n") + 1])
    keys = [json.loads(line)["key"] for line in content.splitlines()]
    assert len(keys) == len(set(keys)) == 18


def test_the_harness_finds_the_model_by_name(checkpoint, files, tmp_path):
    args = [
        "--model", "llama_jax", "--model_args", f"checkpoint={checkpoint},dtype=float32",
        "--include_path", files, "--tasks", "my_choice,my_text", "--limit", "3",
        "--apply_chat_template",
    ]  # fmt: skip
    with process("llama_jax.evaluate.lm_eval", *args, cwd=tmp_path) as ran:
        out, err = ran.communicate()
    assert ran.returncode == 0, err
    assert "|my_choice|" in out


def test_model_args():
    from llama_jax.evaluate.harness_model import HarnessModel

    with pytest.raises(ValueError, match="unknown model_args 'color'"):
        HarnessModel.create_from_arg_string("checkpoint=x,color=red", {"batch_size": 1})
    with pytest.raises(ValueError, match="give the checkpoint"):
        HarnessModel.create_from_arg_obj({"dtype": "float32"}, {"device": "cuda:0"})
