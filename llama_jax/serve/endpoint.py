"""A route with a JSON body; its work ends when the client leaves."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from pydantic_core import from_json
from starlette.types import Message, Receive, Scope, Send

from llama_jax.serve.answers import Answers, stopping
from llama_jax.serve.errors import APIError, to_json
from llama_jax.serve.schemas import Body, validate
from llama_jax.serve.state import State

MAX_BODY = 4 << 20
"""Bytes; a prompt of 131,072 token ids has less than 1 MiB."""
_SMALL = 1 << 14
"""Bytes; a body that is larger is checked in a thread."""
Result = dict[str, Any] | AsyncIterator[Any]
Handler = Callable[[State, Answers, Any], Awaitable[Result]]


class Disconnected(Exception):
    """The client has left."""


class Endpoint:
    """An ASGI application.

    Args:
      state: of the server.
      schema: of the body.
      handler: makes the answer: a JSON object, or an iterator of the events of a stream.
    """

    def __init__(self, state: State, schema: type[Body], handler: Handler):
        self._state, self._schema, self._handler = state, schema, handler

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            raw = await read_body(scope, receive)
        except Disconnected:
            return
        body = await self._body(raw)
        if self._state.is_draining:
            raise stopping()
        with self._state.answers() as answers:
            work = asyncio.create_task(self._answer(body, answers, send))
            gone = asyncio.create_task(_disconnected(receive))
            try:
                await asyncio.wait((work, gone), return_when=asyncio.FIRST_COMPLETED)
            finally:
                for task in (work, gone):
                    task.cancel()
                await asyncio.gather(work, gone, return_exceptions=True)
        if not work.cancelled():
            work.result()  # raises

    async def _body(self, raw: bytes) -> Any:
        parse = lambda: validate(self._schema, parse_json(raw), len(raw))
        return parse() if len(raw) <= _SMALL else await self._state.workers.run(parse)

    async def _answer(self, body: Any, answers: Answers, send: Send) -> None:
        result = await self._handler(self._state, answers, body)
        if isinstance(result, dict):
            # With many log-probabilities this takes tens of milliseconds.
            await send_json(send, await asyncio.to_thread(to_json, result))
        else:
            await send_events(send, result)


def parse_json(raw: bytes) -> Any:
    """The value of a JSON text.

    Raises:
      APIError: it is not JSON in UTF-8, or nested too deeply.
    """
    try:
        return from_json(raw, allow_inf_nan=False)
    except ValueError as e:
        raise APIError(f"the body is not valid JSON: {e}", code="invalid_json") from None


async def read_body(scope: Scope, receive: Receive) -> bytes:
    """The body of a request.

    Raises:
      APIError: it is too large; the rest is not read.
      Disconnected: the client left.
    """
    headers = dict(scope["headers"])
    too_large = APIError(
        f"the body has more than {MAX_BODY:,} bytes", status=413, code="body_too_large"
    )
    length = headers.get(b"content-length", b"0")
    if len(length) > 15 or int(length) > MAX_BODY:
        raise too_large
    parts, size = [], 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise Disconnected
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > MAX_BODY:
            raise too_large
        if not message.get("more_body"):
            return b"".join(parts)


async def send_json(
    send: Send, content: bytes, status: int = 200, headers: dict[str, str] | None = None
) -> None:
    """Send a whole answer.

    Args:
      send: of ASGI.
      content: JSON.
      status: of HTTP.
      headers: more headers.
    """
    made = {"content-type": "application/json", "content-length": str(len(content))}
    await send(_start(status, made | (headers or {})))
    await send({"type": "http.response.body", "body": content})


async def send_events(send: Send, events: AsyncIterator[Any]) -> None:
    """Send server-sent events, and an error of the iterator as the last one.

    Args:
      send: of ASGI.
      events: JSON values, or (name, JSON value) for events with a name; None ends with [DONE].
    """
    started = False
    try:
        async with contextlib.aclosing(events):  # type: ignore[type-var]
            async for event in events:
                if not started:
                    started = True
                    await send(_start(200, {
                        "content-type": "text/event-stream", "cache-control": "no-store",
                        "x-accel-buffering": "no",
                    }))  # fmt: skip
                await send(_part(_event(event)))
    except APIError as e:
        if not started:
            raise
        await send(_part(_event(e.body())))
    await send(_part(b"", more=False))


def _event(event: Any) -> bytes:
    if event is None:
        return b"data: [DONE]\n\n"
    name = b""
    if isinstance(event, tuple):
        name, event = b"event: " + event[0].encode() + b"\n", event[1]
    data = to_json(event)
    # Clients that split lines like Python's str.splitlines, as httpx does, also split here.
    for character in "\x85\u2028\u2029":
        data = data.replace(character.encode(), f"\\u{ord(character):04x}".encode())
    return name + b"data: " + data + b"\n\n"


def _part(data: bytes, more: bool = True) -> Message:
    return {"type": "http.response.body", "body": data, "more_body": more}


def _start(status: int, headers: dict[str, str]) -> Message:
    pairs = [(k.encode("latin-1"), v.encode("latin-1")) for k, v in headers.items()]
    return {"type": "http.response.start", "status": status, "headers": pairs}


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
