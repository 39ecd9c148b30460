"""The description of a benchmark with the protocol of the LLaMA paper."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple


class TaskOptions(NamedTuple):
    """Options of the command that tasks depend on."""

    data: Path | None = None
    """folder of local data; None: a task downloads from the hub, or says what it needs"""
    samples: int = 1
    """sampled answers per question, for pass@k and maj1@k"""
    allow_code_execution: bool = False
    output: Path | None = None
    """folder of the results, where a task keeps what it pays for, such as scores of an API"""


class PaperTask(NamedTuple):
    """One benchmark of the paper.

    Its harness task reports each metric of a document under the name of a column of the paper's
    table. A metric may apply to some documents only: its n is the number of documents that have it.
    """

    title: str
    """as in the paper's tables, such as "HellaSwag" """
    table: str
    """the task set and the table of the report that it belongs to, such as "commonsense" """
    metrics: tuple[str, ...]
    """metrics that the report shows, in order; the first is the main one"""
    protocol: str
    """one sentence: prompt, shots, normalization, answer extraction"""
    download: str
    """what to download, and where to put it below the data folder"""
    make: Callable[[TaskOptions], Any]
    """makes the ``lm_eval.api.task.Task``"""
