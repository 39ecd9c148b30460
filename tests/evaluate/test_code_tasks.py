"""HumanEval and MBPP: prompts, pass@k, verdicts of programs, and completions as generated."""

import functools
import gzip
import json
from types import SimpleNamespace

import numpy as np
import pytest
from task_tools import requests, scores, shared, write

from llama_jax.evaluate import sandbox
from llama_jax.evaluate.local_data import MissingData
from llama_jax.evaluate.paper_task import TaskOptions
from llama_jax.evaluate.task_sets import TASKS
from llama_jax.evaluate.tasks import code

HUMANEVAL = [
    {
        "task_id": "HumanEval/0",
        "prompt": 'from typing import List\n\n\ndef largest(x: List[int]) -> int:\n    """ max\n'
        '    """\n',
        "entry_point": "largest",
        "canonical_solution": "    best = x[0]\n    for y in x:\n        if y > best:\n"
        "            best = y\n    return best\n",
        "test": "\n\nMETADATA = {}\n\n\ndef check(candidate):\n    assert candidate([3, 5]) == 5\n"
        "    assert candidate([-1]) == -1\n",
    },
    {
        "task_id": "HumanEval/1",
        "prompt": "def helper(x):\n    return x + 1\n\n\ndef twice(x):\n",
        "entry_point": "twice",
        "canonical_solution": "\treturn helper(x) - 1 + x\n",
        "test": "def check(candidate):\n    for i in range(9):\n"
        "        assert candidate(i) == 2 * i\n        assert candidate(i) == helper(i) + i - 1\n",
    },
]


def mbpp(task_id, name, setup=""):
    return {
        "text": f"Write a function to {name}.",
        "code": f"def {name}(x):\r\n  return x",
        "task_id": task_id,
        "test_setup_code": setup,
        "test_list": [f"assert {name}({i}) == {i}" for i in range(3)],
        "challenge_test_list": ["assert False"],
    }


MBPP = [
    *(mbpp(i, f"example{i}") for i in (1, 2, 3, 4, 10)),
    mbpp(11, "first", setup="start = first(7)"),
    mbpp(510, "last"),
    *(mbpp(i, "other") for i in (511, 600, 974)),
]


@pytest.fixture
def options(tmp_path):
    write(tmp_path, "humaneval/HumanEval.jsonl", HUMANEVAL)
    write(tmp_path, "mbpp/mbpp.jsonl", MBPP)
    return TaskOptions(tmp_path, allow_code_execution=True)


@pytest.fixture
def outcomes(monkeypatch):
    """Programs are not run: one passes if it contains "right"."""
    judge = lambda program: sandbox.Outcome("right" in program, "")
    run = lambda pairs, **_: [judge(program) for program, _ in pairs]
    monkeypatch.setattr(sandbox, "run_all", run)
    monkeypatch.setattr(sandbox, "sandbox_name", lambda: "none")


def runs_here():
    try:
        return bool(sandbox.sandbox_name())
    except ValueError:
        return False


def test_pass_at_k():
    assert code.pass_at_k(10, 3, 1) == pytest.approx(0.3)
    assert code.pass_at_k(5, 2, 2) == pytest.approx(0.7)  # 3 of the 10 pairs have no correct one
    assert code.pass_at_k(5, 0, 5) == 0
    assert code.pass_at_k(5, 3, 3) == code.pass_at_k(200, 101, 100) == 1
    for c in range(0, 101, 5):  # the product of Chen et al. 2021, figure 3
        product = 1 - np.prod(1 - 100 / np.arange(200 - c + 1, 201))
        assert code.pass_at_k(200, c, 100) == pytest.approx(product)


def test_samples_of_a_file(tmp_path):
    write(tmp_path, "problems.jsonl", HUMANEVAL)
    right = [record["canonical_solution"] for record in HUMANEVAL]
    samples = {
        "HumanEval/0": [right[0], "    return max(x)", "  return max(x)", "return max(x)", ""],
        "HumanEval/1": [right[1], "    return 2 * x", right[1] + "  x", "    return 0"],
    }
    rows = [{"task_id": i, "completion": text} for i, texts in samples.items() for text in texts]
    write(tmp_path, "samples.jsonl", rows)
    score = functools.partial(code.score_samples, tmp_path / "samples.jsonl")
    if not runs_here():
        with pytest.raises(ValueError, match="install bubblewrap"):
            score(tmp_path / "problems.jsonl")
        return
    found = score(tmp_path / "problems.jsonl", ks=(1, 2, 4, 5))
    assert found == {
        "pass@1": pytest.approx((2 / 5 + 2 / 4) / 2),
        "pass@2": pytest.approx((1 - 3 / 10 + 1 - 1 / 6) / 2),
        "pass@4": 1.0,
    }


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"task_id": "HumanEval/7", "completion": "x"}, "samples.jsonl line 1: expected a task_id"),
        ({"task_id": "HumanEval/0", "completion": 5}, "samples.jsonl line 1: expected a task_id"),
        ({"task_id": "HumanEval/0", "completion": ""}, "has no sample of HumanEval/1"),
    ],
)
def test_bad_samples(tmp_path, row, message):
    write(tmp_path, "problems.jsonl", HUMANEVAL)
    write(tmp_path, "samples.jsonl", [row])
    with pytest.raises(ValueError, match=message):
        code.score_samples(tmp_path / "samples.jsonl", tmp_path / "problems.jsonl")


def test_published_samples():
    """README of github.com/openai/human-eval: 0.5. One of the samples sleeps for 10 seconds."""
    folder = shared("humaneval")
    if runs_here():
        names = ("example_samples.jsonl", "example_problem.jsonl")
        assert code.score_samples(*(folder / name for name in names), seconds=2) == {"pass@1": 0.5}


def test_canonical_solutions(tmp_path):
    """Eight of the 164 problems, those whose tests or solutions are unusual among them."""
    with gzip.open(shared("humaneval") / "HumanEval.jsonl.gz", "rt") as lines:
        records = [json.loads(line) for line in lines]
    chosen = [records[i] for i in (0, 32, 38, 50, 53, 115, 145, 163)]
    write(tmp_path, "problems.jsonl", chosen)
    rows = [{"task_id": r["task_id"], "completion": r["canonical_solution"]} for r in chosen]
    write(tmp_path, "samples.jsonl", rows)
    if runs_here():
        paths = [tmp_path / "samples.jsonl", tmp_path / "problems.jsonl"]
        assert code.score_samples(*paths) == {"pass@1": 1.0}


def test_mbpp_prompt(options):
    docs = code._mbpp_docs(options.data / "mbpp/mbpp.jsonl")
    assert [doc["task_id"] for doc in docs] == ["11", "510"]
    assert docs[0]["prompt"] == (
        "You are an expert Python programmer, and here is your task: Write a function to example2."
        " Your code should pass these tests:\n\nassert example2(0) == 0\nassert example2(1) == 1\n"
        "assert example2(2) == 2\n[BEGIN]\ndef example2(x):\r\n  return x\n[DONE]\n\n"
        "You are an expert Python programmer, and here is your task: Write a function to example3."
        " Your code should pass these tests:\n\nassert example3(0) == 0\nassert example3(1) == 1\n"
        "assert example3(2) == 2\n[BEGIN]\ndef example3(x):\r\n  return x\n[DONE]\n\n"
        "You are an expert Python programmer, and here is your task: Write a function to example4."
        " Your code should pass these tests:\n\nassert example4(0) == 0\nassert example4(1) == 1\n"
        "assert example4(2) == 2\n[BEGIN]\ndef example4(x):\r\n  return x\n[DONE]\n\n"
        "You are an expert Python programmer, and here is your task: Write a function to first."
        " Your code should pass these tests:\n\nassert first(0) == 0\nassert first(1) == 1\n"
        "assert first(2) == 2\n[BEGIN]\n"
    )
    # The setup of the tests needs the function, so it follows the program.
    assert docs[0]["tests"].startswith("start = first(7)\nassert first(0) == 0\n")
    assert "False" not in docs[0]["tests"]


def test_mbpp_of_the_hub(options, outcomes, tmp_path):
    """Questions and examples are in two splits; the sanitized edition is another data set."""
    pytest.importorskip("datasets")
    whole = requests(TASKS["paper_mbpp"].make(options))
    splits = {"prompt": MBPP[:5], "test": MBPP[5:7], "validation": MBPP[7:8], "train": MBPP[8:]}
    hub = tmp_path / "hub"
    for name, rows in splits.items():
        write(hub, f"mbpp/full/{name}-00000-of-00001.parquet", rows)
        write(hub, f"mbpp/sanitized/{name}-00000-of-00001.parquet", [{"task_id": 2}])
    assert requests(TASKS["paper_mbpp"].make(options._replace(data=hub))) == whole
    (hub / "mbpp/full/prompt-00000-of-00001.parquet").unlink()
    (hub / "mbpp/sanitized/prompt-00000-of-00001.parquet").unlink()
    with pytest.raises(MissingData, match=r"has no file \*full/prompt"):
        TASKS["paper_mbpp"].make(options._replace(data=hub))


@pytest.mark.parametrize("name", ["paper_humaneval", "paper_mbpp"])
def test_refused_without_permission(options, name):
    with pytest.raises(MissingData, match="--allow-code-execution") as error:
        TASKS[name].make(options._replace(allow_code_execution=False))
    assert "\n" not in str(error.value)


def test_sets_without_permission(options, outcomes):
    """A set runs without the tasks that cannot run, which it lists."""
    pytest.importorskip("lm_eval")
    from llama_jax.evaluate.selection import select_tasks

    write(
        options.data,
        "winogender/templates.tsv",
        "occupation(0)\tother-participant(1)\tanswer\tsentence\n"
        "baker\tguest\t0\tThe $OCCUPATION told the $PARTICIPANT that $NOM_PRONOUN left.\n",
    )
    statistics = "occupation\tbls_pct_female\nbaker\t60\n"
    write(options.data, "winogender/occupations-stats.tsv", statistics)
    denied = options._replace(allow_code_execution=False)
    selection = select_tasks(["bias", "code"], denied)
    assert list(selection.loaded["tasks"]) == ["paper_winogender"]
    assert "--allow-code-execution" in selection.missing["paper_humaneval"]
    assert "--allow-code-execution" in selection.missing["paper_mbpp"]
    with pytest.raises(MissingData, match=r"no task of code can run; .*--allow-code-execution"):
        select_tasks(["code"], denied)
    with pytest.raises(MissingData, match=r"paper_mbpp: .*--allow-code-execution"):
        select_tasks(["bias", "paper_mbpp"], denied)
    selection = select_tasks(["code"], options)
    assert list(selection.loaded["tasks"]) == ["paper_humaneval", "paper_mbpp"]


@pytest.mark.parametrize("name", ["paper_humaneval", "paper_mbpp"])
def test_absent_data(tmp_path, name, outcomes):
    with pytest.raises(MissingData, match=r"download .*jsonl.* from .*github\.com"):
        TASKS[name].make(TaskOptions(tmp_path, allow_code_execution=True))


@pytest.mark.parametrize(
    ("name", "records", "message"),
    [
        ("humaneval/HumanEval.jsonl", [HUMANEVAL[0] | {"entry_point": "f(); g"}], "name of a func"),
        ("humaneval/HumanEval.jsonl", [HUMANEVAL[0] | {"test": 5}], 'line 1: field "test" must be'),
        ("mbpp/mbpp.jsonl", MBPP[3:], "mbpp.jsonl has no task 2"),
        ("mbpp/mbpp.jsonl", MBPP[:5], "mbpp.jsonl has no task from 11 to 510"),
        ("mbpp/mbpp.jsonl", [*MBPP, mbpp(12, "x") | {"test_list": []}], 'line 11: field "test_lis'),
    ],
)
def test_damaged_data(tmp_path, outcomes, name, records, message):
    write(tmp_path, name, records)
    options = TaskOptions(tmp_path, allow_code_execution=True)
    with pytest.raises(ValueError, match=message):
        TASKS[f"paper_{name.split('/')[0]}"].make(options)


def test_requests(options, outcomes):
    pytest.importorskip("lm_eval")
    for samples, temperatures in ((1, [0.1]), (9, [0.1]), (10, [0.1, 0.8])):
        task = TASKS["paper_humaneval"].make(options._replace(samples=samples))
        asked = requests(task)
        assert [prompt for prompt, _ in asked[:: len(temperatures)]] == [
            record["prompt"] for record in HUMANEVAL
        ]
        assert [settings["temperature"] for _, settings in asked] == 2 * temperatures
        assert all(settings["do_sample"] for _, settings in asked)
        assert {instance.repeats for instance in task.instances} == {samples}
        assert "\ndef" in asked[0][1]["until"]
    task = TASKS["paper_mbpp"].make(options)
    assert requests(task)[0][1]["until"] == ["[DONE]"]
    # A chat template would prevent that the model continues the code.
    task.build_all_requests(apply_chat_template=True, chat_template=lambda *_, **__: "chat")
    assert requests(task)[0][0].endswith("[BEGIN]\n")


def test_metrics(options, outcomes):
    """pass@1 counts the samples at temperature 0.1, the others those at 0.8."""
    pytest.importorskip("lm_eval")

    def answer(args, number):
        cold, first = args[1]["temperature"] == 0.1, args[0] == HUMANEVAL[0]["prompt"]
        return "right" if (cold and number < 3) or (not cold and first and number % 4 == 0) else ""

    many = options._replace(samples=12)
    found = scores(TASKS["paper_humaneval"].make(many), lambda args, n: answer(args, n % 12))
    # Samples 0, 4 and 8 of the first problem pass at 0.8.
    expected = (code.pass_at_k(12, 3, 10) + 0) / 2
    assert found == {"pass@1": pytest.approx(3 / 12), "pass@10": pytest.approx(expected)}
    found = scores(TASKS["paper_mbpp"].make(options._replace(samples=80)), lambda *_: "right")
    assert found == {"pass@1": 1.0, "pass@10": 1.0, "pass@80": 1.0}
    assert scores(TASKS["paper_mbpp"].make(options), lambda *_: "") == {"pass@1": 0.0}


def test_answers_are_run(options):
    pytest.importorskip("lm_eval")
    if not runs_here():
        with pytest.raises(ValueError, match="install bubblewrap"):
            TASKS["paper_mbpp"].make(options)
        return
    answers = {record["prompt"]: record["canonical_solution"] for record in HUMANEVAL}
    task = TASKS["paper_humaneval"].make(options)
    assert scores(task, lambda args, _: answers[args[0]]) == {"pass@1": 1.0}
    wrong = {prompt: text.replace("1", "2") for prompt, text in answers.items()}
    assert scores(task, lambda args, _: wrong[args[0]]) == {"pass@1": 0.5}
    body = lambda name: f"def {name}(x):\n  return x"
    answer = lambda args, _: body("first") if "first" in args[0] else body("wrong")
    assert scores(TASKS["paper_mbpp"].make(options), answer) == {"pass@1": 0.5}


def generated(tokenizer, prompt, text, until):
    """What the harness gets if a model generates the tokens of a text."""
    from lm_eval.api.instance import Instance

    from llama_jax.evaluate.harness_model import HarnessModel

    class FixedModel:
        eos_ids = (tokenizer.eos_id,)
        cfg = SimpleNamespace(rope=SimpleNamespace(type="default"))

        def _decode(self, requests, sequences, options, steps):
            (request,), (sequence,) = requests, sequences
            ids = [1, *tokenizer.encode(prompt + text)]
            assert ids[: len(request.ids)] == request.ids
            new = [*ids[len(request.ids) :], tokenizer.eos_id]
            sequence.append(new, [0.0] * len(new), self.eos_ids, options.max_new_tokens)
            yield SimpleNamespace(logits_BV=np.zeros((1, 1)))

    model = HarnessModel(tokenizer, None, 4096, llm=FixedModel())
    settings = {"until": until, "do_sample": True, "temperature": 0.1, "max_gen_toks": 512}
    asked = Instance("generate_until", {}, (prompt, settings), 0, ("task", 0, 1))
    return model.generate_until([asked], disable_tqdm=True)[0]


def check_completions(tokenizer, records):
    stops = code._HUMANEVAL_STOPS
    for record in records:
        prompt, body = record["prompt"], record["canonical_solution"]
        body = "    pass\n" if "\n#" in body else body
        assert generated(tokenizer, prompt, body, stops) == body
        more = "\n\ndef other():\n    return 1\n"
        assert generated(tokenizer, prompt, body + more, stops) == f"{body}\n"


def test_completions_keep_their_first_blank(tmp_path):
    """SentencePiece omits the blank before a text that is decoded alone."""
    pytest.importorskip("lm_eval")
    from llama_jax.data.tokenizer import Tokenizer
    from llama_jax.prepare.tokenizer import train_tokenizer

    texts = [r["prompt"] + r["canonical_solution"] for r in HUMANEVAL for _ in range(20)]
    train_tokenizer(texts, 320, tmp_path / "tokenizer.model")
    tokenizer = Tokenizer.load(tmp_path)
    prompt, body = HUMANEVAL[0]["prompt"], HUMANEVAL[0]["canonical_solution"]
    ids = tokenizer.encode(prompt + body)[len(tokenizer.encode(prompt)) :]
    assert tokenizer.decode(ids) == body.removeprefix(" ")
    check_completions(tokenizer, HUMANEVAL)


def test_completions_of_the_llama_tokenizer():
    pytest.importorskip("lm_eval")
    from llama_jax.data.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(shared("llama_tokenizer"))
    with gzip.open(shared("humaneval") / "HumanEval.jsonl.gz", "rt") as lines:
        records = [json.loads(line) for line in lines]
    check_completions(tokenizer, records[::10])
