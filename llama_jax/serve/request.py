"""What the HTTP side and the engine exchange: requests one way, new tokens the other way."""

import dataclasses
from collections.abc import Callable
from typing import Protocol

from llama_jax.generate.sampler import Sample


class Grammar(Protocol):
    """A constraint on the text of one answer; made by :mod:`llama_jax.serve.grammar`."""

    @property
    def complete(self) -> bool:
        """Whether no text may follow: the answer then ends, also if the model has no EOS id."""

    def fill(self, mask_W) -> None:
        """Write which ids may come next into a row of int32 words, one bit per id."""

    def accept(self, token: int) -> None:
        """Advance by a token that was drawn. Not called for an id that ends the answer."""


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the tokens of a request are chosen."""

    sample: Sample = Sample(temperature=0.0)
    presence_penalty: float = 0.0
    """subtracted from the logit of each token that the new text contains"""
    frequency_penalty: float = 0.0
    """subtracted from it once per occurrence"""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """(id, number added to its logit)"""
    seed: int = 0
    """less than 2**32; keys derive from it, from ``index``, and from the number of the token"""
    index: int = 0
    """number of this answer among the ``n`` of one request"""


@dataclasses.dataclass(frozen=True)
class Token:
    """One new token, or one token of the prompt if its log-probabilities were requested."""

    id: int
    logprob: float | None
    """nats, under the model without temperature and other settings; None unless requested, and for
    the first token of a prompt"""
    top: dict[int, float]
    """the most likely ids at this place and their log p, in order; empty unless requested"""


@dataclasses.dataclass(frozen=True)
class Update:
    """News of one request. The last one has ``finish``."""

    text: str = ""
    """new text; later tokens cannot change it"""
    tokens: tuple[Token, ...] = ()
    """new tokens; text inside a character or a possible stop string comes with a later update"""
    prompt: tuple[Token, ...] = ()
    """tokens of the prompt, in the first update, if requested"""
    cached_tokens: int = 0
    """tokens of the prompt that were not computed again, in the first update"""
    finish: str | None = None
    """"end" (an EOS id, or a grammar that is complete), "stop" (a stop string), "length",
    "cancelled", "deadline", or "error" """
    error: str | None = None
    """what happened, for finish="error" """


@dataclasses.dataclass(frozen=True)
class GenerationRequest:
    """A prompt to continue. Checked by the HTTP side: it fits the context of the server."""

    ids: tuple[int, ...]
    max_new_tokens: int
    """0 only with ``prompt_logprobs``"""
    send: Callable[[Update], None]
    """called by the engine's thread; must return at once"""
    sampling: Sampling = Sampling()
    stops: tuple[str, ...] = ()
    eos_ids: tuple[int, ...] = ()
    """ids that end the answer"""
    show_ids: tuple[int, ...] = ()
    """control tokens whose names are part of the text"""
    logprobs: bool = False
    top_logprobs: int = 0
    prompt_logprobs: bool = False
    """compute log p of the prompt's tokens too, with ``top_logprobs`` alternatives"""
    grammar: Grammar | None = None
    model: str = ""
    """name of the adapter, "" for the base"""
    deadline: float | None = None
    """of time.monotonic(), after which the request ends"""


class Metrics:
    """What the engine measures of requests; the HTTP side overrides the methods, which do nothing.

    The engine's thread calls them; they must return at once.
    """

    def admitted(self, seconds: float) -> None:
        """A request got a slot, this long after it was submitted."""

    def first_token(self, seconds: float) -> None:
        """A request got its first token, this long after it was submitted."""

    def next_token(self, seconds: float) -> None:
        """A request got another token, this long after the one before."""

    def finished(
        self, reason: str, prompt_tokens: int, cached_tokens: int, new_tokens: int, seconds: float
    ) -> None:
        """A request has ended.

        Args:
          reason: :attr:`Update.finish`.
          prompt_tokens: tokens of its prompt.
          cached_tokens: those of them that were not computed again.
          new_tokens: tokens of its answer.
          seconds: since it was submitted.
        """


class QueueFull(Exception):
    """Too many requests wait already.

    Args:
      retry_after: seconds after which to try again.
    """

    def __init__(self, retry_after: float):
        super().__init__("too many requests are waiting")
        self.retry_after = retry_after


class Stopping(Exception):
    """The engine takes no more requests: it is shutting down, or its thread has ended."""


@dataclasses.dataclass(frozen=True)
class Status:
    """State of the engine, for health and metrics."""

    ready: bool
    """all programs are compiled"""
    alive: bool
    """the engine's thread runs"""
    seconds_since_step: float
    """age of the last step while work waits; 0 without work"""
    running: int
    waiting: int
    pages_used: int
    """by requests"""
    pages_cached: int
    """kept for equal prefixes, free when needed"""
    pages: int


class Engine(Protocol):
    """Interface of :class:`llama_jax.serve.engine.Engine` to the HTTP side."""

    context: int
    """most tokens of a prompt and its answer"""

    def submit(self, request: GenerationRequest) -> int:
        """Queue a request; returns its number.

        Raises:
          QueueFull: the queue has no room.
          Stopping: the engine takes no more requests.
        """

    def cancel(self, number: int) -> None:
        """End a request, running or queued, within one step; unknown numbers are ignored."""

    def status(self) -> Status:
        """What is running now."""

    def drain(self, seconds: float) -> None:
        """Refuse new requests, finish those accepted, cancel those left after ``seconds``, and end
        the thread."""
