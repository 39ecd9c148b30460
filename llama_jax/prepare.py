"""Text to a tokenizer and token shards.

In come sources, which :mod:`llama_jax.text` reads (a folder of text, .txt, .jsonl[.gz|.zst],
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

What was made before from the same input is left alone. A folder takes its name when it is whole.
"""

import argparse
import collections
import contextlib
import functools
import hashlib
import io
import json
import logging
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from llama_jax.config import DataConfig, SourceConfig
from llama_jax.io import atomic_write
from llama_jax.text import KNOWN, TEXT, Document, RawSource, digest, find_files, read_documents
from llama_jax.tokenizer import FILE_NAME as TOKENIZER
from llama_jax.tokenizer import Tokenizer, train_tokenizer

log = logging.getLogger(__name__)

FORMAT = 1
MANIFEST = "manifest.json"
SHARD_TOKENS = 2**27
CHUNK_BYTES = 2**18  # text a thread encodes at a time
SAMPLE_BYTES = 10_000_000  # text a tokenizer is trained on


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
      ``out_dir``, to open with :func:`llama_jax.data.open_mixture`.

    Raises:
      ValueError: input that cannot be used; names the file and line, and says what to do.
      OSError: reading or writing failed; what was half-written has been removed.
    """
    made = {n: m for n, s in data.sources.items() if (m := _prepared(n, s.path))}
    raw = {n: find_files(n, s.path) for n, s in data.sources.items() if n not in made}
    thresholds = {n: split_threshold(s, data.holdout) for n, s in raw.items()}
    out = Path(out_dir)
    out.mkdir(parents=True, exist_ok=True)

    tokenizer, trained_on = _tokenizer(data, vocab_size, out, raw, thresholds, bool(made))
    sha256 = _sha256(tokenizer.path)
    _check_tokenizer(data, tokenizer, sha256, vocab_size, made)
    for name, source in raw.items():
        _prepare_source(source, data, thresholds[name], tokenizer, sha256, out / name)

    folders = {n: str(Path(s.path).resolve()) if n in made else n for n, s in data.sources.items()}
    manifest = {
        "format": FORMAT,
        "tokenizer": {"file": TOKENIZER, "sha256": sha256, "trained_on": trained_on},
        "sources": {n: {"folder": folders[n], "weight": s.weight} for n, s in data.sources.items()},
    }
    atomic_write(out / MANIFEST, json.dumps(manifest, indent=1).encode())
    return out


# Which documents are held out --------------------------------------------------------------------


def split_threshold(source: RawSource, holdout: float) -> int:
    """Documents whose key is below this are held out: a share ``holdout``, at least one a side.

    Equal texts have equal keys, so copies of a document are never on both sides.
    """
    threshold, count, lowest, highest = int(holdout * 2**64), 0, 2**64, -1
    for document in read_documents(source, source.files):
        count += 1
        lowest, highest = min(lowest, document.key), max(highest, document.key)
        if lowest < threshold <= highest:
            return threshold
    where = f"source {source.name}: {source.path!r}"
    if not count:
        raise ValueError(f"{where} has no text that is not blank")
    if lowest == highest:
        raise ValueError(
            f"{where} has one document (or copies of one), and one must be kept out of training; "
            "give more text"
        )
    if source.is_python:  # code and prose must split alike
        raise ValueError(
            f"{where}: data.holdout={holdout} keeps none of {count} modules out of training; "
            f"set it to at least {lowest / 2**64:.1g}"
        )
    return lowest + 1 if lowest >= threshold else highest


# The tokenizer -----------------------------------------------------------------------------------


def _tokenizer(
    data: DataConfig,
    vocab_size: int,
    out: Path,
    raw: dict[str, RawSource],
    thresholds: dict[str, int],
    any_made: bool,
) -> tuple[Tokenizer, str]:
    """The tokenizer of the mixture, in ``out``, and what it was trained on ("" if given)."""
    target = out / TOKENIZER
    if data.tokenizer or any_made:
        first_made = next((s.path for n, s in data.sources.items() if n not in raw), "")
        given = Tokenizer.load(data.tokenizer or first_made)
        if given.vocab_size <= vocab_size:
            atomic_write(target, given.path.read_bytes())
            return Tokenizer.load(target), ""
        return given, ""  # an error follows: leave what is there
    inputs = {n: [s.inputs, data.sources[n].weight, thresholds[n]] for n, s in raw.items()}
    trained_on = digest([inputs, vocab_size, SAMPLE_BYTES])
    known = (_read_manifest(out) or {}).get("tokenizer", {})
    if known.get("trained_on") == trained_on and _sha256(target) == known["sha256"]:
        return Tokenizer.load(target), trained_on
    log.info(f"training a tokenizer of {vocab_size} pieces")
    return train_tokenizer(_sample(data, raw, thresholds), vocab_size, target), trained_on


def _sample(
    data: DataConfig, raw: dict[str, RawSource], thresholds: dict[str, int]
) -> Iterator[str]:
    """Training documents: of each source as many bytes as its weight says, or all it has."""
    weights = {n: data.sources[n].weight for n in raw}
    for name, source in raw.items():
        left = SAMPLE_BYTES * weights[name] / sum(weights.values())
        # An order that has nothing to do with the names: some of every part of a big folder.
        files = sorted(source.files, key=lambda f: hashlib.sha256(f.name.encode()).digest())
        for document in read_documents(source, files):
            if left <= 0:
                break
            if document.key >= thresholds[name]:
                left -= document.size
                yield document.text


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


# Documents to shards -----------------------------------------------------------------------------


def _prepare_source(
    source: RawSource,
    data: DataConfig,
    threshold: int,
    tokenizer: Tokenizer,
    sha256: str,
    folder: Path,
) -> None:
    made_from = {
        "input": source.inputs,
        "holdout": data.holdout,
        "tokenizer": sha256,
        "block_bytes": source.block_bytes,
        "shard_tokens": SHARD_TOKENS,
    }
    old = _read_manifest(folder)
    if old is None and folder.exists():
        raise ValueError(
            f"{folder} is in the way: no folder of shards; move it, or write elsewhere"
        )
    if old is not None:
        known = old.get("made_from", {})
        changed = [k for k, v in made_from.items() if known.get(k) != v]
        if not changed and old["format"] == FORMAT and _is_whole(folder, old):
            return
        log.info(f"source {source.name}: {' and '.join(changed) or 'a shard'} changed, made again")
    dtype = "uint16" if tokenizer.vocab_size <= 2**16 else "uint32"
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
    with _new_folder(folder) as partial:
        encode = functools.partial(_encode, tokenizer, dtype, threshold)
        manifest["splits"] = _write_shards(source, encode, partial, data.workers or _cores())
        shutil.copyfile(tokenizer.path, partial / TOKENIZER)
        atomic_write(partial / MANIFEST, json.dumps(manifest, indent=1).encode())
    documents = sum(s["documents"] for s in manifest["splits"].values())
    if documents > len(source.files) and source.files[0].name.endswith(TEXT):
        log.info(
            f"source {source.name}: {len(source.files)} text files cut into {documents} documents "
            f"of up to {source.block_bytes / 1024:.0f} KiB, at blank lines where there are any"
        )


def _write_shards(
    source: RawSource, encode: Callable[[list[Document]], Any], folder: Path, workers: int
) -> dict[str, Any]:
    plain = not source.is_python and all(f.name.lower().endswith(TEXT) for f in source.files)
    with (
        contextlib.closing(_Shards(folder, "train")) as train,
        contextlib.closing(_Shards(folder, "holdout")) as holdout,
        tqdm(
            desc=f"tokenise {source.name}",
            total=sum(f.stat().st_size for f in source.files) if plain else None,
            unit="B",
            unit_scale=True,
            disable=None,  # shown in a terminal only
        ) as bar,
    ):
        splits = {"train": train, "holdout": holdout}
        chunks = _chunks(read_documents(source, source.files))
        for encoded in _in_order(encode, chunks, workers):
            for split, (ids, lengths, text_bytes) in encoded.items():
                splits[split].add(ids, lengths, text_bytes)
                bar.update(text_bytes)
        return {name: split.finish() for name, split in splits.items()}


def _encode(
    tokenizer: Tokenizer, dtype: str, threshold: int, documents: list[Document]
) -> dict[str, tuple[np.ndarray, list[int], int]]:
    """By split: ids of the documents back to back, the length of each, bytes of text."""
    bos, eos = tokenizer.bos_id is not None, tokenizer.eos_id is not None
    train = [d for d in documents if d.key >= threshold]
    holdout = [d for d in documents if d.key < threshold]
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


def _in_order(function: Callable[[Any], Any], items: Iterable[Any], workers: int) -> Iterator[Any]:
    """``map`` over threads: results in the order of the items, a few items ahead."""
    waiting: collections.deque[Future[Any]] = collections.deque()
    pool = ThreadPoolExecutor(workers, thread_name_prefix="tokenise")
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _Shards:
    """The shards of one split while they are written."""

    def __init__(self, folder: Path, split: str):
        self._folder, self._split = folder, split
        self._file: io.BufferedWriter | None = None
        self._total = {"documents": 0, "tokens": 0, "text_bytes": 0}
        self._shards: list[dict[str, Any]] = []

    def add(self, ids: np.ndarray, lengths: list[int], text_bytes: int) -> None:
        if self._file is None:
            self._name = f"{self._split}-{len(self._shards):05d}"
            self._file = open(self._folder / f"{self._name}.tokens", "wb")  # noqa: SIM115
            self._sha256 = hashlib.sha256()
            self._starts, self._tokens = [np.zeros(0, "<u8")], 0
        starts = self._tokens + np.cumsum([0, *lengths[:-1]])
        self._starts.append(starts.astype("<u8"))
        self._file.write(ids.data)
        self._sha256.update(ids.data)
        self._tokens += len(ids)
        for key, value in zip(self._total, (len(lengths), len(ids), text_bytes), strict=True):
            self._total[key] += value
        if self._tokens >= SHARD_TOKENS:
            self._finish_shard()

    def _finish_shard(self) -> None:
        self.close()
        self._file = None
        starts = np.concatenate(self._starts)
        (self._folder / f"{self._name}.starts").write_bytes(starts.data)
        self._shards.append(
            {
                "name": self._name,
                "tokens": self._tokens,
                "documents": len(starts),
                "tokens_sha256": self._sha256.hexdigest(),
                "starts_sha256": hashlib.sha256(starts.data).hexdigest(),
            }
        )

    def finish(self) -> dict[str, Any]:
        """Complete the last shard; returns the split's part of the manifest."""
        if self._file is not None:
            self._finish_shard()
        return {**self._total, "shards": self._shards}

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


# Files that are whole or absent ------------------------------------------------------------------


@contextlib.contextmanager
def _new_folder(folder: Path) -> Iterator[Path]:
    """A folder to fill: takes its name when the block ends well, disappears when it does not."""
    partial, old = (folder.with_name(folder.name + end) for end in (".partial", ".old"))
    try:
        for left_over in (partial, old):
            if left_over.exists():
                shutil.rmtree(left_over)
        partial.mkdir(parents=True)
        yield partial
        for file in partial.iterdir():
            with open(file, "rb") as f:
                os.fsync(f.fileno())
        if folder.exists():
            folder.rename(old)
        partial.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    except BaseException as e:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(e, OSError):
            raise OSError(f"preparing {folder} failed, nothing half-written is left: {e}") from e
        raise


def _read_manifest(folder: Path) -> dict[str, Any] | None:
    try:
        content = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) and "format" in content else None


def _prepared(name: str, path: str) -> dict[str, Any] | None:
    """Manifest of a source that is a prepared folder, None for raw text."""
    manifest = _read_manifest(Path(path))
    if manifest is None:
        return None
    if "sources" in manifest:
        inside = ", ".join(str(Path(path) / n) for n in manifest["sources"])
        raise ValueError(f"source {name}: {path} is a prepared mixture; name a source: {inside}")
    if manifest["format"] != FORMAT:
        raise ValueError(
            f"source {name}: {path} has format {manifest['format']}, this version reads {FORMAT}; "
            "prepare it again"
        )
    return manifest


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
    found = re.fullmatch(r"([^=]+)=(.+?)(?::(\d*\.?\d+))?", argument)
    if not found:
        raise ValueError(f"--source {argument} is not of the form NAME=PATH or NAME=PATH:WEIGHT")
    return found[1], SourceConfig(path=found[2], weight=float(found[3] or 1))


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
    add("--holdout", type=float, default=0.02, help="share of documents kept out (default 0.02)")
    add("--workers", type=int, default=0, help="threads (default: one a core)")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        data = DataConfig(
            sources=dict(map(parse_source, options.source)),
            tokenizer=options.tokenizer,
            seq_len=1,
            holdout=options.holdout,
            workers=options.workers,
        )
        vocab_size = options.vocab_size or Tokenizer.load(options.tokenizer).vocab_size
        out = prepare_mixture(data, vocab_size, options.out)
    except (ValueError, OSError) as e:
        sys.exit(f"error: {e}")
    for name in data.sources:
        manifest = _read_manifest(out / name)
        for split, n in (manifest or {"splits": {}})["splits"].items():
            print(
                f"{name:16} {split:8} {n['documents']:>12,} documents {n['tokens']:>16,} tokens "
                f"{n['text_bytes'] / n['tokens']:.2f} bytes a token"
            )


if __name__ == "__main__":
    main()
