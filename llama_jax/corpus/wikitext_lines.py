"""The lines of a page, without inline markup, to sections: headings, paragraphs, lists."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from llama_jax.corpus.wikitext_removal import HOLE

_HEADING = re.compile(r"(={1,6})(.+?)(={1,6})")
_ITEM = re.compile(r"[*#:;]+")


def sections(text: str, removed: frozenset[str]) -> Iterator[str]:
    """Yields headings and bodies of sections that have text.

    Args:
        text: Wikitext of lines: headings, list items, paragraphs.
        removed: Lower-case headings of sections that are left out.
    """
    yield from _without_empty_sections(_kept_sections(_split_sections(text), removed))


# Applied if the line has the first string. A match starts where a run of blanks does: from each of
# its characters, the search would take quadratic time.
_AROUND_HOLES = [
    ("(", re.compile(rf"(?<![ \t])[ \t]*\([\s,;:]*{HOLE}[\s,;:{HOLE}]*\)"), ""),
    ("[", re.compile(rf"(?<![ \t])[ \t]*\[[\s,;:]*{HOLE}[\s,;:{HOLE}]*\]"), ""),
    ("(", re.compile(rf"\([ \t]*{HOLE}[ \t,;:{HOLE}]*"), "("),
    (")", re.compile(rf"(?<![ \t,;{HOLE}])[ \t,;{HOLE}]*{HOLE}[ \t]*\)"), ")"),
    (HOLE, re.compile(rf"^([*#:; \t]*){HOLE}[ \t,.;:{HOLE}]*"), r"\1"),
    (HOLE, re.compile(rf"(?<![ \t{HOLE}])[ \t]*{HOLE}[ \t{HOLE}]*+(?=[,.]|$)"), ""),
    (HOLE, re.compile(rf"(?<![ \t])[ \t]+{HOLE}[ \t{HOLE}]*"), " "),
    (HOLE, re.compile(HOLE), ""),
]


def _clean_line(line: str) -> str:
    """Removes the traces of removed templates, and spaces at the ends."""
    if HOLE in line:
        for bracket, pattern, replacement in _AROUND_HOLES:
            if bracket in line:
                line = pattern.sub(replacement, line)
    if "  " in line and not line.startswith(" "):
        line = re.sub(" {2,}", " ", line)
    return line.rstrip()


@dataclass
class _Section:
    level: int
    title: str
    lines: list[str] = field(default_factory=list)


def _split_sections(text: str) -> list[_Section]:
    sections, items = [_Section(0, "")], _Items()
    for line in text.split("\n"):
        cleaned = _clean_line(line)
        if heading := _HEADING.fullmatch(cleaned):
            level = min(len(heading[1]), len(heading[3]))
            sections.append(_Section(level, " ".join(heading[2].strip("= ").split())))
        elif markers := _ITEM.match(cleaned):
            if item := items.format(markers[0], cleaned[markers.end() :].strip()):
                sections[-1].lines.append(item)
        elif cleaned.startswith("----"):  # a horizontal rule
            items.reset()
            sections[-1].lines += ["", cleaned.lstrip("-").strip(), ""]
        elif cleaned or not line.strip():  # a line that had only templates leaves no blank line
            items.reset()
            # One space at the start marks preformatted text; further ones are indentation.
            sections[-1].lines.append(cleaned.removeprefix(" "))
    return sections


class _Items:
    """Numbers and indents list items."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}

    def reset(self) -> None:
        self.counts.clear()

    def format(self, markers: str, text: str) -> str:
        if not text:
            return ""
        self.counts = {m: n for m, n in self.counts.items() if len(m) <= len(markers)}
        self.counts[markers] = number = self.counts.get(markers, 0) + 1
        if markers[-1] in ":;":
            return text
        indent = "  " * sum(marker in "*#" for marker in markers[:-1])
        return f"{indent}{f'{number}.' if markers[-1] == '#' else '-'} {text}"


def _kept_sections(sections: list[_Section], removed: frozenset[str]) -> Iterator[_Section]:
    removed_level = 7
    for section in sections:
        if section.level > removed_level:
            continue
        is_removed = section.title.casefold() in removed
        removed_level = section.level if is_removed else 7
        if not is_removed:
            yield section


def _without_empty_sections(sections: Iterator[_Section]) -> Iterator[str]:
    """Headings and bodies; a section without text needs a section of a lower level with text."""
    blocks: list[str] = []
    next_level = 0  # of the heading that follows in the output
    for section in reversed(list(sections)):
        body = re.sub(r"\n{3,}", "\n\n", "\n".join(section.lines)).strip("\n")
        if body or next_level > section.level:
            blocks += [body] if body else []
            blocks += [section.title] if section.title else []
            next_level = section.level
    yield from reversed(blocks)
