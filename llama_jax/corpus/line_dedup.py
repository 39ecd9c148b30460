"""Line deduplication within groups of files, as CCNet does it, with bounded memory.

A line that occurs in more than one document of a group is dropped from all of them. Three stages
share the work: each file writes the hashes of its lines; each task of the second stage compares
the hashes in one range of values over all files of a group; then each file drops its lines whose
hashes are repeated. The same comparison finds pages that occur in an earlier file.
"""

import hashlib
import io
import re
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep

from llama_jax.corpus.steps import Step, is_dropped
from llama_jax.io import atomic_write

HASHES_PER_TASK = 1 << 24
"""Hashes that a task of the second stage holds; it needs 40 bytes of memory for each."""
_HASHES_PER_RUN = 1 << 24
"""Hashes that a task of the first stage collects before it writes them."""

# The characters that CCNet removes: punctuation outside ASCII, and control characters.
_PUNCTUATION = "，。、„”“«»１」「《》´∶：？！（）；–—．～’…━〈〉【】％►"
_REMOVED = re.compile(f"[{_PUNCTUATION}\x00-\x1f\x7f-\x9f]")
_DIGIT = re.compile(r"\d")


def normalize_line(line: str) -> str:
    """What two lines have in common that count as the same: case, digits and some punctuation do
    not matter."""
    return _REMOVED.sub("", _DIGIT.sub("0", line.strip().lower()))


def line_hashes(lines: Sequence[str]) -> np.ndarray:
    """64-bit hashes of normalized lines: the first 8 bytes of their SHA-1."""
    digests = b"".join(
        hashlib.sha1(normalize_line(line).encode("utf-8", "surrogatepass")).digest()[:8]
        for line in lines
    )
    return np.frombuffer(digests, dtype="<u8")


class HashFile:
    """Collects hashes of a task and writes them, sorted, to files ``NNNNN.RRR.npy`` of a folder.

    Args:
        folder: Where to write.
        rank: The task.
        copies: How often a file has a hash that several documents have: twice tells it from the
            hash of a single document.
    """

    def __init__(self, folder: Path, rank: int, copies: int):
        self.folder, self.rank, self.copies, self.runs = folder, rank, copies, 0
        self.hashes = array("Q")
        for old in hash_files(folder, rank):
            old.unlink()

    def add(self, hashes: np.ndarray) -> None:
        """Adds the hashes of one document."""
        self.hashes.frombytes(np.unique(hashes).tobytes())
        if len(self.hashes) >= _HASHES_PER_RUN:
            self.write()

    def write(self) -> None:
        if not self.hashes and self.runs:
            return
        hashes = np.sort(np.frombuffer(self.hashes, dtype="<u8"))
        keep = np.ones(len(hashes), bool)
        keep[self.copies :] = hashes[self.copies :] != hashes[: -self.copies]
        buffer = io.BytesIO()
        np.save(buffer, hashes[keep])
        atomic_write(self.folder / f"{self.rank:05d}.{self.runs:03d}.npy", buffer.getvalue())
        self.hashes, self.runs = array("Q"), self.runs + 1


def hash_files(folder: Path, rank: int) -> list[Path]:
    """The files that the task ``rank`` wrote."""
    return sorted(folder.glob(f"{rank:05d}.*.npy"))


class LineHashes(Step):
    """Writes the hashes of the lines of each document; changes nothing."""

    name = "line hashes"

    def __init__(self, folder: Path):
        super().__init__()
        self.folder = folder

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        file = HashFile(self.folder, rank, copies=2)
        for document in data:
            if not is_dropped(document):
                file.add(line_hashes(document.text.split("\n")))
            yield document
        file.write()


@dataclass(frozen=True)
class Comparison:
    """How the hashes of all tasks are compared: which tasks form a group, and in how many parts.

    Attributes:
        folder: Where the hashes are, and where ``FindRepeated`` writes.
        groups: Ranks of the tasks of each group.
        parts: Number of ranges of hash values; the same for every group.
        hashes: Number of hashes of all tasks.
    """

    folder: Path
    groups: Sequence[Sequence[int]]
    parts: int
    hashes: int

    @classmethod
    def plan(cls, folder: Path, tasks: int, group_size: int) -> "Comparison":
        """A comparison within each ``group_size`` tasks whose parts have a bounded size."""
        groups = [range(i, min(i + group_size, tasks)) for i in range(0, tasks, group_size)]
        sizes = [
            sum(_count(path) for rank in group for path in hash_files(folder, rank))
            for group in groups
        ]
        parts = max(1, -(-max(sizes) // HASHES_PER_TASK))
        return cls(folder, groups, parts, sum(sizes))

    @property
    def tasks(self) -> int:
        return len(self.groups) * self.parts

    def bounds(self, part: int) -> tuple[int, int]:
        """The range of hash values of a part."""
        return (part << 64) // self.parts, ((part + 1) << 64) // self.parts

    def result(self, group: int, part: int) -> Path:
        return self.folder / f"repeated-{group:05d}-{part:05d}.npz"

    def repeated(self, rank: int) -> np.ndarray:
        """The hashes of the task ``rank`` that are repeated, sorted."""
        group = next(i for i, ranks in enumerate(self.groups) if rank in ranks)
        found = []
        for part in range(self.parts):
            with np.load(self.result(group, part)) as arrays:
                found.append(arrays[str(rank)])
        return np.unique(np.concatenate(found))

    def memory(self) -> dict[str, int]:
        """What the deduplication needs, for the manifest."""
        return {
            "hashes": self.hashes,
            "disk_bytes": 8 * self.hashes,
            "groups": len(self.groups),
            "parts_of_a_group": self.parts,
            "bytes_of_memory_per_task": 40 * min(HASHES_PER_TASK, -(-self.hashes // self.parts)),
        }


def _count(path: Path) -> int:
    return len(np.load(path, mmap_mode="r"))


class FindRepeated(PipelineStep):
    """Writes, for each task of a group, which of its hashes are repeated; yields no documents.

    Args:
        comparison: What to compare.
        keep_first: The first task that has a hash keeps it; otherwise none does.
    """

    type = "step"
    name = "find repeated"

    def __init__(self, comparison: Comparison, keep_first: bool = False):
        super().__init__()
        self.comparison, self.keep_first = comparison, keep_first

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        group, part = divmod(rank, self.comparison.parts)
        ranks = self.comparison.groups[group]
        low, high = self.comparison.bounds(part)
        pieces: list[np.ndarray] = []
        ends: list[int] = []  # of the pieces of each task, in number of hashes
        total = 0
        for task in ranks:
            for path in hash_files(self.comparison.folder, task):
                hashes = np.load(path, mmap_mode="r")
                begin = int(np.searchsorted(hashes, np.uint64(low)))
                end = len(hashes)
                if high < 1 << 64:
                    end = int(np.searchsorted(hashes, np.uint64(high)))
                pieces.append(np.array(hashes[begin:end]))
                total += len(pieces[-1])
            ends.append(total)
        every = np.concatenate(pieces) if pieces else np.empty(0, np.uint64)
        pieces.clear()
        repeated = _repeated(every, self.keep_first)
        found: dict[str, Any] = {}
        for task, begin, end in zip(ranks, [0, *ends], ends, strict=False):
            found[str(task)] = np.unique(every[begin:end][repeated[begin:end]])
        buffer = io.BytesIO()
        np.savez(buffer, **found)
        atomic_write(self.comparison.result(group, part), buffer.getvalue())
        yield from ()


def _repeated(hashes: np.ndarray, keep_first: bool) -> np.ndarray:
    """Which of the hashes occur more than once, or which occurred before."""
    order = np.argsort(hashes, kind="stable")
    values = hashes[order]
    same = values[1:] == values[:-1]
    mask = np.zeros(len(hashes), bool)
    mask[1:] |= same
    if not keep_first:
        mask[:-1] |= same
    repeated = np.empty_like(mask)
    repeated[order] = mask
    return repeated


class DropRepeatedLines(Step):
    """Drops lines that other documents of the group have, and repetitions within a document.

    Adds to the metadata ``line_ids``, the positions of the kept lines, and ``original_nlines``.
    """

    name = "repeated lines"

    def __init__(self, comparison: Comparison):
        super().__init__()
        self.comparison = comparison

    def prepare(self, rank: int) -> None:
        self.repeated = self.comparison.repeated(rank)

    def process(self, document: Document) -> str | None:
        lines = document.text.split("\n")
        hashes = line_hashes(lines)
        first = np.zeros(len(lines), bool)
        first[np.unique(hashes, return_index=True)[1]] = True
        kept = np.flatnonzero(first & ~_contains(self.repeated, hashes)).tolist()
        document.metadata["original_nlines"] = len(lines)
        document.metadata["line_ids"] = kept
        document.text = "\n".join(lines[i] for i in kept)
        return None if kept else "every line is repeated"


def _contains(sorted_values: np.ndarray, values: np.ndarray) -> np.ndarray:
    if not len(sorted_values):
        return np.zeros(len(values), bool)
    at = np.searchsorted(sorted_values, values)
    return sorted_values[np.minimum(at, len(sorted_values) - 1)] == values


class PageHashes(Step):
    """Writes the hashes of the digests of the pages; changes nothing."""

    name = "page hashes"

    def __init__(self, folder: Path):
        super().__init__()
        self.folder = folder

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        file = HashFile(self.folder, rank, copies=1)
        for document in data:
            if not is_dropped(document):
                file.add(_page_hash(document))
            yield document
        file.write()


class DropRepeatedPages(Step):
    """Drops pages whose digest an earlier page has, also of another file."""

    name = "repeated pages"

    def __init__(self, comparison: Comparison):
        super().__init__()
        self.comparison = comparison

    def prepare(self, rank: int) -> None:
        self.seen = set(self.comparison.repeated(rank).tolist())

    def process(self, document: Document) -> str | None:
        value = int(_page_hash(document)[0])
        if value in self.seen:
            return "an earlier page has the same digest"
        self.seen.add(value)
        return None


def _page_hash(document: Document) -> np.ndarray:
    """Hash of the digest in the crawl's files; of the text if there is none."""
    digest = document.metadata.get("digest") or document.text
    return np.frombuffer(
        hashlib.sha1(digest.encode("utf-8", "surrogatepass")).digest()[:8], dtype="<u8"
    )
