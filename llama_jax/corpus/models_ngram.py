"""Estimates a 5-gram model with modified Kneser-Ney smoothing, and writes it for KenLM.

KenLM's own programs for this, lmplz and build_binary, are in no Python package. The probabilities
are those of ``lmplz --discount_fallback`` (Heafield et al. 2013); the file has KenLM's probing
format (version 5), which processes map into memory instead of reading it.
"""

import itertools
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np

ORDER = 5
UNKNOWN, BEGIN, END = 0, 1, 2
_SPECIAL = ("<unk>", "<s>", "</s>")
_FALLBACK = (0.5, 1.0, 1.5)
"""Discounts of counts 1, 2, and more, where the text is too small to estimate them."""
_MULTIPLIER = 1.5
"""Size of a hash table relative to the number of its entries."""


class Vocabulary:
    """Numbers words in the order in which they appear."""

    def __init__(self) -> None:
        self.ids = {word: i for i, word in enumerate(_SPECIAL)}

    def encode(self, words: Sequence[str]) -> list[int]:
        """The numbers of the words of a sentence, with those of its begin and end."""
        ids = self.ids
        return [BEGIN, *(ids.setdefault(word, len(ids)) for word in words), END]


@dataclass
class Ngrams:
    """The different n-grams of one order, as arrays with an entry for each.

    Attributes:
        first: Number of the first word.
        prefix: Position, among the (n-1)-grams, of the n-gram without its last word.
        suffix: Position, among the (n-1)-grams, of the n-gram without its first word.
        count: Frequency; after ``_adjust``, the number of different words to the left.
        log_probability: Logarithm to base 10.
        log_backoff: Likewise; weight of shorter n-grams after this one.
    """

    first: np.ndarray
    prefix: np.ndarray
    suffix: np.ndarray
    count: np.ndarray
    log_probability: np.ndarray
    log_backoff: np.ndarray


def estimate(tokens: np.ndarray, words: int, order: int = ORDER) -> list[Ngrams]:
    """The n-grams of a text up to an order, with probabilities and backoff weights.

    Args:
        tokens: Sentences from ``Vocabulary.encode``, one after the other. About 80 bytes of memory
            are needed for each token.
        words: Number of words of the vocabulary.
        order: At least 2.
    """
    grams = _count(tokens, words, order)
    _adjust(grams)
    lower = np.full(1, 1 / (words - 1))  # uniform; <s> is never predicted
    for n, these in enumerate(grams):
        discount = np.array([0.0, *_discounts(these.count)])[np.minimum(these.count, 3)]
        contexts = 1 if n == 0 else len(grams[n - 1].count)
        total = np.bincount(these.prefix, these.count, contexts)
        used = total > 0
        with np.errstate(divide="ignore", invalid="ignore"):
            weight = np.bincount(these.prefix, discount, contexts) / total
            if n > 0:
                grams[n - 1].log_backoff[used] = np.log10(np.maximum(weight[used], 1e-30))
            probability = (these.count - discount) / total[these.prefix]
        probability += weight[these.prefix] * lower[these.suffix]
        if n == 0:
            probability[BEGIN] = 1.0
        these.log_probability[:] = np.minimum(0.0, np.log10(probability))
        lower = probability
    return grams


def _count(tokens: np.ndarray, words: int, order: int) -> list[Ngrams]:
    ends = np.flatnonzero(tokens == END)
    left = np.repeat(ends, np.diff(ends, prepend=-1)) - np.arange(len(tokens)) + 1
    every = np.arange(words)
    zeros = np.zeros(words, np.uint32)
    grams = [_ngrams(every, zeros, zeros, np.bincount(tokens, minlength=words))]
    ids = tokens.astype(np.uint32)  # of the n-gram that begins at each position
    for n in range(2, order + 1):
        begins = np.flatnonzero(left >= n)
        keys = ids[begins].astype(np.int64) * words + tokens[begins + n - 1]
        _, at, inverse, count = np.unique(
            keys, return_index=True, return_inverse=True, return_counts=True
        )
        del keys
        at = begins[at]
        grams.append(_ngrams(tokens[at], ids[at], ids[at + 1], count))
        ids = np.zeros(len(tokens), np.uint32)
        ids[begins] = inverse
    return grams


def _ngrams(first: np.ndarray, prefix: np.ndarray, suffix: np.ndarray, count: np.ndarray) -> Ngrams:
    empty = np.zeros(len(first), np.float32)
    return Ngrams(first, prefix, suffix, count, empty, empty.copy())


def _adjust(grams: list[Ngrams]) -> None:
    """Replaces frequencies by numbers of left neighbors, except after the begin of a sentence."""
    for these, longer in itertools.pairwise(grams):
        neighbors = np.bincount(longer.suffix, minlength=len(these.count))
        these.count = np.where(these.first == BEGIN, these.count, neighbors)
    grams[0].count[[UNKNOWN, BEGIN]] = 0


def _discounts(counts: np.ndarray) -> Sequence[float]:
    """Discounts of counts 1, 2, and more (equation 26 of Chen and Goodman 1998)."""
    n = np.bincount(np.minimum(counts, 5), minlength=6).astype(float)
    if not n[1:4].all():
        return _FALLBACK
    y = n[1] / (n[1] + 2 * n[2])
    found = [k - (k + 1) * y * n[k + 1] / n[k] for k in (1, 2, 3)]
    return found if all(0 <= d <= k for k, d in enumerate(found, 1)) else _FALLBACK


# KenLM's file format -----------------------------------------------------------------------------


def write_kenlm(file: BinaryIO, grams: Sequence[Ngrams], words: Iterable[str]) -> None:
    """Writes a model in the format that ``kenlm.Model`` maps into memory.

    Args:
        file: Open for writing.
        grams: Result of ``estimate``.
        words: The vocabulary, in the order of the numbers.
    """
    encoded = [word.encode("utf-8") for word in words]
    _write_header(file, [len(these.count) for these in grams])
    entries = np.zeros(len(encoded) - 1, [("key", "<u8"), ("id", "<u4")])
    entries["key"] = [_murmur_hash(word) for word in encoded[1:]]
    entries["id"] = range(1, len(encoded))
    file.write(struct.pack("<II", 0, len(encoded)))
    file.write(_hash_table(entries, len(encoded)))

    keys = np.arange(len(encoded), dtype=np.uint64)
    for n, these in enumerate(grams):
        longer = grams[n + 1] if n + 1 < len(grams) else None
        columns = _kenlm_values(these, longer)
        if n == 0:  # an <unk> that the vocabulary lacks takes one place
            file.write(np.stack(columns, axis=1).tobytes() + bytes(8))
            continue
        keys = _combine(keys[these.suffix], these.first)
        names = ["probability", "backoff"][: len(columns)]
        entries = np.zeros(len(keys), [("key", "<u8"), *((name, "<f4") for name in names)])
        for name, values in zip(["key", *names], [keys, *columns], strict=True):
            entries[name] = values
        file.write(_hash_table(entries, len(entries)))
    file.write(b"".join(word + b"\0" for word in encoded))


def _kenlm_values(these: Ngrams, longer: Ngrams | None) -> list[np.ndarray]:
    """Logarithms of probabilities and, except of the longest n-grams, of backoff weights.

    The sign of a probability says whether no longer n-gram ends with this one; the sign of a
    backoff weight of 0, whether no longer n-gram begins with it.
    """
    size = len(these.count)
    magnitude = np.abs(these.log_probability).astype("<f4")
    if longer is None:
        return [-magnitude]
    ends, begins = np.zeros(size, bool), np.zeros(size, bool)
    ends[longer.suffix] = True
    begins[longer.prefix] = True
    backoff = np.where(begins, these.log_backoff + np.float32(0), np.float32(-0.0))
    return [np.where(ends, magnitude, -magnitude), backoff.astype("<f4")]


def _write_header(file: BinaryIO, counts: Sequence[int]) -> None:
    magic = b"mmap lm http://kheafield.com/code format version 5\n\0\0"
    check = struct.pack("<fffIIIQ", 0.0, 1.0, -0.5, 1, 0xFFFFFFFF, 0, 1)
    settings = struct.pack("<B3xfI?3xI", len(counts), _MULTIPLIER, 0, True, 0)
    header = magic.ljust(-(-len(magic) // 8) * 8, b"\0") + check + settings
    header += struct.pack(f"<{len(counts)}Q", *counts)
    file.write(header.ljust(-(-len(header) // 8) * 8, b"\0"))


def _hash_table(entries: np.ndarray, count: int) -> bytes:
    """Entries at the position of their key modulo the size of the table, or the next free one."""
    size = max(count + 1, int(np.float32(_MULTIPLIER) * np.float32(count)))
    ideal = (entries["key"] % np.uint64(size)).astype(np.int64)
    order = np.argsort(ideal, kind="stable")
    ideal = ideal[order]
    steps = np.arange(len(order))
    overflow = 0
    while True:  # entries beyond the end go to the beginning
        at = np.maximum.accumulate(np.maximum(ideal, overflow) - steps) + steps
        beyond = int(np.count_nonzero(at >= size))
        if beyond == overflow:
            break
        overflow = beyond
    at[at >= size] = np.arange(overflow)
    table = np.zeros(size, entries.dtype)
    table[at] = entries[order]
    return table.tobytes()


def _combine(keys: np.ndarray, words: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        left = keys * np.uint64(8978948897894561157)
        return left ^ ((words.astype(np.uint64) + np.uint64(1)) * np.uint64(17894857484156487943))


def _murmur_hash(word: bytes) -> int:
    """MurmurHash64A with seed 0."""
    m, mask = 0xC6A4A7935BD1E995, (1 << 64) - 1
    h = len(word) * m & mask
    for i in range(0, len(word) & ~7, 8):
        k = int.from_bytes(word[i : i + 8], "little") * m & mask
        h = (h ^ (k ^ k >> 47) * m & mask) * m & mask
    if rest := word[len(word) & ~7 :]:
        h = (h ^ int.from_bytes(rest, "little")) * m & mask
    h = (h ^ h >> 47) * m & mask
    return h ^ h >> 47
