"""Threads for work that would stop the event loop."""

import asyncio
import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

from llama_jax.serve.errors import APIError

P = ParamSpec("P")
R = TypeVar("R")


class Workers:
    """Threads with a bounded queue.

    Args:
      threads: number of threads.
      max_waiting: calls that run or wait; more are refused.
      start: called by each thread when it starts.
    """

    def __init__(self, threads: int, max_waiting: int, start: Callable[[], None] | None = None):
        self._pool = ThreadPoolExecutor(threads, initializer=start)
        self._max_waiting, self._waiting = max_waiting, 0

    async def run(self, function: Callable[P, R], *args: P.args, **more: P.kwargs) -> R:
        """The result of a function, called in a thread.

        Raises:
          APIError: too many calls wait.
        """
        if self._waiting >= self._max_waiting:
            raise APIError(
                "too many requests are being read; try again later", status=429,
                code="queue_full", retry_after=1,
            )  # fmt: skip
        self._waiting += 1
        try:
            call = functools.partial(function, *args, **more)
            return await asyncio.get_running_loop().run_in_executor(self._pool, call)
        finally:
            self._waiting -= 1
