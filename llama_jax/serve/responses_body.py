"""The body of ``/v1/responses``, and the conversation that it stands for."""

import contextlib
import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from llama_jax.generate.sampler import MAX_TOP_LOGPROBS
from llama_jax.serve.errors import APIError
from llama_jax.serve.schemas import Body, ChatBody, ListOf, SamplingBody, validate

LOGPROBS = "message.output_text.logprobs"
"""Value of ``include`` that asks for log-probabilities."""


def _refuse(value: Any) -> Any:
    if value:
        raise ValueError("this server keeps no responses: send the whole conversation in input")
    return value


Stateless = Annotated[Any, BeforeValidator(_refuse)]


class Format(Body):
    """``text.format``."""

    type: Literal["text", "json_object", "json_schema"]
    name: str = ""
    description: str = ""
    schema_: dict[str, Any] | bool | None = Field(None, alias="schema")
    strict: bool = True


class TextConfig(Body):
    """``text``."""

    format: Format | None = None


class FunctionTool(Body):
    """One of ``tools``."""

    type: Literal["function"]
    name: str
    description: str = ""
    parameters: dict[str, Any] = Field(default_factory=dict)
    strict: bool = False


class ResponsesBody(SamplingBody):
    """``/v1/responses``."""

    input: str | ListOf[dict[str, Any]]
    instructions: str | None = None
    max_output_tokens: int | None = Field(None, ge=1)
    text: TextConfig | None = None
    tools: ListOf[FunctionTool] = Field(default_factory=list)
    tool_choice: Any = None
    parallel_tool_calls: bool = True
    top_logprobs: int = Field(0, ge=0, le=MAX_TOP_LOGPROBS)
    include: ListOf[Literal["message.output_text.logprobs"]] = Field(default_factory=list)
    truncation: Literal["disabled"] = "disabled"
    stream_options: dict[str, Any] | None = None
    store: Stateless = False
    background: Stateless = False
    previous_response_id: Stateless = None
    conversation: Stateless = None


def chat_body(body: ResponsesBody) -> ChatBody:
    """The same request to ``/v1/chat/completions``.

    Raises:
      APIError: an item of ``input`` that this server cannot read.
    """
    data: dict[str, Any] = {name: getattr(body, name) for name in SamplingBody.model_fields}
    system = [{"role": "system", "content": body.instructions}] if body.instructions else []
    items = [{"role": "user", "content": body.input}] if type(body.input) is str else body.input
    data["messages"] = system + _messages(items)  # type: ignore[arg-type]
    data["max_completion_tokens"] = body.max_output_tokens
    data["logprobs"] = LOGPROBS in body.include or body.top_logprobs > 0
    data["top_logprobs"] = body.top_logprobs
    data["tools"] = [
        {"type": "function", "function": t.model_dump(exclude={"type"}, exclude_unset=True)}
        for t in body.tools
    ]
    data |= dict(tool_choice=body.tool_choice, parallel_tool_calls=body.parallel_tool_calls)
    if isinstance(body.tool_choice, dict) and "name" in body.tool_choice:
        name = body.tool_choice["name"]
        data["tool_choice"] = {"type": "function", "function": {"name": name}}
    if body.text is not None and (wanted := body.text.format) is not None:
        data["response_format"] = {"type": wanted.type}
        if wanted.type == "json_schema":
            data["response_format"]["json_schema"] = {"name": wanted.name, "schema": wanted.schema_}
    with own_names():
        return validate(ChatBody, data, body.size)


@contextlib.contextmanager
def own_names() -> Iterator[None]:
    """Errors about a field of the chat name the field of ``/v1/responses`` that it was made of."""
    try:
        yield
    except APIError as e:
        if (given := e.param) is not None:
            # Messages are made of items, but not one of each.
            param = re.sub(r"^messages\b.*", "input", given)
            param = re.sub(r"^response_format\b.*", "text.format", param)
            e.param = re.sub(r"^(tools\.\d+)\.function\b", r"\1", param)
            if e.code == "missing_parameter" and e.param == "input":
                field = given.rpartition(".")[2]
                e.message = f"input: the field {field!r} of an item is missing"
            elif e.message.startswith(given):
                e.message = e.param + e.message.removeprefix(given)
        raise


def _messages(items: list[dict[str, Any]]) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    for number, item in enumerate(items):
        kind = item.get("type", "message")
        if kind == "message":
            messages.append({"role": item.get("role"), "content": item.get("content")})
        elif kind == "function_call":
            call = {"name": item.get("name"), "arguments": item.get("arguments")}
            if not messages or messages[-1]["role"] != "assistant":
                messages.append({"role": "assistant", "content": None})
            calls = messages[-1].setdefault("tool_calls", [])
            calls.append({"id": item.get("call_id"), "type": "function", "function": call})
        elif kind == "function_call_output":
            message = {"role": "tool", "content": item.get("output")}
            messages.append(message | {"tool_call_id": item.get("call_id")})
        elif kind != "reasoning":
            param = f"input.{number}.type"
            raise APIError(
                f"{param}: {kind!r:.60} is not supported; use message, function_call or "
                "function_call_output", param=param, code="invalid_value",
            )  # fmt: skip
    return messages
