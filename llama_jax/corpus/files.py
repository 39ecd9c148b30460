"""Opens files that come from outside, plain or compressed, in bounded memory.

Formats are recognized by content, not by suffix. What cannot be read is an ``Unreadable`` with its
place and reason, and reading goes on after it where the format allows. Archives: ``archives.py``.

``open_stream(path)`` gives the content of one plain or compressed file. A damaged gzip, bzip2, xz
or zstd member raises ``Unreadable`` from ``read``; the next ``read`` continues at the next member
if there is one. Each record of a WARC file is a gzip member, so only the damaged record is lost:
catch ``Unreadable``, drop the record that was being read, and search for the next record.
"""

import bz2
import io
import itertools
import lzma
import re
import struct
import tarfile
import types
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import zstandard

from llama_jax.io import open_regular

CHUNK = 1 << 16
MAX_RATIO = 250
"""Decompressed over compressed size; text reaches 5 to 20, edit histories in 7z near 150."""
FREE_BYTES = 2 << 30
"""Content of this size is read whatever its ratio."""
_MAGIC = {
    "gzip": re.compile(rb"\x1f\x8b\x08[\x00-\x1f]"),
    "bzip2": re.compile(rb"BZh[1-9](?:1AY&SY|\x17rE8P\x90)"),
    "xz": re.compile(rb"\xfd7zXZ\x00"),
    "zstd": re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18"),
    "zip": re.compile(rb"PK(?:\x03\x04|\x05\x06)"),
    "7z": re.compile(rb"7z\xbc\xaf\x27\x1c"),
    "tar": re.compile(rb"(?s).{257}ustar"),
}
_DECODERS: dict[str, Callable[[], Any]] = {
    "gzip": lambda: zlib.decompressobj(wbits=31),
    "bzip2": bz2.BZ2Decompressor,
    "xz": lzma.LZMADecompressor,
    "zstd": lambda: zstandard.ZstdDecompressor().decompressobj(),
}
ERRORS = (
    EOFError, OSError, ValueError, RuntimeError, NotImplementedError, struct.error, zlib.error,
    lzma.LZMAError, zstandard.ZstdError, tarfile.TarError, zipfile.BadZipFile,
)  # fmt: skip


class Unreadable(ValueError):
    """A file, or a part of one, that cannot be read.

    Attributes:
        place: File and position: member, line or byte.
        reason: Short, the same for all records with the same problem.
    """

    def __init__(self, place: str, reason: str):
        super().__init__(f"{place}: {reason}")
        self.place, self.reason = place, reason


class Stream(io.RawIOBase):
    """The content of a file. ``read(n)`` may return fewer bytes than asked; b"" is the end.

    Args:
        chunks: The content. An ``Unreadable`` among the chunks is raised, and the next read
            goes on with the chunk after it.
        place: Name of the file for messages.
        compressed: Number of compressed bytes read so far, to recognize a decompression bomb.
    """

    def __init__(
        self,
        chunks: Iterator[bytes | Unreadable],
        place: str,
        compressed: Callable[[], int] | None = None,
    ):
        self.chunks, self.place, self.compressed = chunks, place, compressed
        self.position = self.received = 0
        self.ahead = memoryview(b"")  # slices without copies: 7z and zstd chunks are large
        self.path: Path | None = None  # of a plain file, for formats that need random access

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.position

    def close(self) -> None:
        """Closes the file too, if all of it is read by this stream alone."""
        if isinstance(self.chunks, types.GeneratorType):
            self.chunks.close()
        super().close()

    def read(self, size: int | None = -1) -> bytes:
        """Without the buffer of ``size`` bytes that the base class clears for each call."""
        if size is None or size < 0:
            return super().read(-1)
        if not self.ahead:
            self.ahead = memoryview(self._next())
        part = bytes(self.ahead[:size])
        self.ahead = self.ahead[len(part) :]
        self.position += len(part)
        return part

    def readinto(self, buffer: Any) -> int:
        part = self.read(len(buffer))
        buffer[: len(part)] = part
        return len(part)

    def peek(self, size: int) -> bytes:
        """The next ``size`` bytes, fewer only at the end; ``read`` returns them again."""
        try:
            while len(self.ahead) < size and (chunk := self._next()):
                self.ahead = memoryview(bytes(self.ahead) + chunk)
        except Unreadable as e:  # raised when it is read
            # Without its traceback, which would keep the file open.
            self.chunks = itertools.chain([e.with_traceback(None)], self.chunks)
        return bytes(self.ahead[:size])

    def read_all(self, max_bytes: int) -> bytes:
        """The rest of the content.

        Raises:
            Unreadable: damaged, or larger than ``max_bytes``.
        """
        parts, total = [], 0
        while chunk := self.read(CHUNK):
            parts.append(chunk)
            if (total := total + len(chunk)) > max_bytes:
                raise Unreadable(self.place, f"larger than {max_bytes:,} bytes")
        return b"".join(parts)

    def _next(self) -> bytes:
        try:
            chunk = next((chunk for chunk in self.chunks if chunk), b"")
        except Unreadable:
            raise
        except ERRORS as e:
            raise Unreadable(self.place, f"damaged: {type(e).__name__}") from None
        if isinstance(chunk, Unreadable):
            raise chunk
        self.received += len(chunk)
        limit = max(FREE_BYTES, MAX_RATIO * self.compressed()) if self.compressed else None
        if chunk and limit and self.received > limit:
            self.chunks = iter(())
            raise Unreadable(self.place, f"expands to more than {MAX_RATIO} times its size")
        return chunk


def open_stream(source: Path | Stream) -> Stream:
    """The decompressed content of a plain, gzip, bzip2, xz or zstd file.

    Raises:
        Unreadable: missing, or not a regular file.
    """
    if isinstance(source, Stream):
        stream = source
    else:
        try:
            file = open_regular(source)
        except (OSError, ValueError) as e:
            raise Unreadable(source.name, getattr(e, "strerror", None) or str(e)) from None
        stream = Stream(_content(file), source.name)
        stream.path = source
    kind = kind_of(stream)
    if kind not in _DECODERS:
        return stream
    return Stream(_decompressed(stream, kind), stream.place, lambda: stream.position)


def kind_of(stream: Stream) -> str:
    """The format at the start of a stream: a key of ``_MAGIC``, or "plain"."""
    head = stream.peek(tarfile.BLOCKSIZE)
    for kind, magic in _MAGIC.items():
        if magic.match(head):
            return kind
    try:  # tar files of the 1980s format have a checksum and no magic
        tarfile.TarInfo.frombuf(head[: tarfile.BLOCKSIZE], "utf-8", "replace")
    except tarfile.TarError:
        return "plain"
    return "tar"


def lines(stream: Stream, max_bytes: int) -> Iterator[bytes | Unreadable]:
    """The lines without their line ends.

    Yields:
        A line, or an ``Unreadable`` for a line of more than ``max_bytes``, which is never held
        in memory, or for damaged data. Line numbers in places count all lines.
    """
    number, line, too_long = 1, bytearray(), False
    while True:
        try:
            chunk = stream.read(CHUNK)
        except Unreadable as e:
            yield e.with_traceback(None)
            line, too_long = bytearray(), False  # what precedes the damage is no complete line
            continue
        first, *rest = chunk.split(b"\n") if chunk else (b"", b"")
        for i, part in enumerate((first, *rest)):
            if i:
                if too_long:
                    reason = f"a line of more than {max_bytes:,} bytes"
                    yield Unreadable(f"{stream.place}: line {number}", reason)
                elif chunk or line:
                    yield bytes(line.removesuffix(b"\r"))
                number, line, too_long = number + 1, bytearray(), False
            too_long = too_long or len(line) + len(part) > max_bytes
            if too_long:
                line = bytearray()
            else:
                line += part
        if not chunk:
            return


def _content(file: io.RawIOBase) -> Iterator[bytes]:
    with file:
        yield from chunks(file.read)


def chunks(read: Callable[[int], bytes]) -> Iterator[bytes]:
    while chunk := read(CHUNK):
        yield chunk


def _decompressed(source: Stream, kind: str) -> Iterator[bytes | Unreadable]:
    """Decompresses members one after another; after a damaged one, continues at the next magic."""
    magic = _MAGIC[kind]
    pending = b""  # read and not yet decoded
    while True:
        while len(pending) < 512 and (chunk := source.read(CHUNK)):
            pending = pending.lstrip(b"\0") + chunk  # zeros are padding between members
        if not (pending := pending.lstrip(b"\0")):
            return
        window = pending  # what was read last, to search for the next member
        place = f"{source.place}: byte {source.position - len(pending)}"
        at_start, decoder = True, _DECODERS[kind]()
        problem = "" if magic.match(pending) else f"data that is not {kind}"
        while not problem and not decoder.eof:
            try:
                if kind == "zstd":  # has no limit of output; 1 KiB gives at most 32 MiB
                    out, rest = decoder.decompress(pending[:1024]), pending[1024:]
                else:
                    out = decoder.decompress(pending, CHUNK)
                    rest = getattr(decoder, "unconsumed_tail", b"")
            except (*ERRORS, MemoryError):
                problem = f"a damaged {kind} member"
                break
            pending = rest
            yield out
            if not pending and not out and not decoder.eof:
                if not (pending := source.read(CHUNK)):
                    problem = f"a truncated {kind} member"
                at_start = at_start and len(window) <= CHUNK
                window = window[-CHUNK:] + pending
        if not problem:
            pending = decoder.unused_data + (pending if kind == "zstd" else b"")
            continue
        yield Unreadable(place, problem)
        start = int(at_start)  # not the start of this member again
        while not (found := magic.search(window, start)) and (chunk := source.read(CHUNK)):
            window, start = window[-16:] + chunk, 0
        pending = window[found.start() :] if found else b""
