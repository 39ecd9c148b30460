"""Files of records, JSON lines with zstd or Parquet, that are complete or do not exist."""

import hashlib
import json
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import zstandard


class RecordFile:
    """A file of records that appears under its name only when it is complete."""

    def __init__(self, path: Path):
        self.path = path
        # A unique name: a task that is repeated while an older process of it still runs.
        self.part = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.part")
        self.records = self.text_bytes = self.size = 0
        self.sha256 = hashlib.sha256()

    def __enter__(self) -> "RecordFile":
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.raw = self.part.open("xb")
        self.open()
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        try:
            with self.raw:
                if kind is None:
                    self.finish()
                    self.raw.flush()
                    os.fsync(self.raw.fileno())
            if kind is None:
                self.part.replace(self.path)
        finally:
            self.part.unlink(missing_ok=True)

    def write_bytes(self, content: Any) -> None:
        self.sha256.update(content)
        self.size += len(content)
        self.raw.write(content)

    def summary(self) -> dict[str, Any]:
        return {
            "documents": self.records,
            "text_bytes": self.text_bytes,
            "bytes": self.size,
            "sha256": self.sha256.hexdigest(),
        }

    def open(self) -> None:
        raise NotImplementedError

    def write(self, record: dict[str, Any]) -> None:
        raise NotImplementedError

    def finish(self) -> None:
        raise NotImplementedError


class JsonLines(RecordFile):
    def open(self) -> None:
        self.compressor = zstandard.ZstdCompressor(level=3).compressobj()

    def write(self, record: dict[str, Any]) -> None:
        self.records += 1
        line = json.dumps(record, ensure_ascii=False).encode("utf-8", "replace") + b"\n"
        self.write_bytes(self.compressor.compress(line))

    def finish(self) -> None:
        self.write_bytes(self.compressor.flush())


class Parquet(RecordFile):
    """Metadata, whose keys differ between sources, is a column of JSON."""

    batch_documents, batch_characters = 1000, 1 << 24

    def open(self) -> None:
        import pyarrow
        from pyarrow import parquet

        strings = [(name, pyarrow.string()) for name in ("id", "text", "source", "url", "language")]
        scores = pyarrow.map_(pyarrow.string(), pyarrow.float64())
        self.schema = pyarrow.schema([*strings, ("scores", scores), ("metadata", pyarrow.string())])
        sink = pyarrow.PythonFile(_Sink(self), mode="w")
        self.table = parquet.ParquetWriter(sink, self.schema, compression="zstd")
        self.batch: list[dict[str, Any]] = []
        self.characters = 0

    def write(self, record: dict[str, Any]) -> None:
        self.records += 1
        valid = lambda text: text and text.encode("utf-8", "replace").decode()
        row = {key: valid(record[key]) for key in ("id", "text", "source", "url", "language")}
        row["scores"] = sorted((record["scores"] or {}).items())
        row["metadata"] = valid(json.dumps(record["metadata"], ensure_ascii=False))
        self.batch.append(row)
        self.characters += len(record["text"])
        if len(self.batch) == self.batch_documents or self.characters > self.batch_characters:
            self._flush()

    def _flush(self) -> None:
        import pyarrow

        self.table.write_table(pyarrow.Table.from_pylist(self.batch, self.schema))
        self.batch, self.characters = [], 0

    def finish(self) -> None:
        if self.batch:
            self._flush()
        self.table.close()


class _Sink:
    """What pyarrow needs of a file."""

    closed = False

    def __init__(self, file: RecordFile):
        self.file = file

    def write(self, content: Any) -> int:
        self.file.write_bytes(memoryview(content))
        return len(content)

    def tell(self) -> int:
        return self.file.size

    def flush(self) -> None:
        pass

    def close(self) -> None:
        pass


FORMATS: dict[str, tuple[type[RecordFile], str]] = {
    "jsonl": (JsonLines, ".jsonl.zst"),
    "parquet": (Parquet, ".parquet"),
}


def read_records(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a file, as they were written."""
    if path.suffix == ".parquet":
        from pyarrow import parquet

        for batch in parquet.ParquetFile(path).iter_batches(Parquet.batch_documents):
            for row in batch.to_pylist():
                scores, metadata = dict(row["scores"]), json.loads(row["metadata"])
                yield {**row, "scores": scores, "metadata": metadata}
    else:
        with zstandard.open(path, "rt", encoding="utf-8", newline="\n") as lines:
            yield from map(json.loads, lines)
