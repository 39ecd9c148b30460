"""Lists of files with their sizes and SHA-256, and comparison of a folder with a list.

A list is a JSON file whose ``files`` is ``{name: [bytes, SHA-256]}``. It contains its own SHA-256,
so that damage to the list is detected too. Converted weights have one list,
``manifest.json``; a training run has a ``manifest.json`` of its small files and a list in each
step. ``python -m llama_jax.verify`` checks everything; loading checks sizes and small files.
"""

import hashlib
import json
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

from llama_jax.io import atomic_write, parse_json, read_limited
from llama_jax.storage.paths import ObjectPath, file_sizes

MANIFEST = "manifest.json"
MAX_LIST_BYTES = 1 << 30
"""The largest list read; 100,000 files take 15 MB."""

Files = dict[str, list]
"""name relative to the folder, with "/" -> [bytes, SHA-256]"""

_SEAL = re.compile(rb'"sha256_of_this_file": "([0-9a-f]{64})"')
_BLOCK = 4 << 20
_OBJECT_BLOCK = 32 << 20


def write_list(path: Path, tree: dict[str, Any]) -> None:
    """Write a list: ``tree`` with the SHA-256 of the file itself, which is taken with zeros in
    its place."""
    blank = "0" * 64
    text = json.dumps(tree | {"sha256_of_this_file": blank}, indent=1, ensure_ascii=False) + "\n"
    digest = hashlib.sha256(text.encode()).hexdigest()
    head, _, tail = text.rpartition(blank)
    atomic_write(path, f"{head}{digest}{tail}".encode())


def read_list(path: Path) -> Files:
    """The files of a list.

    Raises:
      ValueError: damaged; names the file.
      OSError: missing or not readable.
    """
    content = read_limited(path, MAX_LIST_BYTES)
    seals = list(_SEAL.finditer(content))
    files = parse_json(content, path).get("files")
    if not seals and files is None:
        return {}  # of a version that listed no files
    start, end = seals[-1].span(1) if seals else (0, 0)
    digest = hashlib.sha256(content[:start] + b"0" * 64 + content[end:]).hexdigest()
    if not seals or seals[-1][1].decode() != digest:
        raise ValueError(f"{path} has changed since it was written")
    if not isinstance(files, dict) or not all(map(_is_entry, files.items())):
        raise ValueError(f"{path} is damaged: its `files` are not names with size and SHA-256")
    return files


def _is_entry(item: tuple[str, Any]) -> bool:
    name, entry = item
    path = PurePosixPath(name)
    inside = not path.is_absolute() and ".." not in path.parts
    if not (inside and isinstance(entry, list) and len(entry) == 2):
        return False
    size, digest = entry
    return type(size) is int and size >= 0 and isinstance(digest, str)


def hash_files(folder: Path, names: Iterable[str]) -> Files:
    """Size and SHA-256 of files of a folder, hashed in parallel.

    Raises:
      OSError: a file cannot be read.
    """
    names = sorted(names)
    sizes: dict[str, int] = file_sizes(folder) if isinstance(folder, ObjectPath) else {}

    def digest(name: str) -> list:
        path = folder / name
        size = sizes[name] if name in sizes else path.stat().st_size
        return [size, _sha256(path, size)]

    with _pool() as pool:
        return dict(zip(names, pool.map(digest, names), strict=True))


def files_below(folder: Path) -> list[str]:
    """Names of all files below a folder, in order."""
    return sorted(file_sizes(folder))


def record_files(folder: Path, *names: str) -> None:
    """Record the hashes of these small files of a run folder in its ``manifest.json``.

    Raises:
      ValueError: the list is damaged.
    """
    path = folder / MANIFEST
    files = read_list(path) if path.exists() else {}
    new = hash_files(folder, names)
    if any(files.get(name) != entry for name, entry in new.items()):
        write_list(path, {"format": 1, "files": files | new})


def find_problems(
    folder: Path,
    files: Files,
    max_bytes: int | None = None,
    report: Callable[[int], None] = lambda count: None,
) -> list[str]:
    """Compare a folder with a list: existence and size of every file, then the contents.

    Args:
      folder: where the names begin.
      files: the list.
      max_bytes: compare the contents of the smallest files, up to this total; None: of all.
      report: called with the number of bytes as contents are read, from several threads.

    Returns:
      One line for each file that is missing, of another size, changed, no regular file, or a link
      out of the folder.

    Raises:
      OSError: a file cannot be read for another reason (permission, input/output error).
    """
    found = _shape_problems(folder, files)
    left, compare = max_bytes, []
    for name in sorted(files, key=lambda name: files[name][0]):
        if left is not None:
            left -= files[name][0]
        if left is not None and left < 0:
            break
        if found[name] is None:
            compare.append(name)

    def changed(name: str) -> str | None:
        if _sha256(folder / name, files[name][0], report) == files[name][1]:
            return None
        return f"{folder / name} has changed since it was written"

    with _pool() as pool:
        found |= zip(compare, pool.map(changed, compare), strict=True)
    return [problem for _, problem in sorted(found.items()) if problem]


def _shape_problems(folder: Path, files: Files) -> dict[str, str | None]:
    """What is wrong with each file before its content is read."""
    if isinstance(folder, ObjectPath):  # one listing, not a request for each file
        sizes = file_sizes(folder)
        return {
            name: _size_problem(folder / name, sizes.get(name), files[name][0]) for name in files
        }
    root = Path(os.path.realpath(folder))
    return {name: _shape_problem(folder / name, root, entry[0]) for name, entry in files.items()}


def _size_problem(path: Path, found: int | None, size: int) -> str | None:
    if found is None:
        return f"{path} is missing"
    return None if found == size else f"{path} has {found:,} bytes, not {size:,}"


def _shape_problem(path: Path, root: Path, size: int) -> str | None:
    """What is wrong with a file before its content is read."""
    try:
        info = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return _size_problem(path, None, size)
    if not stat.S_ISREG(info.st_mode):
        return f"{path} is not a regular file"
    if not Path(os.path.realpath(path)).is_relative_to(root):
        return f"{path} is a link out of {root}"
    return _size_problem(path, info.st_size, size)


def _sha256(path: Path, size: int, report: Callable[[int], None] = lambda count: None) -> str:
    digest = hashlib.sha256()
    for block in _blocks(path, size):
        digest.update(block)
        report(len(block))
    return digest.hexdigest()


def _blocks(path: Path, size: int) -> Iterator[bytes]:
    """The content of a file; that of an object of a bucket with one request for each block."""
    if isinstance(path, ObjectPath):
        for start in range(0, size, _OBJECT_BLOCK):
            yield path.read_range(start, min(start + _OBJECT_BLOCK, size))
        return
    with path.open("rb") as f:
        while block := f.read(_BLOCK):
            yield block


def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(min(8, os.cpu_count() or 1))


# Checkpoints --------------------------------------------------------------------------------------

CHECKSUMS = re.compile(r"checksums\.(\d{1,6})-of-(\d{1,6})\.json")
"""list of one step that process P of N wrote: ``checksums.P-of-N.json``"""


def read_checksums(step: Path) -> Files | None:
    """The list of a step, from the parts that all processes wrote; None while one is missing.

    Raises:
      ValueError: a part is damaged; names it.
    """
    parts: dict[int, dict[int, Path]] = {}
    for path in step.glob("checksums.*.json"):
        if match := CHECKSUMS.fullmatch(path.name):
            parts.setdefault(int(match[2]), {})[int(match[1])] = path
    for count, paths in sorted(parts.items()):
        if sorted(paths) == list(range(count)):
            lists = [read_list(path) for path in paths.values()]
            return {name: entry for files in lists for name, entry in files.items()}
    return None


def listed_files(folder: Path, step: int, item: str = "") -> Files:
    """What is listed of a checkpoint folder: its small files, and those of one step.

    The recipe is not among them: what is loaded does not depend on it.

    Args:
      folder: a run, or converted weights.
      step: number of the step.
      item: only this part of the step, say "model".

    Raises:
      ValueError: a list is damaged; names it.
    """
    manifest = folder / MANIFEST
    files = read_list(manifest) if manifest.exists() else {}
    steps = read_checksums(folder / "steps" / str(step)) or {}
    files |= {f"steps/{step}/{name}": entry for name, entry in steps.items()}
    kept = f"steps/{step}/{item}".rstrip("/") + "/"
    files.pop("recipe.toml", None)
    return {n: e for n, e in files.items() if not n.startswith("steps/") or n.startswith(kept)}


def weights_sha256(folder: Path, step: int) -> str:
    """SHA-256 that identifies the weights of a step: of the recorded hashes of their files. Neither
    the number of the step nor the files beside the weights change it.

    Raises:
      ValueError: a list of hashes is damaged; names it.
    """
    prefix = f"steps/{step}/"
    files = listed_files(folder, step, "model")
    lines = [f"{n.removeprefix(prefix)} {e[1]}" for n, e in files.items() if n.startswith(prefix)]
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()
