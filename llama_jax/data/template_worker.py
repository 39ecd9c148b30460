"""Renders chat templates in a process of its own, with limits on time, memory and output.

A template comes with a downloaded model: a program of a stranger. Jinja's sandbox keeps it from
files and from Python's internals, but not from loops or huge texts, and one operation that runs in
C cannot be stopped from the same process. Here the operating system ends the process instead.

In, on standard input, a line of JSON for each request: ``template``, ``variables`` (none: only
compile it), ``names`` of control ids and the ``mark`` that breaks them. Out, a line of JSON:
``text``, ``error`` or ``refused``. ``chat_template`` starts it. It imports nothing of
llama_jax and no jax: it starts in a tenth of a second.
"""

import datetime
import functools
import json
import re
import resource
import sys
import traceback
from collections.abc import Iterable
from typing import Any

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

SECONDS = 2
"""CPU time of a rendering; one of a published model takes a few milliseconds"""
BYTES = 1 << 30
"""memory of the process"""
CHARACTERS = 16 << 20
"""longest output"""

# Roles that templates write between the marks of a control name ("<|" + role + "|>").
ROLES = {"system", "developer", "user", "assistant", "model", "tool", "function", "ipython"}


class Refused(Exception):
    """The template's own `raise_exception(message)`."""


class Generation(jinja2.ext.Extension):
    """``{% generation %} ... {% endgeneration %}``: what the assistant says, rendered as it is."""

    tags = {"generation"}  # noqa: RUF012 (the name and type that Jinja asks for)

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: Any) -> str:
        return caller()


def _refuse(message: Any) -> None:
    raise Refused(str(message))


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


def _unescaped(text: str, mark: str) -> str:
    """The mark as it was; JSON and Python's `repr` write it out, as they double a backslash."""
    escaped = rf"(?<!\\)((?:\\\\)*)\\u{ord(mark):04x}"
    return re.sub(escaped, lambda m: m[1] + mark, text)


@functools.lru_cache(maxsize=8)
def _compiled(source: str, mark: str) -> tuple[jinja2.Template, frozenset[str]]:
    """The template as transformers makes it, and the words that it knows."""

    def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        # Jinja's own escapes HTML's characters.
        text = json.dumps(
            x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
        )
        return _unescaped(text, mark) if ensure_ascii else text

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = _strftime_now
    tree = environment.parse(source)
    words = {node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)}
    words |= {node.attr for node in tree.find_all(nodes.Getattr)}
    return environment.from_string(source), frozenset(words | ROLES)


class Marker:
    """Breaks control ids' names in the text of messages with a mark.

    The mark goes inside each name, and where a name could come of the text: it is in other letter
    case, has white space inside, or is cut between this string and its neighbours.
    ``Tokenizer.encode_marked`` takes the marks out again. Strings without
    any of this stay as they are.
    """

    def __init__(self, names: tuple[str, ...], mark: str, words: frozenset[str]):
        class Text(str):
            """A text of a message; parts of it are marked again, since they may now form a name:
            "<think>" taken out of "<|im_<think>end|>"."""

            def __repr__(self) -> str:  # of a list or dict that a template prints
                return _unescaped(super().__repr__(), mark)

            def __str__(self) -> str:  # the filter `replace` calls str(x).replace
                return self

            def replace(self, *args: Any) -> str:
                return marked(super().replace(*args))

            def split(self, *args: Any, **named: Any) -> list[str]:
                return marked(super().split(*args, **named))

            def rsplit(self, *args: Any, **named: Any) -> list[str]:
                return marked(super().rsplit(*args, **named))

            def partition(self, at: str) -> Any:
                return tuple(marked(list(super().partition(at))))

            def rpartition(self, at: str) -> Any:
                return tuple(marked(list(super().rpartition(at))))

        marked = self.marked

        self._text, self._mark, self._words = Text, mark, words
        self._folded = {_fold(n) for n in names} - {""}
        self._names, self._folded_names = _any_of(names), _any_of(self._folded)
        self._heads = {n[:k] for n in self._folded for k in range(1, len(n))}
        self._tails = {n[k:] for n in self._folded for k in range(1, len(n))}
        self._longest = max(map(len, self._folded), default=0)

    def marked(self, value: Any) -> Any:
        """The same tree of lists and dicts with each string marked."""
        if isinstance(value, str):
            return self._text(self._broken(value))
        if isinstance(value, dict):
            return {self.marked(k): self.marked(v) for k, v in value.items()}
        return [self.marked(v) for v in value] if isinstance(value, list) else value

    def _broken(self, text: str) -> str:
        mark = self._mark
        text = self._names.sub(lambda m: m[0][0] + mark + m[0][1:], text)
        folded = _fold(text)
        if self._folded_names.search(folded):
            return mark.join(["", *text, ""])
        lengths = range(1, min(len(folded), self._longest) + 1)
        inside = folded and text not in self._words and any(folded in n for n in self._folded)
        # Inside the white space at the ends, which templates strip.
        before, after = len(text) - len(text.lstrip()), len(text.rstrip())
        if inside or any(folded[-k:] in self._heads for k in lengths):
            text = text[:after] + mark + text[after:]
        if any(folded[:k] in self._tails for k in lengths):
            text = text[:before] + mark + text[before:]
        return text


def _any_of(names: Iterable[str]) -> re.Pattern:
    """A pattern of names, the longest first; one that matches nothing if there are none."""
    longest_first = sorted(names, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


def _fold(text: str) -> str:
    """Without what templates may change: white space and letter case."""
    return "".join(text.split()).upper().lower()


@functools.lru_cache(maxsize=8)
def _marker(names: tuple[str, ...], mark: str, words: frozenset[str]) -> Marker:
    return Marker(names, mark, words)


def answer(request: dict[str, Any]) -> dict[str, str]:
    """One request; errors of a template in one line."""
    try:
        template, words = _compiled(request["template"], request["mark"])
        if request["variables"] is None:
            return {"text": ""}
        marker = _marker(tuple(request["names"]), request["mark"], words)
        variables = request["variables"] | {
            name: marker.marked(request["variables"].get(name)) for name in ("messages", "tools")
        }
        parts, length = [], 0
        for part in template.generate(variables):
            parts.append(part)
            length += len(part)
            if length > CHARACTERS:
                return {"error": f"it writes more than {CHARACTERS:,} characters"}
        return {"text": "".join(parts)}
    except Refused as e:
        return {"refused": _one_line(str(e))}
    except MemoryError:
        return {"error": f"it takes more than {BYTES >> 20:,} MiB of memory"}
    except RecursionError:
        return {"error": "it is nested too deeply"}
    except Exception as e:  # a template can raise anything
        line = getattr(e, "lineno", None)
        for frame, number in traceback.walk_tb(e.__traceback__):
            if frame.f_code.co_filename == "<template>":
                line = number
        place = "" if line is None else f"line {line}: "
        return {"error": f"{place}{_one_line(str(e)) or type(e).__name__}"}


def _one_line(text: str) -> str:
    text = " ".join(text.split())[:300]
    return text.encode(errors="backslashreplace").decode()  # half a character cannot be printed


def _limit(resource_kind: int, value: int) -> None:
    """Set a soft limit, below the one that the system has set."""
    hard = resource.getrlimit(resource_kind)[1]
    resource.setrlimit(
        resource_kind, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard)
    )


def main() -> None:
    """Answer requests until standard input ends."""
    _limit(resource.RLIMIT_AS, BYTES)
    _limit(resource.RLIMIT_CORE, 0)
    for line in sys.stdin.buffer:
        used = resource.getrusage(resource.RUSAGE_SELF)
        _limit(resource.RLIMIT_CPU, int(used.ru_utime + used.ru_stime) + SECONDS)
        sys.stdout.write(json.dumps(answer(json.loads(line))) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
