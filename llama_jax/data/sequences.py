"""Sequences of T tokens of one source.

Sequence ``i`` is tokens ``[i T, i T + T]`` of the concatenated documents of a split, or with
packing="examples" some whole documents.
"""

import dataclasses
import functools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from llama_jax.config import DataConfig
from llama_jax.data.batch import DTYPES, Batch
from llama_jax.data.packing import Packing, pack
from llama_jax.data.token_stream import TokenStream


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


def check_packing(name: str, packing: str) -> None:
    """Raise ValueError unless a packing keeps the conversations of a source whole."""
    if packing != "examples":
        raise ValueError(
            f'source {name} has conversations, which need data.packing="examples", not '
            f'"{packing}": then every example is whole in one sequence'
        )


class SequenceDataset:
    """Sequences of T tokens of one split, in the order of the text: a Grain data source.

    Args:
      source: the prepared source.
      cfg: sets T and packing.
      split: "train" or "holdout".

    Raises:
      ValueError: the split is too small for one sequence, or conversations need another packing.

    Example::

      inputs_T = SequenceDataset(source, cfg, "train")[0].inputs_BT
    """

    def __init__(self, source: Source, cfg: DataConfig, split: str):
        self._stream = TokenStream(source.folder, source.manifest, split)
        self._seq_len, self._segments = cfg.seq_len, cfg.has_segments
        self._packing: Packing | None = None
        if source.manifest.get("conversations"):
            check_packing(source.name, cfg.packing)
        if cfg.packing == "examples":
            manifest = json.dumps(source.manifest)
            seed = cfg.seed if split == "train" else 0
            self._packing = _packing(
                source.folder, manifest, split, cfg.seq_len, cfg.long_examples, seed
            )
            if not len(self._packing):
                kind = "training" if split == "train" else "validation"
                raise ValueError(
                    f"source {source.name}: no {kind} example can be used with "
                    f"data.seq_len={cfg.seq_len} and data.long_examples={cfg.long_examples!r}; "
                    "give a longer sequence"
                )
            return
        # Validation text may be shorter than a sequence: `padded` fills it up.
        least = cfg.seq_len + 1 if split == "train" else 2
        if len(self._stream) < least:
            raise ValueError(
                f"source {source.name}: the {split} split has {len(self._stream)} tokens, too few "
                f"for one sequence of data.seq_len={cfg.seq_len} and the token after it; provide "
                "more text, a smaller data.seq_len, or another data.val_fraction"
            )

    def __len__(self) -> int:
        """Number of full sequences (the remaining tokens are not used), or of packed ones."""
        if self._packing is not None:
            return len(self._packing)
        return (len(self._stream) - 1) // self._seq_len

    @property
    def padded_len(self) -> int:
        """Number of sequences when the last one may be padded."""
        if self._packing is not None:
            return len(self._packing)
        return math.ceil((len(self._stream) - 1) / self._seq_len)

    def __getitem__(self, index: int) -> Batch:
        """Sequence ``index``: a batch without the axis B."""
        item = self.padded(int(index))
        return item if self._segments else item._replace(mask_BT=None)

    def padded(self, index: int) -> Batch:
        """Sequence ``index`` with ``mask_BT`` in any case: 0 where the target is padding (id 0)."""
        if self._packing is not None:
            return self._examples(self._packing.row(index))
        start = index * self._seq_len
        ids, is_start = self._stream.read(start, self._seq_len + 1)
        mask = np.ones(self._seq_len, np.float32)
        mask[len(self._stream) - start - 1 :] = 0
        item = Batch(ids[:-1], targets_BT=ids[1:], mask_BT=mask)
        return _with_segments(item, is_start) if self._segments else item

    def _examples(self, row: list[tuple[int, int]]) -> Batch:
        """A sequence of the examples of a row; padding is the last segment, with mask 0."""
        item = Batch(*(np.zeros(self._seq_len, dtype) for dtype in DTYPES))
        at = 0
        for segment, (start, inputs) in enumerate(row, 1):
            here = slice(at, at + inputs)
            ids, _ = self._stream.read(start, inputs + 1)
            item.inputs_BT[here], item.targets_BT[here] = ids[:-1], ids[1:]
            item.mask_BT[here] = self._stream.read_mask(start + 1, inputs)
            item.segment_ids_BT[here] = segment
            item.positions_BT[here] = np.arange(inputs)
            at += inputs
        item.segment_ids_BT[at:] = len(row) + 1
        item.positions_BT[at:] = np.arange(self._seq_len - at)
        return item


@functools.lru_cache(maxsize=16)
def _packing(
    folder: Path, manifest: str, split: str, seq_len: int, long_examples: str, seed: int
) -> Packing:
    """The packing of a split, which every evaluation needs again."""
    content = json.loads(manifest)
    stream = TokenStream(folder, content, split)
    return pack(content["name"], stream, split, seq_len, long_examples, seed)


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
