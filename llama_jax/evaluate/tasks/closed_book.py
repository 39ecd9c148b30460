"""Tables 4 and 5 of the paper: NaturalQuestions and TriviaQA without documents, exact match."""

import unicodedata
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from llama_jax.evaluate.local_data import MissingData, field, find_all, read_located, strings
from llama_jax.evaluate.paper_task import PaperTask, TaskOptions
from llama_jax.evaluate.tasks.commonsense import patterns
from llama_jax.evaluate.tasks.local_task import Doc, local_task
from llama_jax.prepare.records import Record

SHOTS = (0, 1, 5, 64)
DESCRIPTION = "Answer these questions:\n"
MAX_ANSWER_TOKENS = 64


# Answers -----------------------------------------------------------------------------------------


def extract(text: str) -> str:
    """The answer in a generated text: its first line, without a final dot or comma."""
    return text.split("\n", 1)[0].strip().rstrip("., ")


def normalize(answer: str) -> str:
    """Lower case; without punctuation, articles and repeated blanks."""
    kept = [c for c in answer.lower() if unicodedata.category(c)[0] not in "PS"]
    words = "".join(kept).split()
    # An answer such as "A" or "The The" is compared with its articles.
    return " ".join([w for w in words if w not in ("a", "an", "the")] or words)


def is_match(text: str, answers: list[str]) -> bool:
    """Whether the answer in a generated text equals one of the right answers."""
    given = normalize(extract(text))
    return bool(given) and given in map(normalize, answers)


# Records -----------------------------------------------------------------------------------------


def _question(text: str) -> str:
    """A prompt for a question, which ends with one question mark if it has no other end."""
    text = " ".join(text.split())
    return f"Q: {text if text[-1] in '?.!' else text + '?'}\nA:"


def _nq(record: Record) -> list[Doc]:
    return [
        {
            "question": _question(field(record, "question", str)),
            "answers": strings(record, "answer"),
        }
    ]


def _triviaqa(record: Record) -> list[Doc]:
    """The questions of a file of the authors ("Data"), or of one record."""
    if "Data" in record.value:
        records = [
            Record(f'{record.where}, "Data" record {i}', value)
            for i, value in enumerate(field(record, "Data", list), 1)
        ]
        if wrong := next((r for r in records if not isinstance(r.value, dict)), None):
            raise ValueError(f"{wrong.where}: expected an object with named fields")
        return [doc for r in records for doc in _triviaqa(r)]
    upper = "Question" in record.value
    question, answer, value, aliases = (
        name.title() if upper else name for name in ("question", "answer", "value", "aliases")
    )
    if not isinstance(record.value.get(answer), dict):
        raise ValueError(
            f'{record.where}: field "{answer}" must be an object with "{value}" and "{aliases}" '
            "(test sets without answers cannot be evaluated)"
        )
    answers = Record(f'{record.where}, "{answer}"', record.value[answer])
    return [
        {
            "question": _question(field(record, question, str)),
            "answers": [field(answers, value, str), *strings(answers, aliases, 0)],
        }
    ]


# Tasks -------------------------------------------------------------------------------------------


class _DataSet(NamedTuple):
    name: str
    folders: tuple[str, ...]
    evaluation: tuple[str, ...]
    training: tuple[str, ...]
    to_docs: Callable[[Record], list[Doc]]
    download: str


_NQ = _DataSet(
    "nq",
    ("nq", "naturalquestions", "natural_questions"),
    patterns("NQ-open.dev", "*validation*", "*dev*", "*test*"),
    patterns("*train*"),
    _nq,
    "download NQ-open.dev.jsonl (and NQ-open.train.jsonl for examples) from the folder nq_open of "
    "github.com/google-research-datasets/natural-questions to DIR/nq/",
)
_TRIVIAQA = _DataSet(
    "triviaqa",
    ("triviaqa", "trivia_qa"),
    # The filtered set is web-dev.json and wikipedia-dev.json, not unfiltered-web-dev.json.
    (
        "w*-dev.json",
        *patterns("*rc.nocontext/validation*", "*rc*validation*", "*validation*", "*dev*"),
        *patterns("triviaqa*"),
    ),
    ("wikipedia-train.json", "w*-train.json", *patterns("*rc.nocontext/train*", "*train*")),
    _triviaqa,
    "download triviaqa-rc.tar.gz from nlp.cs.washington.edu/triviaqa, or the data set "
    "mandarjoshi/trivia_qa (rc.nocontext) of the hub, and unpack it to DIR/triviaqa/",
)


def _read(
    data_set: _DataSet, options: TaskOptions, files: tuple[str, ...], count: int | None = None
) -> list[Doc]:
    """The first ``count`` questions, or all; each question once."""
    docs: dict[str, Doc] = {}
    for path in find_all(options, data_set.folders, files, data_set.download):
        for record in read_located(path, count=count):
            for doc in data_set.to_docs(record):
                docs.setdefault(doc["question"], doc)
    return list(docs.values())[:count]


def _make(data_set: _DataSet, shots: int, options: TaskOptions) -> Any:
    name = f"paper_{data_set.name}_{shots}shot"
    docs = _read(data_set, options, data_set.evaluation)
    # Twice as many records, because a question may be repeated.
    examples = _read(data_set, options, data_set.training, 2 * shots)[:shots] if shots else []
    if len(examples) < shots:
        raise MissingData(
            f"the training file has {len(examples)} questions; expected at least {shots}: "
            + data_set.download
        )
    return local_task(
        name,
        docs,
        ("exact_match",),
        shots=examples,
        description=DESCRIPTION,
        output_type="generate_until",
        doc_to_text="question",
        doc_to_target="answers",
        target_delimiter=" ",
        fewshot_delimiter="\n",
        generation_kwargs={
            "until": ["\n"],
            "max_gen_toks": MAX_ANSWER_TOKENS,
            "do_sample": False,
            "temperature": 0.0,
        },
        process_results=lambda doc, results: {
            "exact_match": float(is_match(results[0], doc["answers"]))
        },
    )


def _task(data_set: _DataSet, title: str, shots: int) -> tuple[str, PaperTask]:
    examples = f"{shots}-shot with the first training questions" if shots else "zero-shot"
    return f"paper_{data_set.name}_{shots}shot", PaperTask(
        title=f"{title} {shots}-shot",
        table="closed_book",
        metrics=("exact_match",),
        protocol=(
            f"{examples}; prompt Answer these questions:\\nQ: ...?\\nA:; greedy; first line, "
            "without a final dot or comma; equal to any right answer after lowercasing and removal "
            "of punctuation, articles and repeated blanks"
        ),
        download=data_set.download,
        make=partial(_make, data_set, shots),
    )


TASKS: dict[str, PaperTask] = dict(
    _task(data_set, title, shots)
    for data_set, title in ((_NQ, "NaturalQuestions"), (_TRIVIAQA, "TriviaQA"))
    for shots in SHOTS
)
