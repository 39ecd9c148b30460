"""HTML of StackExchange's posts to plain text; code keeps its spaces and line breaks."""

import re
from dataclasses import dataclass
from html.parser import HTMLParser

_BLOCKS = frozenset(
    ["p", "div", "h1", "h2", "h3", "h4", "h5", "h6", "table", "hr", "dl", "details", "summary"]
)
_LISTS = frozenset(["ul", "ol"])
_CONTAINERS = _LISTS | {"li", "blockquote"}
_HIDDEN = frozenset(["script", "style", "iframe"])
_MAX_NESTING = 50  # deeper lists and quotations are written as their text: each line repeats them
_MAX_START = 9  # digits of the first number of a list
_COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
# Starts of tags that do not end, for which the parser takes quadratic time, and of declarations.
_NO_TAG = re.compile(r"<(?=[!?]|[^<>]*(?:<|$))")


def html_to_text(html: str) -> str:
    """Plain text with blank lines between blocks.

    List items start with "- " or their number, quoted lines with "> "; cells of a table are
    separated by " | ". Links keep their text, images leave nothing.
    """
    converter = _Converter()
    comments_end = html.rfind("-->") + len("-->")
    html = _COMMENT.sub("", html[:comments_end]) + html[comments_end:]
    converter.feed(_NO_TAG.sub("&lt;", html))
    converter.close()
    converter.end_code()  # without an end tag
    converter.end_line()
    return "\n".join(converter.lines)


@dataclass
class _Container:
    """An open list, list item or quotation.

    Attributes:
        tag: Name of the element.
        first: What precedes its first line.
        rest: What precedes its other lines.
        number: Of the next item of a numbered list.
    """

    tag: str
    first: str = ""
    rest: str = ""
    number: int = 1


class _Converter(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.lines: list[str] = []
        self.line: list[str] = []
        self.containers: list[_Container] = []
        self.blank = False  # whether a blank line precedes the next text
        self.in_pre = self.in_code = self.hidden = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in _HIDDEN:
            self.hidden += 1
        elif tag == "br":
            if self.in_pre:
                self.line.append("\n")
            else:
                self.blank = self.blank or not self.line
                self.end_line()
        elif tag == "pre":
            self.start_block()
            self.in_pre += 1
        elif tag == "code":
            self.in_code += 1
        elif tag == "li":
            self.start_item()
        elif tag in _LISTS:
            nested = any(container.tag == "li" for container in self.containers)
            self.end_line()
            self.blank = self.blank or not nested
            start = str(dict(attrs).get("start") or "1")
            is_number = start.isdecimal() and len(start) <= _MAX_START
            self.open(_Container(tag, number=int(start) if is_number else 1))
        elif tag == "blockquote":
            self.start_block()
            self.open(_Container(tag, "> ", "> "))
        elif tag in ("td", "th") and self.line:
            self.line.append(" | ")
        elif tag in ("tr", "dt", "dd"):
            self.end_line()
        elif tag in _BLOCKS:
            self.start_block()

    def handle_endtag(self, tag: str) -> None:
        if tag in _HIDDEN:
            self.hidden = max(0, self.hidden - 1)
        elif tag == "pre":
            self.end_code()
        elif tag == "code":
            self.in_code = max(0, self.in_code - 1)
        elif tag in _CONTAINERS:
            self.end_line()
            tags = [container.tag for container in self.containers]
            if tag in tags:
                del self.containers[len(tags) - 1 - tags[::-1].index(tag) :]
            in_item = any(container.tag == "li" for container in self.containers)
            self.blank = self.blank or (tag != "li" and not in_item)
        elif tag in _BLOCKS:
            self.start_block()

    def handle_data(self, data: str) -> None:
        if self.hidden:
            return
        if not self.in_pre:
            data = data.replace("\n", " ") if self.in_code else re.sub(r"[ \t\r\n\xa0]+", " ", data)
            if data.startswith(" ") and (not self.line or self.line[-1].endswith(" ")):
                data = data[1:]
        if data:
            self.line.append(data)

    def start_item(self) -> None:
        self.end_line()
        if self.containers and self.containers[-1].tag == "li":  # without an end tag
            self.containers.pop()
        parent = self.containers[-1] if self.containers else _Container("ul")
        marker = f"{parent.number}. " if parent.tag == "ol" else "- "
        if parent.number > 1:
            self.blank = False
        parent.number += 1
        self.open(_Container("li", marker, " " * len(marker)))

    def open(self, container: _Container) -> None:
        if len(self.containers) < _MAX_NESTING:
            self.containers.append(container)

    def start_block(self) -> None:
        self.end_line()
        # No blank line between the marker of an item and its first paragraph.
        if not (self.containers and self.containers[-1].tag == "li" and self.containers[-1].first):
            self.blank = True

    def end_line(self) -> None:
        if self.in_pre:
            return
        text = "".join(self.line).strip(" ")
        self.line.clear()
        if text:
            self.write(text)

    def end_code(self) -> None:
        if not self.in_pre:
            return
        self.in_pre = 0
        code = "".join(self.line).replace("\r\n", "\n").removeprefix("\n").rstrip()
        self.line.clear()
        for line in code.split("\n") if code else []:
            self.write(line)
        self.blank = True

    def write(self, text: str) -> None:
        if self.blank and self.lines:
            self.lines.append("".join(c.rest for c in self.containers if not c.first).rstrip())
        self.blank = False
        prefix = "".join(container.first or container.rest for container in self.containers)
        self.lines.append(prefix + text if text.strip() else prefix.rstrip())
        for container in self.containers:
            container.first = ""
