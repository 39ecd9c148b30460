"""Ctrl-C and SIGTERM: a run that trains saves and stops; in every other phase it ends at once.

A command answers within milliseconds, also while the main thread is inside C code (compiling,
importing, training a tokenizer), where Python's own signal handlers wait. This module imports
nothing heavy, so that a command can call :func:`start_command` before its other imports.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class PreemptionHandler:
    """The request to stop, and what happens when one arrives.

    Args:
      ends_process: end the whole process where nothing can be saved (a command); otherwise raise
        KeyboardInterrupt in the main thread (a call from a notebook or a test).
    """

    def __init__(self, ends_process: bool = False):
        self.signal: int | None = None
        """the first signal that arrived"""
        self.ends_process = ends_process
        self.before_end: Callable[[str, int], None] | None = None
        """called with the message and exit code before the process ends"""
        self.phase("starting")

    def phase(self, doing: str, saves: bool = False) -> None:
        """Say what runs now, for the message. ``saves``: the caller watches :attr:`signal`, and
        saves before it ends."""
        self.doing, self.saves = doing, saves

    def install(self) -> None:
        """Take over the signals; again after a library has taken them (jax.distributed)."""
        for number in SIGNALS:
            signal.signal(number, self._handle)

    def answer_from_thread(self) -> None:
        """Answer in a thread of its own, which is not held up by what the main thread does."""
        out, into = os.pipe()
        os.set_blocking(into, False)
        signal.set_wakeup_fd(into, warn_on_full_buffer=False)

        def listen() -> None:
            while number := os.read(out, 1):
                if number[0] in SIGNALS:
                    self._answer(number[0])

        threading.Thread(target=listen, name="signals", daemon=True).start()

    def _handle(self, number: int, _: object) -> None:
        if not self.ends_process and self._answer(number):
            raise KeyboardInterrupt

    def _answer(self, number: int) -> bool:
        """Say what happens; True when the run is to end now."""
        name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
        first, self.signal = self.signal is None, self.signal or number
        if first and self.saves:
            text = (
                f"{name} while {self.doing}: will end when a checkpoint is saved; Ctrl-C again "
                "ends at once, without it"
            )
            os.write(2, f"\n{text}\n".encode())
            return False
        kept = "" if first else "; the checkpoint before is kept"
        text = f"{name} while {self.doing}: ended{kept}; start the same command again to continue"
        os.write(2, f"\n{text}\n".encode())
        if self.ends_process:
            if self.before_end is not None:
                self.before_end(text, 128 + number)
            os._exit(128 + number)
        return True


_command: PreemptionHandler | None = None


def start_command() -> None:
    """Answer signals as a command does, from now to the end of the process."""
    global _command
    if _command is None:
        _command = PreemptionHandler(ends_process=True)
        _command.install()
        _command.answer_from_thread()


@contextlib.contextmanager
def listening() -> Iterator[PreemptionHandler]:
    """The command's :class:`Stop`; in a call from Python one that lasts until the block ends."""
    if _command is not None:
        yield _command
        return
    stop = PreemptionHandler()
    # Only the main thread can have signal handlers.
    if threading.current_thread() is not threading.main_thread():
        stop.install = lambda: None  # type: ignore[method-assign]
        yield stop
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}
    stop.install()
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def flush() -> None:
    """Write out what was printed, before ``os._exit``."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
