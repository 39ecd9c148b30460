"""Table 7 of the paper: GSM8K and MATH, by the greedy answer and by a majority of sampled ones."""

import re
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

from llama_jax.evaluate.local_data import field, find, find_all, read_located
from llama_jax.evaluate.paper_task import PaperTask, TaskOptions
from llama_jax.evaluate.tasks.commonsense import patterns
from llama_jax.evaluate.tasks.local_task import Doc, in_turn, local_task
from llama_jax.prepare.records import Record

SAMPLING = {"temperature": 0.6, "top_p": 0.95}
"""Of the answers that vote, as for Minerva (Lewkowycz et al. 2022)."""

_ANSWER = re.compile(r"The answer is \$?(-?\$?[0-9.,]*[0-9])")
_NUMBER = re.compile(r"-?[0-9]*\.?[0-9]+")
_GSM8K_DOWNLOAD = (
    "download test.jsonl from the folder grade_school_math/data of "
    "github.com/openai/grade-school-math to DIR/gsm8k/"
)
_MATH_DOWNLOAD = (
    "download MATH.tar from people.eecs.berkeley.edu/~hendrycks, or the data set "
    "EleutherAI/hendrycks_math of the hub, and unpack it to DIR/math/"
)


def majority(answers: Iterable[Hashable | None]) -> Any:
    """The most frequent answer, the earliest of equally frequent ones; None if there is none."""
    votes = Counter(answer for answer in answers if answer is not None)
    return votes.most_common(1)[0][0] if votes else None


# GSM8K -------------------------------------------------------------------------------------------


def number(text: str) -> Decimal | None:
    """The value of a number such as "$1,000.50"; None if the text is not one."""
    text = text.replace(",", "").replace("$", "").strip()
    return Decimal(text) if _NUMBER.fullmatch(text) else None


def gsm8k_answer(text: str) -> Decimal | None:
    """The number after the first "The answer is" of a generated text."""
    match = _ANSWER.search(text)
    return number(match[1]) if match else None


def _gsm8k_docs(options: TaskOptions) -> list[Doc]:
    stems = patterns("test", "main/test*", "*test*")
    docs = []
    for record in read_located(
        find(options, ("gsm8k", "grade_school_math"), stems, _GSM8K_DOWNLOAD)
    ):
        answer = field(record, "answer", str).rpartition("####")[2].strip()
        if number(answer) is None:
            raise ValueError(f'{record.where}: field "answer" must end with "#### NUMBER"')
        docs.append({"query": f"Q: {field(record, 'question', str)}\nA:", "target": answer})
    return docs


def _make_gsm8k(options: TaskOptions) -> Any:
    docs = _gsm8k_docs(options)
    import lm_eval.tasks
    import yaml

    # The harness has the eight examples of Wei et al. (2022).
    path = Path(lm_eval.tasks.__file__).parent / "gsm8k" / "gsm8k-cot.yaml"
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    shots = [
        {"query": f"Q: {example['question']}\nA:", "target": example["target"]}
        for example in config["fewshot_config"]["samples"]
    ]
    return _answer_task(
        "paper_gsm8k",
        docs,
        shots,
        config["generation_kwargs"]["until"],
        options.samples,
        gsm8k_answer,
        lambda doc, answer: answer == number(doc["target"]),
    )


# MATH --------------------------------------------------------------------------------------------


def _math_docs(options: TaskOptions) -> list[Doc]:
    from lm_eval.tasks.minerva_math import utils

    def read(record: Record) -> Doc:
        solution = field(record, "solution", str)
        boxed = utils.last_boxed_only_string(solution)
        if boxed is None:
            raise ValueError(f'{record.where}: field "solution" must have an answer in \\boxed{{}}')
        answer = utils.normalize_final_answer(utils.remove_boxed(boxed))
        return {"query": _math_query(field(record, "problem", str)), "target": answer}

    files = ("*test/*/*.json", *patterns("test", "*test-00000-of-*", "*test*"))
    paths = find_all(options, ("math", "hendrycks_math"), files, _MATH_DOWNLOAD)
    subjects: dict[Path, list[Doc]] = {}
    for path in paths:
        subjects.setdefault(path.parent, []).extend(map(read, read_located(path)))
    return in_turn(subjects.values())


def _math_query(problem: str) -> str:
    return f"Problem:\n{problem}\n\nSolution:"


def _make_math(options: TaskOptions) -> Any:
    from lm_eval.tasks.minerva_math import utils

    def answer_of(text: str) -> str | None:
        answer = utils.get_unnormalized_answer(text)
        return None if answer == "[invalidanswer]" else utils.normalize_final_answer(answer)

    shots = [
        {"query": _math_query(example["problem"]), "target": example["solution"]}
        for example in utils.list_fewshot_samples()
    ]
    return _answer_task(
        "paper_math",
        _math_docs(options),
        shots,
        ["Problem:"],
        options.samples,
        answer_of,
        lambda doc, answer: utils.is_equiv(answer, doc["target"]),
    )


# Both --------------------------------------------------------------------------------------------


def _answer_task(
    name: str,
    docs: Sequence[Doc],
    shots: Sequence[Doc],
    until: list[str],
    samples: int,
    answer_of: Callable[[str], Any],
    is_right: Callable[[Doc, Any], bool],
) -> Any:
    """A task with one greedy answer per question and, if ``samples`` > 1, as many sampled ones."""

    def score(doc: Doc, results: list[list[str]]) -> dict[str, float]:
        right = {}
        for metric, texts in zip(("exact_match", "maj1@k"), results, strict=False):
            answer = majority(map(answer_of, texts))
            right[metric] = float(answer is not None and is_right(doc, answer))
        return right

    return local_task(
        name,
        docs,
        ("exact_match", "maj1@k")[: 1 + (samples > 1)],
        shots=shots,
        samples=samples,
        sampling={"until": until, "do_sample": True, **SAMPLING},
        output_type="generate_until",
        doc_to_text="query",
        doc_to_target="target",
        generation_kwargs={"until": until, "do_sample": False, "temperature": 0.0},
        filter_list=[{"name": "none", "filter": []}],  # all sampled answers reach the score
        process_results=score,
    )


_MAJORITY = (
    "; maj1@k: the most frequent of the --samples answers sampled with temperature "
    f"{SAMPLING['temperature']} and top-p {SAMPLING['top_p']}"
)
TASKS: dict[str, PaperTask] = {
    "paper_math": PaperTask(
        title="MATH",
        table="math_word",
        metrics=("exact_match", "maj1@k"),
        protocol=(
            "4-shot with the prompt of Minerva; greedy; the answer after Final Answer: The final "
            "answer is, normalized and compared as an expression by the harness" + _MAJORITY
        ),
        download=_MATH_DOWNLOAD,
        make=_make_math,
    ),
    "paper_gsm8k": PaperTask(
        title="GSM8K",
        table="math_word",
        metrics=("exact_match", "maj1@k"),
        protocol=(
            "8-shot with the chains of thought of Wei et al. (2022); greedy; the number after the "
            "first The answer is (the strict filter of the harness)" + _MAJORITY
        ),
        download=_GSM8K_DOWNLOAD,
        make=_make_gsm8k,
    ),
}
