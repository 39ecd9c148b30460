"""Text to a tokenizer and token shards.

In come sources, which ``text`` reads (a folder of text, .txt, .jsonl[.gz|.zst],
.parquet, or the standard library of the running Python); out comes a folder that
:mod:`llama_jax.data` reads::

    OUT/manifest.json            the mixture: the tokenizer, folder and weight of each source
    OUT/tokenizer.model
    OUT/NAME/manifest.json       counts, sha256 of each shard, what it was made from
    OUT/NAME/tokenizer.model
    OUT/NAME/train-00000.tokens  little-endian uint16 (uint32 from 65,537 ids on): documents back
                                 to back, each as [BOS] text [EOS]
    OUT/NAME/train-00000.starts  little-endian uint64: where in the shard each document starts
    OUT/NAME/holdout-00000.*     the documents kept out of training

    python -m llama_jax.prepare OUT --source web=web.jsonl.zst:0.8 --source code=src/:0.2 \
        --vocab-size 32000

What was made before from the same input is left alone. A folder takes its name when it is whole. A
run that was killed goes on where it was, in NAME.partial. The same command may run on several hosts
that share the disk (one with working file locks): each takes units of work, files of 256 MiB
together, until all are done. The result is the same, bit for bit, however often it was killed and
however many hosts and threads there were.

A document is held out by its content alone: if the hash of its text is below
data.val_fraction, in every source. In a source where no hash is that low, the document with the
lowest hash is held out, also in every source.
"""

import argparse
import collections
import contextlib
import errno
import functools
import hashlib
import itertools
import json
import logging
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pydantic
from tqdm import tqdm

from llama_jax.config import DataConfig, SourceConfig
from llama_jax.data.manifest import (
    FORMAT,
    MANIFEST,
    SPLITS,
    SourceManifest,
    digest,
    read_manifest,
    write_manifest,
)  # fmt: skip
from llama_jax.data.tokenizer import Tokenizer
from llama_jax.data.tokenizer_files import MODEL_FILE as TOKENIZER
from llama_jax.io import atomic_write, folder_lock, read_json, sync_folder
from llama_jax.prepare.text import KNOWN, TEXT, Document, RawSource, find_files, read_documents
from llama_jax.prepare.tokenizer import lost_in, train_tokenizer

log = logging.getLogger(__name__)

SHARD_TOKENS = 2**27
CHUNK_BYTES = 2**18  # text a thread encodes at a time
AHEAD_BYTES = 2**26  # text read ahead of what is written, at most (or one document)
UNIT_BYTES = 2**28  # files that one process tokenises at a time; shards end with them
PROGRESS_BYTES = 2**26  # text between records of progress
SAMPLE_BYTES = 10_000_000  # text a tokenizer is trained on
CHECKED_BYTES = 2**20  # text of each source that must come back from its ids
PROGRESS = "progress.json"
TRAINED_ON = ".tokenizer.json"


def prepare_mixture(data: DataConfig, vocab_size: int, out_dir: str | Path) -> Path:
    """Make tokenizer and shards of every source, or find them made.

    Call it in one process of a run. It encodes in threads (tokenizers release the GIL), so it
    starts no process beside a live JAX backend.

    Args:
      data: sources, tokenizer ("": train one of ``vocab_size`` pieces on the training documents),
        holdout, workers.
      vocab_size: V of the model; the tokenizer has at most as many ids.
      out_dir: folder to write.

    Returns:
      ``out_dir``, to open with :func:`llama_jax.data.mixture.open_mixture`.

    Raises:
      ValueError: input that cannot be used; names the file and line, and says what to do.
      OSError: reading or writing failed; what was half-written has been removed.
    """
    made = {n: m for n, s in data.sources.items() if (m := _prepared(n, s.path))}
    skip = data.skip_bad_lines
    raw = {n: find_files(n, s.path, skip) for n, s in data.sources.items() if n not in made}
    _check_holdout(data, made, bool(raw))
    rule = split_rule(list(raw.values()), data.val_fraction, made)
    out = Path(out_dir)
    out.mkdir(parents=True, exist_ok=True)

    with _lock(out):
        tokenizer, trained_on = _tokenizer(data, vocab_size, out, raw, rule, bool(made))
        sha256 = _sha256(tokenizer.path)
        _check_tokenizer(data, tokenizer, sha256, vocab_size, made)
    for name, source in raw.items():
        _prepare_source(source, data, rule, tokenizer, sha256, out / name)
    with _lock(out):
        manifest = {
            "format": FORMAT,
            "tokenizer": {"file": TOKENIZER, "sha256": sha256, "trained_on": trained_on},
            "sources": {n: _entry(n, s, out, n in made) for n, s in data.sources.items()},
        }
        if {**_read_json(out), "sha256": None} != {**manifest, "sha256": None}:
            write_manifest(out, manifest)
    return out


def _entry(name: str, source: SourceConfig, out: Path, made: bool) -> dict[str, Any]:
    """A source in the mixture's manifest: where it is, and the hash to find it by if moved."""
    folder = Path(source.path).resolve() if made else out / name
    content = digest(read_manifest(folder, SourceManifest))
    entry = {"folder": str(folder) if made else name, "weight": source.weight, "content": content}
    return entry | ({"relative": os.path.relpath(folder, out.resolve())} if made else {})


# Which documents are held out --------------------------------------------------------------------


class Rule(NamedTuple):
    """Which documents are held out, by their content alone: the same in all sources."""

    threshold: int
    """documents whose key is below are held out"""
    held_out: frozenset[int] = frozenset()
    """keys that are held out though not below"""
    kept: frozenset[int] = frozenset()
    """keys that are trained on though below"""

    def holds_out(self, key: int) -> bool:
        """Whether a document of this key is held out."""
        return key in self.held_out or (key < self.threshold and key not in self.kept)

    def plain(self) -> dict[str, list[int]]:
        """The exceptions, as a manifest states them."""
        return {"held_out": sorted(self.held_out), "kept": sorted(self.kept)}


def split_rule(
    sources: list[RawSource], holdout: float, made: dict[str, dict[str, Any]] | None = None
) -> Rule:
    """Hold out a share ``holdout`` of the documents: all whose key, a hash, is low enough.

    A source without such a document (a small one) adds the key of its lowest to those held out,
    whichever source they are in; equal texts have equal keys, so no text is on both sides.

    Args:
      sources: the text.
      holdout: share.
      made: manifests of sources prepared before, whose exceptions are taken over.

    Raises:
      ValueError: a source has less than two different documents.
    """
    threshold = int(holdout * 2**64)
    known = [m.get("made_from", {}).get("split", {}) for m in (made or {}).values()]
    held_out, kept = ({key for k in known for key in k.get(n, ())} for n in ("held_out", "kept"))
    for source in sources:
        lowest, highest = 2**64, -1
        for document in read_documents(source, source.files):
            lowest, highest = min(lowest, document.key), max(highest, document.key)
            if lowest < threshold <= highest:
                break
        where = f"source {source.name}: {source.path!r}"
        if highest < 0:
            raise ValueError(f"{where} has no text that is not blank")
        if lowest == highest:
            raise ValueError(
                f"{where} has one document (or copies of one), and one must be kept out of "
                "training; give more text"
            )
        if lowest >= threshold:
            held_out.add(lowest)
        elif highest < threshold:
            kept.add(highest)
    return Rule(threshold, frozenset(held_out), frozenset(kept - held_out))


def _check_holdout(data: DataConfig, made: dict[str, dict[str, Any]], any_raw: bool) -> None:
    """One share for all sources: a text may be in two of them."""
    shares = {n: m.get("made_from", {}).get("holdout") for n, m in made.items()}
    shares = {n: share for n, share in shares.items() if share is not None}
    if any_raw:
        shares["the other sources"] = data.val_fraction
    if len(set(shares.values())) > 1:
        listed = ", ".join(f"{share} in {name}" for name, share in shares.items())
        raise ValueError(
            f"the share held out differs: {listed}; a text in two sources could be held out in one "
            "and trained on in the other: prepare all with one --val-fraction (data.val_fraction)"
        )


# The tokenizer -----------------------------------------------------------------------------------


def _tokenizer(
    data: DataConfig,
    vocab_size: int,
    out: Path,
    raw: dict[str, RawSource],
    rule: Rule,
    any_made: bool,
) -> tuple[Tokenizer, str]:
    """The tokenizer of the mixture, in ``out``, and what it was trained on ("" if given)."""
    target = out / TOKENIZER
    if data.tokenizer or any_made:
        first_made = next((s.path for n, s in data.sources.items() if n not in raw), "")
        given = Tokenizer.load(data.tokenizer or first_made)
        if given.vocab_size <= vocab_size:
            if _sha256(target) != _sha256(given.path):
                atomic_write(target, given.path.read_bytes())
            return Tokenizer.load(target), ""
        return given, ""  # an error follows: leave what is there
    inputs = {n: [s.inputs, data.sources[n].weight] for n, s in raw.items()}
    trained_on = digest([inputs, rule.threshold, rule.plain(), vocab_size, SAMPLE_BYTES])
    known = _read_json(out, TRAINED_ON)
    if known.get("trained_on") == trained_on and _sha256(target) == known.get("sha256"):
        return Tokenizer.load(target), trained_on
    log.info(f"training a tokenizer of {vocab_size} pieces")
    tokenizer = train_tokenizer(_sample(data, raw, rule), vocab_size, target)
    known = {"trained_on": trained_on, "sha256": _sha256(target)}
    atomic_write(out / TRAINED_ON, json.dumps(known).encode())
    return tokenizer, trained_on


def _sample(data: DataConfig, raw: dict[str, RawSource], rule: Rule) -> Iterator[str]:
    """Training documents: of each source as many bytes as its weight says, or all it has."""
    total = sum(data.sources[n].weight for n in raw)
    for name, source in raw.items():
        left = SAMPLE_BYTES * data.sources[name].weight / total
        for document in _spread(source):
            if left <= 0:
                break
            if not rule.holds_out(document.key):
                left -= document.size
                yield document.text


def _spread(source: RawSource) -> Iterator[Document]:
    """All documents, in an order of files that has nothing to do with their names: the first are
    some of every part of a big folder."""
    files = sorted(source.files, key=lambda f: hashlib.sha256(f.name.encode()).digest())
    return read_documents(source, files)


def _check_lossless(tokenizer: Tokenizer, source: RawSource) -> None:
    """Some text of the source must come back from its ids."""
    left, count, lost = CHECKED_BYTES, 0, []
    for document in _spread(source):
        text = document.text[:CHECKED_BYTES]
        count += 1
        if found := lost_in(tokenizer, text):
            lost.append(found)
        if (left := left - document.size) <= 0:
            break
    if lost:
        raise ValueError(
            f"tokenizer {tokenizer.path} loses text of source {source.name}: {len(lost)} of the "
            f"{count} documents tried change by encoding and decoding, for example {lost[0]}; give "
            "a tokenizer that keeps all text (byte fallback, no normaliser)"
        )


def _check_tokenizer(
    data: DataConfig, tokenizer: Tokenizer, sha256: str, vocab_size: int, made: dict[str, Any]
) -> None:
    if tokenizer.vocab_size > vocab_size:
        raise ValueError(
            f"tokenizer {tokenizer.path} has {tokenizer.vocab_size} ids, more than "
            f"model.vocab_size={vocab_size}; set model.vocab_size={tokenizer.vocab_size}"
        )
    for name, manifest in made.items():
        if manifest["tokenizer_sha256"] != sha256:
            raise ValueError(
                f"source {name}: {data.sources[name].path} was prepared with another tokenizer "
                f"(sha256 {manifest['tokenizer_sha256'][:12]}, the mixture's is {sha256[:12]}); "
                "prepare all sources with one tokenizer, and set data.tokenizer to it or to nothing"
            )


# Sources to folders ------------------------------------------------------------------------------


def _prepare_source(
    source: RawSource, data: DataConfig, rule: Rule, tokenizer: Tokenizer, sha256: str, folder: Path
) -> None:
    made_from = {
        "input": source.inputs,
        "holdout": data.val_fraction,
        "split": rule.plain(),
        "tokenizer": sha256,
        "block_bytes": source.block_bytes,
        "section_blocks": source.section_blocks,
        "shard_tokens": SHARD_TOKENS,
        "unit_bytes": UNIT_BYTES,
    }
    if not (changed := _changed(source, folder, made_from)):
        return
    if (folder / MANIFEST).exists():
        log.info(f"source {source.name}: {' and '.join(changed)} changed, made again")
    _check_lossless(tokenizer, source)
    dtype = "uint16" if tokenizer.vocab_size <= 2**16 else "uint32"
    encode = functools.partial(_encode, tokenizer, dtype, rule)
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "name": source.name,
        "path": source.path,
        "made_from": made_from,
        "files": len(source.files),
        "skipped": source.skipped,
        "tokenizer_sha256": sha256,
        "vocab_size": tokenizer.vocab_size,
        "dtype": dtype,
    }
    units, key = _units(source), digest([made_from, CHUNK_BYTES])  # progress counts chunks
    partial = folder.with_name(folder.name + ".partial")
    while True:
        with contextlib.ExitStack() as held:
            with _lock(folder.parent):
                if not _changed(source, folder, made_from):  # another process was here
                    return
                merged = _read_json(partial).get("made_from") == made_from
                index = len(units) if merged else _take_unit(partial, len(units), key, held)
                if index == len(units):
                    with _told(folder):
                        if not merged or _changed(source, partial, made_from):
                            _merge(partial, len(units), manifest, tokenizer)
                        _finish(folder, partial)
                    return _report(source, folder)
            if index < 0:
                time.sleep(0.2)
                continue
            unit = partial / f"unit-{index:05d}"
            try:
                with _told(folder):
                    _make_unit(source, units[index], unit, encode, dtype, key, data.workers)
            except Exception:
                with _lock(folder.parent):
                    shutil.rmtree(unit, ignore_errors=True)
                    with contextlib.suppress(OSError):  # units of others
                        partial.rmdir()
                raise


def _units(source: RawSource) -> list[list[Path]]:
    """The source's files in groups that processes tokenise independently."""
    units: list[list[Path]] = []
    size = UNIT_BYTES
    for file in source.files:
        if size >= UNIT_BYTES:
            units.append([])
            size = 0
        units[-1].append(file)
        size += file.stat().st_size
    return units


def _take_unit(partial: Path, count: int, key: str, held: contextlib.ExitStack) -> int:
    """A unit that is neither done nor being made, locked until ``held`` is closed.

    ``count`` if all are done, -1 if others are making the rest.
    """
    done = 0
    for index in range(count):
        unit = partial / f"unit-{index:05d}"
        state = _read_json(unit, PROGRESS)
        if state.get("key") == key and state.get("done"):
            done += 1
            continue
        unit.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(ValueError):
            held.enter_context(folder_lock(unit, "preparing"))
            return index
    return count if done == count else -1


def _merge(partial: Path, count: int, manifest: dict[str, Any], tokenizer: Tokenizer) -> None:
    """All units are done: number their shards and describe them.

    It may be killed at any point: what was moved is not moved again.
    """
    states = [_read_json(partial / f"unit-{i:05d}", PROGRESS) for i in range(count)]
    splits: dict[str, Any] = {}
    for split in SPLITS:
        parts = [state["splits"][split] for state in states]
        splits[split] = {k: sum(p[k] for p in parts) for k in ("documents", "tokens", "text_bytes")}
        shards: list[dict[str, Any]] = []
        splits[split]["shards"] = shards
        for index, part in enumerate(parts):
            for shard in part["shards"]:
                name = f"{split}-{len(shards):05d}"
                shards.append(shard | {"name": name})
                for kind in ("tokens", "starts"):
                    made = partial / f"unit-{index:05d}" / f"{shard['name']}.{kind}"
                    if made.exists():
                        made.rename(partial / f"{name}.{kind}")
        if not splits[split]["tokens"]:
            shutil.rmtree(partial)
            side = "training" if split == "train" else "evaluation"
            raise ValueError(
                f"source {manifest['name']}: no document is left for {side}, because of what other "
                "small sources hold out; give it more text, or change data.val_fraction"
            )
    bad_lines = sum((collections.Counter(s["bad_lines"]) for s in states), collections.Counter())
    atomic_write(partial / TOKENIZER, tokenizer.path.read_bytes())
    write_manifest(partial, manifest | {"splits": splits, "bad_lines": dict(bad_lines)})


def _finish(folder: Path, partial: Path) -> None:
    """Give a merged folder its name; what it replaces, and what else is in it, is removed."""
    splits = read_manifest(partial, SourceManifest)["splits"]
    names = [shard["name"] for split in SPLITS for shard in splits[split]["shards"]]
    expected = {
        TOKENIZER,
        MANIFEST,
        *(f"{n}.{kind}" for n in names for kind in ("tokens", "starts")),
    }
    for left_over in [f for f in partial.iterdir() if f.name not in expected]:
        shutil.rmtree(left_over) if left_over.is_dir() else left_over.unlink()
    old = folder.with_name(folder.name + ".old")
    if folder.exists():
        if old.exists():
            shutil.rmtree(old)
        folder.rename(old)
    partial.rename(folder)
    sync_folder(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def _report(source: RawSource, folder: Path) -> None:
    manifest = read_manifest(folder, SourceManifest)
    documents = sum(manifest["splits"][split]["documents"] for split in SPLITS)
    if bad := manifest["bad_lines"]:
        listed = ", ".join(f"{count} {reason}" for reason, count in bad.items())
        log.warning(f"source {source.name}: left out {sum(bad.values())} bad lines: {listed}")
    if documents > len(source.files) and source.files[0].name.endswith(TEXT):
        log.info(
            f"source {source.name}: {len(source.files)} text files cut into {documents} documents "
            f"of up to {source.block_bytes / 1024:.0f} KiB, at blank lines where there are any"
        )


@contextlib.contextmanager
def _told(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as e:
        raise OSError(f"preparing {folder} failed, nothing half-written is left: {e}") from e


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Wait for the processes that prepare in the same folder."""
    with contextlib.ExitStack() as held:
        for tried in itertools.count():
            try:
                held.enter_context(folder_lock(folder, "preparing"))
                break
            except OSError as e:
                if e.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
                    raise
                break  # nor can anything be written there
            except ValueError as e:
                if tried == 50:
                    log.info(f"waiting: {e}")
                time.sleep(0.1)
        yield


# Documents to shards -----------------------------------------------------------------------------


def _make_unit(
    source: RawSource,
    files: list[Path],
    unit: Path,
    encode: Callable[[list[Document]], Any],
    dtype: str,
    key: str,
    workers: int,
) -> None:
    """Tokenise some files into shards in ``unit``, from where a killed process was."""
    state = _read_json(unit, PROGRESS)
    width = np.dtype(dtype).itemsize
    if state.get("key") != key or not _is_intact(unit, state["splits"], width):
        state = {"chunks": 0, "splits": {}}
        for left_over in unit.iterdir():
            if left_over.name != ".lock":
                left_over.unlink()
    bad_lines: collections.Counter[str] = collections.Counter()
    plain = not source.is_python and all(f.name.lower().endswith(TEXT) for f in files)

    with contextlib.ExitStack() as held:
        splits = {s: _Shards(unit, s, width, state["splits"].get(s)) for s in SPLITS}
        for shards in splits.values():
            held.enter_context(contextlib.closing(shards))
        bar = held.enter_context(
            tqdm(
                desc=f"tokenise {source.name}",
                total=sum(f.stat().st_size for f in files) if plain else None,
                initial=sum(s.total["text_bytes"] for s in splits.values()),
                unit="B",
                unit_scale=True,
                disable=None,  # shown in a terminal only
            )
        )

        def record(chunks: int, done: bool = False) -> None:
            states = {s: shards.state(done) for s, shards in splits.items()}
            now = {"key": key, "chunks": chunks, "done": done, "splits": states}
            now["bad_lines"] = dict(sorted(bad_lines.items())) if done else {}
            atomic_write(unit / PROGRESS, json.dumps(now).encode())

        # The text before is read again (its documents are counted), but not tokenised.
        chunks = _chunks(read_documents(source, files, bad_lines))
        number, recorded = state["chunks"], 0
        todo = itertools.islice(chunks, number, None)
        for encoded in _in_order(encode, todo, workers or _cores()):
            number += 1
            for split, (ids, lengths, text_bytes) in encoded.items():
                splits[split].add(ids, lengths, text_bytes)
                bar.update(text_bytes)
                recorded += text_bytes
            if recorded >= PROGRESS_BYTES:
                record(number)
                recorded = 0
        record(number, done=True)


def _encode(
    tokenizer: Tokenizer, dtype: str, rule: Rule, documents: list[Document]
) -> dict[str, tuple[np.ndarray, list[int], int]]:
    """By split: ids of the documents back to back, the length of each, bytes of text."""
    bos, eos = tokenizer.bos_id is not None, tokenizer.eos_id is not None
    train = [d for d in documents if not rule.holds_out(d.key)]
    holdout = [d for d in documents if rule.holds_out(d.key)]
    encoded = {}
    for split, docs in (("train", train), ("holdout", holdout)):
        if docs:
            ids = [tokenizer.encode_array(d.text, bos, eos) for d in docs]
            flat = np.concatenate(ids).astype(np.dtype(dtype).newbyteorder("<"))
            encoded[split] = flat, [len(i) for i in ids], sum(d.size for d in docs)
    return encoded


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


def _in_order(
    function: Callable[[list[Document]], Any], items: Iterable[list[Document]], workers: int
) -> Iterator[Any]:
    """``map`` over threads: results in the order of the items, a few items ahead."""
    waiting: collections.deque[tuple[Future[Any], int]] = collections.deque()
    ahead = 0
    pool = ThreadPoolExecutor(workers, thread_name_prefix="tokenise")
    try:
        for item in items:
            size = sum(d.size for d in item)
            waiting.append((pool.submit(function, item), size))
            ahead += size
            del item
            while len(waiting) > 2 * workers or (waiting and ahead > AHEAD_BYTES):
                future, size = waiting.popleft()
                ahead -= size
                yield future.result()
        while waiting:
            yield waiting.popleft()[0].result()
    finally:
        pool.shutdown(cancel_futures=True)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _hash_start(f: Any, size: int) -> Any:
    """SHA-256 of the next ``size`` bytes of a file, or of what there is of them."""
    found = hashlib.sha256()
    while block := f.read(min(size, 2**20)):
        found.update(block)
        size -= len(block)
    return found


def _is_intact(unit: Path, splits: dict[str, Any], width: int) -> bool:
    """Whether the shards under way still begin with what was recorded."""
    for split, state in splits.items():
        if opened := state["open"]:
            stem = f"{split}-{len(state['shards']):05d}"
            sizes = opened["tokens"] * width, opened["documents"] * 8
            for kind, size, wanted in zip(
                ("tokens", "starts"), sizes, opened["sha256"], strict=True
            ):
                try:
                    with open(unit / f"{stem}.{kind}", "rb") as f:
                        if _hash_start(f, size).hexdigest() != wanted:
                            return False
                except FileNotFoundError:
                    return False
    return True


class _Shards:
    """The shards of one split of a unit while they are written."""

    def __init__(self, folder: Path, split: str, width: int, state: dict[str, Any] | None):
        """``state``: of :meth:`state`; what was written after that is cut off."""
        self._folder, self._split, self._width = folder, split, width
        state = state or {}
        self.total = {k: state.get(k, 0) for k in ("documents", "tokens", "text_bytes")}
        self._shards: list[dict[str, Any]] = list(state.get("shards", ()))
        self._files: list[Any] = []
        if opened := state.get("open"):
            self._open(opened["tokens"], opened["documents"])

    def _open(self, tokens: int = 0, documents: int = 0) -> None:
        self._name = f"{self._split}-{len(self._shards):05d}"
        self._tokens, self._documents = tokens, documents
        self._hashes = []
        for kind, size in (("tokens", tokens * self._width), ("starts", documents * 8)):
            f = open(self._folder / f"{self._name}.{kind}", "r+b" if size else "wb")  # noqa: SIM115
            self._files.append(f)
            f.truncate(size)
            self._hashes.append(_hash_start(f, size) if size else hashlib.sha256())

    def add(self, ids: np.ndarray, lengths: list[int], text_bytes: int) -> None:
        """Documents back to back, and the length of each."""
        if not self._files:
            self._open()
        starts = (self._tokens + np.cumsum([0, *lengths[:-1]])).astype("<u8")
        for f, found, content in zip(self._files, self._hashes, (ids, starts), strict=True):
            f.write(content.data)
            found.update(content.data)
        self._tokens += len(ids)
        self._documents += len(lengths)
        for key, value in zip(self.total, (len(lengths), len(ids), text_bytes), strict=True):
            self.total[key] += value
        if self._tokens >= SHARD_TOKENS:
            self._finish_shard()

    def _finish_shard(self) -> None:
        self._sync()
        self.close()
        tokens, starts = (h.hexdigest() for h in self._hashes)
        self._shards.append(
            {
                "name": self._name,
                "tokens": self._tokens,
                "documents": self._documents,
                "tokens_sha256": tokens,
                "starts_sha256": starts,
            }
        )

    def state(self, done: bool) -> dict[str, Any]:
        """What has been written, and is on the disk; ``done``: complete the last shard."""
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
        """Close the files of the shard under way."""
        files, self._files = self._files, []
        with contextlib.ExitStack() as all_of_them:
            for f in files:
                all_of_them.callback(f.close)


# What is there already ---------------------------------------------------------------------------


def _read_json(folder: Path, name: str = MANIFEST) -> dict[str, Any]:
    """A file of ours, or {} where it is missing or damaged: then it is made again."""
    try:
        return read_json(folder / name)
    except (OSError, ValueError):
        return {}


def _prepared(name: str, path: str) -> dict[str, Any] | None:
    """Manifest of a source that is a prepared folder, None for raw text."""
    if not path or "format" not in (found := _read_json(Path(path))):
        return None
    if isinstance(found.get("sources"), dict):
        inside = ", ".join(str(Path(path) / n) for n in found["sources"])
        raise ValueError(f"source {name}: {path} is a prepared mixture; name a source: {inside}")
    try:
        return read_manifest(Path(path), SourceManifest)
    except ValueError as e:
        raise ValueError(f"source {name}: {e}") from None


def _changed(source: RawSource, folder: Path, made_from: dict[str, Any]) -> list[str]:
    """What makes it necessary to prepare a source; nothing if its folder is up to date.

    Raises:
      ValueError: the folder is something else.
    """
    if not folder.exists():
        return ["the folder"]
    try:
        old = read_manifest(folder, SourceManifest)
    except (ValueError, OSError):
        raise ValueError(
            f"{folder} is in the way: no folder of shards; move it, or write elsewhere"
        ) from None
    known = old.get("made_from", {})
    changed = [k for k, v in made_from.items() if known.get(k) != v]
    if not changed and not _is_whole(folder, old):
        changed = ["a shard"]
    if not changed and old.get("bad_lines") and not source.skip_bad_lines:
        changed = ["skip_bad_lines"]
    return changed


def _is_whole(folder: Path, manifest: dict[str, Any]) -> bool:
    width = np.dtype(manifest["dtype"]).itemsize
    shards = [s for split in manifest["splits"].values() for s in split["shards"]]
    sizes = {f"{s['name']}.tokens": s["tokens"] * width for s in shards}
    sizes |= {f"{s['name']}.starts": s["documents"] * 8 for s in shards}
    found = {f.name: f.stat().st_size for f in folder.iterdir()}
    return TOKENIZER in found and all(found.get(n) == size for n, size in sizes.items())


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""


# Command -----------------------------------------------------------------------------------------


def parse_source(argument: str) -> tuple[str, SourceConfig]:
    """``NAME=PATH[:WEIGHT]``; only a number after the last colon is a weight."""
    number = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
    found = re.fullmatch(rf"([^=]+)=(.+?)(?::({number}))?", argument)
    if not found:
        raise ValueError(f"--source {argument} is not of the form NAME=PATH or NAME=PATH:WEIGHT")
    weight = float(found[3] or 1)
    if not 0 < weight < float("inf"):
        raise ValueError(f"--source {argument}: the weight {found[3]} must be more than 0")
    return found[1], SourceConfig(path=found[2], weight=weight)


def _settings(options: argparse.Namespace) -> DataConfig:
    if not options.out.strip() or "://" in options.out:
        raise ValueError(
            f"OUT is {options.out!r}; give a folder of this machine, or of a file system that is "
            "mounted on every host"
        )
    sources: dict[str, SourceConfig] = {}
    try:
        for argument in options.source:
            name, source = parse_source(argument)
            if name in sources:
                raise ValueError(f"--source {name} is given twice")
            sources[name] = source
        return DataConfig(
            sources=sources,
            tokenizer=options.tokenizer,
            seq_len=1,
            val_fraction=options.val_fraction,
            workers=options.workers,
            skip_bad_lines=options.skip_bad_lines,
        )
    except pydantic.ValidationError as e:
        error = e.errors(include_url=False)[0]
        message = error["msg"].removeprefix("Value error, ")
        if error["loc"] in ((), ("path",)):  # of all sources, or of one
            given = f" {error['input']}" if error["loc"] else ""
            raise ValueError(f"--source{given}: {message}") from None
        option = str(error["loc"][0]).replace("_", "-")
        raise ValueError(f"--{option} {error['input']}: {message}") from None


def main(arguments: list[str] | None = None) -> None:
    """The command line; see the module's docstring."""
    parser = argparse.ArgumentParser(
        prog="python -m llama_jax.prepare",
        description="Text to a tokenizer and token shards.",
        epilog="In a recipe: [data.sources.NAME] with path = OUT/NAME.",
    )
    add = parser.add_argument
    add("out", help="folder to write")
    source_help = f"repeatable; PATH: a folder, {KNOWN}, python:code or python:prose"
    add("--source", action="append", required=True, metavar="NAME=PATH[:WEIGHT]", help=source_help)
    which = parser.add_mutually_exclusive_group(required=True)
    kinds = "SentencePiece, tokenizer.json or tiktoken"
    which.add_argument("--tokenizer", default="", help=f"a tokenizer's file: {kinds}")
    which.add_argument("--vocab-size", type=int, help="train a tokenizer of that many pieces")
    add(
        "--val-fraction",
        type=float,
        default=0.02,
        help="share of documents kept out (default 0.02)",
    )
    add("--workers", type=int, default=0, help="threads (default: one a core)")
    skip_help = "leave out lines that cannot be used, and count them (default: an error)"
    add("--skip-bad-lines", action="store_true", help=skip_help)
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        data = _settings(options)
        vocab_size = options.vocab_size
        if vocab_size is None:
            vocab_size = Tokenizer.load(options.tokenizer).vocab_size
        out = prepare_mixture(data, vocab_size, options.out)
    except (ValueError, OSError) as e:
        sys.exit(f"error: {e}")
    except KeyboardInterrupt:
        print("Ctrl-C: ended; the same command goes on from here", file=sys.stderr)
        sys.exit(130)
    for name in data.sources:
        for split, n in _read_json(out / name).get("splits", {}).items():
            print(
                f"{name:16} {split:8} {n['documents']:>12,} documents {n['tokens']:>16,} tokens "
                f"{n['text_bytes'] / n['tokens']:.2f} bytes a token"
            )
