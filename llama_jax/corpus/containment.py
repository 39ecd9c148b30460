"""Finds books that are contained in longer books, by their n-grams of words.

A sample of the n-grams (all n-grams whose hash is below a limit: FracMinHash) gives candidates, of
which the exact containment is then computed. Containment is the share of the distinct n-grams of
the shorter text that the longer one has. Unlike Jaccard similarity, it finds a story in a
collection of stories.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from llama_jax.corpus.decontaminate import ngram_hashes, word_hashes

_MAX_SAMPLES = 1 << 22
"""N-grams sampled from all texts together; comparing them takes 1.3 GB for 200,000 texts."""
_MAX_HOLDERS = 16
"""Of an n-gram that more texts have, the longest ones become candidates."""


def distinct_hashes(text: str, ngram: int) -> np.ndarray:
    """Hashes of the distinct n-grams of a text, uint64, ascending; a short text is one n-gram."""
    of_word = word_hashes(text)
    if not len(of_word):
        return of_word
    length = min(ngram, len(of_word))
    return np.unique(dict(ngram_hashes(of_word, [length]))[length])


def sampling_rate(total_bytes: int) -> int:
    """One of how many n-grams is sampled, for texts of this size together; 1 below 25 MB."""
    words = total_bytes // 6
    return 1 + words // _MAX_SAMPLES


def sample(hashes: np.ndarray, rate: int) -> np.ndarray:
    """The hashes in the sample: the same of every text."""
    return hashes[hashes <= np.uint64((2**64 - 1) // rate)]


@dataclass(frozen=True)
class Samples:
    """Samples of texts.

    Attributes:
        ids: Of the texts.
        sizes: Numbers of distinct n-grams, int64 (texts).
        counts: Numbers of sampled n-grams, int64 (texts).
        hashes: Sampled hashes of one text after the other, uint64.
    """

    ids: Sequence[str]
    sizes: np.ndarray
    counts: np.ndarray
    hashes: np.ndarray

    def ranks(self) -> np.ndarray:
        """Rank of each text, the longest first, int64 (texts)."""
        order = sorted(range(len(self.ids)), key=lambda i: (-self.sizes[i], self.ids[i]))
        ranks = np.empty(len(order), np.int64)
        ranks[order] = np.arange(len(order))
        return ranks


def find_candidates(samples: Samples) -> list[tuple[int, int]]:
    """Pairs of texts of which the first may be contained in the second, which is longer.

    Of a text's sampled n-grams that at most 15 longer texts have, the longer text of a candidate
    pair has at least half; containment over 0.9 is missed with a probability below 1e-4 if the
    sample of the text has 12 n-grams or more.
    """
    ranks = samples.ranks()
    owners = np.repeat(ranks, samples.counts)
    order = np.lexsort((owners, samples.hashes))
    hashes, owners = samples.hashes[order], owners[order]
    is_first = np.ones(len(hashes), bool)
    is_first[1:] = hashes[1:] != hashes[:-1]
    first = np.flatnonzero(is_first)[np.cumsum(is_first) - 1]  # of the same hash
    position = np.arange(len(hashes)) - first
    few_holders = np.bincount(owners[position < _MAX_HOLDERS], minlength=len(ranks))
    total = np.bincount(owners, minlength=len(ranks))
    pairs = []
    for k in range(_MAX_HOLDERS):
        later = np.flatnonzero(position > k)
        pairs.append(owners[later] * len(ranks) + owners[first[later] + k])
    pair, shared = np.unique(np.concatenate(pairs), return_counts=True)
    shorter, longer = pair // max(1, len(ranks)), pair % max(1, len(ranks))
    needed = np.maximum(few_holders, total / 4)[shorter] / 2
    text_of_rank = np.argsort(ranks)
    found = shared >= np.maximum(1, needed)
    return [
        (int(text_of_rank[a]), int(text_of_rank[b]))
        for a, b in zip(shorter[found], longer[found], strict=True)
    ]


def contained_texts(
    candidates: Iterable[tuple[int, int]],
    ranks: np.ndarray,
    hashes_of: Callable[[int], np.ndarray],
    max_containment: float,
) -> Mapping[int, tuple[int, float]]:
    """Texts of which a longer text that is kept has more than a share of the n-grams.

    Args:
        candidates: Pairs of a text and a longer one.
        ranks: See `Samples.ranks`.
        hashes_of: Gives the distinct hashes of a text.
        max_containment: The share.

    Returns:
        For each contained text the longer one, and the share.
    """
    found: dict[int, tuple[int, float]] = {}
    for shorter, longer in sorted(candidates, key=lambda pair: (ranks[pair[0]], ranks[pair[1]])):
        if shorter in found or longer in found:
            continue
        hashes = hashes_of(shorter)
        shared = np.intersect1d(hashes, hashes_of(longer), assume_unique=True)
        if len(shared) > max_containment * len(hashes):
            found[shorter] = longer, len(shared) / len(hashes)
    return found
