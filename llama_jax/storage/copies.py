"""Local copies of what is in a bucket: growing files of a run, and a cache of folders.

The cache is ``~/.cache/llama_jax/bucket`` (or ``$XDG_CACHE_HOME/llama_jax/bucket``) and can be
deleted at any time. Each entry is named by a hash of what it copies.
"""

import contextlib
import errno
import fcntl
import hashlib
import os
import shutil
import stat
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from llama_jax.storage.errors import StorageError
from llama_jax.storage.paths import COMMIT_FILE, ObjectPath, check_access, in_parallel

UPLOAD_SECONDS = 60.0
"""Least time between two uploads of growing files."""
_BLOCK = 8 << 20
_SMALL_BYTES = 256 << 20
"""Largest file of settings or tokenizer."""


def cache_folder() -> Path:
    """The user's cache folder of this package.

    Raises:
      ValueError: this user has none.
    """
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base) / "llama_jax"
    try:
        return Path.home() / ".cache/llama_jax"
    except RuntimeError:
        raise ValueError("this user has no home folder: set XDG_CACHE_HOME to a folder") from None


class Mirror:
    """Where a run writes files that grow, or that libraries write: ``metrics.jsonl``, TensorBoard,
    pictures, profiles.

    For a local run folder that is the folder itself. For one in a bucket it is a temporary local
    folder, whose changed files are uploaded whole.

    Args:
      run_folder: the run folder.

    Example::

      mirror = Mirror(as_path("s3://bucket/run"))
      mirror.fetch("metrics.jsonl")
      with (mirror.folder / "metrics.jsonl").open("a") as f: ...
      mirror.upload_soon()
      mirror.close()
    """

    def __init__(self, run_folder: Path):
        self._remote = run_folder if isinstance(run_folder, ObjectPath) else None
        self.folder = Path(tempfile.mkdtemp(prefix="llama_jax-")) if self._remote else run_folder
        self._sent: dict[str, tuple[int, int]] = {}
        self._lock = threading.Lock()
        self._last = time.monotonic()
        self._thread: threading.Thread | None = None

    def fetch(self, name: str) -> None:
        """Copy a file from the bucket, if it is there."""
        if self._remote is not None:
            with contextlib.suppress(FileNotFoundError):
                (self.folder / name).write_bytes((self._remote / name).read_bytes())

    def upload(self) -> None:
        """Upload the files that have changed; returns when they are in the bucket.

        Raises:
          StorageError: the bucket cannot be written.
        """
        if self._remote is None:
            return
        with self._lock:
            for path in sorted(p for p in self.folder.rglob("*") if p.is_file()):
                name, info = path.relative_to(self.folder).as_posix(), path.stat()
                if self._sent.get(name) != (state := (info.st_size, info.st_mtime_ns)):
                    (self._remote / name).write_bytes(path.read_bytes())
                    self._sent[name] = state
            self._last = time.monotonic()

    def upload_soon(self) -> None:
        """Upload in a thread, at most every :data:`UPLOAD_SECONDS`; errors wait for the next
        upload."""
        busy = self._thread is not None and self._thread.is_alive()
        if self._remote is None or busy or time.monotonic() - self._last < UPLOAD_SECONDS:
            return
        self._last = time.monotonic()

        def upload() -> None:
            with contextlib.suppress(OSError):
                self.upload()

        self._thread = threading.Thread(target=upload, name="upload", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Upload the rest, and remove the temporary folder."""
        if self._remote is None:
            return
        try:
            if self._thread is not None:
                self._thread.join()
            self.upload()
        finally:
            shutil.rmtree(self.folder, ignore_errors=True)


# Upload -------------------------------------------------------------------------------------------


def upload_folder(local: Path, remote: ObjectPath, last: tuple[str, ...] = ()) -> None:
    """Upload a folder, with a progress bar.

    Args:
      local: the folder.
      remote: where its files go.
      last: names of files, as "manifest.json", that are uploaded after all others, in this order,
        and removed before: without them, the folder does not look whole.

    Raises:
      StorageError: the bucket cannot be written.
    """
    found = (p for p in local.rglob("*") if p.is_file() and p.name != ".lock")
    files = {p.relative_to(local).as_posix(): p for p in found}
    deepest_first = sorted(files, key=lambda name: -name.count("/"))
    ends = lambda name: [n for n in deepest_first if n.rpartition("/")[2] == name]
    final = [n for name in (COMMIT_FILE, *last) for n in ends(name)]
    for name in final:
        (remote / name).unlink(missing_ok=True)
    total = sum(path.stat().st_size for path in files.values())
    with _bar(f"upload {remote}", total) as bar:

        def upload(name: str) -> None:
            (remote / name).upload(files[name])
            bar.update(files[name].stat().st_size)

        in_parallel(upload, [name for name in files if name not in final])
        for name in final:
            upload(name)


# Download -----------------------------------------------------------------------------------------


def cached(
    remote: ObjectPath,
    names: dict[str, int],
    identity: str,
    sha256: Callable[[str], str | None] = lambda name: None,
) -> Path:
    """A local copy of a folder in a bucket, from the cache if it is there.

    Copying continues after an interruption. Other processes of this machine that need the same
    copy wait for it.

    Args:
      remote: the folder.
      names: its files to copy, with their sizes.
      identity: what determines the content, such as the hash of a manifest; with the URL, it names
        the entry of the cache.
      sha256: hash of a file by its name; None: unknown.

    Raises:
      StorageError: the bucket cannot be read, a file differs from its hash, or the disk of the
        cache has too little space.
    """
    key = hashlib.sha256(f"{remote}\n{identity}".encode()).hexdigest()[:16]
    cache = cache_folder() / "bucket"
    place = cache / f"{remote.name[:40]}-{key}"
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        advice = "set XDG_CACHE_HOME to a folder that can hold copies of buckets"
        raise OSError(e.errno, f"{e.strerror}; {advice}", e.filename) from None
    with _waiting(place):
        missing = {name: size for name, size in names.items() if not _has(place / name, size)}
        if missing:
            _check_space(remote, place, missing)
            with _bar(f"copy {remote}", sum(missing.values())) as bar:
                in_parallel(
                    lambda name: _download(remote, place, name, names[name], sha256(name), bar),
                    missing,
                )
    return place


def local_files(path: Path) -> Path:
    """A local path as it is; for one in a bucket, a cached copy of the object, or of the small
    files directly in the folder (settings and tokenizer of a checkpoint, not its weights).

    Raises:
      FileNotFoundError: the bucket has neither.
      StorageError: the bucket cannot be read.
    """
    if not isinstance(path, ObjectPath):
        return path
    if path.is_file():
        return cached(path.parent, {path.name: path.stat().st_size}, _version(path)) / path.name
    if not path.is_dir():
        raise FileNotFoundError(errno.ENOENT, "no such object or folder", str(path))
    small = [p for p in path.iterdir() if p.name != ".lock"]
    found = {p.name: p.stat() for p in small}
    sizes = {n: s.st_size for n, s in found.items() if stat.S_ISREG(s.st_mode)}
    sizes = {name: size for name, size in sizes.items() if size <= _SMALL_BYTES}
    versions = [_version(path / name) for name in sizes]
    return cached(path, sizes, "\n".join(versions))


def local_folder(path: Path) -> Path:
    """A local path as it is; for a folder or object in a bucket, a cached copy of all of it.

    Raises:
      StorageError: the bucket cannot be read.
    """
    if not isinstance(path, ObjectPath):
        return path
    check_access(path)
    if path.is_file():
        return local_files(path)
    files = path.files()
    versions = [f"{name} {s.st_size} {s.st_mtime_ns} {s.etag}" for name, s in files.items()]
    return cached(path, {n: s.st_size for n, s in files.items()}, "\n".join(versions))


def _version(path: ObjectPath) -> str:
    status = path.stat()
    return f"{path.name} {status.st_size} {status.st_mtime_ns} {status.etag}"


@contextlib.contextmanager
def _waiting(place: Path) -> Iterator[None]:
    """Hold the lock of an entry of the cache; the operating system releases it at the latest when
    the process ends."""
    with place.with_name(place.name + ".lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for another process that copies to {place}", file=sys.stderr)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _has(path: Path, size: int) -> bool:
    try:
        return path.is_file() and path.stat().st_size == size
    except OSError:
        return False


def _check_space(remote: ObjectPath, place: Path, missing: dict[str, int]) -> None:
    copied = sum(p.stat().st_size for p in place.rglob("*.partial"))
    need, free = sum(missing.values()) - copied, shutil.disk_usage(place).free
    if need > free:
        raise StorageError(
            f"{remote}: the copy in {place.parent} needs {need / 1e9:,.1f} GB, "
            f"{free / 1e9:,.1f} GB are free; free some space, or set XDG_CACHE_HOME to a folder on "
            "another disk"
        )


def _download(
    remote: ObjectPath, place: Path, name: str, size: int, wanted: str | None, bar: Any
) -> None:
    """Copy one file; a part that an interrupted copy left is kept."""
    final = place / name
    final.parent.mkdir(parents=True, exist_ok=True)
    partial = final.with_name(final.name + ".partial")
    for attempt in (1, 2):
        found, done = hashlib.sha256(), 0
        with partial.open("a+b") as f:
            f.seek(0)
            while block := f.read(min(_BLOCK, size - done)):
                found.update(block)
                done += len(block)
            f.truncate(done)
            bar.update(done)
            while done < size:
                block = (remote / name).read_range(done, min(done + _BLOCK, size))
                if not block:
                    break
                f.write(block)
                found.update(block)
                done += len(block)
                bar.update(len(block))
        if done == size and wanted in (None, found.hexdigest()):
            partial.replace(final)
            return
        partial.unlink()
        bar.update(-done)
        if attempt == 2:
            raise StorageError(
                f"{remote / name} is damaged: its size or SHA-256 is not the recorded one"
            )


def _bar(title: str, total: int) -> tqdm:
    return tqdm(desc=title, total=total, unit="B", unit_scale=True, disable=None, delay=2)
