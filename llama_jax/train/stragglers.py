"""Finds the process that the others wait for.

Every step takes the same time in all processes, because they wait for each other in collective
operations. What differs is the time that a process needs before it joins them: for its batch and
for other work of the host. A slow device cannot be found in this way.
"""

import contextlib
import statistics
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from llama_jax.train.clock import Clock
from llama_jax.train.failure import host_of

FACTOR = 2.0
"""The slowest process is named if it takes more than this multiple of the median,"""
SHARE = 0.1
"""and more than the median by this share of the step time."""


class HostTime:
    """Seconds per step in which this process does not wait for devices, nor evaluates or saves.

    Args:
      clock: measures evaluations and saves.
      steps: number of steps before.

    Example::

      host = HostTime(clock, 0)
      batch = next(data)
      with host.waiting():
        loss = float(step(batch))
      host.per_step(1, restart=True)
    """

    def __init__(self, clock: Clock, steps: int):
        self._clock, self._waited = clock, 0.0
        self._last = time.perf_counter(), self._idle(), steps

    def _idle(self) -> float:
        return self._waited + self._clock.seconds("evaluation") + self._clock.seconds("checkpoint")

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """In this block the process waits for the devices."""
        start = time.perf_counter()
        yield
        self._waited += time.perf_counter() - start

    def per_step(self, steps: int, restart: bool) -> float:
        """Seconds per step since the last restart.

        Args:
          steps: number of steps so far.
          restart: measure from now on.
        """
        now = time.perf_counter(), self._idle(), steps
        (begun, idle, before), self._last = self._last, now if restart else self._last
        return max(0.0, now[0] - begun - (now[1] - idle)) / max(1, steps - before)


def slowest(seconds_of_devices: Any, mesh: Mesh) -> dict[str, Any]:
    """The process with the most host time per step, and the median of all.

    Args:
      seconds_of_devices: for each device of the mesh, the host time of its process.
      mesh: the devices.
    """
    devices: Sequence[Any] = list(mesh.devices.flat)
    values = np.asarray(seconds_of_devices).tolist()
    seconds = {d.process_index: s for d, s in zip(devices, values, strict=True)}
    process = max(seconds, key=lambda p: seconds[p])
    median = statistics.median_low(seconds.values())
    return {"process": process, "seconds": seconds[process], "median": median}


def line(found: dict[str, Any], step: int, step_seconds: float) -> str:
    """The log line that names the slowest process; "" if it is about as fast as the others.

    Args:
      found: of :func:`slowest`.
      step: the last step.
      step_seconds: of a step.
    """
    process, seconds, median = found["process"], found["seconds"], found["median"]
    if seconds <= FACTOR * median or seconds - median <= SHARE * step_seconds:
        return ""
    return (
        f"step {step}: process {process} on {host_of(process)} is the slowest: {seconds:.3g} s per "
        f"step outside the devices (data, host), the median process {median:.3g} s"
    )
