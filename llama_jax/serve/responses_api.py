"""``/v1/responses``, without state: nothing is kept after the answer."""

import secrets
import time
from collections.abc import AsyncIterator
from typing import Any

from llama_jax.serve.answers import Answers
from llama_jax.serve.chat_run import ChatRun, NumberedCall, prepare
from llama_jax.serve.endpoint import Result
from llama_jax.serve.logprobs import chat_logprobs
from llama_jax.serve.responses_body import ResponsesBody, chat_body, own_names
from llama_jax.serve.state import State


async def create(state: State, answers: Answers, body: ResponsesBody) -> Result:
    """Answer a conversation.

    Args:
      state: of the server.
      answers: for the answer.
      body: of the request.
    """
    chat = chat_body(body)
    with own_names():
        run = await prepare(state, chat)
    answers.submit(run.requests)
    response = _Response(run, _head(body, run))
    if body.stream:
        return response.events(answers)
    async for _ in response.events(answers):
        pass
    return response.snapshot()


def _head(body: ResponsesBody, run: ChatRun) -> dict[str, Any]:
    """The fields that do not change."""
    return {
        "id": f"resp_{secrets.token_hex(12)}",
        "object": "response",
        "created_at": int(time.time()),
        "model": run.model.name,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "temperature": body.temperature,
        "top_p": body.top_p,
        "top_logprobs": body.top_logprobs,
        "tools": [t.model_dump() for t in body.tools],
        "tool_choice": body.tool_choice or "auto",
        "parallel_tool_calls": body.parallel_tool_calls,
        "text": {"format": {"type": "text"}}
        if body.text is None
        else body.text.model_dump(by_alias=True, exclude_none=True),
        "truncation": "disabled",
        "previous_response_id": None,
        "store": False,
        "background": False,
        "metadata": {},
        "error": None,
        "seed": run.seed,
    }


class _Response:
    """A response that grows: its items and the events that tell of them.

    Args:
      run: the conversation.
      head: the fields that do not change.
    """

    def __init__(self, run: ChatRun, head: dict[str, Any]):
        self._run, self._head = run, head
        self._items: list[dict[str, Any]] = []
        self._status = "in_progress"
        self._number = -1

    def snapshot(self) -> dict[str, Any]:
        """The whole response."""
        is_cut = self._status == "incomplete"
        return self._head | {
            "status": self._status,
            "output": self._items,
            "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None,
            "usage": None if self._status == "in_progress" else self._usage(),
        }

    def _usage(self) -> dict[str, Any]:
        usage = self._run.usage()
        return {
            "input_tokens": usage["prompt_tokens"],
            "input_tokens_details": usage["prompt_tokens_details"] | {"cache_write_tokens": 0},
            "output_tokens": usage["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": usage["total_tokens"],
        }

    def _event(self, name: str, /, **fields: Any) -> tuple[str, dict[str, Any]]:
        self._number += 1
        kind = f"response.{name}"
        return kind, {"type": kind, "sequence_number": self._number, **fields}

    async def events(self, answers: Answers) -> AsyncIterator[tuple[str, dict[str, Any]]]:
        """The events, in order."""
        yield self._event("created", response=self.snapshot())
        yield self._event("in_progress", response=self.snapshot())
        choice = self._run.choices[0]
        async for _, update in answers:
            piece = choice.push(update)
            logprobs = self._logprobs(update.tokens)
            if piece.text or logprobs or (update.finish and not self._items and not piece.calls):
                for event in self._text(piece.text, logprobs):
                    yield event
            for call in piece.calls:
                for event in self._call(call):
                    yield event
        self._status = "incomplete" if choice.reason == "length" else "completed"
        for event in self._close():
            yield event
        yield self._event(self._status, response=self.snapshot())

    def _text(self, text: str, logprobs: list[Any]) -> list[Any]:
        made = []
        if not self._items or self._items[-1]["type"] != "message":
            made += self._open({
                "type": "message", "id": f"msg_{secrets.token_hex(12)}", "role": "assistant",
                "status": "in_progress", "content": [],
            })  # fmt: skip
            part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
            made.append(self._event("content_part.added", part=dict(part), **self._where(0)))
            self._items[-1]["content"].append(part)
        part = self._items[-1]["content"][0]
        part["text"] += text
        part["logprobs"] += logprobs
        delta = dict(delta=text, logprobs=logprobs)
        return [*made, self._event("output_text.delta", **delta, **self._where(0))]

    def _call(self, call: NumberedCall) -> list[Any]:
        made = self._open({
            "type": "function_call", "id": f"fc_{secrets.token_hex(12)}", "call_id": call.id,
            "name": call.name, "arguments": "", "status": "in_progress",
        })  # fmt: skip
        self._items[-1]["arguments"] += call.arguments
        delta = dict(delta=call.arguments, **self._where())
        return [*made, self._event("function_call_arguments.delta", **delta)]

    def _open(self, item: dict[str, Any]) -> list[Any]:
        closed = self._close()
        self._items.append(item)
        copy = item | ({"content": []} if "content" in item else {})
        index = len(self._items) - 1
        return [*closed, self._event("output_item.added", output_index=index, item=copy)]

    def _close(self) -> list[Any]:
        """End the last item."""
        if not self._items:
            return []
        item, made = self._items[-1], []
        item["status"] = "incomplete" if self._status == "incomplete" else "completed"
        if item["type"] == "message":
            part = item["content"][0]
            done = dict(text=part["text"], logprobs=part["logprobs"])
            made.append(self._event("output_text.done", **done, **self._where(0)))
            made.append(self._event("content_part.done", part=part, **self._where(0)))
        else:
            done = dict(arguments=item["arguments"], name=item["name"])
            made.append(self._event("function_call_arguments.done", **done, **self._where()))
        index = len(self._items) - 1
        return [*made, self._event("output_item.done", output_index=index, item=item)]

    def _where(self, part: int | None = None) -> dict[str, Any]:
        where: dict[str, Any] = {
            "item_id": self._items[-1]["id"], "output_index": len(self._items) - 1
        }  # fmt: skip
        return where if part is None else where | {"content_index": part}

    def _logprobs(self, tokens: Any) -> list[Any]:
        if self._run.top_logprobs is None:
            return []
        made = chat_logprobs(self._run.model.tokenizer, tokens, self._run.top_logprobs)
        return made["content"]
