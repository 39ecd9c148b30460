"""The fields of a request that choose its tokens, as settings of the engine."""

import secrets
from typing import Any

from llama_jax.generate.sampler import Sample
from llama_jax.serve.errors import APIError
from llama_jax.serve.models import ServedModel
from llama_jax.serve.request import Sampling
from llama_jax.serve.schemas import SamplingBody


def sampling_of(body: SamplingBody, model: ServedModel) -> Sampling:
    """How the tokens of an answer are chosen; a random seed if the request has none.

    Args:
      body: of the request.
      model: whose ids ``logit_bias`` may name.

    Raises:
      APIError: an id that the model does not have.
    """
    off = lambda value, neutral: None if value == neutral else value
    return Sampling(
        sample=Sample(
            temperature=body.temperature,
            top_p=off(body.top_p, 1),
            top_k=body.top_k if body.top_k > 0 else None,
            min_p=off(body.min_p, 0),
            repetition_penalty=off(body.repetition_penalty, 1),
        ),
        presence_penalty=body.presence_penalty,
        frequency_penalty=body.frequency_penalty,
        logit_bias=tuple(_bias(body, model)),
        seed=secrets.randbits(32) if body.seed is None else body.seed,
    )


def _bias(body: SamplingBody, model: ServedModel) -> Any:
    for name, value in body.logit_bias.items():
        if not (name.isascii() and name.isdecimal() and len(name) < 10):
            problem = "it is not a token id"
        elif int(name) >= model.vocab_size:
            problem = f"those of the model are 0 to {model.vocab_size - 1}"
        else:
            yield int(name), value
            continue
        raise APIError(
            f"logit_bias: {name!r:.40}: {problem}", param="logit_bias", code="invalid_value"
        )


def eos_of(body: SamplingBody, eos_ids: tuple[int, ...]) -> tuple[int, ...]:
    """The ids that end the answer."""
    return () if body.ignore_eos else eos_ids
