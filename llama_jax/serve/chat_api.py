"""``/v1/chat/completions``."""

import asyncio
import secrets
import time
from collections.abc import AsyncIterator
from typing import Any

from llama_jax.serve.answers import Answers
from llama_jax.serve.chat_run import ChatRun, NumberedCall, Piece, prepare
from llama_jax.serve.endpoint import Result
from llama_jax.serve.logprobs import chat_logprobs
from llama_jax.serve.request import Token
from llama_jax.serve.schemas import ChatBody
from llama_jax.serve.state import State


async def create(state: State, answers: Answers, body: ChatBody) -> Result:
    """Answer a conversation.

    Args:
      state: of the server.
      answers: for the answers.
      body: of the request.
    """
    run = await prepare(state, body)
    answers.submit(run.requests)
    head = {
        "id": f"chatcmpl-{secrets.token_hex(12)}",
        "object": "chat.completion.chunk" if body.stream else "chat.completion",
        "created": int(time.time()),
        "model": run.model.name,
        "system_fingerprint": state.fingerprint,
        "seed": run.seed,
    }
    if body.stream:
        with_usage = body.stream_options is not None and body.stream_options.include_usage
        return _events(run, answers, head, with_usage)
    return await _whole(run, answers, head)


async def _whole(run: ChatRun, answers: Answers, head: dict[str, Any]) -> dict[str, Any]:
    pieces: list[list[Piece]] = [[] for _ in run.choices]
    tokens: list[list[Token]] = [[] for _ in run.choices]
    async for index, update in answers:
        pieces[index].append(run.choices[index].push(update))
        tokens[index] += update.tokens

    def choices() -> list[dict[str, Any]]:
        return [
            {
                "index": index,
                "message": _message(pieces[index]),
                "logprobs": _logprobs(run, tokens[index]),
                "finish_reason": choice.reason,
            }
            for index, choice in enumerate(run.choices)
        ]

    return head | {"choices": await asyncio.to_thread(choices), "usage": run.usage()}


async def _events(
    run: ChatRun, answers: Answers, head: dict[str, Any], with_usage: bool
) -> AsyncIterator[Any]:
    more = {"usage": None} if with_usage else {}

    def chunk(index: int, delta: dict[str, Any], **fields: Any) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
        return head | {"choices": [choice | fields]} | more

    for index in range(len(run.choices)):
        yield chunk(index, {"role": "assistant", "content": "", "refusal": None})
    async for index, update in answers:
        piece = run.choices[index].push(update)
        logprobs = _logprobs(run, update.tokens) if update.tokens else None
        if piece.text or logprobs:
            yield chunk(index, {"content": piece.text}, logprobs=logprobs)
        if piece.calls:
            yield chunk(index, {"tool_calls": [_call(call) for call in piece.calls]})
        if update.finish:
            yield chunk(index, {}, finish_reason=run.choices[index].reason)
    if with_usage:
        yield head | {"choices": [], "usage": run.usage()}
    yield None


def _message(pieces: list[Piece]) -> dict[str, Any]:
    text = "".join(p.text for p in pieces)
    message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
    if calls := [_call(call) for p in pieces for call in p.calls]:
        for call in calls:
            del call["index"]
        message |= {"content": text or None, "tool_calls": calls}
    return message


def _call(call: NumberedCall) -> dict[str, Any]:
    """An entry of ``tool_calls`` in a stream."""
    function = {"name": call.name, "arguments": call.arguments}
    return {"index": call.index, "id": call.id, "type": "function", "function": function}


def _logprobs(run: ChatRun, tokens: Any) -> dict[str, Any] | None:
    if run.top_logprobs is None:
        return None
    return chat_logprobs(run.model.tokenizer, tokens, run.top_logprobs)
