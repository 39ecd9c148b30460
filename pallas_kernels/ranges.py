"""Where a block of an attention kernel must look, worked out by XLA before the kernel runs."""

import jax
import jax.numpy as jnp


def ranges(
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
    """int32 [B, blocks, 4] of (start, clear, masked, stop), counted in blocks of the other side.

    Exact about order. About documents, blocks whose ranges of ids do not meet are left out, which
    is exact where ids rise along the sequence, and never too little where they do not.

    Args:
      of: "q": for a block of queries, the blocks of keys that any of them may see are within start
        to stop, and all of them see all of clear to masked. "k": the same of queries that see a
        block of keys.
      shape: (B, T, S), multiples of the blocks.
      keys: keys from here on are padding, seen by nobody.
      causal, offset: query t sees key s only if s <= t + offset.
      q_ids_BT, k_ids_BS: a query sees keys of its own id only.
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
    clear = jnp.min(jnp.where(every, index, stop[..., None]), axis=2)
    masked = ~every & (index >= clear[..., None])
    masked = jnp.min(jnp.where(masked, index, stop[..., None]), axis=2)
    found = jnp.stack([start, clear, masked, stop], axis=2)
    return jnp.broadcast_to(found, (B, *found.shape[1:]))
