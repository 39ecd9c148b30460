"""Documents to token shards: encoding in threads, and files that continue after a kill."""

import collections
import contextlib
import functools
import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from llama_jax.data.manifest import SHARD_FILES, SPLITS
from llama_jax.data.tokenizer import Tokenizer
from llama_jax.io import atomic_write, read_json_or_empty
from llama_jax.prepare.split import SplitRule
from llama_jax.prepare.text import TEXT, Document, RawSource, read_documents

SHARD_TOKENS = 2**27
CHUNK_BYTES = 2**18
"""Text that a thread encodes at a time."""
PROGRESS_BYTES = 2**26
"""Text between two records of progress."""
PROGRESS = "progress.json"
_MAX_AHEAD_BYTES = 2**26
"""Limit on text that was read but not yet written (or one longer document)."""


def dtype_of(tokenizer: Tokenizer) -> str:
    """The dtype of the ids in shards."""
    return "uint16" if tokenizer.vocab_size <= 2**16 else "uint32"


def encode_files(
    source: RawSource,
    files: list[Path],
    folder: Path,
    tokenizer: Tokenizer,
    rule: SplitRule,
    key: str,
    workers: int,
) -> None:
    """Encode some files of a source into shards, from where a killed process stopped.

    Args:
      source: the source of the files.
      files: what to encode.
      folder: where the shards and the record of progress are.
      tokenizer: the mixture's.
      rule: which documents are in validation.
      key: hash of all settings; shards of another key are made again.
      workers: threads; 0: one per core.
    """
    dtype = np.dtype(dtype_of(tokenizer)).newbyteorder("<")
    state = read_json_or_empty(folder / PROGRESS)
    if state.get("key") != key or not _is_intact(folder, state["splits"], dtype.itemsize):
        state = {"chunks": 0, "splits": {}}
        for left_over in folder.iterdir():
            if left_over.name != ".lock":
                left_over.unlink()
    bad_lines: collections.Counter[str] = collections.Counter()

    with contextlib.ExitStack() as stack:
        writers = {
            s: ShardWriter(folder, s, dtype.itemsize, state["splits"].get(s)) for s in SPLITS
        }
        for writer in writers.values():
            stack.enter_context(contextlib.closing(writer))
        encoded_before = sum(w.total["text_bytes"] for w in writers.values())
        bar = stack.enter_context(_progress_bar(source, files, encoded_before))

        def record(chunks: int, done: bool = False) -> None:
            states = {s: writer.state(done) for s, writer in writers.items()}
            now = {"key": key, "chunks": chunks, "done": done, "splits": states}
            now["bad_lines"] = dict(sorted(bad_lines.items())) if done else {}
            atomic_write(folder / PROGRESS, json.dumps(now).encode())

        # The text before is read again to count its bad lines, but not encoded again.
        chunks = _chunks(read_documents(source, files, bad_lines))
        count, unrecorded = state["chunks"], 0
        todo = itertools.islice(chunks, count, None)
        encode = functools.partial(_encode, tokenizer, dtype, rule)
        for encoded in _map_in_order(encode, todo, workers or _cores()):
            count += 1
            for split, (ids, lengths, text_bytes) in encoded.items():
                writers[split].add(ids, lengths, text_bytes)
                bar.update(text_bytes)
                unrecorded += text_bytes
            if unrecorded >= PROGRESS_BYTES:
                record(count)
                unrecorded = 0
        record(count, done=True)


def _progress_bar(source: RawSource, files: list[Path], initial: int) -> tqdm:
    # Only for plain text the bytes of the files are those of the documents.
    is_plain = not source.is_python and all(f.name.lower().endswith(TEXT) for f in files)
    return tqdm(
        desc=f"tokenize {source.name}",
        total=sum(f.stat().st_size for f in files) if is_plain else None,
        initial=initial,
        unit="B",
        unit_scale=True,
        disable=None,  # shown in a terminal only
    )


def _encode(
    tokenizer: Tokenizer, dtype: np.dtype, rule: SplitRule, documents: list[Document]
) -> dict[str, tuple[np.ndarray, list[int], int]]:
    """By split: ids of the documents back to back, the length of each, bytes of text."""
    bos, eos = tokenizer.bos_id is not None, tokenizer.eos_id is not None
    train = [d for d in documents if not rule.is_val(d.key)]
    val = [d for d in documents if rule.is_val(d.key)]
    encoded = {}
    for split, docs in zip(SPLITS, (train, val), strict=True):
        if docs:
            ids = [tokenizer.encode_array(d.text, bos, eos) for d in docs]
            flat = np.concatenate(ids).astype(dtype)
            encoded[split] = flat, [len(i) for i in ids], sum(d.size for d in docs)
    return encoded


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


def _map_in_order(function: Any, chunks: Iterable[list[Document]], workers: int) -> Iterator[Any]:
    """``map`` in threads, which reads at most _MAX_AHEAD_BYTES of text ahead."""
    pending: collections.deque[tuple[Future[Any], int]] = collections.deque()
    ahead = 0
    pool = ThreadPoolExecutor(workers, thread_name_prefix="tokenize")
    try:
        for chunk in chunks:
            size = sum(d.size for d in chunk)
            pending.append((pool.submit(function, chunk), size))
            ahead += size
            del chunk  # freed as soon as it is encoded
            while len(pending) > 2 * workers or (pending and ahead > _MAX_AHEAD_BYTES):
                future, size = pending.popleft()
                ahead -= size
                yield future.result()
        while pending:
            yield pending.popleft()[0].result()
    finally:
        pool.shutdown(cancel_futures=True)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _hash_start(f: Any, size: int) -> Any:
    """SHA-256 of the next ``size`` bytes of a file, or of those that exist."""
    found = hashlib.sha256()
    while block := f.read(min(size, 2**20)):
        found.update(block)
        size -= len(block)
    return found


def _is_intact(folder: Path, splits: dict[str, Any], width: int) -> bool:
    """Whether incomplete shards still begin with what was recorded."""
    for split, state in splits.items():
        if opened := state["open"]:
            stem = f"{split}-{len(state['shards']):05d}"
            sizes = opened["tokens"] * width, opened["documents"] * 8
            for kind, size, expected in zip(SHARD_FILES, sizes, opened["sha256"], strict=True):
                try:
                    with open(folder / f"{stem}.{kind}", "rb") as f:
                        if _hash_start(f, size).hexdigest() != expected:
                            return False
                except FileNotFoundError:
                    return False
    return True


class ShardWriter:
    """Writes the shards of one split.

    Args:
      folder: where the shards are.
      split: name of the split, the first part of the names of files.
      width: bytes per id.
      state: result of :meth:`state`, to continue from there; what was written later is removed.
    """

    def __init__(self, folder: Path, split: str, width: int, state: dict[str, Any] | None):
        self._folder, self._split, self._width = folder, split, width
        state = state or {}
        self.total = {k: state.get(k, 0) for k in ("documents", "tokens", "text_bytes")}
        self._shards: list[dict[str, Any]] = list(state.get("shards", ()))
        self._files: list[Any] = []
        if opened := state.get("open"):
            self._open(opened["tokens"], opened["documents"])

    def _open(self, tokens: int = 0, documents: int = 0) -> None:
        self._name = f"{self._split}-{len(self._shards):05d}"
        self._tokens, self._documents = tokens, documents
        self._hashes = []
        for kind, size in zip(SHARD_FILES, (tokens * self._width, documents * 8), strict=True):
            f = open(self._folder / f"{self._name}.{kind}", "r+b" if size else "wb")  # noqa: SIM115
            self._files.append(f)
            f.truncate(size)
            self._hashes.append(_hash_start(f, size) if size else hashlib.sha256())

    def add(self, ids: np.ndarray, lengths: list[int], text_bytes: int) -> None:
        """Append documents: their ids back to back, and the length of each.

        Args:
          ids: of all documents.
          lengths: number of ids of each document.
          text_bytes: UTF-8 bytes of all documents.
        """
        if not self._files:
            self._open()
        starts = (self._tokens + np.cumsum([0, *lengths[:-1]])).astype("<u8")
        for f, found, content in zip(self._files, self._hashes, (ids, starts), strict=True):
            f.write(content.data)
            found.update(content.data)
        self._tokens += len(ids)
        self._documents += len(lengths)
        for key, value in zip(self.total, (len(lengths), len(ids), text_bytes), strict=True):
            self.total[key] += value
        if self._tokens >= SHARD_TOKENS:
            self._finish_shard()

    def _finish_shard(self) -> None:
        self._sync()
        self.close()
        counts = {"name": self._name, "tokens": self._tokens, "documents": self._documents}
        hashes = zip(SHARD_FILES, self._hashes, strict=True)
        self._shards.append(counts | {f"{kind}_sha256": h.hexdigest() for kind, h in hashes})

    def state(self, done: bool) -> dict[str, Any]:
        """All that was written, after it reached the disk; ``done`` completes the last shard."""
        if self._files and done:
            self._finish_shard()
        self._sync()
        opened = None
        if self._files:
            hashes = [h.hexdigest() for h in self._hashes]
            opened = {"tokens": self._tokens, "documents": self._documents, "sha256": hashes}
        return {**self.total, "shards": self._shards, "open": opened}

    def _sync(self) -> None:
        for f in self._files:
            f.flush()
            os.fsync(f.fileno())

    def close(self) -> None:
        """Close the files of an incomplete shard."""
        files, self._files = self._files, []
        with contextlib.ExitStack() as stack:
            for f in files:
                stack.callback(f.close)
