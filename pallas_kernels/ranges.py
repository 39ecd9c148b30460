"""Ranges of blocks that attention kernels visit, computed by XLA before the kernel runs."""

import jax
import jax.numpy as jnp


def block_ranges(
    of: str,
    block_q: int,
    block_k: int,
    shape: tuple[int, int, int],
    keys: int,
    causal: bool,
    offset: jax.Array | int,
    q_ids_BT: jax.Array | None,
    k_ids_BS: jax.Array | None,
) -> jax.Array:
    """For each block of queries the range of key blocks to visit, or the other way round.

    The causal bound is exact. With segment ids, blocks are skipped if their ranges of ids do not
    overlap: exact for ids that increase along the sequence, otherwise some fully masked blocks are
    visited.

    Args:
      of: "q": ranges of key blocks for each block of queries. "k": ranges of query blocks for each
        block of keys.
      block_q: queries per block.
      block_k: keys per block.
      shape: (B, T, S), multiples of the block sizes.
      keys: number of keys; the rest of S is padding.
      causal: query t attends to key s only if s <= t + offset.
      offset: see ``causal``.
      q_ids_BT: segment ids of the queries, or None.
      k_ids_BS: segment ids of the keys, or None.

    Returns:
      int32 [B, blocks, 4] of (start, full_start, full_stop, stop). Blocks outside start to stop are
      fully masked; in those from full_start to full_stop nothing is masked.
    """
    B, T, S = shape
    first_q = jnp.arange(0, T, block_q)[None, :, None]
    first_k = jnp.arange(0, S, block_k)[None, None, :]
    last_q, last_k = first_q + block_q - 1, first_k + block_k - 1
    some = first_k + 0 * first_q < keys
    every = last_k + 0 * first_q < keys
    if causal:
        some &= first_k <= last_q + offset
        every &= last_k <= first_q + offset
    if q_ids_BT is not None and k_ids_BS is not None:
        q_ids, k_ids = q_ids_BT.reshape(B, -1, block_q), k_ids_BS.reshape(B, -1, block_k)
        q_low, q_high = q_ids.min(2)[:, :, None], q_ids.max(2)[:, :, None]
        k_low, k_high = k_ids.min(2)[:, None], k_ids.max(2)[:, None]
        some &= (q_low <= k_high) & (k_low <= q_high)
        every &= (q_low == q_high) & (k_low == k_high) & (q_low == k_low)
    if of == "k":
        some, every = some.swapaxes(1, 2), every.swapaxes(1, 2)
    n = some.shape[2]
    index = jnp.arange(n, dtype=jnp.int32)
    stop = jnp.max(jnp.where(some, index + 1, 0), axis=2)
    start = jnp.minimum(jnp.min(jnp.where(some, index, n), axis=2), stop)
    full_start = jnp.min(jnp.where(every, index, stop[..., None]), axis=2)
    partial = ~every & (index >= full_start[..., None])
    full_stop = jnp.min(jnp.where(partial, index, stop[..., None]), axis=2)
    ranges = jnp.stack([start, full_start, full_stop, stop], axis=2)
    return jnp.broadcast_to(ranges, (B, *ranges.shape[1:]))
