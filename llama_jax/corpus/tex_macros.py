r"""Expands the macros that a TeX document defines, and removes their definitions.

Expansion works on tokens, as in TeX: definitions are read in order and removed, calls are replaced
and read again, so a macro may end with another one that takes its arguments from the text. Not
expanded are macros that a substitution cannot express: those with conditionals or with the internal
commands of packages (``\@ifnextchar``), and sectioning commands. Their definitions are removed too,
their calls stay as they are. A definition is valid up to the end of the document, also in a group.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from llama_jax.corpus.tex import TOKEN, tokens

MAX_EXPANSIONS = 500_000
"""Calls expanded in one document; a book with 400 macros has some 20,000."""
MAX_GROWTH = 20
"""Characters that expansion inserts, as a multiple of those of the document (plus a million)."""
MAX_INSERTED = 50_000_000
"""Characters that expansion inserts into a document of any length."""
MAX_DELIMITER = 100
"""Tokens before or after an argument; each one is compared at each place of a call."""
MAX_ARGUMENT = 50_000
"""Tokens of an argument or definition; a longer one begins with a brace that is never closed."""


@dataclass(frozen=True)
class _Macro:
    """``delimiters[i]`` are the tokens before argument i; the last ones end the last argument."""

    body: tuple[str, ...]
    delimiters: tuple[tuple[str, ...], ...] = ((),)
    default: tuple[str, ...] | None = None  # of an optional first argument
    primitive: bool = False  # made by \let: the body is not expanded
    paired: bool = False  # a delimiter of mathtools: \name*{x} grows with x


class ExpansionError(ValueError):
    """The macros of a document expand without end, or to far more text than the document has."""


class _NoMatch(Exception):
    """The text does not have the form of a definition or call; it stays as it is."""


_PREFIXES = {r"\long", r"\global", r"\outer", r"\protected"}
_CONDITIONAL = re.compile(r"\\if(?!f\Z)[A-Za-z@]*\Z")
_PROGRAMMING = set(
    tokens(
        r"\else\fi\or\expandafter\noexpand\csname\endcsname\futurelet\catcode\string\the\number"
        r"\romannumeral\advance\loop\repeat\afterassignment\aftergroup\unexpanded\detokenize"
        r"\meaning\read\write\lowercase\uppercase\IfNoValueTF\IfNoValueT\IfValueTF\IfValueT"
        r"\IfBooleanTF\IfBooleanT"
    )
)
_KEPT = set(
    tokens(
        r"\part\chapter\section\subsection\subsubsection\paragraph\subparagraph\appendix\begin\end"
        r"\item\documentclass\documentstyle\usepackage\title\author\maketitle\abstract\caption"
        r"\label\ref\cite\footnote\input\include\bibliography\thebibliography"
    )
)


def expand_macros(text: str) -> str:
    """Removes the definitions of macros from a text without comments, and expands their calls.

    Raises:
        ExpansionError: See `MAX_EXPANSIONS` and `MAX_GROWTH`.
    """
    expander = _Expander(text)
    expander.run()
    return "".join(expander.out)


class _Expander:
    """A stack of tokens that are still to be read, and the list of those that are done."""

    def __init__(self, text: str):
        self.stack = tokens(text)[::-1]
        self.out: list[str] = []
        self.macros: dict[str, _Macro] = {}
        self.usable: dict[str, bool] = {}  # cache of `_usable`
        self.taken: list[str] = []  # read since the start of a definition or call
        self.calls = 0
        self.remaining = min(MAX_INSERTED, 1_000_000 + MAX_GROWTH * len(text))
        self.definitions = {
            r"\newcommand": self._newcommand,
            r"\renewcommand": self._newcommand,
            r"\providecommand": self._newcommand,
            r"\DeclareRobustCommand": self._newcommand,
            r"\DeclareMathOperator": self._operator,
            r"\DeclarePairedDelimiter": self._paired_delimiter,
            r"\NewDocumentCommand": self._document_command,
            r"\RenewDocumentCommand": self._document_command,
            r"\newenvironment": self._environment,
            r"\renewenvironment": self._environment,
            r"\def": self._def,
            r"\gdef": self._def,
            r"\edef": self._def,
            r"\xdef": self._def,
            r"\let": self._let,
        }

    def run(self) -> None:
        stack, out, definitions, macros = self.stack, self.out, self.definitions, self.macros
        while stack:
            token = stack.pop()
            if token not in definitions and token not in macros:
                out.append(token)
                continue
            self.taken = [token]
            try:
                if token in definitions:
                    definitions[token](token)
                    self._remove_line()
                else:
                    self._call(token)
            except (_NoMatch, IndexError):  # IndexError: the end of the text
                self._grow(len(self.taken) - 1)
                stack.extend(reversed(self.taken[1:]))
                out.append(token)

    # Definitions

    def _newcommand(self, command: str) -> None:
        self._skip_star()
        name = self._name()
        count = self._optional()
        default = self._optional()
        body = tuple(self._argument())
        number = "".join(count or ["0"]).strip()
        if not (number.isascii() and number.isdigit() and int(number) <= 9):
            raise _NoMatch
        if command == r"\providecommand" and name in self.macros:
            return
        delimiters = ((),) * (int(number) + 1)
        self._define(name, _Macro(body, delimiters, None if default is None else tuple(default)))

    def _operator(self, command: str) -> None:
        star = ["*"] if self._skip_star() else []
        name, body = self._name(), self._argument()
        self._define(name, _Macro((r"\operatorname", *star, "{", *body, "}")))

    def _paired_delimiter(self, command: str) -> None:
        name, left, right = self._name(), self._argument(), self._argument()
        self._define(name, _Macro((*left, "#1", *right), ((), ()), paired=True))

    def _document_command(self, command: str) -> None:
        """Commands of xparse with the argument types m and, at first, O."""
        name = self._name()
        types = "".join(self._argument())
        body = tuple(self._argument())
        form = re.fullmatch(r"\s*(?:O\s*\{(.*)\})?((?:\s*\+?m)*)\s*", types, re.DOTALL)
        if form is None:
            raise _NoMatch
        default = None if form[1] is None else tuple(tokens(form[1]))
        count = form[2].count("m") + (default is not None)
        self._define(name, _Macro(body, ((),) * (count + 1), default))

    def _environment(self, command: str) -> None:
        """Environments are not expanded: what they set is layout, their names carry meaning."""
        self._skip_star()
        self._argument()
        self._optional()
        self._optional()
        self._argument()
        self._argument()

    def _def(self, command: str) -> None:
        name = self._control_sequence()
        self._skip_blanks()
        parameters: list[tuple[str, ...]] = []
        delimiter: list[str] = []
        while (token := self._pop()) != "{":
            if token == f"#{len(parameters) + 1}":
                parameters.append(tuple(delimiter))
                delimiter = []
            elif token[0] in "#}":
                raise _NoMatch
            else:
                delimiter += [token] if token[0] == "\\" else re.sub(r"\s", " ", token)
            if len(delimiter) > MAX_DELIMITER:
                raise _NoMatch
        parameters.append(tuple(delimiter))
        body = tuple(self._group())
        while self.out and (self.out[-1] in _PREFIXES or self._is_blank_after_prefix()):
            self.out.pop()
        self._define(name, _Macro(body, tuple(parameters)))

    def _is_blank_after_prefix(self) -> bool:
        return self.out[-1].isspace() and len(self.out) > 1 and self.out[-2] in _PREFIXES

    def _let(self, command: str) -> None:
        name = self._control_sequence()
        self._skip_blanks()
        if self.stack[-1][0] == "=":
            self._character()
            self._skip_blanks()
        target = self._character()
        if target in self.macros:
            self._define(name, self.macros[target])
        elif target in self.definitions:  # a short name of \newcommand
            self._define(name, _Macro((target,)))
        elif target in (r"\relax", r"\undefined") or target[0] in "{}[]#":
            self.macros.pop(name, None)
        elif target != name:
            self._define(name, _Macro((target,), primitive=True))

    def _define(self, name: str, macro: _Macro) -> None:
        self.macros[name] = macro
        self.usable.clear()

    def _remove_line(self) -> None:
        """After a definition: removes its line if nothing else is on it."""
        while self.out and not self.out[-1].strip(" \t"):
            self.out.pop()
        at_start = not self.out or self.out[-1].rstrip(" \t").endswith("\n")
        rest = self.stack[-1].lstrip(" \t") if self.stack else ""
        if at_start and rest.startswith("\n"):
            self.stack[-1] = rest[1:]
            if not self.stack[-1]:
                self.stack.pop()
            if self.out:
                self.out[-1] = self.out[-1].rstrip(" \t")
        self.stack.extend(self._separate([]))

    # Calls

    def _call(self, name: str) -> None:
        macro = self.macros[name]
        if not self._usable(name):
            raise _NoMatch
        source: Sequence[str] = macro.body
        if macro.paired:
            at = macro.body.index("#1")
            left, right = (r"\left", r"\right") if self._skip_star() else ("", "")
            size = self._optional() or []
            source = [left, *size, *source[: at + 1], right, *size, *source[at + 1 :]]
            source = [token for token in source if token]
        arguments = self._arguments(macro)
        body: list[str] = []
        for token in source:
            if token[0] != "#" or token == "#":
                body.append(token)
            elif token[1] == "#":
                body.append(token[1:])
            elif 0 < int(token[1:]) <= len(arguments):
                body += arguments[int(token[1:]) - 1]
        self.calls += 1
        self._grow(sum(map(len, body)))
        body = self._separate(body)
        if macro.primitive:
            self.out += body
        else:
            self.stack.extend(reversed(body))

    def _grow(self, characters: int) -> None:
        self.remaining -= characters
        if self.calls > MAX_EXPANSIONS or self.remaining < 0:
            raise ExpansionError("macros expand too often or to too much text")

    def _usable(self, name: str, path: tuple[str, ...] = ()) -> bool:
        """Whether substitution can express a macro; it cannot for recursive ones."""
        macro = self.macros.get(name)
        if macro is None or macro.primitive:
            word = macro.body[0] if macro else name
            internal = "@" in word and len(word) > 2 and word != r"\ar@"
            return not (internal or word in _PROGRAMMING or _CONDITIONAL.match(word))
        if name in path or name in _KEPT or len(path) > 100:
            return False
        if name not in self.usable:
            words = {token: None for token in macro.body if token[0] == "\\"}
            self.usable[name] = all(self._usable(word, (*path, name)) for word in words)
        return self.usable[name]

    def _arguments(self, macro: _Macro) -> list[list[str]]:
        out: list[list[str]] = []
        if macro.default is not None:
            given = self._optional()
            out.append(list(macro.default) if given is None else given)
        elif any(macro.delimiters):
            if macro.delimiters[0][:1] != (" ",):
                self._skip_blanks()
            if any(self._character() != token for token in macro.delimiters[0]):
                raise _NoMatch
        for delimiter in macro.delimiters[1 + len(out) :]:
            out.append(self._delimited(delimiter) if delimiter else self._argument())
        return out

    def _separate(self, body: list[str]) -> list[str]:
        """Adds a space where a letter would become part of the command before it."""
        before = self.out[-1] if self.out else ""
        after = self.stack[-1] if self.stack else ""
        separated: list[str] = []
        for token in (*body, after):
            if token and token[0].isalpha() and before[:1] == "\\" and before[-1].isalpha():
                separated.append(" ")
            separated.append(token)
            before = token or before
        return separated[:-1]

    # Reading tokens

    def _take(self, token: str) -> str:
        self.taken.append(token)
        if len(self.taken) > MAX_ARGUMENT:
            raise _NoMatch
        return token

    def _pop(self) -> str:
        return self._take(self.stack.pop())

    def _character(self) -> str:
        """A command or a character; every blank is a space."""
        token = self.stack.pop()
        if len(token) > 1 and token[0] not in "\\#":
            self.stack.append(token[1:])
            token = token[0]
        self._take(token)
        return " " if token.isspace() else token

    def _skip_blanks(self) -> None:
        """Skips blanks before an argument; an empty line ends the paragraph and the command."""
        while self.stack and self.stack[-1][0].isspace():
            run = self.stack.pop()
            rest = run.lstrip()
            blanks = self._take(run[: len(run) - len(rest)])
            if rest:
                self.stack.append(rest)
            if blanks.count("\n") > 1:
                raise _NoMatch

    def _skip_star(self) -> bool:
        star = self.stack[-1][0] == "*"
        if star:
            self._character()
        return star

    def _control_sequence(self) -> str:
        self._skip_blanks()
        token = self._pop()
        if token[0] != "\\" or not TOKEN.fullmatch(token):
            raise _NoMatch
        return token

    def _name(self) -> str:
        """The name in a definition, with or without braces."""
        self._skip_blanks()
        if self.stack[-1] != "{":
            return self._control_sequence()
        self._pop()
        name = "".join(self._group()).strip()
        if name[:1] != "\\" or not TOKEN.fullmatch(name):
            raise _NoMatch
        return name

    def _group(self) -> list[str]:
        """The tokens up to the brace that closes the one just read."""
        out: list[str] = []
        stack, depth = self.stack, 1
        try:
            while depth:
                token = stack.pop()
                out.append(token)
                if token == "{":
                    depth += 1
                elif token == "}":
                    depth -= 1
                if len(out) > MAX_ARGUMENT:
                    raise _NoMatch
        finally:
            self.taken += out
        return out[:-1]

    def _argument(self) -> list[str]:
        self._skip_blanks()
        if self.stack[-1] == "{":
            self._pop()
            return self._group()
        token = self._character()
        if token == "}":
            raise _NoMatch
        return [token]

    def _optional(self) -> list[str] | None:
        if self.stack[-1:] != ["["]:
            blank = self.stack[-1:] and self.stack[-1].isspace() and self.stack[-1].count("\n") < 2
            if not blank or self.stack[-2:-1] != ["["]:
                return None
            self._pop()
        self._pop()
        out: list[str] = []
        depth = 0
        while (token := self._pop()) != "]" or depth:
            depth += (token == "{") - (token == "}")
            if depth < 0:
                raise _NoMatch
            out.append(token)
        return out

    def _delimited(self, delimiter: tuple[str, ...]) -> list[str]:
        """The argument before a delimiter, which may not be inside braces."""
        out: list[str] = []
        depth = groups = 0
        while True:
            token = self._character()
            if not depth and token == delimiter[0]:
                mark = len(self.taken)
                if all(self._character() == expected for expected in delimiter[1:]):
                    break
                self.stack.extend(reversed(self.taken[mark:]))
                del self.taken[mark:]
            depth += (token == "{") - (token == "}")
            groups += token == "}" and not depth
            if depth < 0:
                raise _NoMatch
            out.append(self.taken[-1] if token == " " else token)
        one_group = groups == 1 and out[0] == "{" and out[-1] == "}"
        return out[1:-1] if one_group else out
