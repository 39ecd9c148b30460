"""Prepared tokens of one source: random access to the token stream, and sequences of T tokens.

Sequence ``i`` is tokens ``[i T, i T + T]`` of the concatenated documents of a split.
"""

import bisect
import dataclasses
import functools
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from llama_jax.config import DataConfig
from llama_jax.data.batch import Batch
from llama_jax.data.manifest import check_doc_offsets, check_file, is_increasing, offsets_error

MAX_CHECKED_DOCUMENTS = 2**23
"""Document offsets checked when a split is opened; those after are checked when they are read."""


@dataclasses.dataclass(frozen=True)
class Source:
    """A prepared source: shards in a folder, and their manifest.

    Example::

      source = open_mixture("checkpoints/tiny/data").sources["code"]
    """

    name: str
    folder: Path
    weight: float
    manifest: dict[str, Any]


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


class SequenceDataset:
    """Sequences of T tokens of one split, in the order of the text: a Grain data source.

    Args:
      source: the prepared source.
      cfg: sets T and packing.
      split: "train" or "holdout".

    Raises:
      ValueError: the split is too small for one sequence.

    Example::

      inputs_T = SequenceDataset(source, cfg, "train")[0].inputs_BT
    """

    def __init__(self, source: Source, cfg: DataConfig, split: str):
        self._stream = TokenStream(source.folder, source.manifest, split)
        self._seq_len, self._segments = cfg.seq_len, cfg.packing == "segments"
        # Validation text may be shorter than a sequence: `padded` fills it up.
        least = cfg.seq_len + 1 if split == "train" else 2
        if len(self._stream) < least:
            raise ValueError(
                f"source {source.name}: the {split} split has {len(self._stream)} tokens, too few "
                f"for one sequence of data.seq_len={cfg.seq_len} and the token after it; provide "
                "more text, a smaller data.seq_len, or another data.val_fraction"
            )

    def __len__(self) -> int:
        """Number of full sequences; the remaining tokens are not used."""
        return (len(self._stream) - 1) // self._seq_len

    @property
    def padded_len(self) -> int:
        """Number of sequences when the last one may be padded."""
        return math.ceil((len(self._stream) - 1) / self._seq_len)

    def __getitem__(self, index: int) -> Batch:
        """Sequence ``index``: a batch without the axis B."""
        item = self.padded(int(index))
        return item if self._segments else item._replace(mask_BT=None)

    def padded(self, index: int) -> Batch:
        """Sequence ``index`` with ``mask_BT`` in any case: 0 where the target is padding (id 0)."""
        start = index * self._seq_len
        ids, is_start = self._stream.read(start, self._seq_len + 1)
        mask = np.ones(self._seq_len, np.float32)
        mask[len(self._stream) - start - 1 :] = 0
        item = Batch(ids[:-1], targets_BT=ids[1:], mask_BT=mask)
        return _with_segments(item, is_start) if self._segments else item


def _with_segments(item: Batch, is_start: np.ndarray) -> Batch:
    """Add segment ids and positions in each document; mask targets of another document."""
    mask = item.mask_BT
    index = np.arange(len(mask), dtype=np.int32)
    first = is_start[:-1].copy()
    first[0] = True  # the rest of a document that began before the sequence is a segment
    return item._replace(
        segment_ids_BT=np.cumsum(first, dtype=np.int32),
        positions_BT=index - np.maximum.accumulate(np.where(first, index, 0)),
        mask_BT=np.where(is_start[1:], np.float32(0), mask),
    )
