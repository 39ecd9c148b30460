"""Where text is, and how it is read: files to documents.

In comes the path of a source (a folder of text, .txt, .jsonl[.gz|.zst], .parquet, or the standard
library of the running Python); out comes a :class:`RawSource`, the list of its files, and from
those one :class:`Document` after the other. Errors name the file and the line.
"""

import ast
import collections
import contextlib
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

log = logging.getLogger(__name__)

# fmt: off
TEXT = (
    ".txt", ".text", ".md", ".rst", ".tex", ".org", ".html", ".xml", ".py", ".pyi", ".c", ".h",
    ".cc", ".cpp", ".hpp", ".cu", ".rs", ".go", ".java", ".kt", ".scala", ".swift", ".js", ".ts",
    ".rb", ".php", ".pl", ".lua", ".jl", ".hs", ".ml", ".el", ".sh", ".sql", ".toml", ".yaml",
)
# Folders of the standard library that are tests, other people's packages, or tables (encodings:
# near-copies of one another, which would put held-out text into training).
NOT_LIBRARY = {
    "test", "tests", "idle_test", "lib2to3", "site-packages", "dist-packages", "encodings",
    "pydoc_data",
}
# fmt: on
JSONL = (".jsonl", ".jsonl.gz", ".jsonl.zst")
KNOWN = f"{', '.join(JSONL)}, .parquet, or text ({' '.join(TEXT[:10])} ...)"


class Document(NamedTuple):
    """A text and the number that decides its side of the split."""

    text: str
    key: int
    """64-bit hash of the text (docstrings: of their module); held out when under a threshold"""
    size: int
    """bytes of UTF-8"""


@dataclasses.dataclass(frozen=True)
class RawSource:
    """Files to be tokenised."""

    name: str
    path: str
    files: tuple[Path, ...]
    skipped: dict[str, int]
    """files left out, by extension"""

    @property
    def is_python(self) -> bool:
        return self.path.startswith("python:")

    @functools.cached_property
    def block_bytes(self) -> int:
        """Longer text files are cut, so that a few long files still make some hundred documents."""
        total = sum(f.stat().st_size for f in self.files)
        return 2**20 if len(self.files) >= 100 else min(2**16, max(2**10, total // 100))

    @functools.cached_property
    def inputs(self) -> str:
        """Hash of names, sizes and times of the files: it changes when the input does."""
        root = os.path.commonpath(self.files) if len(self.files) > 1 else self.files[0].parent
        stats = [(f, f.stat()) for f in self.files]
        files = [(str(f.relative_to(root)), s.st_size, s.st_mtime_ns) for f, s in stats]
        return digest([files, [self.path, sys.version] if self.is_python else []])


def digest(content: Any) -> str:
    """Hash of plain values: nested lists, dicts, numbers and strings."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


# Where text is -----------------------------------------------------------------------------------


def find_files(name: str, path: str) -> RawSource:
    """The files of a source, in a fixed order.

    Raises:
      ValueError: nothing there, or nothing that is text.
    """
    where = f"source {name}: {path!r}"
    if not re.fullmatch(r"[\w-]+", name):
        raise ValueError(
            f"source name {name!r} must be of letters, digits, - and _ (it is a folder)"
        )
    if path in ("python:code", "python:prose"):
        root = Path(sysconfig.get_path("stdlib"))
        files = [f for f in _walk(root, NOT_LIBRARY) if f.suffix == ".py"]
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
        return RawSource(name, path, (root,), {})
    if not path or not root.is_dir():
        raise ValueError(f"{where} does not exist (looked in {Path.cwd()}); give a file or folder")
    found = [f for f in _walk(root, set()) if f.stat().st_size]
    files = [f for f in found if _reader(f) and not _is_binary(f)]
    skipped = collections.Counter(f.suffix or f.name for f in set(found) - set(files))
    if not files:
        raise ValueError(f"{where} has no text in {len(found)} files; known are {KNOWN}")
    if skipped:
        kinds = ", ".join(f"{count} {kind}" for kind, count in skipped.most_common(8))
        log.warning(f"{where}: skipped {skipped.total()} files that are not text: {kinds}")
    return RawSource(name, path, tuple(files), dict(sorted(skipped.items())))


def _walk(root: Path, leave_out: set[str]) -> list[Path]:
    def fail(e: OSError) -> None:
        raise e

    leave_out = leave_out | {"__pycache__"}
    found: list[Path] = []
    for folder, folders, names in os.walk(root, onerror=fail):
        folders[:] = sorted(f for f in folders if f not in leave_out and not f.startswith("."))
        found += [Path(folder, n) for n in sorted(names) if not n.startswith(".")]
    return found


def _reader(file: Path) -> Callable[[Path, int], Iterator[str]] | None:
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


# Text to documents -------------------------------------------------------------------------------


def read_documents(source: RawSource, files: Iterable[Path]) -> Iterator[Document]:
    """Documents of some files of a source; blank ones are left out.

    Raises:
      ValueError: not UTF-8 text, broken JSON, no text field; names the file and line.
    """
    for file in files:
        if source.is_python:
            documents: Iterable[Document] = _read_module(file, source.path == "python:prose")
        else:
            reader = _reader(file)
            assert reader is not None
            documents = (_document(text, text) for text in reader(file, source.block_bytes))
        yield from (d for d in documents if d.size and not d.text.isspace())


def _document(text: str, of_key: str) -> Document:
    key = hashlib.blake2b(of_key.encode(), digest_size=8).digest()
    return Document(text, int.from_bytes(key, "little"), len(text.encode()))


def _read_text(file: Path, block_bytes: int) -> Iterator[str]:
    content = file.read_bytes()
    if not content:
        raise ValueError(f"{file} is empty; give a file with text")
    if b"\0" in content[:8192]:
        raise ValueError(f"{file} is binary (it has zero bytes), not text")
    start = 3 if content.startswith(b"\xef\xbb\xbf") else 0  # a byte order mark
    while start < len(content):
        end = _cut(content, start, block_bytes)
        try:
            yield content[start:end].decode()
        except UnicodeDecodeError as e:
            raise ValueError(
                f"{file} is not UTF-8 text (byte {start + e.start}: {e.reason}); "
                "convert it, for example with iconv"
            ) from None
        start = end


def _cut(content: bytes, start: int, block_bytes: int) -> int:
    """End of the block that begins at ``start``: at a blank line, else a line, else a space."""
    limit = start + block_bytes
    if limit >= len(content):
        return len(content)
    for mark in (b"\n\n", b"\n", b" "):
        # Not in the first half: blocks keep to about the size asked for.
        if (at := content.rfind(mark, start + block_bytes // 2, limit)) >= 0:
            return at + len(mark)
    while limit > start + 1 and content[limit] & 0xC0 == 0x80:  # inside a UTF-8 character
        limit -= 1
    return limit


def _read_jsonl(file: Path, _: int) -> Iterator[str]:
    number = 0
    try:
        with _open_lines(file) as lines:
            for number, line in enumerate(lines, 1):
                if not line.isspace():
                    yield _json_text(line, f"{file} line {number}")
    except (OSError, EOFError, zlib.error) as e:
        raise ValueError(f"{file} is damaged after line {number}: {e}") from None
    if not number:
        raise ValueError(f"{file} is empty; give a file with text")


def _open_lines(file: Path) -> contextlib.AbstractContextManager[Iterable[bytes]]:
    if file.suffix.lower() == ".gz":
        return gzip.open(file)
    if file.suffix.lower() == ".zst":
        import pyarrow

        # The package zstandard ends a truncated file without an error; pyarrow raises.
        return io.BufferedReader(pyarrow.CompressedInputStream(str(file), "zstd"), 2**16)
    return open(file, "rb")


def _json_text(line: bytes, where: str) -> str:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{where} is not JSON: {e}") from None
    if not isinstance(record, dict) or not isinstance(record.get("text"), str):
        fields = f"fields {', '.join(record)}" if isinstance(record, dict) else f"{record!r:.40}"
        raise ValueError(f'{where} has no "text" field that is a string, only {fields}')
    return _unicode(record["text"], where)


def _read_parquet(file: Path, _: int) -> Iterator[str]:
    import pyarrow
    from pyarrow import parquet

    row = 0
    try:
        with parquet.ParquetFile(file) as table:
            names = table.schema_arrow.names
            if "text" not in names:
                raise ValueError(f'{file} has no "text" column, only {", ".join(names)}')
            for batch in table.iter_batches(batch_size=256, columns=["text"]):
                for text in batch.column(0).to_pylist():
                    row += 1
                    if not isinstance(text, str):
                        raise ValueError(f'{file} row {row}: "text" is {text!r:.40}, no string')
                    yield text
    except (pyarrow.ArrowException, OSError) as e:
        raise ValueError(f"{file} is no parquet file, or damaged after row {row}: {e}") from None


def _unicode(text: str, where: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise ValueError(f"{where}: the text is not valid Unicode ({e.reason})") from None
    return text


@functools.lru_cache(maxsize=4096)
def _read_module(file: Path, prose: bool) -> tuple[Document, ...]:
    """The code or the docstrings of a module. The code decides on which side both are."""
    try:
        with tokenize.open(file) as f:
            code = f.read()
        text = "\n\n".join(_docstrings(ast.parse(code))) if prose else code
    except (SyntaxError, UnicodeDecodeError):  # some installations have broken files, as examples
        return ()
    return (_document(text, of_key=code),)


def _docstrings(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        text = inspect.cleandoc(ast.get_docstring(node, clean=False) or "")
        if text:
            yield text
    for field in ("body", "orelse", "handlers", "finalbody"):  # definitions are statements
        children = getattr(node, field, None)
        for child in children if isinstance(children, list) else ():
            yield from _docstrings(child)
