"""The ``manifest.json`` of prepared data: what it holds, how it is read and checked.

:mod:`llama_jax.prepare` writes two kinds: one of a source (its shards) and one of a mixture (its
tokenizer and sources). Every field is checked when a manifest is read, since it may be damaged or
come from elsewhere; :func:`verify` compares all files with their hashes.
"""

import contextlib
import hashlib
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pydantic
from pydantic import Field
from tqdm import tqdm

from llama_jax.io import atomic_write, read_json, sha256

FORMAT = 1
"""version of the shards"""
MANIFEST = "manifest.json"
SPLITS = ("train", "holdout")
_BLOCK = 2**24  # bytes that verify reads at a time

Count = Annotated[int, Field(ge=0, lt=2**62)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
# Names of files and folders inside the prepared folder: no separators, no "..".
Name = Annotated[str, Field(pattern=r"^[\w-][\w.-]*$")]


class _Checked(pydantic.BaseModel):
    # An unknown field is a known one whose name was altered.
    model_config = pydantic.ConfigDict(strict=True, extra="forbid")


class Shard(_Checked):
    """Two files: NAME.tokens and NAME.starts."""

    name: Name
    tokens: Annotated[Count, Field(gt=0)]
    documents: Annotated[Count, Field(gt=0)]
    tokens_sha256: Sha256
    starts_sha256: Sha256


class Split(_Checked):
    """Shards of one side, and their sums."""

    documents: Count
    tokens: Count
    text_bytes: Count
    shards: list[Shard]

    @pydantic.model_validator(mode="after")
    def _sums(self) -> "Split":
        for name in ("documents", "tokens"):
            if (total := sum(getattr(s, name) for s in self.shards)) != getattr(self, name):
                raise ValueError(f"{name} is {getattr(self, name)}, but its shards have {total}")
        if len({s.name for s in self.shards}) < len(self.shards):
            raise ValueError("two shards have the same name")
        return self


class Splits(_Checked):
    """Both sides."""

    train: Split
    holdout: Split


class SourceManifest(_Checked):
    """Of a source."""

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
    sha256: Sha256 = "0" * 64

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
    """Of a mixture."""

    format: Literal[1]
    tokenizer: TokenizerEntry
    sha256: Sha256 = "0" * 64
    sources: Annotated[dict[Name, SourceEntry], Field(min_length=1)]


def digest(content: Any) -> str:
    """Hash of plain values: nested lists, dicts, numbers and strings."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def write_manifest(folder: Path, content: dict[str, Any]) -> dict[str, Any]:
    """Write a manifest with the hash of its own content; returns what was written."""
    content = content | {"sha256": digest({k: v for k, v in content.items() if k != "sha256"})}
    atomic_write(folder / MANIFEST, json.dumps(content, indent=1).encode())
    return content


def read_manifest(folder: Path, kind: type[_Checked]) -> dict[str, Any]:
    """The checked manifest of a folder, as nested plain values.

    Raises:
      ValueError: missing, of another version, altered, or a field is wrong; names the field.
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
        # Through JSON: there, pydantic's strict mode converts nothing.
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
            f"{path} was altered: its content does not have the hash that it states; prepare "
            f"{folder} again"
        )
    return content


def find_source(folder: Path, name: str, entry: dict[str, Any]) -> tuple[Path, dict[str, Any]]:
    """Folder and manifest of a mixture's source, also after the mixture or the source was moved.

    Looked for, by the hash of its manifest: where it was, at the same place relative to the
    mixture, inside the mixture, and beside it.

    Raises:
      ValueError: in none of these places, or damaged.
    """
    wanted = entry.get("content")
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
        problem = problem or f"{place} was prepared again since"
    if (first / MANIFEST).exists() or not wanted:
        raise ValueError(f"source {name} of {folder}: {problem}")
    raise ValueError(
        f"source {name} of {folder} is neither at {first} nor beside the mixture; move it back, or "
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
    """The state of a shard's file; ValueError if it is missing or not of the size stated."""
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


# All of it, byte for byte ------------------------------------------------------------------------


def verify(folder: str | Path) -> list[str]:
    """Compare every file of a prepared mixture or source with what its manifest says.

    Sizes, SHA-256 of shards, manifests and tokenizers, ids within the vocabulary, documents in
    order. Reads everything, in bounded memory; shows progress in a terminal.

    Returns:
      The problems, each with the file's name; none if all is as it was prepared.
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
    """What is wrong with a tokenizer's file: missing, or of another hash."""
    if not path.is_file():
        return [f"tokenizer {path} is missing; prepare the data again"]
    if (found := sha256(path)) != wanted:
        return [
            f"tokenizer {path} was altered: its sha256 is {found[:12]}, the manifest says "
            f"{wanted[:12]}; prepare the data again"
        ]
    return []


def _verify_source(folder: Path, manifest: dict[str, Any]) -> list[str]:
    problems = []
    # One that prepare made has a tokenizer; a manifest written by hand may have none.
    if manifest.get("made_from") or (folder / "tokenizer.model").exists():
        problems += check_tokenizer(folder / "tokenizer.model", manifest["tokenizer_sha256"])
    dtype = np.dtype(manifest["dtype"]).newbyteorder("<")
    shards = [s for split in SPLITS for s in manifest["splits"][split]["shards"]]
    total = sum(s["tokens"] * dtype.itemsize + s["documents"] * 8 for s in shards)
    with tqdm(desc=f"verify {folder}", total=total, unit="B", unit_scale=True, disable=None) as bar:
        for shard in shards:
            try:
                _verify_shard(folder, shard, dtype, manifest["vocab_size"], bar)
            except (ValueError, OSError) as e:
                problems.append(str(e))
    return problems


def _verify_shard(
    folder: Path, shard: dict[str, Any], dtype: np.dtype, vocab_size: int, bar: tqdm
) -> None:
    tokens, starts = (folder / f"{shard['name']}.{kind}" for kind in ("tokens", "starts"))
    check_file(tokens, shard["tokens"] * dtype.itemsize)
    check_file(starts, shard["documents"] * 8)
    found = hashlib.sha256()
    largest = 0
    for block in _blocks(tokens, bar):
        found.update(block)
        largest = max(largest, int(np.frombuffer(block, dtype).max()))
    if found.hexdigest() != shard["tokens_sha256"]:
        raise ValueError(f"shard {tokens} was altered: another sha256; prepare the source again")
    if largest >= vocab_size:
        raise ValueError(f"shard {tokens} has id {largest}, outside the vocabulary of {vocab_size}")
    found = hashlib.sha256()
    last = -1
    for block in _blocks(starts, bar):
        found.update(block)
        last = check_starts(starts, np.frombuffer(block, "<u8"), last, shard["tokens"])
    if found.hexdigest() != shard["starts_sha256"]:
        raise ValueError(f"shard {starts} was altered: another sha256; prepare the source again")


def _blocks(path: Path, bar: tqdm) -> Iterator[bytes]:
    with path.open("rb") as f:
        while block := f.read(_BLOCK):
            yield block
            bar.update(len(block))


def check_starts(path: Path, starts: np.ndarray, before: int, tokens: int) -> int:
    """Documents start one after the other, the first at 0; returns where the last one starts."""
    if not in_order(starts, before + 1, tokens) or (before < 0 and starts[0]):
        raise unordered(path)
    return int(starts[-1])


def in_order(starts: np.ndarray, low: int, high: int) -> bool:
    """Whether they increase, from ``low`` on and below ``high``."""
    if not len(starts):
        return True
    return bool(low <= starts[0] and starts[-1] < high and (starts[1:] > starts[:-1]).all())


def unordered(path: Path) -> ValueError:
    """The error of a file of starts that are not in order."""
    return ValueError(
        f"shard {path} is damaged: documents do not start one after the other; prepare the "
        "source again"
    )
