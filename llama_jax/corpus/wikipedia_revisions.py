"""Articles that occur more than once in the dumps of a language: the newest revision is kept.

Dumps of different dates have the same articles, and so do a whole dump and one of its parts. Of
equal revisions, the one in the first file is kept.
"""

from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep

from llama_jax.corpus.steps import Step, is_dropped
from llama_jax.io import atomic_write


class WriteRevisions(PipelineStep):
    """Writes page, revision and number in the dump of each article of a task; changes nothing.

    The metadata key ``revision`` is removed.
    """

    type = "step"
    name = "revisions"

    def __init__(self, folder: Path):
        super().__init__()
        self.folder = folder

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        rows = array("q")
        for document in data:
            if not is_dropped(document):
                page, revision = document.metadata.pop("revision")
                rows.extend((page, revision, document.metadata["number"]))
            yield document
        atomic_write(_revisions_file(self.folder, rank), rows.tobytes())


def find_older(folder: Path, languages: Sequence[str]) -> None:
    """Writes for each dump the numbers of the articles of which another revision is kept.

    Args:
        folder: Where `WriteRevisions` has written. Memory: 16 bytes for each article of a
            language, 100 more for each that occurs again.
        languages: The language of each dump.
    """
    for language in sorted(set(languages)):
        dumps = [dump for dump, other in enumerate(languages) if other == language]
        pages = np.concatenate([_read_revisions(folder, dump)[:, 0].copy() for dump in dumps])
        pages.sort()
        repeated = np.unique(pages[1:][pages[1:] == pages[:-1]])
        del pages
        rows = [_rows_of(repeated, _read_revisions(folder, dump)) for dump in dumps]
        dump = np.repeat(dumps, [len(r) for r in rows])
        page, revision, number = np.concatenate(rows).T
        order = np.lexsort((-number, -dump, revision, page))
        older = order[:-1][page[order[:-1]] == page[order[1:]]]
        for one in dumps:
            numbers = np.sort(number[older[dump[older] == one]])
            atomic_write(_older_file(folder, one), numbers.tobytes())


def _revisions_file(folder: Path, dump: int) -> Path:
    return folder / f"{dump:05d}.int64"


def _read_revisions(folder: Path, dump: int) -> np.ndarray:
    return np.fromfile(_revisions_file(folder, dump), np.int64).reshape(-1, 3)


def _rows_of(pages: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """The rows of some pages, which are sorted."""
    if not len(pages):
        return rows[:0].copy()  # not a view, which would keep all rows
    at = np.searchsorted(pages, rows[:, 0])
    return rows[pages[np.minimum(at, len(pages) - 1)] == rows[:, 0]]


def _older_file(folder: Path, dump: int) -> Path:
    return folder / f"older-{dump:05d}.int64"


class DropOlder(Step):
    """Drops the articles that `find_older` has found. The metadata key ``number`` is removed.

    Args:
        folder: Where it has written.
        dumps: For each task, the number of the dump from which its articles are.
    """

    name = "revision"

    def __init__(self, folder: Path, dumps: Sequence[int]):
        super().__init__()
        self.folder, self.dumps = folder, tuple(dumps)

    def prepare(self, rank: int) -> None:
        self.older = np.fromfile(_older_file(self.folder, self.dumps[rank]), np.int64)

    def process(self, document: Document) -> str | None:
        number = document.metadata.pop("number")
        at = np.searchsorted(self.older, number)
        if at < len(self.older) and self.older[at] == number:
            return "a newer revision, or the same one, is in the input"
        return None
