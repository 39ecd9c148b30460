"""The process in which chat templates are rendered, because a template is not trusted."""

import atexit
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

_WORKER = Path(__file__).with_name("template_worker.py")
_TIMEOUT = 60
"""Seconds after which a process that does not answer is killed; the CPU time of each rendering is
limited to 2 s, that of all renderings for a prompt to 10 s."""


class Process:
    """The process that renders; started on first use, and again after it has ended."""

    def __init__(self):
        self._lock = threading.Lock()
        self._popen: subprocess.Popen | None = None

    def ask(self, line: bytes) -> dict[str, Any]:
        """The answer to one request."""
        with self._lock:
            if self._popen is None or self._popen.poll() is not None:
                self._start()
            popen = self._popen
            assert popen is not None
            assert popen.stdin is not None
            assert popen.stdout is not None
            try:
                popen.stdin.write(line + b"\n")
                popen.stdin.flush()
                out = _read_line(popen)
            except BrokenPipeError:
                out = b""
            except BaseException:  # after Ctrl-C the next request must not read this answer
                self.close()
                raise
            if out.endswith(b"\n"):
                return json.loads(out)
            return {"error": self._ended()}

    def _start(self) -> None:
        self.close()
        # In a new session, so that Ctrl-C in the terminal does not end it.
        self._popen = subprocess.Popen(
            [sys.executable, "-P", str(_WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def _ended(self) -> str:
        assert self._popen is not None
        status = self._popen.wait()
        if status in (-signal.SIGXCPU, -signal.SIGKILL):
            return "it takes too long (2 s of CPU time, or 10 s for all answers of a prompt)"
        return (
            f"the process that renders it ended (status {status}): nested too deeply, or too large"
        )

    def close(self) -> None:
        """End the process."""
        if self._popen is not None:
            self._popen.kill()
            self._popen.communicate()
            self._popen = None


def _read_line(popen: subprocess.Popen) -> bytes:
    """The next line that the process writes, without its end if the process ends before; the
    process is killed after :data:`_TIMEOUT`."""
    assert popen.stdout is not None
    parts, poll, end = [b""], select.poll(), time.monotonic() + _TIMEOUT
    poll.register(popen.stdout)
    while not parts[-1].endswith(b"\n"):
        if not poll.poll(max(0, 1000 * (end - time.monotonic()))):
            popen.kill()
        parts.append(os.read(popen.stdout.fileno(), 1 << 20))
        if not parts[-1]:
            break
    return b"".join(parts)


process = Process()
"""Renders the templates of all threads without a process of their own, one after the other."""
_of_thread = threading.local()


def start_own_process() -> None:
    """Let this thread render in a process of its own: it does not wait for other threads, and they
    do not wait for it."""
    _of_thread.process = Process()
    atexit.register(_of_thread.process.close)


def of_thread() -> Process:
    """The process that renders for this thread."""
    return getattr(_of_thread, "process", process)


atexit.register(process.close)
