"""Random access to the prepared tokens of one source, in memory-mapped shards."""

import bisect
import functools
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from llama_jax.data.manifest import (
    check_doc_offsets,
    check_file,
    check_mask,
    is_increasing,
    offsets_error,
)

MAX_CHECKED_DOCUMENTS = 2**23
"""Document offsets checked when a split is opened; those after are checked when they are read."""


class TokenStream:
    """All tokens of one split of a source, with random access to memory-mapped shards.

    Args:
      folder: folder of the source.
      manifest: its checked manifest.
      split: "train" or "holdout".

    Example::

      ids_T, is_start_T = TokenStream(source.folder, source.manifest, "train").read(0, 1024)
    """

    def __init__(self, folder: Path, manifest: dict[str, Any], split: str):
        self.folder, self._vocab_size = folder, manifest["vocab_size"]
        dtype = np.dtype(manifest["dtype"]).newbyteorder("<")
        shards = manifest["splits"][split]["shards"]
        self._tokens = [_file(folder / f"{s['name']}.tokens", dtype, s["tokens"]) for s in shards]
        self._doc_offsets = [
            _file(folder / f"{s['name']}.starts", np.dtype("<u8"), s["documents"]) for s in shards
        ]
        self._masks = [
            _file(folder / f"{s['name']}.mask", np.dtype(np.uint8), s["tokens"])
            for s in shards
            if s.get("mask_sha256")
        ]
        self.conversations: dict[str, Any] | None = manifest.get("conversations")
        """how conversations became tokens; None for text"""
        self._offsets = np.cumsum([0] + [s["tokens"] for s in shards]).tolist()

    def __len__(self) -> int:
        return self._offsets[-1]

    def check_doc_offsets(self) -> None:
        """Raise ValueError unless document offsets increase; see :data:`MAX_CHECKED_DOCUMENTS`."""
        left = MAX_CHECKED_DOCUMENTS
        for tokens, file in zip(self._tokens, self._doc_offsets, strict=True):
            if (left := left - file.length) < 0:
                return
            check_doc_offsets(file.path, np.fromfile(file.path, file.dtype), -1, tokens.length)

    def read(self, start: int, length: int) -> tuple[np.ndarray, np.ndarray]:
        """``length`` tokens from ``start`` (int32), and whether each starts a document (bool);
        zeros beyond the end of the stream.

        Raises:
          ValueError: an id is outside the vocabulary, or document offsets do not increase.
        """
        ids, is_start = np.zeros(length, np.int32), np.zeros(length, bool)
        at, stop = start, min(start + length, len(self))
        shard = bisect.bisect_right(self._offsets, start) - 1
        while at < stop:
            offset = self._offsets[shard]
            end = min(stop, self._offsets[shard + 1])
            ids[at - start : end - start] = _mapped(self._tokens[shard])[at - offset : end - offset]
            docs = _mapped(self._doc_offsets[shard])
            first, last = np.searchsorted(docs, np.array([at - offset, end - offset], "<u8"))
            if not is_increasing(docs[first:last], at - offset, end - offset):
                raise offsets_error(self._doc_offsets[shard].path)
            is_start[docs[first:last].astype(np.int64) + (offset - start)] = True
            at, shard = end, shard + 1
        # Viewed as unsigned, because ids of 2**31 and more are negative as int32.
        if (largest := ids.view(np.uint32).max(initial=0)) >= self._vocab_size:
            raise ValueError(
                f"{self.folder}: token id {largest} is outside the vocabulary of "
                f"{self._vocab_size}; the shards are damaged, prepare them again"
            )
        return ids, is_start

    def read_mask(self, start: int, length: int) -> np.ndarray:
        """Which of ``length`` tokens from ``start`` count in the loss, uint8; all tokens of text.

        Raises:
          ValueError: the mask has other values than 0 and 1.
        """
        if not self._masks:
            return np.ones(length, np.uint8)
        mask = np.zeros(length, np.uint8)
        for shard, file in enumerate(self._masks):
            low, high = (
                max(start, self._offsets[shard]),
                min(start + length, self._offsets[shard + 1]),
            )
            if low < high:
                offset = self._offsets[shard]
                mask[low - start : high - start] = _mapped(file)[low - offset : high - offset]
                check_mask(file.path, mask[low - start : high - start])
        return mask

    def doc_starts(self) -> np.ndarray:
        """The first token of every document, int64.

        Raises:
          ValueError: document offsets do not increase.
        """
        starts = []
        for tokens, file, offset in zip(
            self._tokens, self._doc_offsets, self._offsets, strict=False
        ):
            offsets = np.fromfile(file.path, file.dtype)
            check_doc_offsets(file.path, offsets, -1, tokens.length)
            starts.append(offsets.astype(np.int64) + offset)
        return np.concatenate(starts)


class _File(NamedTuple):
    path: Path
    dtype: np.dtype
    length: int
    inode: int
    mtime_ns: int
    """inode and mtime distinguish the file from another one that replaces it"""


def _file(path: Path, dtype: np.dtype, length: int) -> _File:
    stat = check_file(path, length * dtype.itemsize)
    return _File(path, dtype, length, stat.st_ino, stat.st_mtime_ns)


@functools.lru_cache(maxsize=256)  # each map holds a file descriptor; a common limit is 1024
def _mapped(file: _File) -> np.ndarray:
    # A plain array, because slicing np.memmap takes several times as long.
    return np.asarray(np.memmap(file.path, file.dtype, mode="r", shape=(file.length,)))
