"""Atomic writes of files, reads with size limits, and folder locks, also of objects in a bucket.

Files that must never be partly written use :func:`atomic_write`; JSON files that another program
may have made are read with :func:`read_json`.
"""

import contextlib
import fcntl
import hashlib
import io
import json
import os
import stat
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llama_jax.storage.lock import is_locked, object_lock
from llama_jax.storage.paths import ObjectPath

MAX_JSON_BYTES = 64 << 20
"""The largest JSON file read; a tokenizer.json of 128k tokens has 17 MB."""
_LFS_POINTER = b"version https://git-lfs"
"""First bytes of the small file that Git LFS leaves in place of one that was not downloaded."""


def atomic_write(path: Path, content: bytes) -> None:
    """Replace a file so that ``path`` always has either its old content or all of the new content.

    Raises:
      OSError: the disk is full or not writable; ``path`` is unchanged and no other file is left.
    """
    if isinstance(path, ObjectPath):  # an object is written whole or not at all
        path.write_bytes(content)
        return
    # A unique name, so that two processes never write to one temporary file.
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        with partial.open("xb") as f:
            f.write(content)
            f.flush()
            os.fsync(f.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def file_error(e: BaseException) -> str:
    """The message of an error, of the system's errors as "path: Permission denied"."""
    if isinstance(e, OSError) and e.strerror:
        return f"{e.filename}: {e.strerror}" if e.filename else e.strerror
    return str(e)


def save_figure(figure: Any, path: Path) -> None:
    """Write a matplotlib figure with :func:`atomic_write`; the suffix of ``path`` is the format."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format=path.suffix.removeprefix(".") or "png", dpi=130)
    atomic_write(path, buffer.getvalue())


def sync_folder(folder: Path) -> None:
    """Write a folder's list of names to the disk, so that a rename in it survives a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def open_regular(path: Path) -> io.FileIO:
    """Open a file for reading, without a buffer.

    Raises:
      ValueError: a folder, pipe or device, or a Git LFS pointer; says which.
      OSError: missing or not readable.
    """
    # Without O_NONBLOCK, opening a pipe that nobody writes to would wait forever.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    problem = ""
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        problem = "is not a regular file"
    elif os.pread(descriptor, len(_LFS_POINTER), 0) == _LFS_POINTER:
        problem = "is a Git LFS pointer, not the file itself; run `git lfs pull` where it came from"
    if problem:
        os.close(descriptor)
        raise ValueError(f"{path} {problem}")
    return io.FileIO(descriptor)


def read_limited(path: Path, max_bytes: int) -> bytes:
    """The content of a regular file of at most ``max_bytes``.

    Raises:
      ValueError: as for :func:`open_regular`, or a larger file; says which.
      OSError: missing or not readable.
    """
    if isinstance(path, ObjectPath):
        if (size := path.stat().st_size) > max_bytes:
            raise ValueError(f"{path} has {size:,} bytes; at most {max_bytes:,} are read")
        return path.read_bytes()
    with open_regular(path) as f:
        if (size := os.fstat(f.fileno()).st_size) > max_bytes:
            raise ValueError(f"{path} has {size:,} bytes; at most {max_bytes:,} are read")
        return f.readall()


def read_json(path: Path, max_bytes: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
      ValueError: too large, not UTF-8, not JSON, nested too deeply, or not an object; names the
        file.
      OSError: missing or not readable.
    """
    return parse_json(read_limited(path, max_bytes), path)


def parse_json(content: bytes, path: Path) -> dict[str, Any]:
    """The JSON object in the content of a file.

    Raises:
      ValueError: as for :func:`read_json`.
    """
    try:
        tree = json.loads(content.decode("utf-8"))
    except RecursionError:
        raise ValueError(f"{path} is damaged: nested too deeply") from None
    except ValueError as e:
        raise ValueError(f"{path} is damaged: not JSON ({e})") from None
    if not isinstance(tree, dict):
        raise ValueError(f"{path} is damaged: it holds a {type(tree).__name__}, not an object")
    return tree


def read_json_or_empty(path: Path, max_bytes: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """A JSON file that is written again if it is missing or damaged: then {}."""
    try:
        return read_json(path, max_bytes)
    except (OSError, ValueError):
        return {}


@contextlib.contextmanager
def folder_lock(folder: Path, doing: str) -> Iterator[None]:
    """Hold ``folder`` for this process alone, through ``folder/.lock``.

    The operating system releases the lock when the process ends, however it ends, so a dead process
    never holds it. For a bucket, see :mod:`llama_jax.storage.lock`.

    Args:
      folder: an existing folder.
      doing: what this process does there, for the message of the other one: "training".

    Raises:
      ValueError: another process holds it; names its process id, host and what it does.
    """
    if isinstance(folder, ObjectPath):
        with object_lock(folder, doing):
            yield
        return
    path = folder / ".lock"
    with path.open("a+", encoding="utf-8") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            f.seek(0)
            holder = f.read(200).strip() or "another process"
            raise ValueError(
                f"{folder} is in use: {holder}; wait for it or stop it, or use another folder"
            ) from None
        f.truncate(0)
        f.write(f"{doing} (process {os.getpid()} on {os.uname().nodename})\n")
        f.flush()
        yield


def in_use(folder: Path) -> bool:
    """Whether a process holds ``folder`` through :func:`folder_lock`; changes nothing."""
    if isinstance(folder, ObjectPath):
        return is_locked(folder)
    try:
        with (folder / ".lock").open("rb") as f:
            fcntl.flock(f, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # none there, or not readable
        return False
    return False
