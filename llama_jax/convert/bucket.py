"""Conversion from and to a bucket: sources are copied to the user's cache folder, results are
written there and uploaded."""

import contextlib
import hashlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from llama_jax.checkpoint.steps import loaded_step
from llama_jax.config import ConfigError
from llama_jax.convert import orbax
from llama_jax.convert.formats import ConvertError
from llama_jax.storage.copies import cache_folder, cached, local_folder, upload_folder
from llama_jax.storage.lock import object_lock
from llama_jax.storage.paths import COMMIT_FILE, ObjectPath, check_access, remove_tree

_LAST = (
    "model.safetensors.index.json",
    "config.json",
    "params.json",
    "model.json",
    "manifest.json",
)
"""Uploaded last, so that half an upload is not recognized as weights."""
_MARK = ".uploading"
"""Folder beside the destination: the lock of the conversion, and :data:`_STARTED`."""
_STARTED = "started"
"""Object of an upload that has started and not ended: it may be replaced."""


def local_source(source: Path) -> Path:
    """Weights as local files; of a training run in a bucket, only the step that is converted.

    Raises:
      ConvertError: the folder holds no finished step.
      StorageError: the bucket cannot be read.
    """
    if not isinstance(source, ObjectPath):
        return source
    check_access(source)
    root = orbax.root_of(source)
    if not (root / "model.json").is_file():
        return local_folder(source)
    within = source.relative_to(root).parts
    try:
        step = int(within[1]) if len(within) > 1 else loaded_step(root)
    except ConfigError as e:
        raise ConvertError(str(e)) from None
    files = {name: s for name, s in root.files().items() if _is_needed(name, f"steps/{step}/")}
    versions = [f"{name} {s.st_size} {s.st_mtime_ns} {s.etag}" for name, s in files.items()]
    return cached(root, {name: s.st_size for name, s in files.items()}, "\n".join(versions))


def _is_needed(name: str, step: str) -> bool:
    """Whether a file of a run is settings, tokenizer, or weights of the step."""
    return ("/" not in name and name != ".lock") or (
        name.startswith(step) and not name.startswith(f"{step}optimizer/")
    )  # fmt: skip


@contextlib.contextmanager
def uploaded(destination: ObjectPath, log: Callable[[str], None] | None) -> Iterator[Path]:
    """A local path to write; what is there at the end of the block is uploaded.

    Args:
      destination: the folder of a bucket, or the object of a GGUF file.
      log: receives a line when the upload is complete.

    Raises:
      ConvertError: the destination exists.
      ValueError: another process converts to this destination.
      StorageError: the bucket cannot be written.
    """
    check_access(destination)
    if not destination.name:
        raise ConvertError(f"destination {destination}: give the name of a folder in the bucket")
    mark = destination.with_name(destination.name + _MARK)
    with object_lock(mark, "converting"):  # also shows a missing permission before the conversion
        _check_free(destination, mark / _STARTED)
        yield from _uploaded(destination, mark / _STARTED)
    if log is not None:
        log(f"uploaded: {destination}")


def _check_free(destination: ObjectPath, started: ObjectPath) -> None:
    """Raise an error if there is something else than a part of an upload."""
    if destination.exists() and not started.exists():
        raise ConvertError(f"{destination} exists; remove it or choose another name")


def _uploaded(destination: ObjectPath, started: ObjectPath) -> Iterator[Path]:
    key = hashlib.sha256(str(destination).encode()).hexdigest()[:16]
    folder = cache_folder() / "upload" / key
    folder.mkdir(parents=True, exist_ok=True)
    local = folder / destination.name
    if local.exists():  # of a run whose upload failed
        shutil.rmtree(local) if local.is_dir() else local.unlink()
    yield local
    _check_free(destination, started)  # something else may be there since the start
    started.write_bytes(b"")
    remove_tree(destination)  # type: ignore[arg-type]
    if local.is_dir():
        for step in local.glob("steps/*"):  # Orbax looks for it in a bucket
            for place in (step, *(p for p in step.iterdir() if p.is_dir())):
                (place / COMMIT_FILE).touch()
        upload_folder(local, destination, last=_LAST)
    else:
        destination.upload(local)
    started.unlink()
    shutil.rmtree(folder)
