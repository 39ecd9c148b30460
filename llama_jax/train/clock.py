"""Where the wall time of a run goes (goodput), over all its starts, and its speed."""

import contextlib
import itertools
import time
from collections.abc import Iterator

from llama_jax.config.values import seconds_of

PHASES = ("start", "compile", "restore", "data", "evaluation", "checkpoint", "steps", "lost")
"""What time is spent on. "start": up to the first step, without the next two. "data": waiting for a
batch. "checkpoint": while no step runs because of a save. "lost": steps after the last checkpoint
of a run that was killed, which the next start repeats."""
MEASURED = ("compile", "restore", "data", "evaluation", "checkpoint")

Seconds = dict[str, float]
"""Seconds of each phase, and the number of "starts"."""


class Clock:
    """Counts the seconds of each phase, and measures throughput between log lines.

    Example::

      clock = Clock()
      with clock.measure("compile"):
          ...
      clock.begin()
      with clock.measure("data"):
          batch = next(data)
      tokens_per_second, data_wait = clock.lap(step=1, tokens=2048)
      goodput_line(clock.totals())  # "92.3% of 3 h 12 min in training steps; ..."
    """

    def __init__(self, started: float | None = None):
        self._started = time.perf_counter() if started is None else started
        self._begun: float | None = None
        self._seconds = dict.fromkeys(MEASURED, 0.0)
        self._before: Seconds = dict.fromkeys((*PHASES, "starts"), 0.0)
        self._lap: tuple[float, int | None, Seconds] = (self._started, None, dict(self._seconds))
        self._waits = 0

    @contextlib.contextmanager
    def measure(self, phase: str) -> Iterator[None]:
        """Count the time of the block as time of a phase."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[phase] += time.perf_counter() - start
            self._waits += phase == "data"

    def seconds(self, phase: str) -> float:
        """Time of one of the phases :data:`MEASURED` in this start."""
        return self._seconds[phase]

    def begin(self) -> None:
        """The first step starts now."""
        self._begun = time.perf_counter()
        self._lap = self._begun, None, dict(self._seconds)

    def lap(self, step: int, tokens: int) -> tuple[float, float]:
        """Tokens per second and fraction of time waiting for data, since the last call or
        :meth:`begin`. Evaluations do not count.

        Args:
          step: the step that has finished.
          tokens: tokens per step.
        """
        now = time.perf_counter()
        start, last, before = self._lap
        since = {k: v - before[k] for k, v in self._seconds.items()}
        seconds = now - start - since["evaluation"]
        steps = self._waits if last is None else step - last
        self._lap = now, step, dict(self._seconds)
        return steps * tokens / seconds, since["data"] / seconds

    def restore(self, recorded: Seconds | None, kept: Seconds | None) -> None:
        """Add the time of earlier starts.

        Args:
          recorded: what the last start recorded last.
          kept: what was recorded up to the step from which the run continues. The time since then
            is lost: those steps are repeated.
        """
        if not recorded:
            return
        kept = kept or dict.fromkeys(recorded, 0.0)
        lost = sum(recorded[k] - kept[k] for k in PHASES)
        self._before = {**kept, "lost": kept["lost"] + lost, "starts": recorded["starts"]}

    def totals(self) -> Seconds:
        """Seconds of each phase over all starts, and the number of starts."""
        now = time.perf_counter()
        mine = self._seconds | {"lost": 0.0, "starts": 1.0}
        begun = now if self._begun is None else self._begun
        measured = sum(self._seconds.values())
        startup = self._seconds["compile"] + self._seconds["restore"]
        mine["start"] = max(begun - self._started - startup, 0.0)
        mine["steps"] = max(now - begun - (measured - startup), 0.0)
        return {k: self._before[k] + mine[k] for k in (*PHASES, "starts")}


def goodput_line(totals: Seconds) -> str:
    """One line: the fraction of time in training steps, and what else took time.

    Args:
      totals: of :meth:`Clock.totals`.
    """
    whole = sum(totals[p] for p in PHASES) or 1.0
    share = lambda phase: f"{totals[phase] / whole:.1%}"
    others = [f"{p} {share(p)}" for p in PHASES if p != "steps" and totals[p] >= 0.0005 * whole]
    again = f" in {totals['starts']:.0f} starts" if totals["starts"] > 1 else ""
    return f"goodput: {share('steps')} of {duration(whole)}{again} in training steps; " + ", ".join(
        others
    )


class SaveTimer:
    """When a checkpoint is due: after a number of steps, or after a time.

    Args:
      every: steps, or a time such as "10min" (``checkpoint.save_every``).

    Example::

      saves = SaveTimer("10min")
      if saves.time_is_up():
        saves.saved()
    """

    def __init__(self, every: int | str):
        self._steps = every if isinstance(every, int) else 0
        self._seconds = 0.0 if isinstance(every, int) else seconds_of(every)
        self.saved()

    def at(self, step: int) -> bool:
        return self._steps > 0 and step % self._steps == 0

    def time_is_up(self) -> bool:
        """By the clock of this process: the processes of a job have to agree."""
        return self._seconds > 0 and time.monotonic() - self._last >= self._seconds

    def saved(self) -> None:
        """A checkpoint was saved now."""
        self._last = time.monotonic()


def duration(seconds: float) -> str:
    """Seconds as the two largest units: "3 h 12 min"."""
    units = (("d", 86400), ("h", 3600), ("min", 60), ("s", 1))
    for (name, size), (smaller, part) in itertools.pairwise(units):
        if seconds >= size:
            whole = int(seconds // size)
            return f"{whole} {name} {int(seconds % size // part)} {smaller}"
    return f"{seconds:.1f} s"
