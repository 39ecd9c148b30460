"""Token shards to batches: weighted mixture, shuffle, packing, a host's rows, prefetch (Grain).

In comes the folder that :mod:`llama_jax.prepare` wrote; out come batches of numpy arrays. Sequence
``i`` of a source is tokens ``[i T, i T + T]`` of its documents back to back. Which sequences make a
batch follows from the seed and the position alone: a run continues exactly on any number of hosts.
"""

import bisect
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
    MixtureManifest,
    check_file,
    check_starts,
    check_tokenizer,
    find_source,
    in_order,
    read_manifest,
    unordered,
)  # fmt: skip
from llama_jax.data.manifest import verify as verify
from llama_jax.data.tokenizer import Tokenizer

STARTS_CHECKED = 2**23
"""Documents of a split whose order is checked when it is opened; beyond, when they are read."""

Rows = Sequence[int] | np.ndarray


@dataclasses.dataclass(frozen=True)
class Source:
    """A prepared source: shards in a folder, described by its manifest."""

    name: str
    folder: Path
    weight: float
    manifest: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Mixture:
    """Prepared sources with one tokenizer."""

    tokenizer: Path
    vocab_size: int
    """ids of the tokenizer"""
    sources: dict[str, Source]


def open_mixture(folder: str | Path, moved: Mapping[str, Path] | None = None) -> Mixture:
    """Read what ``prepare_mixture`` wrote.

    Sizes of all files, both manifests and the tokenizer's hash are checked; :func:`verify` reads
    everything.

    Args:
      folder: the mixture.
      moved: where to look first for sources that were prepared apart from the mixture, by name.

    Raises:
      ValueError: not there, of another version, altered, a shard is missing or of the wrong size,
        or no text is held out.
    """
    folder = Path(folder)
    top = read_manifest(folder, MixtureManifest)
    tokenizer = folder / top["tokenizer"]["file"]
    if problems := check_tokenizer(tokenizer, top["tokenizer"]["sha256"]):
        raise ValueError(problems[0])
    sources = {}
    for name, entry in top["sources"].items():
        if moved and name in moved and Path(entry["folder"]).is_absolute():
            entry = entry | {"folder": str(moved[name])}
        path, manifest = find_source(folder, name, entry)
        if manifest["tokenizer_sha256"] != top["tokenizer"]["sha256"]:
            raise ValueError(
                f"{path} was made with another tokenizer than {folder}; prepare it again"
            )
        sources[name] = Source(name, path, entry["weight"], manifest)
        for split in ("train", "holdout"):
            stream = TokenStream(path, manifest, split)
            if len(stream) < 2:
                raise ValueError(f"source {name}: {path} has no {split} text; prepare it again")
            stream.check_starts()
    return Mixture(tokenizer, max(s.manifest["vocab_size"] for s in sources.values()), sources)


# Tokens and windows ------------------------------------------------------------------------------


class TokenStream:
    """All tokens of one split of a source, with random access; shards stay on disk, mapped."""

    def __init__(self, folder: Path, manifest: dict[str, Any], split: str):
        self.folder, self._vocab_size = folder, manifest["vocab_size"]
        dtype = np.dtype(manifest["dtype"]).newbyteorder("<")
        shards = manifest["splits"][split]["shards"]
        self._tokens = [_file(folder / f"{s['name']}.tokens", dtype, s["tokens"]) for s in shards]
        self._starts = [
            _file(folder / f"{s['name']}.starts", np.dtype("<u8"), s["documents"]) for s in shards
        ]
        self._offsets = np.cumsum([0] + [s["tokens"] for s in shards]).tolist()

    def __len__(self) -> int:
        return self._offsets[-1]

    def check_starts(self) -> None:
        """Raise ValueError unless documents start in order; see :data:`STARTS_CHECKED`."""
        left = STARTS_CHECKED
        for tokens, starts in zip(self._tokens, self._starts, strict=True):
            if (left := left - starts.length) < 0:
                return
            check_starts(starts.path, np.fromfile(starts.path, starts.dtype), -1, tokens.length)

    def read(self, start: int, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens from ``start``, int32, and which of them start a document, bool.

        Both have the ``length`` asked for; beyond the end are zeros.
        """
        ids, is_start = np.zeros(length, np.int32), np.zeros(length, bool)
        at, stop = start, min(start + length, len(self))
        shard = bisect.bisect_right(self._offsets, start) - 1
        while at < stop:
            offset = self._offsets[shard]
            end = min(stop, self._offsets[shard + 1])
            ids[at - start : end - start] = _mapped(self._tokens[shard])[at - offset : end - offset]
            starts = _mapped(self._starts[shard])
            first, last = np.searchsorted(starts, np.array([at - offset, end - offset], "<u8"))
            if not in_order(starts[first:last], at - offset, end - offset):
                raise unordered(self._starts[shard].path)
            is_start[starts[first:last].astype(np.int64) + (offset - start)] = True
            at, shard = end, shard + 1
        # As unsigned: an id from 2**31 on would be a negative int32.
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
    """with the inode: tells a file from another that took its name"""


def _file(path: Path, dtype: np.dtype, length: int) -> _File:
    stat = check_file(path, length * dtype.itemsize)
    return _File(path, dtype, length, stat.st_ino, stat.st_mtime_ns)


@functools.lru_cache(maxsize=256)  # each map holds a file descriptor, and often 1024 are allowed
def _mapped(file: _File) -> np.ndarray:
    # As a plain array: slices of np.memmap cost several times as much.
    return np.asarray(np.memmap(file.path, file.dtype, mode="r", shape=(file.length,)))


class Windows:
    """Sequences of T tokens of one split, in the order of the text: a Grain data source."""

    def __init__(self, source: Source, cfg: DataConfig, split: str):
        self._stream = TokenStream(source.folder, source.manifest, split)
        self._seq_len, self._segments = cfg.seq_len, cfg.packing == "segments"
        # Held-out text may be shorter than a sequence: `padded` fills it up.
        least = cfg.seq_len + 1 if split == "train" else 2
        if len(self._stream) < least:
            raise ValueError(
                f"source {source.name}: the {split} split has {len(self._stream)} tokens, too few "
                f"for one sequence of data.seq_len={cfg.seq_len} and the token after it; give more "
                "text, a smaller data.seq_len, or another data.val_fraction"
            )

    def __len__(self) -> int:
        """Whole sequences; the last tokens that do not fill one are left out."""
        return (len(self._stream) - 1) // self._seq_len

    @property
    def padded_len(self) -> int:
        """Sequences when the last may be padded."""
        return math.ceil((len(self._stream) - 1) / self._seq_len)

    def __getitem__(self, index: int) -> Batch:
        """Sequence ``index``: a batch without its axis B."""
        item = self.padded(int(index))
        return item if self._segments else item._replace(mask_BT=None)

    def padded(self, index: int) -> Batch:
        """As ``[index]``, with ``mask_BT`` always there: 0 where the target is padding (id 0)."""
        start = index * self._seq_len
        ids, is_start = self._stream.read(start, self._seq_len + 1)
        mask = np.ones(self._seq_len, np.float32)
        mask[len(self._stream) - start - 1 :] = 0
        item = Batch(ids[:-1], targets_BT=ids[1:], mask_BT=mask)
        return _segments(item, is_start) if self._segments else item


def _segments(item: Batch, is_start: np.ndarray) -> Batch:
    """Add segment ids and positions in each document; mask targets of another document."""
    mask = item.mask_BT
    where = np.arange(len(mask), dtype=np.int32)
    first = is_start[:-1].copy()
    first[0] = True  # a document cut by the window starts again with it
    return item._replace(
        segment_ids_BT=np.cumsum(first, dtype=np.int32),
        positions_BT=where - np.maximum.accumulate(np.where(first, where, 0)),
        mask_BT=np.where(is_start[1:], np.float32(0), mask),
    )


# Training ----------------------------------------------------------------------------------------


class Mixing(grain.transforms.DatasetSelectionMap):
    """Source and sequence at each place of the mixture, as one host sees it.

    Exact: of the first n places each source has its share to within the number of sources, for any
    n (Grain's own ``mix`` rounds weights to hundredths of the smallest). The mixture is the same
    for any number of hosts: batch i is places ``[i B, i B + B)``, of which a host reads ``rows``.
    """

    def __init__(self, weights: list[float], batch_size: int, rows: Rows):
        # Weights as the decimal fractions people write: 0.1 is 1/10.
        exact = [Fraction(str(w)) for w in weights]
        scale = math.lcm(*(w.denominator for w in exact))
        self._shares = [int(w * scale) for w in exact]
        self._batch_size, self._rows = batch_size, [int(r) for r in rows]

    def __len__(self) -> int:
        return 2**62

    def __getitem__(self, index: int) -> tuple[int, int]:
        batch, i = divmod(index, len(self._rows))
        place = batch * self._batch_size + self._rows[i]
        before, after = self.counts(place), self.counts(place + 1)
        source = next(i for i, (a, b) in enumerate(zip(before, after, strict=True)) if a != b)
        return source, before[source]

    def counts(self, places: int) -> list[int]:
        """Sequences of each source among the first ``places`` of the mixture."""
        counts, rest = [], sum(self._shares)
        for share in self._shares:
            left = places * (rest - share) // rest
            counts.append(places - left)
            places, rest = left, rest - share
        return counts


class Progress(NamedTuple):
    """How far a source is."""

    share: float
    """of the sequences seen so far"""
    epochs: float
    """passes over the source"""


class TrainData:
    """Endless training batches of this host, prefetched in threads.

    Each :class:`~llama_jax.data.batch.Batch` has inputs and targets; with packing="segments" also
    mask, segment ids and positions. B is the number of ``rows``.

    Args:
      batch_size: sequences of a batch over all hosts.
      rows: those of a batch that this host reads, in the order in which they are returned; None:
        all.

    Raises:
      ValueError: rows outside the batch, a source too small for a sequence.
    """

    def __init__(
        self,
        mixture: Mixture,
        cfg: DataConfig,
        batch_size: int,
        rows: Rows | None = None,
    ):
        rows = _rows(batch_size, rows)
        sources = mixture.sources.values()
        windows = [Windows(s, cfg, "train") for s in sources]
        self._names, self._lengths = list(mixture.sources), [len(w) for w in windows]
        self._batch_size = batch_size
        self._identity = _identity(mixture, cfg, batch_size)
        self._mixing = Mixing([s.weight for s in sources], batch_size, rows)
        parts = [
            grain.MapDataset.source(w).shuffle(seed=_seed(cfg.seed, name)).repeat()
            for w, name in zip(windows, self._names, strict=True)
        ]
        batches = grain.MapDataset.select_from_datasets(parts, self._mixing).batch(len(rows))
        self._iterator = iter(
            batches.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=8))
        )
        self._returned = 0

    def __iter__(self) -> "TrainData":
        return self

    def __next__(self) -> Batch:
        batch = next(self._iterator)
        self._returned += 1
        return batch

    def state(self) -> dict[str, Any]:
        """Position after the batches returned so far; plain JSON, the same on every host."""
        return {"batches": self._returned, "data": self._identity}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue bit for bit where ``state`` was taken, on any number of hosts.

        Raises:
          ValueError: the state is of other data; names what differs of shards, weights, seed,
            seq_len, packing and batch size.
        """
        if differs := [k for k, v in self._identity.items() if state["data"].get(k) != v]:
            raise ValueError(
                f"the checkpoint's position is in other data: {', '.join(differs)} changed; "
                "restore the data it was made with, or start a new run"
            )
        self._iterator.set_state({"next_index": state["batches"]})
        self._returned = state["batches"]

    def progress(self) -> dict[str, Progress]:
        """Realised share and epochs of each source, exact, over all hosts."""
        places = self._returned * self._batch_size
        counts = self._mixing.counts(places)
        return {
            name: Progress(count / max(1, places), count / length)
            for name, count, length in zip(self._names, counts, self._lengths, strict=True)
        }

    def close(self) -> None:
        """Stop the threads; the object can be used no more."""
        self._iterator.close()


def _seed(seed: int, name: str) -> int:
    """A seed for each source (Grain adds the epoch to it), 32 bits."""
    digest = hashlib.blake2b(json.dumps([seed, name]).encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little")


def _identity(mixture: Mixture, cfg: DataConfig, batch_size: int) -> dict[str, Any]:
    """What the order and content of the batches depend on."""
    return {
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


def _rows(batch_size: int, rows: Rows | None) -> Rows:
    """The rows of a batch that a host reads: all, or those given."""
    if rows is None:
        return range(batch_size)
    if not len(rows) or min(rows) < 0 or max(rows) >= batch_size:
        raise ValueError(f"rows {list(rows)} are not rows of a batch of {batch_size}")
    return rows


# Evaluation --------------------------------------------------------------------------------------


class HeldOut(NamedTuple):
    """The targets of some evaluation batches, over all hosts."""

    tokens: int
    """targets that count (mask 1)"""
    text_bytes: int
    """bytes of text they stand for: bits a byte = nats a token * tokens / text_bytes / ln 2"""
    unigram_entropy: float
    """nats a token of their own frequencies: the loss of the best model without context"""


def eval_batches(
    mixture: Mixture,
    cfg: DataConfig,
    batch_size: int,
    max_batches: int,
    source: str,
    rows: Rows | None = None,
) -> Iterator[Batch]:
    """Held-out batches of a source, ``rows`` of each (None: all).

    They cover the whole split, or ``max_batches`` spread evenly over it, in the order of the text.
    As training batches, all of one shape, and always with ``mask_BT``: 0 where the target is
    padding (or, with packing="segments", belongs to another document).
    """
    rows = _rows(batch_size, rows)
    windows = Windows(mixture.sources[source], cfg, "holdout")
    total = windows.padded_len
    batches = min(max_batches, math.ceil(total / batch_size))
    wanted = min(total, batches * batch_size)
    picked = [i * total // wanted for i in range(wanted)]
    filler = jax.tree.map(np.zeros_like, windows.padded(0))
    for batch in range(batches):
        places = [batch * batch_size + row for row in rows]
        read = [windows.padded(picked[i]) if i < wanted else filler for i in places]
        yield jax.tree.map(lambda *rows: np.stack(rows), *read)


def held_out(
    mixture: Mixture, cfg: DataConfig, batch_size: int, max_batches: int, source: str
) -> HeldOut:
    """The figures that go with the loss over :func:`eval_batches` of the same arguments.

    The first process reads the text and tells the others.
    """
    from jax.experimental import multihost_utils

    # As bytes: jax would round float64 and int64 to 32 bits.
    content = np.zeros(3 * 8, np.uint8)
    if jax.process_index() == 0:
        figures = _held_out(mixture, cfg, batch_size, max_batches, source)
        content = np.frombuffer(np.array(figures, np.float64).tobytes(), np.uint8)
    if jax.process_count() > 1:
        content = np.asarray(multihost_utils.broadcast_one_to_all(content))
    tokens, text_bytes, entropy = np.frombuffer(content.tobytes(), np.float64)
    return HeldOut(int(tokens), int(text_bytes), float(entropy))


def _held_out(
    mixture: Mixture, cfg: DataConfig, batch_size: int, max_batches: int, source: str
) -> tuple[int, int, float]:
    tokenizer = _tokenizer(mixture.tokenizer)
    counts = np.zeros(mixture.vocab_size, np.int64)
    documents = 0
    for batch in eval_batches(mixture, cfg, batch_size, max_batches, source):
        used = batch.mask_BT > 0
        counts += np.bincount(batch.targets_BT[used], minlength=len(counts))
        documents += int((batch.inputs_BT[used] == tokenizer.bos_id).sum())
    # The first token of a document stands for the space that the tokenizer puts before it as well.
    sizes = tokenizer.bytes_of_id_V[: len(counts)]
    text_bytes = int(counts[: len(sizes)] @ sizes) - documents * tokenizer.prefix_bytes
    p = counts[counts > 0] / counts.sum()
    return int(counts.sum()), text_bytes, float(-(p * np.log(p)).sum())


@functools.lru_cache(maxsize=4)
def _tokenizer(path: Path) -> Tokenizer:
    return Tokenizer.load(path)
