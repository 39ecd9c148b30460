"""Ends a run that hangs: a collective operation that one device never joins waits forever."""

import contextlib
import faulthandler
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax

from llama_jax.config import Recipe
from llama_jax.storage.copies import Mirror
from llama_jax.storage.paths import as_path
from llama_jax.train.clock import duration
from llama_jax.train.failure import EXIT_CODE, end_all

MIN_SECONDS = 60.0
"""A step that takes less is never called a hang."""
WRITE_SECONDS = 60.0
"""How long the stacks may take to write."""
WINDOW = 100
"""Number of last steps whose median is the usual step time."""


def watch_steps(recipe: Recipe) -> "Watchdog":
    """The watchdog of this process of a run."""
    stacks = as_path(recipe.checkpoint.dir) / f"hang-process-{jax.process_index()}.txt"
    return Watchdog(recipe.train.hang_factor, stacks, end_all)


class Watchdog:
    """Writes the stacks of all Python threads and calls ``end`` if no step finishes for too long.

    Args:
      factor: multiple of the usual step time that is too long; 0: never.
      stacks: file for the stacks of this process.
      end: called with the error and the exit code.

    Example::

      with Watchdog(20, Path("run/hang-process-0.txt"), failure.end_all) as watchdog:
        for step in range(100):
          watchdog.step_finished(step)
    """

    def __init__(self, factor: float, stacks: Path, end: Callable[[str, int], None]):
        self.factor, self._stacks, self._end = factor, stacks, end
        self._intervals: list[float] = []
        self._last = self._paused = 0.0
        self._step = 0
        self._pauses = 0
        self._closed = threading.Event()

    def __enter__(self) -> "Watchdog":
        self._last = time.monotonic()
        if self.factor:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()

    def step_finished(self, step: int) -> None:
        """Take note of a step whose result has arrived."""
        now = time.monotonic()
        self._intervals = [*self._intervals[1 - WINDOW :], now - self._last]
        self._last, self._step = now, step

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Do not watch during the block (an evaluation, a save)."""
        self._pauses += 1
        try:
            yield
        finally:
            self._last = time.monotonic()
            self._pauses -= 1

    def limit(self) -> float:
        """Seconds after which a step counts as a hang; infinite before the first step."""
        if not self._intervals:
            return float("inf")
        return max(self.factor * statistics.median(self._intervals), MIN_SECONDS)

    def _watch(self) -> None:
        while not self._closed.wait(min(1.0, MIN_SECONDS / 10)):
            waited, limit = time.monotonic() - self._last, self.limit()
            if not self._pauses and waited > limit:
                self._hang(waited, limit)
                return

    def _hang(self, waited: float, limit: float) -> None:
        usual = statistics.median(self._intervals)
        error = (
            f"step {self._step + 1} has not finished after {duration(waited)}, and steps usually "
            f"take {duration(usual)} (limit: train.hang_factor={self.factor:g}, at least "
            f"{duration(MIN_SECONDS)})"
        )
        # In a thread: the run folder may be what does not answer.
        written = threading.Event()
        writing = (error, written)
        threading.Thread(
            target=self._write_stacks, args=writing, name="stacks", daemon=True
        ).start()
        if written.wait(WRITE_SECONDS):
            error += f"; the stacks of all threads are in {self._stacks.parent}/hang-process-*.txt"
        # The other processes wait for the same step: they write their stacks before one ends all.
        self._closed.wait(min(10.0, limit / 10))
        self._end(f"{error}; start the same command again to continue", EXIT_CODE)

    def _write_stacks(self, error: str, written: threading.Event) -> None:
        with contextlib.suppress(OSError):
            mirror = Mirror(self._stacks.parent)
            with (mirror.folder / self._stacks.name).open("w") as file:
                file.write(f"{error}\n\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
            mirror.close()
            written.set()
