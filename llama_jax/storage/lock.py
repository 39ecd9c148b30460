"""Locks of folders in a bucket.

Object stores have no file locks. The lock is an object ``.lock``: the process that holds it writes
it again every :data:`RENEW_SECONDS`. A lock that does not change for :data:`STALE_SECONDS` belongs
to a process that died, and is taken over. If that process ran on this machine, nobody waits.
"""

import contextlib
import json
import os
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from llama_jax.storage.errors import StorageError
from llama_jax.storage.paths import ObjectPath, bucket_exists

RENEW_SECONDS = 10.0
STALE_SECONDS = 60.0
_POLL_SECONDS = 1.0


@contextlib.contextmanager
def object_lock(folder: ObjectPath, doing: str) -> Iterator[None]:
    """Hold ``folder`` for this process alone.

    Args:
      folder: the folder of a bucket.
      doing: what this process does there, for the message of the other one: "training".

    Raises:
      ValueError: another process holds it; names its process id, host and what it does.
      StorageError: the bucket cannot be read or written.
    """
    lock = folder / ".lock"
    mine = {
        "holder": f"{doing} (process {os.getpid()} on {os.uname().nodename})",
        "id": uuid.uuid4().hex,
        "process": _process(os.getpid()),
    }
    _acquire(lock, mine)
    done = threading.Event()
    renewing = threading.Thread(target=_renew, args=(lock, mine, done), name="lock", daemon=True)
    renewing.start()
    try:
        yield
    finally:
        done.set()
        renewing.join()
        with contextlib.suppress(OSError):
            if _read(lock).get("id") == mine["id"]:
                lock.unlink()


def is_locked(folder: ObjectPath) -> bool:
    """Whether a process that is not known to be dead holds ``folder``; changes nothing."""
    try:
        held = _read(folder / ".lock")
    except OSError:
        return False
    return bool(held) and not _is_dead(held)


def _acquire(lock: ObjectPath, mine: dict[str, Any]) -> None:
    first: dict[str, Any] | None = None
    start = time.monotonic()
    while True:
        with contextlib.suppress(FileExistsError):
            lock.create(_content(mine, 0))
            return
        held = _read(lock)
        if not held:
            continue
        if _is_dead(held) or (held == first and time.monotonic() - start > STALE_SECONDS):
            lock.write_bytes(_content(mine, 0))
            time.sleep(_POLL_SECONDS)  # another process may have found the lock stale too
            if _read(lock).get("id") == mine["id"]:
                return
            first = None
        elif first is None:
            first, start = held, time.monotonic()
            note = f"{lock.parent} is locked: {held.get('holder')}; waiting up to "
            print(f"{note}{STALE_SECONDS:.0f} s whether it still runs", file=sys.stderr)
        elif held != first:
            raise ValueError(
                f"{lock.parent} is in use: {held.get('holder')}; wait for it or stop it, or use "
                "another folder"
            )
        time.sleep(_POLL_SECONDS)


def _renew(lock: ObjectPath, mine: dict[str, Any], done: threading.Event) -> None:
    count, missing = 0, 0
    while not done.wait(RENEW_SECONDS):
        count += 1
        try:
            held = _read(lock)
            if held and held.get("id") != mine["id"]:
                break
            lock.write_bytes(_content(mine, count))
            missing = 0
        except OSError:  # no connection: try again; if it lasts, another process takes the lock
            missing = missing + 1 if not bucket_exists(lock) else 0
            if missing == 2 and not done.is_set():
                # A save that has begun may never end: see `Checkpoints.save`.
                _end(f"{lock.parent}: the bucket does not exist any more; ends without saving")
    else:
        return
    _end(
        f"{lock.parent} is now used by {held.get('holder')}: this process was silent for more than "
        f"{STALE_SECONDS:.0f} s, and ends without saving"
    )


def _end(error: str) -> NoReturn:
    os.write(2, f"\nerror: {error}\n".encode())
    os._exit(1)


def _content(mine: dict[str, Any], count: int) -> bytes:
    return json.dumps(mine | {"renewed": count, "time": time.time()}).encode()


def _read(lock: ObjectPath) -> dict[str, Any]:
    """The content of the lock; {} if there is none."""
    try:
        content = lock.read_bytes()
    except FileNotFoundError:
        return {}
    except StorageError:
        raise
    try:
        held = json.loads(content)
    except (ValueError, RecursionError):
        held = None
    if not isinstance(held, dict):
        return {"holder": "another process"}
    holder = "".join(c for c in str(held.get("holder"))[:200] if c.isprintable())
    return held | {"holder": holder}


def _process(pid: int) -> str:
    """What identifies a process of this machine: boot, process namespace, id and start time; ""
    where that is not known."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        namespace = os.stat("/proc/self/ns/pid").st_ino
        started = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""
    return f"{boot} {namespace} {pid} {started}"


def _is_dead(held: dict[str, Any]) -> bool:
    """Whether the holder is a process of this machine that has ended."""
    parts, here = str(held.get("process", "")).split(), _process(os.getpid()).split()
    if len(parts) != 4 or parts[:2] != here[:2] or not parts[2].isdecimal():
        return False
    pid = int(parts[2])
    if found := _process(pid):
        return found != held["process"]
    try:  # /proc may hide processes of other users (hidepid)
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return True
    except PermissionError:
        pass
    return False
