"""What the endpoints of a server share."""

import dataclasses
import time

from llama_jax.data.template_process import start_own_process
from llama_jax.serve.answers import Answers, Mailbox
from llama_jax.serve.errors import APIError
from llama_jax.serve.metrics import Metrics
from llama_jax.serve.models import ServedModel
from llama_jax.serve.request import Engine
from llama_jax.serve.workers import Workers

STALLED = 60.0
"""Seconds without a step, while work waits, after which the server is not healthy."""
LONG_TEXT = 1 << 16
LONG_TALK = 64
"""Texts with more characters and conversations with more messages take longer to read."""
MAX_READ = 256
"""Requests that may be read at the same time, as many as may wait for a slot: clients that start
together are not refused while the queue has space."""


@dataclasses.dataclass
class State:
    """The engine, the models, and the threads for slow work."""

    engine: Engine
    models: dict[str, ServedModel]
    """by name; the first is the base"""
    mailbox: Mailbox
    metrics: Metrics
    fingerprint: str = "fp_0"
    """identifies the model and the configuration: equal ones give equal answers"""
    created: int = dataclasses.field(default_factory=lambda: int(time.time()))
    is_draining: bool = False
    workers: Workers = dataclasses.field(default_factory=lambda: Workers(2, MAX_READ))
    """tokenize, read large bodies"""
    long_workers: Workers = dataclasses.field(default_factory=lambda: Workers(2, MAX_READ))
    """tokenize long texts: seconds in which short ones must not wait"""
    compilers: Workers = dataclasses.field(default_factory=lambda: Workers(2, MAX_READ))
    """compile grammars"""
    renderers: Workers = dataclasses.field(default_factory=lambda: Workers(1, MAX_READ))
    """render chat templates, which one process does"""
    long_renderers: Workers = dataclasses.field(
        default_factory=lambda: Workers(1, MAX_READ, start_own_process)
    )
    """render long conversations, which another process does"""

    def model(self, name: str) -> ServedModel:
        """The model of a request; "" is the base.

        Raises:
          APIError: there is none with this name.
        """
        if not name:
            return next(iter(self.models.values()))
        if name not in self.models:
            raise APIError(
                f"there is no model {name!r:.100}; there are: {', '.join(self.models)}",
                status=404, param="model", code="model_not_found",
            )  # fmt: skip
        return self.models[name]

    def workers_for(self, size: int) -> Workers:
        """Threads for a text with this number of characters or tokens."""
        return self.workers if size <= LONG_TEXT else self.long_workers

    def renderers_for(self, size: int, messages: int) -> Workers:
        """Threads for a request with this number of bytes and messages."""
        is_short = size <= LONG_TEXT and messages <= LONG_TALK
        return self.renderers if is_short else self.long_renderers

    def answers(self) -> Answers:
        """For the answers to one request."""
        return Answers(self.engine, self.mailbox)

    def problem(self) -> str | None:
        """Why the server is not healthy."""
        status = self.engine.status()
        if self.is_draining:
            return "the server is shutting down"
        if not status.alive:
            return "the engine's thread has ended"
        if not status.ready:
            return "the programs are being compiled"
        if status.seconds_since_step > STALLED:
            return f"the last step was {status.seconds_since_step:.0f} s ago, and requests wait"
        return None
