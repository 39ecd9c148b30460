"""The ``manifest.json`` of prepared data: its fields, and how it is written, read and checked.

:mod:`llama_jax.prepare` writes one manifest for each source (its shards) and one for the mixture
(its tokenizer and sources). Every field is checked when a manifest is read; :func:`verify` compares
all files with their hashes.
"""

import contextlib
import hashlib
import json
import os
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pydantic
from pydantic import Field
from tqdm import tqdm

from llama_jax.data.shard_cache import local_shards
from llama_jax.io import atomic_write, read_json, sha256
from llama_jax.storage.paths import as_path, is_remote

FORMAT = 1
"""version of the shards"""
MANIFEST = "manifest.json"
SPLITS = ("train", "holdout")
TEMPLATE_FILE = "chat_template.jinja"
"""the chat template of a source of conversations"""
_BLOCK = 2**24  # bytes that verify reads at a time

Count = Annotated[int, Field(ge=0, lt=2**62)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
# A file or folder inside the prepared folder: no separator, no "..".
Name = Annotated[str, Field(pattern=r"^[\w-][\w.-]*$")]


class _Checked(pydantic.BaseModel):
    # Unknown fields are refused: they may be known fields with a damaged name.
    model_config = pydantic.ConfigDict(strict=True, extra="forbid")


class Shard(_Checked):
    """NAME.tokens, NAME.starts with the offset of each document in tokens, and for conversations
    NAME.mask with 1 (uint8) for each token that counts in the loss."""

    name: Name
    tokens: Annotated[Count, Field(gt=0)]
    documents: Annotated[Count, Field(gt=0)]
    tokens_sha256: Sha256
    starts_sha256: Sha256
    mask_sha256: Sha256 | None = None


class Split(_Checked):
    """The shards of one split, and their sums."""

    documents: Count
    tokens: Count
    text_bytes: Count
    shards: list[Shard]
    counted: Count | None = None
    """tokens of conversations that count in the loss"""

    @pydantic.model_validator(mode="after")
    def _sums(self) -> "Split":
        for name in ("documents", "tokens"):
            if (total := sum(getattr(s, name) for s in self.shards)) != getattr(self, name):
                raise ValueError(f"{name} is {getattr(self, name)}, but its shards have {total}")
        if len({s.name for s in self.shards}) < len(self.shards):
            raise ValueError("two shards have the same name")
        return self


class Splits(_Checked):
    """Training and validation text."""

    train: Split
    holdout: Split


class Conversations(_Checked):
    """How conversations became tokens. With the format "preference", a document with the chosen
    answer is followed by one with the rejected answer."""

    format: str
    template: str
    template_sha256: Sha256
    loss: Literal["answers", "all"]


class SourceManifest(_Checked):
    """The manifest of a source."""

    format: Literal[1]
    name: Name
    tokenizer_sha256: Sha256
    vocab_size: Annotated[int, Field(gt=0, le=2**22)]
    dtype: Literal["uint16", "uint32"]
    splits: Splits
    path: str = ""
    files: Count = 0
    skipped: dict[str, Count] = {}
    made_from: dict[str, Any] = {}
    bad_lines: dict[str, Count] = {}
    conversations: Conversations | None = None
    sha256: Sha256 = "0" * 64

    @pydantic.model_validator(mode="after")
    def _masks(self) -> "SourceManifest":
        shards = (*self.splits.train.shards, *self.splits.holdout.shards)
        if any((s.mask_sha256 is None) != (self.conversations is None) for s in shards):
            raise ValueError("shards of conversations, and no others, have a mask_sha256")
        return self

    @pydantic.model_validator(mode="after")
    def _ids_fit(self) -> "SourceManifest":
        if self.dtype == "uint16" and self.vocab_size > 2**16:
            raise ValueError(f"{self.vocab_size} ids do not fit dtype uint16")
        return self


class TokenizerEntry(_Checked):
    """The tokenizer of a mixture."""

    file: Name
    sha256: Sha256
    trained_on: str = ""


class SourceEntry(_Checked):
    """A source of a mixture."""

    folder: Annotated[str, Field(min_length=1, pattern=r"^[^\x00]+$")]
    relative: Annotated[str, Field(pattern=r"^[^\x00]*$")] = ""
    weight: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    content: Sha256 | None = None


class MixtureManifest(_Checked):
    """The manifest of a mixture."""

    format: Literal[1]
    tokenizer: TokenizerEntry
    sha256: Sha256 = "0" * 64
    sources: Annotated[dict[Name, SourceEntry], Field(min_length=1)]


def shard_files(manifest: dict[str, Any]) -> tuple[str, ...]:
    """Extensions of the files of a shard."""
    return ("tokens", "starts", "mask") if manifest.get("conversations") else ("tokens", "starts")


def file_sizes(kinds: Iterable[str], shard: dict[str, Any], width: int) -> dict[str, int]:
    """Bytes of the files of a shard.

    Args:
      kinds: extensions of the files.
      shard: number of its tokens and documents.
      width: bytes per id.
    """
    tokens, documents = shard["tokens"], shard["documents"]
    sizes = {"tokens": tokens * width, "starts": documents * 8, "mask": tokens}
    return {kind: sizes[kind] for kind in kinds}


def digest(content: Any) -> str:
    """SHA-256 of plain values: nested lists, dicts, numbers and strings."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def write_manifest(folder: Path, content: dict[str, Any]) -> dict[str, Any]:
    """Write a manifest with the hash of its own content; returns the content."""
    content = content | {"sha256": digest({k: v for k, v in content.items() if k != "sha256"})}
    atomic_write(folder / MANIFEST, json.dumps(content, indent=1).encode())
    return content


def read_manifest(folder: Path, kind: type[_Checked]) -> dict[str, Any]:
    """The checked manifest of a folder, as nested plain values.

    Raises:
      ValueError: the manifest is missing, altered or of another version, or a field is wrong.
    """
    path = folder / MANIFEST
    try:
        content = read_json(path)
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(
            f"{folder} has no manifest.json; make it with python -m llama_jax.prepare"
        ) from None
    except ValueError as e:
        raise ValueError(f"{e}; prepare {folder} again") from None
    if content.get("format") != FORMAT:
        given = repr(content.get("format"))[:40]
        raise ValueError(
            f"{path} has format {given}, this version reads {FORMAT}; prepare {folder} again"
        )
    try:
        # From JSON, because pydantic's strict mode then converts no values.
        kind.model_validate_json(json.dumps(content))
    except pydantic.ValidationError as e:
        error = e.errors(include_url=False)[0]
        field = ".".join(map(str, error["loc"]))
        given = "" if isinstance(error["input"], dict | list) else f"={error['input']!r:.60}"
        message = error["msg"].removeprefix("Value error, ")
        raise ValueError(
            f"{path} is damaged: {field}{given}: {message}; prepare {folder} again"
        ) from None
    except (ValueError, RecursionError):
        raise ValueError(f"{path} is damaged: not plain JSON; prepare {folder} again") from None
    without = {k: v for k, v in content.items() if k != "sha256"}
    if "sha256" in content and content["sha256"] != digest(without):
        raise ValueError(
            f"{path} was altered: its content does not match its sha256; prepare {folder} again"
        )
    return content


def find_source(folder: Path, name: str, entry: dict[str, Any]) -> tuple[Path, dict[str, Any]]:
    """Folder and manifest of a source of a mixture, also after one of them was moved.

    The source is recognized by the hash of its manifest. It is searched at its recorded path, at
    the recorded path relative to the mixture, inside the mixture, and beside the mixture.

    Args:
      folder: the mixture.
      name: of the source.
      entry: of the source in the mixture's manifest.

    Raises:
      ValueError: the source is in none of these places, or damaged.
    """
    wanted = entry.get("content")
    if is_remote(entry["folder"]):
        entry = entry | {"folder": str(local_shards(as_path(entry["folder"])))}
    first = folder / entry["folder"]
    problem = ""
    for place in _places(folder, name, entry) if wanted else [first]:
        try:
            manifest = read_manifest(place, SourceManifest)
        except (ValueError, OSError) as e:
            problem = problem or str(e)
            continue
        if not wanted or digest(manifest) == wanted:
            return place, manifest
        problem = problem or f"{place} was prepared again afterwards"
    if (first / MANIFEST).exists() or not wanted:
        raise ValueError(f"source {name} of {folder}: {problem}")
    raise ValueError(
        f"source {name} of {folder} is neither at {first} nor next to the mixture; restore it, or "
        "prepare it again"
    )


def _places(folder: Path, name: str, entry: dict[str, Any]) -> Iterator[Path]:
    yield folder / entry["folder"]
    yield folder / entry.get("relative", "")
    for parent in (folder, folder.parent):
        yield parent / name
        yield parent / Path(entry["folder"]).name
        with contextlib.suppress(OSError):
            yield from sorted(p for p in parent.iterdir() if (p / MANIFEST).is_file())


def check_file(path: Path, size: int) -> os.stat_result:
    """`stat` of a shard's file; raises ValueError if it is missing or has another size."""
    try:
        found = path.stat()
    except FileNotFoundError:
        raise ValueError(f"shard {path} is missing; prepare the source again") from None
    if not stat.S_ISREG(found.st_mode) or found.st_size != size:
        raise ValueError(
            f"shard {path} has {found.st_size} bytes, its manifest says {size}; "
            "prepare the source again"
        )
    return found


# Check of all contents ---------------------------------------------------------------------------


def verify(folder: str | Path) -> list[str]:
    """Compare every file of a prepared mixture or source with its manifest.

    Checks sizes, SHA-256 of shards, manifests and tokenizers, that ids are in the vocabulary, and
    that document offsets increase. Uses bounded memory and shows progress in a terminal.

    Returns:
      One line per problem, which names the file; empty if there is none.
    """
    folder = Path(folder)
    try:
        content = read_json(folder / MANIFEST)
        if "sources" not in content:
            return _verify_source(folder, read_manifest(folder, SourceManifest))
        content = read_manifest(folder, MixtureManifest)
    except (ValueError, OSError) as e:
        return [str(e)]
    problems = check_tokenizer(
        folder / content["tokenizer"]["file"], content["tokenizer"]["sha256"]
    )
    for name, entry in content["sources"].items():
        try:
            place, manifest = find_source(folder, name, entry)
            problems += _verify_source(place, manifest)
        except (ValueError, OSError) as e:
            problems.append(str(e))
    return problems


def check_tokenizer(path: Path, wanted: str) -> list[str]:
    """Problems with a tokenizer's file: it is missing, or has another hash."""
    return _check_hash("tokenizer", path, wanted)


def check_template(path: Path, wanted: str) -> list[str]:
    """Problems with the file of a chat template: it is missing, or has another hash."""
    return _check_hash("chat template", path, wanted)


def _check_hash(kind: str, path: Path, wanted: str) -> list[str]:
    if not path.is_file():
        return [f"{kind} {path} is missing; prepare the data again"]
    if (found := sha256(path)) != wanted:
        return [
            f"{kind} {path} was altered: its sha256 is {found[:12]}, the manifest says "
            f"{wanted[:12]}; prepare the data again"
        ]
    return []


def _verify_source(folder: Path, manifest: dict[str, Any]) -> list[str]:
    problems = []
    # `prepare` always writes a tokenizer; other programs may not.
    if manifest.get("made_from") or (folder / "tokenizer.model").exists():
        problems += check_tokenizer(folder / "tokenizer.model", manifest["tokenizer_sha256"])
    if conversations := manifest.get("conversations"):
        problems += check_template(folder / TEMPLATE_FILE, conversations["template_sha256"])
    dtype = np.dtype(manifest["dtype"]).newbyteorder("<")
    shards = [s for split in SPLITS for s in manifest["splits"][split]["shards"]]
    kinds = shard_files(manifest)
    total = sum(sum(file_sizes(kinds, s, dtype.itemsize).values()) for s in shards)
    with tqdm(desc=f"verify {folder}", total=total, unit="B", unit_scale=True, disable=None) as bar:
        for shard in shards:
            try:
                for kind, size in file_sizes(kinds, shard, dtype.itemsize).items():
                    check_file(folder / f"{shard['name']}.{kind}", size)
                _verify_shard(folder, shard, dtype, manifest["vocab_size"], bar)
            except (ValueError, OSError) as e:
                problems.append(str(e))
    return problems


def _verify_shard(
    folder: Path, shard: dict[str, Any], dtype: np.dtype, vocab_size: int, bar: tqdm
) -> None:
    file = lambda kind: folder / f"{shard['name']}.{kind}"
    largest = 0
    for block in _hashed_blocks(file("tokens"), shard["tokens_sha256"], bar):
        largest = max(largest, int(np.frombuffer(block, dtype).max()))
    if largest >= vocab_size:
        raise ValueError(
            f"shard {file('tokens')} has id {largest}, outside the vocabulary of {vocab_size}"
        )
    last = -1
    for block in _hashed_blocks(file("starts"), shard["starts_sha256"], bar):
        offsets = np.frombuffer(block, "<u8")
        last = check_doc_offsets(file("starts"), offsets, last, shard["tokens"])
    if shard.get("mask_sha256"):
        for block in _hashed_blocks(file("mask"), shard["mask_sha256"], bar):
            check_mask(file("mask"), np.frombuffer(block, np.uint8))


def _hashed_blocks(path: Path, wanted: str, bar: tqdm) -> Iterator[bytes]:
    """The content of a file; raises ValueError at its end if it has another hash."""
    found = hashlib.sha256()
    for block in _blocks(path, bar):
        found.update(block)
        yield block
    if found.hexdigest() != wanted:
        raise ValueError(f"shard {path} was altered: another sha256; prepare the source again")


def _blocks(path: Path, bar: tqdm) -> Iterator[bytes]:
    with path.open("rb") as f:
        while block := f.read(_BLOCK):
            yield block
            bar.update(len(block))


def check_doc_offsets(path: Path, offsets: np.ndarray, previous: int, tokens: int) -> int:
    """Check that document offsets increase, from 0 in a new shard, and stay below ``tokens``.

    Args:
      path: the file, for the error.
      offsets: all offsets of the file, or a block of them.
      previous: last offset of the block before; -1 for the first block.
      tokens: tokens of the shard.

    Returns:
      The last offset.

    Raises:
      ValueError: the offsets are damaged.
    """
    if not is_increasing(offsets, previous + 1, tokens) or (previous < 0 and offsets[0]):
        raise offsets_error(path)
    return int(offsets[-1])


def is_increasing(offsets: np.ndarray, low: int, high: int) -> bool:
    """Whether the offsets increase strictly and are in ``[low, high)``.

    Args:
      offsets: document offsets.
      low: smallest allowed offset.
      high: limit above the largest.
    """
    if not len(offsets):
        return True
    return bool(low <= offsets[0] and offsets[-1] < high and (offsets[1:] > offsets[:-1]).all())


def check_mask(path: Path, mask: np.ndarray) -> None:
    """Raise ValueError unless a mask consists of zeros and ones."""
    if mask.max(initial=0) > 1:
        raise ValueError(f"shard {path} is damaged: not a mask; prepare the source again")


def offsets_error(path: Path) -> ValueError:
    """The error for a file of document offsets that do not increase."""
    return ValueError(
        f"shard {path} is damaged: document offsets do not increase; prepare the source again"
    )
