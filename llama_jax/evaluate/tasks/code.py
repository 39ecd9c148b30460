"""HumanEval and MBPP (table 8 of the paper): generated programs, run in a sandbox."""

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from llama_jax.evaluate import sandbox
from llama_jax.evaluate.local_data import MissingData, field, find, read_located, strings
from llama_jax.evaluate.paper_task import PaperTask, TaskOptions

HUMANEVAL_DOWNLOAD = (
    "download HumanEval.jsonl.gz from the folder data of github.com/openai/human-eval to "
    "DIR/humaneval/"
)
MBPP_DOWNLOAD = (
    "download mbpp.jsonl from the folder mbpp of github.com/google-research/google-research, or "
    "the data set google-research-datasets/mbpp of the hub, to DIR/mbpp/"
)

TEMPERATURES = (0.1, 0.8)
"""of pass@1, and of pass@k for larger k"""
SECONDS = 3
MEMORY_BYTES = 1 << 30
MAX_NEW_TOKENS = 512

_HUMANEVAL_STOPS = ["\nclass", "\ndef", "\n#", "\nif", "\nprint"]
_MBPP_EXAMPLES = (2, 3, 4)
_MBPP_QUESTIONS = range(11, 511)
_MBPP_STOPS = ["[DONE]"]


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Unbiased estimate of the probability that one of k samples is correct (arXiv 2107.03374).

    Args:
      num_samples: of one problem, at least k.
      num_correct: how many of them pass the tests.
      k: number of attempts.
    """
    return 1 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k)


def score_samples(
    samples: Path, problems: Path, ks: Sequence[int] = (1, 10, 100), seconds: float = SECONDS
) -> dict[str, float]:
    """pass@k of samples in the format of github.com/openai/human-eval.

    Args:
      samples: .jsonl with task_id and completion.
      problems: HumanEval.jsonl.gz, or a file in its format.
      ks: numbers of attempts; those larger than the number of samples of a problem are left out.
      seconds: limit of CPU time of a program.

    Returns:
      "pass@1" and so on, means over the problems.

    Raises:
      ValueError: a damaged file, a sample of an unknown problem, a problem without samples, or no
        sandbox.
    """
    docs = {doc["task_id"]: doc for doc in _humaneval_docs(problems)}
    owners, programs = [], []
    for record in read_located(samples):
        task_id, completion = field(record, "task_id", str), record.value.get("completion")
        if task_id not in docs or not isinstance(completion, str):
            raise ValueError(
                f"{record.where}: expected a task_id of {problems}, and a completion that is text"
            )
        owners.append(task_id)
        programs.append(_program(docs[task_id], completion))
    if missing := docs.keys() - set(owners):
        raise ValueError(f"{samples} has no sample of {sorted(missing)[0]}")
    passed = defaultdict(list)
    outcomes = sandbox.run_all(programs, seconds=seconds, memory_bytes=MEMORY_BYTES)
    for owner, outcome in zip(owners, outcomes, strict=True):
        passed[owner].append(outcome.passed)
    fewest = min(map(len, passed.values()))
    mean = lambda k: sum(pass_at_k(len(p), sum(p), k) for p in passed.values()) / len(passed)
    return {f"pass@{k}": mean(k) for k in ks if k <= fewest}


def _humaneval_docs(path: Path) -> list[dict[str, str]]:
    docs = []
    for record in read_located(path):
        prompt, entry_point = field(record, "prompt", str), field(record, "entry_point", str)
        if not entry_point.isidentifier():
            raise ValueError(f'{record.where}: "entry_point" must be the name of a function')
        docs.append(
            {
                "task_id": field(record, "task_id", str),
                "prompt": prompt,
                "start": prompt,
                "tests": f"{field(record, 'test', str)}\ncheck({entry_point})",
            }
        )
    return docs


def _mbpp_docs(path: Path, examples_path: Path | None = None) -> list[dict[str, str]]:
    """The questions of a file; the examples may be in a file of their own."""
    files = [path] if examples_path is None else [examples_path, path]
    records = {field(r, "task_id", int): r for file in files for r in read_located(file)}
    if absent := set(_MBPP_EXAMPLES) - records.keys():
        raise ValueError(f"{files[0]} has no task {min(absent)}, which is an example in the prompt")

    def question(task_id: int) -> str:
        tests = "\n".join(strings(records[task_id], "test_list"))
        return (
            "You are an expert Python programmer, and here is your task: "
            f"{field(records[task_id], 'text', str)} Your code should pass these tests:\n\n"
            f"{tests}\n[BEGIN]\n"
        )

    examples = "".join(
        f"{question(i)}{field(records[i], 'code', str)}\n[DONE]\n\n" for i in _MBPP_EXAMPLES
    )
    docs = []
    for task_id in sorted(records.keys() & set(_MBPP_QUESTIONS)):
        setup = records[task_id].value.get("test_setup_code") or ""
        docs.append(
            {
                "task_id": str(task_id),
                "prompt": examples + question(task_id),
                "start": "",
                "tests": "\n".join([setup, *strings(records[task_id], "test_list")]),
            }
        )
    if not docs:
        raise ValueError(f"{path} has no task from 11 to 510, which are the questions")
    return docs


def _program(doc: dict[str, str], completion: str) -> tuple[str, str]:
    """A program and its tests."""
    return doc["start"] + completion, doc["tests"]


def _run_all(
    samples: Sequence[Sequence[str]], docs: Sequence[dict[str, str]]
) -> list[list[sandbox.Outcome]]:
    """Outcomes of the samples of each request."""
    programs = [
        _program(doc, text) for doc, texts in zip(docs, samples, strict=True) for text in texts
    ]
    found = iter(sandbox.run_all(programs, seconds=SECONDS, memory_bytes=MEMORY_BYTES))
    return [[next(found) for _ in texts] for texts in samples]


def _make_humaneval(options: TaskOptions) -> Any:
    _check(options)
    patterns = ("HumanEval.jsonl.gz", "HumanEval.jsonl", "*test*.parquet")
    folders = ("humaneval", "human-eval", "openai_humaneval")
    docs = _humaneval_docs(find(options, folders, patterns, HUMANEVAL_DOWNLOAD))
    return _task("paper_humaneval", docs, _HUMANEVAL_STOPS, options.samples)


def _make_mbpp(options: TaskOptions) -> Any:
    _check(options)
    # The hub's data set has the questions and the examples in two splits of the folder "full".
    splits = lambda name: (f"*full/{name}*.parquet", f"{name}*.parquet")
    path = find(options, ("mbpp",), ("mbpp.jsonl", "mbpp.jsonl.gz", *splits("test")), MBPP_DOWNLOAD)
    examples = None
    if path.suffix == ".parquet":
        examples = find(options, ("mbpp",), splits("prompt"), MBPP_DOWNLOAD)
    docs = _mbpp_docs(path, examples)
    return _task("paper_mbpp", docs, _MBPP_STOPS, options.samples)


def _check(options: TaskOptions) -> None:
    """Refuse before anything is generated."""
    if not options.allow_code_execution:
        raise MissingData(
            "runs programs that the model writes: give --allow-code-execution, which runs them in "
            "a sandbox"
        )
    try:
        sandbox.sandbox_name()
    except ValueError as e:
        raise MissingData(str(e)) from None


def _task(name: str, docs: list[dict[str, str]], stops: list[str], num_samples: int) -> Any:
    from datasets import Dataset
    from lm_eval.api.instance import Instance
    from lm_eval.api.task import ConfigurableTask

    columns = {int(metric.removeprefix("pass@")): metric for metric in TASKS[name].metrics}
    ks = [k for k in columns if k <= num_samples]
    temperatures = TEMPERATURES[: 1 + (len(ks) > 1)]

    class CodeTask(ConfigurableTask):
        def fewshot_context(self, doc: dict[str, str], *args: Any, **kwargs: Any) -> str:
            return doc["prompt"]  # code to be continued, which a chat template would prevent

        def construct_requests(
            self, doc: dict[str, str], ctx: str, *, metadata: tuple[Any, ...], **kwargs: Any
        ) -> list[Instance]:
            settings = {"until": stops, "do_sample": True, "max_gen_toks": MAX_NEW_TOKENS}
            return [
                Instance(
                    request_type="generate_until",
                    doc=doc,
                    arguments=(ctx, settings | {"temperature": temperature}),
                    idx=i,
                    metadata=(*metadata[:2], num_samples),
                )
                for i, temperature in enumerate(temperatures)
            ]

    def process_results(
        doc: dict[str, str], outcomes: list[list[sandbox.Outcome]]
    ) -> dict[str, float]:
        correct = [sum(outcome.passed for outcome in samples) for samples in outcomes]
        return {columns[k]: pass_at_k(num_samples, correct[0 if k == 1 else 1], k) for k in ks}

    return CodeTask(
        config={
            "task": name,
            "custom_dataset": lambda **_: {"test": Dataset.from_list(docs)},
            "test_split": "test",
            "output_type": "generate_until",
            "doc_to_text": "prompt",
            "doc_to_target": "tests",
            "generation_kwargs": {"until": stops},
            "filter_list": [
                {"name": "none", "filter": [{"function": "custom", "filter_fn": _run_all}]}
            ],
            "process_results": process_results,
            "metric_list": [
                {"metric": columns[k], "aggregation": "mean", "higher_is_better": True} for k in ks
            ],
        }
    )


_PROTOCOL = (
    "samples at temperature 0.1 for pass@1 and, if there are at least 10, as many at temperature "
    f"0.8 for the others, at most {MAX_NEW_TOKENS} tokens each; unbiased estimate of pass@k "
    "(Chen et al. 2021); programs run in a sandbox with the standard library, "
    f"{SECONDS} s of CPU time and {MEMORY_BYTES >> 30} GiB of memory; no chat template"
)


def _paper_task(
    title: str, largest: int, prompt: str, download: str, make: Callable[[TaskOptions], Any]
) -> PaperTask:
    return PaperTask(
        title=title,
        table="code",
        metrics=("pass@1", "pass@10", f"pass@{largest}"),
        protocol=f"{prompt}; {_PROTOCOL}",
        download=download,
        make=make,
    )


TASKS = {
    "paper_humaneval": _paper_task(
        "HumanEval", 100,
        "zero-shot: the signature and docstring are continued until a line that starts a new "
        "definition, a comment, or if or print", HUMANEVAL_DOWNLOAD, _make_humaneval,
    ),
    "paper_mbpp": _paper_task(
        "MBPP", 80,
        "3-shot with tasks 2, 3 and 4 between [BEGIN] and [DONE] (Austin et al. 2021), tasks 11 "
        "to 510", MBPP_DOWNLOAD, _make_mbpp,
    ),
}  # fmt: skip
