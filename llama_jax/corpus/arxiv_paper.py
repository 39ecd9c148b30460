r"""One paper of arXiv: from the files of its source to one text, and the part of it that is kept.

``join_files`` starts at the main file and puts the content of ``\input`` files in their place.
``keep_body`` keeps the text from the first section to the end, without the bibliography.
"""

import codecs
import posixpath
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from llama_jax.corpus.decode import try_decode
from llama_jax.corpus.tex import remove_comments, split_verbatim

MAX_DEPTH = 20
"""Nesting of ``\\input``; TeX itself allows 15."""
MAX_CHARACTERS = 20_000_000
"""Text of one paper with its files in place; the largest papers have some 5 MB. The tokens of it
take up to 60 bytes of memory a character."""

_CLASS = re.compile(r"\\document(?:class|style)\s*[\[{]")
_BEGIN = re.compile(r"\\begin\s*\{document\}")
_END = re.compile(r"\\end\s*\{document\}|\\endinput(?![A-Za-z@])")
_INPUT = re.compile(
    r"\\(?P<command>input|include|subfile|subfileinclude)\s*\{(?P<name>[^{}#\\]+)\}"
    r"|\\(?:sub)?(?:import|inputfrom|includefrom)\*?"
    r"\s*\{(?P<folder>[^{}#\\]*)\}\s*\{(?P<file>[^{}#\\]+)\}"
    r"|\\input\s+(?P<plain>[\w./+-]+)"
    r"|\\usepackage\s*+(?:\[[^\[\]]*\]\s*+)?\{(?P<packages>[\w\s,./+-]+)\}"
)
_ENCODING = re.compile(r"\\usepackage\s*\[([\w-]+)\]\s*\{inputenc\}")
_ENCODINGS = {
    "latin1": "cp1252", "ansinew": "cp1252", "cp1252": "cp1252", "latin2": "iso8859-2",
    "latin3": "iso8859-3", "latin4": "iso8859-4", "latin5": "iso8859-9", "latin9": "iso8859-15",
    "latin10": "iso8859-16", "cp1250": "cp1250", "cp1251": "cp1251", "cp1257": "cp1257",
    "cp437": "cp437", "cp850": "cp850", "cp852": "cp852", "cp866": "cp866", "koi8-r": "koi8-r",
    "koi8-u": "koi8-u", "applemac": "mac-roman",
}  # fmt: skip

_SECTION = re.compile(
    r"\\(?:part|chapter|(?:sub){0,2}section|(?:sub)?paragraph)\s*+(?:\*\s*+)?[\[{]"
)
_FRONT_MATTER = re.compile(r"\\end\s*\{abstract\}|\\maketitle(?![A-Za-z@])")
_BIBLIOGRAPHY = re.compile(
    r"\\begin\s*\{(thebibliography|references|chapthebibliography|bibdiv|biblist\*?)\}"
    r".*?(?:\\end\s*\{\1\}|\Z)"
    r"|\\Refs(?![A-Za-z@]).*?(?:\\endRefs(?![A-Za-z@])|\Z)"  # of AMS-TeX
    r"|\\(?:no)?(?:bibliography|bibliographystyle)\s*\{[^{}]*\}"
    r"|\\printbibliography(?![A-Za-z@])(?:\s*\[[^\[\]]*\])?"
    r"|\\(?:chapter|section|subsection)\s*+(?:\*\s*+)?"
    r"\{(?:\\\w++)?\s*+(?i:references|bibliography)\s*\}"
    r"(?:(?!\\(?:appendix(?![A-Za-z])|part|chapter|(?:sub)*section|begin\s*\{(?:thebib|ref|fig|tab))).)*",
    re.DOTALL,
)


@dataclass
class Paper:
    """The text of a paper, and the names of included files that are missing."""

    text: str
    missing: list[str] = field(default_factory=list)


class PaperError(ValueError):
    """Why a paper has no text; short, so that reasons can be counted."""


def decode(data: bytes, declared: str | None = None) -> str:
    """Text of a TeX file: UTF-8 unless too much is invalid, else the declared encoding, else
    Windows-1252.

    Args:
        data: Content of the file.
        declared: Option of the package ``inputenc``.
    """
    for bom, encoding in ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF16_LE, "utf-16"),
                          (codecs.BOM_UTF16_BE, "utf-16")):  # fmt: skip
        if data.startswith(bom):
            text = data.decode(encoding, "replace")
            break
    else:
        text = _decode_8_bit(data, declared)
    return text.replace("\r\n", "\n").replace("\r", "\n").replace("\0", "")


def _decode_8_bit(data: bytes, declared: str | None) -> str:
    for encoding in ("utf-8", _ENCODINGS.get(declared or "", "cp1252")):
        if (text := try_decode(data, encoding)) is not None:
            return text
    return data.decode("latin-1")


def join_files(files: Mapping[str, bytes]) -> Paper:
    """The text of a paper without comments, with all files that it includes in their place.

    Args:
        files: Content of the text files by their path in the archive.

    Raises:
        PaperError: no main file, or far too much text.
    """
    found = _ENCODING.search(b"\n".join(files.values()).decode("latin-1"))
    declared = found[1] if found else None
    texts = {posixpath.normpath(name): decode(data, declared) for name, data in files.items()}
    main = _main_file(texts)
    paper = Paper("")
    joiner = _Joiner(texts, paper.missing)
    paper.text = joiner.read(main, posixpath.dirname(main), ())
    return paper


def _main_file(texts: Mapping[str, str]) -> str:
    """The file with ``\\documentclass``; of several, the longest that no other one includes."""
    candidates = [name for name, text in texts.items() if _has_class(text)]
    complete = [name for name in candidates if _BEGIN.search(texts[name])]
    if not candidates:  # plain TeX
        candidates = [name for name, text in texts.items() if name.endswith(".tex")] or [
            name for name, text in texts.items() if "\\" in text
        ]
    candidates = complete or candidates
    if not candidates:
        raise PaperError("no TeX file")
    included = {
        _find(texts, target, posixpath.dirname(name))
        for name in candidates
        for piece, is_verbatim in split_verbatim(texts[name])
        if not is_verbatim
        for found in _INPUT.finditer(piece)
        if (target := found["name"] or found["file"] or found["plain"])
    }
    roots = [name for name in candidates if name not in included] or candidates
    return min(roots, key=lambda name: (-len(texts[name]), name))


def _has_class(text: str) -> bool:
    """Whether a file has ``\\documentclass`` outside comments."""
    lines = (text[text.rfind("\n", 0, m.start()) + 1 : m.start()] for m in _CLASS.finditer(text))
    return any("%" not in line for line in lines)


def _find(texts: Mapping[str, str], name: str, folder: str) -> str | None:
    """The path of an included file, if it is in the archive."""
    name = name.strip().strip('"')
    for base in dict.fromkeys((folder, "")):
        path = posixpath.normpath(posixpath.join(base, name))
        for candidate in (f"{path}.tex", path):
            if candidate in texts:
                return candidate
    return None


def _up_to_end(text: str) -> str:
    """What precedes the end of the document or file."""
    out: list[str] = []
    for piece, is_verbatim in split_verbatim(text):
        if not is_verbatim and (end := _END.search(piece)):
            return "".join([*out, piece[: end.start()]])
        out.append(piece)
    return text


def _check_length(characters: int) -> None:
    if characters > MAX_CHARACTERS:
        raise PaperError(f"more than {MAX_CHARACTERS:,} characters with its \\input files")


class _Joiner:
    def __init__(self, texts: Mapping[str, str], missing: list[str]):
        self.texts, self.missing = texts, missing
        self.characters = 0

    def read(self, name: str, folder: str, path: tuple[str, ...]) -> str:
        """A file with what it includes. ``path``: the files that include it, to find cycles."""
        _check_length(len(self.texts[name]))  # comments take memory too until they are removed
        text = remove_comments(self.texts[name])
        if path and (begin := _BEGIN.search(text)):  # a document of its own, as subfiles are
            text = text[begin.end() :]
        text = _up_to_end(text)
        text = text.rstrip("\n") if path else text
        self.characters += len(text)
        _check_length(self.characters)
        replace = lambda found: self._replacement(found, folder, (*path, name))
        pieces = split_verbatim(text)
        return "".join(x if is_verbatim else _INPUT.sub(replace, x) for x, is_verbatim in pieces)

    def _replacement(self, found: re.Match[str], folder: str, path: tuple[str, ...]) -> str:
        if found["packages"]:
            return found[0] + self._packages(found["packages"], folder, path)
        name = found["name"] or found["file"] or found["plain"]
        inner = folder
        if found["folder"] is not None:
            inner = posixpath.join(folder, found["folder"].strip())
        target = _find(self.texts, name, inner)
        if target is None or target in path or len(path) >= MAX_DEPTH:
            self.missing.append(name.strip())
            return ""
        if found["folder"] is None and found["command"] not in ("subfile", "subfileinclude"):
            inner = folder  # \input is relative to the main file
        else:
            inner = posixpath.dirname(target)
        return self.read(target, inner, path)

    def _packages(self, names: str, folder: str, path: tuple[str, ...]) -> str:
        """The author's own macro packages. Published ones declare their name; they are left out."""
        out = ""
        for name in names.split(","):
            target = _find(self.texts, f"{name.strip()}.sty", folder)
            known = target is None or r"\ProvidesPackage" in self.texts[target]
            if target and not known and target not in path and len(path) < MAX_DEPTH:
                out += "\n" + self.read(target, folder, path)
        return out


def keep_body(text: str, without_section: bool) -> str | None:
    """The text from the first section on, without the bibliography; appendices are kept.

    Args:
        text: Text whose macros are expanded.
        without_section: Whether the text after the abstract is kept if there is no section.

    Returns:
        The text, or None for a paper without a section that is not kept.
    """
    begin = _BEGIN.search(text)
    text = text[begin.end() :] if begin else text
    if section := _SECTION.search(text):
        text = text[section.start() :]
    elif without_section:
        ends = [found.end() for found in _FRONT_MATTER.finditer(text)]
        text = text[max(ends, default=0) :]
    else:
        return None
    return _BIBLIOGRAPHY.sub("", text).strip()
