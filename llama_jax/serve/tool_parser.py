"""Calls of functions in the text of an answer, found while the text grows."""

import json
import re
import secrets
import string
import sys
from collections.abc import Collection
from typing import Any, NamedTuple

from llama_jax.serve.tools import ToolFormat

_NAME = re.compile(r"\s*([\w.-]{1,64})(?:\[CALL_ID\]\w{1,64})?(?:\[ARGS\])?\s*", re.ASCII)
_LIST = re.compile(r"\[(?=[\s{\]])")
_MAX_HEAD = 256
"""Most characters between a marker and the JSON of a call."""
_MAX_FAILED = 16
"""Beginnings of calls that turn out to be text; what follows is text. Each takes time linear in the
length of the answer."""
_BLANK = " \t\r\n"
_BETWEEN = _BLANK + ";,"
"""Between two calls."""


class Call(NamedTuple):
    """A call of a function."""

    id: str
    name: str
    arguments: str
    """JSON text of an object"""


class CallParser:
    """Separates an answer into text and calls.

    Text that may be the beginning of a call is held back. What turns out to be no call of one of
    the functions remains text. The result does not depend on how the answer is cut into pieces.

    Args:
      fmt: of the model.
      names: of the functions that may be called.

    Example::

        parser = CallParser(tool_format(template.source), ["get_weather"])
        for text in pieces: found += parser.push(text)
        found += parser.finish()
    """

    def __init__(self, fmt: ToolFormat, names: Collection[str]):
        self._fmt, self._names = fmt, names
        self._text = ""  # not yet decided
        self._scan = _Scan()
        self._begun = False  # a marker, or bare JSON, is at the start of the text
        self._json_from = 0  # where the JSON begins in the text
        self._may_be_bare = fmt.name != "hermes"
        self._after_call = False
        self._num_failed = 0

    def push(self, text: str) -> list[str | Call]:
        """Add new text; returns the text and calls that are now known."""
        self._text += text
        found: list[str | Call] = []
        while self._step(found, at_end=False):
            pass
        return found

    def finish(self) -> list[str | Call]:
        """What was held back, at the end of the answer."""
        found: list[str | Call] = []
        while self._step(found, at_end=True):
            pass
        rest, self._text = self._text, ""
        if self._after_call:
            rest = rest.lstrip(_BETWEEN)
        return [*found, rest] if rest else found

    def _step(self, found: list[str | Call], at_end: bool) -> bool:
        """Decide about the beginning of the text; False if more text is needed."""
        return self._in_call(found, at_end) if self._begun else self._outside(found, at_end)

    def _outside(self, found: list[str | Call], at_end: bool) -> bool:
        begin = self._fmt.begin
        if self._after_call:
            rest = self._text.lstrip(_BETWEEN)
            if not rest:
                return False
            is_next = rest[0] in "{["
            self._text = rest if is_next else self._text.lstrip(_BLANK)
            self._after_call = False
        if self._num_failed == _MAX_FAILED:
            self._emit(found, len(self._text))
            return False
        if self._may_be_bare:
            text = self._text.lstrip(_BLANK)
            if not text or (begin.startswith(text) and begin != text and not at_end):
                return False
            if text[0] in "{[" and not (begin and text.startswith(begin)):
                self._begin(len(self._text) - len(text), is_bare=True)
                return True
        at = self._text.find(begin) if begin else -1
        if at >= 0:
            self._emit(found, at)
            self._begin(len(begin), is_bare=False)
            return True
        held = 0
        if begin and not at_end:
            held = next(k for k in range(len(begin) - 1, -1, -1) if self._text.endswith(begin[:k]))
        self._emit(found, len(self._text) - held)
        return False

    def _begin(self, json_from: int, is_bare: bool) -> None:
        self._begun, self._is_bare, self._json_from = True, is_bare, json_from
        self._head: str | None = "" if is_bare else None  # between the marker and the JSON
        self._scan = _Scan()

    def _emit(self, found: list[str | Call], size: int) -> None:
        """Give out the first characters as text."""
        text, self._text = self._text[:size], self._text[size:]
        if text:
            found.append(text)
        if text.strip(_BLANK):
            self._may_be_bare = False

    def _no_call(self, found: list[str | Call]) -> bool:
        """What has begun is text."""
        self._begun = False
        self._may_be_bare = False
        self._num_failed += 1
        self._emit(found, 1 if self._is_bare else len(self._fmt.begin))
        return True

    def _in_call(self, found: list[str | Call], at_end: bool) -> bool:
        if self._head is None:
            brackets = [i for c in "{[" if (i := self._json_start(c)) >= 0]
            too_long = len(self._text) - self._json_from > _MAX_HEAD + 1
            if not brackets and not at_end and not too_long:
                return False
            if not brackets or min(brackets) - self._json_from > _MAX_HEAD:
                return self._no_call(found)
            self._head = self._text[self._json_from : min(brackets)]
            self._json_from = min(brackets)
            if self._head.strip(_BLANK) and not _NAME.fullmatch(self._head):
                return self._no_call(found)
        size = self._scan.end(self._text, self._json_from)
        if size is None:
            return self._no_call(found) if at_end else False
        calls = self._calls(self._head, self._text[self._json_from : size])
        end = self._after(size, at_end)
        if end is None:
            return False
        if not calls or end < 0:
            return self._no_call(found)
        self._text, self._begun, self._after_call = self._text[end:], False, True
        self._may_be_bare = self._is_bare
        found += calls
        return True

    def _json_start(self, bracket: str) -> int:
        """Where the JSON begins; the brackets of [ARGS] and [CALL_ID] are not JSON."""
        if bracket == "{":
            return self._text.find("{", self._json_from)
        found = _LIST.search(self._text, self._json_from)
        return found.start() if found else -1

    def _after(self, size: int, at_end: bool) -> int | None:
        """Where the call that ends at ``size`` ends with its marker; None if more text is needed,
        -1 if something else follows."""
        if self._is_bare or not self._fmt.end:
            return size
        rest = self._text[size:].lstrip(_BLANK)
        if rest.startswith(self._fmt.end):
            return len(self._text) - len(rest) + len(self._fmt.end)
        if self._fmt.end.startswith(rest):  # also the end of an answer that was cut here
            return len(self._text) if at_end else None
        return -1

    def _calls(self, head: str, text: str) -> list[Call]:
        """The calls that a JSON value describes; empty if it is something else."""
        try:
            value = _parsed(text)
            if head.strip(_BLANK):
                match = _NAME.fullmatch(head)
                value = {"name": match[1] if match else "", "arguments": value}
            items = value if isinstance(value, list) else [value]
            return [self._call(item) for item in items]
        except (ValueError, RecursionError):
            return []

    def _call(self, item: Any) -> Call:
        if isinstance(item, dict) and isinstance(item.get("function"), dict):
            item = item["function"]
        name = item.get("name") if isinstance(item, dict) else None
        if not isinstance(name, str) or name not in self._names:
            raise ValueError("not a call")
        arguments: Any = next((item[k] for k in ("arguments", "parameters") if k in item), {})
        if isinstance(arguments, str):
            arguments = _parsed(arguments)
        if not isinstance(arguments, dict):
            raise ValueError("arguments are an object")
        written = json.dumps(arguments, ensure_ascii=False)
        try:
            written.encode()
        except UnicodeEncodeError:  # half of a surrogate pair
            written = json.dumps(arguments)
        return Call(_new_id(self._fmt), name, written)


class _Scan:
    """Finds the end of a JSON object or list in a growing text, in linear time."""

    def __init__(self) -> None:
        self._at, self._depth = 0, 0
        self._in_string = self._escaped = False

    def end(self, text: str, start: int) -> int | None:
        """The index after the value; None if the text ends before.

        Args:
          text: the same as before, perhaps with more at its end.
          start: of the value, the same as before.
        """
        for i in range(start + self._at, len(text)):
            c = text[i]
            self._at += 1
            if self._in_string:
                if self._escaped:
                    self._escaped = False
                elif c == "\\":
                    self._escaped = True
                elif c == '"':
                    self._in_string = False
            elif c == '"':
                self._in_string = True
            elif c in "{[":
                self._depth += 1
            elif c in "}]":
                self._depth -= 1
                if self._depth == 0:
                    self._at -= 1  # the end is found again
                    self._depth = 1
                    return i + 1
        return None


def _parsed(text: str) -> Any:
    """A JSON value; numbers that are too large for float64 become the largest one."""
    limit = sys.float_info.max
    number = lambda digits: max(-limit, min(limit, float(digits)))
    return json.loads(text, parse_float=number, parse_constant=_refuse)


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is not JSON")


def _new_id(fmt: ToolFormat) -> str:
    if fmt.name == "mistral":
        return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(9))
    return f"call_{secrets.token_hex(12)}"
