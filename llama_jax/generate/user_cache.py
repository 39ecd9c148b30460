"""The user's cache folder, with compiled programs and converted weights."""

import fcntl
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

from llama_jax.storage.copies import cache_folder


def converted(folder: Path, layout: str, read: list[Path], **options: Any) -> Path:
    """The conversion of weights in the user's cache, made if it does not exist.

    Its name depends on the paths, sizes and modification times of the source's files. A
    conversion gets this name when it is complete, and continues after a kill; a second process
    waits for the first.

    Args:
      folder: what to convert, a folder or a file.
      layout: name of its format, for the message.
      read: files that are read, also those in other folders.
      **options: of :func:`llama_jax.convert.job.convert`.
    """
    from llama_jax.convert.job import convert

    # Of the files that are read, the tokenizer of Meta's LLaMA 1 is in the parent folder.
    beside = folder.glob("[!.]*") if folder.is_dir() else ()
    files = {p for p in beside if p.is_file()} | {p.resolve() for p in read}
    stats = [(str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in sorted(files)]
    identity = [str(folder), stats, *map(str, options.items())]
    key = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]
    cache = cache_folder() / "converted"
    result = cache / f"{folder.name[:40]}-{key}"  # file names have at most 255 bytes
    try:
        cache.mkdir(parents=True, exist_ok=True)
        lock_file = (cache / f"{result.name}.lock").open("a")
    except OSError as e:
        advice = "set XDG_CACHE_HOME to a folder that can hold converted weights"
        raise OSError(e.errno, f"{e.strerror}; {advice}", e.filename) from None
    with lock_file as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # released when the process ends, however it ends
        if not result.exists():
            print(f"converting {folder} ({layout}) once, to {result}", file=sys.stderr)
            convert(folder, result, log=lambda line: None, **options)
    return result
