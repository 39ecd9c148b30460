"""Paths: :class:`pathlib.Path` for local files, :class:`ObjectPath` for objects in a bucket.

Code that works on both uses the methods that the two classes share. An object is written whole or
not at all; there are no folders: a folder exists while an object has its name as a prefix.
"""

import argparse
import datetime
import errno
import fnmatch
import functools
import importlib.util
import io
import logging
import os
import re
import stat
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from types import SimpleNamespace
from typing import IO, Any, TypeVar, cast

from llama_jax.storage.errors import StorageError, one_line, redacted

EXTRAS = {"gs": ("gcs", "gcsfs"), "s3": ("s3", "s3fs")}
"""Scheme of a URL to the extra of this package and the module that it needs."""
COMMIT_FILE = "commit_success.txt"
"""Orbax writes this object last: without it, a checkpoint in a bucket is not complete."""
_THREADS = 16
_NOTE_SECONDS = 20.0

T = TypeVar("T")
R = TypeVar("R")


def is_remote(path: Any) -> bool:
    """Whether a path is in a bucket."""
    return isinstance(path, ObjectPath) or "://" in str(path)


def check_path(path: str) -> str:
    """The path, if it is local or in a supported object store.

    Raises:
      ValueError: neither, or a character that no path can have.
    """
    if "\0" in path:
        raise ValueError("a path cannot contain a NUL character")
    scheme, separator, rest = path.partition("://")
    if not separator and path.startswith(tuple(f"{scheme}:/" for scheme in EXTRAS)):
        raise ValueError("a URL of a bucket has two slashes after the colon")
    if separator and not rest.isprintable():
        raise ValueError("the name of an object cannot contain control characters")
    if separator and scheme not in EXTRAS:
        raise ValueError(
            f"{scheme}:// is not supported; give a path of this machine, or gs://BUCKET/FOLDER or "
            "s3://BUCKET/FOLDER"
        )
    parts = rest.split("/") if separator else []
    if separator and (not parts[0] or ".." in parts):
        raise ValueError(f"it is not of the form {scheme}://BUCKET/FOLDER, without ..")
    if separator and not re.fullmatch(r"[\w.-]+", parts[0]):
        raise ValueError(
            "the name of a bucket has letters, digits, dots and hyphens; credentials are read from "
            "the environment, not from the URL"
        )
    if re.search(r"\?.*=", rest):
        raise ValueError("the name of an object cannot end in a query; signed URLs do not work")
    return path


def as_path(path: Any) -> Path:
    """A local path, or an :class:`ObjectPath` for ``gs://BUCKET/...`` and ``s3://BUCKET/...``.

    Raises:
      ValueError: a URL of another kind.
    """
    if isinstance(path, ObjectPath):
        return cast(Path, path)
    text = os.fspath(path)
    if "://" not in text:
        return Path(text)
    try:
        scheme, _, rest = check_path(text).partition("://")
    except ValueError as e:
        raise ValueError(f"{redacted(text)}: {e}") from None
    return cast(Path, ObjectPath(scheme, tuple(p for p in rest.split("/") if p not in ("", "."))))


def path_argument(text: str) -> Path:
    """:func:`as_path` as the type of an argument of a command."""
    try:
        return as_path(text)
    except ValueError as e:
        raise argparse.ArgumentTypeError(str(e)) from None


@functools.cache
def filesystem(scheme: str) -> Any:
    """The fsspec file system of a scheme. Nothing here reads credentials: the libraries do.

    Raises:
      StorageError: its extra is not installed.
    """
    extra, module = EXTRAS[scheme]
    if importlib.util.find_spec(module) is None:
        raise StorageError(f"{scheme}:// needs an extra: pip install 'llama_jax[{extra}]'")
    import fsspec

    # A cached listing would hide what TensorStore and other processes write. Orbax's own file
    # system takes this setting from here too.
    name = {"gs": "gcs"}.get(scheme, scheme)
    settings = fsspec.config.conf.setdefault(name, {})
    settings["use_listings_cache"] = False
    if scheme == "s3":  # s3fs tries again itself: together 5 x 2 attempts of 15 s
        settings["config_kwargs"] = {"retries": {"max_attempts": 1}}
    if scheme == "gs":  # gcsfs would wait 5 minutes in each of its 6 attempts
        import aiohttp

        logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it prints a traceback of each error
        settings["requests_timeout"] = aiohttp.ClientTimeout(sock_connect=10, sock_read=30)
    return fsspec.filesystem(name)


@functools.total_ordering
class ObjectPath:
    """An object in a bucket, or the objects below a prefix, with methods of :class:`pathlib.Path`.

    It has no ``__fspath__``, so functions that need a local file refuse it instead of creating a
    folder named "s3:".

    Args:
      scheme: "gs" or "s3".
      parts: bucket, and the parts of the name.

    Example::

      run = as_path("s3://bucket/runs/7b")
      (run / "model.json").read_bytes()
    """

    def __init__(self, scheme: str, parts: tuple[str, ...]):
        self.scheme, self.parts = scheme, parts

    # Names ---------------------------------------------------------------------------------------

    def __str__(self) -> str:
        return f"{self.scheme}://{self.key}"

    __repr__ = as_posix = __str__

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ObjectPath) and str(self) == str(other)

    def __lt__(self, other: "ObjectPath") -> bool:
        return str(self) < str(other)

    def __hash__(self) -> int:
        return hash(str(self))

    def __truediv__(self, other: Any) -> Any:
        text = str(other)
        if "://" in text or text.startswith("/"):
            return as_path(text)
        return ObjectPath(self.scheme, self.parts + PurePosixPath(text).parts)

    @property
    def key(self) -> str:
        """Bucket and name, as fsspec takes them."""
        return "/".join(self.parts)

    @property
    def name(self) -> str:
        return self.parts[-1] if len(self.parts) > 1 else ""

    @property
    def suffix(self) -> str:
        return PurePosixPath(self.name).suffix

    @property
    def stem(self) -> str:
        return PurePosixPath(self.name).stem

    @property
    def parent(self) -> "ObjectPath":
        return ObjectPath(self.scheme, self.parts[:-1] or self.parts)

    @property
    def parents(self) -> list["ObjectPath"]:
        return [ObjectPath(self.scheme, self.parts[:n]) for n in range(len(self.parts) - 1, 0, -1)]

    def with_name(self, name: str) -> "ObjectPath":
        return self.parent / name

    def relative_to(self, other: Any) -> PurePosixPath:
        if not self.is_relative_to(other):
            raise ValueError(f"{self} is not in {other}")
        return PurePosixPath(*self.parts[len(other.parts) :])

    def is_relative_to(self, other: Any) -> bool:
        same = isinstance(other, ObjectPath) and other.scheme == self.scheme
        return same and self.parts[: len(other.parts)] == other.parts

    def resolve(self) -> "ObjectPath":
        return self

    absolute = expanduser = resolve

    # Content -------------------------------------------------------------------------------------

    def _call(self, name: str, *args: Any, **kwargs: Any) -> Any:
        with one_line(self):
            return getattr(filesystem(self.scheme), name)(self.key, *args, **kwargs)

    def exists(self) -> bool:
        try:
            self._call("info")
        except FileNotFoundError:
            return False
        return True

    def stat(self) -> Any:
        """Size (``st_size``), kind (``st_mode``) and time of change; FileNotFoundError if there
        is no such object or folder."""
        return _status(self._call("info"))

    def is_dir(self) -> bool:
        try:
            return stat.S_ISDIR(self.stat().st_mode)
        except FileNotFoundError:
            return False

    def is_file(self) -> bool:
        try:
            return stat.S_ISREG(self.stat().st_mode)
        except FileNotFoundError:
            return False

    def is_symlink(self) -> bool:
        return False

    def iterdir(self) -> Iterator["ObjectPath"]:
        """The objects and folders directly in this one."""
        names = self._call("ls", detail=False)
        names = {name.rstrip("/") for name in names} - {self.key}
        return (self / self._inside(name.rpartition("/")[2]) for name in sorted(names))

    def _inside(self, name: str) -> str:
        """The relative name of an object; a store accepts names that would be outside the folder
        as names of local files."""
        if any(part in ("", ".", "..") for part in name.split("/")) or "\0" in name:
            raise StorageError(
                f"{self} has an object {name!r}, which cannot be the name of a file: delete it, or "
                "use another folder"
            )
        return name

    def files(self) -> dict[str, Any]:
        """Names of all objects below this one, relative to it, with their status."""
        prefix = self.key + "/"
        try:
            found = self._call("find", detail=True)
        except FileNotFoundError:
            return {}
        return {
            self._inside(name.removeprefix(prefix)): _status(info)
            for name, info in sorted(found.items())
            if name.startswith(prefix) and not name.endswith("/")
        }

    def glob(self, pattern: str) -> list["ObjectPath"]:
        """Those directly in this folder whose names match."""
        if not self.is_dir():
            return []
        return [p for p in self.iterdir() if fnmatch.fnmatchcase(p.name, pattern)]

    def rglob(self, pattern: str) -> list["ObjectPath"]:
        """The objects below this folder whose names match."""
        names = self.files()
        return [self / n for n in names if fnmatch.fnmatchcase(n.rpartition("/")[2], pattern)]

    def read_bytes(self) -> bytes:
        return self._call("cat_file")

    def read_range(self, start: int, stop: int) -> bytes:
        """Bytes ``start`` to ``stop``."""
        return self._call("cat_file", start=start, end=stop)

    def read_text(self, encoding: str = "utf-8") -> str:
        return self.read_bytes().decode(encoding)

    def open(self, mode: str = "r", **_: Any) -> IO[Any]:
        """Open for reading. Objects are written with :meth:`write_bytes`: none can be extended."""
        if mode not in ("r", "rb"):
            raise ValueError(f"{self}: objects cannot be opened with mode {mode!r}")
        f = self._call("open", "rb")
        return f if mode == "rb" else io.TextIOWrapper(f, encoding="utf-8")

    def write_bytes(self, content: bytes) -> int:
        self._call("pipe_file", content)
        return len(content)

    def upload(self, local: Path) -> None:
        """Write the content of a local file, in several parts if it is large."""
        with one_line(self):
            filesystem(self.scheme).put_file(str(local), self.key)

    def create(self, content: bytes) -> None:
        """Write an object that does not exist; FileExistsError if it does."""
        if self.exists():  # not every store has conditional writes
            raise FileExistsError(errno.EEXIST, "exists", str(self))
        self._call("pipe_file", content, mode="create")

    def mkdir(self, *_: Any, **__: Any) -> None:
        """Nothing: folders need not be created."""

    rmdir = mkdir

    def unlink(self, missing_ok: bool = False) -> None:
        try:
            self._call("rm_file")
        except FileNotFoundError:
            if not missing_ok:
                raise

    def rename(self, target: Any) -> "ObjectPath":
        """Copy all objects, then delete them here. A copy that was interrupted leaves this folder
        as it was."""
        names = self.files()
        pairs = [(self / n, target / n) for n in names] if names else [(self, target)]
        last = [(a, b) for a, b in pairs if a.name == COMMIT_FILE]
        in_parallel(lambda pair: pair[0].copy(pair[1]), [p for p in pairs if p not in last])
        in_parallel(lambda pair: pair[0].copy(pair[1]), last)
        remove_tree(cast(Path, self))
        return target

    def copy(self, target: Any) -> None:
        """Copy an object inside the object store."""
        with one_line(self):
            filesystem(self.scheme).cp_file(self.key, target.key)


def _status(info: dict[str, Any]) -> Any:
    time = info.get("mtime") or info.get("LastModified") or info.get("updated")
    if isinstance(time, str):
        time = datetime.datetime.fromisoformat(time)
    seconds = time.timestamp() if time else 0.0
    kind = stat.S_IFDIR if info["type"] == "directory" else stat.S_IFREG
    return SimpleNamespace(
        st_size=int(info.get("size") or 0),
        st_mode=kind | 0o644,
        st_mtime=seconds,
        st_mtime_ns=int(seconds * 1e9),
        etag=str(info.get("ETag") or info.get("etag") or ""),
    )


# Both kinds of paths ------------------------------------------------------------------------------


def in_parallel(function: Callable[[T], R], items: Iterable[T]) -> list[R]:
    """Results of the function, called in threads; the first error is raised."""
    with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(function, items))


def file_sizes(folder: Path) -> dict[str, int]:
    """Name, relative to the folder, and size of every file below it."""
    if isinstance(folder, ObjectPath):
        return {name: status.st_size for name, status in folder.files().items()}
    files = (p for p in folder.rglob("*") if p.is_file())
    return {p.relative_to(folder).as_posix(): p.stat().st_size for p in files}


def remove_tree(folder: Path) -> None:
    """Delete a folder with everything in it, or one file; nothing if it does not exist.

    In a bucket, what marks a checkpoint as complete is deleted first.
    """
    if not isinstance(folder, ObjectPath):
        import shutil

        shutil.rmtree(folder, ignore_errors=True)
        return
    names = sorted(folder.files(), key=lambda name: name.rpartition("/")[2] != COMMIT_FILE)
    marks = [n for n in names if n.rpartition("/")[2] == COMMIT_FILE]
    for some in (marks, names[len(marks) :]):
        in_parallel(lambda name: (folder / name).unlink(missing_ok=True), some)
    if not names:
        folder.unlink(missing_ok=True)


def check_access(folder: "Path | ObjectPath") -> None:
    """Check that a folder in a bucket can be listed, before anything else is done; nothing for a
    local folder.

    Raises:
      StorageError: one line: the bucket is missing, no permission, no credentials, no connection.
    """
    if not isinstance(folder, ObjectPath):
        return
    note = f"waiting for {folder}: the object store has not answered for {_NOTE_SECONDS:.0f} s"
    timer = threading.Timer(_NOTE_SECONDS, print, [note], {"file": sys.stderr, "flush": True})
    timer.daemon = True
    timer.start()
    try:
        folder._call("ls", detail=False)
    except FileNotFoundError:  # an empty folder of a bucket, or no bucket
        if not bucket_exists(folder):
            bucket = ObjectPath(folder.scheme, folder.parts[:1])
            raise StorageError(
                f"{folder}: the bucket {bucket} does not exist; create it, or correct the name"
            ) from None
    finally:
        timer.cancel()


def bucket_exists(path: ObjectPath) -> bool:
    """Whether the bucket of a path exists; True if it does not answer or cannot be listed."""
    try:
        ObjectPath(path.scheme, path.parts[:1])._call("ls", detail=False)
    except FileNotFoundError:
        return False
    except StorageError as e:
        return "the bucket does not exist" not in str(e)
    return True
