"""The process that renders chat templates, with limits on time, memory and output.

A downloaded template is untrusted code. Jinja's sandbox keeps it from files and from Python's
internals, but does not limit loops or the size of texts, and a long operation in C cannot be
interrupted from its own process. The operating system enforces the limits on this process.

``chat_template`` starts it. Each request is a line of JSON on standard input: ``template``,
``variables`` (null: only compile the template), ``names`` of control tokens, and the ``mark`` that
is put inside them and at the end of each answer. Each answer is a line of JSON on standard output:
``error``, ``refused``, or the fields of ``chat_template._Rendering``. It does not import llama_jax
or jax, so it starts in 0.1 s.
"""

import datetime
import functools
import hashlib
import json
import math
import re
import resource
import sys
import traceback
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

SECONDS = 2
"""CPU time of a rendering; templates of published models need a few milliseconds."""
PROMPT_SECONDS = 10
"""CPU time of all renderings for a prompt, two for each answer in it."""
BYTES = 1 << 30
"""Memory of the process."""
CHARACTERS = 16 << 20
"""Longest output."""
REMEMBERED = 16 << 20
"""Characters of answers that are remembered, see :class:`Turns`."""
OPEN, CLOSE = "\udffe", "\udffd"
"""Lone surrogates around the text of a ``{% generation %}`` block in the output."""

Rendered = Callable[[int, bool], tuple[str, list[tuple[int, int]]]]
# Roles that templates insert into the name of a control token ("<|" + role + "|>").
ROLES = {"system", "developer", "user", "assistant", "model", "tool", "function", "ipython"}


class Refused(Exception):
    """The template's own `raise_exception(message)`."""


class Generation(jinja2.ext.Extension):
    """``{% generation %} ... {% endgeneration %}`` around the text on which a model is trained."""

    tags = {"generation"}  # noqa: RUF012 (Jinja requires this name and type)

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: Any) -> str:
        return OPEN + caller() + CLOSE


def _refuse(message: Any) -> None:
    raise Refused(str(message))


_dates: list[str] = []
"""What templates got from `strftime_now`."""


def _strftime_now(form: str) -> str:
    _dates.append(datetime.datetime.now().strftime(form))
    return _dates[-1]


def _unescaped(text: str, mark: str) -> str:
    """Restore marks that JSON or Python's ``repr`` wrote as an escape sequence."""
    escaped = rf"(?<!\\)((?:\\\\)*)\\u{ord(mark):04x}"
    return re.sub(escaped, lambda m: m[1] + mark, text)


@functools.lru_cache(maxsize=8)
def _compiled(source: str, mark: str) -> tuple[jinja2.Template, frozenset[str]]:
    """The template, compiled as transformers does, and the words that occur in it."""

    def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        # Jinja's own filter also escapes characters of HTML.
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
    """Puts a mark inside names of control tokens in the text of messages.

    This includes text from which a template could produce a name: a name in other letter case, with
    white space inside, or split between this string and the text around it. Other strings do
    not change. ``Tokenizer.encode_marked`` removes the marks.
    """

    def __init__(self, names: tuple[str, ...], mark: str, words: frozenset[str]):
        class Text(str):
            """A text of a message, whose parts are marked again: they can form a new name, as
            "<|im_<think>end|>" without "<think>" does."""

            def __repr__(self) -> str:  # if a template prints a list or dict
                return _unescaped(super().__repr__(), mark)

            def __str__(self) -> str:  # called by the filter `replace`
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
        """A copy of nested lists and dicts with all strings marked."""
        if isinstance(value, str):
            return self._text(self._marked_text(value))
        if isinstance(value, dict):
            return {self.marked(k): self.marked(v) for k, v in value.items()}
        return [self.marked(v) for v in value] if isinstance(value, list) else value

    def ended(self, value: Any) -> Any:
        """A copy of a marked value with a mark at the end of each text in it."""
        if isinstance(value, dict):  # templates compare these three, or check their length
            names = ("role", "type", "id")
            return {k: v if k in names else self.ended(v) for k, v in value.items()}
        if isinstance(value, list):
            return [self.ended(v) for v in value]
        if not isinstance(value, str) or str.replace(value, self._mark, "") in self._words:
            return value
        end = len(value.rstrip())  # not after white space, because templates strip it
        return self._text(value[:end] + self._mark + value[end:]) if end else value

    def _marked_text(self, text: str) -> str:
        mark = self._mark
        text = self._names.sub(lambda m: m[0][0] + mark + m[0][1:], text)
        folded = _fold(text)
        if self._folded_names.search(folded):
            return mark.join(["", *text, ""])
        lengths = range(1, min(len(folded), self._longest) + 1)
        inside = folded and text not in self._words and any(folded in n for n in self._folded)
        # Not in white space at the ends, because templates strip it.
        before, after = len(text) - len(text.lstrip()), len(text.rstrip())
        if inside or any(folded[-k:] in self._heads for k in lengths):
            text = text[:after] + mark + text[after:]
        if any(folded[:k] in self._tails for k in lengths):
            text = text[:before] + mark + text[before:]
        return text


def _any_of(names: Iterable[str]) -> re.Pattern:
    """A pattern that matches any of the names, the longest first; nothing if there are none."""
    longest_first = sorted(names, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


def _fold(text: str) -> str:
    """The text without differences that templates may remove: white space and letter case."""
    return "".join(text.split()).upper().lower()


@functools.lru_cache(maxsize=8)
def _marker(names: tuple[str, ...], mark: str, words: frozenset[str]) -> Marker:
    return Marker(names, mark, words)


def _render(template: jinja2.Template, variables: dict[str, Any], end: float) -> str:
    _limit_time(end)
    parts, length = [], 0
    for part in template.generate(variables):
        parts.append(part)
        length += len(part)
        if length > CHARACTERS:
            raise ValueError(f"it writes more than {CHARACTERS:,} characters")
    return "".join(parts)


def _without_blocks(text: str) -> tuple[str, list[tuple[int, int]]]:
    """The text without the marks of ``{% generation %}`` blocks, and where these blocks are."""
    parts, blocks, length = [], [], 0
    for i, part in enumerate(re.split(f"{OPEN}([^{OPEN}{CLOSE}]*){CLOSE}", text)):
        if i % 2 and part:
            blocks.append((length, length + len(part)))
        parts.append(part)
        length += len(part)
    return "".join(parts), blocks


class Turn(NamedTuple):
    """An answer as the last message."""

    start: int
    """Characters of its prompt."""
    prompt: bytes
    """Digest of its prompt."""
    text: str
    """What the template writes after the prompt."""


class Turns:
    """Remembers turns, because each prompt of a chat has the answers of the prompt before.

    Finding a turn takes two renderings of all messages up to it. Without a memory, the prompts of a
    conversation with hundreds of answers, as agents have, would take seconds each.
    """

    def __init__(self) -> None:
        self._turns: OrderedDict[bytes, Turn | str] = OrderedDict()  # the last used at the end
        self._size = 0

    def get(self, key: bytes, rendered: Rendered, k: int) -> Turn | str:
        """The turn of answer ``k``, or a text that says why there is none.

        Args:
          key: of all that the renderings depend on.
          rendered: renders.
          k: index of the answer among the messages.
        """
        turn = self._turns.pop(key, None)
        if turn is None:
            turn = _turn(rendered, k)
            self._size += _size(turn)
        self._turns[key] = turn
        while self._size > REMEMBERED:
            self._size -= _size(self._turns.popitem(last=False)[1])
        return turn


_remembered = Turns()


def _size(turn: Turn | str) -> int:
    return 500 + len(turn if isinstance(turn, str) else turn.text)


def _turn(rendered: Rendered, k: int) -> Turn | str:
    """The turn of answer ``k``, or a text that says why there is none."""
    try:
        prompt, _ = rendered(k, True)
        turn, _ = rendered(k + 1, False)
    except MemoryError:
        raise
    except Exception as e:
        return f"the template fails for the messages up to it ({_one_line(str(e))})"
    if not turn.startswith(prompt):
        return "its turn does not start with the prompt that the template writes for it"
    size = len(prompt)
    return Turn(size, _digests(prompt, [size])[size], turn[size:])


def _digests(text: str, sizes: Iterable[int]) -> dict[int, bytes]:
    """Digests of the first ``size`` characters of a text, for each size."""
    digest, at, found = hashlib.blake2b(digest_size=16), 0, {}
    for size in sorted({*sizes}):
        digest.update(text[at:size].encode("utf-8", "surrogatepass"))
        at, found[size] = size, digest.digest()
    return found


def _places(turns: list[Turn | str], text: str) -> list[Any]:
    """Of each answer: where its prompt ends in the text, and what the template writes after this
    prompt if the answer is the last message; or a text that says why there is no such place.

    Args:
      turns: of the answers.
      text: the output for all messages.
    """
    digests = _digests(text, [turn.start for turn in turns if isinstance(turn, Turn)])
    found: list[Any] = []
    for turn in turns:
        if isinstance(turn, str):
            found.append(turn)
        elif digests[turn.start] != turn.prompt:
            found.append("the text before it changes when messages follow")
        else:
            found.append([turn.start, turn.text])
    return found


def _keys(request: dict[str, Any]) -> Iterator[bytes]:
    """For each message, a key of all that the output for the messages up to it depends on."""
    others = {k: v for k, v in request["variables"].items() if k != "messages"}
    value: Any = [request["template"], request["names"], request["mark"], others, sorted({*_dates})]
    key = b""
    for message in request["variables"]["messages"]:
        content = json.dumps([value, message]).encode()
        key, value = hashlib.blake2b(key + content, digest_size=32).digest(), None
        yield key


def _has_prompt(rendered: Rendered, answers: list[int]) -> bool:
    """Whether the template writes the start of an answer only on request."""
    if not answers:
        return False
    try:
        return rendered(answers[0], True) != rendered(answers[0], False)
    except MemoryError:
        raise
    except Exception:
        return False


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Answer one request; errors of a template in one line."""
    try:
        template, words = _compiled(request["template"], request["mark"])
        if request["variables"] is None:
            return {"text": ""}
        marker = _marker(tuple(request["names"]), request["mark"], words)
        variables = request["variables"] | {
            name: marker.marked(request["variables"].get(name)) for name in ("messages", "tools")
        }
        messages = variables["messages"]
        roles = [message.get("role") for message in request["variables"]["messages"]]
        answers = [k for k, role in enumerate(roles) if role == "assistant"]
        for k in answers:
            messages[k] = marker.ended(messages[k])

        end = _cpu_time() + PROMPT_SECONDS if variables["add_generation_prompt"] else math.inf

        @functools.lru_cache(maxsize=4)  # not all: their length is quadratic in the answers
        def rendered(count: int, prompt: bool) -> tuple[str, list[tuple[int, int]]]:
            some = {"messages": messages[:count], "add_generation_prompt": prompt}
            return _without_blocks(_render(template, variables | some, end))

        _dates.clear()
        text, blocks = rendered(len(messages), variables["add_generation_prompt"])
        if variables["add_generation_prompt"]:
            keys, turns = list(_keys(request)), []
            for k in answers:
                # Before the system ends this process, and with it the memory.
                if _cpu_time() > end - PROMPT_SECONDS / 5:
                    raise ValueError(
                        f"it takes too long ({PROMPT_SECONDS} s for all answers of a prompt); try "
                        "again to continue from there"
                    )
                turns.append(_remembered.get(keys[k], rendered, k))
        else:  # the examples of training differ
            turns = [_turn(rendered, k) for k in answers]
        places, has_prompt = _places(turns, text), _has_prompt(rendered, answers)
        return {"text": text, "blocks": blocks, "turns": places, "has_prompt": has_prompt}
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
    return text.encode(errors="backslashreplace").decode()  # lone surrogates cannot be printed


def _cpu_time() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def _limit_time(end: float = math.inf) -> None:
    """Limit the CPU time to that of one rendering, and at most to ``end``."""
    _limit(resource.RLIMIT_CPU, int(min(_cpu_time() + SECONDS, end)))


def _limit(resource_kind: int, value: int) -> None:
    """Set a soft limit, at most the hard limit of the system."""
    hard = resource.getrlimit(resource_kind)[1]
    resource.setrlimit(
        resource_kind, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard)
    )


def main() -> None:
    """Answer requests until standard input ends."""
    _limit(resource.RLIMIT_AS, BYTES)
    _limit(resource.RLIMIT_CORE, 0)
    for line in sys.stdin.buffer:
        _limit_time()
        sys.stdout.write(json.dumps(answer(json.loads(line))) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
