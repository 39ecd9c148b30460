"""Attention of a few new positions over a key/value cache; rotary embedding and append inside.

Letters: B batch, T new positions (1 to a few, or a chunk of a prompt), S slots of the cache, N
query heads, K key/value heads, H head dimension. The cache holds rotated keys as [B, K, S, H]: a
head's keys lie together, as they are read.
"""

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.rotary_attention import Rope, _check, masked_attention, rotate


def rotary_decode_attention(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    cache_k_BKSH: jax.Array,
    cache_v_BKSH: jax.Array,
    lengths_B: jax.Array,
    rope: Rope,
    *,
    scale: float | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Append T new keys and values to the cache at each row's length, and attend over what is live.

    New position t of row b has index and rotary position ``lengths_B[b] + t``, and sees indices 0
    to its own. The caller keeps ``lengths_B + T <= S``; slots beyond a row's live part are never
    read.

    Args:
      q_BTNH, k_BTKH, v_BTKH: new queries, keys and values before rotation, one floating dtype.
      cache_k_BKSH, cache_v_BKSH: rotated keys, and values; positions 0 to lengths_B - 1 are live.
      lengths_B: int32, live positions of each row before this call.
      rope, scale, implementation: as in :func:`rotary_attention`.

    Returns:
      out_BTNH in q's dtype, and the two caches with the new positions in place.

    Raises:
      ValueError: shapes or dtypes that do not fit together, or an unknown implementation.
    """
    positions_BT = lengths_B[:, None] + jnp.arange(q_BTNH.shape[1], dtype=lengths_B.dtype)
    _check(q_BTNH, k_BTKH, v_BTKH, positions_BT, rope)
    B, T, K, H = k_BTKH.shape
    shape = cache_k_BKSH.shape
    if shape != cache_v_BKSH.shape or shape[:2] + shape[3:] != (B, K, H):
        raise ValueError(f"caches must be [{B}, {K}, S, {H}]; got {shape}, {cache_v_BKSH.shape}")
    if shape[2] < T:
        raise ValueError(f"{T} new positions do not fit a cache of {shape[2]}")
    return dispatch.call(
        "rotary_decode_attention", _IMPLEMENTATIONS, implementation,
        q_BTNH, k_BTKH, v_BTKH, cache_k_BKSH, cache_v_BKSH, lengths_B, positions_BT, rope,
        scale if scale is not None else H**-0.5,
    )  # fmt: skip


def _xla(q, k, v, cache_k, cache_v, lengths, positions, rope, scale):
    q, k = rotate(q, positions, rope), rotate(k, positions, rope)
    cache_k, cache_v = _append(cache_k, k, lengths), _append(cache_v, v, lengths)
    slots = jnp.arange(cache_k.shape[2])
    mask_BTS = slots <= positions[:, :, None]
    # Dead slots may hold anything, NaN too: a weight of zero would not silence a NaN value.
    live = (slots < lengths[:, None] + q.shape[1])[:, None, :, None]
    values = jnp.where(live, cache_v, 0).astype(q.dtype)
    keys, values = (x.astype(q.dtype).transpose(0, 2, 1, 3) for x in (cache_k, values))
    return masked_attention(q, keys, values, mask_BTS, scale), cache_k, cache_v


def _append(cache_BKSH: jax.Array, new_BTKH: jax.Array, lengths_B: jax.Array) -> jax.Array:
    row = lambda cache, new, start: jax.lax.dynamic_update_slice(cache, new, (0, start, 0))
    new_BKTH = new_BTKH.transpose(0, 2, 1, 3).astype(cache_BKSH.dtype)
    return jax.vmap(row)(cache_BKSH, new_BKTH, lengths_B)


_IMPLEMENTATIONS = {"xla": (("cpu", "gpu", "cuda", "rocm", "tpu"), _xla)}
