"""Decode attention: appends new keys and values to a cache and attends to all of it.

Letters: L layers, B batch, T new positions (one, a few, or a chunk of a prompt), S length of the
cache, N query heads, K key/value heads, H head dimension. The cache holds the rotated keys of all
layers as [L, B, K, S, H], in which the keys of a head are contiguous. Calls take and return the
whole cache, so that it is updated in place without copies.

A paged cache is a pool of P pages, [L, P, K, page, H]. A table, ``pages_BM``, has the pages of each
row in order: page ``pages_BM[b, m]`` has positions m * page to (m + 1) * page - 1 of row b. Rows
may share pages that they only read. Page 0 belongs to no row: rows with length 0 and a table of
zeros write to it.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels import dispatch
from pallas_kernels.rotary_attention import Rope, _check, _check_numbers, rotate

Scales = tuple[jax.Array, jax.Array]
"""Scales of the keys and of the values of int8 caches, [L, B, K, S] each."""
SCALE_DTYPE = jnp.bfloat16


def rotary_decode_attention(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    cache_k_LBKSH: jax.Array,
    cache_v_LBKSH: jax.Array,
    layer: jax.Array | int,
    lengths_B: jax.Array,
    rope: Rope,
    scales: Scales | None = None,
    *,
    pages_BM: jax.Array | None = None,
    scale: float | None = None,
    implementation: str | None = None,
) -> tuple[Any, ...]:
    """Appends T keys and values to one layer of a cache and attends to its valid positions.

    New position t of row b has index and rotary position ``lengths_B[b] + t`` and attends to the
    indices up to its own. The caller ensures ``lengths_B + T <= S``; this is checked only outside
    jit, where the lengths are known. Positions beyond the new ones may hold any data, even NaN,
    without effect. A row with fewer than T real new positions has padding after them; it
    is written beyond the row's new length and overwritten later.

    Args:
      q_BTNH: new queries before rotation.
      k_BTKH: new keys before rotation, in the dtype of the queries.
      v_BTKH: new values.
      cache_k_LBKSH: rotated keys; positions 0 to ``lengths_B - 1`` of each row are valid. Updated
        in place if donated or carried through a loop.
      cache_v_LBKSH: values, likewise.
      layer: int32 scalar, the layer of the cache.
      lengths_B: int32, number of valid positions of each row before this call.
      rope: frequencies, see :class:`Rope`.
      scales: of the keys and values of int8 caches, see :func:`quantize_rows`.
      pages_BM: int32, the table of a paged cache; the caches are then pools [L, P, K, page, H], the
        scales [L, P, K, page], T is at most ``page``, and S is M * ``page``. New positions that are
        padding beyond the table are written to page 0.
      scale: factor on the scores; default: H ** -0.5.
      implementation: "tpu_prefill" or "gpu_prefill" (many tokens of one row), "tpu", "gpu",
        "mosaic" or "xla", chosen as in :func:`rotary_attention`.

    Returns:
      [B, T, N, H] in q's dtype, and the two updated caches; with ``scales``, also those. Scores,
      softmax and sums are float32.

    Raises:
      ValueError: shapes or dtypes do not match, known lengths or a known layer are out of range, or
        the implementation is unknown.
      NotImplementedError: the named implementation does not support the arguments.
    """
    if q_BTNH.ndim != 4 or k_BTKH.ndim != 4 or q_BTNH.shape[:2] != k_BTKH.shape[:2]:
        raise ValueError(
            "expected q [B,T,N,H] and k, v [B,T,K,H] of the same new positions; "
            f"got q {q_BTNH.shape}, k {k_BTKH.shape}"
        )
    B, T, K, H = k_BTKH.shape
    _check_numbers("lengths_B", lengths_B, (B,))
    _check_numbers("layer", layer, ())
    positions_BT = lengths_B[:, None] + jnp.arange(q_BTNH.shape[1], dtype=lengths_B.dtype)
    _check(q_BTNH, k_BTKH, v_BTKH, positions_BT, rope)
    S = _check_caches(cache_k_LBKSH, cache_v_LBKSH, (B, T, K, H), pages_BM)
    _check_scales(cache_k_LBKSH, scales)
    _check_within("lengths_B", lengths_B, S - T, f"{T} new positions in a cache of length {S}")
    num_layers = cache_k_LBKSH.shape[0]
    _check_within("layer", layer, num_layers - 1, f"{num_layers} layers")
    out = dispatch.call(
        "rotary_decode_attention", _IMPLEMENTATIONS, implementation,
        q_BTNH, k_BTKH, v_BTKH, cache_k_LBKSH, cache_v_LBKSH, scales,
        jnp.asarray(layer, jnp.int32), lengths_B, rope,
        scale if scale is not None else H**-0.5, pages_BM,
    )  # fmt: skip
    return out if scales is not None else out[:3]


def fused_decode_attention(
    qkv_PBTMH: jax.Array,
    cache_k_LBKSH: jax.Array,
    cache_v_LBKSH: jax.Array,
    layer: jax.Array,
    lengths_B: jax.Array,
    rope: Rope,
    dtype: jnp.dtype,
    scales: Scales | None = None,
    *,
    pages_BM: jax.Array | None = None,
    implementation: str | None = None,
) -> tuple[Any, ...]:
    """:func:`rotary_decode_attention` of the result of one product with fused matrices q, k, v.

    The GPU kernel adds the partial sums and selects q, k and v itself, without further launches.

    Args:
      qkv_PBTMH: P partial sums of the N queries, K keys and K values, M = N + 2 K. Rows beyond
        those of ``lengths_B`` are ignored.
      cache_k_LBKSH: rotated keys.
      cache_v_LBKSH: values.
      layer: int32 scalar.
      lengths_B: int32, number of valid positions of each row before this call.
      rope: frequencies.
      dtype: that the sums are rounded to, and of the result.
      scales: of int8 caches.
      pages_BM: int32, the table of a paged cache.
      implementation: "gpu" or "xla".

    Returns:
      As :func:`rotary_decode_attention`.
    """
    out = dispatch.call(
        "fused_decode_attention", _FUSED, implementation,
        qkv_PBTMH, cache_k_LBKSH, cache_v_LBKSH, scales, layer, lengths_B, rope,
        qkv_PBTMH.shape[-1] ** -0.5, pages_BM, dtype,
    )  # fmt: skip
    return out if scales is not None else out[:3]


def quantize_rows(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Vectors [..., H] as int8, and their bfloat16 scales [...]: x = integers * scale.

    Symmetric: scale = max(abs(x)) / 127.
    """
    x = x.astype(jnp.float32)
    scale = scale_of(jnp.max(jnp.abs(x), axis=-1))
    return to_int8(x, scale[..., None]), scale


def scale_of(largest: jax.Array) -> jax.Array:
    """The scale of a vector whose largest magnitude this is; 1 if all are zero."""
    return jnp.where(largest == 0, 1, largest * (1 / 127)).astype(SCALE_DTYPE)


def to_int8(x: jax.Array, scale: jax.Array) -> jax.Array:
    """round(x / scale). The scale is rounded before, so that its error is not added."""
    return jnp.clip(jnp.floor(x / scale.astype(jnp.float32) + 0.5), -127, 127).astype(jnp.int8)


def _check_caches(cache_k, cache_v, sizes, pages_BM) -> int:
    """Checks the caches for new positions of these sizes; returns the positions of a row."""
    (B, T, K, H), shape, rows = sizes, cache_k.shape, sizes[0] if pages_BM is None else "P"
    same_rows = len(shape) == 5 and (pages_BM is not None or shape[1] == B)
    if shape != cache_v.shape or not same_rows or shape[2::2] != (K, H):
        raise ValueError(f"caches must be [L, {rows}, {K}, S, {H}]; got {shape}, {cache_v.shape}")
    if cache_k.dtype != cache_v.dtype:
        raise ValueError(f"caches must share one dtype; got {cache_k.dtype}, {cache_v.dtype}")
    if shape[3] < T:
        where = "a cache of length" if pages_BM is None else "one page, which has length"
        raise ValueError(f"{T} new positions do not fit in {where} {shape[3]}")
    if pages_BM is None:
        return shape[3]
    if pages_BM.ndim != 2:
        raise ValueError(f"pages_BM must be [{B}, M]; got {pages_BM.shape}")
    _check_numbers("pages_BM", pages_BM, (B, pages_BM.shape[1]))
    _check_within("pages_BM", pages_BM, shape[1] - 1, f"a pool of {shape[1]} pages")
    return shape[3] * pages_BM.shape[1]


def _check_scales(cache_k, scales):
    if (cache_k.dtype == jnp.int8) != (scales is not None):
        raise ValueError(
            f"int8 caches, and no others, have scales; got {cache_k.dtype} caches "
            f"{'with' if scales is not None else 'without'} scales"
        )
    if scales is not None and any(x.shape != cache_k.shape[:4] for x in scales):
        raise ValueError(
            f"scales of caches {cache_k.shape} must be {cache_k.shape[:4]}; "
            f"got {', '.join(str(x.shape) for x in scales)}"
        )


def _check_within(name: str, x, maximum: int, why: str) -> None:
    """Checks values if they are known: not inside jit, and not if on other hosts' devices."""
    if isinstance(x, jax.core.Tracer) or not getattr(x, "is_fully_addressable", True):
        return
    x = np.asarray(x)
    if ((x < 0) | (x > maximum)).any():
        raise ValueError(f"{name} must be from 0 to {maximum} ({why}); got {x.tolist()}")


BLOCK = 128
"""positions that the reference reads at a time"""
FEW = 8
"""new positions from which the reference multiplies the other way round"""


def _xla(q, k, v, cache_k, cache_v, scales, layer, lengths, rope, scale, pages=None):
    """The reference: online softmax (arXiv 1805.02867) over blocks, up to the longest row."""
    B, T, N, H = q.shape
    K, S = cache_k.shape[2:4]
    positions = lengths[:, None] + jnp.arange(T, dtype=lengths.dtype)
    q, k = rotate(q, positions, rope), rotate(k, positions, rope)
    append = functools.partial(_append, layer=layer, lengths_B=lengths, pages_BM=pages)
    if scales is not None:
        (k, k_scale), (v, v_scale) = quantize_rows(k), quantize_rows(v)
        scales = append(scales[0], k_scale), append(scales[1], v_scale)
    cache_k, cache_v = append(cache_k, k), append(cache_v, v)
    q_BKGTH = q.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)
    size = min(BLOCK, S) if pages is None or S <= BLOCK else math.gcd(S, BLOCK)
    dot = lambda equation, a, b: jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)

    def block(i, carry):
        m, l, acc = carry
        if pages is None:
            start = jnp.minimum(i * size, S - size)  # the last block ends with the cache
            read = lambda cache: _block(cache, layer, start, size)
        else:
            start = i * size
            read = lambda cache: _paged_block(cache, layer, start, size, pages)
        indices = start + jnp.arange(size)
        fresh = indices >= i * size  # and may overlap the one before
        keys, values = (read(c).astype(q.dtype) for c in (cache_k, cache_v))
        # Invalid values may be NaN, and 0 * NaN is NaN.
        valid_BS = fresh & (indices < lengths[:, None] + T)
        values = jnp.where(valid_BS[:, None, :, None], values, 0)
        if T < FEW:
            # Keys on the left: on the right, XLA's CPU compiler would transpose them.
            scores = dot("BKSH,BKGTH->BKSGT", keys, q_BKGTH).transpose(0, 1, 3, 4, 2)
        else:  # transposing the scores would take longer
            scores = dot("BKGTH,BKSH->BKGTS", q_BKGTH, keys)
        if scales is not None:
            k_scale, v_scale = (read(c)[:, :, None, None] for c in scales)
            scores = scores * k_scale
        visible_BTS = fresh & (indices <= positions[:, :, None])
        scores = jnp.where(visible_BTS[:, None, None], scores * scale, -jnp.inf)
        m_new = jnp.maximum(m, jnp.max(scores, axis=-1, keepdims=True))
        weights, alpha = jnp.exp(scores - m_new), jnp.exp(m - m_new)
        l = l * alpha + jnp.sum(weights, axis=-1, keepdims=True)
        if scales is not None:
            weights = weights * jnp.where(valid_BS[:, None, None, None], v_scale, 0)
        acc = acc * alpha + dot("BKGTS,BKSH->BKGTH", weights.astype(q.dtype), values)
        return m_new, l, acc

    blank = jnp.zeros_like(q_BKGTH, jnp.float32)
    start = blank[..., :1] - jnp.inf, blank[..., :1], blank
    blocks = (jnp.max(lengths) + T + size - 1) // size
    _, l, acc = lax.fori_loop(0, blocks, block, start)
    out = (acc / l).transpose(0, 3, 1, 2, 4).reshape(q.shape)
    return out.astype(q.dtype), cache_k, cache_v, scales


def _block(cache_LBKS, layer, start, size):
    """Positions of one layer, [B, K, size, ...]."""
    _, B, K, _, *H = cache_LBKS.shape
    at = (layer, 0, 0, start, *[0] * len(H))
    return lax.dynamic_slice(cache_LBKS, at, (1, B, K, size, *H))[0]


def _paged_block(pool_LPKS, layer, start, size, pages_BM):
    """Positions of one layer that lie in one page of each row, [B, K, size, ...]."""
    _, _, K, page, *H = pool_LPKS.shape
    ids_B = lax.dynamic_index_in_dim(pages_BM, start // page, 1, keepdims=False)
    at = lambda page_id: (layer, page_id, 0, start % page, *[0] * len(H))
    read = lambda page_id: lax.dynamic_slice(pool_LPKS, at(page_id), (1, 1, K, size, *H))[0, 0]
    return jax.vmap(read)(ids_B)


def _xla_fused(qkv, cache_k, cache_v, scales, layer, lengths, rope, scale, pages, dtype):
    B, K = len(lengths), cache_k.shape[2]
    N = qkv.shape[3] - 2 * K
    total = jnp.sum(qkv[:, :B], axis=0, dtype=jnp.float32).astype(dtype)
    q, k, v = jnp.split(total, (N, N + K), axis=2)
    return _xla(q, k, v, cache_k, cache_v, scales, layer, lengths, rope, scale, pages)


def _append(cache_LBKSH, new_BTKH, layer, lengths_B, pages_BM=None):
    """Writes the new positions row by row: for a scatter, XLA on CPU would copy the cache."""
    new_BKTH = new_BTKH.swapaxes(1, 2).astype(cache_LBKSH.dtype)  # or scales, without H
    lengths_B = jnp.asarray(lengths_B)
    if pages_BM is not None:
        return _append_to_pages(cache_LBKSH, new_BKTH, layer, lengths_B, jnp.asarray(pages_BM))
    zeros = [0] * (cache_LBKSH.ndim - 4)

    def row(b, cache):
        new = lax.dynamic_slice_in_dim(new_BKTH, b, 1)[None]
        return lax.dynamic_update_slice(cache, new, (layer, b, 0, lengths_B[b], *zeros))

    return lax.fori_loop(0, len(new_BKTH), row, cache_LBKSH)


def _append_to_pages(pool_LPKSH, new_BKTH, layer, lengths_B, pages_BM):
    """Writes the new positions of each row, which lie in at most two pages."""
    page, zeros = pool_LPKSH.shape[3], [0] * (pool_LPKSH.ndim - 4)
    B, _, T = new_BKTH.shape[:3]
    pages_BM = jnp.pad(pages_BM, ((0, 0), (0, 1)))  # beyond the table: page 0
    index_T = jnp.arange(T).reshape(T, *[1] * len(zeros))
    # Several positions are windows of T positions in both pages, in which old ones are written
    # again. A step writes one window: with two, XLA's CPU compiler copies the pool if B is 1.
    windows = 1 if T == 1 else 2

    def write(i, pool):
        b, w = i // windows, i % windows
        m, at = lengths_B[b] // page, lengths_B[b] % page
        new = lax.dynamic_slice_in_dim(new_BKTH, b, 1)[None]
        in_next = jnp.maximum(at + T - page, 0)
        start = layer, pages_BM[b, m + w], 0, jnp.where(w == 0, at - in_next, 0), *zeros
        if T > 1:
            old = lax.dynamic_slice(pool, start, new.shape)
            is_new = (index_T >= in_next) == (w == 0)
            new = jnp.where(is_new, jnp.roll(new, in_next, axis=3), old)
        return lax.dynamic_update_slice(pool, new, start)

    return lax.fori_loop(0, windows * B, write, pool_LPKSH)


# Pallas takes a second to import, so it is imported only where it is used.


def _without_scales(function, q, k, v, cache_k, cache_v, scales, *args):
    if scales is not None:
        raise NotImplementedError(
            "an int8 cache: only the implementations 'gpu' and 'xla' support it"
        )
    return (*function(q, k, v, cache_k, cache_v, *args), None)


def _tpu(*args):
    from pallas_kernels.rotary_decode_attention_tpu import tpu

    return _without_scales(tpu, *args)


def _mosaic(*args):
    from pallas_kernels.rotary_decode_attention_mosaic import mosaic

    if args[-1] is not None:
        raise NotImplementedError("the Mosaic GPU kernel does not support a paged cache")
    return _without_scales(mosaic, *args[:-1])


def _gpu(*args):
    from pallas_kernels.rotary_decode_attention_gpu import gpu

    return gpu(*args)


def _gpu_fused(*args):
    from pallas_kernels.rotary_decode_attention_gpu import gpu_fused

    return gpu_fused(*args)


def _tpu_prefill(*args):
    from pallas_kernels.rotary_attention_tpu import tpu
    from pallas_kernels.rotary_prefill_attention import prefill

    return _without_scales(functools.partial(prefill, tpu), *args)


def _gpu_prefill(*args):
    from pallas_kernels.rotary_attention_gpu import gpu
    from pallas_kernels.rotary_prefill_attention import prefill

    return _without_scales(functools.partial(prefill, gpu), *args)


_IMPLEMENTATIONS = {
    "tpu_prefill": (("tpu",), _tpu_prefill),
    "gpu_prefill": (("gpu", "cuda"), _gpu_prefill),
    "tpu": (("tpu",), _tpu),
    "gpu": (("gpu", "cuda"), _gpu),
    "mosaic": (("gpu", "cuda"), _mosaic),
    "xla": (("cpu", "gpu", "cuda", "rocm", "tpu"), _xla),
}
_FUSED = {
    "gpu": (("gpu", "cuda"), _gpu_fused),
    "xla": (_IMPLEMENTATIONS["xla"][0], _xla_fused),
}
