r"""TeX source as text: tokens, and removal of comments."""

import re
from collections.abc import Iterator

_NAMES = r"verbatim|Verbatim|BVerbatim|LVerbatim|alltt|lstlisting|minted|filecontents"
_VERBATIM = (
    rf"begin\s*\{{(?P<env>(?:{_NAMES})\*?)\}}"
    r"|(?:verb\*?|lstinline|mintinline\{\w*\})(?P<bar>[^A-Za-z\s\\{}*\[])[^\n]*?(?P=bar)"
)
_VERBATIM_START = re.compile(rf"\\(?:{_VERBATIM})")
TOKEN = re.compile(r"\\(?:[A-Za-z@]+|.|\Z)|#+\d?|[{}\[\]]|[^\\#{}\[\]]+", re.DOTALL)
_SCAN = re.compile(
    r"\\(?:begin\s*\{(?P<comment>comment)\}|(?P<iffalse>iffalse)(?![A-Za-z@])"
    rf"|(?P<fi>fi)(?![A-Za-z@])|{_VERBATIM}|(?:url|path|href|nolinkurl)\s*\{{[^{{}}\n]*\}})|%"
)
# What counts in text that TeX skips: a command, or a comment.
_SKIPPED = re.compile(r"%[^\n]*|\\(?:([A-Za-z@]+)|.)", re.DOTALL)
_NEW_CONDITIONAL = re.compile(r"\\newif\s*\\(if[A-Za-z@]+)")
_CONDITIONALS = """
if ifcat ifnum ifdim ifodd ifvmode ifhmode ifmmode ifinner ifvoid ifhbox ifvbox ifx ifeof iftrue
iffalse ifcase ifdefined ifcsname iffontchar ifincsname ifpdf ifxetex ifluatex
"""
_CONTROL_WORD_END = re.compile(r"\\[A-Za-z@]+\Z")
_BLANKS = re.compile(r"[^\S\n]*")


class _Ends:
    """Finds where environments and conditionals of a text end, in linear time.

    A search that fails is not repeated from a later position.
    """

    def __init__(self, text: str):
        self.text = text
        self.unclosed: set[str] = set()
        self.conditionals: dict[int, list[re.Match[str]]] | None = None
        self.names: set[str] = set()  # of conditionals

    def environment(self, name: str, position: int) -> int | None:
        """The end of an environment whose content starts at ``position``."""
        if name in self.unclosed:
            return None
        end_tag = re.compile(rf"\\end\s*\{{{re.escape(name)}\}}")
        if found := end_tag.search(self.text, position):
            return found.end()
        self.unclosed.add(name)
        return None

    def conditional(self, start: int) -> list[re.Match[str]]:
        """``\\else``, if there is one, and ``\\fi`` of the conditional at ``start``; else []."""
        if self.conditionals is not None:
            return self.conditionals.get(start, [])
        self.names = self.names or {*_CONDITIONALS.split(), *_NEW_CONDITIONAL.findall(self.text)}
        opened: list[tuple[int, list[re.Match[str]]]] = []
        closed: dict[int, list[re.Match[str]]] = {}
        for found in _SKIPPED.finditer(self.text, start):
            if found[1] in self.names:
                opened.append((found.start(), []))
            elif found[1] == "else":
                opened[-1][1].append(found)
            elif found[1] == "fi":
                at, ends = opened.pop()
                closed[at] = [*ends[:1], found]
                if not opened:
                    return closed[at]
        self.conditionals = closed  # the outermost one is never closed
        return []


def remove_comments(text: str) -> str:
    """Removes comments as TeX does; ``%`` in verbatim text and URLs and ``\\%`` stay.

    A line that is only a comment disappears. A comment directly after text also removes the line
    end and the blanks of the next line; after a blank, the line end stays. What ``\\iffalse`` skips
    and the environment ``comment`` are comments too.
    """
    if "%" not in text and r"\begin{comment}" not in text and r"\iffalse" not in text:
        return text
    out: list[str] = []
    start = position = 0  # of what is not yet in ``out``, and of the search
    joined = -1  # where the last line that was joined to the one before starts
    ends, removed_fi = _Ends(text), set()
    while found := _SCAN.search(text, position):
        at = found.start()
        if _is_escaped(text, at):
            position = at + 1
            continue
        position = found.end()
        if found[0] == "%":
            line_end = text.find("\n", at)
            line_end = len(text) if line_end < 0 else line_end
            if at != joined and _at_line_start(text, at, start):
                out.append(text[start:at].rstrip(" \t"))
                start = line_end + 1
            elif text[at - 1].isspace() and at > start:
                out.append(text[start:at].rstrip(" \t"))
                start = line_end
            else:
                out.append(text[start:at])
                start = joined = _after_joined_line(text, line_end, out)
            position = start
            continue
        if found["env"]:
            position = ends.environment(found["env"], position) or position
            continue
        end = None
        if found["comment"]:
            end = ends.environment("comment", position)
        elif found["iffalse"] and (closing := ends.conditional(at)):
            end = closing[0].end()
            removed_fi |= {closing[-1].start()} if len(closing) > 1 else set()
        elif found["fi"] and at in removed_fi:
            end = position
        if end is not None:
            out.append(text[start:at])
            start = position = end
            if _at_line_start(text, at, 0) and text[position : position + 1] == "\n":
                start = position = position + 1
    out.append(text[start:])
    return "".join(out)


def _is_escaped(text: str, at: int) -> bool:
    """Whether an odd number of backslashes is before a position."""
    start = at
    while start and text[start - 1] == "\\":
        start -= 1
    return (at - start) % 2 == 1


def _at_line_start(text: str, at: int, start: int) -> bool:
    """Whether only blanks are between a line start, which is not before ``start``, and ``at``."""
    while at and text[at - 1] != "\n" and text[at - 1].isspace():
        at -= 1
    return at >= start and (at == 0 or text[at - 1] == "\n")


def _after_joined_line(text: str, line_end: int, out: list[str]) -> int:
    """Where the text goes on after ``%`` at a line end; adds a space if a command needs one."""
    match = _BLANKS.match(text, line_end + 1)
    following = match.end() if match else line_end
    if text[following : following + 1] in ("", "\n"):  # a blank line ends the paragraph
        return line_end
    if text[following].isalpha() and out and _CONTROL_WORD_END.search(out[-1]):
        out.append(" ")
    return following


def split_verbatim(text: str) -> Iterator[tuple[str, bool]]:
    """The pieces of a text without comments, in order, and whether each is verbatim text."""
    ends, start, position = _Ends(text), 0, 0
    while found := _VERBATIM_START.search(text, position):
        position = found.end()
        if found["env"]:
            end = ends.environment(found["env"], position)
            if end is None:
                continue
            position = end
        yield text[start : found.start()], False
        yield text[found.start() : position], True
        start = position
    yield text[start:], False


def tokens(text: str) -> list[str]:
    """Commands, braces, brackets, parameters, verbatim text, and text between them."""
    out: list[str] = []
    for piece, is_verbatim in split_verbatim(text):
        out += [piece] if is_verbatim else TOKEN.findall(piece)
    return out
