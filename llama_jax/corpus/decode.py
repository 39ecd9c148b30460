"""Bytes to text where some of the bytes may be damaged."""

MAX_DAMAGED = 0.3
"""Of the characters outside ASCII of a text, with which it is still in an encoding."""


def try_decode(data: bytes, encoding: str) -> str | None:
    """Text in an encoding, or None if too many of its characters are damaged.

    A few damaged ones become U+FFFD: in another encoding, all others would be wrong.
    """
    try:
        return data.decode(encoding)
    except UnicodeDecodeError:
        text = data.decode(encoding, "replace")
    outside_ascii = len(text) - len(text.encode("ascii", "ignore"))
    return text if text.count("\ufffd") <= MAX_DAMAGED * outside_ascii else None
