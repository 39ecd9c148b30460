"""arXiv: archives of LaTeX sources to text with macros expanded, from the first section on.

The input is arXiv's bulk archives (``arXiv_src_YYMM_NNN.tar``), or sources of single papers. Of the
versions of a paper, the latest is kept.
"""

import itertools
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pydantic
from datatrove.data import Document

from llama_jax.corpus.archives import Member, members
from llama_jax.corpus.arxiv_paper import PaperError, join_files, keep_body
from llama_jax.corpus.files import CHUNK, Unreadable
from llama_jax.corpus.run import Run, group_files
from llama_jax.corpus.steps import Reader, Stage, Step, drop
from llama_jax.corpus.tex_macros import ExpansionError, expand_macros
from llama_jax.io import atomic_write

FILES_PER_TASK = 64
TASK_BYTES = 256 << 20

_ID = re.compile(
    r"(?P<new>\d{4}\.\d{4,5})(?:v(?P<v1>\d+))?\Z"
    r"|(?P<archive>[a-z-]+)(?:\.[A-Z]{2})?/?(?P<number>\d{7})(?:v(?P<v2>\d+))?\Z"
)
_SUFFIXES = re.compile(r"(?i)(?:\.(?:gz|tgz|tar|tex|pdf|ps|html?|docx?|zip))+\Z")
_NOT_TEX = re.compile(
    r"(?i)\.(?:eps|epsf|epsi|ps|pdf|png|jpe?g|gif|tiff?|bmp|svg|zip|gz|dat|csv|fits|mp4|avi|mov|bib"
    r"|bst|cls|clo|log|aux|blg|dvi|ttf|otf|pfb|py|c|cpp|nb|m|xls|xlsx)\Z"
)
_WITHOUT_SOURCE = {
    ".pdf": "PDF only", ".ps": "PostScript only", ".html": "HTML only", ".htm": "HTML only",
    ".doc": "Word only", ".docx": "Word only",
}  # fmt: skip


class Settings(pydantic.BaseModel, extra="forbid", frozen=True):
    """See ``configs/corpus/arxiv.toml``."""

    without_section: bool
    max_paper_bytes: int = pydantic.Field(gt=0)


def looks_like(first_bytes: bytes, name: str) -> bool:
    if re.search(rb"\\document(?:class|style)\s*[\[{]", first_bytes):
        return True
    inside = first_bytes[:100].partition(b"\0")[0].decode("utf-8", "replace")
    tar = first_bytes[257:262] == b"ustar"
    return paper_id(name) is not None or (tar and _is_bulk_name(inside))


def stages(run: Run) -> Iterator[Stage]:
    """Lists the papers to find older versions, then converts the papers."""
    groups = group_files(run.inputs, TASK_BYTES, FILES_PER_TASK)
    folder = run.folder("versions")
    yield Stage("versions", [PaperNames(groups, folder)], len(groups))
    older = folder / "older.json"
    _write_older(folder, len(groups), older)
    steps = [
        Papers(groups, older, run.settings.max_paper_bytes),
        JoinFiles(),
        ExpandMacros(),
        KeepBody(run.settings.without_section),
    ]
    yield Stage("text", steps, len(groups), final=True)


def paper_id(name: str) -> tuple[str, int] | None:
    """Identifier and version (0: not given) from the name of a file, as ``hep-th/9901001``."""
    found = _ID.match(_SUFFIXES.sub("", name.rpartition("/")[2]))
    if not found:
        return None
    if found["new"]:
        return found["new"], int(found["v1"] or 0)
    return f"{found['archive']}/{found['number']}", int(found["v2"] or 0)


def _is_bulk_name(name: str) -> bool:
    """Whether a member of an archive is a paper, as ``0711/0711.0001.gz``."""
    return paper_id(name) is not None or re.match(r"\d{4}/", name) is not None


def _papers(path: Path) -> Iterator[tuple[str, Iterable[Member | Unreadable]] | Unreadable]:
    """Name and files of each paper of an input file; the files can be read until the next one."""
    found = members(path)
    if paper_id(path.name):
        yield path.name, found
        return
    start: list[Member | Unreadable] = []
    for member in found:
        start.append(member)
        if isinstance(member, Member):
            bulk = path.name.startswith("arXiv_src") or _is_bulk_name(member.name)
            break
    else:
        bulk = True
    everything = itertools.chain(start, found)
    if not bulk:
        yield path.name, everything
        return
    for member in everything:
        yield member if isinstance(member, Unreadable) else (member.name, members(member))


class PaperNames(Reader):
    """Writes the names of the papers of a task to ``folder``; reads no paper."""

    def __init__(self, groups: Sequence[Sequence[Path]], folder: Path):
        super().__init__(groups)
        self.folder = folder

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        names = {
            str(path): [paper[0] for paper in _papers(path) if not isinstance(paper, Unreadable)]
            for path in self.groups[rank]
        }
        atomic_write(self.folder / f"{rank:05d}.json", json.dumps(names).encode())
        yield from ()


def _write_older(folder: Path, tasks: int, path: Path) -> None:
    """Writes which papers of each input file, by number, are older versions or repeated."""
    latest: dict[str, tuple[int, str, int]] = {}
    older: dict[str, list[int]] = {}
    for rank in range(tasks):
        for file, names in json.loads((folder / f"{rank:05d}.json").read_bytes()).items():
            for number, name in enumerate(names):
                if not (paper := paper_id(name)):
                    continue
                identifier, version = paper
                new = (version, file, number)
                known = latest.setdefault(identifier, new)
                if known is not new:
                    _, lost_file, lost_number = known if version > known[0] else new
                    latest[identifier] = new if version > known[0] else known
                    older.setdefault(lost_file, []).append(lost_number)
    atomic_write(path, json.dumps(older).encode())


class Papers(Reader):
    """Reads the files of each paper into the metadata key ``files``.

    Args:
        groups: See `Reader`.
        older: File with the numbers of older versions in each input file.
        max_paper_bytes: Text files of a paper; a larger paper is dropped.
    """

    def __init__(self, groups: Sequence[Sequence[Path]], older: Path, max_paper_bytes: int):
        super().__init__(groups)
        self.older, self.max_paper_bytes = older, max_paper_bytes

    def read(self, path: Path) -> Iterator[Document]:
        older = set(json.loads(self.older.read_bytes()).get(str(path), ()))
        number = -1
        for paper in _papers(path):
            if isinstance(paper, Unreadable):
                yield self.skipped(paper.place, paper.reason)
                continue
            name, found = paper
            number += 1
            place = path.name if name == path.name else f"{path.name}: {name}"
            document = _document(name, place)
            if number in older:
                yield drop(document, "read", "a newer version, or the same one, is in the input")
            elif reason := _WITHOUT_SOURCE.get(Path(name.lower().removesuffix(".gz")).suffix):
                yield drop(document, "read", reason)
            else:
                yield from self._read_files(document, found)

    def _read_files(
        self, document: Document, found: Iterable[Member | Unreadable]
    ) -> Iterator[Document]:
        files: dict[str, bytes] = {}
        problem = None
        remaining = self.max_paper_bytes
        for file in found:
            if isinstance(file, Unreadable):
                yield self.skipped(file.place, file.reason)
            elif not _NOT_TEX.search(file.name):
                data, error = _read_available(file, remaining)
                remaining -= len(data)
                if error and remaining <= 0:
                    problem = f"more than {self.max_paper_bytes:,} bytes of text files"
                    break
                if error:
                    yield self.skipped(error.place, error.reason)
                files[file.name] = data
        problem = problem or _problem(files)
        document.metadata["files"] = files
        yield drop(document, "read", problem) if problem else document


def _document(name: str, place: str) -> Document:
    identifier, version = paper_id(name) or (_SUFFIXES.sub("", name), 0)
    known = paper_id(name) is not None
    metadata: dict[str, Any] = {
        "source": "arxiv",
        "url": f"https://arxiv.org/abs/{identifier}" if known else None,
        "language": None,
        "scores": {},
        "place": place,
    }
    if version:
        metadata["version"] = version
    return Document(text="", id=f"arxiv/{identifier}", metadata=metadata)


def _read_available(file: Member, max_bytes: int) -> tuple[bytes, Unreadable | None]:
    """The content of a file, up to where it is damaged or ``max_bytes`` are read."""
    parts: list[bytes] = []
    size = 0
    while True:
        try:
            chunk = file.stream.read(CHUNK)
        except Unreadable as e:
            return b"".join(parts), e
        if not chunk:
            return b"".join(parts), None
        parts.append(chunk)
        if (size := size + len(chunk)) >= max_bytes:
            return b"".join(parts), Unreadable(file.place, "too large")


def _problem(files: dict[str, bytes]) -> str | None:
    """Why a paper has no TeX source, from the content; removes binary files."""
    heads = [data[:1024].lstrip() for data in files.values()]
    if len(files) == 1:
        head = heads[0]
        if not head or head.startswith(b"%auto-ignore"):
            return "withdrawn"
        if head.startswith(b"%PDF"):
            return "PDF only"
        if re.match(rb"(?i)%!(?!\s*TEX)", head):  # "%!TEX" is a comment for an editor
            return "PostScript only"
        if re.match(rb"(?i)<!doctype html|<html", head):
            return "HTML only"
    for name in [name for name, data in files.items() if b"\0" in data[:1024]]:
        if not files[name].startswith((b"\xff\xfe", b"\xfe\xff")):
            del files[name]
    return None if files else "no TeX file"


class JoinFiles(Step):
    """Removes comments and puts included files in their place."""

    name = "join"

    def process(self, document: Document) -> str | None:
        try:
            paper = join_files(document.metadata.pop("files"))
        except PaperError as e:
            return str(e)
        document.text = paper.text
        document.metadata["missing_files"] = len(paper.missing)
        return None


class ExpandMacros(Step):
    """Expands the macros of the paper and removes their definitions."""

    name = "macros"

    def process(self, document: Document) -> str | None:
        try:
            document.text = expand_macros(document.text)
        except ExpansionError as e:
            return str(e)
        return None


class KeepBody(Step):
    """Keeps the text from the first section on, without the bibliography."""

    name = "body"

    def __init__(self, without_section: bool):
        super().__init__()
        self.without_section = without_section

    def process(self, document: Document) -> str | None:
        body = keep_body(document.text, self.without_section)
        if body is None:
            return "no section"
        document.text = body
        return None if body else "no text"
