"""The report of an evaluation: Markdown, JSON and a chart, with the paper's results beside ours."""

import importlib.metadata
import json
import math
import platform
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

from llama_jax.evaluate.chart import Bar, save_chart
from llama_jax.evaluate.published import SOURCE, PublishedTable, published_tables
from llama_jax.evaluate.task_sets import TASKS
from llama_jax.io import atomic_write
from llama_jax.versions import source_version

PACKAGES = ("jax", "jaxlib", "lm_eval", "datasets", "numpy")
DAGGER = "†"
CHARTED_MODELS = ("LLaMA 7B", "LLaMA 65B")
MAIN_METRICS = ("acc_norm", "acc", "exact_match")
"""Metrics that stand for a task of the harness; else its first one."""


class RunInfo(NamedTuple):
    """How an evaluation was run."""

    model: str
    command: str
    """the exact command line"""
    data: Mapping[str, str] = {}
    """SHA-256 of each local file that was read, by its path"""
    limit: int | None = None
    """questions per task; None: all"""
    chat_template: bool = False
    """whether the prompts were in the model's chat template"""
    truncated_prompts: int = 0
    """prompts that were longer than the context"""
    sandbox: str = ""
    """what generated code ran in; empty: no code was run"""
    missing: Mapping[str, str] = {}
    """tasks without a result, and why"""
    notes: Sequence[str] = ()
    """what tasks say about their data and their scores; filled in by :func:`write_report`"""
    seconds: float = 0.0


class Score(NamedTuple):
    """A metric of a task over its documents."""

    value: float
    standard_error: float | None
    n: int


Scores = Mapping[str, Mapping[str, Score]]
"""By task and metric; a metric of a filter other than "none" is "metric,filter"."""


def write_report(output: Path, results: dict[str, Any], run: RunInfo) -> str:
    """Write ``report.md``, ``report.json`` and ``chart.png``.

    Args:
      output: an existing folder.
      results: the results of ``lm_eval.simple_evaluate``, with samples.
      run: how they were made.

    Returns:
      The tables as text for the terminal.
    """
    scores = all_scores(results)
    run = run._replace(notes=[*task_notes(results), *_infinite(results)])
    tables = [t for t in published_tables() if any(measured(t, scores))]
    bars = _bars(tables, scores, _fractions(scores, results))
    charted = save_chart(output / "chart.png", bars, run.model)
    report = to_json(scores, tables, run)
    atomic_write(output / "report.json", report.encode())
    atomic_write(output / "report.md", _markdown(scores, tables, run, charted).encode())
    return "\n".join([*_notes(run), "", *_results(scores, tables, run)])


# Scores ------------------------------------------------------------------------------------------


def task_notes(results: dict[str, Any]) -> list[str]:
    """The notes that tasks have in the metadata of their configuration."""
    configs = sorted(results.get("configs", {}).items())
    known = [(task, x) for task, config in configs if isinstance(x := config.get("metadata"), dict)]
    return [f"{task}: {metadata['note']}." for task, metadata in known if metadata.get("note")]


def _infinite(results: dict[str, Any]) -> list[str]:
    """Notes about values that are no numbers, which no table has."""
    return [
        f"{task}: {name.removesuffix(',none')} is {value}, and has no row."
        for task, values in sorted(results["results"].items())
        for name, value in values.items()
        if isinstance(value, float) and not math.isfinite(value) and "_stderr," not in name
    ]


def all_scores(results: dict[str, Any]) -> dict[str, dict[str, Score]]:
    """Scores of every task and group.

    Values and standard errors are the harness's. The number of documents is that of the logged
    samples with the metric, because a metric may apply to some documents only.
    """
    return {
        task: {
            metric.removesuffix(",none"): _score(metric, values, results["samples"].get(task))
            for metric, value in values.items()
            if "," in metric and "_stderr," not in metric and _is_number(value)
        }
        for task, values in results["results"].items()
    }


def _score(metric: str, values: dict[str, Any], samples: list[dict] | None) -> Score:
    name, _, filter_name = metric.partition(",")
    stderr = values.get(f"{name}_stderr,{filter_name}")  # "N/A" for one document
    if samples is None:  # a group of tasks
        n = values.get("sample_count", {}).get(metric, values["sample_len"])
    else:
        n = sum(s["filter"] == filter_name and name in s["metrics"] for s in samples)
    return Score(float(values[metric]), float(stderr) if _is_number(stderr) else None, n)


def _is_number(x: Any) -> TypeGuard[float]:
    try:
        return not isinstance(x, str) and math.isfinite(float(x))
    except (TypeError, ValueError):
        return False


def measured(table: PublishedTable, scores: Scores) -> list[Score | None]:
    """Our score of each item of a table."""
    return [_find(name, scores) for name in table.ours]


def _find(name: str, scores: Scores) -> Score | None:
    task, _, metric = name.partition("/")
    if task not in scores:
        return None
    return _metric(scores[task], metric or TASKS[task].metrics[0])


def _metric(of_task: Mapping[str, Score], metric: str) -> Score | None:
    """A metric of a task of ours, which has one filter."""
    return next((score for name, score in of_task.items() if name.split(",")[0] == metric), None)


def main_metric(task: str, of_task: Mapping[str, Score]) -> str:
    """The metric that stands for a task; "" if it has none."""
    first = TASKS[task].metrics if task in TASKS else MAIN_METRICS
    return next((m for m in first if m in of_task), next(iter(of_task), ""))


# Text --------------------------------------------------------------------------------------------


def _markdown(scores: Scores, tables: Sequence[PublishedTable], run: RunInfo, charted: bool) -> str:
    lines = [f"# Evaluation of {run.model}", "", *_notes(run)]
    if charted:
        lines += ["", "![bar chart](chart.png)"]
    lines += ["", *_results(scores, tables, run), "", "## Protocol", ""]
    lines += [f"- {TASKS[task].title}: {TASKS[task].protocol}" for task in _ours(scores)]
    if others := [task for task in scores if task not in TASKS]:
        lines += [f"- as in lm-evaluation-harness: {', '.join(others)}"]
    lines += ["", "## How to reproduce", "", "```", run.command, "```", ""]
    lines += [f"- {name} {version}" for name, version in versions().items()]
    lines += [f"- {path}: SHA-256 {digest}" for path, digest in sorted(run.data.items())]
    lines += [f"- {run.seconds:,.0f} seconds, {time.strftime('%Y-%m-%d %H:%M UTC', time.gmtime())}"]
    return "\n".join(lines) + "\n"


def _notes(run: RunInfo) -> list[str]:
    """What a reader must know before the numbers."""
    notes = []
    if run.limit is not None:
        notes.append(
            f"First {run.limit:,} questions of each task: not comparable with published results."
        )
    if run.chat_template:
        notes.append("Prompts were put in the model's chat template, which the paper did not do.")
    if run.truncated_prompts:
        notes.append(
            f"{run.truncated_prompts:,} prompts were longer than the context and were truncated "
            "from the left."
        )
    if run.sandbox:
        notes.append(f"Generated code ran in a sandbox: {run.sandbox}.")
    return [line for note in [*notes, *run.notes] for line in (note, "")][:-1]


def _results(scores: Scores, tables: Sequence[PublishedTable], run: RunInfo) -> list[str]:
    """All tables, and the tasks without a result."""
    lines = []
    for table in tables:
        lines += [f"## Table {table.number}. {table.title}", ""]
        lines += [
            *aligned(filled(table, measured(table, scores), run.model), table.label_columns),
            "",
        ]
    if tables:
        lines += [f"{DAGGER} published in {SOURCE}, not measured here.", ""]
    if ours := _ours(scores):
        header = ["task", "metric", "value", "standard error", "n"]
        rows = [row for task in ours for row in _paper_rows(task, scores[task])]
        lines += ["## Measured", "", *aligned([header, *rows], 2), ""]
    if others := [task for task in scores if task not in TASKS]:
        header = ["task", "metric", "filter", "value", "standard error", "n"]
        rows = [row for task in others for row in _harness_rows(task, scores[task])]
        lines += ["## Other tasks of lm-evaluation-harness", "", *aligned([header, *rows], 3), ""]
    if run.missing:
        lines += ["## Tasks without a result", ""]
        lines += [f"- {task}: {reason}" for task, reason in run.missing.items()]
    return lines[:-1] if lines and not lines[-1] else lines


def filled(table: PublishedTable, ours: Sequence[Score | None], model: str) -> list[list[str]]:
    """The rows of a published table with ours as its last row, or column.

    Args:
      table: the published table.
      ours: our score of each item.
      model: name of our model.
    """
    cells = [
        model,
        *("-" if score is None else _text(score.value, table.decimals) for score in ours),
    ]
    mark = lambda names: [f"{name} {DAGGER}" for name in names]
    header, *rows = table.rows
    if not table.models_in_columns:
        return [header, *[mark(row[:1]) + row[1:] for row in rows], cells]
    labels = table.label_columns
    header = header[:labels] + mark(header[labels:])
    return [[*row, cell] for row, cell in zip([header, *rows], cells, strict=True)]


def _ours(scores: Scores) -> list[str]:
    return [task for task in TASKS if task in scores]


def _paper_rows(task: str, of_task: Mapping[str, Score]) -> Iterable[list[str]]:
    decimals = next((t.decimals for t in published_tables() if t.set == TASKS[task].table), 1)
    for metric in TASKS[task].metrics:
        if score := _metric(of_task, metric):
            yield [TASKS[task].title, metric, *_numbers(score, decimals)]


def _harness_rows(task: str, of_task: Mapping[str, Score]) -> Iterable[list[str]]:
    for name, score in of_task.items():
        metric, _, filter_name = name.partition(",")
        yield [task, metric, filter_name or "none", *_numbers(score, 4)]


def _numbers(score: Score, decimals: int) -> list[str]:
    error = score.standard_error
    return [
        _text(score.value, decimals), "-" if error is None else _text(error, decimals),
        f"{score.n:,}",
    ]  # fmt: skip


def _text(value: float, decimals: int) -> str:
    """A fraction; as a percentage if it has one decimal."""
    return f"{100 * value:.1f}" if decimals == 1 else f"{value:.{decimals}f}"


def aligned(rows: Sequence[Sequence[str]], text_columns: int = 1) -> list[str]:
    """Lines of a Markdown table whose columns also align in a terminal.

    Args:
      rows: cells; the first row is the header.
      text_columns: columns on the left that are text; the others are numbers.
    """
    rows = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    widths = [max(3, *map(len, column)) for column in zip(*rows, strict=True)]
    pad = lambda cell, i: cell.ljust(widths[i]) if i < text_columns else cell.rjust(widths[i])
    lines = [[pad(cell, i) for i, cell in enumerate(row)] for row in rows]
    rule = ["-" * w if i < text_columns else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    return ["| " + " | ".join(line) + " |" for line in [lines[0], rule, *lines[1:]]]


# JSON --------------------------------------------------------------------------------------------


def to_json(scores: Scores, tables: Sequence[PublishedTable], run: RunInfo) -> str:
    """The report as JSON. Equal results give equal text, except for "time".

    Args:
      scores: ours.
      tables: the published tables beside which they are shown.
      run: how the scores were made.
    """
    info = run._asdict()
    info["time"] = {"seconds": info.pop("seconds"), "finished": time.time()}
    tree = {
        **info,
        "versions": versions(),
        "tasks": {task: _task_json(task, of_task) for task, of_task in scores.items()},
        "tables": {
            str(t.number): {
                "title": t.title,
                "published": t.values,
                "measured": {
                    item: score._asdict()
                    for item, score in zip(t.items, measured(t, scores), strict=True)
                    if score
                },
            }
            for t in tables
        },
    }
    return json.dumps(tree, indent=1, sort_keys=True, allow_nan=False) + "\n"


def _task_json(task: str, of_task: Mapping[str, Score]) -> dict[str, Any]:
    tree: dict[str, Any] = {"metrics": {name: score._asdict() for name, score in of_task.items()}}
    if task in TASKS:
        paper = TASKS[task]
        tree |= {"title": paper.title, "table": paper.table, "protocol": paper.protocol}
    return tree


def versions() -> dict[str, str]:
    """Versions of this project, of Python, and of the packages that results depend on."""
    found = {"llama_jax": source_version(), "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


# Chart -------------------------------------------------------------------------------------------


def _fractions(scores: Scores, results: dict[str, Any]) -> Scores:
    """Those scores whose values are from 0 to 1 for each document, unlike bits per byte."""

    def is_fraction(task: str, name: str, value: float) -> bool:
        metric, _, filter_name = name.partition(",")
        samples = results["samples"].get(task, ())
        values = [
            s[metric] for s in samples if s["filter"] == (filter_name or "none") and metric in s
        ]
        return all(_is_number(x) and 0 <= float(x) <= 1 for x in (value, *values))

    return {
        task: {name: s for name, s in of_task.items() if is_fraction(task, name, s.value)}
        for task, of_task in scores.items()
    }


def _bars(tables: Sequence[PublishedTable], scores: Scores, fractions: Scores) -> list[Bar]:
    """One bar per item of a table, and one per other task of the harness with a fraction."""
    bars = []
    for table in tables:
        if table.number == 16:  # its averages are the bars of table 9
            continue
        scale = 1 if table.decimals == 1 else 100
        for item, score in zip(table.items, measured(table, scores), strict=True):
            if score:
                published = {
                    model: scale * values[item]
                    for model, values in table.values.items()
                    if model in CHARTED_MODELS and item in values
                }
                bars.append(_bar(f"{table.short} {item}".strip(), score, published))
    for task in scores:
        name = main_metric(task, fractions[task])
        if task not in TASKS and name:
            bars.append(_bar(f"{task} {name}", scores[task][name], {}))
    return bars


def _bar(label: str, score: Score, published: Mapping[str, float]) -> Bar:
    return Bar(label, 100 * score.value, 100 * (score.standard_error or 0), published)
