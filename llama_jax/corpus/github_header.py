"""Removes comments with a copyright or license statement from the start of a source file."""

import re
from pathlib import PurePosixPath

_STATEMENT = re.compile(
    r"copyright|©|\(c\)\s*\d{4}|all rights reserved|SPDX-License|@licen[sc]e|licen[sc]e:"
    r"|licen[sc]ed\s+(?:under|to|as)|(?:under|of|to)\s+the\s[^.]{0,80}\blicen[sc]e"
    r"|\b(?:apache|bsd|mit|mozilla|public)[\s*#/-]+(?:\S+\s+)?licen[sc]e"
    r"|permission\s+is\s+hereby\s+granted|redistribution\s+and\s+use\s+in\s+source",
    re.IGNORECASE,
)
# Lines that stay where they are although they look like comments.
_KEPT = re.compile(
    r"#!|(?:#|--|//|;)\s*(?:-\*-|vim?:|coding[:=])|<\?(?:php|xml)|<!DOCTYPE|@echo off"
    r"|['\"]use strict['\"];?\s*$|# frozen_string_literal|# syntax\s*=",
    re.IGNORECASE,
)
# Extensions, beginnings of comment lines, and delimiters of comment blocks.
_TABLE = [
    (
        ".c .h .cs .cpp .hpp .c++ .h++ .cc .hh .C .H .css .go .java .js .ts .tsx .rs .scala",
        ("//",),
        [("/*", "*/")],
    ),
    (
        ".py .sh .bash .command .zsh .pl .pm .pod .perl .jl .smali .dockerfile Dockerfile Makefile",
        ("#",),
        [],
    ),
    (".php .php3 .php4 .php5 .phps .phpt", ("//", "#"), [("/*", "*/")]),
    (".md .markdown .html .xml", (), [("<!--", "-->")]),
    (".f90 .f .f03 .f08 .f77 .f95 .for .fpp", ("!", "C ", "c ", "*"), []),
    (".ps1 .psd1 .psm1", ("#",), [("<#", "#>")]),
    (".bat .cmd", ("rem ", "REM ", "Rem ", "@rem ", "@REM ", "::"), []),
    (".rb", ("#",), [("=begin", "=end")]),
    (".cmake", ("#",), [("#[[", "]]")]),
    (".sql", ("--",), [("/*", "*/")]),
    (".hs", ("--",), [("{-", "-}")]),
    (".lua", ("--",), [("--[[", "]]")]),
    (".tex", ("%",), []),
    (".m", ("%", "//"), [("/*", "*/"), ("%{", "%}")]),
    (".asm", (";", "#", "//"), [("/*", "*/")]),
    (".vb", ("'",), []),
]
_STYLES = {name: (lines, blocks) for names, lines, blocks in _TABLE for name in names.split()}
_RST_COMMENT = re.compile(
    r"\.\.(?:[ \t]+(?![\w-]+::|_|\[|\|)[^\n]*)?\n(?:[ \t]+[^\n]*\n|\n(?=[ \t]))*"
)


def extension(path: str) -> str:
    """The suffix of a file, or its name if it has none; case counts (``.C`` is C++)."""
    name = PurePosixPath(path)
    return name.suffix or name.name


def remove_header(text: str, path: str) -> str:
    """Removes each comment before the first line of code that has a statement of rights.

    Other comments, ``#!`` lines, encodings, ``<?php`` and the like stay; so do ``#include`` and
    Markdown titles, which are no comments.

    Args:
        text: Content of the file.
        path: Name of the file; its extension says how comments look.
    """
    kept: list[str] = []
    position = 0
    removed = False
    while (end := _next_part(text, position, path)) is not None:
        part = text[position:end]
        if _KEPT.match(part.lstrip()) or not _STATEMENT.search(part):
            kept.append(part)
        else:
            removed = True
            end += len(text[end:]) - len(text[end:].lstrip("\r\n"))
        position = end
    return "".join(kept) + text[position:] if removed else text


def _next_part(text: str, start: int, path: str) -> int | None:
    """The end of the blank line, kept line or comment at ``start``; None if code starts here."""
    if start >= len(text):
        return None
    line_end = _line_end(text, start)
    line = text[start:line_end].lstrip("\ufeff \t")
    if not line.strip() or _KEPT.match(line):
        return line_end
    if extension(path) == ".rst":
        comment = _RST_COMMENT.match(text, start)
        return comment.end() if comment else None
    prefixes, blocks = _STYLES.get(extension(path), ((), ()))
    for opening, closing in blocks:
        if line.startswith(opening):
            close = text.find(closing, text.index(opening, start) + len(opening))
            if close < 0:
                return None
            end = _line_end(text, close)
            code = text[close + len(closing) : end].strip()
            return None if code else end
    end = start
    while line and line.startswith(prefixes) and not (end > start and _KEPT.match(line)):
        end = _line_end(text, end)
        line = text[end : _line_end(text, end)].lstrip(" \t")
    return end if end > start else None


def _line_end(text: str, start: int) -> int:
    return text.find("\n", start) + 1 or len(text)
