"""The distribution to draw from: logits changed by temperature, top-k, top-p and min-p."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch


class Settings(NamedTuple):
    """A sampler as arguments of the compiled step; a setting of None has a neutral value.

    Each field is one number for all rows, or an array [B] with one per row. A row gets the same
    tokens either way, whatever the settings of other rows: conditions skip only work that leaves
    every row as it is. No field needs a function such as a logarithm in the compiled step, because
    the bits of its results may depend on the place of the row.
    """

    temperature: Any
    """float32, as all others but top_k"""
    top_k: Any
    """int32"""
    tail: Any
    """1 - top_p: the least likely tokens with this total probability are dropped; -1: none"""
    log_min_p: Any
    """-inf: none"""
    repetition_penalty: Any


def column(setting: jax.Array) -> jax.Array:
    """A setting that broadcasts with an array [B, V]."""
    return jnp.asarray(setting)[..., None]


def warp_logits(logits_BV: jax.Array, s: Settings) -> jax.Array:
    """Logits of the distribution to draw from: divided by the temperature, -inf if dropped.

    Args:
      logits_BV: float32.
      s: the sampler. Rows of temperature 0 have no such distribution; their result is not used.
    """
    largest_B1 = jnp.max(logits_BV, axis=-1, keepdims=True)
    some = jnp.any(s.top_k < logits_BV.shape[-1]) | jnp.any(s.tail >= 0)
    logits_BV = jax.lax.cond(some, _top_k_top_p, lambda x, _: x, logits_BV, s)
    # The maximum is subtracted first, so that a small temperature does not overflow.
    logits_BV = (logits_BV - largest_B1) / column(s.temperature)
    # A fraction of the largest probability is a distance from the largest logit, which is 0.
    return jnp.where(logits_BV >= column(s.log_min_p), logits_BV, -jnp.inf)


def _top_k_top_p(logits_BV: jax.Array, s: Settings) -> jax.Array:
    """Set logits to -inf beyond the first top_k, then in the tail of probability 1 - top_p.

    Tokens are compared by their original logits: after subtraction and division, logits that
    differ only in their last bits can be equal.
    """
    B, V = logits_BV.shape
    order_BV = _order(logits_BV)
    kth_B = jax.lax.cond(
        jnp.any(s.top_k < V),
        # The bound of a row without top_k is the lowest.
        lambda: _largest_bound(order_BV, jnp.ones_like(logits_BV), V - s.top_k),
        lambda: jnp.full(B, _LOWEST),
    )
    first_k_BV = order_BV >= kth_B[:, None]
    scaled_BV = logits_BV - jnp.max(logits_BV, axis=-1, keepdims=True)
    scaled_BV = scaled_BV / column(s.temperature)

    def top_p():
        p_BV = jax.nn.softmax(jnp.where(first_k_BV, scaled_BV, -jnp.inf), axis=-1)
        return jnp.where(column(s.tail) >= 0, _without_tail(order_BV, p_BV, s.tail), first_k_BV)

    keep_BV = jax.lax.cond(jnp.any(s.tail >= 0), top_p, lambda: first_k_BV)
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
      tail: scalar or [B], the probability to drop.
    """
    largest_B1 = jnp.max(order_BV, axis=-1, keepdims=True)  # at least one token is kept
    last_B1 = jnp.minimum(_largest_bound(order_BV, p_BV, tail)[:, None], largest_B1)
    is_last_BV = order_BV == last_B1

    def some_of_the_last():
        p_B1 = jnp.max(jnp.where(is_last_BV, p_BV, 0), axis=-1, keepdims=True)
        rank_BV = jax.lax.cumsum(is_last_BV.astype(jnp.int32), axis=1)
        up_to_BV = _sums_below(order_BV, p_BV, last_B1) + rank_BV * p_B1
        return is_last_BV & ((up_to_BV > column(tail)) | (rank_BV == rank_BV[:, -1:]))

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
      limit: scalar or [B].
    """
    bits = 1 if dispatch.platform() == "cpu" else 4

    def digit(i, bound_B):
        shift = 32 - bits * (i + 1)
        bounds_BR = bound_B[:, None] + (jnp.arange(1, 1 << bits, dtype=jnp.int32) << shift)
        below_BR = _sums_below(order_BV, weights_BV, bounds_BR)
        return bound_B + (jnp.sum(below_BR <= column(limit), axis=1, dtype=jnp.int32) << shift)

    return jax.lax.fori_loop(0, 32 // bits, digit, jnp.full(len(order_BV), _LOWEST))


def _sums_below(order_BV: jax.Array, weights_BV: jax.Array, bounds_BR: jax.Array) -> jax.Array:
    """Sums of the weights whose key is below each of R bounds, float32 [B, R]."""
    # XLA's CPU compiler vectorizes a sum over any axis but the last.
    columns = lambda x: jnp.pad(x, ((0, 0), (0, -x.shape[1] % 128))).reshape(len(x), 1, -1, 128)
    below = columns(order_BV) < bounds_BR[:, :, None, None]
    return jnp.sum(jnp.sum(jnp.where(below, columns(weights_BV), 0), axis=2), axis=2)
