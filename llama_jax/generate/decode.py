"""The compiled parts of sampling: read a chunk of a prompt, put a row in a batch, make tokens.

In and out: arrays of fixed shapes; what :mod:`llama_jax.generate` decides on the host (which
prompts, how many tokens, where a row ends) comes in as arguments.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from llama_jax.config import ModelConfig
from llama_jax.generate.sampler import Settings, choose
from llama_jax.model.llama import ComputeConfig, KVCache
from llama_jax.model.params import Params, merge
from llama_jax.model.sharding import no_mesh, reshard

DECODE_STEPS_PER_CALL = 32
"""Most tokens a row between two looks of the host: at stops, at rows that have ended."""


class Rows(NamedTuple):
    """What decoding carries from token to token, a row for each text."""

    cache: KVCache
    logits_BV: jax.Array
    """float32, of the next token"""
    seen_BV: jax.Array
    """bool, tokens of the prompt and so far"""
    keys_B: jax.Array
    done_B: jax.Array
    """bool, ended; its tokens no longer count"""
    made: jax.Array
    """int32 scalar, new tokens so far"""


def prefill(
    graphdef: Any,
    params: Params,
    tokens_1T: jax.Array,
    count: jax.Array,
    cache: KVCache,
    left: jax.Array,
) -> tuple[jax.Array, KVCache]:
    """Read the first ``count`` of ``tokens_1T`` into a cache of one row.

    Args:
      left: int32 scalar, tokens of the prompt from this chunk on. Dynamic rotary frequencies follow
        the length of the whole prompt in each of its chunks.

    Returns:
      float32 logits [V] of the token after them, and the cache. Padding lies beyond its length.
    """
    llama = merge(graphdef, params)
    length = cache.lengths_B[0] + left
    hidden, cache = llama.hidden(tokens_1T, cache=cache, counts_B=count[None], rope_length=length)
    last = jax.lax.dynamic_slice_in_dim(hidden, count - 1, 1, axis=1)
    return reshard(llama.logits(last), P())[0, 0], cache


def decode(
    graphdef: Any,
    params: Params,
    state: Rows,
    settings: Settings,
    ends: jax.Array,
    count: jax.Array,
    logprobs: jax.Array,
) -> tuple[Rows, jax.Array, jax.Array]:
    """Up to ``count`` tokens for each row, fewer when all rows have ended.

    Args:
      ends: int32, ids that end a row; -1 where there are fewer.
      count: int32 scalar, at most STRIDE.
      logprobs: bool scalar, whether log p is wanted: a sum over the vocabulary for each token.

    Returns:
      The state; tokens [STRIDE, B] int32; log p of each [STRIDE, B] float32, nats, or zeros.
    """
    llama = merge(graphdef, params)
    B = state.done_B.shape[0]

    def going(carry):
        i, state, *_ = carry
        return (i < count) & ~jnp.all(state.done_B)

    def one(carry):
        i, state, tokens_TB, logprobs_TB = carry
        keys_B = jax.vmap(jax.random.fold_in, (0, None))(state.keys_B, state.made)
        token_B = choose(state.logits_BV, state.seen_BV, keys_B, settings)
        blank_B = jnp.zeros(B, jnp.float32)
        logprob_B = jax.lax.cond(logprobs, _logprob, lambda *_: blank_B, state.logits_BV, token_B)
        done_B = state.done_B | jnp.any(token_B[:, None] == ends, axis=-1)
        logits_BTV, cache = llama(token_B[:, None], cache=state.cache)
        # A row that has ended stays where it is.
        lengths_B = jnp.where(done_B, state.cache.lengths_B, cache.lengths_B)
        state = Rows(
            cache._replace(lengths_B=lengths_B),
            reshard(logits_BTV[:, 0], P()),
            state.seen_BV.at[jnp.arange(B), token_B].set(True),
            state.keys_B,
            done_B,
            state.made + 1,
        )
        return i + 1, state, tokens_TB.at[i].set(token_B), logprobs_TB.at[i].set(logprob_B)

    blank = (
        jnp.zeros((DECODE_STEPS_PER_CALL, B), jnp.int32),
        jnp.zeros((DECODE_STEPS_PER_CALL, B), jnp.float32),
    )
    _, state, tokens_TB, logprobs_TB = jax.lax.while_loop(going, one, (0, state, *blank))
    return state, tokens_TB, logprobs_TB


def _logprob(logits_BV, token_B):
    picked_B = jnp.take_along_axis(logits_BV, token_B[:, None], axis=-1)[:, 0]
    return picked_B - jax.nn.logsumexp(logits_BV, axis=-1)


def empty(compute: ComputeConfig, cfg: ModelConfig, slots: int) -> KVCache:
    """A cache of one row."""
    return _placed(compute, KVCache.empty(cfg, 1, slots, compute.dtype))


def _placed(compute: ComputeConfig, cache: KVCache) -> KVCache:
    if no_mesh():
        return cache
    spec = P(None, *compute.rules.activation("BKSH"))
    return cache._replace(
        k_LBKSH=reshard(cache.k_LBKSH, spec), v_LBKSH=reshard(cache.v_LBKSH, spec)
    )


def empty_rows(compute: ComputeConfig, batch: int, cache: KVCache, logits_V: jax.Array) -> Rows:
    """Rows that have all ended, of the shapes of a prefilled one."""
    wide = lambda x: jnp.zeros((x.shape[0], batch, *x.shape[2:]), x.dtype)
    caches = KVCache(wide(cache.k_LBKSH), wide(cache.v_LBKSH), jnp.zeros(batch, jnp.int32))
    V = logits_V.shape[0]
    return Rows(
        _placed(compute, caches),
        jnp.zeros((batch, V), jnp.float32),
        jnp.zeros((batch, V), bool),
        jax.random.split(jax.random.key(0), batch),
        jnp.ones(batch, bool),
        jnp.int32(0),
    )


def insert(
    state: Rows,
    b: jax.Array,
    logits_V: jax.Array,
    cache: KVCache,
    seen_V: jax.Array,
    key: jax.Array,
) -> Rows:
    """Put a prefilled prompt in row ``b``."""
    put = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=b, axis=1)
    merged = KVCache(
        put(state.cache.k_LBKSH, cache.k_LBKSH),
        put(state.cache.v_LBKSH, cache.v_LBKSH),
        state.cache.lengths_B.at[b].set(cache.lengths_B[0]),
    )
    return state._replace(
        cache=merged,
        logits_BV=state.logits_BV.at[b].set(logits_V),
        seen_BV=state.seen_BV.at[b].set(seen_V),
        keys_B=state.keys_B.at[b].set(key),
        done_B=state.done_B.at[b].set(False),
    )
