"""Batches from prepared sources: weighted mixture, shuffling, packing, prefetching with Grain.

The sequences of a batch depend only on the seed and the position of the batch, so a run continues
exactly on any number of hosts.
"""

import dataclasses
import functools
import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import grain
import jax
import numpy as np

from llama_jax.config import DataConfig
from llama_jax.data.batch import Batch
from llama_jax.data.manifest import (
    SPLITS,
    TEMPLATE_FILE,
    MixtureManifest,
    check_template,
    check_tokenizer,
    find_source,
    read_manifest,
)  # fmt: skip
from llama_jax.data.sequences import SequenceDataset, Source
from llama_jax.data.token_stream import TokenStream
from llama_jax.data.tokenizer import Tokenizer
from llama_jax.storage.paths import is_remote

Rows = Sequence[int] | np.ndarray


@dataclasses.dataclass(frozen=True)
class Mixture:
    """Prepared sources with one tokenizer.

    Example::

      mixture = open_mixture("checkpoints/tiny/data")
      mixture.sources["code"].weight  # 0.8
    """

    tokenizer: Path
    vocab_size: int
    """number of ids of the tokenizer"""
    sources: dict[str, Source]

    @property
    def chat_template(self) -> Path | None:
        """The template that rendered the conversations; None if all sources are text."""
        folders = [s.folder for s in self.sources.values() if s.manifest.get("conversations")]
        return folders[0] / TEMPLATE_FILE if folders else None


def open_mixture(folder: str | Path, moved: Mapping[str, Path] | None = None) -> Mixture:
    """Open the mixture that :mod:`llama_jax.prepare` wrote to a folder.

    Checks both manifests, the sizes of all files and the hash of the tokenizer;
    :func:`llama_jax.data.manifest.verify` compares all contents.

    Args:
      folder: the mixture.
      moved: the first place to look for a source that was prepared outside the mixture, by name.

    Raises:
      ValueError: a file is missing, altered, or of another version, or a source has no validation
        text.
    """
    folder = Path(folder)
    top = read_manifest(folder, MixtureManifest)
    tokenizer = folder / top["tokenizer"]["file"]
    if problems := check_tokenizer(tokenizer, top["tokenizer"]["sha256"]):
        raise ValueError(problems[0])
    sources = {}
    templates: dict[str, str] = {}
    for name, entry in top["sources"].items():
        outside = is_remote(entry["folder"]) or Path(entry["folder"]).is_absolute()
        if moved and name in moved and outside:
            entry = entry | {"folder": str(moved[name])}
        path, manifest = find_source(folder, name, entry)
        if manifest["tokenizer_sha256"] != top["tokenizer"]["sha256"]:
            raise ValueError(
                f"{path} was made with another tokenizer than {folder}; prepare it again"
            )
        sources[name] = Source(name, path, entry["weight"], manifest)
        if conversations := manifest.get("conversations"):
            wanted = conversations["template_sha256"]
            if problems := check_template(path / TEMPLATE_FILE, wanted):
                raise ValueError(problems[0])
            templates.setdefault(wanted, name)
        for split in SPLITS:
            stream = TokenStream(path, manifest, split)
            if len(stream) < 2:
                kind = "training" if split == "train" else "validation"
                raise ValueError(f"source {name}: {path} has no {kind} text; prepare it again")
            stream.check_doc_offsets()
    if len(templates) > 1:
        raise ValueError(
            f"sources {' and '.join(templates.values())} of {folder} were prepared with different "
            "chat templates, of which a model can have one; prepare them again with one template"
        )
    return Mixture(tokenizer, max(s.manifest["vocab_size"] for s in sources.values()), sources)


# Training ----------------------------------------------------------------------------------------


class MixtureSampler(grain.transforms.DatasetSelectionMap):
    """Selects source and sequence for each position of the mixture, for the rows of one host.

    For any n, the number of sequences of a source among the first n differs from its exact share by
    less than the number of sources (Grain's own ``mix`` rounds weights to hundredths of the
    smallest). The mixture does not depend on the number of hosts: batch i is positions
    ``[i B, i B + B)``, of which a host reads ``rows``.

    Args:
      weights: of the sources.
      batch_size: B.
      rows: rows of a batch that this host reads.

    Example::

      source, sequence = MixtureSampler([0.7, 0.3], 8, range(8))[0]
    """

    def __init__(self, weights: list[float], batch_size: int, rows: Rows):
        # Weights as exact decimal fractions: 0.1 is 1/10.
        exact = [Fraction(str(w)) for w in weights]
        scale = math.lcm(*(w.denominator for w in exact))
        self._shares = [int(w * scale) for w in exact]
        self._batch_size, self._rows = batch_size, [int(r) for r in rows]

    def __len__(self) -> int:
        return 2**62

    def __getitem__(self, index: int) -> tuple[int, int]:
        batch, i = divmod(index, len(self._rows))
        position = batch * self._batch_size + self._rows[i]
        before, after = self.counts(position), self.counts(position + 1)
        source = next(i for i, (a, b) in enumerate(zip(before, after, strict=True)) if a != b)
        return source, before[source]

    def counts(self, positions: int) -> list[int]:
        """Number of sequences of each source in the first ``positions`` of the mixture."""
        counts, rest = [], sum(self._shares)
        for share in self._shares:
            left = positions * (rest - share) // rest
            counts.append(positions - left)
            positions, rest = left, rest - share
        return counts


class Progress(NamedTuple):
    """How much of a source was used."""

    share: float
    """fraction of all sequences so far that came from this source"""
    epochs: float
    """passes over the source"""


class TrainData:
    """Endless training batches of this host, prefetched in threads.

    Each :class:`~llama_jax.data.batch.Batch` has inputs and targets; except with packing="concat"
    also mask, segment ids and positions. B is the number of ``rows``.

    Args:
      mixture: prepared sources.
      cfg: sets T, packing and seed.
      batch_size: sequences per batch over all hosts.
      rows: rows of a batch that this host reads, in the order of the result; None: all.

    Raises:
      ValueError: a row is outside the batch, or a source is too small for one sequence.

    Example::

      data = TrainData(open_mixture("checkpoints/tiny/data"), recipe.data, batch_size=16)
      batch = next(data)
      data.close()
    """

    def __init__(
        self, mixture: Mixture, cfg: DataConfig, batch_size: int, rows: Rows | None = None
    ):
        rows = _check_rows(batch_size, rows)
        sources = mixture.sources.values()
        sequences = [SequenceDataset(s, cfg, "train") for s in sources]
        self._names, self._lengths = list(mixture.sources), [len(s) for s in sequences]
        self._batch_size = batch_size
        self._fingerprint = fingerprint(mixture, cfg, batch_size)
        self._sampler = MixtureSampler([s.weight for s in sources], batch_size, rows)
        datasets = [
            grain.MapDataset.source(s).shuffle(seed=_seed(cfg.seed, name)).repeat()
            for s, name in zip(sequences, self._names, strict=True)
        ]
        batches = grain.MapDataset.select_from_datasets(datasets, self._sampler).batch(len(rows))
        self._iterator = iter(
            batches.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=8))
        )
        self._returned = 0

    @property
    def sequences_per_epoch(self) -> int:
        """Number of training sequences of all sources."""
        return sum(self._lengths)

    def __iter__(self) -> "TrainData":
        return self

    def __next__(self) -> Batch:
        batch = next(self._iterator)
        self._returned += 1
        return batch

    def state(self) -> dict[str, Any]:
        """Position after the batches returned so far: plain JSON values, equal on all hosts."""
        return {"batches": self._returned, "data": self._fingerprint}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue exactly where ``state`` was taken, on any number of hosts.

        Raises:
          ValueError: the state belongs to other data; names what differs of shards, weights, seed,
            seq_len, packing and batch size.
        """
        if differs := [k for k, v in self._fingerprint.items() if state["data"].get(k) != v]:
            raise ValueError(
                f"the checkpoint's position belongs to other data: {', '.join(differs)} changed; "
                "restore the data it was made with, or start a new run"
            )
        self._iterator.set_state({"next_index": state["batches"]})
        self._returned = state["batches"]

    def progress(self) -> dict[str, Progress]:
        """Fraction and epochs of each source so far, over all hosts."""
        positions = self._returned * self._batch_size
        counts = self._sampler.counts(positions)
        return {
            name: Progress(count / max(1, positions), count / length)
            for name, count, length in zip(self._names, counts, self._lengths, strict=True)
        }

    def close(self) -> None:
        """Stop the threads; no more batches can be read."""
        self._iterator.close()


def _seed(seed: int, name: str) -> int:
    """A 32-bit seed for each source; Grain adds the epoch to it."""
    digest = hashlib.blake2b(json.dumps([seed, name]).encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little")


def fingerprint(mixture: Mixture, cfg: DataConfig, batch_size: int) -> dict[str, Any]:
    """Everything that determines the order and content of the batches, as plain values.

    Args:
      mixture: prepared sources.
      cfg: sets T, packing and seed.
      batch_size: sequences per batch over all hosts.
    """
    of_examples = {"long_examples": cfg.long_examples} if cfg.packing == "examples" else {}
    return of_examples | {
        "batch_size": batch_size,
        "seq_len": cfg.seq_len,
        "packing": cfg.packing,
        "seed": cfg.seed,
        "sources": {
            name: {
                "weight": s.weight,
                "shards": hashlib.sha256(
                    json.dumps(s.manifest["splits"]["train"]["shards"]).encode()
                ).hexdigest(),
            }
            for name, s in mixture.sources.items()
        },
    }


def _check_rows(batch_size: int, rows: Rows | None) -> Rows:
    """The rows of a batch that a host reads: all, or those given."""
    if rows is None:
        return range(batch_size)
    if not len(rows) or min(rows) < 0 or max(rows) >= batch_size:
        raise ValueError(f"rows {list(rows)} are not rows of a batch of {batch_size}")
    return rows


# Validation --------------------------------------------------------------------------------------


class ValStats(NamedTuple):
    """Statistics of the targets of some validation batches, over all hosts."""

    tokens: int
    """targets with mask 1"""
    text_bytes: int
    """UTF-8 bytes of their text: bits/byte = nats/token * tokens / text_bytes / ln 2"""
    unigram_entropy: float
    """entropy of their frequencies in nats/token: the loss of the best model without context"""


def eval_batches(
    mixture: Mixture,
    cfg: DataConfig,
    batch_size: int,
    max_batches: int,
    source: str,
    rows: Rows | None = None,
) -> Iterator[Batch]:
    """Validation batches of a source, with the shape of training batches and always with
    ``mask_BT``.

    They cover the whole split, or ``max_batches`` spread evenly over it, in the order of the text.

    Args:
      mixture: prepared sources.
      cfg: sets T and packing.
      batch_size: sequences per batch over all hosts.
      max_batches: maximum number of batches.
      source: name of the source.
      rows: rows of each batch that this host reads; None: all.
    """
    rows = _check_rows(batch_size, rows)
    sequences = SequenceDataset(mixture.sources[source], cfg, "holdout")
    total = sequences.padded_len
    batches = min(max_batches, math.ceil(total / batch_size))
    wanted = min(total, batches * batch_size)
    selected = [i * total // wanted for i in range(wanted)]
    filler = jax.tree.map(np.zeros_like, sequences.padded(0))
    for batch in range(batches):
        positions = [batch * batch_size + row for row in rows]
        read = [sequences.padded(selected[i]) if i < wanted else filler for i in positions]
        yield jax.tree.map(lambda *rows: np.stack(rows), *read)


def val_stats(
    mixture: Mixture, cfg: DataConfig, batch_size: int, max_batches: int, source: str
) -> ValStats:
    """Statistics of :func:`eval_batches` with the same arguments, which turn the summed loss into
    nats/token and bits/byte. Process 0 reads the text and sends the result to the others."""
    from jax.experimental import multihost_utils

    # As bytes, because JAX would round float64 to 32 bits.
    content = np.zeros(3 * 8, np.uint8)
    if jax.process_index() == 0:
        stats = _count_targets(mixture, cfg, batch_size, max_batches, source)
        content = np.frombuffer(np.array(stats, np.float64).tobytes(), np.uint8)
    if jax.process_count() > 1:
        content = np.asarray(multihost_utils.broadcast_one_to_all(content))
    tokens, text_bytes, entropy = np.frombuffer(content.tobytes(), np.float64)
    return ValStats(int(tokens), int(text_bytes), float(entropy))


def _count_targets(
    mixture: Mixture, cfg: DataConfig, batch_size: int, max_batches: int, source: str
) -> ValStats:
    tokenizer = _tokenizer(mixture.tokenizer)
    counts = np.zeros(mixture.vocab_size, np.int64)
    is_control_V = np.zeros(mixture.vocab_size, bool)
    is_control_V[[i for i in tokenizer.controls.values() if i < mixture.vocab_size]] = True
    spaces = 0
    for batch in eval_batches(mixture, cfg, batch_size, max_batches, source):
        used = batch.mask_BT > 0
        counts += np.bincount(batch.targets_BT[used], minlength=len(counts))
        after_control = is_control_V[batch.inputs_BT] & ~is_control_V[batch.targets_BT]
        spaces += int((used & after_control).sum()) * tokenizer.prefix_bytes
    # The bytes of the first token of a text include the space that the tokenizer adds before it.
    sizes = tokenizer.bytes_of_id_V[: len(counts)]
    text_bytes = int(counts[: len(sizes)] @ sizes) - spaces
    p = counts[counts > 0] / counts.sum()
    return ValStats(int(counts.sum()), text_bytes, float(-(p * np.log(p)).sum()))


_tokenizer = functools.lru_cache(maxsize=4)(Tokenizer.load)
