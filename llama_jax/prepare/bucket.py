"""Prepared folders in a bucket: made in the user's cache folder, then uploaded."""

import contextlib
import hashlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from llama_jax.data.manifest import MANIFEST
from llama_jax.io import folder_lock
from llama_jax.storage.copies import cache_folder, upload_folder
from llama_jax.storage.paths import ObjectPath, check_access, file_sizes, remove_tree


@contextlib.contextmanager
def prepared_in_bucket(remote: ObjectPath, sources: list[str]) -> Iterator[Path]:
    """A local folder for what is prepared in the block; it is uploaded at the end.

    It begins with the manifests and tokenizers that are in the bucket, and stays in the cache, so
    that an interrupted preparation continues. The manifest of each folder is uploaded last, and
    removed first when a source changes: half an upload never looks whole.

    Args:
      remote: the folder in the bucket.
      sources: names of the sources that are prepared; others are not uploaded.

    Raises:
      ValueError: another process prepares in this folder of the bucket.
      StorageError: the bucket cannot be read or written.
    """
    check_access(remote)
    key = hashlib.sha256(str(remote).encode()).hexdigest()[:16]
    local = cache_folder() / "prepare" / f"{remote.name[:40]}-{key}"
    local.mkdir(parents=True, exist_ok=True)
    with folder_lock(remote, "preparing"):  # type: ignore[arg-type]
        _fetch_small_files(remote, local)
        yield local
        for name in sources:
            if (local / name).is_dir():
                _upload(local / name, remote / name)
        top = local / MANIFEST
        for path in [p for p in local.iterdir() if p.is_file() and p.name[0] != "." and p != top]:
            (remote / path.name).write_bytes(path.read_bytes())
        (remote / MANIFEST).write_bytes(top.read_bytes())


def _fetch_small_files(remote: ObjectPath, local: Path) -> None:
    """Copy what another machine has prepared, without the shards. A source whose manifest differs
    from that in the bucket is removed here."""
    files = remote.files()
    folders = {name.rpartition("/")[0] for name in files if Path(name).name == MANIFEST}
    for name in sorted(files, key=lambda name: Path(name).name != MANIFEST):
        folder, _, file = name.rpartition("/")
        if folder not in folders or file.partition(".")[2] in ("tokens", "starts", "mask", "lock"):
            continue
        content = (remote / name).read_bytes()
        path = local / name
        if path.is_file() and path.read_bytes() == content:
            continue
        if folder and file == MANIFEST:
            shutil.rmtree(path.parent, ignore_errors=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def _upload(local: Path, remote: ObjectPath) -> None:
    """Upload a source that differs from what is in the bucket."""
    here, there = file_sizes(local), file_sizes(remote)  # type: ignore[arg-type]
    here = {name: size for name, size in here.items() if not name.startswith(".")}
    same_sizes = all(there.get(name) == size for name, size in here.items())
    if same_sizes and (remote / MANIFEST).read_bytes() == (local / MANIFEST).read_bytes():
        return
    (remote / MANIFEST).unlink(missing_ok=True)
    for name in there.keys() - here.keys():
        remove_tree(remote / name)
    upload_folder(local, remote, last=(MANIFEST,))
