"""Attention of a few new positions over a key/value cache; rotary embedding and append inside.

Letters: L layers, B batch, T new positions (1 to a few, or a chunk of a prompt), S slots of the
cache, N query heads, K key/value heads, H head dimension. The cache holds the rotated keys of all
layers as [L, B, K, S, H]: a head's keys lie together, as they are read. It goes in and out whole,
so that a layer's call changes it in place and nothing of it is copied.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels import dispatch
from pallas_kernels.rotary_attention import Rope, _check, _check_numbers, rotate


def rotary_decode_attention(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    cache_k_LBKSH: jax.Array,
    cache_v_LBKSH: jax.Array,
    layer: jax.Array | int,
    lengths_B: jax.Array,
    rope: Rope,
    *,
    scale: float | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Append T new keys and values to one layer's cache at each row's length; attend over the live.

    New position t of row b has index and rotary position ``lengths_B[b] + t``, and sees indices 0
    to its own. The caller keeps ``lengths_B + T <= S``, which is an error only where lengths are
    known: not inside jit. Slots beyond a row's new positions may hold
    anything: they change no output. A row with fewer than T real new positions has them first; what
    follows them is written beyond its length, dead until it is overwritten.

    Args:
      q_BTNH, k_BTKH, v_BTKH: new queries, keys and values before rotation, one floating dtype.
      cache_k_LBKSH, cache_v_LBKSH: rotated keys, and values; of each row, positions 0 to
        lengths_B - 1 are live. Donate them, or carry them through a loop, to have them changed in
        place.
      layer: int32 scalar, which layer of the cache.
      lengths_B: int32, live positions of each row before this call.
      rope, scale, implementation: as in :func:`rotary_attention`.

    Returns:
      out_BTNH in q's dtype, and the two caches with the new positions in place. Scores, softmax and
      sums are float32.

    Raises:
      ValueError: shapes or dtypes that do not fit together, known lengths or a known layer that are
        not in the cache, or an unknown implementation.
      NotImplementedError: the implementation named cannot do this.
    """
    if q_BTNH.ndim != 4 or k_BTKH.ndim != 4 or q_BTNH.shape[:2] != k_BTKH.shape[:2]:
        raise ValueError(
            "want q [B,T,N,H] and k, v [B,T,K,H] of the same new positions; "
            f"got q {q_BTNH.shape}, k {k_BTKH.shape}"
        )
    B, T, K, H = k_BTKH.shape
    _check_numbers("lengths_B", lengths_B, (B,))
    _check_numbers("layer", layer, ())
    positions_BT = lengths_B[:, None] + jnp.arange(q_BTNH.shape[1], dtype=lengths_B.dtype)
    _check(q_BTNH, k_BTKH, v_BTKH, positions_BT, rope)
    shape = cache_k_LBKSH.shape
    if shape != cache_v_LBKSH.shape or len(shape) != 5 or shape[1:3] + shape[4:] != (B, K, H):
        raise ValueError(
            f"caches must be [L, {B}, {K}, S, {H}]; got {shape}, {cache_v_LBKSH.shape}"
        )
    if cache_k_LBKSH.dtype != cache_v_LBKSH.dtype:
        raise ValueError(
            f"caches must share one dtype; got {cache_k_LBKSH.dtype}, {cache_v_LBKSH.dtype}"
        )
    if shape[3] < T:
        raise ValueError(f"{T} new positions do not fit a cache of {shape[3]}")
    _check_within("lengths_B", lengths_B, shape[3] - T, f"{T} new positions in {shape[3]} slots")
    _check_within("layer", layer, shape[0] - 1, f"{shape[0]} layers")
    return dispatch.call(
        "rotary_decode_attention", _IMPLEMENTATIONS, implementation,
        q_BTNH, k_BTKH, v_BTKH, cache_k_LBKSH, cache_v_LBKSH,
        jnp.asarray(layer, jnp.int32), lengths_B, rope,
        scale if scale is not None else H**-0.5,
    )  # fmt: skip


def _check_within(name: str, x, most: int, why: str) -> None:
    """Where the values are known: inside jit they are not, nor all of them on one of many hosts."""
    if isinstance(x, jax.core.Tracer) or not getattr(x, "is_fully_addressable", True):
        return
    x = np.asarray(x)
    if ((x < 0) | (x > most)).any():
        raise ValueError(f"{name} must be from 0 to {most} ({why}); got {x.tolist()}")


BLOCK = 128
"""Slots that the reference reads at a time."""


def _xla(q, k, v, cache_k, cache_v, layer, lengths, rope, scale):
    """The reference: block after block of slots, as far as the longest row, with a running maximum
    (online softmax, arXiv 1805.02867)."""
    B, T, N, H = q.shape
    K, S = cache_k.shape[2:4]
    positions = lengths[:, None] + jnp.arange(T, dtype=lengths.dtype)
    q, k = rotate(q, positions, rope), rotate(k, positions, rope)
    cache_k, cache_v = (
        _append(cache, new, layer, lengths) for cache, new in ((cache_k, k), (cache_v, v))
    )
    q_BKGTH = q.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)
    size = min(BLOCK, S)
    dot = lambda equation, a, b: jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)

    def block(i, carry):
        most, total, out = carry
        start = jnp.minimum(i * size, S - size)  # the last block ends where the cache does,
        slots = start + jnp.arange(size)
        fresh = slots >= i * size  # and may begin in the one before
        keys, values = (
            lax.dynamic_slice(c, (layer, 0, 0, start, 0), (1, B, K, size, H))[0].astype(q.dtype)
            for c in (cache_k, cache_v)
        )
        # Dead slots may hold anything, NaN too: a weight of zero would not silence a NaN value.
        live_BS = fresh & (slots < lengths[:, None] + T)
        values = jnp.where(live_BS[:, None, :, None], values, 0)
        # Keys on the left: on the right, XLA's CPU compiler would turn all of them.
        scores = dot("BKSH,BKGTH->BKSGT", keys, q_BKGTH).transpose(0, 1, 3, 4, 2)
        seen_BTS = fresh & (slots <= positions[:, :, None])
        scores = jnp.where(seen_BTS[:, None, None], scores * scale, -jnp.inf)
        higher = jnp.maximum(most, jnp.max(scores, axis=-1, keepdims=True))
        weights, shrink = jnp.exp(scores - higher), jnp.exp(most - higher)
        total = total * shrink + jnp.sum(weights, axis=-1, keepdims=True)
        out = out * shrink + dot("BKGTS,BKSH->BKGTH", weights.astype(q.dtype), values)
        return higher, total, out

    blank = jnp.zeros_like(q_BKGTH, jnp.float32)
    start = blank[..., :1] - jnp.inf, blank[..., :1], blank
    blocks = (jnp.max(lengths) + T + size - 1) // size
    _, total, out = lax.fori_loop(0, blocks, block, start)
    out = (out / total).transpose(0, 3, 1, 2, 4).reshape(q.shape)
    return out.astype(q.dtype), cache_k, cache_v


def _append(cache_LBKSH, new_BTKH, layer, lengths_B):
    """A loop over rows: the scatter that vmap makes of it has XLA's CPU compiler copy the cache."""
    new_BKTH = new_BTKH.transpose(0, 2, 1, 3).astype(cache_LBKSH.dtype)
    lengths_B = jnp.asarray(lengths_B)

    def row(b, cache):
        new = lax.dynamic_slice_in_dim(new_BKTH, b, 1)[None]
        return lax.dynamic_update_slice(cache, new, (layer, b, 0, lengths_B[b], 0))

    return lax.fori_loop(0, new_BTKH.shape[0], row, cache_LBKSH)


# Pallas is imported where it is used: it takes a second.


def _tpu(*args):
    from pallas_kernels.rotary_decode_attention_tpu import tpu

    return tpu(*args)


def _gpu(*args):
    from pallas_kernels.rotary_decode_attention_gpu import gpu

    return gpu(*args)


_IMPLEMENTATIONS = {
    "tpu": (("tpu",), _tpu),
    "gpu": (("gpu", "cuda"), _gpu),
    "xla": (("cpu", "gpu", "cuda", "rocm", "tpu"), _xla),
}
