"""The files that a source reads: which they are, whether they are of the source, their hashes."""

import hashlib
import json
import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tqdm import tqdm

from llama_jax.corpus.files import Unreadable, open_stream
from llama_jax.corpus.recipe import AFTERWARDS, SOURCES, source_module
from llama_jax.io import atomic_write, open_regular, read_json_or_empty

FIRST_BYTES = 1 << 16
CHECKED_FILES = 100
MAX_JSON_BYTES = 1 << 30


def find_inputs(given: Iterable[Path]) -> tuple[list[Path], list[str]]:
    """The files of `Run.inputs` and `Run.names`; hidden files in folders are left out.

    Raises:
        ValueError: Nothing exists there, or two files have the same name.
    """
    found: dict[str, Path] = {}
    for path in given:
        if not path.exists():
            raise ValueError(f"{path} does not exist; give files or folders of the source")
        files = [path] if path.is_file() else list(_files_below(path))
        if not files:
            raise ValueError(f"{path} is a folder without files")
        for file in files:
            name = path.resolve().name
            if file != path:
                name += f"/{file.relative_to(path).as_posix()}"
            name = os.fsencode(name).decode("utf-8", "backslashreplace")  # old names are Latin-1
            if found.setdefault(name, file).resolve() != file.resolve():
                raise ValueError(f"{found[name]} and {file} have the same name; rename one")
    names = sorted(found)
    return [found[name] for name in names], names


def _files_below(folder: Path) -> Iterator[Path]:
    is_corpus = "corpus" in read_json_or_empty(folder / "manifest.json", MAX_JSON_BYTES)
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or path.is_symlink():
            continue
        if is_corpus and path.name not in ("manifest.json", "documents"):
            continue  # logs, for example, which have dates
        if path.is_dir():
            yield from _files_below(path)
        elif path.is_file():
            yield path


def check_kind(source: str, inputs: Sequence[Path]) -> None:
    """Checks that a file of the input is of the kind that the source reads.

    Raises:
        ValueError: None of the first files is; names the sources that they look like.
    """
    if any(_looks_like(source, path, _first_bytes(path)) for path in inputs[:CHECKED_FILES]):
        return
    path, content = inputs[0], _first_bytes(inputs[0])
    others = [name for name in SOURCES if name != source and _looks_like(name, path, content)]
    found = f"; it looks like {' or '.join(others)}" if others else ""
    wanted = {**SOURCES, **AFTERWARDS}[source]
    raise ValueError(f"{path} does not look like {source} ({wanted}){found}")


def _looks_like(source: str, path: Path, content: bytes) -> bool:
    return bool(source_module(source).looks_like(content, path.name))


def _first_bytes(path: Path) -> bytes:
    """The beginning of the decompressed content; of an archive, its own first bytes."""
    try:
        with open_stream(path) as stream:
            return stream.peek(FIRST_BYTES)[:FIRST_BYTES]
    except (Unreadable, OSError, ValueError):
        with path.open("rb") as file:
            return file.read(FIRST_BYTES)


def hash_inputs(inputs: Sequence[Path], names: Sequence[str], known: Path) -> list[dict[str, Any]]:
    """Name, size and SHA-256 of each file.

    Args:
        inputs: The files.
        names: Their names.
        known: File that remembers the hashes of files whose size and time have not changed.
    """
    remembered = read_json_or_empty(known, MAX_JSON_BYTES)
    stats = [path.stat() for path in inputs]
    stamps = [[stat.st_size, stat.st_mtime_ns] for stat in stats]
    unknown = [
        (path, name)
        for path, name, stamp in zip(inputs, names, stamps, strict=True)
        if remembered.get(name, {}).get("stamp") != stamp
    ]
    hashes = {name: entry["sha256"] for name, entry in remembered.items()}
    hashes |= dict(zip([name for _, name in unknown], _hash([p for p, _ in unknown]), strict=True))
    if unknown:
        entries = {
            name: {"stamp": stamp, "sha256": hashes[name]}
            for name, stamp in zip(names, stamps, strict=True)
        }
        known.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(known, json.dumps(entries).encode())
    return [
        {"name": name, "bytes": stat.st_size, "sha256": hashes[name]}
        for name, stat in zip(names, stats, strict=True)
    ]


def _hash(paths: Sequence[Path]) -> list[str]:
    """SHA-256 of files, several at a time."""
    stopped = threading.Event()
    total = sum(path.stat().st_size for path in paths)
    bar = tqdm(total=total, unit="B", unit_scale=True, desc="hashes", leave=False, disable=None)

    def sha256(path: Path) -> str:
        digest = hashlib.sha256()
        with open_regular(path) as file:
            while not stopped.is_set() and (chunk := file.read(1 << 22)):
                digest.update(chunk)
                bar.update(len(chunk))
        return digest.hexdigest()

    with bar, ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        try:
            return list(pool.map(sha256, paths))
        except BaseException:  # such as KeyboardInterrupt
            stopped.set()
            raise
