"""What the pipeline of a source consists of: readers, steps, and the writer that counts.

A document that a step drops, and a record that a reader cannot read, are not removed from the
stream: they lose their text and carry the step and the reason to the writer, which logs and counts
them. So nothing disappears without a line in ``dropped/``.
"""

import contextlib
import json
import signal
import threading
import types
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep

from llama_jax.corpus.output import FORMATS, JsonLines, RecordFile, read_records
from llama_jax.io import atomic_write

# Keys of Document.metadata that every source sets; the writer makes them columns of the output.
FIELDS = ("source", "url", "language", "scores")


@dataclass(frozen=True)
class Stage:
    """Steps that run as independent tasks; the next stage starts when all tasks have finished.

    Attributes:
        name: Folder of the stage's results, unique within a source.
        steps: A reader and steps. The runner adds the writer.
        tasks: Number of tasks. It depends on the input and the settings only, never on the
            number of workers, so that the output does not either.
        final: Whether the documents are the result of the source.
        split: Metadata key whose value names the subfolder of a document in the output.
    """

    name: str
    steps: Sequence[PipelineStep]
    tasks: int
    final: bool = False
    split: str | None = None


def drop(document: Document, step: str, reason: str) -> Document:
    """Marks a document as dropped; its text is released."""
    document.text = ""
    document.metadata["dropped"] = {"step": step, "reason": reason}
    return document


def is_dropped(document: Document) -> bool:
    return "dropped" in document.metadata


class Reader(PipelineStep):
    """Reads the files of a task. Subclasses implement ``read``.

    Args:
        groups: For each task, the files it reads, in order.
    """

    type = "reader"
    # Whether an error while reading a file stands for bad input, which is counted and skipped.
    tolerant: ClassVar[bool] = True

    def __init__(self, groups: Sequence[Sequence[Path]]):
        super().__init__()
        self.groups = groups

    def read(self, path: Path) -> Iterator[Document]:
        """Yields the documents of a file, and ``self.skipped(...)`` for each unreadable record."""
        raise NotImplementedError

    def skipped(self, place: str, reason: str) -> Document:
        """Stands for a record that cannot be read.

        Args:
            place: File and position: record number, line or byte offset.
            reason: Short and without details that differ from record to record.
        """
        return drop(Document(text="", id=place, metadata={"place": place}), "read", reason)

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        if data:
            yield from data
        for path in self.groups[rank]:
            number = 0
            try:
                for document in self.read(path):
                    number += 1
                    document.metadata.setdefault("place", f"{path.name}: record {number}")
                    yield document
            except Exception as e:  # one damaged file never ends a task
                missing = isinstance(e, FileNotFoundError | PermissionError | MemoryError)
                if missing or not self.tolerant:
                    raise
                place = f"{path.name}: after record {number}"
                yield self.skipped(place, f"the rest of the file is unreadable: {type(e).__name__}")


class Step(PipelineStep):
    """Changes or drops one document at a time. Subclasses implement ``process``."""

    type = "step"
    name = "step"
    # Processor time that one document may take; generous, because the limit depends on the machine.
    cpu_seconds: ClassVar[float] = 60.0

    def process(self, document: Document) -> str | None:
        """Changes the document in place.

        What differs from one dropped document to the next, such as the copy that is kept, goes
        into the dict ``document.metadata["detail"]``: it is logged with the document.

        Returns:
            Why the document is dropped (short, so that reasons can be counted), or None.
        """
        raise NotImplementedError

    def prepare(self, rank: int) -> None:
        """Loads what a task needs, such as a model. Steps are copied to workers before this."""

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        self.prepare(rank)
        for document in data:
            if not is_dropped(document):
                try:
                    with _cpu_limit(self.cpu_seconds):
                        reason = self.process(document)
                except _OutOfTime:
                    reason = "took too much processor time"
                except (OSError, MemoryError):  # of the machine, not of the document
                    raise
                except Exception as e:  # one bad document never ends a task
                    reason = f"error: {type(e).__name__}"
                if reason is not None:
                    drop(document, self.name, reason)
            yield document


class Writer(PipelineStep):
    """Writes kept documents, the log of dropped ones, and the counts of a task, each atomically.

    The counts are written last: a task whose counts exist is complete.

    Args:
        documents: Folder of the kept documents.
        dropped: Folder of the log: one JSON object per dropped document.
        counts: Folder of the counts.
        split: See ``Stage``.
        format: "jsonl" or "parquet".
    """

    type = "writer"
    name = "write"

    def __init__(
        self,
        documents: Path,
        dropped: Path,
        counts: Path,
        split: str | None = None,
        format: str = "jsonl",
    ):
        super().__init__()
        self.documents, self.dropped, self.counts, self.split = documents, dropped, counts, split
        self.file, self.suffix = FORMATS[format]

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        name, counts = f"{rank:05d}", _Counts()
        with contextlib.ExitStack() as stack:
            log = stack.enter_context(JsonLines(self.dropped / f"{name}.jsonl.zst"))
            kept: dict[str, RecordFile] = {}
            if not self.split:  # the next stage finds a file of every task
                kept[""] = stack.enter_context(self.file(self.documents / f"{name}{self.suffix}"))
            for document in data:
                text_bytes = counts.add(document)
                if is_dropped(document):
                    log.write(_log_record(document))
                    continue
                folder = str(document.metadata.pop(self.split)) if self.split else ""
                if folder not in kept:
                    path = self.documents / folder / f"{name}{self.suffix}"
                    kept[folder] = stack.enter_context(self.file(path))
                kept[folder].write(_record(document))
                kept[folder].text_bytes += text_bytes
                yield document
        for folder in sorted(kept):
            counts.files[f"{folder}/{name}{self.suffix}".lstrip("/")] = kept[folder].summary()
        self.counts.mkdir(parents=True, exist_ok=True)
        atomic_write(self.counts / f"{name}.json", json.dumps(counts.as_dict()).encode())


class Documents(Reader):
    """Reads what an earlier stage has written: task ``n`` reads the files of group ``n``."""

    tolerant = False

    def read(self, path: Path) -> Iterator[Document]:
        for record in read_records(path):
            text, id_ = record.pop("text"), record.pop("id")
            metadata = {**record.pop("metadata"), **record}
            yield Document(text=text, id=id_, metadata=metadata)


@dataclass
class _Counts:
    read: int = 0
    written: int = 0
    characters: int = 0
    text_bytes: int = 0
    dropped: dict[str, Counter[str]] = field(default_factory=dict)
    files: dict[str, Any] = field(default_factory=dict)

    def add(self, document: Document) -> int:
        """Counts a document; returns the size of its text in UTF-8."""
        self.read += 1
        if is_dropped(document):
            why = document.metadata["dropped"]
            self.dropped.setdefault(why["step"], Counter())[why["reason"]] += 1
            return 0
        text_bytes = len(document.text.encode("utf-8", "replace"))  # as it is written
        self.written += 1
        self.characters += len(document.text)
        self.text_bytes += text_bytes
        return text_bytes

    def as_dict(self) -> dict[str, Any]:
        return {**vars(self), "dropped": {s: dict(c) for s, c in self.dropped.items()}}


def _record(document: Document) -> dict[str, Any]:
    metadata = dict(document.metadata)
    columns = {key: metadata.pop(key, None) for key in FIELDS}
    return {"id": document.id, "text": document.text, **columns, "metadata": metadata}


def _log_record(document: Document) -> dict[str, Any]:
    metadata = document.metadata
    return {
        "id": document.id,
        "url": metadata.get("url"),
        "place": metadata.get("place"),
        **metadata["dropped"],
        **metadata.get("detail", {}),
    }


class _OutOfTime(BaseException):
    """Not an Exception: a step's own handlers must not catch it."""


@contextlib.contextmanager
def _cpu_limit(seconds: float) -> Iterator[None]:
    """Raises `_OutOfTime` after this processor time of the process; wall time does not count."""
    if threading.current_thread() is not threading.main_thread():  # signals need the main thread
        yield
        return
    running = True

    def expired(signum: int, frame: types.FrameType | None) -> None:
        if running:
            raise _OutOfTime

    # Not SIGPROF: TPU's compiler sends it 100 times a second in each process that has loaded it.
    before = signal.signal(signal.SIGVTALRM, expired)
    # Repeated, because an exception is ignored in a callback of the garbage collector.
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds, 1.0)
    try:
        try:
            yield
        finally:
            running = False
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
