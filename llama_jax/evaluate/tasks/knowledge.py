"""Tables 9 and 16 of the paper: MMLU, 5-shot, per question, per group and per subject."""

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from llama_jax.evaluate.local_data import field, find, find_all, read_located
from llama_jax.evaluate.paper_task import PaperTask, TaskOptions
from llama_jax.evaluate.tasks.commonsense import choice_doc, label
from llama_jax.evaluate.tasks.local_task import Doc, in_turn, local_task
from llama_jax.prepare.records import Record

GROUPS = {
    "humanities": (
        "formal_logic", "high_school_european_history", "high_school_us_history",
        "high_school_world_history", "international_law", "jurisprudence", "logical_fallacies",
        "moral_disputes", "moral_scenarios", "philosophy", "prehistory", "professional_law",
        "world_religions",
    ),
    "stem": (
        "abstract_algebra", "astronomy", "college_biology", "college_chemistry",
        "college_computer_science", "college_mathematics", "college_physics", "computer_security",
        "conceptual_physics", "electrical_engineering", "elementary_mathematics",
        "high_school_biology", "high_school_chemistry", "high_school_computer_science",
        "high_school_mathematics", "high_school_physics", "high_school_statistics",
        "machine_learning",
    ),
    "social sciences": (
        "econometrics", "high_school_geography", "high_school_government_and_politics",
        "high_school_macroeconomics", "high_school_microeconomics", "high_school_psychology",
        "human_sexuality", "professional_psychology", "public_relations", "security_studies",
        "sociology", "us_foreign_policy",
    ),
    "other": (
        "anatomy", "business_ethics", "clinical_knowledge", "college_medicine", "global_facts",
        "human_aging", "management", "marketing", "medical_genetics", "miscellaneous", "nutrition",
        "professional_accounting", "professional_medicine", "virology",
    ),
}  # fmt: skip
"""Subjects by group. The paper's averages count Anatomy in Other; its table 16 prints STEM."""
GROUP_OF = {subject: group for group, subjects in GROUPS.items() for subject in subjects}
SHOTS = 5

_FOLDERS = ("mmlu", "hendryckstest")
_COLUMNS = ("question", "A", "B", "C", "D", "answer")
_PARQUET = "{split}-00000-of-*.parquet"
_DOWNLOAD = (
    "download data.tar from people.eecs.berkeley.edu/~hendrycks, or the data set cais/mmlu of the "
    "hub, and unpack it to DIR/mmlu/"
)


def _documents(options: TaskOptions) -> tuple[dict[str, list[Doc]], dict[str, list[Doc]]]:
    """The test questions and the examples of each subject.

    Raises:
      ValueError: a bad record, an unknown subject, or a subject without five examples.
    """
    patterns = ("*_test.csv", "all/" + _PARQUET.format(split="test"), "*test-00000-of-*.parquet")
    files = find_all(options, _FOLDERS, patterns, _DOWNLOAD)
    questions: dict[str, list[Doc]] = {}
    examples: dict[str, list[Doc]] = {}
    for path in files:
        for subject, docs in _read(path, "_test.csv").items():
            questions.setdefault(subject, []).extend(docs)
        for subject, docs in _read(_examples_of(path, options), "_dev.csv").items():
            examples.setdefault(subject, []).extend(docs)
    for subject in questions:
        if len(examples.get(subject, [])) < SHOTS:
            raise ValueError(
                f"{files[0].parent}: subject {subject} has {len(examples.get(subject, []))} "
                f"examples (dev); expected {SHOTS}"
            )
    return questions, {subject: docs[:SHOTS] for subject, docs in examples.items()}


def _examples_of(path: Path, options: TaskOptions) -> Path:
    """The file of examples that belongs to a file of test questions."""
    if path.suffix == ".csv":
        name = path.name.removesuffix("_test.csv") + "_dev.csv"
        return find(options, _FOLDERS, (name,), _DOWNLOAD)
    folder = path.parent.name
    return find(options, _FOLDERS, (f"*{folder}/" + _PARQUET.format(split="dev"),), _DOWNLOAD)


def _read(path: Path, ending: str) -> dict[str, list[Doc]]:
    docs: dict[str, list[Doc]] = {}
    for record in read_located(path, _COLUMNS if path.suffix == ".csv" else None):
        if path.suffix == ".csv":
            subject = path.name.lower().removesuffix(ending)
            choices = [str(record.value[letter]) for letter in "ABCD"]
            answer = field(record, "answer", str).strip()
            if answer not in tuple("ABCD"):
                raise ValueError(
                    f"{record.where}: the answer must be A, B, C or D, not {answer!r:.60}"
                )
            gold = "ABCD".index(answer)
        else:
            subject, choices = field(record, "subject", str), field(record, "choices", list)
            gold = label(record, "answer", 0, 4)
            if len(choices) != 4 or not all(isinstance(choice, str) for choice in choices):
                raise ValueError(f'{record.where}: "choices" must be four strings')
        if subject not in GROUP_OF:
            raise ValueError(f"{record.where}: {subject!r:.60} is not one of MMLU's 57 subjects")
        docs.setdefault(subject, []).append(_doc(record, subject, choices, gold))
    return docs


def _doc(record: Record, subject: str, choices: list[str], gold: int) -> Doc:
    question = field(record, "question", str).strip()
    lines = [f"{letter}. {choice}" for letter, choice in zip("ABCD", choices, strict=True)]
    query = "\n".join([question, *lines, "Answer:"])
    # As in the harness's tasks, whose names of subjects come from the names of the files.
    description = (
        "The following are multiple choice questions (with answers) about "
        f"{subject.replace('_', ' ')}.\n\n"
    )
    return {
        **choice_doc(record, query, list("ABCD"), gold),
        "subject": subject,
        "description": description,
    }


def _score(doc: Doc, results: list[tuple[float, bool]]) -> dict[str, float]:
    log_likelihoods = [log_likelihood for log_likelihood, _ in results]
    correct = float(log_likelihoods.index(max(log_likelihoods)) == doc["gold"])
    return {name: correct for name in ("average", GROUP_OF[doc["subject"]], doc["subject"])}


def _names(subjects: Iterable[str]) -> str:
    return ", ".join(sorted(subjects))


def _make(options: TaskOptions) -> Any:
    questions, examples = _documents(options)
    absent = [subject for subject in GROUP_OF if subject not in questions]
    listed = f"only {_names(questions)}" if len(absent) > 28 else f"without {_names(absent)}"
    note = (
        f"averages are over the {len(questions)} of MMLU's 57 subjects that are in the data "
        f"folder, {listed}"
    )
    if absent:
        print(note, file=sys.stderr)
    return local_task(
        "paper_mmlu",
        in_turn(questions[subject] for subject in sorted(questions)),
        ("average", *(g for g in GROUPS if set(GROUPS[g]) & set(questions)), *sorted(questions)),
        shots=lambda doc: examples[doc["subject"]],
        output_type="multiple_choice",
        description="description",
        doc_to_text="query",
        doc_to_choice="choices",
        doc_to_target="gold",
        process_results=_score,
        metadata={"note": note} if absent else None,
    )


TASKS: dict[str, PaperTask] = {
    "paper_mmlu": PaperTask(
        title="MMLU",
        table="knowledge",
        metrics=("average", *GROUPS, *sorted(GROUP_OF)),
        protocol=(
            "5-shot with the five examples (dev) of the subject; the letter A to D with the "
            "highest log-likelihood; averages are over questions, and Anatomy is counted in Other, "
            "as in the paper's averages; a prompt longer than the context loses its beginning"
        ),
        download=_DOWNLOAD,
        make=_make,
    )
}
