"""Table 6 of the paper: RACE, middle and high school, with the prompt of Brown et al. (2020)."""

import ast
import itertools
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

from llama_jax.data.tokenizer import check_text
from llama_jax.evaluate.local_data import field, find_all, read_located
from llama_jax.evaluate.paper_task import PaperTask, TaskOptions
from llama_jax.evaluate.tasks.commonsense import patterns
from llama_jax.evaluate.tasks.local_task import Doc, local_task
from llama_jax.prepare.records import Record

_DOWNLOAD = (
    "download RACE.tar.gz from www.cs.cmu.edu/~glai1/data/race, or the data set ehovy/race of the "
    "hub, and unpack it to DIR/race/"
)


class _Question(NamedTuple):
    article: str
    text: str
    options: list[str]
    gold: int


def _questions(record: Record) -> Iterator[_Question]:
    """The questions of a record, which has a passage or, in ehovy/race, one question."""
    article, value = field(record, "article", str), record.value
    problems: list[tuple[Any, Any, Any]]
    if "problems" in value:  # EleutherAI/race
        problems = [
            (p.get("question"), p.get("options"), p.get("answer")) for p in _problems(record)
        ]
    elif "questions" in value:
        parts = [field(record, name, list) for name in ("questions", "options", "answers")]
        if len({len(part) for part in parts}) > 1:
            raise ValueError(
                f"{record.where}: expected as many options and answers as questions; there are "
                + ", ".join(str(len(part)) for part in parts)
            )
        problems = list(zip(*parts, strict=True))
    else:
        problems = [(value.get("question"), value.get("options"), value.get("answer"))]
    for number, (text, options, answer) in enumerate(problems, 1):
        part = Record(
            f"{record.where}, question {number}",
            {"question": text, "options": options, "answer": answer},
        )
        letters = "ABCDEFGH"[: len(field(part, "options", list))]
        if not all(isinstance(option, str) for option in options):
            raise ValueError(f"{part.where}: the options must be strings")
        check_text(part.where, "".join(options))
        if field(part, "answer", str) not in tuple(letters):
            raise ValueError(
                f"{part.where}: the answer must be a letter of {letters}, not {answer!r:.60}"
            )
        yield _Question(article, field(part, "question", str), options, letters.index(answer))


def _problems(record: Record) -> list[dict[str, Any]]:
    """The problems of a record of EleutherAI/race, a list in the notation of Python."""
    problems = record.value["problems"]
    if isinstance(problems, str):
        try:
            problems = ast.literal_eval(problems)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            problems = None
    if not isinstance(problems, list) or not all(isinstance(p, dict) for p in problems):
        raise ValueError(f'{record.where}: field "problems" must be a list of questions')
    return problems


def _docs(level: str, options: TaskOptions) -> list[Doc]:
    """One document per question; the prompt has the earlier questions of the passage."""
    files = (
        f"*test/{level}/*.txt",
        *patterns(f"{level}/test-00000-of-*", f"*{level}*test*", f"*test*{level}*"),
    )
    paths = find_all(options, ("race",), files, _DOWNLOAD)
    questions = [q for path in paths for r in read_located(path) for q in _questions(r)]
    docs = []
    for article, of_passage in itertools.groupby(questions, lambda question: question.article):
        prompt = f"Article:\n{article}"
        for question in of_passage:
            prompt += f"\n\nQ: {question.text}\n\nA:"
            docs.append({"query": prompt, "choices": question.options, "gold": question.gold})
            prompt += f" {question.options[question.gold]}"
    return docs


def _make(level: str, options: TaskOptions) -> Any:
    name = f"paper_race_{level}"
    return local_task(
        name,
        _docs(level, options),
        TASKS[name].metrics,
        answer_context=True,
        output_type="multiple_choice",
        doc_to_text="query",
        doc_to_choice="choices",
        doc_to_target="gold",
    )


TASKS: dict[str, PaperTask] = {
    f"paper_race_{level}": PaperTask(
        title=f"RACE-{level}",
        table="reading",
        metrics=("acc_mutual_info", "acc"),
        protocol=(
            "as Brown et al. (2020): zero-shot; prompt Article:\\n...\\n\\nQ: ...\\n\\nA: with the "
            "earlier questions of the passage and their right answers; the option with the highest "
            'log P(option | prompt) - log P(option | "Answer:")'
        ),
        download=_DOWNLOAD,
        make=partial(_make, level),
    )
    for level in ("middle", "high")
}
