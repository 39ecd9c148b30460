"""Records of .json, .jsonl and .parquet files, and the documents that they become.

Errors name the file and the record.
"""

import codecs
import gzip
import hashlib
import io
import itertools
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from llama_jax.data.conversations import Example

JSONL = (".jsonl", ".jsonl.gz", ".jsonl.zst")
JSON = (".json", ".json.gz", ".json.zst")
"""Read as conversations only."""
MAX_RECORD_BYTES = 2**28
"""Longest line of a .jsonl file, and longest record of an array; several copies are in memory."""
_BLOCK_CHARS = 2**20
_SPACE = " \t\n\r"


class Document(NamedTuple):
    """A text or a conversation, and the key that decides its split."""

    text: str
    """of a conversation, the text of its messages"""
    key: int
    """64-bit hash of the text or of the conversation; for the standard library, of the module; for
    a block of a long text file, of the first block of its section"""
    size: int
    """bytes of UTF-8"""
    example: Example | None = None
    """the conversation; None for text"""
    where: str = ""
    """place of the conversation, for error messages"""


def key_of(text: str) -> int:
    """64-bit hash of a text, the key of :class:`Document`."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


REFUSED = "refused by the template"
"""The reason of a :class:`BadLine` for a conversation that the chat template does not render."""


class BadLine(NamedTuple):
    """A line, row, record or block that cannot be used."""

    reason: str
    """kind of problem, for counting"""
    message: str
    """place and problem"""


class Record(NamedTuple):
    """A value of a file, and its place for error messages."""

    where: str
    value: Any


def read_lines(file: Path) -> Iterator[Record | BadLine]:
    """The JSON value of each line that is not blank.

    Raises:
      ValueError: empty or damaged, or a line is too long.
    """
    number = 0
    try:
        with _open(file) as lines:
            while line := lines.readline(MAX_RECORD_BYTES + 1):
                number += 1
                if len(line) > MAX_RECORD_BYTES:
                    raise ValueError(
                        f"{file} line {number} is longer than {MAX_RECORD_BYTES:,} bytes; split it"
                    )
                if not line.isspace():
                    yield parse_line(line, f"{file} line {number}")
    except (OSError, EOFError, zlib.error) as e:
        raise ValueError(f"{file} is damaged after line {number}: {e}") from None
    if not number:
        raise ValueError(f"{file} is empty; give a file with text")


def _open(file: Path) -> Any:
    if file.suffix.lower() == ".gz":
        return gzip.open(file)
    if file.suffix.lower() == ".zst":
        import pyarrow

        # pyarrow raises for a truncated file; the package zstandard does not.
        return io.BufferedReader(pyarrow.CompressedInputStream(str(file), "zstd"), 2**16)
    return open(file, "rb")


def parse_line(line: bytes, where: str) -> Record | BadLine:
    """The JSON value of a line."""
    try:
        return Record(where, json.loads(line))
    except RecursionError:
        return BadLine("not JSON", f"{where} is not JSON: nested too deeply")
    except UnicodeDecodeError as e:
        return not_utf8(where, e.start, e.reason)
    except ValueError as e:
        return BadLine("not JSON", f"{where} is not JSON: {e}")


def not_utf8(where: str, byte: int, reason: str) -> BadLine:
    """A line or block of text in another encoding."""
    return BadLine(
        "not UTF-8",
        f"{where} is not UTF-8 text (byte {byte}: {reason}; if it is Windows-1252, convert it: "
        "iconv -f WINDOWS-1252 -t UTF-8)",
    )


def read_json(file: Path) -> Iterator[Record | BadLine]:
    """The records of a .json or .jsonl file: the elements of one array, or one record a line.

    The content decides, not the name. Memory is bounded by the longest record.

    Raises:
      ValueError: empty, truncated or damaged; an array that is not JSON.
    """
    return read_array(file) if _is_array(file) else read_lines(file)


def _is_array(file: Path) -> bool:
    """Whether a file begins with an array of objects."""
    try:
        with _open(file) as f:
            start = f.read(2**16).removeprefix(codecs.BOM_UTF8).lstrip()
    except (OSError, EOFError, zlib.error):
        return False  # the reader of lines names the problem
    return start.startswith(b"[") and start[1:].lstrip().startswith(b"{")


def read_array(file: Path) -> Iterator[Record | BadLine]:
    """The elements of a JSON array, one after the other.

    Raises:
      ValueError: not UTF-8, not JSON, or truncated; an element that is too long.
    """
    decoder = json.JSONDecoder()
    with _Text(file) as text:
        text.skip(_SPACE)
        text.take("[")
        for number in itertools.count(1):
            text.skip(_SPACE)
            where = f"{file} record {number} (index {number - 1})"
            yield Record(where, text.parse(decoder, where))
            text.skip(_SPACE)
            if (character := text.next()) not in (",", "]"):
                found = f"{character!r} follows it" if character else "the file ends after it"
                raise ValueError(
                    f"{where}: {found}, where a comma or the end of the array should be; the file "
                    "is truncated or damaged"
                )
            text.take(character)
            if character == "]":
                break
        text.skip(_SPACE)
        if text.next():
            raise ValueError(f"{file} has text after the end of its array of {number} records")


class _Text:
    """The text of a file of which only a part is in memory."""

    def __init__(self, file: Path):
        self._file, self._raw = file, _open(file)
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._buffer, self._at, self._ended = "", 0, False

    def __enter__(self) -> "_Text":
        return self

    def __exit__(self, *_: Any) -> None:
        self._raw.close()

    def _read_more(self, count: int) -> None:
        """Add about ``count`` characters, and forget those before the position."""
        try:
            content = self._raw.read(count)
            self._ended = not content
            new = self._decoder.decode(content, final=self._ended)
        except (OSError, EOFError, zlib.error) as e:
            raise ValueError(f"{self._file} is damaged: {e}") from None
        except UnicodeDecodeError as e:
            raise ValueError(f"{self._file} is not UTF-8 text ({e.reason})") from None
        self._buffer, self._at = self._buffer[self._at :] + new, 0

    def next(self) -> str:
        """The character at the position; "" at the end of the file."""
        while self._at == len(self._buffer) and not self._ended:
            self._read_more(_BLOCK_CHARS)
        return self._buffer[self._at : self._at + 1]

    def take(self, character: str) -> None:
        assert self.next() == character
        self._at += 1

    def skip(self, characters: str) -> None:
        while (character := self.next()) and character in characters:
            self._at += 1

    def parse(self, decoder: json.JSONDecoder, where: str) -> Any:
        """The JSON value at the position, which moves behind it."""
        while True:
            try:
                value, end = decoder.raw_decode(self._buffer, self._at)
                # A number at the end of the buffer may continue.
                if end < len(self._buffer) or self._ended:
                    self._at = end
                    return value
            except RecursionError:
                raise ValueError(f"{where} is not JSON: nested too deeply") from None
            except ValueError as e:
                if self._ended:
                    message = e.msg if isinstance(e, json.JSONDecodeError) else str(e)
                    raise ValueError(
                        f"{where} is not JSON, or the file is truncated: {message}"
                    ) from None
            length = len(self._buffer) - self._at
            if length > MAX_RECORD_BYTES:
                raise ValueError(
                    f"{where} is not JSON, or is longer than {MAX_RECORD_BYTES:,} characters"
                )
            self._read_more(max(_BLOCK_CHARS, length))  # doubling: the total work is linear


def read_parquet(file: Path, columns: list[str] | None = None) -> Iterator[Record]:
    """The rows of a parquet file as dicts.

    Args:
      file: the file.
      columns: names of those to read; None: all.

    Raises:
      ValueError: not a parquet file, or damaged, or without one of the columns.
    """
    import pyarrow
    from pyarrow import parquet

    row = 0
    try:
        with parquet.ParquetFile(file) as table:
            names = table.schema_arrow.names
            for column in columns or ():
                if column not in names:
                    listed = ", ".join(names[:8])
                    raise ValueError(f'{file} has no "{column}" column, only {listed}')
            for batch in table.iter_batches(batch_size=64, columns=columns):
                for value in batch.to_pylist():
                    row += 1
                    yield Record(f"{file} row {row}", value)
    except (pyarrow.ArrowException, OSError) as e:
        raise ValueError(
            f"{file} is not a parquet file, or is damaged after row {row}: {e}"
        ) from None
