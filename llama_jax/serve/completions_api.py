"""``/v1/completions``."""

import asyncio
import collections
import secrets
import time
from collections.abc import AsyncIterator
from typing import Any

from llama_jax.serve.answers import Answers, merge
from llama_jax.serve.chat_run import Choice, nobody, repeated, usage, with_grammars
from llama_jax.serve.constraint import grammars
from llama_jax.serve.endpoint import Result
from llama_jax.serve.errors import APIError
from llama_jax.serve.logprobs import CompletionLogprobs
from llama_jax.serve.models import ServedModel
from llama_jax.serve.prompt import check_length, prompt_ids
from llama_jax.serve.request import GenerationRequest, Update
from llama_jax.serve.schemas import MAX_CHOICES, CompletionBody
from llama_jax.serve.settings import eos_of, sampling_of
from llama_jax.serve.state import State


class _Answer:
    """One choice: its text, with the prompt if ``echo`` asks for it, and log-probabilities.

    Args:
      choice: strips nothing.
      echo: text of the prompt, or "".
      logprobs: None if not requested.
    """

    def __init__(self, choice: Choice, echo: str, logprobs: CompletionLogprobs | None):
        self.choice, self._echo, self._logprobs = choice, echo, logprobs

    def push(self, index: int, update: Update) -> dict[str, Any]:
        """The choice with the text and the tokens of an update."""
        text, self._echo = self._echo + self.choice.push(update).text, ""
        logprobs = self._logprobs and self._logprobs.of((*update.prompt, *update.tokens))
        reason = self.choice.reason
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}


async def create(state: State, answers: Answers, body: CompletionBody) -> Result:
    """Continue one or several prompts.

    Args:
      state: of the server.
      answers: for the answers.
      body: of the request.
    """
    model = state.model(body.model)
    prompts = await prompt_ids(state, model, body.prompt)
    if len(prompts) * body.n > MAX_CHOICES:
        raise APIError(
            f"n: {len(prompts)} prompts times n={body.n} are more than {MAX_CHOICES} answers",
            param="n", code="invalid_value",
        )  # fmt: skip
    requests = _requests(state, model, body, prompts)
    constraints = await grammars(state, model, body, len(requests), is_chat=False)
    requests = with_grammars(requests, constraints)
    choices = [Choice(strip=False) for _ in requests]
    texts = await _echoes(state, model, body, prompts)
    made = [_Answer(c, texts[i // body.n], _logprobs(body, model)) for i, c in enumerate(choices)]
    answers.submit(requests)
    head = {
        "id": f"cmpl-{secrets.token_hex(12)}",
        "object": "text_completion",
        "created": int(time.time()),
        "model": model.name,
        "system_fingerprint": state.fingerprint,
        "seed": requests[0].sampling.seed,
    }
    count = lambda: usage(sum(map(len, prompts)), choices, body.n)
    if body.stream:
        with_usage = body.stream_options is not None and body.stream_options.include_usage
        return _events(made, answers, head, count if with_usage else None)
    parts: list[list[Update]] = [[] for _ in requests]
    async for index, update in answers:
        parts[index].append(update)
    build = lambda: [a.push(i, merge(parts[i])) for i, a in enumerate(made)]
    return head | {"choices": await asyncio.to_thread(build), "usage": count()}


def _requests(
    state: State, model: ServedModel, body: CompletionBody, prompts: list[tuple[int, ...]]
) -> list[GenerationRequest]:
    """n requests per prompt; equal prompts have different samples, as in ``llm.generate``."""
    sampling = sampling_of(body, model)
    seen: collections.Counter[tuple[int, ...]] = collections.Counter()
    requests: list[GenerationRequest] = []
    for ids in prompts:
        limit = check_length(ids, body.max_tokens, state.engine.context, "prompt")
        request = GenerationRequest(
            ids=ids, max_new_tokens=limit, send=nobody, sampling=sampling, stops=tuple(body.stop),
            eos_ids=_eos(body, model), logprobs=body.logprobs is not None,
            top_logprobs=body.logprobs or 0,
            prompt_logprobs=body.echo and (body.logprobs is not None or not limit),
            model=model.adapter,
        )  # fmt: skip
        requests += repeated(request, seen[ids], body.n)
        seen[ids] += body.n
    return requests


def _eos(body: CompletionBody, model: ServedModel) -> tuple[int, ...]:
    """The ids that end an answer.

    Programs that score a text (lm-evaluation-harness) ask for the prompt and one token, and expect
    one entry of ``logprobs`` more than the prompt has tokens, also if that token is EOS.
    """
    scores = body.echo and body.logprobs is not None and body.max_tokens == 1
    return () if scores else eos_of(body, model.eos_ids)


async def _echoes(
    state: State, model: ServedModel, body: CompletionBody, prompts: list[tuple[int, ...]]
) -> list[str]:
    """The text before each answer: that of its prompt, or "" without ``echo``."""
    if not body.echo:
        return [""] * len(prompts)
    if isinstance(body.prompt, str):
        return [body.prompt]
    given = body.prompt if len(body.prompt) == len(prompts) else [body.prompt]
    decode = model.tokenizer.decode
    return [
        text if isinstance(text, str) else await state.workers_for(len(ids)).run(decode, ids)
        for text, ids in zip(given, prompts, strict=False)
    ]


def _logprobs(body: CompletionBody, model: ServedModel) -> CompletionLogprobs | None:
    if body.logprobs is None:
        return None
    return CompletionLogprobs(model.tokenizer, body.logprobs)


async def _events(
    made: list[_Answer], answers: Answers, head: dict[str, Any], usage_of: Any
) -> AsyncIterator[Any]:
    more = {"usage": None} if usage_of else {}
    async for index, update in answers:
        # The log-probabilities of a long prompt take tens of milliseconds.
        push = made[index].push
        slow = len(update.prompt) > 64
        choice = await asyncio.to_thread(push, index, update) if slow else push(index, update)
        if choice["text"] or choice["finish_reason"] or update.tokens:
            yield head | {"choices": [choice]} | more
    if usage_of:
        yield head | {"choices": [], "usage": usage_of()}
    yield None
