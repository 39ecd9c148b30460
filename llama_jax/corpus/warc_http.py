"""The page of an HTTP response in a WARC file, as text."""

import codecs
import io
import re
import zlib
from collections.abc import Callable, Iterator

import brotli
import cchardet
import zstandard
from warcio.archiveiterator import ArchiveIterator
from warcio.bufferedreaders import ChunkedDataReader
from warcio.exceptions import ArchiveLoadFailed

from llama_jax.corpus.decode import try_decode

_RECORD = (
    b"WARC/1.0\r\nWARC-Type: response\r\nWARC-Target-URI: http://page\r\n"
    b"Content-Type: application/http; msgtype=response\r\nContent-Length: %d\r\n\r\n"
)
_HTML = ("text/html", "application/xhtml+xml")
_CHARSET = re.compile(rb"charset\s*=\s*[\"']?\s*([A-Za-z0-9_:.-]+)", re.IGNORECASE)
# Python's names of the encodings of the web.
_ENCODINGS = re.compile(
    r"utf-8|ascii|iso8859-\d+|cp125\d|cp8(?:66|74)|tis-620|koi8-[ru]|mac-(?:roman|cyrillic)"
    r"|gb\w+|big5\w*|euc_\w+|iso2022_\w+|shift_jis|cp9(?:32|49)"
)
# Browsers read the former as the latter, which has more characters (encoding.spec.whatwg.org).
_EXTENDED = {
    "ascii": "cp1252", "iso8859-1": "cp1252", "iso8859-9": "cp1254", "iso8859-11": "cp874",
    "tis-620": "cp874", "gb2312": "gb18030", "gbk": "gb18030", "shift_jis": "cp932",
    "euc_kr": "cp949", "big5": "big5hkscs",
}  # fmt: skip
_MAX_DAMAGED = 0.01
"""Of the characters of a page whose encoding is guessed."""
_PIECE = 4096  # bytes; zlib makes at most 4 MiB of them
_OUTPUT = 1 << 20


def html_of_response(
    response: bytes, identified_type: str | None, max_bytes: int
) -> tuple[str | None, str]:
    """The HTML of a successful response, or None and why it is not a page.

    Args:
        response: HTTP headers and content.
        identified_type: Type that the crawler found in the content; replaces that of the headers.
        max_bytes: A larger page is not read.
    """
    head = _RECORD % len(response)
    try:
        warc = next(iter(ArchiveIterator(io.BytesIO(head + response + b"\r\n\r\n"))))
    except (ArchiveLoadFailed, EOFError):
        return None, "not an HTTP response"
    headers = warc.http_headers
    status = headers.get_statuscode() if headers else ""
    if not re.fullmatch("[0-9]{3}", status):
        return None, "not an HTTP response"
    if status != "200":
        return None, f"HTTP status {status}"
    content_type = headers.get_header("Content-Type") or ""
    if (identified_type or content_type).partition(";")[0].strip().lower() not in _HTML:
        return None, "not text/html"
    body = warc.raw_stream.read()
    if (headers.get_header("Transfer-Encoding") or "").strip().lower() == "chunked":
        body = ChunkedDataReader(io.BytesIO(body)).read()
    encoding = (headers.get_header("Content-Encoding") or "").strip().lower()
    body = _decompressed(body, encoding, max_bytes)
    if len(body) > max_bytes:
        return None, f"page larger than {max_bytes:,} bytes"
    return decode_html(body, content_type.encode("utf-8", "replace")), "unknown character encoding"


def _decompressed(body: bytes, encoding: str, max_bytes: int) -> bytes:
    """The content of a page: what precedes damage, and little more than ``max_bytes``.

    A page that is not compressed although its headers say so is returned as it is.
    """
    for decompress in _DECOMPRESSORS.get(encoding, ()):
        content = bytearray()
        try:
            for part in decompress(body):
                content += part
                if len(content) > max_bytes:
                    break
        except (zlib.error, brotli.error, zstandard.ZstdError):
            pass
        if content:
            return bytes(content)
    return body


def _with_zlib(bits: int) -> Callable[[bytes], Iterator[bytes]]:
    def decompress(body: bytes) -> Iterator[bytes]:
        decoder = zlib.decompressobj(bits)
        for start in range(0, len(body), _PIECE):
            yield decoder.decompress(body[start : start + _PIECE])

    return decompress


def _with_brotli(body: bytes) -> Iterator[bytes]:
    decoder = brotli.Decompressor()
    part = decoder.process(body, output_buffer_limit=_OUTPUT)
    while part:
        yield part
        part = decoder.process(b"", output_buffer_limit=_OUTPUT)


def _with_zstd(body: bytes) -> Iterator[bytes]:
    with zstandard.ZstdDecompressor().stream_reader(body) as reader:
        while part := reader.read(_OUTPUT):
            yield part


_DECOMPRESSORS: dict[str, tuple[Callable[[bytes], Iterator[bytes]], ...]] = {
    "gzip": (_with_zlib(31),),
    "x-gzip": (_with_zlib(31),),
    "deflate": (_with_zlib(15), _with_zlib(-15)),
    "br": (_with_brotli,),
    "zstd": (_with_zstd,),
}


def decode_html(body: bytes, content_type: bytes = b"") -> str | None:
    """Text in UTF-8, else in the encoding that the headers or the page declare, else a guess.

    A few damaged characters become U+FFFD, as in browsers; a page is often cut inside one.
    """
    labels = _CHARSET.findall(content_type) + _CHARSET.findall(body[:4096])  # also those of scripts
    names = list(filter(None, (_encoding(label.decode("ascii")) for label in labels)))
    if names and names[0].startswith("iso2022") and b"\x1b" in body:  # has bytes of ASCII only
        return body.decode(names[0], "replace")
    if body.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return body.decode("utf-16", "replace")
    try:
        return codecs.getincrementaldecoder("utf-8-sig")().decode(body)  # may end in a character
    except UnicodeDecodeError:
        pass
    for name in dict.fromkeys([*names, "utf-8"]):
        if (text := try_decode(body, name)) is not None:
            return text
    guess = _encoding(cchardet.detect(body)["encoding"] or "utf-8")
    text = body.decode(guess, "replace") if guess else None
    return text if text and text.count("\ufffd") <= _MAX_DAMAGED * len(text) else None


def _encoding(label: str) -> str | None:
    """Python's name of an encoding, or None if it is none of the web."""
    try:
        name = codecs.lookup(label.lower().removeprefix("x-")).name
    except LookupError:
        return None
    name = _EXTENDED.get(name, name)
    return name if _ENCODINGS.fullmatch(name) else None
