"""An error in one process of a job ends all processes, each with that error as its last line.

Otherwise the other processes would wait for the failed one in a collective operation, until JAX's
heartbeat ends them with an unrelated message. The error is shared through the key-value store of
`jax.distributed`, which a thread in each process reads once per second.
"""

import contextlib
import os
import platform
import sys
import threading
import time
from typing import Any, NoReturn

POLL_SECONDS = 1.0
WAIT_SECONDS = 10
_KEY = "llama_jax/failure"

_lock = threading.Lock()
_done = threading.Event()


def several() -> bool:
    """Whether this process is one of several processes of a job."""
    state = _state()
    return state.client is not None and (state.num_processes or 1) > 1


def watch() -> None:
    """End this process when another process of the job reports an error."""
    if several():
        _done.clear()
        threading.Thread(target=_watch, name="failure", daemon=True).start()


def stop_watching() -> None:
    """Ignore later errors of other processes: this process has finished."""
    _done.set()


def end_all(text: str, code: int) -> NoReturn:
    """Report an error to every process of the job, and end.

    If several processes report errors, all processes show the first one.

    Args:
      text: the error.
      code: exit status of every process.
    """
    state = _state()
    try:
        where = f"process {state.process_id} on {platform.node()}"
        state.client.key_value_set(_KEY, f"{code} {state.process_id} {where}: {text}")
    except Exception:  # another process was first, or the coordinator does not respond
        reported = _reported()
        if reported is not None:
            _leave(*reported)
    _leave(text, code)


def _watch() -> None:
    while not _done.wait(POLL_SECONDS):
        if (reported := _reported()) is not None:
            _leave(*reported)


def _reported() -> tuple[str, int] | None:
    """The error that a process reported, and its exit status."""
    try:
        code, _, text = _state().client.key_value_try_get(_KEY).split(" ", 2)
    except Exception:  # no error reported, or the coordinator does not respond
        return None
    return text, int(code)


def _leave(text: str, code: int) -> NoReturn:
    """Print the error last, and end without JAX's shutdown, which would wait for the others."""
    with _lock:
        state = _state()
        try:
            # The coordinator runs in process 0, so process 0 ends after the others have read it.
            state.client.wait_at_barrier("llama_jax/failed", WAIT_SECONDS * 1000)
            time.sleep(1.0 if state.process_id == 0 else 0.0)
        except Exception:  # a dead process never reaches the barrier
            pass
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os.write(2, f"\nerror: {text}\n".encode())
        os._exit(code)


def _state() -> Any:
    from jax._src import distributed  # the key-value store has no public name

    return distributed.global_state
