"""The validation split: which documents are kept out of training, decided by their text alone.

A document is in validation if the hash of its text (its key) is below ``data.val_fraction`` of the
range of hashes, whatever its source: equal texts are always in the same split. A source without
such a document (a small one) puts the document with its lowest key into validation, and that key
is then a validation key in every source.
"""

import collections
from collections.abc import Iterable
from typing import Any, NamedTuple

from llama_jax.config import DataConfig
from llama_jax.prepare.text import RawSource, read_documents


class SplitRule(NamedTuple):
    """Decides the split of a document by its key, the same in all sources."""

    threshold: int
    """threshold: documents with a lower key are in validation"""
    val_keys: frozenset[int] = frozenset()
    """exceptions: keys in validation although not below the threshold"""
    train_keys: frozenset[int] = frozenset()
    """exceptions: keys in training although below the threshold"""

    def is_val(self, key: int) -> bool:
        """Whether a document with this key is in validation."""
        return key in self.val_keys or (key < self.threshold and key not in self.train_keys)

    def exceptions(self) -> dict[str, list[int]]:
        """The exceptions as a manifest states them."""
        return {"held_out": sorted(self.val_keys), "kept": sorted(self.train_keys)}


def split_rule(
    sources: Iterable[RawSource], val_fraction: float, prepared: Iterable[dict[str, Any]] = ()
) -> SplitRule:
    """A rule with which every source has documents in both splits.

    Args:
      sources: raw text.
      val_fraction: fraction of the documents for validation.
      prepared: manifests of sources prepared before, whose exceptions are kept.

    Raises:
      ValueError: a source has fewer than two different documents.
    """
    threshold = int(val_fraction * 2**64)
    known = [m.get("made_from", {}).get("split", {}) for m in prepared]
    val_keys, train_keys = ({k for e in known for k in e.get(n, ())} for n in ("held_out", "kept"))
    for source in sources:
        lowest, highest = 2**64, -1
        bad_lines: collections.Counter[str] = collections.Counter()
        for document in read_documents(source, source.files, bad_lines):
            lowest, highest = min(lowest, document.key), max(highest, document.key)
            if lowest < threshold <= highest:
                break
        where = f"source {source.name}: {source.path!r}"
        if highest < 0:
            skipped = "".join(f"; left out: {n:,} x {reason}" for reason, n in bad_lines.items())
            raise ValueError(f"{where} has no text that is not blank{skipped}")
        if lowest == highest:
            raise ValueError(
                f"{where} has one document (or copies of one), but training and validation need "
                "one each; give more text"
            )
        if lowest >= threshold:
            val_keys.add(lowest)
        elif highest < threshold:
            train_keys.add(highest)
    return SplitRule(threshold, frozenset(val_keys), frozenset(train_keys - val_keys))


def check_val_fraction(data: DataConfig, prepared: dict[str, Any], any_raw: bool) -> None:
    """Raise ValueError unless all sources have one validation fraction: a text can be in two.

    Args:
      data: sets the fraction of raw text.
      prepared: sources prepared before, each with its manifest.
      any_raw: some source is raw text.
    """
    fractions = {n: s.manifest.get("made_from", {}).get("holdout") for n, s in prepared.items()}
    fractions = {n: fraction for n, fraction in fractions.items() if fraction is not None}
    if any_raw:
        fractions["the other sources"] = data.val_fraction
    if len(set(fractions.values())) > 1:
        listed = ", ".join(f"{fraction} in {name}" for name, fraction in fractions.items())
        raise ValueError(
            f"the validation fraction differs: {listed}; a text in two sources could be in "
            "validation in one and in training in the other: prepare all sources with one "
            "--val-fraction (data.val_fraction)"
        )
