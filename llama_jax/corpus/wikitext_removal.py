"""Removes from wikitext, in linear time, what never becomes text: comments, references, templates,
tables. Text that MediaWiki shows as it is (``<nowiki>``, code, formulas) is set aside first.
"""

import html
import re
from collections import Counter
from dataclasses import dataclass, field

HOLE = "\x06"
"""Stands where something was removed, so that spaces and brackets around it can be removed too."""

_REMOVED = (
    "ref|references|gallery|imagemap|timeline|score|graph|hiero|templatedata|templatestyles|"
    "inputbox|categorytree|section|mapframe|maplink|indicator|includeonly|style|script|chart"
)
_VERBATIM = "nowiki|pre|source|syntaxhighlight|math|chem|ce"
_ELEMENT = re.compile(rf"<!--|<({_REMOVED}|{_VERBATIM})(?=[\s/>])([^<>]*)>", re.IGNORECASE)
_BRACES = re.compile(
    r"\{{2,}|\}{2,}|^[ \t:*#;]*\{\||^[ \t]*\|\}+|<table\b[^<>]*>|</table\s*>",
    re.MULTILINE | re.IGNORECASE,
)
# How far something reaches that is never closed: a template to the end of its parameters, a table
# to the next heading.
_UNCLOSED = {
    "{": re.compile(r"\{\{[^{}\n]*\}|[^\n]*(?:\n[ \t]*[|!}][^\n]*)*"),
    "|": re.compile(r".*?(?=\n=|\Z)", re.DOTALL),
    "<": re.compile(r".*?(?=\n=|\Z)", re.DOTALL),
}
_SET_ASIDE = re.compile("\x02(\\d+)\x03")
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f]")


@dataclass
class Verbatim:
    """Texts that were set aside; each is represented by a short string in the wikitext."""

    texts: list[str] = field(default_factory=list)

    def set_aside(self, text: str) -> str:
        self.texts.append(text)
        return f"\x02{len(self.texts) - 1}\x03"

    def restore(self, text: str) -> str:
        return _SET_ASIDE.sub(lambda match: self.texts[int(match[1])], text)


def remove_markup(wikitext: str) -> tuple[str, Verbatim]:
    """Removes comments, references, templates and tables.

    Returns:
        The wikitext with a `HOLE` for each template, and the texts to be restored at the end.
    """
    verbatim = Verbatim()
    text = _remove_elements(_CONTROL.sub("", wikitext), verbatim)
    return re.sub(f"{HOLE}{{2,}}", HOLE, _remove_braces(text)), verbatim


def _remove_elements(text: str, verbatim: Verbatim) -> str:
    kept, position = [], 0
    unclosed: set[str] = set()  # an element without an end tag is searched for once
    while match := _ELEMENT.search(text, position):
        kept.append(text[position : match.start()])
        position = match.end()
        if match[0] == "<!--":
            end = text.find("-->", position)
            position = len(text) if end < 0 else end + 3
            if kept[-1].endswith("\n") and text[position : position + 1] == "\n":
                position += 1  # a comment alone on its line is removed with the line
            continue
        name, attributes = match[1].lower(), match[2]
        if attributes.endswith("/"):
            kept.append(HOLE)
            continue
        end_tag = None
        if name not in unclosed:
            end_tag = re.compile(rf"</{name}\s*>", re.IGNORECASE).search(text, position)
        if end_tag is None:
            unclosed.add(name)
            continue
        content, position = text[position : end_tag.start()], end_tag.end()
        if name in _VERBATIM.split("|"):
            kept.append(_show(name, attributes, content, verbatim))
        else:
            kept.append(HOLE)
    kept.append(text[position:])
    return "".join(kept)


def _show(name: str, attributes: str, content: str, verbatim: Verbatim) -> str:
    """What a reader sees of an element whose content is not wikitext."""
    if name in ("math", "chem", "ce"):
        formula = " ".join(content.split())
        if name != "math":
            formula = rf"\ce{{{formula}}}"
        return verbatim.set_aside(f"${formula}$")
    if name == "nowiki":
        return verbatim.set_aside(html.unescape(content)) if content else ""
    if name == "pre":
        content = html.unescape(re.sub(r"</?nowiki\s*/?>", "", content))
    code = verbatim.set_aside(content.strip("\n").rstrip())
    inline = re.search(r"\binline\b", attributes) and "\n" not in content
    return code if inline else f"\n\n{code}\n\n"


def _remove_braces(text: str) -> str:
    """Removes templates ``{{ }}`` and tables ``{| |}``, nested in any way."""
    constructs = _Constructs()
    for match in _BRACES.finditer(text):
        token = match[0]
        if token.startswith("{{"):
            constructs.open("{", match.start(), len(token))
        elif token.endswith("{|"):
            constructs.open("|", match.end() - 2)
        elif token.startswith("</"):
            constructs.close("<", match.start(), match.end())
        elif token.startswith("<"):
            constructs.open("<", match.start())
        else:
            _close_braces(constructs, match)
    position = 0
    for kind, start, _ in constructs.stack:
        if start >= position and (rest := _UNCLOSED[kind].match(text, start)):
            position = max(rest.end(), start + 2)
            constructs.removed.append((start, position))
    kept, position = [], 0
    for start, end in sorted(constructs.removed):
        if start >= position:
            kept += [text[position:start], HOLE]
        position = max(position, end)
    return "".join([*kept, text[position:]])


def _close_braces(constructs: "_Constructs", match: re.Match[str]) -> None:
    """Closes what a run of ``}``, or a line that starts with ``|}``, closes."""
    braces = len(match[0]) - len(match[0].rstrip("}"))
    if "|" in match[0] and (braces == 1 or constructs.innermost() == "|"):
        braces -= 1
        constructs.close("|", match.end() - braces - 2, match.end() - braces)
    while braces >= 2:
        start = match.end() - braces
        braces -= constructs.close("{", start, start + 2, may_close_three=braces >= 3)


@dataclass
class _Constructs:
    """Open templates and tables, and the ranges of the text to be removed."""

    stack: list[tuple[str, int, int]] = field(default_factory=list)  # kind, start, open braces
    removed: list[tuple[int, int]] = field(default_factory=list)
    is_open: Counter[str] = field(default_factory=Counter)  # how many of each kind

    def open(self, kind: str, start: int, braces: int = 2) -> None:
        self.stack.append((kind, start, braces))
        self.is_open[kind] += 1

    def innermost(self) -> str | None:
        return self.stack[-1][0] if self.stack else None

    def close(self, kind: str, start: int, end: int, may_close_three: bool = False) -> int:
        """Closes the innermost construct of a kind and returns how many braces that takes.

        What was opened inside it and is still open ends with it. Without an open construct, only
        the closing token itself is removed.
        """
        if not self.is_open[kind]:
            self.removed.append((start, end))
            return 2
        innermost = ""
        while innermost != kind:
            innermost, first, braces = self.stack.pop()
            self.is_open[innermost] -= 1
        closed = 3 if braces >= 3 and may_close_three else 2
        while self.removed and self.removed[-1][0] >= first:
            self.removed.pop()
        self.removed.append((first, end + closed - 2))
        if braces - closed >= 2:
            self.open(kind, first, braces - closed)
        return closed
