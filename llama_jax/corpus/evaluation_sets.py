"""Reads the texts of evaluation sets from their published files: JSON, tables and Parquet."""

import csv
import gzip
import io
import itertools
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

_TABLES = {".csv": ",", ".tsv": "\t"}
SUFFIXES = (".jsonl", ".json", ".parquet", *_TABLES)


class Text(NamedTuple):
    """A question, a choice or an answer of an evaluation set."""

    place: str
    """name of the file, and the line or record"""
    text: str


def is_read(name: str) -> bool:
    """Whether a file holds records of an evaluation set; those of training splits do not count."""
    name = name.lower().rpartition("/")[2]
    return name.removesuffix(".gz").endswith(SUFFIXES) and "train" not in name


def texts(files: Mapping[str, Path], ignored_fields: Iterable[str]) -> Iterator[Text]:
    """All strings in the records of files, except those in ignored fields.

    Args:
        files: By name.
        ignored_fields: Names of fields, at any depth.

    Raises:
        ValueError: A file cannot be read; names it and the line.
    """
    ignored = frozenset(ignored_fields)
    for name, path in sorted(files.items()):
        for place, record in _records(path):
            for text in _strings(record, ignored):
                yield Text(f"{name}: {place}", text)


def _strings(value: Any, ignored: frozenset[str]) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for name, inner in value.items():
            if name not in ignored:
                yield from _strings(inner, ignored)
    elif isinstance(value, list):
        for inner in value:
            yield from _strings(inner, ignored)


def _records(path: Path) -> Iterator[tuple[str, Any]]:
    """Records and their places; a row of a table has the first row's cells as field names."""
    suffix = Path(path.name.lower().removesuffix(".gz")).suffix
    if suffix == ".parquet":
        yield from _read_parquet(path)
        return
    text = _read_text(path)
    if suffix in _TABLES:
        yield from _read_table(path, text, _TABLES[suffix])
        return
    try:
        if suffix == ".json":
            value = json.loads(text)
            records = value if isinstance(value, list) else [value]
            yield from ((f"record {n}", record) for n, record in enumerate(records, 1))
            return
    except RecursionError:
        raise ValueError(f"{path} is not JSON: nested too deeply") from None
    except json.JSONDecodeError as e:
        if e.msg != "Extra data":  # one object a line
            raise ValueError(f"{path} line {e.lineno} is not JSON: {e.msg}") from None
    for n, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield f"line {n}", json.loads(line)
            except (ValueError, RecursionError) as e:
                raise ValueError(f"{path} line {n} is not JSON: {e}") from None


def _read_text(path: Path) -> str:
    try:
        content = path.read_bytes()
        content = gzip.decompress(content) if path.suffix.lower() == ".gz" else content
        return content.decode("utf-8-sig")
    except (OSError, EOFError, zlib.error) as e:
        raise ValueError(f"{path} cannot be read: {e}") from None
    except UnicodeDecodeError as e:
        raise ValueError(f"{path} is not UTF-8 text, from byte {e.start} on") from None


def _read_table(path: Path, text: str, delimiter: str) -> Iterator[tuple[str, Any]]:
    rows = csv.reader(
        io.StringIO(text, newline=""),
        delimiter=delimiter,
        quoting=csv.QUOTE_NONE if delimiter == "\t" else csv.QUOTE_MINIMAL,
    )
    try:
        names: list[str] = []
        for row in rows:
            names = names or row
            # Files of MMLU have no header: the first row counts as a record too.
            cells = itertools.zip_longest(names, row, fillvalue="")
            yield f"line {rows.line_num}", [{name: cell} for name, cell in cells]
    except csv.Error as e:
        raise ValueError(f"{path} line {rows.line_num}: {e}; expected a table of text") from None


def _read_parquet(path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow.parquet

    number = 0
    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches():
            for record in batch.to_pylist():
                number += 1
                yield f"record {number}", record
    except pyarrow.ArrowException as e:
        raise ValueError(f"{path} is damaged: {e}") from None
