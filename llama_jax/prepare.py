"""Text to a tokenizer and token shards.

In come sources (a folder of text, .txt, .jsonl[.gz|.zst], .parquet, or the standard library of the running Python);
out comes a folder that :mod:`llama_jax.data` reads::

    OUT/manifest.json             the mixture: tokenizer, and folder and weight of each source
    OUT/tokenizer.model
    OUT/NAME/manifest.json        counts, sha256 of each shard, the settings it was made with
    OUT/NAME/train-00000.tokens   little-endian uint16 (uint32 from 65,537 ids on): [BOS] text [EOS], document by document
    OUT/NAME/train-00000.starts   little-endian uint64: where in the shard each document starts
    OUT/NAME/holdout-00000.*      the documents kept out of training

    python -m llama_jax.prepare OUT --source web=web.jsonl.zst:0.8 --source code=src/:0.2 --vocab-size 32000

What is there already and was made from the same input is left alone. A folder gets its name only when it is whole.
"""

import argparse
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
import math
import os
import re
import shutil
import sys
import sysconfig
import tokenize
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from llama_jax.config import DataConfig, SourceConfig
from llama_jax.tokenizer import FILE_NAME as TOKENIZER
from llama_jax.tokenizer import Tokenizer, train_tokenizer

log = logging.getLogger(__name__)

FORMAT = 1
MANIFEST = "manifest.json"
SHARD_TOKENS = 2**27
CHUNK_BYTES = 2**18  # text a thread encodes at a time
SAMPLE_BYTES = 10_000_000  # text a tokenizer is trained on; more changes few pieces

TEXT = tuple(
    ".txt .text .md .rst .tex .org .html .xml .py .pyi .c .h .cc .cpp .hpp .cu .rs .go .java .kt .scala .swift .js .ts "
    ".jsx .tsx .rb .php .pl .lua .jl .r .m .hs .ml .lisp .el .sh .sql .toml .yaml .yml .ini .cfg".split()
)
JSONL = (".jsonl", ".jsonl.gz", ".jsonl.zst")
KNOWN = f"{', '.join(JSONL)}, .parquet, or text ({' '.join(TEXT[:8])} ...)"
# Folders of the standard library that are tests, other people's packages, or tables (encodings: near-copies of one
# another, which would put held-out text in training).
NOT_LIBRARY = {
    "test", "tests", "idle_test", "lib2to3", "site-packages", "dist-packages", "encodings", "pydoc_data", "__pycache__",
}  # fmt: skip


class Document(NamedTuple):
    """A text and the number that decides its side of the split."""

    text: str
    key: int
    """64-bit hash, of the text (a Python module's docstrings: of the module); held out when under a threshold"""
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
        """Text files longer than this are cut into documents, so that few long files still make many documents."""
        total = sum(f.stat().st_size for f in self.files)
        return 2**20 if len(self.files) >= 100 else min(2**16, max(2**10, total // 100))

    @functools.cached_property
    def inputs(self) -> str:
        """Hash of names, sizes and times of the files: it changes when the input does."""
        stats = [(str(f), (s := f.stat()).st_size, s.st_mtime_ns) for f in self.files]
        return hashlib.sha256(
            json.dumps([stats, sys.version if self.is_python else ""]).encode()
        ).hexdigest()


def prepare_mixture(
    data: DataConfig, vocab_size: int, out_dir: str | Path, progress: bool = True
) -> Path:
    """Make (or find made) tokenizer and shards of every source; returns ``out_dir``, for `llama_jax.data.open_mixture`.

    Call it in one process of a run. Needs no JAX; encodes in threads (SentencePiece releases the GIL), so it is safe
    beside a live JAX backend.

    Args:
      data: sources, tokenizer ("" trains one of ``vocab_size`` pieces on the training documents), holdout, workers.
      vocab_size: V of the model; the tokenizer has at most as many ids.

    Raises:
      ValueError: input that cannot be used; names the file and line, and says what to do.
      OSError: reading or writing failed; what was half-written has been removed.
    """
    out = Path(out_dir)
    out.mkdir(parents=True, exist_ok=True)
    old = read_json(out / MANIFEST) or {}
    made = {n: m for n, s in data.sources.items() if (m := _prepared_manifest(s.path))}
    raw = {n: find_files(n, s.path) for n, s in data.sources.items() if n not in made}
    thresholds = {n: split_threshold(s, data.holdout) for n, s in raw.items()}

    tokenizer, trained_on = _tokenizer(data, vocab_size, out, old, raw, thresholds, made)
    sha256 = _sha256(tokenizer.path)
    _check_tokenizer(data, tokenizer, sha256, vocab_size, made)
    for name, source in raw.items():
        _prepare_source(source, data, thresholds[name], tokenizer, sha256, out / name, progress)

    folders = {n: str(Path(s.path).resolve()) if n in made else n for n, s in data.sources.items()}
    _write_json(
        out / MANIFEST,
        {
            "format": FORMAT,
            "tokenizer": {"file": TOKENIZER, "sha256": sha256, "trained_on": trained_on},
            "sources": {
                n: {"folder": folders[n], "weight": s.weight} for n, s in data.sources.items()
            },
        },
    )
    return out


# Where text is ---------------------------------------------------------------------------------------------------------


def find_files(name: str, path: str) -> RawSource:
    """The files of a source, in a fixed order.

    Raises:
      ValueError: nothing there, or nothing that is text.
    """
    if path.startswith("python:"):
        if path not in ("python:code", "python:prose"):
            raise ValueError(
                f"source {name}: {path} is unknown; the embedded ones are python:code and python:prose"
            )
        root = Path(sysconfig.get_path("stdlib"))
        files = [f for f in _walk(root, NOT_LIBRARY) if f.suffix == ".py"]
        files = [f for f in files if not f.name.startswith("_sysconfigdata")]
        if not files:
            raise ValueError(
                f"source {name}: the standard library in {root} has no .py files; give a path to text"
            )
        return RawSource(name, path, tuple(files), {})
    root = Path(path)
    if root.is_file():
        if _reader(root) is None:
            raise ValueError(f"source {name}: {path} has an unknown extension; known are {KNOWN}")
        return RawSource(name, path, (root,), {})
    if not root.is_dir():
        raise ValueError(
            f"source {name}: {path} does not exist (relative to {Path.cwd()}); give a file or folder of text"
        )
    found = _walk(root, {"__pycache__"})
    files = [f for f in found if _reader(f) and not _is_binary(f)]
    skipped = collections.Counter(f.suffix or f.name for f in set(found) - set(files))
    if not files:
        raise ValueError(
            f"source {name}: folder {path} has no text ({len(found)} other files); known are {KNOWN}"
        )
    if skipped:
        log.warning(
            f"source {name}: skipped {skipped.total()} files that are not text: "
            + ", ".join(f"{count} {suffix}" for suffix, count in skipped.most_common(8))
        )
    return RawSource(name, path, tuple(files), dict(sorted(skipped.items())))


def _walk(root: Path, leave_out: set[str]) -> list[Path]:
    found: list[Path] = []
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(f for f in folders if f not in leave_out and not f.startswith("."))
        found += [Path(folder, n) for n in sorted(names) if not n.startswith(".")]
    return found


def _reader(file: Path) -> Any:
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


# Text to documents -----------------------------------------------------------------------------------------------------


def read_documents(source: RawSource, files: Iterable[Path] | None = None) -> Iterator[Document]:
    """Documents of a source (of some of its files), empty ones left out.

    Raises:
      ValueError: text that is not UTF-8 text, broken JSON, no text field; names the file and line.
    """
    for file in source.files if files is None else files:
        if source.is_python:
            texts = _read_module(file, prose=source.path == "python:prose")
        else:
            texts = ((text, text) for text in _reader(file)(file, source.block_bytes))
        for text, of_key in texts:
            if not text.strip():
                continue
            size = len(text.encode())
            digest = hashlib.blake2b(of_key.encode(), digest_size=8).digest()
            yield Document(text, int.from_bytes(digest, "little"), size)


def _read_text(file: Path, block_bytes: int) -> Iterator[str]:
    content = file.read_bytes()
    if not content:
        raise ValueError(f"{file} is empty; give a file with text, or remove it")
    if b"\0" in content[:8192]:
        raise ValueError(f"{file} is binary (it has zero bytes), not text")
    start = 3 if content.startswith(b"\xef\xbb\xbf") else 0
    while start < len(content):
        end = _cut(content, start, block_bytes)
        try:
            yield content[start:end].decode()
        except UnicodeDecodeError as e:
            raise ValueError(
                f"{file} is not UTF-8 text (byte {start + e.start}: {e.reason}); convert it, for example with iconv"
            ) from None
        start = end


def _cut(content: bytes, start: int, block_bytes: int) -> int:
    """End of the block that begins at ``start``: after a blank line if there is one, else a line, else a character."""
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
                if line.strip():
                    yield _json_text(line, f"{file} line {number}")
    except (EOFError, gzip.BadGzipFile, OSError) as e:
        raise ValueError(f"{file} cannot be read after line {number}: {e}") from None
    if not number:
        raise ValueError(f"{file} is empty; give a file with text, or remove it")


@contextlib.contextmanager
def _open_lines(file: Path) -> Iterator[Iterable[bytes]]:
    if file.suffix == ".gz":
        with gzip.open(file) as lines:
            yield lines
    elif file.suffix == ".zst":
        import zstandard

        try:
            with (
                open(file, "rb") as f,
                zstandard.ZstdDecompressor().stream_reader(f, read_across_frames=True) as stream,
            ):
                yield io.BufferedReader(stream)
        except zstandard.ZstdError as e:
            raise EOFError(str(e)) from None
    else:
        with open(file, "rb") as lines:
            yield lines


def _json_text(line: bytes, where: str) -> str:
    try:
        record = json.loads(line)
    except UnicodeDecodeError as e:
        raise ValueError(f"{where} is not UTF-8 text: {e.reason}") from None
    except ValueError as e:
        raise ValueError(f"{where} is not JSON: {e}") from None
    text = record.get("text") if isinstance(record, dict) else None
    if not isinstance(text, str):
        has = (
            f"its fields are {', '.join(record)}" if isinstance(record, dict) else "it is no object"
        )
        raise ValueError(f'{where} has no "text" field that is a string; {has}')
    return _checked_unicode(text, where)


def _checked_unicode(text: str, where: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise ValueError(f"{where}: the text is not valid Unicode ({e.reason})") from None
    return text


def _read_parquet(file: Path, _: int) -> Iterator[str]:
    import pyarrow
    from pyarrow import parquet

    try:
        table = parquet.ParquetFile(file)
    except (pyarrow.ArrowInvalid, OSError) as e:
        raise ValueError(f"{file} is not a parquet file: {e}") from None
    with table:
        names = table.schema_arrow.names
        if "text" not in names:
            raise ValueError(f'{file} has no "text" column; its columns are {", ".join(names)}')
        row = 0
        for batch in table.iter_batches(batch_size=256, columns=["text"]):
            for text in batch.column(0).to_pylist():
                if not isinstance(text, str):
                    raise ValueError(f'{file} row {row}: "text" is {text!r:.40}, not a string')
                yield _checked_unicode(text, f"{file} row {row}")
                row += 1


@functools.lru_cache(maxsize=4096)
def _read_module(file: Path, prose: bool) -> tuple[tuple[str, str], ...]:
    """((document, code),): the code or the docstrings of a module; the code decides the side of the split for both."""
    try:
        with tokenize.open(file) as f:
            code = f.read()
        if not prose:
            return ((code, code),)
        return (("\n\n".join(_docstrings(ast.parse(code))), code),)
    except (
        SyntaxError,
        UnicodeDecodeError,
    ):  # deliberately broken files exist in some installations
        return ()


def _docstrings(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        text = ast.get_docstring(node, clean=False)
        if text and (text := inspect.cleandoc(text)):
            yield text
    for child in getattr(
        node, "body", ()
    ):  # definitions are statements: no need to visit expressions
        if isinstance(child, ast.stmt):
            yield from _docstrings(child)
    for field in ("orelse", "finalbody", "handlers"):
        for child in getattr(node, field, ()):
            yield from _docstrings(child)


# Which documents are held out -------------------------------------------------------------------------------------------


def split_threshold(source: RawSource, holdout: float) -> int:
    """Documents whose key is below this are held out: a share ``holdout``, and at least one document on each side.

    Equal texts have equal keys, so a duplicate never stands on both sides.
    """
    threshold, count, lowest, highest = int(holdout * 2**64), 0, 2**64, -1
    for document in read_documents(source):
        count, lowest, highest = (
            count + 1,
            min(lowest, document.key),
            max(highest, document.key),
        )
        if lowest < threshold <= highest:
            return threshold
    if not count:
        raise ValueError(f"source {source.name}: {source.path} has no text that is not blank")
    if lowest == highest:
        raise ValueError(
            f"source {source.name}: {source.path} has one document (or copies of one), and one must be kept out of training; give more text"
        )
    if source.is_python:  # code and prose must split alike
        raise ValueError(
            f"data.holdout={holdout} keeps none of the {count} modules of {source.path}; "
            f"set it above {lowest / 2**64:.4f}"
        )
    return lowest + 1 if lowest >= threshold else highest


# The tokenizer -----------------------------------------------------------------------------------------------------------


def _tokenizer(
    data: DataConfig,
    vocab_size: int,
    out: Path,
    old: dict[str, Any],
    raw: dict[str, RawSource],
    thresholds: dict[str, int],
    made: dict[str, Any],
) -> tuple[Tokenizer, str]:
    """The tokenizer of the mixture, in ``out``, and what it was trained on ("" if it was given)."""
    target = out / TOKENIZER
    given = data.tokenizer or next((data.sources[n].path for n in made), "")
    if given:
        path = Tokenizer.load(given).path
        if not target.exists() or _sha256(target) != _sha256(path):
            _copy(path, target)
        return Tokenizer.load(target), ""
    trained_on = _digest(
        {n: [s.path, s.inputs, data.sources[n].weight, thresholds[n]] for n, s in raw.items()}
        | {"vocab_size": vocab_size, "sample": SAMPLE_BYTES}
    )
    known = old.get("tokenizer", {})
    whole = target.exists() and _sha256(target) == known.get("sha256")
    if whole and known.get("trained_on") == trained_on:
        return Tokenizer.load(target), trained_on
    log.info(f"training a tokenizer of {vocab_size} pieces")
    return train_tokenizer(_sample(data, raw, thresholds), vocab_size, target), trained_on


def _sample(
    data: DataConfig, raw: dict[str, RawSource], thresholds: dict[str, int]
) -> Iterator[str]:
    """Training documents, from each source as many bytes as its weight says (or all it has)."""
    weights = {n: data.sources[n].weight for n in raw}
    for name, source in raw.items():
        left = SAMPLE_BYTES * weights[name] / sum(weights.values())
        # Files in an order that has nothing to do with their names: a sample of all of a big folder.
        files = sorted(source.files, key=lambda f: hashlib.sha256(f.name.encode()).digest())
        for document in read_documents(source, files):
            if left <= 0:
                break
            if document.key >= thresholds[name]:
                left -= document.size
                yield document.text


def _check_tokenizer(
    data: DataConfig, tokenizer: Tokenizer, sha256: str, vocab_size: int, made: dict[str, Any]
) -> None:
    if tokenizer.vocab_size > vocab_size:
        raise ValueError(
            f"tokenizer {data.tokenizer or tokenizer.path} has {tokenizer.vocab_size} ids, more than "
            f"model.vocab_size={vocab_size}; set model.vocab_size={tokenizer.vocab_size}"
        )
    for name, manifest in made.items():
        if manifest["tokenizer_sha256"] != sha256:
            raise ValueError(
                f"source {name}: {data.sources[name].path} was prepared with another tokenizer "
                f"(sha256 {manifest['tokenizer_sha256'][:12]}, the mixture's is {sha256[:12]}); "
                "prepare all sources with one tokenizer"
            )


# Documents to shards -----------------------------------------------------------------------------------------------------


def _prepare_source(
    source: RawSource,
    data: DataConfig,
    threshold: int,
    tokenizer: Tokenizer,
    sha256: str,
    folder: Path,
    progress: bool,
) -> None:
    settings = {
        "source": source.path,
        "inputs": source.inputs,
        "holdout": data.holdout,
        "tokenizer": sha256,
        "block_bytes": source.block_bytes,
        "shard_tokens": SHARD_TOKENS,
    }
    old = read_json(folder / MANIFEST)
    if old is not None and old.get("format") == FORMAT:
        changed = [k for k in settings if old["settings"].get(k) != settings[k]]
        if not changed and _is_whole(folder, old):
            return
        log.info(f"source {source.name}: {', '.join(changed) or 'a shard'} changed, made again")
    if folder.exists() and old is None:
        raise ValueError(
            f"{folder} exists and is no folder of shards; move it away or choose another folder"
        )
    with _new_folder(folder) as partial:
        dtype = "uint16" if tokenizer.vocab_size <= 2**16 else "uint32"
        splits = _write_shards(source, threshold, tokenizer, dtype, partial, data.workers, progress)
        _copy(tokenizer.path, partial / TOKENIZER)
        manifest = {
            "format": FORMAT,
            "name": source.name,
            "settings": settings,
            "tokenizer_sha256": sha256,
            "vocab_size": tokenizer.vocab_size,
            "dtype": dtype,
            "files": len(source.files),
            "skipped": source.skipped,
            "splits": splits,
        }
        _write_json(partial / MANIFEST, manifest)


def _write_shards(
    source: RawSource,
    threshold: int,
    tokenizer: Tokenizer,
    dtype: str,
    folder: Path,
    workers: int,
    progress: bool,
) -> dict[str, Any]:
    plain = not source.is_python and all(_reader(f) is _read_text for f in source.files)
    bar = tqdm(
        desc=f"tokenise {source.name}",
        total=sum(f.stat().st_size for f in source.files) if plain else None,
        unit="B",
        unit_scale=True,
        disable=None if progress else True,  # None: only in a terminal
    )
    encode = functools.partial(_encode, tokenizer, np.dtype(dtype).newbyteorder("<"), threshold)
    with contextlib.ExitStack() as stack:
        stack.enter_context(bar)
        splits = {
            s: stack.enter_context(contextlib.closing(_Shards(folder, s)))
            for s in ("train", "holdout")
        }
        for parts in _in_order(encode, _chunks(read_documents(source)), workers):
            for split, (ids, lengths, size) in parts.items():
                splits[split].add(ids, lengths, size)
                bar.update(size)
        return {name: split.finish() for name, split in splits.items()}


Part = tuple[np.ndarray, list[int], int]


def _encode(
    tokenizer: Tokenizer, dtype: np.dtype, threshold: int, documents: list[Document]
) -> dict[str, Part]:
    """Ids of some documents back to back, their lengths, and their bytes of text, by split."""
    bos, eos = tokenizer.bos_id is not None, tokenizer.eos_id is not None
    parts = {}
    for split, of_split in (
        ("train", [d for d in documents if d.key >= threshold]),
        ("holdout", [d for d in documents if d.key < threshold]),
    ):
        if of_split:
            ids = [tokenizer.encode_array(d.text, bos, eos).astype(dtype) for d in of_split]
            parts[split] = (
                np.concatenate(ids),
                [len(i) for i in ids],
                sum(d.size for d in of_split),
            )
    return parts


def _chunks(documents: Iterable[Document]) -> Iterator[list[Document]]:
    chunk: list[Document] = []
    size = 0
    for document in documents:
        chunk.append(document)
        size += document.size
        if size >= CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _in_order(function: Any, items: Iterable[Any], workers: int) -> Iterator[Any]:
    """``map`` over threads, results in the order of the items, only a few items ahead."""
    workers = workers or _cores()
    waiting: collections.deque[Future[Any]] = collections.deque()
    pool = ThreadPoolExecutor(workers, thread_name_prefix="tokenise")
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _Shards:
    """The shards of one split while they are written."""

    def __init__(self, folder: Path, split: str):
        self._folder, self._split = folder, split
        self._file: Any = None
        self._documents = self._tokens = self._text_bytes = 0
        self._shards: list[dict[str, Any]] = []

    def add(self, ids: np.ndarray, lengths: list[int], text_bytes: int) -> None:
        if self._file is None:
            self._open()
        ends = self._in_shard + np.cumsum(lengths)
        self._starts.append(np.concatenate([[self._in_shard], ends[:-1]]).astype("<u8"))
        self._file.write(ids.data)
        self._sha256.update(ids.data)
        self._in_shard += len(ids)
        self._tokens += len(ids)
        self._documents += len(lengths)
        self._text_bytes += text_bytes
        if self._in_shard >= SHARD_TOKENS:
            self._finish_shard()

    def _open(self) -> None:
        self._name = f"{self._split}-{len(self._shards):05d}"
        self._file = open(self._folder / f"{self._name}.tokens", "wb")  # noqa: SIM115 - closed in close()
        self._sha256 = hashlib.sha256()
        self._starts: list[np.ndarray] = []
        self._in_shard = 0

    def _finish_shard(self) -> None:
        self.close()
        self._file = None
        starts = np.concatenate(self._starts)
        (self._folder / f"{self._name}.starts").write_bytes(starts.data)
        self._shards.append(
            {
                "name": self._name,
                "tokens": self._in_shard,
                "documents": len(starts),
                "tokens_sha256": self._sha256.hexdigest(),
                "starts_sha256": hashlib.sha256(starts.data).hexdigest(),
            }
        )

    def finish(self) -> dict[str, Any]:
        """Complete the last shard; returns the split's part of the manifest."""
        if self._file is not None:
            self._finish_shard()
        return {
            "documents": self._documents,
            "tokens": self._tokens,
            "text_bytes": self._text_bytes,
            "shards": self._shards,
        }

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


# Files that are whole or absent --------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _new_folder(folder: Path) -> Iterator[Path]:
    """A folder to fill, which takes its name when the block ends well and disappears when it does not."""
    partial, old = (
        folder.with_name(folder.name + ".partial"),
        folder.with_name(folder.name + ".old"),
    )
    try:
        for left_over in (partial, old):
            if left_over.exists():
                shutil.rmtree(left_over)
        partial.mkdir(parents=True)
        yield partial
        for file in partial.iterdir():
            with open(file, "rb") as f:
                os.fsync(f.fileno())
        if folder.exists():
            folder.rename(old)
        partial.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    except BaseException as e:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(e, OSError):
            raise OSError(
                e.errno, f"preparing {folder} failed, nothing half-written is left: {e}"
            ) from e
        raise


def read_json(path: Path) -> dict[str, Any] | None:
    """A manifest, None if there is none (or it is none)."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) and "format" in content else None


def _prepared_manifest(path: str) -> dict[str, Any] | None:
    """Manifest of a folder that is prepared already, None for raw text."""
    manifest = read_json(Path(path) / MANIFEST)
    if manifest is None:
        return None
    if "sources" in manifest:
        names = ", ".join(str(Path(path) / n) for n in manifest["sources"])
        raise ValueError(f"{path} is a prepared mixture; name one of its sources: {names}")
    if manifest["format"] != FORMAT:
        raise ValueError(
            f"{path} has format {manifest['format']}, this version reads {FORMAT}; prepare it again"
        )
    return manifest


def _is_whole(folder: Path, manifest: dict[str, Any]) -> bool:
    width = np.dtype(manifest["dtype"]).itemsize
    sizes = {TOKENIZER: None}
    for split in manifest["splits"].values():
        for shard in split["shards"]:
            sizes[f"{shard['name']}.tokens"] = shard["tokens"] * width
            sizes[f"{shard['name']}.starts"] = shard["documents"] * 8
    return all(
        (folder / n).is_file() and size in (None, (folder / n).stat().st_size)
        for n, size in sizes.items()
    )


def _write_json(path: Path, content: dict[str, Any]) -> None:
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        os.replace(partial, path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def _copy(source: Path, target: Path) -> None:
    partial = target.with_name(target.name + ".partial")
    try:
        shutil.copyfile(source, partial)
        os.replace(partial, target)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


# Command -----------------------------------------------------------------------------------------------------------------


def parse_source(argument: str) -> tuple[str, SourceConfig]:
    """``NAME=PATH[:WEIGHT]``; a path may contain colons, a last part that is a number is the weight."""
    name, equals, path = argument.partition("=")
    if not equals or not re.fullmatch(r"[\w-]+", name) or not path:
        raise ValueError(
            f"--source {argument} is not of the form NAME=PATH or NAME=PATH:WEIGHT (NAME: letters, digits, - and _)"
        )
    before, _, last = path.rpartition(":")
    try:
        weight = float(last) if before else math.nan
    except ValueError:
        weight = math.nan
    if math.isnan(weight):
        return name, SourceConfig(path=path)
    return name, SourceConfig(path=before, weight=weight)


def main(arguments: list[str] | None = None) -> None:
    """The command line; see the module's docstring."""
    parser = argparse.ArgumentParser(
        prog="python -m llama_jax.prepare",
        description=(__doc__ or "").split("\n")[0],
        epilog="A source in OUT goes into a recipe as [data.sources.NAME] with path = OUT/NAME.",
    )
    parser.add_argument("out", help="folder to write")
    parser.add_argument(
        "--source",
        action="append",
        required=True,
        metavar="NAME=PATH[:WEIGHT]",
        help=f"repeatable; PATH is a folder, {KNOWN}, python:code or python:prose",
    )
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--tokenizer", default="", help="SentencePiece .model to use")
    which.add_argument("--vocab-size", type=int, help="train a tokenizer of that many pieces")
    parser.add_argument(
        "--holdout", type=float, default=0.02, help="share of documents kept out (default 0.02)"
    )
    parser.add_argument("--workers", type=int, default=0, help="threads (default: one a core)")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        data = DataConfig(
            sources=dict(map(parse_source, options.source)),
            tokenizer=options.tokenizer,
            seq_len=1,
            holdout=options.holdout,
            workers=options.workers,
        )
        vocab_size = options.vocab_size or Tokenizer.load(options.tokenizer).vocab_size
        out = prepare_mixture(data, vocab_size, options.out)
    except (ValueError, OSError) as e:
        sys.exit(f"error: {e}")
    for name in data.sources:
        for split, counts in (read_json(out / name / MANIFEST) or {"splits": {}})["splits"].items():
            print(
                f"{name:16} {split:8} {counts['documents']:>12,} documents {counts['tokens']:>16,} tokens "
                f"{counts['text_bytes'] / max(1, counts['tokens']):.2f} bytes a token"
            )


if __name__ == "__main__":
    main()
