"""Choice of the next token from the logits: pure functions that take settings as arrays.

Settings are arguments of the compiled step, so changing a temperature does not trigger
recompilation.
"""

import dataclasses
import math
import numbers
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

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


class Settings(NamedTuple):
    """A sampler as scalar arguments of the compiled step; a setting of None has a neutral value."""

    temperature: jax.Array
    top_k: jax.Array
    tail: jax.Array
    """1 - top_p: the least likely tokens with this total probability are dropped; -1: none"""
    min_p: jax.Array
    repetition_penalty: jax.Array


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
    number = lambda x, neutral: jnp.float32(neutral if x is None else x)
    top_p = 1 if sampling.top_p is None else sampling.top_p
    return Settings(
        temperature=jnp.float32(sampling.temperature),
        top_k=jnp.int32(min(sampling.top_k or 2**31 - 1, 2**31 - 1)),
        tail=jnp.float32(1 - top_p if top_p < 1 else -1),
        min_p=number(sampling.min_p, 0),
        repetition_penalty=number(sampling.repetition_penalty, 1),
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


def choose(
    logits_BV: jax.Array, in_context_BV: jax.Array, keys_B: jax.Array, s: Settings
) -> jax.Array:
    """Choose the next token of each sequence.

    Args:
      logits_BV: float32.
      in_context_BV: bool, tokens of the prompt and of the text so far.
      keys_B: one key per row; a row's token does not depend on other rows.
      s: the sampler.

    Returns:
      int32 [B].
    """
    logits_BV = repetition_penalty(logits_BV, in_context_BV, s.repetition_penalty)

    def draw():
        kept_BV = warp_logits(logits_BV, s)
        return jax.vmap(jax.random.categorical)(keys_B, kept_BV).astype(jnp.int32)

    return jax.lax.cond(
        s.temperature > 0, draw, lambda: jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    )


def repetition_penalty(
    logits_BV: jax.Array, in_context_BV: jax.Array, penalty: jax.Array
) -> jax.Array:
    """Logits in which tokens of the context are less likely, float32 [B, V].

    Args:
      logits_BV: float32.
      in_context_BV: bool, tokens of the prompt and of the text so far.
      penalty: positive logits are divided by it, negative ones multiplied.
    """
    lowered_BV = jnp.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty)
    return jnp.where(in_context_BV, lowered_BV, logits_BV)


def warp_logits(logits_BV: jax.Array, s: Settings) -> jax.Array:
    """Logits of the distribution to draw from: divided by the temperature, -inf if dropped."""
    largest_B1 = jnp.max(logits_BV, axis=-1, keepdims=True)
    logits_BV = jax.lax.cond(
        (s.top_k < logits_BV.shape[-1]) | (s.tail >= 0), _top_k_top_p, lambda x, _: x, logits_BV, s
    )
    # The maximum is subtracted first, so that a small temperature does not overflow.
    logits_BV = (logits_BV - largest_B1) / s.temperature
    # A fraction of the largest probability is a distance from the largest logit, which is 0.
    return jnp.where(logits_BV >= jnp.log(s.min_p), logits_BV, -jnp.inf)


def _top_k_top_p(logits_BV: jax.Array, s: Settings) -> jax.Array:
    """Set logits to -inf beyond the first top_k, then in the tail of probability 1 - top_p.

    Tokens are compared by their original logits: after subtraction and division, logits that
    differ only in their last bits can be equal.
    """
    B, V = logits_BV.shape
    order_BV = _order(logits_BV)
    kth_B = jax.lax.cond(
        s.top_k < V,
        lambda: _largest_bound(order_BV, jnp.ones_like(logits_BV), V - s.top_k),
        lambda: jnp.full(B, _LOWEST),
    )
    first_k_BV = order_BV >= kth_B[:, None]
    scaled_BV = (logits_BV - jnp.max(logits_BV, axis=-1, keepdims=True)) / s.temperature

    def top_p():
        p_BV = jax.nn.softmax(jnp.where(first_k_BV, scaled_BV, -jnp.inf), axis=-1)
        return _without_tail(order_BV, p_BV, s.tail)

    keep_BV = jax.lax.cond(s.tail >= 0, top_p, lambda: first_k_BV)
    return jnp.where(keep_BV, logits_BV, -jnp.inf)


def _without_tail(order_BV: jax.Array, p_BV: jax.Array, tail: jax.Array) -> jax.Array:
    """Which tokens to keep when the least likely ones, of total probability ``tail``, are dropped.

    The tail is summed, as in transformers: the sum of a short tail is exact, 1 minus the sum of all
    others is not. The number of tokens is that of transformers, up to rounding of the sum. Among
    tokens as likely as the last one, those with the largest ids are kept (in transformers this
    depends on torch's sort).

    Args:
      order_BV: int32 keys with the order of the logits.
      p_BV: probabilities.
      tail: scalar, the probability to drop.
    """
    largest_B1 = jnp.max(order_BV, axis=-1, keepdims=True)  # at least one token is kept
    last_B1 = jnp.minimum(_largest_bound(order_BV, p_BV, tail)[:, None], largest_B1)
    is_last_BV = order_BV == last_B1

    def some_of_the_last():
        p_B1 = jnp.max(jnp.where(is_last_BV, p_BV, 0), axis=-1, keepdims=True)
        rank_BV = jax.lax.cumsum(is_last_BV.astype(jnp.int32), axis=1)
        up_to_BV = _sums_below(order_BV, p_BV, last_B1) + rank_BV * p_B1
        return is_last_BV & ((up_to_BV > tail) | (rank_BV == rank_BV[:, -1:]))

    equal = jnp.any(jnp.sum(is_last_BV, axis=-1) > 1)
    return (order_BV > last_B1) | jax.lax.cond(equal, some_of_the_last, lambda: is_last_BV)


_LOWEST = jnp.iinfo(jnp.int32).min


def _order(x: jax.Array) -> jax.Array:
    """int32 numbers in the same order as the float32 ``x``."""
    bits = jax.lax.bitcast_convert_type(jnp.where(x == 0, 0.0, x), jnp.int32)  # -0 equals 0
    return jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


def _largest_bound(order_BV: jax.Array, weights_BV: jax.Array, limit: jax.Array) -> jax.Array:
    """The largest bound below which the sum of weights is at most ``limit``, int32 [B].

    This replaces sorting. The bound is found digit by digit, the highest first: one pass over the
    vocabulary computes the sums for all values of a digit. A digit has one bit on a CPU, which
    computes one sum after the other, and four bits elsewhere.

    Args:
      order_BV: int32 keys.
      weights_BV: float32, not negative.
      limit: scalar.
    """
    bits = 1 if dispatch.platform() == "cpu" else 4

    def digit(i, bound_B):
        shift = 32 - bits * (i + 1)
        bounds_BR = bound_B[:, None] + (jnp.arange(1, 1 << bits, dtype=jnp.int32) << shift)
        below_BR = _sums_below(order_BV, weights_BV, bounds_BR)
        return bound_B + (jnp.sum(below_BR <= limit, axis=1, dtype=jnp.int32) << shift)

    return jax.lax.fori_loop(0, 32 // bits, digit, jnp.full(len(order_BV), _LOWEST))


def _sums_below(order_BV: jax.Array, weights_BV: jax.Array, bounds_BR: jax.Array) -> jax.Array:
    """Sums of the weights whose key is below each of R bounds, float32 [B, R]."""
    # XLA's CPU compiler vectorizes a sum over any axis but the last.
    columns = lambda x: jnp.pad(x, ((0, 0), (0, -x.shape[1] % 128))).reshape(len(x), 1, -1, 128)
    below = columns(order_BV) < bounds_BR[:, :, None, None]
    return jnp.sum(jnp.sum(jnp.where(below, columns(weights_BV), 0), axis=2), axis=2)
