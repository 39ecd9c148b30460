"""Choice of the next token from the logits: pure functions that take settings as arrays.

Settings are arguments of the compiled step, so changing a temperature does not trigger
recompilation. Generation and the server use the same functions.
"""

import dataclasses
import math
import numbers
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.generate.warp import Settings, column, warp_logits
from pallas_kernels import dispatch

MAX_TOP_LOGPROBS = 20
"""Alternatives per token that a program always computes; fewer may be requested."""


@dataclasses.dataclass(frozen=True)
class Greedy:
    """Always take the most likely token.

    Example::

        llm.generate("Once upon a time", sampling=llama_jax.Greedy())
    """


@dataclasses.dataclass(frozen=True)
class Sample:
    """Draw each token at random from the model's distribution, modified by these settings.

    A setting that is None has no effect. Settings apply in the order of the fields below and keep
    the same tokens as Hugging Face's ``generate``: tokens as likely as the last one that top_k
    keeps are kept too.

    Example::

        llm.generate("Once upon a time", sampling=llama_jax.Sample(temperature=0.8, top_p=0.95))

    Raises:
      ValueError: a setting is outside its range; the message names it.
    """

    repetition_penalty: float | None = None
    """of tokens in the prompt or the text so far, positive logits are divided by it and negative
    ones multiplied; > 0, 1 has no effect (arXiv 1909.05858)"""
    temperature: float = 1.0
    """logits are divided by it; 0 takes the most likely token"""
    top_k: int | None = None
    """keep only the k most likely tokens"""
    top_p: float | None = None
    """keep the most likely tokens that together reach this probability (arXiv 1904.09751)"""
    min_p: float | None = None
    """keep tokens whose probability is at least this fraction of the largest (arXiv 2407.01082)"""

    def __post_init__(self):
        limits = {
            "temperature": (lambda x: x >= 0, "0 (the most likely token) or more"),
            "top_p": (lambda x: 0 < x <= 1, "more than 0 and at most 1"),
            "min_p": (lambda x: 0 <= x <= 1, "0 to 1"),
            "repetition_penalty": (lambda x: x > 0, "more than 0 (1 has no effect)"),
        }
        for name, (allowed, words) in limits.items():
            value = getattr(self, name)
            if value is None and name != "temperature":
                continue
            number = isinstance(value, numbers.Real) and not isinstance(value, bool)
            if not (number and math.isfinite(value) and allowed(value)):
                raise ValueError(f"{name}={value!r} must be a number, {words}")
        if self.top_k is not None:
            check_integer("top_k", self.top_k, 1)


def is_integer(value: Any) -> bool:
    """Whether ``value`` is an integer of Python or NumPy; True and False are not."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def check_integer(name: str, value: Any, minimum: int) -> None:
    """Raise ValueError unless ``value`` is an integer of at least ``minimum``.

    Args:
      name: the argument, for the message.
      value: its value.
      minimum: smallest allowed value.
    """
    if not is_integer(value) or value < minimum:
        raise ValueError(f"{name}={value!r} must be a whole number, {minimum} or more")


def settings_of(sampling: Greedy | Sample) -> Settings:
    """The scalars of a sampler: float32, top_k int32.

    Raises:
      ValueError: ``sampling`` is neither :class:`Greedy` nor :class:`Sample`.
    """
    if isinstance(sampling, Greedy):
        sampling = Sample(temperature=0.0)
    if not isinstance(sampling, Sample):
        raise ValueError(
            f"sampling={sampling!r} must be Greedy() or Sample(temperature=..., top_p=...)"
        )
    penalty = sampling.repetition_penalty
    smallest, largest = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)
    if sampling.temperature < smallest:  # the other settings keep the most likely token
        sampling = Sample(temperature=0.0)
    top_p = 1 if sampling.top_p is None else sampling.top_p
    return Settings(
        temperature=np.float32(min(sampling.temperature, largest)),
        top_k=np.int32(min(sampling.top_k or 2**31 - 1, 2**31 - 1)),
        tail=np.float32(1 - top_p if top_p < 1 else -1),
        log_min_p=np.float32(math.log(sampling.min_p) if sampling.min_p else -math.inf),
        repetition_penalty=np.float32(1 if penalty is None else min(penalty, largest)),
    )


class Options(NamedTuple):
    """Checked settings of a generation."""

    max_new_tokens: int
    settings: Settings
    seed: int
    stops: list[str]
    logprobs: bool
    top_logprobs: int


def check_options(
    max_new_tokens: Any,
    sampling: Any,
    seed: Any,
    stop: Any = (),
    logprobs: bool = False,
    top_logprobs: Any = 0,
) -> Options:
    """The arguments of :meth:`LLM.generate`; raises ValueError for the first invalid one."""
    check_integer("max_new_tokens", max_new_tokens, 1)
    check_integer("seed", seed, 0)
    if seed >= 2**32:  # a key has 32 bits: larger seeds would repeat those of smaller ones
        raise ValueError(f"seed={seed} must be less than 2**32")
    stops = [stop] if isinstance(stop, str) or not isinstance(stop, Sequence) else list(stop)
    if any(not isinstance(s, str) or not s for s in stops):
        raise ValueError(f"stop={stop!r} must be texts that are not empty")
    num_top = check_top_logprobs(top_logprobs)
    settings = settings_of(sampling)
    return Options(max_new_tokens, settings, seed, stops, bool(logprobs or num_top), num_top)


def check_top_logprobs(top_logprobs: Any) -> int:
    """``top_logprobs`` as given; raises ValueError unless it is 0 to 20."""
    check_integer("top_logprobs", top_logprobs, 0)
    if top_logprobs > MAX_TOP_LOGPROBS:
        raise ValueError(f"top_logprobs={top_logprobs} must be at most {MAX_TOP_LOGPROBS}")
    return int(top_logprobs)


class Adjustments(NamedTuple):
    """Changes of the logits that only requests to a server ask for, one row per sequence."""

    presence_penalty: Any
    """float32 [B], subtracted from the logit of each token that the new text contains"""
    frequency_penalty: Any
    """float32 [B], subtracted from it once per occurrence"""
    bias_ids: Any
    """int32 [B, I]; unused places hold id 0 and a bias of 0"""
    bias: Any
    """float32 [B, I], added to the logits of these ids"""


def choose(
    logits_BV: jax.Array,
    in_context_BV: jax.Array,
    keys_B: jax.Array,
    s: Settings,
    adjustments: Adjustments | None = None,
    counts_BV: jax.Array | None = None,
    mask_BW: jax.Array | None = None,
) -> jax.Array:
    """Choose the next token of each sequence.

    The order is that of vLLM and transformers: logit bias, repetition penalty, frequency and
    presence penalty, grammar, temperature, then top_k, top_p and min_p. (vLLM applies min_p before
    top_k, transformers after top_p, as here. vLLM applies the grammar first, which is the same: no
    later step brings back a token.)

    Args:
      logits_BV: float32.
      in_context_BV: bool, tokens of the prompt and of the text so far.
      keys_B: one key per row; a row's token does not depend on other rows.
      s: the sampler.
      adjustments: logit bias and OpenAI's penalties, if rows can have them; then the next two
        arguments are needed too.
      counts_BV: int32, occurrences of each token in the new text.
      mask_BW: int32, one bit per token that a grammar allows, the lowest bit first; all bits are
        set in rows without a grammar.

    Returns:
      int32 [B].
    """
    args = logits_BV, in_context_BV, s, adjustments, counts_BV, mask_BW
    V = logits_BV.shape[1]
    if jnp.ndim(s.temperature) == 0 or dispatch.platform() != "cpu":
        return _choose(lambda: _noise(keys_B, V), *args)
    # One row after the other, so that only the rows that need it take the time of sampling. The
    # loop reads the rows itself: XLA's CPU compiler copies arrays that are reshaped for a loop.
    row_of = lambda tree, b: jax.tree.map(
        lambda x: jax.lax.dynamic_slice_in_dim(jnp.asarray(x), b, 1), tree
    )
    rows_B = jnp.arange(len(logits_BV))

    def noise_of(b):
        key_1, temperature_1 = row_of((keys_B, s.temperature), b)
        draws = temperature_1[0] > 0
        return jax.lax.cond(draws, lambda: _noise(key_1, V)[0], lambda: jnp.zeros(V))

    noise_BV = jax.lax.map(noise_of, rows_B)
    return jax.lax.map(lambda b: _choose(lambda: row_of(noise_BV, b), *row_of(args, b))[0], rows_B)


def _noise(keys_B: jax.Array, V: int) -> jax.Array:
    """Gumbel noise [B, V]: the largest of logits plus noise is a draw of their softmax."""
    of_row = lambda key: jax.random.gumbel(key, (V,))
    # Beside the search for the largest, XLA's CPU compiler computes the noise one number at a time.
    # In a loop of its own it uses vector instructions and takes a third of the time.
    return jax.lax.map(of_row, keys_B) if dispatch.platform() == "cpu" else jax.vmap(of_row)(keys_B)


def _choose(noise, logits_BV, in_context_BV, s, adjustments, counts_BV, mask_BW):
    if adjustments is None:
        logits_BV = repetition_penalty(logits_BV, in_context_BV, s.repetition_penalty)
    else:
        logits_BV = _adjusted(logits_BV, in_context_BV, s, adjustments, counts_BV, mask_BW)
    most_likely = lambda: _argmax(logits_BV)

    def draw():
        drawn_B = _argmax(warp_logits(logits_BV, s) + noise())
        if len(drawn_B) == 1 or jnp.ndim(s.temperature) == 0:
            return drawn_B
        return jnp.where(s.temperature > 0, drawn_B, most_likely())

    return jax.lax.cond(jnp.any(s.temperature > 0), draw, most_likely)


def _argmax(x_BV: jax.Array) -> jax.Array:
    """The index of the first largest number or NaN of each row, int32 [B]."""
    if dispatch.platform() != "cpu":
        return jnp.argmax(x_BV, axis=-1).astype(jnp.int32)
    # XLA's CPU compiler computes an argmax one number at a time, and these two passes with vectors.
    is_first_BV = (x_BV == jnp.max(x_BV, axis=-1, keepdims=True)) | jnp.isnan(x_BV)
    V = x_BV.shape[-1]
    return jnp.min(jnp.where(is_first_BV, jnp.arange(V, dtype=jnp.int32), V), axis=-1)


def _adjusted(logits_BV, in_context_BV, s, adjustments, counts_BV, mask_BW):
    """Logits after bias, penalties and grammar. What no row asks for is skipped."""
    presence_B, frequency_B, bias_ids_BI, bias_BI = adjustments

    def biased(x):
        return x.at[jnp.arange(len(x))[:, None], bias_ids_BI].add(bias_BI)

    def without_repetitions(x):
        return repetition_penalty(x, in_context_BV, s.repetition_penalty)

    def penalized(x):
        return x - column(frequency_B) * counts_BV - column(presence_B) * (counts_BV > 0)

    def allowed(x):
        return jnp.where(_bits(mask_BW, x.shape[1]), x, -jnp.inf)

    for asked, step in (
        (bias_BI != 0, biased),
        (s.repetition_penalty != 1, without_repetitions),
        ((presence_B != 0) | (frequency_B != 0), penalized),
        (mask_BW != -1, allowed),
    ):
        logits_BV = jax.lax.cond(jnp.any(asked), step, lambda x: x, logits_BV)
    return logits_BV


def _bits(mask_BW: jax.Array, size: int) -> jax.Array:
    """The first ``size`` bits of each row of words, bool; bits that do not exist are not set."""
    bits_BV = ((mask_BW[:, :, None] >> jnp.arange(32)) & 1).reshape(len(mask_BW), -1) != 0
    return jnp.pad(bits_BV[:, :size], ((0, 0), (0, max(0, size - bits_BV.shape[1]))))


def repetition_penalty(
    logits_BV: jax.Array, in_context_BV: jax.Array, penalty: jax.Array
) -> jax.Array:
    """Logits in which tokens of the context are less likely, float32 [B, V].

    Args:
      logits_BV: float32.
      in_context_BV: bool, tokens of the prompt and of the text so far.
      penalty: scalar or [B]; positive logits are divided by it, negative ones multiplied.
    """
    penalty = column(penalty)
    lowered_BV = jnp.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty)
    return jnp.where(in_context_BV, lowered_BV, logits_BV)
