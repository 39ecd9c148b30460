"""Books of Project Gutenberg or PG-19: texts without what Gutenberg added, each book once."""

import functools
import io
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pydantic
from datatrove.data import Document

from llama_jax.corpus.archives import Member, members
from llama_jax.corpus.books_gutenberg import remove_gutenberg
from llama_jax.corpus.containment import (
    Samples,
    contained_texts,
    distinct_hashes,
    find_candidates,
    sample,
    sampling_rate,
)
from llama_jax.corpus.decode import try_decode
from llama_jax.corpus.files import Unreadable, lines
from llama_jax.corpus.run import Run
from llama_jax.corpus.steps import Documents, Reader, Stage, Step, is_dropped
from llama_jax.io import atomic_write

_MAX_BOOK_BYTES = 64 << 20
_COMPRESSED = re.compile(r"(?i)\.(?:zip|gz|bz2|xz|zst|7z)$")
_TEXT = re.compile(r"(?i)(?:\.(?:txt|text|utf-?8)|^[^.]+)$")


class Settings(pydantic.BaseModel, extra="forbid", frozen=True):
    """See ``configs/corpus/books.toml``."""

    max_containment: float = pydantic.Field(gt=0, le=1)
    ngram: int = pydantic.Field(ge=1, le=100)
    task_bytes: int = pydantic.Field(gt=0)


# Names of 7z files of Wikipedia and StackExchange.
_OTHER_DUMPS = re.compile(
    "wiki|stackexchange|overflow|serverfault|superuser|askubuntu|stackapps|posts", re.IGNORECASE
)


def looks_like(first_bytes: bytes, name: str) -> bool:
    stem = _COMPRESSED.sub("", name).lower()
    if stem.endswith((".jsonl", ".json")):
        return first_bytes.lstrip().startswith(b"{") and b'"text"' in first_bytes
    if name.lower().endswith(".7z"):
        return not _OTHER_DUMPS.search(name)
    is_archive = stem.endswith((".tar", ".tgz")) or name.lower().endswith(".zip")
    return is_archive or bool(_TEXT.search(stem))


def stages(run: Run) -> Iterator[Stage]:
    """Reads books and samples their n-grams; compares candidates; drops contained books."""
    settings = run.settings
    groups = _groups(run.inputs, settings.task_bytes)
    names = dict(zip(run.inputs, run.names, strict=True))
    size = sum(path.stat().st_size * (3 if _COMPRESSED.search(path.name) else 1) for path in names)
    samples = run.folder("samples")
    steps = [
        Books(groups, names),
        Gutenberg(run.languages),
        SampleNgrams(samples, settings.ngram, sampling_rate(size)),
    ]
    yield Stage("books", steps, len(groups))

    groups = [[path] for path in run.documents("books")]
    found, first = _read_samples(samples, len(groups))
    candidates = find_candidates(found)
    hashes = run.folder("ngrams")
    wanted = {i for pair in candidates for i in pair}
    tasks = [t for t in range(len(groups)) if wanted & set(range(first[t], first[t + 1]))]
    if tasks:
        step = WriteNgrams([first[t] for t in tasks], wanted, hashes, settings.ngram)
        yield Stage("ngrams", [Documents([groups[t] for t in tasks]), step], len(tasks))

    @functools.lru_cache(maxsize=64)
    def hashes_of(book: int) -> np.ndarray:
        return np.load(_ngrams_file(hashes, book))

    contained = contained_texts(candidates, found.ranks(), hashes_of, settings.max_containment)
    copies = {found.ids[i]: (found.ids[kept], share) for i, (kept, share) in contained.items()}
    reason = f"over {settings.max_containment} of its {settings.ngram}-grams are in a longer book"
    steps = [Documents(groups), DropContained(copies, reason)]
    yield Stage("deduplicate", steps, len(groups), final=True)


def _groups(inputs: Sequence[Path], task_bytes: int) -> list[list[Path]]:
    groups: list[list[Path]] = []
    size = task_bytes
    for path in inputs:
        if size >= task_bytes:
            groups.append([])
            size = 0
        groups[-1].append(path)
        size += path.stat().st_size
    return groups


class Books(Reader):
    """Reads text files, also in archives, and JSON lines.

    Args:
        groups: See `Reader`.
        names: Names of the files, for ids.
    """

    def __init__(self, groups: Sequence[Sequence[Path]], names: Mapping[Path, str]):
        super().__init__(groups)
        self.names = names

    def read(self, path: Path) -> Iterator[Document]:
        seen: Counter[str] = Counter()  # a tar may have several members of one name
        for member in members(path):
            if isinstance(member, Unreadable):
                yield self.skipped(member.place, member.reason)
                continue
            name = self.names[path]
            stem = _COMPRESSED.sub("", member.name).rpartition("/")[2]
            if member.name != path.name and member.name != _COMPRESSED.sub("", path.name):
                name += f"/{member.name}"
                seen[member.name] += 1
                if seen[member.name] > 1:  # ids are unique
                    name += f"#{seen[member.name]}"
            if re.search(r"(?i)\.(?:jsonl?|ndjson)$", stem):
                yield from self._json_lines(member, name)
            elif _TEXT.search(stem):
                yield self._text(member, name)
            else:
                yield self.skipped(member.place, "not a text file")

    def _text(self, member: Member, name: str) -> Document:
        try:
            text = _decode(member.stream.read_all(_MAX_BOOK_BYTES))
        except Unreadable as e:
            return self.skipped(e.place, e.reason)
        except ValueError:
            return self.skipped(member.place, "not a text file")
        return Document(text=text, id=f"books/{name}", metadata=_metadata(member.place, {}))

    def _json_lines(self, member: Member, name: str) -> Iterator[Document]:
        for number, line in enumerate(lines(member.stream, _MAX_BOOK_BYTES), 1):
            if isinstance(line, Unreadable):
                yield self.skipped(line.place, line.reason)
                continue
            place = f"{member.place}: line {number}"
            try:
                record = json.loads(line)
                text = record["text"]
            except (ValueError, KeyError, TypeError, RecursionError):
                record = text = None
            if not isinstance(text, str):
                yield self.skipped(place, "not a JSON object with a text")
                continue
            metadata = _metadata(
                place, {**_dict(record, "meta"), **_dict(record, "metadata"), **record}
            )
            yield Document(text=text, id=f"books/{name}/{number}", metadata=metadata)


def _dict(record: dict[str, Any], key: str) -> dict[str, Any]:
    return value if isinstance(value := record.get(key), dict) else {}


def _metadata(place: str, record: Mapping[str, Any]) -> dict[str, Any]:
    def text(*keys: str) -> str | None:
        return next((v for key in keys if isinstance(v := record.get(key), str) and v), None)

    return {
        "source": "books",
        "url": text("url"),
        "language": text("language"),
        "scores": {},
        "title": text("title", "short_book_title"),
        "author": text("author", "authors"),
        "place": place,
    }


def _decode(content: bytes) -> str:
    """Text in UTF-8 (a little may be invalid), UTF-16 with a byte order mark, or the encodings of
    old Gutenberg files.

    Raises:
        ValueError: Not a text.
    """
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        return content.decode("utf-16")
    if (
        b"\0" in content[: 1 << 16]
        or content.startswith(b"%PDF")
        or b"<html" in content[:1024].lower()
    ):
        raise ValueError("not a text file")
    for encoding in ("utf-8-sig", "cp1252"):
        if (text := try_decode(content, encoding)) is not None:
            return text
    return content.decode("latin-1")


class Gutenberg(Step):
    """Removes headers and footers of Project Gutenberg, and takes title and language from them.

    Args:
        languages: If not empty, books known to be in another language are dropped.
    """

    name = "gutenberg"

    def __init__(self, languages: Sequence[str]):
        super().__init__()
        self.languages = tuple(languages)

    def process(self, document: Document) -> str | None:
        metadata = document.metadata
        text = document.text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
        book = remove_gutenberg(text.replace("\f", "\n"))
        text = re.sub(r"(?<![ \t])[ \t]+$", "", book.text, flags=re.MULTILINE)
        document.text = re.sub(r"\n{4,}", "\n\n\n", text).strip("\n")
        for key in ("title", "author", "language"):
            metadata[key] = metadata[key] or getattr(book, key)
        stem = document.id.rpartition("/")[2].removesuffix(".txt")
        number = book.number or (
            stem if stem.isdecimal() and document.id.endswith(".txt") else None
        )
        if number and not metadata["url"]:
            metadata["url"] = f"https://www.gutenberg.org/ebooks/{number}"
        if not document.text.strip():
            return "no text"
        if self.languages and metadata["language"] not in (None, *self.languages):
            return "in a language that is not wanted"
        return None


class SampleNgrams(Step):
    """Writes a sample of the n-grams of a task's books.

    Args:
        folder: Where.
        ngram: Words of an n-gram.
        rate: One of how many n-grams is sampled.
    """

    name = "sample"

    def __init__(self, folder: Path, ngram: int, rate: int):
        super().__init__()
        self.folder, self.ngram, self.rate = folder, ngram, rate

    def prepare(self, rank: int) -> None:
        self.books: list[tuple[str, int, np.ndarray]] = []

    def process(self, document: Document) -> str | None:
        hashes = distinct_hashes(document.text, self.ngram)
        self.books.append((document.id, len(hashes), sample(hashes, self.rate)))
        return None

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        yield from super().run(data, rank, world_size)
        content = io.BytesIO()
        ids, sizes, samples = zip(*self.books, strict=True) if self.books else ((), (), ())
        np.savez(
            content,
            ids=np.frombuffer(json.dumps(ids).encode(), np.uint8),
            sizes=np.array(sizes, np.int64),
            counts=np.array([len(hashes) for hashes in samples], np.int64),
            hashes=np.concatenate([np.zeros(0, np.uint64), *samples]),
        )
        atomic_write(self.folder / f"{rank:05d}.npz", content.getvalue())


def _read_samples(folder: Path, tasks: int) -> tuple[Samples, np.ndarray]:
    """The samples of all books, and the number of books before each task."""
    files = [np.load(folder / f"{task:05d}.npz") for task in range(tasks)]
    ids = [json.loads(file["ids"].tobytes()) for file in files]
    arrays = {
        key: np.concatenate([file[key] for file in files]) for key in ("sizes", "counts", "hashes")
    }
    samples = Samples([i for task in ids for i in task], **arrays)
    return samples, np.cumsum([0, *map(len, ids)])


def _ngrams_file(folder: Path, book: int) -> Path:
    return folder / f"{book:07d}.npy"


class WriteNgrams(Step):
    """Writes all n-grams of candidates; documents are dropped, as the next stage reads them again.

    Args:
        first: Number of each task's first book.
        wanted: Numbers of the candidates.
        folder: Where.
        ngram: Words of an n-gram.
    """

    name = "ngrams"

    def __init__(self, first: Sequence[int], wanted: set[int], folder: Path, ngram: int):
        super().__init__()
        self.first, self.wanted, self.folder, self.ngram = first, wanted, folder, ngram

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        for book, document in enumerate(data, self.first[rank]):
            if book in self.wanted and not is_dropped(document):
                content = io.BytesIO()
                np.save(content, distinct_hashes(document.text, self.ngram))
                atomic_write(_ngrams_file(self.folder, book), content.getvalue())
        yield from ()


class DropContained(Step):
    """Drops books of which a longer book has most n-grams.

    Args:
        copies: By id, the id of the longer book and the share that it has.
        reason: Why they are dropped.
    """

    name = "deduplicate"

    def __init__(self, copies: Mapping[str, tuple[str, float]], reason: str):
        super().__init__()
        self.copies, self.reason = copies, reason

    def process(self, document: Document) -> str | None:
        if document.id not in self.copies:
            return None
        kept, share = self.copies[document.id]
        document.metadata["detail"] = {"kept": kept, "containment": round(share, 4)}
        return self.reason
