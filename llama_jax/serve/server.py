"""The HTTP server: starts, serves until a signal, finishes what runs, and ends."""

import asyncio
import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator

import uvicorn

from llama_jax.serve.access import Access
from llama_jax.serve.answers import Mailbox
from llama_jax.serve.app import App
from llama_jax.serve.http_protocol import LimitedProtocol, allow_connections
from llama_jax.serve.metrics import Metrics
from llama_jax.serve.models import ServedModel
from llama_jax.serve.request import Engine
from llama_jax.serve.state import State

DRAIN_SECONDS = 30.0
"""After a signal, answers that still run are cancelled after this time."""


class Server(uvicorn.Server):
    """uvicorn that drains the engine before it stops.

    Args:
      state: of the server.
      access: who may ask.
      on_ready: called when requests are accepted.
    """

    def __init__(self, state: State, access: Access, on_ready: Callable[[], None] = lambda: None):
        config = uvicorn.Config(
            App(state, access), http=LimitedProtocol, ws="none", lifespan="off", loop="asyncio",
            log_config=None, log_level="error", access_log=False, server_header=False,
            proxy_headers=False, timeout_keep_alive=60, timeout_graceful_shutdown=5,
        )  # fmt: skip
        super().__init__(config)
        self._state, self._on_ready = state, on_ready
        self._drain: asyncio.Task[None] | None = None

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """SIGTERM and SIGINT stop the server; a second one ends the process at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        loop, signals = asyncio.get_running_loop(), (signal.SIGTERM, signal.SIGINT)
        for number in signals:
            loop.add_signal_handler(number, self._signal, number)
        try:
            yield
        finally:
            for number in signals:
                loop.remove_signal_handler(number)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._on_ready()

    def stop(self) -> None:
        """Refuse new requests, finish those that run, and end; called in the event loop."""
        if self._drain is None:
            self._state.is_draining = True
            self._drain = asyncio.get_running_loop().create_task(self._finish())

    async def _finish(self) -> None:
        await asyncio.to_thread(self._state.engine.drain, DRAIN_SECONDS)
        self.should_exit = True

    def _signal(self, number: int) -> None:
        if self._drain is not None:
            os._exit(128 + number)
        self.stop()  # first: nobody may read the message, so that printing it fails
        print("stopping: requests that run are finished; again: stop at once", file=sys.stderr)


def serve(
    engine: Engine,
    models: dict[str, ServedModel],
    metrics: Metrics,
    access: Access,
    sock: socket.socket,
    *,
    fingerprint: str,
    on_ready: Callable[[], None],
) -> None:
    """Serve until a signal.

    Args:
      engine: started.
      models: by name, the base first.
      metrics: of the engine.
      access: who may ask.
      sock: that clients connect to.
      fingerprint: of the configuration.
      on_ready: called when requests are accepted.
    """

    async def run() -> None:
        mailbox = Mailbox(asyncio.get_running_loop())
        state = State(engine, models, mailbox, metrics, fingerprint)
        await Server(state, access, on_ready).serve([sock])

    allow_connections()
    metrics.watch(engine.status)
    asyncio.run(run())
