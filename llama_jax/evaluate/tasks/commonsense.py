"""Table 3 of the paper: eight benchmarks of common sense reasoning, zero-shot multiple choice.

Prompts are those of the harness's tasks of the same names. A document has a query, its choices and
the index of the right one.
"""

import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from llama_jax.data.tokenizer import check_text
from llama_jax.evaluate.local_data import (
    MissingData,
    field,
    find,
    read_located,
    read_text,
    strings,
)
from llama_jax.evaluate.paper_task import PaperTask, TaskOptions
from llama_jax.evaluate.tasks.local_task import Doc, local_task
from llama_jax.prepare.records import Record

SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".parquet")
CHARACTERS = "zero-shot; the choice with the highest log-likelihood per character"
ANSWER = 'zero-shot; the choice with the highest log P(choice | prompt) - log P(choice | "Answer:")'


def patterns(*stems: str, suffixes: Sequence[str] = SUFFIXES) -> tuple[str, ...]:
    """Patterns of the files of a data set: each stem with each suffix."""
    return tuple(stem + suffix for stem in stems for suffix in suffixes)


# Records -----------------------------------------------------------------------------------------


def choice_doc(record: Record, query: str, choices: list[str], gold: int) -> Doc:
    """A document.

    Raises:
      ValueError: ``gold`` is not the index of a choice.
    """
    if not 0 <= gold < len(choices):
        raise ValueError(f"{record.where}: the right answer is {gold}, of {len(choices)} choices")
    return {"query": query, "choices": choices, "gold": gold}


def reshaped(record: Record, start: str = "", end: str = "") -> Doc | None:
    """The document of a record with "query", "choices" and "gold"; None if it has other fields.

    ``start`` and ``end`` are added to the query where they are absent.
    """
    if "query" not in record.value:
        return None
    query = field(record, "query", str)
    query = query if query.startswith(start) else start + query
    query = query if query.endswith(end) else query + end
    return choice_doc(record, query, strings(record, "choices", 2), field(record, "gold", int))


def label(record: Record, name: str, first: int, count: int) -> int:
    """A number from ``first`` to ``first + count - 1``, also as text, as an index from 0."""
    value = record.value.get(name)
    for i in range(count):
        if type(value) in (int, str) and str(value).strip() == str(first + i):
            return i
    raise ValueError(
        f'{record.where}: field "{name}" must be a number from {first} to {first + count - 1}; it '
        f"is {value!r:.60} (test sets without answers cannot be evaluated)"
    )


def _boolq(record: Record) -> Doc:
    question, passage = field(record, "question", str), field(record, "passage", str)
    answer = record.value.get("answer", record.value.get("label"))
    if type(answer) not in (bool, int) or answer not in (0, 1):
        raise ValueError(
            f'{record.where}: field "answer" must be true or false, or "label" 0 or 1; it is '
            f"{answer!r:.60}"
        )
    query = f"{passage}\nQuestion: {question}?\nAnswer:"
    return choice_doc(record, query, ["no", "yes"], int(answer))


def _piqa(record: Record) -> Doc:
    choices = [field(record, "sol1", str), field(record, "sol2", str)]
    query = f"Question: {field(record, 'goal', str)}\nAnswer:"
    return choice_doc(record, query, choices, label(record, "label", 0, 2))


_SIQA_LETTERS = ("correct", "label_letter")
"""Fields with the letter of the right answer in SocialIQA 1.4, without and with dimensions."""


def _siqa(record: Record) -> Doc:
    query = f"Q: {field(record, 'context', str)} {field(record, 'question', str)}\nA:"
    if "options" in record.value:
        choices, answer = strings(record, "options", 2), field(record, "answer", str)
        if answer not in choices:
            raise ValueError(f'{record.where}: the answer "{answer:.60}" is not one of the options')
        return choice_doc(record, query, choices, choices.index(answer))
    choices = [field(record, f"answer{letter}", str) for letter in "ABC"]
    if name := next((name for name in _SIQA_LETTERS if name in record.value), None):
        letter = field(record, name, str).strip()
        if letter not in tuple("ABC"):
            raise ValueError(
                f'{record.where}: field "{name}" must be A, B or C, not {letter!r:.60}'
            )
        return choice_doc(record, query, choices, "ABC".index(letter))
    return choice_doc(record, query, choices, label(record, "label", 1, 3))


def _hellaswag(record: Record) -> Doc:
    """Texts without the marks of WikiHow, such as "[header]", as in the harness."""

    def clean(text: str) -> str:
        text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
        return text.replace("  ", " ")

    start, end = (record.value.get(name) for name in ("ctx_a", "ctx_b"))
    if not isinstance(start, str) or not isinstance(end, str):
        raise ValueError(f'{record.where}: fields "ctx_a" and "ctx_b" must be strings')
    check_text(record.where, start + end)
    query = f"{field(record, 'activity_label', str)}: {start} {end.capitalize()}"
    choices = [clean(ending) for ending in strings(record, "endings", 2)]
    return choice_doc(record, clean(query), choices, label(record, "label", 0, len(choices)))


def _winogrande(record: Record) -> Doc:
    """Both sentences up to the option, and the end that they share."""
    if "context_options" in record.value:
        contexts, end = strings(record, "context_options", 2), field(record, "continuation", str)
        gold = label(record, "gold", 0, len(contexts))
    else:
        start, blank, end = field(record, "sentence", str).partition("_")
        if not blank or not end.strip():
            raise ValueError(f'{record.where}: field "sentence" must have "_" and text after it')
        contexts = [start + field(record, name, str) for name in ("option1", "option2")]
        gold = label(record, "answer", 1, 2)
    return {"contexts": contexts, "continuation": end.strip(), "gold": gold}


def _lettered(record: Record, start: str, end: str) -> Doc:
    """A question of ARC or OpenBookQA: AI2's nested form, or the hub's flat one."""
    question, value = record.value.get("question"), record
    if isinstance(question, dict):
        value = Record(record.where, {**question, "answerKey": record.value.get("answerKey")})
        query = field(value, "stem", str)
    else:
        query = field(
            record, "question_stem" if "question_stem" in record.value else "question", str
        )
    choices = value.value.get("choices")
    if isinstance(choices, list) and all(isinstance(choice, dict) for choice in choices):
        choices = {name: [choice.get(name) for choice in choices] for name in ("text", "label")}
    if not isinstance(choices, dict):
        raise ValueError(f'{record.where}: "choices" must have a text and a label for each choice')
    fields = Record(record.where, choices)
    texts, labels = strings(fields, "text", 2), strings(fields, "label", 2)
    key = field(value, "answerKey", str).strip()
    if len(texts) != len(labels) or key not in labels:
        raise ValueError(
            f'{record.where}: answerKey is "{key:.60}", and the labels of {len(texts)} choices are '
            f"{', '.join(labels):.60}"
        )
    return choice_doc(record, start + query + end, texts, labels.index(key))


def _arc(record: Record) -> Doc:
    return _lettered(record, "Question: ", "\nAnswer:")


def _openbookqa(record: Record) -> Doc:
    if "Question Stem" not in record.value:
        return _lettered(record, "", "")
    text = field(record, "Choices", str)
    match = re.fullmatch(r"\(A\)(.+)\(B\)(.+)\(C\)(.+)\(D\)(.+)", text)
    key = field(record, "Answer Key", str).strip()
    if not match or key not in "ABCD":
        raise ValueError(
            f'{record.where}: expected the choices "(A) ... (B) ... (C) ... (D) ..." and a letter '
            f"from A to D; they are {text!r:.60} and {key!r:.60}"
        )
    choices = [choice.strip() for choice in match.groups()]
    return choice_doc(record, field(record, "Question Stem", str), choices, "ABCD".index(key))


# Tasks -------------------------------------------------------------------------------------------


class _DataSet(NamedTuple):
    folders: tuple[str, ...]
    patterns: tuple[str, ...]
    to_doc: Callable[[Record], Doc]
    start: str = ""
    end: str = ""
    """of a query, where a reshaped record does not have them"""


def _read(data_set: _DataSet, options: TaskOptions, download: str) -> list[Doc]:
    path = find(options, data_set.folders, data_set.patterns, download)
    records = _with_labels(path, read_located(path), download)
    if data_set.to_doc is _winogrande:  # has a reshaped form of its own
        return list(map(_winogrande, records))
    return [
        reshaped(record, data_set.start, data_set.end) or data_set.to_doc(record)
        for record in records
    ]


def _with_labels(path: Path, records: list[Record], download: str) -> list[Record]:
    """Records with labels; PIQA and SIQA have them in a file of their own, NAME-labels.lst."""
    first = records[0].value
    if not {"sol1", "answerA"} & set(first) or {"label", *_SIQA_LETTERS} & set(first):
        return records
    labels_path = path.with_name(path.name.partition(".")[0] + "-labels.lst")
    if not labels_path.is_file():
        raise MissingData(
            f"{labels_path}, the right answers of {path.name}, is missing: {download}"
        )
    labels = read_text(labels_path).split()
    if len(labels) != len(records):
        raise ValueError(
            f"{labels_path} has {len(labels)} labels; expected {len(records)}, one for each record "
            f"of {path.name}"
        )
    return [
        Record(f"{labels_path.name} line {i}, {record.where}", {**record.value, "label": value})
        for i, (record, value) in enumerate(zip(records, labels, strict=True), 1)
    ]


def _make(name: str, data_set: _DataSet, options: TaskOptions) -> Any:
    task = TASKS[name]
    docs = _read(data_set, options, task.download)
    # An index as the text means that the choices are contexts.
    text, choices, target = (
        ("gold", "contexts", "continuation")
        if name == "paper_winogrande"
        else ("query", "choices", "gold")
    )
    return local_task(
        name,
        docs,
        task.metrics,
        answer_context="acc_mutual_info" in task.metrics,
        output_type="multiple_choice",
        doc_to_text=text,
        doc_to_choice=choices,
        doc_to_target=target,
    )


def _task(
    name: str, title: str, data_set: _DataSet, prompt: str, download: str,
    metrics: tuple[str, ...] = ("acc_norm", "acc"), rule: str = CHARACTERS,
) -> tuple[str, PaperTask]:  # fmt: skip
    make = partial(_make, name, data_set)
    return name, PaperTask(
        title, "commonsense", metrics, f"{rule}; prompt {prompt}", download, make
    )


_QUESTION = "Question: ...\\nAnswer:"
_ARC_DOWNLOAD = (
    "download ARC-V1-Feb2018 from allenai.org/data/arc, or the data set allenai/ai2_arc of the hub,"
    " to DIR/arc/"
)
_ARC_FOLDERS = ("arc", "ai2_arc")
TASKS: dict[str, PaperTask] = dict(
    [
        _task(
            "paper_boolq", "BoolQ",
            _DataSet(("boolq",), patterns("dev", "val*", "*dev*", "*boolq*"), _boolq),
            "PASSAGE\\nQuestion: ...?\\nAnswer:",
            "download dev.jsonl from github.com/google-research-datasets/boolean-questions to "
            "DIR/boolq/",
            ("acc_mutual_info", "acc"), ANSWER,
        ),
        _task(
            "paper_piqa", "PIQA",
            _DataSet(
                ("piqa", "physicaliqa"),
                patterns("valid", "dev", "*validation*", "*valid*", "*dev*", "*piqa*"),
                _piqa, "Question: ", "\nAnswer:",
            ),
            _QUESTION,
            "download valid.jsonl and valid-labels.lst from yonatanbisk.com/piqa/data to DIR/piqa/",
        ),
        _task(
            "paper_siqa", "SIQA",
            _DataSet(
                ("siqa", "socialiqa", "social_iqa", "social_i_qa"),
                patterns("dev", "*validation*", "*dev*", "*siqa*"),
                _siqa, "Q: ", "\nA:",
            ),
            "Q: CONTEXT QUESTION\\nA:",
            "download the development set of SocialIQA (dev.jsonl and dev-labels.lst), or the data "
            "set lighteval/siqa of the hub, to DIR/siqa/",
        ),
        _task(
            "paper_hellaswag", "HellaSwag",
            _DataSet(("hellaswag",), patterns("*_val*", "val*", "*hellaswag*"), _hellaswag),
            "ACTIVITY: CONTEXT",
            "download hellaswag_val.jsonl from github.com/rowanz/hellaswag (folder data) to "
            "DIR/hellaswag/",
        ),
        _task(
            "paper_winogrande", "WinoGrande",
            _DataSet(
                ("winogrande",),
                patterns("dev", "*xl*validation*", "*validation*", "*dev*", "*val*"),
                _winogrande,
            ),
            "the sentence up to and with the option, scored by the rest of the sentence",
            "download winogrande_1.1.zip from winogrande.allenai.org and unpack it to "
            "DIR/winogrande/",
            ("acc",), "zero-shot; the option after which the rest has the highest log-likelihood",
        ),
        _task(
            "paper_arc_easy", "ARC-e",
            _DataSet(
                _ARC_FOLDERS,
                patterns("*easy*test*", "*easy*dev*", "*easy*validation*", "arc_easy"),
                _arc, "Question: ", "\nAnswer:",
            ),
            _QUESTION, _ARC_DOWNLOAD,
        ),
        _task(
            "paper_arc_challenge", "ARC-c",
            _DataSet(
                _ARC_FOLDERS,
                patterns("*challenge*test*", "*challenge*dev*", "*challenge*validation*",
                         "arc_challenge"),
                _arc, "Question: ", "\nAnswer:",
            ),
            _QUESTION, _ARC_DOWNLOAD,
        ),
        _task(
            "paper_openbookqa", "OBQA",
            _DataSet(
                ("openbookqa", "obqa"),
                patterns("*main/test*", "test", "*main/*validation*", "*main/dev", "dev", "*test*",
                         suffixes=(*SUFFIXES, ".tsv")),
                _openbookqa,
            ),
            "the question alone",
            "download OpenBookQA-V1-Sep2018.zip from allenai.org/data/open-book-qa and unpack it "
            "to DIR/openbookqa/",
            ("acc_mutual_info", "acc_norm", "acc"), ANSWER,
        ),
    ]
)  # fmt: skip
