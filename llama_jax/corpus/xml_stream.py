"""Splits a large XML file into records and parses each record by itself, in bounded memory.

A damaged record does not affect the others. The part of the file in which entities could be
declared is never parsed, so entities are neither expanded nor fetched.
"""

import re
from collections.abc import Iterator
from xml.etree import ElementTree

from llama_jax.corpus.files import CHUNK, Stream, Unreadable

_MAX_RECORD_BYTES = 32 << 20
_MAX_TAG_BYTES = 64


def split_records(stream: Stream, tag: str) -> Iterator[tuple[int, bytes | Unreadable]]:
    """Yields what precedes the first element named ``tag``, then each element.

    Args:
        stream: The XML file.
        tag: Name of the elements, without a namespace prefix. They must not be nested.

    Yields:
        Byte offset and content. An element extends to the start of the next one, so the last one
        includes the end of the file. Instead of the content, an ``Unreadable`` for damaged data or
        for an element larger than 32 MiB; the elements after it follow.
    """
    start_tag = re.compile(rb"<(?:[\w.-]+:)?" + tag.encode() + rb"(?=[\s/>])")
    buffer, offset = bytearray(), 0
    in_element = skipping = False  # skipping: until the next start tag
    searched = 0
    while True:
        try:
            block = stream.read(CHUNK)
        except Unreadable as e:
            if not skipping:
                yield offset, bytes(buffer)
            offset += len(buffer)
            yield offset, e
            buffer.clear()
            skipping, searched = True, 0
            continue
        buffer += block
        begin = 0
        for match in start_tag.finditer(buffer, searched):
            if not skipping:
                yield offset + begin, bytes(buffer[begin : match.start()])
            begin, in_element, skipping = match.start(), True, False
        if not block:
            break
        if len(buffer) - begin > _MAX_RECORD_BYTES and not skipping:
            place = f"{stream.place}: byte {offset + begin}"
            yield offset + begin, Unreadable(place, f"larger than {_MAX_RECORD_BYTES >> 20} MiB")
            skipping = True
        if skipping:
            begin = max(0, len(buffer) - _MAX_TAG_BYTES)
        del buffer[:begin]
        offset += begin
        # An element in the buffer starts at index 0, where its own tag must not be found again.
        searched = max(len(buffer) - _MAX_TAG_BYTES, 1 if in_element and not skipping else 0)
    if not skipping:
        yield offset, bytes(buffer)


def parse_record(content: bytes) -> ElementTree.Element:
    """The element that ``content`` starts with; names are without namespaces.

    Raises:
        ValueError: The element is not well-formed or cut off.
    """
    name = re.match(rb"<((?:([\w.-]+):)?[\w.-]+)", content)
    if name is None:
        raise ValueError("not an XML element")
    end_tag = b"</" + name[1] + b">"
    end = content.rfind(end_tag)
    end = content.rfind(b"/>") + 2 if end < 0 else end + len(end_tag)
    declaration = b' xmlns:%s="-"' % name[2] if name[2] else b""
    try:
        wrapper = ElementTree.fromstring(b"<r%s>%s</r>" % (declaration, content[:end]))
    except (ElementTree.ParseError, ValueError) as e:
        raise ValueError(f"not well-formed or cut off: {e}") from None
    if len(wrapper) != 1:
        raise ValueError("not well-formed or cut off")
    for element in wrapper.iter():
        element.tag = element.tag.rpartition("}")[2]
    return wrapper[0]
