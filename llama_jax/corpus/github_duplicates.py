"""Exact duplicates of files, across all tasks, in bounded memory.

Each task of the first stage writes the hashes of its documents. They are then compared in parts: a
part has the hashes of all tasks with the same first bits.
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep

from llama_jax.corpus.steps import Step, is_dropped

HASH = np.dtype([("high", "<u8"), ("low", "<u8")])
PART_HASHES = 4_000_000
"""Hashes compared at once; they take some 300 MB."""


class WriteHashes(PipelineStep):
    """Writes the hash of each document that the stage keeps, in their order, to ``folder``.

    The hash is the metadata key ``hash``, which is removed.
    """

    type = "step"
    name = "hashes"

    def __init__(self, folder: Path):
        super().__init__()
        self.folder = folder

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        hashes = bytearray()
        for document in data:
            digest = document.metadata.pop("hash", None)
            if not is_dropped(document):
                hashes += digest
            yield document
        _save(self.folder / f"{rank:05d}.npy", np.frombuffer(bytes(hashes), HASH))


def content_hash(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def find_duplicates(folder: Path, tasks: int) -> None:
    """Writes for each task the numbers of the documents that are equal to an earlier one.

    Args:
        folder: Where `WriteHashes` has written.
        tasks: Number of tasks; a lower task is earlier.
    """
    hashes = [np.load(folder / f"{rank:05d}.npy", mmap_mode="r") for rank in range(tasks)]
    parts = 1 + sum(map(len, hashes)) // PART_HASHES
    found: list[list[np.ndarray]] = [[] for _ in range(tasks)]
    for part in range(parts):
        here = [np.flatnonzero(h["high"] % np.uint64(parts) == part) for h in hashes]
        task = np.repeat(np.arange(tasks), [len(numbers) for numbers in here])
        number = np.concatenate([*here, np.zeros(0, np.int64)])
        taken = [h[numbers] for h, numbers in zip(hashes, here, strict=True)]
        values = np.concatenate([*taken, np.zeros(0, HASH)])
        order = np.lexsort((number, task, values["low"], values["high"]))
        values, task, number = values[order], task[order], number[order]
        repeated = np.flatnonzero(values[1:] == values[:-1]) + 1
        repeated = repeated[np.argsort(task[repeated], kind="stable")]
        ends = np.searchsorted(task[repeated], np.arange(1, tasks))
        for numbers, new in zip(found, np.split(number[repeated], ends), strict=True):
            numbers.append(new)
    for rank, numbers in enumerate(found):
        joined = np.sort(np.concatenate([*numbers, np.zeros(0, np.int64)]).astype(np.int64))
        _save(folder / f"duplicates-{rank:05d}.npy", joined)


def _save(path: Path, array: np.ndarray) -> None:
    part = path.with_name(path.name + ".part")
    with part.open("wb") as file:
        np.save(file, array)
    part.replace(path)


class DropDuplicates(Step):
    """Drops the documents that `find_duplicates` has found; the first copy is kept."""

    name = "duplicates"

    def __init__(self, folder: Path):
        super().__init__()
        self.folder = folder

    def prepare(self, rank: int) -> None:
        self.duplicates = set(np.load(self.folder / f"duplicates-{rank:05d}.npy").tolist())
        self.number = -1

    def process(self, document: Document) -> str | None:
        self.number += 1
        return "a copy of an earlier file" if self.number in self.duplicates else None
