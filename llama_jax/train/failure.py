"""An error in one process of a job ends every process, each with that error as its last line.

Without this, the others would wait for the failed one in a collective operation until JAX's
heartbeat ends them with a message of its own. The error travels through the key-value store of
`jax.distributed`; a thread in each process looks for it once a second.
"""

import os
import platform
import threading
import time
from typing import Any, NoReturn

from llama_jax.train.interrupt import flush

POLL_SECONDS = 1.0
WAIT_SECONDS = 10
_KEY = "llama_jax/failure"

_lock = threading.Lock()
_done = threading.Event()


def several() -> bool:
    """Whether this process is one of several of a job."""
    state = _state()
    return state.client is not None and (state.num_processes or 1) > 1


def watch() -> None:
    """End this process when another of the job reports an error; nothing where there is one."""
    if several():
        _done.clear()
        threading.Thread(target=_watch, name="failure", daemon=True).start()


def stop_watching() -> None:
    """The run is over; later errors of other processes do not matter here."""
    _done.set()


def end_all(text: str, code: int) -> NoReturn:
    """Report an error to every process of the job and end; the first error reported is the one
    that all of them show.

    Args:
      text: the error.
      code: exit status of every process.
    """
    state = _state()
    try:
        where = f"process {state.process_id} on {platform.node()}"
        state.client.key_value_set(_KEY, f"{code} {state.process_id} {where}: {text}")
    except Exception:  # another process was first, or the coordinator is gone
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
    except Exception:  # nothing there, or the coordinator is gone
        return None
    return text, int(code)


def _leave(text: str, code: int) -> NoReturn:
    """Print the error last and end without JAX's shutdown, which would wait for the others."""
    with _lock:
        state = _state()
        try:
            # All have read it; the coordinator lives in process 0, which leaves last.
            state.client.wait_at_barrier("llama_jax/failed", WAIT_SECONDS * 1000)
            time.sleep(1.0 if state.process_id == 0 else 0.0)
        except Exception:  # a process that is dead does not come
            pass
        flush()
        os.write(2, f"\nerror: {text}\n".encode())
        os._exit(code)


def _state() -> Any:
    from jax._src import distributed  # no public name for the key-value store

    return distributed.global_state
