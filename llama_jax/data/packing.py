"""Packing of whole examples into sequences of T tokens by first fit.

An example of n tokens takes n - 1 positions: its last token is a target only.
"""

import logging
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from llama_jax.data.token_stream import TokenStream

log = logging.getLogger(__name__)

_OPEN_ROWS = 64
"""Rows that are not yet full, in each of which the next example may be put."""
_BLOCK_DOCUMENTS = 2**13
"""Documents whose masks are in memory at once."""


class Examples(NamedTuple):
    """Some examples, or parts of them."""

    starts: np.ndarray
    """first token of each in the token stream, int64"""
    inputs: np.ndarray
    """positions that each takes, int64"""


class Packing(NamedTuple):
    """The examples of each sequence."""

    examples: Examples
    """in the order of the sequences"""
    first: np.ndarray
    """index of the first example of each sequence, and after the last one their number"""

    def __len__(self) -> int:
        return len(self.first) - 1

    def row(self, index: int) -> list[tuple[int, int]]:
        """First token and number of inputs of each example of a sequence."""
        chosen = slice(*self.first[index : index + 2])
        starts, inputs = self.examples.starts[chosen], self.examples.inputs[chosen]
        return list(zip(starts.tolist(), inputs.tolist(), strict=True))


def pack(
    source: str, stream: TokenStream, split: str, seq_len: int, long_examples: str, seed: int
) -> Packing:
    """Pack the documents of a split.

    Documents of text longer than T become consecutive parts of T tokens. Conversations longer than
    T are cut from the right or dropped, and those of which no token counts are dropped. Of a
    preference pair longer than T each side is cut to T / 2.

    Args:
      source: name of the source, for the log.
      stream: tokens of the split.
      split: training examples are shuffled; validation examples stay in the order of the text.
      seq_len: T.
      long_examples: "cut" or "drop".
      seed: of the order.
    """
    starts = stream.doc_starts()
    documents = Examples(starts, np.diff(starts, append=len(stream)) - 1)
    # The two documents of a pair stay together.
    size = 2 if stream.conversations and stream.conversations["format"] == "preference" else 1
    if stream.conversations:
        examples = _conversations(source, stream, documents, split, seq_len, long_examples, size)
    else:
        examples = _parts(documents, seq_len)
    units = np.arange(len(examples.starts)).reshape(-1, size)
    if split == "train":
        # RandomState, because its numbers are the same in every version of NumPy.
        units = units[np.random.RandomState(seed).permutation(len(units))]
    rows = first_fit(examples.inputs[units].sum(1).tolist(), seq_len)
    order = units[np.argsort(rows, kind="stable")].reshape(-1)
    counts = np.bincount(rows) * size
    return Packing(Examples(*(x[order] for x in examples)), np.cumsum([0, *counts.tolist()]))


def first_fit(sizes: Iterable[int], capacity: int) -> np.ndarray:
    """The row of each size: the first open row with enough free positions, else a new row.

    The fullest row is closed when more than 64 are open.

    Args:
      sizes: each at most ``capacity``.
      capacity: positions of a row.

    Returns:
      Row numbers, int64 [number of sizes].
    """
    free: list[int] = []
    numbers: list[int] = []
    row_of: list[int] = []
    count = 0
    for size in sizes:
        for i, left in enumerate(free):  # noqa: B007
            if left >= size:
                break
        else:
            if len(free) == _OPEN_ROWS:
                fullest = free.index(min(free))
                del free[fullest], numbers[fullest]
            i = len(free)
            free.append(capacity)
            numbers.append(count)
            count += 1
        free[i] -= size
        row_of.append(numbers[i])
    return np.array(row_of, np.int64)


def _parts(documents: Examples, seq_len: int) -> Examples:
    """Consecutive parts of at most T inputs of documents of text."""
    counts = -(-documents.inputs // seq_len)
    of = np.repeat(np.arange(len(counts)), counts)
    skipped = (np.arange(len(of)) - np.repeat(np.cumsum(counts) - counts, counts)) * seq_len
    inputs = np.minimum(documents.inputs[of] - skipped, seq_len)
    return Examples(documents.starts[of] + skipped, inputs)


def _conversations(
    source: str,
    stream: TokenStream,
    documents: Examples,
    split: str,
    seq_len: int,
    long_examples: str,
    size: int,
) -> Examples:
    """Conversations, or pairs of them, of at most T inputs of which some targets count."""
    starts, inputs = (x.reshape(-1, size) for x in documents)
    is_long = inputs.sum(1) > seq_len
    cut = np.where(is_long[:, None], np.minimum(inputs, seq_len // size), inputs)
    counted = _counted(stream, starts.reshape(-1), cut.reshape(-1)).reshape(-1, size).all(1)
    used = counted if long_examples == "cut" else counted & ~is_long
    what = "preference pairs" if size == 2 else "examples"
    kind = "training" if split == "train" else "validation"
    if is_long.any():
        action = "cut from the right" if long_examples == "cut" else "dropped"
        log.warning(
            f"source {source}: {is_long.sum():,} of {len(starts):,} {kind} {what} are longer than "
            f"data.seq_len={seq_len} and are {action}"
        )
    if not counted.all():
        log.warning(
            f"source {source}: {(~counted).sum():,} of {len(starts):,} {kind} {what} are dropped: "
            f"none of their first {seq_len} tokens counts in the loss"
        )
    return Examples(starts[used].reshape(-1), cut[used].reshape(-1))


def _counted(stream: TokenStream, starts: np.ndarray, inputs: np.ndarray) -> np.ndarray:
    """Whether some target of each example counts, bool."""
    found = np.zeros(len(starts), bool)
    for i in range(0, len(starts), _BLOCK_DOCUMENTS):
        block = slice(i, i + _BLOCK_DOCUMENTS)
        low, high = starts[block] + 1, starts[block] + 1 + inputs[block]
        mask = stream.read_mask(int(low[0]), int(high[-1] - low[0]))
        before = np.concatenate([[0], np.cumsum(mask, dtype=np.int64)])
        found[block] = before[high - low[0]] > before[low - low[0]]
    return found
