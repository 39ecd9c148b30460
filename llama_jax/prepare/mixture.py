"""Preparation of a mixture: one tokenizer, and token shards of every source.

The result is a folder that :mod:`llama_jax.data.mixture` opens::

    OUT/manifest.json            tokenizer, folder and weight of each source
    OUT/tokenizer.model
    OUT/NAME/manifest.json       counts, SHA-256 of each shard, settings
    OUT/NAME/tokenizer.model
    OUT/NAME/train-00000.tokens  little-endian uint16 (uint32 from 65,537 ids on): documents back
                                 to back, each as [BOS] text [EOS]
    OUT/NAME/train-00000.starts  little-endian uint64: where in the shard each document starts
    OUT/NAME/train-00000.mask    conversations only: uint8, 1 for each token that counts in the loss
    OUT/NAME/chat_template.jinja conversations only: the template that rendered them
    OUT/NAME/holdout-00000.*     the validation split

Sources that are up to date are not prepared again. Several hosts that share a disk (with working
file locks) can run the same command: each takes groups of files until all are done. The result is
the same bit for bit for any number of hosts, threads and interruptions.

A folder in a bucket is prepared locally by one host and then uploaded.
"""

import logging
import os
from pathlib import Path
from typing import Any, NamedTuple

from llama_jax.config import DataConfig, SourceConfig
from llama_jax.data.chat_template import ChatTemplate, load_template
from llama_jax.data.manifest import (
    FORMAT,
    MANIFEST,
    MixtureManifest,
    SourceManifest,
    digest,
    find_source,
    read_manifest,
    write_manifest,
)  # fmt: skip
from llama_jax.data.sequences import check_packing
from llama_jax.data.shard_cache import local_shards
from llama_jax.data.tokenizer_files import MODEL_FILE
from llama_jax.io import read_json_or_empty, sha256
from llama_jax.prepare.bucket import prepared_in_bucket
from llama_jax.prepare.shards import Encoding
from llama_jax.prepare.source import prepare_source, wait_for_lock
from llama_jax.prepare.split import SplitRule, check_val_fraction, split_rule
from llama_jax.prepare.text import find_files
from llama_jax.prepare.tokenizer import (
    check_tokenizer,
    check_unchanged,
    choose_tokenizer,
    install_tokenizer,
)
from llama_jax.storage.copies import local_files
from llama_jax.storage.paths import ObjectPath, as_path, is_remote

log = logging.getLogger(__name__)


class PreparedSource(NamedTuple):
    """A source that was prepared before, and is not changed."""

    folder: Path
    manifest: dict[str, Any]


def prepare_mixture(
    data: DataConfig, vocab_size: int, out_dir: str | Path, keep_sources: bool = False
) -> Path:
    """Prepare the tokenizer and every source of a mixture, except what is up to date.

    Call it in one process of a run. It encodes in threads (``tokenizers`` and ``sentencepiece``
    release the GIL), so it never forks a process in which a JAX backend runs.

    Args:
      data: sources (text, or folders prepared before), tokenizer ("": train one of ``vocab_size``
        ids on the training documents), val_fraction, workers.
      vocab_size: V of the model; the tokenizer has at most as many ids.
      out_dir: folder to write; for one in a bucket, a local folder is written and uploaded.
      keep_sources: sources in ``out_dir`` that ``data`` does not name stay in the mixture, and the
        new ones get their tokenizer.

    Returns:
      The local folder, to open with :func:`llama_jax.data.mixture.open_mixture`.

    Raises:
      ValueError: input that cannot be used; names the file and line, and says what to do.
      OSError: reading or writing failed; incomplete files have been removed.
    """
    if isinstance(remote := as_path(out_dir), ObjectPath):
        with prepared_in_bucket(remote, list(data.sources)) as local:
            return prepare_mixture(data, vocab_size, local, keep_sources)
    out = remote
    given = {n: s for n, source in data.sources.items() if (s := _prepared(n, source))}
    others = _other_sources(out, data) if keep_sources else {}
    prepared = {**given, **others}
    raw = {
        name: find_files(name, source.path, data.skip_bad_lines, source.format)
        for name, source in data.sources.items()
        if name not in given
    }
    check_val_fraction(data, prepared, bool(raw))
    template = _template(data, [n for n, s in raw.items() if s.format != "text"])
    manifests = [source.manifest for source in prepared.values()]
    rule = split_rule(raw.values(), data.val_fraction, manifests)
    for name, other in others.items():
        _warn_of_leak(name, other, rule)
    out.mkdir(parents=True, exist_ok=True)

    with wait_for_lock(out):
        first = next(iter(prepared.values()), None)
        folder = first.folder if first else None
        tokenizer, trained_on = choose_tokenizer(data, vocab_size, out, raw, rule, folder)
        check_tokenizer(tokenizer, vocab_size, prepared)
        tokenizer = install_tokenizer(tokenizer, out)
        tokenizer_sha256 = sha256(tokenizer.path)
    text = Encoding(tokenizer, rule)
    conversations = text._replace(template=template, loss=data.loss)
    for name, found in raw.items():
        encoding = text if found.format == "text" else conversations
        prepare_source(found, data, encoding, tokenizer_sha256, out / name)
    with wait_for_lock(out):
        check_unchanged(tokenizer, tokenizer_sha256)
        if keep_sources:  # another command may have added some since
            others = _other_sources(out, data)
            check_tokenizer(tokenizer, vocab_size, others)
            check_val_fraction(data, {**given, **others}, bool(raw))
        sources = _entries(out) if keep_sources else {}
        for name, source in data.sources.items():
            sources[name] = _entry(name, source, out, name in given)
        file = {"file": MODEL_FILE, "sha256": tokenizer_sha256, "trained_on": trained_on}
        manifest = {"format": FORMAT, "tokenizer": file, "sources": sources}
        old = read_json_or_empty(out / MANIFEST)
        if {**old, "sha256": None} != {**manifest, "sha256": None}:
            write_manifest(out, manifest)
    return out


def _template(data: DataConfig, conversations: list[str]) -> ChatTemplate | None:
    """The template of the sources named; None if there are none.

    Raises:
      ValueError: there is no template, or the packing is not that of conversations.
    """
    for name in conversations:
        check_packing(name, data.packing)
    if not conversations:
        return None
    tokenizer = local_files(as_path(data.tokenizer))
    return load_template(data.template, tokenizer if tokenizer.is_dir() else None)


def _prepared(name: str, source: SourceConfig) -> PreparedSource | None:
    """A source whose path is a prepared folder; None for raw text."""
    folder = as_path(source.path)
    if isinstance(folder, ObjectPath):
        folder = local_shards(folder)
    if not source.path or "format" not in (found := read_json_or_empty(folder / MANIFEST)):
        return None
    if isinstance(found.get("sources"), dict):
        inside = ", ".join(str(folder / n) for n in found["sources"])
        raise ValueError(
            f"source {name}: {folder} is the parent folder of prepared sources; set "
            f"data.sources.{name}.path to one of them: {inside}"
        )
    try:
        return PreparedSource(folder, read_manifest(folder, SourceManifest))
    except ValueError as e:
        raise ValueError(f"source {name}: {e}") from None


def _entries(out: Path) -> dict[str, Any]:
    """The sources in the manifest of a mixture; {} if there is none."""
    if not (out / MANIFEST).exists():
        return {}
    try:
        return read_manifest(out, MixtureManifest)["sources"]
    except ValueError as e:
        raise ValueError(f"{e}: remove {out / MANIFEST}, and name every source") from None


def _other_sources(out: Path, data: DataConfig) -> dict[str, PreparedSource]:
    """The sources of a mixture that ``data`` does not name."""
    if "splits" in read_json_or_empty(out / MANIFEST):
        raise ValueError(
            f"{out} is a prepared source, not a folder of sources; give its parent folder, "
            f"{out.resolve().parent}"
        )
    others = {name: entry for name, entry in _entries(out).items() if name not in data.sources}
    return {name: PreparedSource(*find_source(out, name, entry)) for name, entry in others.items()}


def _warn_of_leak(name: str, source: PreparedSource, rule: SplitRule) -> None:
    """Log that new exceptions of the split rule were not applied to a prepared source."""
    applied = source.manifest.get("made_from", {}).get("split", {}).get("held_out", ())
    if new := rule.val_keys - set(applied):
        log.warning(
            f"validation documents of small sources ({len(new)}) may be training documents of "
            f"source {name}, which was prepared before; run this command for source {name} again"
        )


def _entry(name: str, source: SourceConfig, out: Path, is_given: bool) -> dict[str, Any]:
    """A source in the mixture's manifest; the hash finds it again after a move."""
    folder = as_path(source.path).resolve() if is_given else out / name
    entry = {"folder": str(folder) if is_given else name, "weight": source.weight}
    entry["content"] = digest(read_manifest(folder, SourceManifest))
    if not is_given or is_remote(folder):
        return entry
    return entry | {"relative": os.path.relpath(folder, out.resolve())}
