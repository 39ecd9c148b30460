"""Prompts and conversations to token ids, in threads."""

import contextlib
from collections.abc import Sequence
from typing import Any

from llama_jax.generate.prompts import check_ids
from llama_jax.serve.errors import APIError
from llama_jax.serve.models import ServedModel
from llama_jax.serve.schemas import MAX_CHOICES, Message, Tool, field
from llama_jax.serve.state import State
from llama_jax.serve.tools import ToolFormat, template_messages, tool_format


async def chat_ids(
    state: State,
    model: ServedModel,
    messages: Sequence[Message],
    tools: Sequence[Tool],
    size: int,
) -> tuple[int, ...]:
    """Ids of a conversation up to the start of the answer; only the template writes BOS.

    Args:
      state: has the threads.
      model: its template.
      messages: of the request.
      tools: of the request; empty for none.
      size: bytes of the request.

    Raises:
      APIError: the model has no template, or it refuses the messages.
    """
    if model.template is None:
        raise APIError(
            f"{model.no_template}; use /v1/completions", param="messages", code="no_chat_template"
        )
    # Also without functions in this request: earlier messages may have calls.
    fmt: ToolFormat | None = None
    with contextlib.suppress(ValueError):  # the model does not call functions
        fmt = tool_format(model.template.source)
    encode = lambda: model.template.encode(  # type: ignore[union-attr]
        template_messages([m.model_dump(exclude_none=True) for m in messages], fmt),
        model.tokenizer,
        tools=[t.model_dump(exclude_unset=True) for t in tools] or None,
    )
    workers = state.renderers_for(size, len(messages))
    return tuple(await workers.run(field, "messages", encode))


async def text_ids(state: State, model: ServedModel, text: str, where: str) -> tuple[int, ...]:
    """Ids of a text, with BOS if the tokenizer has one.

    Args:
      state: has the threads.
      model: its tokenizer.
      text: of the request.
      where: the field.

    Raises:
      APIError: the text is not valid Unicode.
    """
    encode = lambda: check_ids(text, where, model.tokenizer, model.vocab_size)
    bos = model.tokenizer.bos_id
    ids = await state.workers_for(len(text)).run(field, where, encode)
    return (*([] if bos is None else [bos]), *ids)


async def prompt_ids(state: State, model: ServedModel, prompt: Any) -> list[tuple[int, ...]]:
    """Ids of each prompt of ``/v1/completions``: a text, ids, or a list of these.

    Args:
      state: has the threads.
      model: its tokenizer.
      prompt: the field of the request.

    Raises:
      APIError: something else, or ids that the model does not have.
    """
    is_list = isinstance(prompt, list)
    single = not is_list or (bool(prompt) and type(prompt[0]) is int)
    prompts = [prompt] if single else prompt
    if not 0 < len(prompts) <= MAX_CHOICES:
        raise APIError(
            f"prompt: a list of 1 to {MAX_CHOICES} prompts is needed, not {len(prompts)}",
            param="prompt", code="invalid_value",
        )  # fmt: skip
    made = []
    for number, item in enumerate(prompts):
        where = "prompt" if single else f"prompt.{number}"
        if isinstance(item, str):
            made.append(await text_ids(state, model, item, where))
            continue
        if not isinstance(item, list) or not item:
            raise APIError(
                f"{where} must be text or a list of token ids, not {item!r:.60}",
                param=where, code="invalid_value",
            )  # fmt: skip
        check = lambda item=item, where=where: check_ids(
            item, where, model.tokenizer, model.vocab_size
        )
        made.append(tuple(await state.workers_for(len(item)).run(field, where, check)))
    return made


def check_length(ids: Sequence[int], max_new_tokens: int | None, context: int, param: str) -> int:
    """The most new tokens of an answer: as requested, or the rest of the context.

    Args:
      ids: of the prompt.
      max_new_tokens: as requested.
      context: of the server.
      param: the field that holds the prompt.

    Raises:
      APIError: the prompt and the answer do not fit the context.
    """
    if not ids:
        raise APIError(f"{param} is empty", param=param, code="invalid_value")
    space = context - len(ids)
    least = 1 if max_new_tokens is None else max_new_tokens
    if space < least:
        raise APIError(
            f"{param} has {len(ids)} tokens and the answer may have {max(1, least)}; together at "
            f"most {context} fit, the context of this server: shorten the prompt"
            + ("" if least <= 1 else " or lower max_tokens"),
            param=param, code="context_length_exceeded",
        )  # fmt: skip
    return space if max_new_tokens is None else max_new_tokens
