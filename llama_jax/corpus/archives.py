"""The files of tar, zip and 7z archives as streams; nothing is extracted to disk.

Example::

    for member in members(path):  # one file, or the files of an archive
        if isinstance(member, Unreadable):
            yield self.skipped(member.place, member.reason)
            continue
        for line in lines(member.stream, max_bytes=1 << 20):
            if isinstance(line, Unreadable):  # a line that is too long, or damaged data
                yield self.skipped(line.place, line.reason)
"""

import contextlib
import functools
import io
import itertools
import queue
import re
import stat
import tarfile
import threading
import zipfile
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from llama_jax.corpus.files import CHUNK, ERRORS, Stream, Unreadable, chunks, kind_of, open_stream
from llama_jax.io import open_regular

MAX_MEMBERS = 5_000_000
"""Members of an archive; the largest arXiv and Stack Exchange archives have some thousands."""
MAX_NESTED = 256 << 20
"""Size of a zip or 7z inside another archive: they need random access, so they are in memory."""

_PIECE = 1 << 20
LINK = "a link, device or pipe in an archive"


@dataclass(frozen=True)
class Member:
    """A file of an archive. Its stream can be read until the next member is asked for.

    Attributes:
        name: Path within the archive; never absolute, never with ``..``.
        place: Names of the archive and the member, for messages.
        stream: The content.
    """

    name: str
    place: str
    stream: Stream


def members(source: Path | Member) -> Generator[Member | Unreadable, None, None]:
    """The files of a tar, zip or 7z archive, also a compressed one; any other file is one member.

    Folders are left out. Refused are links, devices, names that are absolute or contain ``..``,
    encrypted members, and archives with too many members.
    """
    try:
        stream = open_stream(source.stream if isinstance(source, Member) else source)
        kind = kind_of(stream)
    except Unreadable as e:
        yield e.with_traceback(None)
        return
    readers = {"tar": _tar_members, "zip": _zip_members, "7z": _seven_zip_members}
    if kind not in readers:
        yield Member(re.sub(r"(?i)\.(gz|bz2|xz|zst)$", "", source.name), stream.place, stream)
        return
    found = readers[kind](stream)
    try:
        yield from itertools.islice(found, MAX_MEMBERS)
        if next(found, None):
            yield Unreadable(
                stream.place, f"more than {MAX_MEMBERS:,} members; the rest is skipped"
            )
    except Unreadable as e:
        yield e.with_traceback(None)
    except Exception as e:  # py7zr and tarfile raise many types for damaged headers
        yield Unreadable(stream.place, f"the rest of the {kind} archive is damaged: {_cause(e)}")


def _cause(error: Exception) -> str:
    return "it ends too early" if isinstance(error, EOFError) else type(error).__name__


def _name_problem(name: str) -> str | None:
    if not name or "\0" in name:
        return "a member without a valid name"
    if name.startswith(("/", "\\")) or re.match(r"[A-Za-z]:", name):
        return "an absolute member name"
    if ".." in re.split(r"[/\\]", name):
        return "a member name with .."
    return None


def _tar_members(stream: Stream) -> Iterator[Member | Unreadable]:
    damaged = []
    complete = False  # whether zeros, which end an archive, follow the last member

    class Header(tarfile.TarInfo):
        """Notes damaged headers, which tarfile skips or takes for the end without a word."""

        @classmethod
        def frombuf(cls, buf: Any, encoding: str, errors: str) -> Any:
            nonlocal complete
            complete = not buf.strip(b"\0") if buf else complete
            try:
                header = super().frombuf(buf, encoding, errors)
            except (tarfile.EOFHeaderError, tarfile.EmptyHeaderError):  # type: ignore[attr-defined]
                raise
            except tarfile.HeaderError:
                damaged.append(stream.position)
                raise
            if header.type in b"xgLK" and header.size > 1 << 20:  # tarfile reads these at once
                damaged.append(stream.position)
                raise tarfile.InvalidHeaderError("name too long")  # type: ignore[attr-defined]
            return header

    with (
        contextlib.closing(stream),  # tarfile's objects, which refer to each other, keep it
        tarfile.open(
            fileobj=stream, mode="r|", bufsize=CHUNK, tarinfo=Header, ignore_zeros=True
        ) as tar,
    ):
        reported = 0
        while (info := tar.next()) is not None:
            tar.members.clear()  # type: ignore[attr-defined]  # every header it has seen
            if damaged[reported:]:
                place = f"{stream.place}: before member {info.name}"
                yield Unreadable(place, "damaged tar headers")
                reported = len(damaged)
            if info.isdir():
                continue
            place = f"{stream.place}: {info.name}"
            problem = _name_problem(info.name)
            if not info.isreg():
                problem = problem or LINK
            if problem or info.issparse():
                yield Unreadable(place, problem or "a sparse file in an archive")
                continue
            content = tar.extractfile(info)
            assert isinstance(content, io.BufferedReader)
            yield Member(info.name, place, Stream(chunks(content.read1), place))
        if damaged[reported:]:
            yield Unreadable(f"{stream.place}: byte {damaged[reported]}", "damaged tar headers")
        elif not complete:
            place = f"{stream.place}: byte {stream.position}"
            yield Unreadable(place, "a tar file that is cut off")


def _random_access(stream: Stream) -> BinaryIO:
    """The archive as a file with ``seek``: zip and 7z have their list of members at the end."""
    if stream.path:
        return open_regular(stream.path)
    return io.BytesIO(stream.read_all(MAX_NESTED))


def _zip_members(stream: Stream) -> Iterator[Member | Unreadable]:
    with _random_access(stream) as file, zipfile.ZipFile(file) as archive:
        for info in archive.infolist():
            place = f"{stream.place}: {info.filename}"
            problem = _name_problem(info.filename)
            mode = info.external_attr >> 16
            if info.is_dir() and not problem:
                continue
            if stat.S_IFMT(mode) not in (0, stat.S_IFREG):
                problem = problem or LINK
            if info.flag_bits & 1:
                problem = problem or "an encrypted member"
            if not problem:
                try:
                    content = archive.open(info)
                except ERRORS as e:
                    problem = f"damaged: {type(e).__name__}"
            if problem:
                yield Unreadable(place, problem)
                continue
            assert isinstance(content, zipfile.ZipExtFile)
            with content:
                size = functools.partial(int, info.compress_size)
                yield Member(info.filename, place, Stream(chunks(content.read1), place, size))


class _Stopped(Exception):
    """Ends the thread of `_seven_zip_members` when nobody reads any more."""


def _seven_zip_members(stream: Stream) -> Iterator[Member | Unreadable]:
    """py7zr pushes what it decompresses, so it runs in a thread that waits for the reader."""
    import py7zr

    items: queue.Queue[Any] = queue.Queue(maxsize=1)
    stopped = threading.Event()

    def put(item: Any) -> None:
        while not stopped.is_set():
            with contextlib.suppress(queue.Full):
                return items.put(item, timeout=0.2)
        raise _Stopped

    class Writer(py7zr.io.NullIO):
        def __init__(self, filename: str):
            put(filename)

        def write(self, data: Any) -> int:
            for start in range(0, len(data), _PIECE):  # py7zr gives up to 128 MB
                put(bytes(data[start : start + _PIECE]))
            return len(data)

    class Factory(py7zr.io.WriterFactory):
        def create(self, filename: str) -> Writer:
            return Writer(filename)

    def extract(archive: Any, targets: list[str]) -> None:
        try:
            archive.extract(targets=targets, factory=Factory())
            put(None)
        except _Stopped:
            pass
        except Exception as e:
            with contextlib.suppress(_Stopped):
                put(Unreadable(stream.place, f"the rest of the 7z archive is damaged: {_cause(e)}"))

    with _random_access(stream) as file, py7zr.SevenZipFile(file) as archive:
        targets = []
        for info in archive.list():
            problem = _name_problem(info.filename)
            if not (info.is_file or info.is_directory):
                problem = problem or LINK
            if problem:
                yield Unreadable(f"{stream.place}: {info.filename}", problem)
            elif info.is_file:
                targets.append(info.filename)
        size = file.seek(0, io.SEEK_END)
        thread = threading.Thread(target=extract, args=(archive, targets), daemon=True)
        thread.start()
        try:
            item = items.get()
            while isinstance(item, str):
                name = item

                def content() -> Iterator[bytes | Unreadable]:
                    nonlocal item
                    while isinstance(item := items.get(), bytes):
                        yield item
                    if isinstance(item, Unreadable):  # also for the reader of this member
                        yield item

                place = f"{stream.place}: {name}"
                member = Stream(content(), place, lambda: size)
                yield Member(name, place, member)
                with contextlib.suppress(Unreadable):  # what the reader has left
                    while member.read(CHUNK):
                        pass
            if item is not None:
                bomb = f"{stream.place}: the rest of the archive", "not read"
                yield item if isinstance(item, Unreadable) else Unreadable(*bomb)
        finally:
            stopped.set()
            with contextlib.suppress(queue.Empty):
                items.get_nowait()
            thread.join()
