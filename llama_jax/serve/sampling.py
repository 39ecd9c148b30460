"""The settings of one request as arrays for the sampler."""

import numpy as np

from llama_jax.generate.sampler import Adjustments, is_integer, settings_of
from llama_jax.generate.warp import Settings
from llama_jax.serve.request import Sampling

MAX_BIAS = 300
"""Most tokens of a ``logit_bias``, as in OpenAI's API."""


def row_of(sampling: Sampling, vocab_size: int) -> tuple[Settings, Adjustments]:
    """One row of the sampler's settings: numpy scalars, and arrays [I] of the logit bias.

    Args:
      sampling: of the request.
      vocab_size: of the model.

    Raises:
      ValueError: the logit bias has too many tokens, or one that the model does not have.
    """
    bias = dict(sampling.logit_bias)
    if len(bias) > MAX_BIAS:
        raise ValueError(f"logit_bias has {len(bias)} tokens; at most {MAX_BIAS} are allowed")
    for token in bias:
        if not is_integer(token) or not 0 <= token < vocab_size:
            raise ValueError(f"logit_bias: {token!r} is not a token id, 0 to {vocab_size - 1}")
    bias_ids_I, bias_I = np.zeros(MAX_BIAS, np.int32), np.zeros(MAX_BIAS, np.float32)
    bias_ids_I[: len(bias)], bias_I[: len(bias)] = list(bias), list(bias.values())
    return settings_of(sampling.sample), Adjustments(
        np.float32(sampling.presence_penalty),
        np.float32(sampling.frequency_penalty),
        bias_ids_I,
        bias_I,
    )
