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
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from llama_jax.data.chat_template import ChatTemplate
from llama_jax.data.manifest import SPLITS, file_sizes, shard_files
from llama_jax.data.tokenizer import Tokenizer
from llama_jax.io import atomic_write, read_json_or_empty
from llama_jax.prepare.records import REFUSED, BadLine, Document
from llama_jax.prepare.split import SplitRule
from llama_jax.prepare.text import TEXT, RawSource, count_bad_line, read_documents

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


class Encoding(NamedTuple):
    """How documents become ids."""

    tokenizer: Tokenizer
    """the mixture's"""
    rule: SplitRule
    """which documents are in validation"""
    template: ChatTemplate | None = None
    """of conversations; None for text"""
    loss: str = "answers"
    """what counts in conversations: "answers", or "all" tokens"""

    @property
    def kinds(self) -> tuple[str, ...]:
        """Extensions of the files of a shard."""
        return shard_files({"conversations": self.template})

    @property
    def dtype(self) -> np.dtype:
        """Of the ids in shards."""
        return np.dtype(dtype_of(self.tokenizer)).newbyteorder("<")


class Encoded(NamedTuple):
    """Some documents of one split."""

    ids: np.ndarray
    """of all documents, back to back"""
    lengths: list[int]
    """number of ids of each document"""
    text_bytes: int
    """UTF-8 bytes of all documents"""
    mask: np.ndarray | None = None
    """which ids of conversations count, uint8"""


def encode_files(
    source: RawSource, files: list[Path], folder: Path, encoding: Encoding, key: str, workers: int
) -> None:
    """Encode some files of a source into shards, from where a killed process stopped.

    Args:
      source: the source of the files.
      files: what to encode.
      folder: where the shards and the record of progress are.
      encoding: how documents become ids.
      key: hash of all settings; shards of another key are made again.
      workers: threads; 0: one per core.
    """
    state = read_json_or_empty(folder / PROGRESS)
    if state.get("key") != key or not _is_intact(folder, state["splits"], encoding):
        state = {"chunks": 0, "splits": {}}
        for left_over in folder.iterdir():
            if left_over.name != ".lock":
                left_over.unlink()
    bad_lines: collections.Counter[str] = collections.Counter()
    refused = collections.Counter(state.get("refused", {}))

    with contextlib.ExitStack() as stack:
        writers = {s: ShardWriter(folder, s, encoding, state["splits"].get(s)) for s in SPLITS}
        for writer in writers.values():
            stack.enter_context(contextlib.closing(writer))
        encoded_before = sum(w.total["text_bytes"] for w in writers.values())
        bar = stack.enter_context(_progress_bar(source, files, encoded_before))

        def record(chunks: int, done: bool = False) -> None:
            states = {s: writer.state(done) for s, writer in writers.items()}
            now = {"key": key, "chunks": chunks, "done": done, "splits": states}
            now["refused"] = dict(refused)
            now["bad_lines"] = dict(sorted((bad_lines + refused).items())) if done else {}
            atomic_write(folder / PROGRESS, json.dumps(now).encode())

        # The text before is read again to count its bad lines, but not encoded again.
        chunks = _chunks(read_documents(source, files, bad_lines))
        count, unrecorded = state["chunks"], 0
        todo = itertools.islice(chunks, count, None)
        encode = functools.partial(_encode, encoding)
        for encoded, bad in _map_in_order(encode, todo, workers or _cores()):
            for line in bad:
                count_bad_line(line, source, refused)
            count += 1
            for split, part in encoded.items():
                writers[split].add(part)
                bar.update(part.text_bytes)
                unrecorded += part.text_bytes
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
    encoding: Encoding, documents: list[Document]
) -> tuple[dict[str, Encoded], list[BadLine]]:
    """The documents by split, and the conversations that the template refuses."""
    encoded, bad = {}, []
    train = [d for d in documents if not encoding.rule.is_val(d.key)]
    val = [d for d in documents if encoding.rule.is_val(d.key)]
    for split, docs in zip(SPLITS, (train, val), strict=True):
        ids: list[np.ndarray] = []
        masks: list[np.ndarray] = []
        text_bytes = 0
        for document in docs:
            try:
                new_ids, new_masks = _encode_document(encoding, document)
            except ValueError as e:
                if document.example is None:
                    raise
                bad.append(BadLine(REFUSED, f"{document.where}: {e}"))
                continue
            ids += new_ids
            masks += new_masks
            text_bytes += document.size
        if ids:
            flat = np.concatenate(ids).astype(encoding.dtype)
            mask = np.concatenate(masks) if masks else None
            encoded[split] = Encoded(flat, [len(i) for i in ids], text_bytes, mask)
    return encoded, bad


def _encode_document(
    encoding: Encoding, document: Document
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """The ids and the mask of a conversation, or of the two of a pair; text has no mask."""
    tokenizer, template, example = encoding.tokenizer, encoding.template, document.example
    if example is None or template is None:
        bos, eos = tokenizer.bos_id is not None, tokenizer.eos_id is not None
        return [tokenizer.encode_array(document.text, bos, eos)], []
    ids, masks = [], []
    for messages in (example.messages, example.rejected):
        if messages is not None:
            new_ids, mask = template.encode_example(messages, tokenizer, tools=example.tools)
            ids.append(np.array(new_ids, np.int32))
            masks.append(np.array(mask, np.uint8) | (encoding.loss == "all"))
    return ids, masks


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


def _is_intact(folder: Path, splits: dict[str, Any], encoding: Encoding) -> bool:
    """Whether incomplete shards still begin with what was recorded."""
    for split, state in splits.items():
        if opened := state["open"]:
            stem = f"{split}-{len(state['shards']):05d}"
            sizes = file_sizes(encoding.kinds, opened, encoding.dtype.itemsize)
            for (kind, size), expected in zip(sizes.items(), opened["sha256"], strict=True):
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
      encoding: decides the files of a shard and the bytes per id.
      state: result of :meth:`state`, to continue from there; what was written later is removed.
    """

    def __init__(self, folder: Path, split: str, encoding: Encoding, state: dict[str, Any] | None):
        self._folder, self._split = folder, split
        self._kinds, self._width = encoding.kinds, encoding.dtype.itemsize
        state = state or {}
        totals = ("documents", "tokens", "text_bytes", *["counted"] * ("mask" in self._kinds))
        self.total = {k: state.get(k, 0) for k in totals}
        self._shards: list[dict[str, Any]] = list(state.get("shards", ()))
        self._files: list[Any] = []
        if opened := state.get("open"):
            self._open(opened["tokens"], opened["documents"])

    def _open(self, tokens: int = 0, documents: int = 0) -> None:
        self._name = f"{self._split}-{len(self._shards):05d}"
        self._tokens, self._documents = tokens, documents
        self._hashes = []
        sizes = file_sizes(self._kinds, {"tokens": tokens, "documents": documents}, self._width)
        for kind, size in sizes.items():
            f = open(self._folder / f"{self._name}.{kind}", "r+b" if size else "wb")  # noqa: SIM115
            self._files.append(f)
            f.truncate(size)
            self._hashes.append(_hash_start(f, size) if size else hashlib.sha256())

    def add(self, documents: Encoded) -> None:
        """Append documents."""
        if not self._files:
            self._open()
        ids, lengths, text_bytes, mask = documents
        starts = (self._tokens + np.cumsum([0, *lengths[:-1]])).astype("<u8")
        contents = (ids, starts) if mask is None else (ids, starts, mask)
        for f, found, content in zip(self._files, self._hashes, contents, strict=True):
            f.write(content.data)
            found.update(content.data)
        self._tokens += len(ids)
        self._documents += len(lengths)
        added = {"documents": len(lengths), "tokens": len(ids), "text_bytes": text_bytes}
        if mask is not None:
            added["counted"] = int(mask.sum(dtype=np.int64))
        for key, value in added.items():
            self.total[key] += value
        if self._tokens >= SHARD_TOKENS:
            self._finish_shard()

    def _finish_shard(self) -> None:
        self._sync()
        self.close()
        counts = {"name": self._name, "tokens": self._tokens, "documents": self._documents}
        hashes = zip(self._kinds, self._hashes, strict=True)
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
