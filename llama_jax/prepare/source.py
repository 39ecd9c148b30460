"""Preparation of one source: raw text to a folder of token shards.

The files of a source are encoded in units of about 256 MiB, which several processes can share. The
units are in ``NAME.partial`` until all are complete; then the folder is renamed to ``NAME``.
"""

import collections
import contextlib
import errno
import hashlib
import itertools
import logging
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from llama_jax.config import DataConfig
from llama_jax.data.manifest import (
    FORMAT,
    MANIFEST,
    SPLITS,
    TEMPLATE_FILE,
    SourceManifest,
    digest,
    file_sizes,
    read_manifest,
    shard_files,
    write_manifest,
)  # fmt: skip
from llama_jax.data.tokenizer_files import MODEL_FILE
from llama_jax.io import atomic_write, file_error, folder_lock, read_json_or_empty, sync_folder
from llama_jax.prepare import shards
from llama_jax.prepare.shards import Encoding
from llama_jax.prepare.text import TEXT, RawSource
from llama_jax.prepare.tokenizer import check_lossless, check_unchanged

log = logging.getLogger(__name__)

UNIT_BYTES = 2**28
"""Files that one process encodes at a time; shards end with them."""


def prepare_source(
    source: RawSource,
    data: DataConfig,
    encoding: Encoding,
    tokenizer_sha256: str,
    folder: Path,
) -> None:
    """Encode a source into ``folder``, unless the folder is up to date.

    Args:
      source: raw text.
      data: val_fraction and workers.
      encoding: how documents become ids.
      tokenizer_sha256: hash of the tokenizer's file when it was loaded.
      folder: where the result will be.

    Raises:
      ValueError: text that cannot be used, or a tokenizer that loses text.
      OSError: reading or writing failed; incomplete files have been removed.
    """
    tokenizer = encoding.tokenizer
    made_from = _made_from(source, data, encoding, tokenizer_sha256)
    if not (changed := _changed(source, folder, made_from)):
        return
    if (folder / MANIFEST).exists():
        log.info(f"source {source.name} is prepared again: {' and '.join(changed)} changed")
    check_lossless(tokenizer, source)
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "name": source.name,
        "path": source.path,
        "made_from": made_from,
        "files": len(source.files),
        "skipped": source.skipped,
        "tokenizer_sha256": tokenizer_sha256,
        "vocab_size": tokenizer.vocab_size,
        "dtype": shards.dtype_of(tokenizer),
    }
    if template := encoding.template:
        manifest["conversations"] = {
            "format": source.format,
            "template": template.name.removeprefix("the template "),
            "template_sha256": made_from["template"],
            "loss": encoding.loss,
        }
    units = _units(source)
    key = digest([made_from, shards.CHUNK_BYTES])  # progress is counted in chunks
    partial = folder.with_name(folder.name + ".partial")
    while True:
        with contextlib.ExitStack() as stack:
            with wait_for_lock(folder.parent):
                if not _changed(source, folder, made_from):  # another process completed it
                    return
                check_unchanged(tokenizer, tokenizer_sha256)
                merged = read_json_or_empty(partial / MANIFEST).get("made_from") == made_from
                index = len(units) if merged else _take_unit(partial, len(units), key, stack)
                if index == len(units):
                    with _naming_errors(folder):
                        if not merged or _changed(source, partial, made_from):
                            _merge(partial, len(units), manifest, encoding)
                        _finish(folder, partial)
                    return _report(source, folder)
            if index < 0:
                time.sleep(0.2)
                continue
            unit = _unit_folder(partial, index)
            with _removed_after_errors(unit), _naming_errors(folder):
                shards.encode_files(source, units[index], unit, encoding, key, data.workers)


def _made_from(
    source: RawSource, data: DataConfig, encoding: Encoding, tokenizer_sha256: str
) -> dict[str, Any]:
    """Everything that determines the shards; if it changes, the source is prepared again."""
    of_conversations = {}
    if template := encoding.template:
        of_conversations = {
            "format": source.format,
            "template": hashlib.sha256(template.source.encode()).hexdigest(),
            "loss": encoding.loss,
        }
    return of_conversations | {
        "input": source.inputs,
        "holdout": data.val_fraction,
        "split": encoding.rule.exceptions(),
        "tokenizer": tokenizer_sha256,
        "block_bytes": source.block_bytes,
        "section_blocks": source.section_blocks,
        "shard_tokens": shards.SHARD_TOKENS,
        "unit_bytes": UNIT_BYTES,
    }


def _changed(source: RawSource, folder: Path, made_from: dict[str, Any]) -> list[str]:
    """The reasons to prepare a source; empty if its folder is up to date.

    Raises:
      ValueError: the folder is something else.
    """
    if not folder.exists():
        return ["the folder"]
    try:
        old = read_manifest(folder, SourceManifest)
    except (ValueError, OSError):
        raise ValueError(
            f"{folder} is not a folder of shards, but the shards of source {source.name} belong "
            "there; move it, or write to another folder"
        ) from None
    known = old.get("made_from", {})
    changed = [k for k in made_from | known if known.get(k) != made_from.get(k)]
    if not changed and not _is_whole(folder, old):
        changed = ["a shard"]
    if not changed and old.get("bad_lines") and not source.skip_bad_lines:
        changed = ["skip_bad_lines"]
    return ["val_fraction" if name == "holdout" else name for name in changed]


def _is_whole(folder: Path, manifest: dict[str, Any]) -> bool:
    width, kinds = np.dtype(manifest["dtype"]).itemsize, shard_files(manifest)
    found = {f.name: f.stat().st_size for f in folder.iterdir()}
    return all(name in found for name in _other_files(manifest)) and all(
        found.get(f"{shard['name']}.{kind}") == size
        for split in manifest["splits"].values()
        for shard in split["shards"]
        for kind, size in file_sizes(kinds, shard, width).items()
    )


def _other_files(manifest: dict[str, Any]) -> list[str]:
    """The files of a source besides its shards."""
    return [MODEL_FILE, MANIFEST, *[TEMPLATE_FILE] * bool(manifest.get("conversations"))]


# Units -------------------------------------------------------------------------------------------


def _units(source: RawSource) -> list[list[Path]]:
    """The files of a source in groups that processes encode independently."""
    units: list[list[Path]] = []
    size = UNIT_BYTES
    for file in source.files:
        if size >= UNIT_BYTES:
            units.append([])
            size = 0
        units[-1].append(file)
        size += file.stat().st_size
    return units


def _unit_folder(partial: Path, index: int) -> Path:
    return partial / f"unit-{index:05d}"


def _take_unit(partial: Path, count: int, key: str, stack: contextlib.ExitStack) -> int:
    """A unit that is neither complete nor being encoded, locked until ``stack`` is closed.

    Returns ``count`` if all are complete, -1 if other processes are encoding the rest.
    """
    done = 0
    for index in range(count):
        unit = _unit_folder(partial, index)
        state = read_json_or_empty(unit / shards.PROGRESS)
        if state.get("key") == key and state.get("done"):
            done += 1
            continue
        unit.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(ValueError):
            stack.enter_context(folder_lock(unit, "preparing"))
            return index
    return count if done == count else -1


def _merge(partial: Path, count: int, manifest: dict[str, Any], encoding: Encoding) -> None:
    """Move the shards of all units into one folder, and write its manifest.

    A killed merge can be repeated: a shard that was moved is not moved again.
    """
    states = [read_json_or_empty(_unit_folder(partial, i) / shards.PROGRESS) for i in range(count)]
    bad_lines = sum((collections.Counter(s["bad_lines"]) for s in states), collections.Counter())
    splits: dict[str, Any] = {}
    for split in SPLITS:
        units = [state["splits"][split] for state in states]
        totals = [k for k, v in units[0].items() if isinstance(v, int)]
        splits[split] = {k: sum(u[k] for u in units) for k in totals}
        merged: list[dict[str, Any]] = []
        splits[split]["shards"] = merged
        for index, unit in enumerate(units):
            for shard in unit["shards"]:
                name = f"{split}-{len(merged):05d}"
                merged.append(shard | {"name": name})
                for kind in encoding.kinds:
                    file = _unit_folder(partial, index) / f"{shard['name']}.{kind}"
                    if file.exists():
                        file.rename(partial / f"{name}.{kind}")
        if not splits[split]["tokens"]:
            shutil.rmtree(partial)
            why = "because of the validation documents of other small sources"
            if bad_lines:
                why = f"because bad lines were left out ({_listed(bad_lines)})"
            raise ValueError(
                f"source {manifest['name']}: no document is left for "
                f"{'training' if split == 'train' else 'validation'}, {why}; give it more text, or "
                "change data.val_fraction"
            )
        if not splits[split].get("counted", 1):
            shutil.rmtree(partial)
            raise ValueError(
                f"source {manifest['name']}: none of the {splits[split]['tokens']:,} tokens for "
                f"{'training' if split == 'train' else 'validation'} counts in the loss: "
                f"template {manifest['conversations']['template']} marks no answers; give another "
                "data.template, or set data.loss=all"
            )
    atomic_write(partial / MODEL_FILE, encoding.tokenizer.path.read_bytes())
    if encoding.template:
        atomic_write(partial / TEMPLATE_FILE, encoding.template.source.encode())
    write_manifest(partial, manifest | {"splits": splits, "bad_lines": dict(bad_lines)})


def _finish(folder: Path, partial: Path) -> None:
    """Rename a merged folder; what it replaces, and all other files in it, are removed."""
    manifest = read_manifest(partial, SourceManifest)
    shards = [shard for split in SPLITS for shard in manifest["splits"][split]["shards"]]
    kinds = shard_files(manifest)
    expected = {f"{s['name']}.{kind}" for s in shards for kind in kinds}
    for file in list(partial.iterdir()):
        if file.name not in {*expected, *_other_files(manifest)}:
            shutil.rmtree(file) if file.is_dir() else file.unlink()
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
        log.warning(f"source {source.name}: left out {sum(bad.values())} bad lines: {_listed(bad)}")
    is_text = source.format == "text" and source.files[0].name.endswith(TEXT)
    if is_text and documents > len(source.files):
        log.info(
            f"source {source.name}: {len(source.files)} text files split into {documents} "
            f"documents of up to {source.block_bytes / 1024:.0f} KiB, at blank lines where possible"
        )


def _listed(bad_lines: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in bad_lines.items())


@contextlib.contextmanager
def _removed_after_errors(unit: Path) -> Iterator[None]:
    """Remove a unit whose encoding fails, and their folder if it was the only one."""
    try:
        yield
    except Exception:
        with wait_for_lock(unit.parents[1]):
            shutil.rmtree(unit, ignore_errors=True)
            with contextlib.suppress(OSError):  # not empty: other units
                unit.parent.rmdir()
        raise


@contextlib.contextmanager
def _naming_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as e:
        raise OSError(
            f"preparing {folder} failed, incomplete files were removed: {file_error(e)}"
        ) from e


@contextlib.contextmanager
def wait_for_lock(folder: Path) -> Iterator[None]:
    """Wait until no other process prepares in a folder, and lock it."""
    with contextlib.ExitStack() as stack:
        for attempt in itertools.count():
            try:
                stack.enter_context(folder_lock(folder, "preparing"))
                break
            except OSError as e:
                if e.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
                    raise
                break  # a folder that cannot be written needs no lock
            except ValueError as e:
                if attempt == 50:
                    log.info(f"waiting: {e}")
                time.sleep(0.1)
        yield
