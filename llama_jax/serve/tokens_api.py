"""``/tokenize``, ``/detokenize`` and ``/v1/models``."""

from typing import Any

from llama_jax.serve.answers import Answers
from llama_jax.serve.errors import APIError
from llama_jax.serve.prompt import chat_ids
from llama_jax.serve.schemas import DetokenizeBody, TokenizeBody, field
from llama_jax.serve.state import State
from llama_jax.serve.token_text import token_bytes, token_string


async def tokenize(state: State, answers: Answers, body: TokenizeBody) -> dict[str, Any]:
    """Ids of a text or of a conversation.

    Args:
      state: of the server.
      answers: unused.
      body: of the request.
    """
    model = state.model(body.model)
    if body.messages is not None:
        ids = list(await chat_ids(state, model, body.messages, body.tools, body.size))
    else:
        encode = model.tokenizer.encode
        bos = body.add_special_tokens and model.tokenizer.bos_id is not None
        workers = state.workers_for(len(body.prompt or ""))
        ids = await workers.run(field, "prompt", encode, body.prompt, bos=bos)
    made: dict[str, Any] = {
        "count": len(ids), "max_model_len": state.engine.context, "tokens": ids
    }  # fmt: skip
    if body.return_token_strs:
        strings = lambda: [token_string(token_bytes(model.tokenizer, i)) for i in ids]
        made["token_strs"] = await state.workers_for(len(ids)).run(strings)
    return made


async def detokenize(state: State, answers: Answers, body: DetokenizeBody) -> dict[str, Any]:
    """Text of ids.

    Args:
      state: of the server.
      answers: unused.
      body: of the request.
    """
    model = state.model(body.model)
    if wrong := [i for i in body.tokens if i >= model.vocab_size]:
        raise APIError(
            f"tokens: there is no id {wrong[0]}; those of the model are 0 to "
            f"{model.vocab_size - 1}", param="tokens", code="invalid_value",
        )  # fmt: skip
    workers = state.workers_for(len(body.tokens))
    return {"prompt": await workers.run(model.tokenizer.decode, body.tokens)}


def models(state: State) -> dict[str, Any]:
    """The names for the field ``model``: the base and its adapters."""
    return {"object": "list", "data": [model(state, name) for name in state.models]}


def model(state: State, name: str) -> dict[str, Any]:
    """One of :func:`models`; raises APIError if there is none with this name."""
    if not name:
        raise APIError("the name of the model is missing", status=404, code="not_found")
    base = next(iter(state.models))
    return {
        "id": state.model(name).name, "object": "model", "created": state.created,
        "owned_by": "llama_jax", "root": base, "parent": None if name == base else base,
        "max_model_len": state.engine.context,
    }  # fmt: skip
