"""Reading of text: the files of a source (:func:`find_files`) and their documents.

A source is a folder of text, a .txt, .jsonl[.gz|.zst] or .parquet file, conversations in one of the
latter two or in .json, or the standard library of the running Python. Errors name the file and the
line.
"""

import collections
import dataclasses
import functools
import logging
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from llama_jax.data.manifest import digest
from llama_jax.io import read_json_or_empty
from llama_jax.prepare import python_library
from llama_jax.prepare.conversations import format_of, instruction_document, read_conversations
from llama_jax.prepare.records import (
    JSON,
    JSONL,
    REFUSED,
    BadLine,
    Document,
    key_of,
    not_utf8,
    read_json,
    read_lines,
    read_parquet,
)

log = logging.getLogger(__name__)

# fmt: off
TEXT = (
    ".txt", ".text", ".md", ".rst", ".tex", ".org", ".html", ".xml", ".py", ".pyi", ".c", ".h",
    ".cc", ".cpp", ".hpp", ".cu", ".rs", ".go", ".java", ".kt", ".scala", ".swift", ".js", ".ts",
    ".rb", ".php", ".pl", ".lua", ".jl", ".hs", ".ml", ".el", ".sh", ".sql", ".toml", ".yaml",
)
# fmt: on
KNOWN = f"{', '.join(JSONL)}, .json, .parquet, or text ({' '.join(TEXT[:10])} ...)"


@dataclasses.dataclass(frozen=True)
class RawSource:
    """The files of a source of text.

    Example::

      source = find_files("code", "python:code")
      documents = read_documents(source, source.files, bad_lines=Counter())
    """

    name: str
    path: str
    files: tuple[Path, ...]
    skipped: dict[str, int]
    """number of files left out, by extension"""
    skip_bad_lines: bool = False
    """leave out what cannot be used, instead of raising an error"""
    format: str = "text"
    """"text", or how the records state their messages"""

    @property
    def is_python(self) -> bool:
        """Whether the text is the standard library of Python."""
        return self.path.startswith("python:")

    @functools.cached_property
    def block_bytes(self) -> int:
        """Longer text files are split, so that a few long files give some hundred documents."""
        total = sum(f.stat().st_size for f in self.files)
        return 2**20 if len(self.files) >= 100 else min(2**16, max(2**10, total // 100))

    @functools.cached_property
    def section_blocks(self) -> int:
        """Number of consecutive blocks of a long text file in one split; 0: the whole file.

        Consecutive blocks are similar, so a file is in one split as a whole. If a file is more than
        1/50 of the source, files are divided into sections of about 1/100 of the source, at most
        1 MiB: then only the two ends of a validation section have neighbors in training.
        """
        sizes = [f.stat().st_size for f in self.files]
        if max(sizes) * 50 <= sum(sizes):
            return 0
        return max(1, min(2**20, sum(sizes) // 100) // self.block_bytes)

    @functools.cached_property
    def inputs(self) -> str:
        """Hash of the names, sizes and modification times of the files, to notice a change."""
        root = os.path.commonpath(self.files) if len(self.files) > 1 else self.files[0].parent
        stats = [(f, f.stat()) for f in self.files]
        files = [(str(f.relative_to(root)), s.st_size, s.st_mtime_ns) for f, s in stats]
        return digest([files, [self.path, sys.version] if self.is_python else []])


# Files -------------------------------------------------------------------------------------------


def find_files(
    name: str, path: str, skip_bad_lines: bool = False, format: str = "auto"
) -> RawSource:
    """The files of a source, in a fixed order.

    Args:
      name: name of the source, which is also that of its folder of shards.
      path: file, folder, or one of :data:`python_library.PATHS`.
      skip_bad_lines: leave out what cannot be used, instead of raising an error.
      format: "text", how the records state their messages, or "auto": the first record decides.

    Raises:
      ValueError: the path does not exist or has no text, or the first record has an unknown
        format.
    """
    where = f"source {name}: {path!r}"
    if not re.fullmatch(r"[\w-]+", name):
        raise ValueError(
            f"source name {name!r} must be of letters, digits, - and _ (it names a folder)"
        )
    if path in python_library.PATHS:
        root = python_library.root()
        left_out = python_library.LEFT_OUT
        files = [f for f in _files_below(root, left_out) if python_library.is_module(f)]
        if not files:
            raise ValueError(f"{where}: {root} has no .py files; give a path to text")
        format = "messages" if path == "python:instructions" else "text"
        return RawSource(name, path, tuple(files), {}, format=format)
    if path.startswith("python:"):
        raise ValueError(
            f"{where} is unknown; the embedded ones are python:code and python:prose (text), and "
            "python:instructions (conversations)"
        )
    root = Path(path)
    if path and root.is_file():
        if _reader(root) is None and not _is_json(root):
            raise ValueError(f"{where} has an unknown extension; known are {KNOWN}")
        format = _format([root], skip_bad_lines, format)
        return RawSource(name, path, (root,), {}, skip_bad_lines, format)
    if path and root.exists() and not root.is_dir():
        raise ValueError(f"{where} is not a regular file; give a file or folder")
    if not path or not root.is_dir():
        raise ValueError(
            f"{where} does not exist (looked in {Path.cwd()}); give a file or folder of text, or a "
            "folder written by python -m llama_jax.prepare"
        )
    if (of_corpus := _files_of_corpus(root, where)) is not None:
        return RawSource(name, path, of_corpus, {}, skip_bad_lines)
    # is_file() leaves out pipes, devices and broken links.
    found = [f for f in _files_below(root, set()) if f.is_file() and f.stat().st_size]
    files = [f for f in found if _reader(f) and not _is_binary(f)]
    format = _format(files or [f for f in found if _is_json(f)], skip_bad_lines, format)
    if format != "text" or not files:
        files = [f for f in found if _has_records(f)]
    skipped = collections.Counter(f.suffix or f.name for f in set(found) - set(files))
    if not files:
        raise ValueError(f"{where} has no text in {len(found)} files; known are {KNOWN}")
    if skipped:
        kinds = ", ".join(f"{count} {kind}" for kind, count in skipped.most_common(8))
        log.warning(f"{where}: skipped {skipped.total()} files that are not text: {kinds}")
    return RawSource(
        name, path, tuple(files), dict(sorted(skipped.items())), skip_bad_lines, format
    )


def _files_of_corpus(root: Path, where: str) -> tuple[Path, ...] | None:
    """The documents of a folder that ``llama-jax corpus`` wrote; None for another folder."""
    manifest = read_json_or_empty(root / "manifest.json", max_bytes=1 << 30)
    if "corpus" not in manifest:
        if (root / "work/run.json").is_file():
            raise ValueError(f"{where} is a corpus that is not complete; run its command again")
        inside = [
            f.parent for f in root.glob("*/manifest.json") if "corpus" in read_json_or_empty(f)
        ]
        if inside:
            listed = ", ".join(map(str, sorted(inside)))
            raise ValueError(f"{where} is the parent folder of corpora; give one of them: {listed}")
        return None
    files = [root / file for file, has in manifest["files"].items() if has["documents"]]
    if not files:
        raise ValueError(f"{where} is a corpus without documents")
    if missing := [file for file in files if not file.is_file()]:
        raise ValueError(f"{where} is a corpus, but {missing[0]} is missing")
    return tuple(files)


def _format(files: list[Path], skip_bad_lines: bool, format: str) -> str:
    """The format of some files: the one given, or that of the first record."""
    if format != "auto":
        return format
    if not files or not all(_has_records(f) for f in files):
        return "text"
    return format_of(files[0], skip_bad_lines)


def _has_records(file: Path) -> bool:
    return _is_json(file) or file.name.lower().endswith((*JSONL, ".parquet"))


def _is_json(file: Path) -> bool:
    return file.name.lower().endswith(JSON)


def _files_below(root: Path, leave_out: set[str]) -> list[Path]:
    def fail(e: OSError) -> None:
        raise e

    leave_out = leave_out | {"__pycache__"}
    found: list[Path] = []
    for folder, folders, names in os.walk(root, onerror=fail):
        folders[:] = sorted(f for f in folders if f not in leave_out and not f.startswith("."))
        found += [Path(folder, n) for n in sorted(names) if not n.startswith(".")]
    return found


def _reader(file: Path) -> Callable[[Path, int], Iterator[str | BadLine]] | None:
    name = file.name.lower()
    if name.endswith(JSONL):
        return _read_jsonl
    if name.endswith(".parquet"):
        return _read_parquet
    return _read_text if name.endswith(TEXT) else None


def _is_binary(file: Path) -> bool:
    if _reader(file) is not _read_text:
        return False
    with open(file, "rb") as f:
        return b"\0" in f.read(8192)


# Documents ---------------------------------------------------------------------------------------


def read_documents(
    source: RawSource, files: Iterable[Path], bad_lines: collections.Counter[str] | None = None
) -> Iterator[Document]:
    """Documents of some files of a source, without blank ones.

    Args:
      source: the source, whose ``skip_bad_lines`` says what happens to lines, rows, records and
        blocks that cannot be used.
      files: some of its files.
      bad_lines: counter to which those left out are added, by reason.

    Raises:
      ValueError: not UTF-8, damaged JSON, no text field, a bad record; names the file and line.
    """
    for file in files:
        for document in _read_file(file, source):
            if isinstance(document, BadLine):
                count_bad_line(document, source, bad_lines)
            elif document.size and not document.text.isspace():
                yield document


def count_bad_line(
    bad: BadLine, source: RawSource, bad_lines: collections.Counter[str] | None
) -> None:
    """Count what cannot be used, or raise ValueError without ``skip_bad_lines``.

    Args:
      bad: a line, row, record or block.
      source: its source.
      bad_lines: counter by reason.
    """
    if not source.skip_bad_lines:
        what = "it, or the template" if bad.reason == REFUSED else "it"
        raise ValueError(
            f"{bad.message}; correct {what}, or leave out bad lines "
            "(--skip-bad-lines, data.skip_bad_lines=true)"
        )
    if bad_lines is not None:
        bad_lines[bad.reason] += 1


def _read_file(file: Path, source: RawSource) -> Iterator[Document | BadLine]:
    if source.is_python:
        yield from _read_module(file, source.path)
        return
    if source.format != "text":
        yield from read_conversations(file, source.format)
        return
    reader = _reader(file) or _read_jsonl
    section = source.section_blocks if reader is _read_text else 1
    key: int | None = None
    for number, text in enumerate(reader(file, source.block_bytes)):
        if isinstance(text, BadLine):
            yield text
            continue
        if key is None or (section and number % section == 0):
            key = key_of(text)
        yield Document(text, key, len(text.encode()))


def _read_module(file: Path, path: str) -> Iterator[Document]:
    """The documents of a module of the standard library. The key of all is that of the code."""
    code, texts = python_library.read_module(file, path)
    key = key_of(code)
    for text in texts:
        if isinstance(text, str):
            yield Document(text, key, len(text.encode()))
        else:
            yield instruction_document(text, file, key)


def _read_text(file: Path, block_bytes: int) -> Iterator[str | BadLine]:
    with open(file, "rb") as f:
        content = f.read(max(block_bytes + 1, 8192))
        if not content:
            raise ValueError(f"{file} is empty; give a file with text")
        if b"\0" in content[:8192]:
            raise ValueError(f"{file} is binary (it has zero bytes), not text")
        start = 0
        if content.startswith(b"\xef\xbb\xbf"):  # a byte order mark
            start, content = 3, content[3:]
        while content:
            if len(content) <= block_bytes:
                content += f.read(2 * block_bytes)
            end = _block_end(content, block_bytes)
            try:
                yield content[:end].decode()
            except UnicodeDecodeError as e:
                yield not_utf8(str(file), start + e.start, e.reason)
            start, content = start + end, content[end:]


def _block_end(content: bytes, block_bytes: int) -> int:
    """End of the first block: at a blank line, else the end of a line, else a space."""
    if block_bytes >= len(content):
        return len(content)
    for mark in (b"\n\n", b"\n", b" "):
        # Not in the first half, so that blocks have about the requested size.
        if (at := content.rfind(mark, block_bytes // 2, block_bytes)) >= 0:
            return at + len(mark)
    end = block_bytes
    while end > 1 and content[end] & 0xC0 == 0x80:  # inside a UTF-8 character
        end -= 1
    return end


def _read_jsonl(file: Path, _: int) -> Iterator[str | BadLine]:
    for record in read_json(file) if _is_json(file) else read_lines(file):
        yield record if isinstance(record, BadLine) else _text_field(*record)


def _text_field(where: str, record: object) -> str | BadLine:
    if not isinstance(record, dict) or not isinstance(record.get("text"), str):
        fields = ", ".join(list(record)[:8]) if isinstance(record, dict) else ""
        found = f"fields {fields!s:.200}" if fields else f"a {type(record).__name__}"
        return BadLine("no text", f'{where} has no "text" field that is a string, only {found}')
    return _unicode(record["text"], where)


def _read_parquet(file: Path, _: int) -> Iterator[str | BadLine]:
    for record in read_parquet(file, ["text"]):
        text = record.value["text"]
        if isinstance(text, str):
            yield _unicode(text, record.where)
        else:
            yield BadLine("no text", f'{record.where}: "text" is {text!r:.40}, not a string')


def _unicode(text: str, where: str) -> str | BadLine:
    try:
        text.encode()
    except UnicodeEncodeError as e:
        return BadLine("not Unicode", f"{where}: the text is not valid Unicode ({e.reason})")
    return text
