"""GitHub: source files under permissive licenses, filtered by RedPajama's heuristics, each once.

The input is rows of BigQuery's ``github_repos`` (JSON lines or Parquet with ``path``,
``repo_name``, ``license`` and ``content``), or folders with checkouts.
"""

import json
import re
import string
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pydantic
from datatrove.data import Document

from llama_jax.corpus.files import Unreadable, lines, open_stream
from llama_jax.corpus.github_duplicates import (
    DropDuplicates,
    WriteHashes,
    content_hash,
    find_duplicates,
)
from llama_jax.corpus.github_header import extension, remove_header
from llama_jax.corpus.github_license import is_license_file, is_wanted, licenses_by_folder
from llama_jax.corpus.inputs import FIRST_BYTES
from llama_jax.corpus.run import Run, group_files
from llama_jax.corpus.steps import Documents, Reader, Stage, Step, drop

FILES_PER_TASK = 2000
TASK_BYTES = 64 << 20

_COLUMNS = {  # of the full tables, and of BigQuery's samples
    "path": ("path", "sample_path"),
    "repo_name": ("repo_name", "sample_repo_name"),
    "license": ("license",),
    "content": ("content",),
}
_LETTERS, _DIGITS = string.ascii_letters.encode(), string.digits.encode()
# Pieces of about the size of a tokenizer's tokens: words, digits, runs of punctuation.
_TOKENS = re.compile(r"[^\W\d_]+|\d|_+|[^\w\s]+")


class Settings(pydantic.BaseModel, extra="forbid", frozen=True):
    """See ``configs/corpus/github.toml``."""

    licenses: tuple[str, ...]
    max_file_bytes: int = pydantic.Field(gt=0)
    max_line: int = pydantic.Field(gt=0)
    max_mean_line: float = pydantic.Field(gt=0)
    min_alphanumeric: float = pydantic.Field(ge=0, le=1)
    min_letters_per_token: float = pydantic.Field(ge=0)
    extensions: dict[str, tuple[str, ...]]


def looks_like(first_bytes: bytes, name: str) -> bool:
    return _is_rows(first_bytes) or is_license_file(name) or extension(name) in _COMMON_EXTENSIONS


_COMMON_EXTENSIONS = {
    ".py", ".c", ".h", ".cpp", ".hpp", ".cc", ".cs", ".css", ".go", ".hs", ".java", ".jl", ".js",
    ".lua", ".php", ".pl", ".pm", ".ps1", ".rb", ".rs", ".scala", ".sh", ".sql", ".ts", ".tsx",
    ".vb", ".f90", ".m",
}  # fmt: skip


def stages(run: Run) -> Iterator[Stage]:
    """Filters the files, then drops copies of earlier files."""
    tables, sources = [], {}
    for path, name in zip(run.inputs, run.names, strict=True):
        if _has_rows(path):
            tables.append(path)
        else:
            sources[path] = name
    groups = [[path] for path in tables] + group_files(sources, TASK_BYTES, FILES_PER_TASK)
    licenses = licenses_by_folder({name: path for path, name in sources.items()})
    folder = run.folder("hashes")
    steps = [
        SourceFiles(groups, sources, licenses, run.settings.max_file_bytes),
        License(run.settings.licenses),
        Extension(run.settings.extensions),
        Header(),
        Heuristics(run.settings),
        WriteHashes(folder),
    ]
    yield Stage("files", steps, len(groups))
    find_duplicates(folder, len(groups))
    groups = [[path] for path in run.documents("files")]
    yield Stage("unique", [Documents(groups), DropDuplicates(folder)], len(groups), final=True)


def _has_rows(path: Path) -> bool:
    try:
        return _is_rows(open_stream(path).peek(FIRST_BYTES))
    except Unreadable:
        return False


def _is_rows(first_bytes: bytes) -> bool:
    """Whether a file is Parquet, or starts with a JSON object of a row."""
    if first_bytes.startswith(b"PAR1"):
        return True
    start = first_bytes.lstrip(b"\xef\xbb\xbf \t\r\n")
    keys = [rb'"(?:sample_)?path"\s*:', rb'"(?:content|license|repo_name|sample_repo_name)"\s*:']
    if len(first_bytes) >= FIRST_BYTES and b"\n" not in start:  # the path is after a long content
        keys = [rb'"content"\s*:']
    return start.startswith(b"{") and all(re.search(key, start) for key in keys)


class SourceFiles(Reader):
    """Reads rows of tables, and files of checkouts.

    Args:
        groups: See `Reader`.
        sources: The names of files of checkouts; the other files have rows.
        licenses: The license of each folder of the checkouts that states one.
        max_file_bytes: A larger source file is skipped.
    """

    def __init__(
        self,
        groups: Sequence[Sequence[Path]],
        sources: Mapping[Path, str],
        licenses: Mapping[str, str],
        max_file_bytes: int,
    ):
        super().__init__(groups)
        self.sources, self.licenses, self.max_file_bytes = sources, licenses, max_file_bytes

    def read(self, path: Path) -> Iterator[Document]:
        if path in self.sources:
            yield self._source_file(path)
        elif open_stream(path).peek(4) == b"PAR1":
            yield from self._parquet_rows(path)
        else:
            yield from self._json_rows(path)

    def _source_file(self, path: Path) -> Document:
        name = self.sources[path]
        folders = name.split("/")[:-1]
        above = ["/".join(folders[: i + 1]) for i in range(len(folders))]
        stated = [folder for folder in above if folder in self.licenses]
        root = stated[0] if stated else above[0] if above else ""
        inside = name[len(root) :].lstrip("/")
        # Files of a third party have its license too: each one must be permissive.
        license_name = " and ".join(dict.fromkeys(self.licenses[folder] for folder in stated))
        row = {
            "path": inside,
            "repo_name": root,
            "license": license_name or None,
            "on_github": False,  # a folder, not a repository
        }
        try:
            # Not decompressed: a compressed file is no source.
            with path.open("rb") as file:
                data = file.read(self.max_file_bytes + 1)
        except OSError as e:
            return self.skipped(name, f"unreadable: {e.strerror}")
        if len(data) > self.max_file_bytes:
            return drop(_document(row, name), "read", self._too_large())
        try:
            return _document({**row, "content": data.decode("utf-8")}, name)
        except UnicodeDecodeError:
            return drop(_document(row, name), "read", "not UTF-8 text")

    def _too_large(self) -> str:
        return f"larger than {self.max_file_bytes:,} bytes"

    def _json_rows(self, path: Path) -> Iterator[Document]:
        limit = 7 * self.max_file_bytes  # JSON writes a control character as six
        for number, line in enumerate(lines(open_stream(path), limit), 1):
            place = f"{path.name}: line {number}"
            if isinstance(line, Unreadable):
                yield self.skipped(line.place, line.reason)
            elif line.strip():
                try:
                    row = json.loads(line.decode("utf-8-sig"))
                except (ValueError, RecursionError):
                    yield self.skipped(place, "not JSON in UTF-8")
                    continue
                yield self._row(row, place)

    def _parquet_rows(self, path: Path) -> Iterator[Document]:
        import pyarrow.parquet as pq

        with pq.ParquetFile(path) as table:
            known = [name for names in (*_COLUMNS.values(), ("binary",)) for name in names]
            columns = [name for name in table.schema_arrow.names if name in known]
            number = 0
            for batch in table.iter_batches(batch_size=256, columns=columns):
                for row in batch.to_pylist():
                    number += 1
                    yield self._row(row, f"{path.name}: row {number}")

    def _row(self, row: Any, place: str) -> Document:
        if not isinstance(row, dict):
            return self.skipped(place, "not a JSON object")
        fields = {
            key: next((row[name] for name in names if row.get(name) is not None), None)
            for key, names in _COLUMNS.items()
        }
        if not all(isinstance(fields[key], str) for key in ("path", "repo_name")):
            return self.skipped(place, "a row without path or repo_name")
        document = _document(fields, place)
        if row.get("binary") in (True, "true") or not isinstance(fields["content"], str):
            return drop(document, "read", "binary or without content")
        if len(fields["content"].encode("utf-8", "surrogatepass")) > self.max_file_bytes:
            return drop(document, "read", self._too_large())
        return document


def _document(row: Mapping[str, Any], place: str) -> Document:
    repo, path = row["repo_name"], row["path"]
    known = row.get("on_github", True) and repo.count("/") == 1
    url = f"https://github.com/{repo}/blob/HEAD/{quote(path, errors='replace')}" if known else None
    content = row.get("content")
    metadata = {
        "source": "github",
        "url": url,
        "language": None,
        "scores": {},
        "license": row["license"],
        "place": place,
    }
    if isinstance(content, str):
        metadata["hash"] = content_hash(content)
    text = content if isinstance(content, str) else ""
    return Document(text=text, id=f"github/{repo}/{path}", metadata=metadata)


class License(Step):
    """Keeps files of repositories with a permissive license."""

    name = "license"

    def __init__(self, licenses: Sequence[str]):
        super().__init__()
        self.licenses = tuple(licenses)

    def process(self, document: Document) -> str | None:
        name = document.metadata["license"]
        names = name if isinstance(name, list) else [name]
        if not any(names):
            return "no license found"
        wanted = all(isinstance(one, str) and is_wanted(one, self.licenses) for one in names)
        return None if wanted else "another license"


class Extension(Step):
    """Keeps files of the languages that are wanted."""

    name = "extension"

    def __init__(self, extensions: Mapping[str, Sequence[str]]):
        super().__init__()
        self.languages = {name: lang for lang, names in extensions.items() for name in names}

    def process(self, document: Document) -> str | None:
        language = self.languages.get(extension(document.id))
        if language is None:
            return "extension not in the list"
        document.metadata["programming_language"] = language
        return None


class Header(Step):
    """Removes comments with a statement of rights from the start of files."""

    name = "header"

    def process(self, document: Document) -> str | None:
        document.text = remove_header(document.text, document.id)
        return None if document.text.strip() else "empty"


class Heuristics(Step):
    """Drops files that are generated, minified or data."""

    name = "heuristics"

    def __init__(self, settings: Settings):
        super().__init__()
        self.settings = settings

    def process(self, document: Document) -> str | None:
        text, limits = document.text, self.settings
        lengths = [len(line) for line in text.splitlines()]
        if max(lengths) > limits.max_line:
            return f"a line of more than {limits.max_line} characters"
        if sum(lengths) / len(lengths) > limits.max_mean_line:
            return f"lines of more than {limits.max_mean_line:g} characters on average"
        if _count(text, _LETTERS + _DIGITS, str.isalnum) < limits.min_alphanumeric * len(text):
            return f"less than {limits.min_alphanumeric:.0%} letters and digits"
        per_token = limits.min_letters_per_token
        letters = _count(text, _LETTERS, str.isalpha)
        if per_token and letters < per_token * len(_TOKENS.findall(text)):
            return f"less than {per_token:g} letters per token"
        return None


def _count(text: str, ascii_characters: bytes, is_counted: Callable[[str], bool]) -> int:
    """Number of characters of a kind, with the fast way for those in ASCII."""
    data = text.encode("ascii", "ignore")
    found = len(data) - len(data.translate(None, ascii_characters))
    if len(data) < len(text):
        found += sum(map(is_counted, re.sub(r"[\x00-\x7f]+", "", text)))
    return found
