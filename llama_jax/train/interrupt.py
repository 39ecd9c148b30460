"""Ctrl-C and SIGTERM: training saves a checkpoint and stops; every other phase ends immediately.

A command reacts within milliseconds even while the main thread runs C code (compiling, importing,
training a tokenizer), where Python's own signal handlers have to wait. This module imports nothing
heavy, so that a command can call :func:`start_command` before its other imports.
"""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class PreemptionHandler:
    """Records a request to stop, and ends the process where nothing can be saved.

    Args:
      ends_process: end the whole process in a phase that saves nothing (a command); otherwise raise
        KeyboardInterrupt in the main thread (a call from a notebook or a test).

    Example::

      with listening() as preemption:
        preemption.phase("training", saves=True)
        while preemption.signal is None:
          ...  # one step
    """

    def __init__(self, ends_process: bool = False):
        self.signal: int | None = None
        """The first signal received."""
        self.stopped = False
        """Whether training saved and stopped early, after a signal here or in another process."""
        self.ends_process = ends_process
        self.started = time.perf_counter()
        self.before_end: Callable[[str, int], None] | None = None
        """Called with the message and the exit code before the process ends."""
        self.phase("starting")

    def phase(self, doing: str, saves: bool = False) -> None:
        """Set what the process does now.

        Args:
          doing: the phase, for the message that a signal prints.
          saves: the caller checks :attr:`signal`, and saves before it stops.
        """
        self.doing, self.saves = doing, saves

    def install(self) -> None:
        """Handle the signals; called again after jax.distributed has installed its own handler."""
        for number in SIGNALS:
            signal.signal(number, self._handle)

    def handle_in_thread(self) -> None:
        """Handle signals in a separate thread, so that a busy main thread causes no delay."""
        out, into = os.pipe()
        os.set_blocking(into, False)
        signal.set_wakeup_fd(into, warn_on_full_buffer=False)

        def listen() -> None:
            while number := os.read(out, 1):
                if number[0] in SIGNALS:
                    self._react(number[0])

        threading.Thread(target=listen, name="signals", daemon=True).start()

    def _handle(self, number: int, _: object) -> None:
        if not self.ends_process and self._react(number):
            raise KeyboardInterrupt

    def _react(self, number: int) -> bool:
        """Print what happens; True if the run must end immediately."""
        name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
        first, self.signal = self.signal is None, self.signal or number
        if first and self.saves:
            again = "again " if number == signal.SIGINT else ""
            text = (
                f"{name} while {self.doing}: will end when a checkpoint is saved; press Ctrl-C "
                f"{again}to end immediately without saving"
            )
            os.write(2, f"\n{text}\n".encode())
            return False
        kept = "" if first else "; the previous checkpoint is kept"
        text = f"{name} while {self.doing}: ended{kept}; run the same command again to continue"
        os.write(2, f"\n{text}\n".encode())
        if self.ends_process:
            if self.before_end is not None:
                self.before_end(text, 128 + number)
            os._exit(128 + number)
        return True


_command: PreemptionHandler | None = None


def start_command() -> None:
    """Handle signals as a command does, from now to the end of the process."""
    global _command
    if _command is None:
        _command = PreemptionHandler(ends_process=True)
        _command.install()
        _command.handle_in_thread()


@contextlib.contextmanager
def listening() -> Iterator[PreemptionHandler]:
    """The command's handler; for a call from Python, a handler that is active in the block."""
    if _command is not None:
        yield _command
        return
    preemption = PreemptionHandler()
    # Only the main thread can have signal handlers.
    if threading.current_thread() is not threading.main_thread():
        preemption.install = lambda: None  # type: ignore[method-assign]
        yield preemption
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}
    preemption.install()
    try:
        yield preemption
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
