"""Reads WARC and WET files; a damaged record is skipped and the ones after it are read.

A record ends where its Content-Length says. If no record follows there, or if the content has a
whole record in it that the digest of the content does not confirm, the length is wrong: the record
is skipped, and reading goes on at the next line that starts a record. Files whose line ends were
converted to LF have no valid lengths, so their records end at the next one.
"""

import base64
import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from datatrove.data import Document

from llama_jax.corpus.files import Unreadable, open_stream
from llama_jax.corpus.steps import Reader
from llama_jax.corpus.warc_http import html_of_response

MAX_RECORD_BYTES = 16 << 20
"""The largest record read. Common Crawl cuts pages at 1 MiB, later at 5 MiB."""
_MAX_HEADER_BYTES = 64 << 10
_CHUNK_BYTES = 1 << 18
_START = re.compile(rb"WARC/\d\.\d+[ \t]*\r?\n(?=[A-Za-z-]+[ \t]*:)")
# Where a record may start after damage; the record before it may end without a line end.
_NEXT_START = re.compile(
    rb"(?<=\n)" + _START.pattern + rb"|WARC/\d\.\d+\r\n(?=WARC-[A-Za-z-]{1,40}[ \t]*:)"
)
_HEAD_END = re.compile(rb"\r?\n\r?\n")
_MAX_START_BYTES = 128
"""More bytes than the first line of a record and the name of its first header have."""


@dataclass
class Record:
    """A record of a WARC file.

    Attributes:
        number: Position in the file, from 1; counts records of every type.
        headers: Values by lower-case name.
        body: Content; for a response, this includes the HTTP headers.
        problem: Why the content cannot be used, or empty.
    """

    number: int
    headers: dict[str, str]
    body: bytes
    problem: str = ""


class _Stream(Protocol):
    def read(self, size: int, /) -> bytes: ...


def records(stream: _Stream, max_bytes: int = MAX_RECORD_BYTES) -> Iterator[Record]:
    """The records of a decompressed WARC file, in order, also those that are damaged.

    Args:
        stream: Its ``read`` may raise ``Unreadable`` and continue after the damage.
        max_bytes: The content of a larger record is not held in memory and has a problem.
    """
    source, number = _Source(stream), 0
    while True:
        record = Record(number + 1, {}, b"")
        try:
            is_start, skipped = source.skip_to_start()
            if skipped and (is_start or number):
                number += 1
                yield Record(number, {}, b"", "data that is no record")
                record.number += 1
            if not is_start:
                return
            number = record.number
            _read_record(source, record, max_bytes)
        except Unreadable as e:
            source.clear()
            number, record.problem = record.number, e.reason
        yield record


def _read_record(source: "_Source", record: Record, max_bytes: int) -> None:
    head = source.head()
    if head is None:
        record.problem = "headers without an end"
        source.take(1)  # not the start of this record again
        source.up_to_next(0)
        return
    if (following := head.rfind(b"WARC/")) and _NEXT_START.match(head, following):
        record.problem = "headers without an end"
        source.at -= len(head) - following
        return
    record.headers = _headers(head)
    length = record.headers.get("content-length", "")
    if b"\r\n" not in head or not length:
        body = source.up_to_next(max_bytes)
        record.body, record.problem = body or b"", "" if body is not None else _too_large(max_bytes)
    elif not length.isdecimal():
        record.problem = "wrong Content-Length"
        source.up_to_next(0)
    elif len(length) > 18 or int(length) > max_bytes:
        record.problem = _too_large(max_bytes)
        source.up_to_next(0)
    elif source.ends_at(int(length)) and not _has_next_record(record, source.peek(int(length))):
        record.body = source.take(int(length))
    else:
        record.problem = "wrong Content-Length"
        source.up_to_next(0)


def _has_next_record(record: Record, body: bytes) -> bool:
    """Whether a wrong length includes whole records that follow.

    A page may show a record as its text; then the digest of the record, if it has one, is right.
    """
    at = 0
    while (at := body.find(b"\r\n\r\nWARC/", at) + 4) > 3:
        end = _HEAD_END.search(body, at) if _START.match(body, at) else None
        length = _headers(body[at : end.end()]).get("content-length", "") if end else ""
        if end and length.isdecimal() and len(length) <= 18:
            last = end.end() + int(length)
            rest = body[last : last + _MAX_START_BYTES].lstrip(b"\r\n")
            if last <= len(body) and (not rest or _START.match(rest)):
                return not _has_digest(record, body)
    return False


def _has_digest(record: Record, body: bytes) -> bool:
    """Whether the content has the SHA-1 digest that its headers state."""
    algorithm, _, stated = record.headers.get("warc-block-digest", "").partition(":")
    if algorithm.lower() != "sha1":
        return False
    digest = hashlib.sha1(body).digest()
    return stated.lower() in (base64.b32encode(digest).decode().lower(), digest.hex())


def _too_large(max_bytes: int) -> str:
    return f"record larger than {max_bytes:,} bytes"


def _headers(head: bytes) -> dict[str, str]:
    found: dict[str, str] = {}
    for line in head.decode("utf-8", "replace").splitlines()[1:]:
        name, colon, value = line.partition(":")
        if colon:
            found.setdefault(name.strip().lower(), value.strip())
    return found


def is_warc(content: bytes, name: str) -> bool:
    """Whether a file is a WARC or WET file.

    Args:
        content: The (decompressed) beginning.
        name: Its name, which decides if the first record is damaged.
    """
    found = content.lstrip().startswith(b"WARC/")
    return found or re.search(r"\.(warc|wet)(\.|$)", name) is not None


class _Source:
    """A stream with a buffer in which the start of the next record is searched."""

    def __init__(self, stream: _Stream):
        self.stream, self.data, self.at = stream, b"", 0
        self.damage: Unreadable | None = None  # of the data after the buffered bytes

    def fill(self, size: int) -> bool:
        """Whether ``size`` bytes are buffered, after reading as far as needed and possible."""
        if len(self.data) - self.at >= size:
            return True
        parts = [self.data[self.at :]]
        missing = size - len(parts[0])
        while missing > 0 and self.damage is None:
            try:
                part = self.stream.read(_CHUNK_BYTES)
            except Unreadable as e:
                self.damage = e
                break
            if not part:
                break
            parts.append(part)
            missing -= len(part)
        self.data, self.at = b"".join(parts), 0
        return missing <= 0

    def more(self) -> bool:
        """Adds a chunk to the buffer; False at the end of the data.

        Raises:
            Unreadable: The data after the buffered bytes is damaged.
        """
        size = len(self.data) - self.at
        self.fill(size + 1)
        if len(self.data) - self.at > size:
            return True
        if self.damage is not None:
            raise self.damage
        return False

    def clear(self) -> None:
        """Drops the buffered bytes, which end in damage; reading goes on after it."""
        self.data, self.at, self.damage = b"", 0, None

    def peek(self, size: int) -> bytes:
        return self.data[self.at : self.at + size]

    def take(self, size: int) -> bytes:
        self.at += size
        return self.data[self.at - size : self.at]

    def head(self) -> bytes | None:
        """Takes the headers with the empty line that ends them."""
        while True:
            end = _HEAD_END.search(self.data, self.at)
            if end:
                return self.take(end.end() - self.at)
            if len(self.data) - self.at > _MAX_HEADER_BYTES or not self.more():
                return None

    def ends_at(self, size: int) -> bool:
        """Whether a record of this content length is followed by another one, or by the end.

        Raises:
            Unreadable: The content is damaged.
        """
        is_whole = self.fill(size + _MAX_START_BYTES)
        if len(self.data) - self.at < size:
            if self.damage is not None:
                raise self.damage
            return False
        rest = self.data[self.at + size : self.at + size + _MAX_START_BYTES].lstrip(b"\r\n")
        if not is_whole and rest[:5] == b"WARC/"[: len(rest)]:
            return True  # the data ends, or is damaged, in the first lines of the next record
        end = self.at + size
        if rest and not _START.match(rest) and self.data.startswith(b"\r\n\r\n", end):
            return _NEXT_START.search(self.data, self.at, end) is None  # the next one is damaged
        return not rest or _START.match(rest) is not None

    def skip_to_start(self) -> tuple[bool, bool]:
        """Moves to the start of a record; whether there is one, and whether data precedes it."""
        skipped = False
        while True:
            start = _START.search(self.data, self.at)
            end = start.start() if start else max(self.at, len(self.data) - _MAX_START_BYTES)
            skipped = skipped or bool(self.take(end - self.at).strip(b"\r\n\0"))
            if start:
                return True, skipped
            if not self.more():
                return False, skipped or bool(self.data[self.at :].strip(b"\r\n\0"))

    def _next_start(self, may_be_here: bool) -> int | None:
        """Where the next line starts that starts a record."""
        if may_be_here and _START.match(self.data, self.at):
            return self.at
        found = _NEXT_START.search(self.data, self.at)
        return found.start() if found else None

    def up_to_next(self, max_bytes: int) -> bytes | None:
        """Takes what precedes the next record; None if that is more than ``max_bytes``."""
        parts: list[bytes] = []
        size, first = 0, True
        while True:
            start = self._next_start(first)
            end = max(self.at, len(self.data) - _MAX_START_BYTES) if start is None else start
            first &= end == self.at
            size += end - self.at
            parts.append(self.take(end - self.at))
            if size > max_bytes:
                parts.clear()
            if start is not None or not self.more():
                break
        if start is None:  # the last record
            parts.append(self.take(len(self.data) - self.at))
            size += len(parts[-1])
        return b"".join(parts).rstrip(b"\r\n") if size <= max_bytes else None


class WarcReader(Reader):
    """Yields the text of WET conversions and the HTML of successful responses.

    Args:
        groups: See ``Reader``.
        source: Name of the source in the documents.
    """

    name = "warc"

    def __init__(self, groups: Any, source: str):
        super().__init__(groups)
        self.source = source

    def read(self, path: Path) -> Iterator[Document]:
        found = False
        with open_stream(path) as stream:
            for record in records(stream):
                place = f"{path.name}: record {record.number}"
                found |= bool(record.headers)
                if record.problem:
                    yield self.skipped(place, record.problem)
                    continue
                try:
                    document = self._document(record, place)
                except MemoryError:  # of the machine, not of the record
                    raise
                except Exception as e:  # one bad record never ends the file
                    document = self.skipped(place, f"error: {type(e).__name__}")
                if document is not None:
                    yield document
        if not found:
            yield self.skipped(path.name, "no WARC record in the file")

    def _document(self, record: Record, place: str) -> Document | None:
        """A page, a skipped record, or None for a record that is not a page."""
        kind = record.headers.get("warc-type", "")
        if kind == "conversion":
            text, problem = _decode_utf8(record.body), "invalid UTF-8"
        elif kind == "response":
            text, problem = _html(record)
        else:
            return None
        url = _url(record) or None
        id_ = record.headers.get("warc-record-id", place)
        if text is None:
            document = self.skipped(place, problem)
            document.id, document.metadata["url"] = id_, url
            return document
        metadata: dict[str, Any] = {
            "source": self.source,
            "url": url,
            "language": None,
            "scores": {},
            "date": record.headers.get("warc-date"),
            "digest": record.headers.get(
                "warc-block-digest" if kind == "conversion" else "warc-payload-digest"
            ),
            "place": place,
            "html": kind == "response",
        }
        return Document(text=text, id=id_, metadata=metadata)


def _decode_utf8(data: bytes) -> str | None:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return None


def _html(record: Record) -> tuple[str | None, str]:
    """The HTML of a response, or None and why it is not a page."""
    identified = record.headers.get("warc-identified-payload-type")
    text, problem = html_of_response(record.body, identified, MAX_RECORD_BYTES)
    if text is not None and _url(record).endswith("/robots.txt"):
        return None, "robots.txt"
    return text, problem


def _url(record: Record) -> str:
    return record.headers.get("warc-target-uri", "").strip("<>")
