"""Reading of text: the files of a source (:func:`find_files`) and their documents.

A source is a folder of text, a .txt, .jsonl[.gz|.zst] or .parquet file, or the standard library of
the running Python. Errors name the file and the line.
"""

import ast
import collections
import dataclasses
import functools
import gzip
import hashlib
import inspect
import io
import json
import logging
import os
import re
import sys
import sysconfig
import tokenize
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from llama_jax.data.manifest import digest

log = logging.getLogger(__name__)

# fmt: off
TEXT = (
    ".txt", ".text", ".md", ".rst", ".tex", ".org", ".html", ".xml", ".py", ".pyi", ".c", ".h",
    ".cc", ".cpp", ".hpp", ".cu", ".rs", ".go", ".java", ".kt", ".scala", ".swift", ".js", ".ts",
    ".rb", ".php", ".pl", ".lua", ".jl", ".hs", ".ml", ".el", ".sh", ".sql", ".toml", ".yaml",
)
# Folders of the standard library that are tests, installed packages, or tables. The tables in
# encodings are near-copies of one another: validation text would be in training.
_NOT_LIBRARY = {
    "test", "tests", "idle_test", "lib2to3", "site-packages", "dist-packages", "encodings",
    "pydoc_data",
}
# fmt: on
JSONL = (".jsonl", ".jsonl.gz", ".jsonl.zst")
_MAX_LINE_BYTES = 2**28
"""Longest line of a .jsonl file; several copies of a line are in memory."""
KNOWN = f"{', '.join(JSONL)}, .parquet, or text ({' '.join(TEXT[:10])} ...)"


class Document(NamedTuple):
    """A text and the key that decides its split."""

    text: str
    key: int
    """64-bit hash of the text; for docstrings of their module; for a block of a long text file of
    the first block of its section"""
    size: int
    """bytes of UTF-8"""


class BadLine(NamedTuple):
    """A line, row or block that cannot be used."""

    reason: str
    """kind of problem, for counting"""
    message: str
    """place and problem"""


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


def find_files(name: str, path: str, skip_bad_lines: bool = False) -> RawSource:
    """The files of a source, in a fixed order.

    Args:
      name: name of the source, which is also that of its folder of shards.
      path: file, folder, "python:code" or "python:prose".
      skip_bad_lines: leave out what cannot be used, instead of raising an error.

    Raises:
      ValueError: the path does not exist, or has no text.
    """
    where = f"source {name}: {path!r}"
    if not re.fullmatch(r"[\w-]+", name):
        raise ValueError(
            f"source name {name!r} must be of letters, digits, - and _ (it names a folder)"
        )
    if path in ("python:code", "python:prose"):
        root = Path(sysconfig.get_path("stdlib"))
        files = [f for f in _files_below(root, _NOT_LIBRARY) if f.suffix == ".py"]
        files = [f for f in files if not f.name.startswith("_sysconfigdata")]
        if not files:
            raise ValueError(f"{where}: {root} has no .py files; give a path to text")
        return RawSource(name, path, tuple(files), {})
    if path.startswith("python:"):
        raise ValueError(f"{where} is unknown; the embedded ones are python:code and python:prose")
    root = Path(path)
    if path and root.is_file():
        if _reader(root) is None:
            raise ValueError(f"{where} has an unknown extension; known are {KNOWN}")
        return RawSource(name, path, (root,), {}, skip_bad_lines)
    if path and root.exists() and not root.is_dir():
        raise ValueError(f"{where} is not a regular file; give a file or folder")
    if not path or not root.is_dir():
        raise ValueError(
            f"{where} does not exist (looked in {Path.cwd()}); give a file or folder of text, or a "
            "folder written by python -m llama_jax.prepare"
        )
    # is_file() leaves out pipes, devices and broken links.
    found = [f for f in _files_below(root, set()) if f.is_file() and f.stat().st_size]
    files = [f for f in found if _reader(f) and not _is_binary(f)]
    skipped = collections.Counter(f.suffix or f.name for f in set(found) - set(files))
    if not files:
        raise ValueError(f"{where} has no text in {len(found)} files; known are {KNOWN}")
    if skipped:
        kinds = ", ".join(f"{count} {kind}" for kind, count in skipped.most_common(8))
        log.warning(f"{where}: skipped {skipped.total()} files that are not text: {kinds}")
    return RawSource(name, path, tuple(files), dict(sorted(skipped.items())), skip_bad_lines)


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
      source: the source, whose ``skip_bad_lines`` says what happens to lines, rows and blocks that
        cannot be used.
      files: some of its files.
      bad_lines: counter to which those left out are added, by reason.

    Raises:
      ValueError: not UTF-8, damaged JSON, no text field; names the file and line.
    """
    for file in files:
        prose = source.path == "python:prose"
        for document in _module(file, prose) if source.is_python else _read_file(file, source):
            if isinstance(document, BadLine):
                if not source.skip_bad_lines:
                    raise ValueError(
                        f"{document.message}; correct it, or leave out bad lines "
                        "(--skip-bad-lines, data.skip_bad_lines=true)"
                    )
                if bad_lines is not None:
                    bad_lines[document.reason] += 1
            elif document.size and not document.text.isspace():
                yield document


def _read_file(file: Path, source: RawSource) -> Iterator[Document | BadLine]:
    reader = _reader(file)
    assert reader is not None
    section = source.section_blocks if reader is _read_text else 1
    key: int | None = None
    for number, text in enumerate(reader(file, source.block_bytes)):
        if isinstance(text, BadLine):
            yield text
            continue
        if key is None or (section and number % section == 0):
            key = _key(text)
        yield Document(text, key, len(text.encode()))


def _key(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


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
                yield BadLine(
                    "not UTF-8",
                    f"{file} is not UTF-8 text (byte {start + e.start}: {e.reason})",
                )
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
    number = 0
    try:
        with _open_lines(file) as lines:
            while line := lines.readline(_MAX_LINE_BYTES + 1):
                number += 1
                if len(line) > _MAX_LINE_BYTES:
                    raise ValueError(
                        f"{file} line {number} is longer than {_MAX_LINE_BYTES:,} bytes; split it"
                    )
                if not line.isspace():
                    yield _json_text(line, f"{file} line {number}")
    except (OSError, EOFError, zlib.error) as e:
        raise ValueError(f"{file} is damaged after line {number}: {e}") from None
    if not number:
        raise ValueError(f"{file} is empty; give a file with text")


def _open_lines(file: Path) -> Any:
    if file.suffix.lower() == ".gz":
        return gzip.open(file)
    if file.suffix.lower() == ".zst":
        import pyarrow

        # pyarrow raises for a truncated file; the package zstandard does not.
        return io.BufferedReader(pyarrow.CompressedInputStream(str(file), "zstd"), 2**16)
    return open(file, "rb")


def _json_text(line: bytes, where: str) -> str | BadLine:
    try:
        record = json.loads(line)
    except RecursionError:
        return BadLine("not JSON", f"{where} is not JSON: nested too deeply")
    except ValueError as e:
        return BadLine("not JSON", f"{where} is not JSON: {e}")
    if not isinstance(record, dict) or not isinstance(record.get("text"), str):
        fields = ", ".join(list(record)[:8]) if isinstance(record, dict) else ""
        found = f"fields {fields!s:.200}" if fields else f"a {type(record).__name__}"
        return BadLine("no text", f'{where} has no "text" field that is a string, only {found}')
    return _unicode(record["text"], where)


def _read_parquet(file: Path, _: int) -> Iterator[str | BadLine]:
    import pyarrow
    from pyarrow import parquet

    row = 0
    try:
        with parquet.ParquetFile(file) as table:
            names = table.schema_arrow.names
            if "text" not in names:
                raise ValueError(f'{file} has no "text" column, only {", ".join(names[:8])}')
            for batch in table.iter_batches(batch_size=64, columns=["text"]):
                for text in batch.column(0).to_pylist():
                    row += 1
                    if isinstance(text, str):
                        yield _unicode(text, f"{file} row {row}")
                    else:
                        found = f'{file} row {row}: "text" is {text!r:.40}, not a string'
                        yield BadLine("no text", found)
    except (pyarrow.ArrowException, OSError) as e:
        raise ValueError(
            f"{file} is not a parquet file, or is damaged after row {row}: {e}"
        ) from None


def _unicode(text: str, where: str) -> str | BadLine:
    try:
        text.encode()
    except UnicodeEncodeError as e:
        return BadLine("not Unicode", f"{where}: the text is not valid Unicode ({e.reason})")
    return text


@functools.lru_cache(maxsize=4096)
def _module(file: Path, prose: bool) -> tuple[Document, ...]:
    """The code or the docstrings of a module. The key of both is that of the code."""
    try:
        with tokenize.open(file) as f:
            code = f.read()
        text = "\n\n".join(_docstrings(ast.parse(code))) if prose else code
    except (SyntaxError, UnicodeDecodeError):  # the standard library has some invalid files
        return ()
    return (Document(text, _key(code), len(text.encode())),)


def _docstrings(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        text = inspect.cleandoc(ast.get_docstring(node, clean=False) or "")
        if text:
            yield text
    for field in ("body", "orelse", "handlers", "finalbody"):  # definitions are statements
        children = getattr(node, field, None)
        for child in children if isinstance(children, list) else ():
            yield from _docstrings(child)
