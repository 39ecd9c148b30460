"""A conversation to be answered: its requests to the engine, and the pieces of its answers."""

import dataclasses
from typing import Any, NamedTuple

from llama_jax.serve.calls import call_grammars, calls_of
from llama_jax.serve.constraint import grammars
from llama_jax.serve.models import ServedModel
from llama_jax.serve.prompt import chat_ids, check_length
from llama_jax.serve.request import GenerationRequest, Grammar, Update
from llama_jax.serve.schemas import ChatBody
from llama_jax.serve.settings import eos_of, sampling_of
from llama_jax.serve.state import State
from llama_jax.serve.tool_parser import Call, CallParser

REASONS = {"end": "stop", "stop": "stop", "length": "length"}
"""``finish_reason`` by the engine's ``finish``."""


@dataclasses.dataclass(frozen=True)
class NumberedCall:
    """A call of a function."""

    index: int
    """of the call in its answer"""
    id: str
    name: str
    arguments: str
    """JSON text"""


class Piece(NamedTuple):
    """What is new in an answer."""

    text: str
    calls: tuple[NumberedCall, ...] = ()


class Choice:
    """One answer.

    Args:
      strip: leave out white space at both ends of the text, as :meth:`llama_jax.LLM.chat` does.
        Not with a grammar, which may demand it.
      parser: finds calls of functions; None: there are no functions.
      parallel: whether an answer may have several calls; otherwise only the first one counts.
    """

    def __init__(self, strip: bool, parser: CallParser | None = None, parallel: bool = True):
        self._strip, self._parser = strip, parser
        self._max_calls = None if parallel else 1
        self._num_calls = 0
        self._held = ""  # white space that may be the end
        self._started = False
        self.num_tokens = self.cached_tokens = 0
        self.reason: str | None = None

    def push(self, update: Update) -> Piece:
        """Add an update; returns what is new."""
        self.num_tokens += len(update.tokens)
        self.cached_tokens += update.cached_tokens
        text, calls = self._separated(update.text, update.finish is not None)
        if update.finish:
            self.reason = REASONS[update.finish]
            if self._num_calls and self.reason == "stop":
                self.reason = "tool_calls"
        return Piece(self._stripped(text), calls)

    def _separated(self, text: str, is_last: bool) -> tuple[str, tuple[NumberedCall, ...]]:
        """Text and calls."""
        if self._parser is None:
            return text, ()
        found = self._parser.push(text) + (self._parser.finish() if is_last else [])
        calls = [x for x in found if isinstance(x, Call)]
        if self._max_calls is not None:
            calls = calls[: self._max_calls - self._num_calls]
        first, self._num_calls = self._num_calls, self._num_calls + len(calls)
        deltas = tuple(NumberedCall(first + i, *call) for i, call in enumerate(calls))
        return "".join(x for x in found if isinstance(x, str)), deltas

    def _stripped(self, text: str) -> str:
        if not self._strip:
            return text
        text = self._held + text
        if not self._started:
            text = text.lstrip()
        self._started = self._started or bool(text)
        shown = text.rstrip()
        self._held = text[len(shown) :]
        return shown


@dataclasses.dataclass
class ChatRun:
    """A checked conversation."""

    model: ServedModel
    requests: list[GenerationRequest]
    choices: list[Choice]
    top_logprobs: int | None
    """None: no log-probabilities"""

    @property
    def seed(self) -> int:
        """The seed that was used."""
        return self.requests[0].sampling.seed

    def usage(self) -> dict[str, Any]:
        """Tokens so far, in OpenAI's form."""
        return usage(len(self.requests[0].ids), self.choices, len(self.choices))


def usage(prompt_tokens: int, choices: list[Choice], n: int) -> dict[str, Any]:
    """``usage``.

    Args:
      prompt_tokens: of all prompts.
      choices: the answers.
      n: answers per prompt.
    """
    new = sum(c.num_tokens for c in choices)
    # A prompt counts once, and the answers after the first may find it in the cache.
    cached = sum(choice.cached_tokens for choice in choices[::n])
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": new,
        "total_tokens": prompt_tokens + new,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


async def prepare(state: State, body: ChatBody) -> ChatRun:
    """Check a conversation and make its requests.

    Args:
      state: of the server.
      body: of the request.

    Raises:
      APIError: names the field.
    """
    model = state.model(body.model)
    sampling = sampling_of(body, model)
    calls = calls_of(model, body)
    ids = await chat_ids(state, model, body.messages, calls.tools, body.size)
    wanted = [x for x in (body.max_completion_tokens, body.max_tokens) if x is not None]
    limit = check_length(ids, wanted[0] if wanted else None, state.engine.context, "messages")
    request = GenerationRequest(
        ids=ids, max_new_tokens=limit, send=nobody, sampling=sampling, stops=tuple(body.stop),
        eos_ids=eos_of(body, model.chat_eos_ids), show_ids=calls.show_ids,
        logprobs=body.logprobs, top_logprobs=body.top_logprobs, model=model.adapter,
    )  # fmt: skip
    constraints = await call_grammars(state, model, body, calls)
    if constraints[0] is None:
        constraints = await grammars(state, model, body, body.n, is_chat=True)
    choices = [
        Choice(constraints[0] is None, calls.parser(), body.parallel_tool_calls)
        for _ in range(body.n)
    ]
    top = body.top_logprobs if body.logprobs else None
    return ChatRun(model, with_grammars(repeated(request, 0, body.n), constraints), choices, top)


def repeated(request: GenerationRequest, first: int, n: int) -> list[GenerationRequest]:
    """n requests with consecutive indices.

    Args:
      request: the first one.
      first: its index.
      n: number of requests.
    """
    indexed = lambda i: dataclasses.replace(
        request, sampling=dataclasses.replace(request.sampling, index=i)
    )
    return [indexed(i) for i in range(first, first + n)]


def with_grammars(
    requests: list[GenerationRequest], constraints: list[Grammar | None]
) -> list[GenerationRequest]:
    """The requests, each with its grammar."""
    pairs = zip(requests, constraints, strict=True)
    return [dataclasses.replace(request, grammar=grammar) for request, grammar in pairs]


def nobody(update: Update) -> None:
    """Replaced when the request is submitted."""
