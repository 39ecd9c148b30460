"""How the next token is chosen from logits: pure functions, whose settings are arrays.

In: logits [B, V] and a key a row. Out: a token a row. Settings are arguments of the compiled step,
so that another temperature compiles nothing.

    llm.generate("Once", max_new_tokens=64, sampling=Sample(temperature=0.8, top_p=0.95))
"""

import dataclasses
import math
import numbers
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Greedy:
    """The likeliest token, always."""


@dataclasses.dataclass(frozen=True)
class Sample:
    """Draw from the model's distribution, reshaped; None leaves a setting out.

    The steps are taken in this order, and leave the same tokens, as Hugging Face's ``generate``:
    tokens as likely as the last one that top_k keeps are kept too.

    Raises:
      ValueError: a setting outside its range; names it.
    """

    repetition_penalty: float | None = None
    """positive logits of tokens in the prompt or the text so far are divided by it, negative ones
    multiplied; > 0, 1 changes nothing (arXiv 1909.05858)"""
    temperature: float = 1.0
    """logits are divided by it; 0 takes the likeliest token"""
    top_k: int | None = None
    """only the k likeliest tokens"""
    top_p: float | None = None
    """only the likeliest tokens that together reach this probability (arXiv 1904.09751)"""
    min_p: float | None = None
    """only tokens at least this share as likely as the likeliest (arXiv 2407.01082)"""

    def __post_init__(self):
        limits = {
            "temperature": (lambda x: x >= 0, "0 (the likeliest token) or more"),
            "top_p": (lambda x: 0 < x <= 1, "more than 0 and at most 1"),
            "min_p": (lambda x: 0 <= x <= 1, "0 to 1"),
            "repetition_penalty": (lambda x: x > 0, "more than 0 (1 changes nothing)"),
        }
        for name, (allowed, words) in limits.items():
            value = getattr(self, name)
            if value is None and name != "temperature":
                continue
            number = isinstance(value, numbers.Real) and not isinstance(value, bool)
            if not (number and math.isfinite(value) and allowed(value)):
                raise ValueError(f"{name}={value!r} must be a number, {words}")
        if self.top_k is not None:
            check_whole("top_k", self.top_k, 1)


def check_whole(name: str, value: Any, least: int) -> None:
    """Raise ValueError for what is no whole number of at least ``least``."""
    whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not whole or value < least:
        raise ValueError(f"{name}={value!r} must be a whole number, {least} or more")


class Settings(NamedTuple):
    """A sampler as scalars of the compiled step; those of a setting left out change nothing."""

    temperature: jax.Array
    top_k: jax.Array
    tail: jax.Array
    """1 - top_p: the least likely tokens up to this probability are left out; -1: none"""
    min_p: jax.Array
    repetition_penalty: jax.Array


def settings_of(sampling: Greedy | Sample) -> Settings:
    """The scalars of a sampler: float32, top_k int32.

    Raises:
      ValueError: neither of the two samplers.
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


def choose(logits_BV: jax.Array, seen_BV: jax.Array, keys_B: jax.Array, s: Settings) -> jax.Array:
    """The next token of each row, int32 [B].

    Args:
      logits_BV: float32.
      seen_BV: bool, tokens of the prompt and of the text so far.
      keys_B: one key a row; a row's token depends on nothing of another row.
      s: the sampler.
    """
    logits_BV = penalised(logits_BV, seen_BV, s.repetition_penalty)

    def draw():
        kept_BV = reshaped(logits_BV, s)
        return jax.vmap(jax.random.categorical)(keys_B, kept_BV).astype(jnp.int32)

    return jax.lax.cond(
        s.temperature > 0, draw, lambda: jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    )


def penalised(logits_BV: jax.Array, seen_BV: jax.Array, penalty: jax.Array) -> jax.Array:
    """Logits with those of seen tokens made less likely."""
    lowered_BV = jnp.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty)
    return jnp.where(seen_BV, lowered_BV, logits_BV)


def reshaped(logits_BV: jax.Array, s: Settings) -> jax.Array:
    """Logits of the distribution that is drawn from: over the temperature; -inf where left out."""
    largest_B1 = jnp.max(logits_BV, axis=-1, keepdims=True)
    # Sorting a vocabulary costs more than a small model's layer: only where it is asked for.
    logits_BV = jax.lax.cond(
        (s.top_k < logits_BV.shape[-1]) | (s.tail >= 0), _likeliest, lambda x, _: x, logits_BV, s
    )
    # The largest is taken off first: a small temperature overflows nothing.
    logits_BV = (logits_BV - largest_B1) / s.temperature
    # A share of the largest probability is a distance from the largest logit, which is 0.
    return jnp.where(logits_BV >= jnp.log(s.min_p), logits_BV, -jnp.inf)


def _likeliest(logits_BV: jax.Array, s: Settings) -> jax.Array:
    """-inf beyond the first top_k, then in the tail of probability 1 - top_p.

    Tokens are compared by their logits as they came: subtracting and dividing makes equals of
    logits that differ in their last bits.
    """
    sorted_BV = jnp.sort(logits_BV, axis=-1, descending=True)
    least = jnp.minimum(s.top_k, logits_BV.shape[-1]) - 1
    first_k_BV = sorted_BV >= jnp.take(sorted_BV, least[None], axis=-1)
    scaled_BV = (sorted_BV - sorted_BV[:, :1]) / s.temperature
    p_BV = jax.nn.softmax(jnp.where(first_k_BV, scaled_BV, -jnp.inf), axis=-1)
    # Summed from the least likely on, as transformers does: the sum of a short tail is exact where
    # 1 minus the sum of all others is not.
    up_to_BV = jax.lax.cumsum(p_BV, axis=1, reverse=True)
    kept_B1 = jnp.sum(first_k_BV & (up_to_BV > s.tail), axis=-1, keepdims=True)
    kept_B1 = jnp.maximum(kept_B1, 1)
    last_B1 = jnp.take_along_axis(sorted_BV, kept_B1 - 1, axis=-1)
    # As many as transformers keeps; of those as likely as the last one, the ones with the largest
    # ids (there it depends on torch's sort).
    is_last_BV = logits_BV == last_B1
    from_end_BV = jax.lax.cumsum(is_last_BV.astype(jnp.int32), axis=1, reverse=True)
    free_B1 = kept_B1 - jnp.sum(sorted_BV > last_B1, axis=-1, keepdims=True)
    keep_BV = (logits_BV > last_B1) | (is_last_BV & (from_end_BV <= free_B1))
    return jnp.where(keep_BV, logits_BV, -jnp.inf)
