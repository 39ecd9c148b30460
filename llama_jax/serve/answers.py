"""From the engine's thread to asyncio: the updates of the answers to one HTTP request."""

import asyncio
import collections
import dataclasses
from collections.abc import AsyncIterator, Sequence

from llama_jax.serve.errors import APIError
from llama_jax.serve.request import Engine, GenerationRequest, QueueFull, Stopping, Update

MAX_PENDING = 4096
"""Updates that wait for a client that reads too slowly; beyond, its request is cancelled."""


class Mailbox:
    """Hands updates to the event loop; those of one step wake it once.

    Args:
      loop: of the HTTP side.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop):
        self._loop = loop
        self._posted: collections.deque[tuple[Answers, int, Update]] = collections.deque()
        self._is_scheduled = False

    def post(self, answers: "Answers", index: int, update: Update) -> None:
        """Called by the engine's thread: deliver an update of answer ``index``."""
        self._posted.append((answers, index, update))
        if not self._is_scheduled:
            self._is_scheduled = True
            try:
                self._loop.call_soon_threadsafe(self._deliver)
            except RuntimeError:  # the loop is closed, and nobody waits for the answer
                self._posted.clear()

    def _deliver(self) -> None:
        self._is_scheduled = False  # before reading: a later post schedules again
        while self._posted:
            answers, index, update = self._posted.popleft()
            answers.put(index, update)


class Answers:
    """The answers to one HTTP request; a context manager that ends what still runs.

    Args:
      engine: the engine.
      mailbox: for the updates.

    Example::

        with Answers(engine, mailbox) as answers:
            answers.submit(requests)
            async for index, update in answers: ...
    """

    def __init__(self, engine: Engine, mailbox: Mailbox):
        self._engine, self._mailbox = engine, mailbox
        self._numbers: dict[int, int] = {}  # of the answers that run: index -> the engine's number
        self._updates: collections.deque[tuple[int, Update]] = collections.deque()
        self._arrived = asyncio.Event()
        self._overflowed = False

    def submit(self, requests: Sequence[GenerationRequest]) -> None:
        """Send requests to the engine; answer i is to request i.

        Raises:
          APIError: the queue has no room for all of them, the server stops, or the engine refuses.
        """
        for index, request in enumerate(requests):
            send = lambda update, index=index: self._mailbox.post(self, index, update)
            try:
                number = self._engine.submit(dataclasses.replace(request, send=send))
            except QueueFull as e:
                self.cancel()
                raise APIError(
                    "too many requests are waiting; try again later", status=429,
                    code="queue_full", retry_after=max(1.0, e.retry_after),
                ) from None  # fmt: skip
            except Stopping:
                self.cancel()
                raise stopping() from None
            except ValueError as e:
                self.cancel()
                raise APIError(str(e), code="invalid_value") from None
            self._numbers[index] = number

    def put(self, index: int, update: Update) -> None:
        """Called by the mailbox."""
        if index not in self._numbers:  # cancelled
            return
        if update.finish:
            del self._numbers[index]
        self._updates.append((index, update))
        if len(self._updates) > MAX_PENDING:
            self._overflowed = True
            self.cancel()
        self._arrived.set()

    def cancel(self) -> None:
        """End the answers that still run."""
        for number in self._numbers.values():
            self._engine.cancel(number)
        self._numbers.clear()

    async def __aiter__(self) -> AsyncIterator[tuple[int, Update]]:
        while self._numbers or self._updates:
            await self._arrived.wait()
            self._arrived.clear()
            merged: dict[int, list[Update]] = {}
            while self._updates:
                index, update = self._updates.popleft()
                merged.setdefault(index, []).append(update)
            if self._overflowed:
                raise APIError("the client reads too slowly", status=408, code="slow_client")
            for index, updates in merged.items():
                update = merge(updates)
                if problem := _problem(update):
                    self.cancel()
                    raise problem
                yield index, update

    def __enter__(self) -> "Answers":
        return self

    def __exit__(self, *_: object) -> None:
        self.cancel()


def stopping() -> APIError:
    """The error while the server shuts down, or after its engine has ended."""
    return APIError("the server is shutting down", status=503, code="stopping")


def _problem(update: Update) -> APIError | None:
    if update.finish == "error":
        message = update.error or "the engine could not answer"
        return APIError(message, status=500, code="engine_error")
    if update.finish == "cancelled":
        return stopping()
    if update.finish == "deadline":
        return APIError("the request took too long", status=408, code="deadline")
    return None


def merge(updates: Sequence[Update]) -> Update:
    """Consecutive updates of one answer as one."""
    if len(updates) == 1:
        return updates[0]
    return Update(
        text="".join(u.text for u in updates),
        tokens=tuple(t for u in updates for t in u.tokens),
        prompt=tuple(t for u in updates for t in u.prompt),
        cached_tokens=sum(u.cached_tokens for u in updates),
        finish=updates[-1].finish,
        error=updates[-1].error,
    )
