"""Local copies of prepared folders in a bucket: token shards are memory-mapped files."""

import hashlib
import json
from pathlib import Path
from typing import Any

from llama_jax.storage.copies import cached
from llama_jax.storage.paths import ObjectPath, check_access

_MANIFEST = "manifest.json"


def local_shards(folder: Path) -> Path:
    """A prepared source or mixture as a local folder: itself, or its copy in the user's cache.

    The copy is made once for each content. Sizes are compared at each start, and the SHA-256 of
    each shard when it is copied.

    Raises:
      ValueError: the bucket has no prepared folder there.
      StorageError: the bucket cannot be read, a shard is damaged, or the disk is too small.
    """
    if not isinstance(folder, ObjectPath):
        return folder
    files = folder.files()
    manifests = {n: (folder / n).read_bytes() for n in files if Path(n).name == _MANIFEST}
    if _MANIFEST not in manifests:
        check_access(folder)
        raise ValueError(f"{folder} has no manifest.json; make it with python -m llama_jax.prepare")
    hashes: dict[str, str] = {}
    for name, content in manifests.items():
        hashes[name] = hashlib.sha256(content).hexdigest()
        prefix = name.removesuffix(_MANIFEST)
        hashes |= {prefix + file: found for file, found in _shard_hashes(content).items()}
    wanted = {
        name: status.st_size
        for name, status in files.items()
        if name.removesuffix(Path(name).name) + _MANIFEST in manifests
        and Path(name).name != ".lock"
    }
    identity = json.dumps(sorted((n, hashes[n]) for n in manifests))
    return cached(folder, wanted, identity, hashes.get)


def _shard_hashes(manifest: bytes) -> dict[str, str]:
    """SHA-256 of the files of the shards; {} for a manifest that is damaged or lists sources."""
    found: dict[str, str] = {}
    try:
        splits: dict[str, Any] = json.loads(manifest).get("splits", {})
        for shard in (shard for split in splits.values() for shard in split["shards"]):
            kinds = (key.removesuffix("_sha256") for key in shard if key.endswith("_sha256"))
            found |= {f"{shard['name']}.{k}": h for k in kinds if (h := shard[f"{k}_sha256"])}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}
    return found
