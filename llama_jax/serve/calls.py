"""Calls of functions in a chat: what a request allows, and what an answer contains."""

import dataclasses

from llama_jax.serve.constraint import compiled, grammar_field
from llama_jax.serve.errors import APIError
from llama_jax.serve.models import ServedModel
from llama_jax.serve.request import Grammar
from llama_jax.serve.schemas import ChatBody, Tool, field
from llama_jax.serve.state import State
from llama_jax.serve.tool_parser import CallParser
from llama_jax.serve.tools import ToolFormat, call_grammar, shown_ids, tool_format


@dataclasses.dataclass(frozen=True)
class Calls:
    """The functions of a request, and how the model calls them."""

    tools: list[Tool] = dataclasses.field(default_factory=list)
    """shown to the model"""
    fmt: ToolFormat | None = None
    show_ids: tuple[int, ...] = ()
    """control tokens around a call"""

    def parser(self) -> CallParser | None:
        """For one answer; None without functions."""
        if self.fmt is None:
            return None
        return CallParser(self.fmt, [t.function.name for t in self.tools])


def calls_of(model: ServedModel, body: ChatBody) -> Calls:
    """What a request allows.

    Args:
      model: its template tells the format.
      body: of the request.

    Raises:
      APIError: the model does not call functions.
    """
    if not body.tools or body.tool_choice == "none" or model.template is None:
        return Calls()
    fmt = field("tools", tool_format, model.template.source, model.template.name)
    return Calls(body.tools, fmt, shown_ids(fmt, model.tokenizer.controls))


async def call_grammars(
    state: State, model: ServedModel, body: ChatBody, calls: Calls
) -> list[Grammar | None]:
    """One grammar per answer if the request demands a call; otherwise None for each.

    Args:
      state: has the threads.
      model: its tokens.
      body: of the request.
      calls: of the request.

    Raises:
      APIError: there is no such function, a schema is invalid, or there is another grammar.
    """
    if calls.fmt is None or body.tool_choice == "auto":
        return [None] * body.n
    if other := grammar_field(body):
        raise APIError(
            f"{other[0]} and tool_choice: give one of them", param=other[0], code="invalid_value"
        )
    named = body.tool_choice != "required"
    source = field(
        "tool_choice", call_grammar, calls.fmt, [t.model_dump() for t in calls.tools],
        model.tokenizer.controls, body.tool_choice["function"]["name"] if named else None,
    )  # fmt: skip
    make = lambda: model.chat_grammars.lark(source)
    return await compiled(state, "tools", make, body.n)
