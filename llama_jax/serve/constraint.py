"""The grammar that a request asks for, compiled in a thread."""

from collections.abc import Callable
from typing import Any

from llama_jax.serve.errors import APIError
from llama_jax.serve.grammar import LLGrammar
from llama_jax.serve.models import ServedModel
from llama_jax.serve.request import Grammar
from llama_jax.serve.schemas import GenerationBody, field
from llama_jax.serve.state import State


async def grammars(
    state: State, model: ServedModel, body: GenerationBody, count: int, is_chat: bool
) -> list[Grammar | None]:
    """One grammar per answer, None without one.

    Args:
      state: has the threads.
      model: its tokens.
      body: of the request.
      count: number of answers.
      is_chat: whether answers end with the turn.

    Raises:
      APIError: the grammar is invalid or too complex.
    """
    found = grammar_field(body)
    if found is None:
        return [None] * count
    name, kind, value = found
    if body.ignore_eos:
        raise APIError(
            f"ignore_eos: the end of the answer is where {name} allows it; leave it out",
            param="ignore_eos", code="invalid_value",
        )  # fmt: skip

    def make() -> LLGrammar:
        factory = model.chat_grammars if is_chat else model.text_grammars
        return factory.make(kind, value)

    return await compiled(state, name, make, count)


async def compiled(
    state: State, name: str, make: Callable[[], LLGrammar], count: int
) -> list[Grammar | None]:
    """A grammar for each of several answers, compiled in a thread.

    Args:
      state: has the threads.
      name: the field, for errors.
      make: compiles.
      count: number of answers.

    Raises:
      APIError: the grammar is invalid or too complex.
    """

    def make_all() -> list[Grammar | None]:
        first = make()
        return [first, *(first.copy() for _ in range(count - 1))]

    return await state.compilers.run(field, name, make_all)


def grammar_field(body: GenerationBody) -> tuple[str, str, Any] | None:
    """The constraint of a request: its field, its kind ("json", "json_object", "regex", "choice" or
    "grammar") and its value.

    Raises:
      APIError: there are several.
    """
    found: list[tuple[str, str, Any]] = []
    if (wanted := body.response_format) is not None and wanted.type != "text":
        schema = wanted.json_schema.schema_ if wanted.json_schema else None
        found.append(("response_format", wanted.type.replace("json_schema", "json"), schema))
    for kind in ("json", "regex", "choice", "grammar"):
        if (value := getattr(body, f"guided_{kind}")) is not None:
            found.append((f"guided_{kind}", kind, value))
    if body.structured_outputs is not None:
        for kind, value in body.structured_outputs.model_dump(exclude_none=True).items():
            kind = kind.strip("_")
            if kind == "json" or value is not False:
                found.append((f"structured_outputs.{kind}", kind, value))
    if len(found) > 1:
        names = " and ".join(name for name, _, _ in found)
        raise APIError(f"{names}: give one of them", param=found[1][0], code="invalid_value")
    return found[0] if found else None
