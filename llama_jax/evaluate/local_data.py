"""Files of the benchmarks' data sets: found below a folder, and read as records.

Errors name the file and the line or record.
"""

import csv
import fnmatch
import gzip
import hashlib
import io
import itertools
import json
import re
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from llama_jax.data.tokenizer import check_text
from llama_jax.evaluate.paper_task import TaskOptions
from llama_jax.io import open_regular, sha256
from llama_jax.prepare.records import (
    BadLine,
    Record,
    read_array,
    read_lines,
    read_parquet,
)

_TABLES = {".csv": ",", ".tsv": "\t"}
_SHARD = re.compile(r"-\d{5}-of-(\d{5})(?=\.)")
_CONVERTED = re.compile(r"\d{4}\.parquet")
"""Names of the parts of a split that the hub has converted."""
FILES_READ: set[Path] = set()
"""All data files that this process has read, for the hashes in the report."""
_TYPES = {
    str: "a string",
    int: "a whole number",
    bool: "true or false",
    list: "a list",
    dict: "an object",
}


class MissingData(ValueError):
    """A task lacks its data, or else what it needs to run; the message says what to do."""


def find(
    options: TaskOptions, folders: tuple[str, ...], patterns: tuple[str, ...], download: str
) -> Path:
    """The first of the files that :func:`find_all` returns."""
    return find_all(options, folders, patterns, download)[0]


def check_data_folder(data: Path) -> None:
    """Raise ValueError unless the folder of the benchmarks' files exists."""
    if not data.is_dir():
        raise ValueError(
            f"the data folder {data} does not exist or is not a folder; make it, with a folder for "
            f"each benchmark, such as {data / 'piqa'}"
        )


def find_all(
    options: TaskOptions, folders: tuple[str, ...], patterns: tuple[str, ...], download: str
) -> list[Path]:
    """The files of a data set that match the first pattern that matches any.

    Files anywhere below DIR/FOLDER/ are considered, and files of DIR itself. A folder or a file of
    DIR belongs to the data set if its name begins with one of ``folders``; all files of DIR do if
    its own name begins so. Upper and lower case, "-" and "_" do not matter. Hidden files are
    ignored, and so are training files unless the pattern names them.

    Args:
      options: of the command; ``options.data`` is DIR.
      folders: names of the data set's folder, such as ("piqa",).
      patterns: shell patterns of the file, the preferred one first. A pattern is compared with the
        name of a file and with its path in the folder.
      download: what to download and where to put it, for the error message.

    Raises:
      MissingData: no file matches.
      ValueError: DIR is not a folder.
    """
    if options.data is None:
        raise MissingData(f"no data folder was given (--data DIR): {download}")
    check_data_folder(options.data)
    files = list(_files(options.data, [_plain(folder) for folder in folders]))
    for pattern in map(_plain, patterns):
        found = [
            path
            for path, in_folder in files
            if any(fnmatch.fnmatch(_plain(name), pattern) for name in (path.name, in_folder))
            and ("train" in pattern or "train" not in path.name.lower())
        ]
        if found:  # once for all parts, which are read together
            return list({tuple(_siblings(path)): path for path in reversed(found)}.values())[::-1]
    name = patterns[0] + " or similar" * (len(patterns) > 1)
    raise MissingData(f"{options.data / folders[0]} has no file {name}: {download}")


def _plain(name: str) -> str:
    return name.lower().replace("-", "_")


def _files(data: Path, folders: list[str]) -> Iterator[tuple[Path, str]]:
    """Files that may belong to a data set, and their paths in its folder."""
    named = re.compile(rf"({'|'.join(map(re.escape, folders))})(?![a-z0-9])")

    def belongs(path: Path) -> bool:
        # A folder of the hub's cache is named datasets--OWNER--NAME.
        return named.match(_plain(path.name).rpartition("__")[2]) is not None

    def rank(path: Path) -> tuple[int, str]:
        name = _plain(path.name)
        return folders.index(name) if name in folders else len(folders), name

    entries = sorted(data.iterdir(), key=rank)
    for place in [*filter(belongs, entries), *([data] if belongs(data.resolve()) else [])]:
        folder = place if place.is_dir() else data
        for path in sorted(place.rglob("*")) if place.is_dir() else [place]:
            if path.is_file() and not path.name.startswith("."):
                yield path, path.relative_to(folder).as_posix()


def hashes(files: Iterable[Path]) -> dict[str, str]:
    """SHA-256 of each file by its path; one for all files of a folder with more than 20 of them.

    The hash of a folder is that of the lines ``sha256sum`` prints for its files, by name.
    """
    folders: dict[Path, list[Path]] = {}
    for path in sorted(set(files)):
        folders.setdefault(path.parent, []).append(path)
    found: dict[str, str] = {}
    for folder, paths in folders.items():
        digests = {str(path): sha256(path) for path in paths}
        if len(paths) > 20:
            lines = "".join(f"{digests[str(path)]}  {path.name}\n" for path in paths)
            digest = hashlib.sha256(lines.encode()).hexdigest()
            digests = {f"{folder} ({len(paths):,} files)": digest}
        found |= digests
    return found


def read_records(path: Path, columns: tuple[str, ...] | None = None) -> list[dict[str, Any]]:
    """The records of a file as dicts.

    Args:
      path: .jsonl, .json (an array, one object, or one object a line), .txt (as .json), .csv or
        .tsv, each also with .gz; or .parquet. If the name has "-00000-of-NNNNN", or is
        0000.parquet as the hub converts data sets, all parts are read.
      columns: names of the columns of a .csv or .tsv file without a header line.

    Raises:
      ValueError: the file is damaged, empty, or of another format; names the file, the line or
        record, and what was expected.
    """
    return [record.value for record in read_located(path, columns)]


def read_located(
    path: Path, columns: tuple[str, ...] | None = None, count: int | None = None
) -> list[Record]:
    """As :func:`read_records`, with the place of each record for error messages.

    Args:
      path: as for :func:`read_records`.
      columns: as for :func:`read_records`.
      count: number of records to read; None: all.
    """
    records: list[Record] = []
    for part in _parts(path):
        FILES_READ.add(part)
        missing = None if count is None else count - len(records)
        for record in itertools.islice(_read(part, columns), missing):
            if isinstance(record, BadLine):
                raise ValueError(record.message)
            if not isinstance(record.value, dict):
                raise ValueError(
                    f"{record.where}: expected an object with named fields, not "
                    f"{record.value!r:.60}"
                )
            records.append(record)
    if not records:
        raise ValueError(f"{path} has no records")
    return records


def field(record: Record, name: str, kind: type) -> Any:
    """A field of a record.

    Args:
      record: from :func:`read_located`.
      name: of the field.
      kind: its type: str (not empty), int, bool, list or dict.

    Raises:
      ValueError: absent, or of another type.
    """
    value = record.value.get(name)
    if type(value) is not kind or (isinstance(value, str) and not value.strip()):
        given = f"it is {value!r:.60}" if name in record.value else f"fields: {_names(record)}"
        raise ValueError(f'{record.where}: field "{name}" must be {_TYPES[kind]}; {given}')
    if isinstance(value, str):
        check_text(f'{record.where}: field "{name}"', value)
    return value


def strings(record: Record, name: str, minimum: int = 1) -> list[str]:
    """A field that is a list of strings, at least ``minimum`` of them; none is blank."""
    values = field(record, name, list)
    if len(values) < minimum or not all(isinstance(v, str) and v.strip() for v in values):
        raise ValueError(
            f'{record.where}: field "{name}" must be a list of at least {minimum} strings that are '
            f"not blank; it is {values!r:.60}"
        )
    for value in values:
        check_text(f'{record.where}: field "{name}"', value)
    return values


def _names(record: Record) -> str:
    return ", ".join(list(map(str, record.value))[:8]) or "none"


def _parts(path: Path) -> list[Path]:
    """The file, or all parts of a data set that is stored in several files."""
    parts = _siblings(path)
    for part in parts:
        if not part.is_file():
            raise ValueError(f"{part} is missing; {path.name} is one of {len(parts)} files")
    return parts


def _siblings(path: Path) -> list[Path]:
    """The parts of the data set that a file belongs to."""
    if match := _SHARD.search(path.name):
        name = lambda i: _SHARD.sub(f"-{i:05d}-of-{match[1]}", path.name)
        return [path.with_name(name(i)) for i in range(int(match[1]))]
    if _CONVERTED.fullmatch(path.name):
        return sorted(p for p in path.parent.iterdir() if _CONVERTED.fullmatch(p.name))
    return [path]


def _read(path: Path, columns: tuple[str, ...] | None) -> Iterator[Record | BadLine]:
    try:
        open_regular(path).close()  # a pipe or a Git LFS pointer is an error that says so
    except OSError as e:
        raise ValueError(f"{path} cannot be read: {e.strerror}") from None
    suffix = Path(path.name.lower().removesuffix(".gz")).suffix
    if suffix in (".json", ".txt"):
        return _read_json(path)
    if suffix == ".jsonl":
        return read_lines(path)
    if suffix in _TABLES:
        return _read_table(path, _TABLES[suffix], columns)
    if suffix == ".parquet":
        return iter(read_parquet(path))
    raise ValueError(f"{path}: expected a .jsonl, .json, .csv, .tsv or .parquet file")


def read_text(path: Path) -> str:
    """The text of a file.

    Raises:
      ValueError: damaged, or not UTF-8.
    """
    FILES_READ.add(path)
    try:
        content = path.read_bytes()
        content = gzip.decompress(content) if path.suffix.lower() == ".gz" else content
        return content.decode("utf-8-sig")
    except (OSError, EOFError, zlib.error) as e:
        raise ValueError(f"{path} is damaged: {e}") from None
    except UnicodeDecodeError as e:
        raise ValueError(f"{path} is not UTF-8 text, from byte {e.start} on") from None


def _read_json(path: Path) -> Iterator[Record | BadLine]:
    text = read_text(path)
    if text.lstrip().startswith("["):
        return read_array(path)
    try:
        return iter([Record(str(path), json.loads(text))])
    except RecursionError:
        raise ValueError(f"{path} is not JSON: nested too deeply") from None
    except json.JSONDecodeError as e:
        if e.msg == "Extra data":
            return read_lines(path)
        raise ValueError(f"{path} line {e.lineno} is not JSON: {e.msg}") from None


def _read_table(path: Path, delimiter: str, columns: tuple[str, ...] | None) -> Iterator[Record]:
    """The rows of a table. In a .tsv file, quotation marks are ordinary characters."""
    lines = io.StringIO(read_text(path), newline="")  # keeps the line breaks inside quoted cells
    reader = csv.reader(
        lines,
        delimiter=delimiter,
        quoting=csv.QUOTE_NONE if delimiter == "\t" else csv.QUOTE_MINIMAL,
    )
    names = columns
    while True:
        line = reader.line_num + 1
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as e:
            raise ValueError(f"{path} line {line}: {e}; expected a table of text") from None
        if not row:
            continue
        if names is None:
            names = tuple(row)
            continue
        if len(row) != len(names):
            raise ValueError(
                f"{path} line {line} has {len(row)} columns; expected {len(names)}: "
                + ", ".join(names)
            )
        yield Record(f"{path} line {line}", dict(zip(names, row, strict=True)))
