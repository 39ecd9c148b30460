"""Attention of a long chunk of a prompt over a cache, by the training kernels.

The decode kernels hold all queries of a key head at once, which is slow or impossible for more than
a few hundred tokens.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.rotary_attention import Rope, rotate
from pallas_kernels.rotary_decode_attention import _append

MAX_DECODE_QUERIES = 512
"""Queries of a key head up to which the decode kernels run: they read the cache where it is."""


def prefill(
    kernel: Callable[..., jax.Array],
    q, k, v, cache_k, cache_v, layer, lengths, rope, scale, pages=None,
):  # fmt: skip
    """`rotary_decode_attention` of one row and many queries, with positional arguments.

    The keys and values of the row in this layer, over the whole cache length, are copied once per
    chunk to the layout of ``kernel``, an implementation of `rotary_attention`. The kernel visits no
    block of keys beyond the new tokens.
    """
    B, T, N, H = q.shape
    queries = T * (N // k.shape[2])
    if B > 1 or queries <= MAX_DECODE_QUERIES:
        raise NotImplementedError(
            f"{B} rows with {queries} queries per key head: the training kernels read prompts of "
            f"one row, and at least {MAX_DECODE_QUERIES + 1} queries"
        )
    length = lengths[0]
    positions_BT = length + jnp.arange(T, dtype=jnp.int32)[None]
    caches = tuple(
        _append(cache, new, layer, lengths, pages)
        for cache, new in ((cache_k, rotate(k, positions_BT, rope)), (cache_v, v))
    )

    def of_row(cache):
        """[1, S, K, H]"""
        if pages is None:
            layer_MKSH = lax.dynamic_index_in_dim(cache, layer, keepdims=False)
        else:
            layer_MKSH = cache[layer, pages[0]]
        row_SKH = layer_MKSH.transpose(0, 2, 1, 3).reshape(-1, *k.shape[2:])
        # Invalid positions may hold NaN, and the product of a weight of 0 and NaN is NaN.
        valid_S11 = (jnp.arange(len(row_SKH)) < length + T)[:, None, None]
        return jnp.where(valid_S11, row_SKH, 0).astype(q.dtype)[None]

    keys, values = map(of_row, caches)
    # Queries and keys are rotated already; the kernel rotates both by angle 0, which is exact.
    zeros = jnp.zeros((1, T), jnp.int32), jnp.zeros((1, keys.shape[1]), jnp.int32)
    out = kernel(
        rotate(q, positions_BT, rope), keys, values, *zeros, Rope(jnp.zeros(H // 2), 1.0),
        None, None, length, True, scale,
    )  # fmt: skip
    return out, *caches
