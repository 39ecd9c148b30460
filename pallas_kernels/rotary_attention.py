"""Attention with rotary embedding: public function, reference implementation and dispatch.

Letters: B batch, T query positions, S key positions, N query heads, K key/value heads, G = N // K,
H head dimension. The rotation is that of RoFormer (arXiv 2104.09864) with the pairs (i, i + H/2),
as in GPT-NeoX and Hugging Face; grouped queries as in arXiv 2305.13245.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels import dispatch


class Rope(NamedTuple):
    """A rotary embedding: pair i is rotated by the angle position * inv_freq_H2[i], then scaled.

    Example::

      rope = Rope(10000.0 ** (-jnp.arange(0, H, 2) / H), 1.0)
    """

    inv_freq_H2: jax.Array
    """[H // 2] float32, radians per position"""
    scale: jax.Array | float
    """factor on rotated queries and on rotated keys; 1 except for yarn"""


def rotary_attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    positions_BT: jax.Array,
    rope: Rope,
    *,
    kv_positions_BS: jax.Array | None = None,
    segment_ids_BT: jax.Array | None = None,
    kv_segment_ids_BS: jax.Array | None = None,
    q_offset: jax.Array | int = 0,
    causal: bool = True,
    scale: float | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Softmax attention with rotary embedding; differentiable in q, k and v.

    Args:
      q_BTNH: queries before rotation, float32, bfloat16 or float16.
      k_BSKH: keys before rotation; K divides N, and query head n reads key head n // G.
      v_BSKH: values.
      positions_BT: int32 rotary positions of the queries, of any value.
      rope: frequencies, see :class:`Rope`.
      kv_positions_BS: int32 rotary positions of the keys; default: ``positions_BT`` (S = T).
      segment_ids_BT: int32; a query attends only to keys with its segment id (packed documents;
        padding has its own id). Default: no segments.
      kv_segment_ids_BS: segment ids of the keys; default: ``segment_ids_BT`` (S = T).
      q_offset: index of query 0 among the keys, for a shard of a longer sequence.
      causal: query t attends to key s only if s <= t + q_offset, by index, not by position.
      scale: factor on the scores; default: H ** -0.5.
      implementation: "tpu", "cudnn", "gpu", "mosaic" or "xla"; default: the first of them, in this
        order, that runs on the platform and supports the arguments. cuDNN precedes our GPU kernels,
        whose speed has not been measured. On a CPU, kernels run in Pallas' interpreters.

    Returns:
      [B, T, N, H] in q's dtype; scores, softmax and sums are float32. The output of a fully masked
      query is zero. Masked keys and values must be finite: they may enter a product with weight 0.

    Raises:
      ValueError: shapes or dtypes do not match, or the implementation is unknown.
      NotImplementedError: the named implementation does not support the arguments.
    """
    _check(q_BTNH, k_BSKH, v_BSKH, positions_BT, rope)
    _check_numbers("q_offset", q_offset, ())
    if kv_positions_BS is None:
        if k_BSKH.shape[1] != q_BTNH.shape[1]:
            raise ValueError(
                f"{k_BSKH.shape[1]} keys for {q_BTNH.shape[1]} queries: "
                "pass kv_positions_BS when S and T differ"
            )
        kv_positions_BS = positions_BT
    if kv_segment_ids_BS is None:
        kv_segment_ids_BS = segment_ids_BT
    if (segment_ids_BT is None) != (kv_segment_ids_BS is None):
        raise ValueError(
            "kv_segment_ids_BS without segment_ids_BT: pass the segment ids of the queries too"
        )
    _check_numbers("kv_positions_BS", kv_positions_BS, k_BSKH.shape[:2])
    if segment_ids_BT is not None:
        _check_numbers("segment_ids_BT", segment_ids_BT, q_BTNH.shape[:2])
        _check_numbers("kv_segment_ids_BS", kv_segment_ids_BS, k_BSKH.shape[:2])
    return dispatch.call(
        "rotary_attention", _IMPLEMENTATIONS, implementation,
        q_BTNH, k_BSKH, v_BSKH, positions_BT, kv_positions_BS, rope,
        segment_ids_BT, kv_segment_ids_BS, q_offset, causal,
        scale if scale is not None else q_BTNH.shape[-1] ** -0.5,
    )  # fmt: skip


def rotate(x_BTNH: jax.Array, positions_BT: jax.Array, rope: Rope) -> jax.Array:
    """Rotates each pair (i, i + H/2) by the angle position * inv_freq[i].

    Args:
      x_BTNH: queries or keys.
      positions_BT: int32.
      rope: frequencies and scale.

    Returns:
      [B, T, N, H] in x's dtype, computed in float32.
    """
    # float32: beyond position 256, rounding to bfloat16 changes the angle by a radian or more.
    angle_BT1h = (positions_BT.astype(jnp.float32)[..., None] * rope.inv_freq_H2)[:, :, None]
    cos, sin = jnp.cos(angle_BT1h) * rope.scale, jnp.sin(angle_BT1h) * rope.scale
    a, b = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BTNH.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def masked_attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    mask_BTS: jax.Array | None,
    scale: float,
) -> jax.Array:
    """Grouped-query softmax attention with a boolean mask, computed in float32.

    The backward pass recomputes the scores from q, k, v, the output and the log-sum-exp, as
    FlashAttention does (arXiv 2205.14135).

    Args:
      q_BTNH: queries.
      k_BSKH: keys.
      v_BSKH: values.
      mask_BTS: True where a query attends to a key; B may be 1. None: everywhere.
      scale: factor on the scores.
    """
    return _masked_attention_forward(q_BTNH, k_BSKH, v_BSKH, mask_BTS, scale)[0]


def _masked_attention_forward(q_BTNH, k_BSKH, v_BSKH, mask_BTS, scale):
    q, k, v = _rows(q_BTNH, k_BSKH), _rows(k_BSKH, k_BSKH), _rows(v_BSKH, k_BSKH)
    scores = _scores(q, k, mask_BTS, scale, q_BTNH.shape[0])
    # All scores of a fully masked query are -inf; with a finite m, exp gives 0 instead of NaN.
    m = jnp.maximum(jnp.max(scores, axis=-1, keepdims=True), jnp.finfo(jnp.float32).min)
    weights = jnp.exp(scores - m).astype(v.dtype)
    # The sum of the weights is computed as one more column of the product with the values, which
    # saves a pass over the scores.
    v_and_one = jnp.concatenate([v, jnp.ones((*v.shape[:-1], 1), v.dtype)], axis=-1)
    out, l = jnp.split(_dot("brs,bsh->brh", weights, v_and_one), [v.shape[-1]], axis=-1)
    l = jnp.where(l == 0, 1, l)
    out_BTNH = _unrows(out / l, q_BTNH.shape).astype(q_BTNH.dtype)
    out_BTNH, lse = checkpoint_name((out_BTNH, m + jnp.log(l)), "attention")
    return out_BTNH, (q_BTNH, k_BSKH, v_BSKH, mask_BTS, out_BTNH, lse)


def _masked_attention_backward(scale, residuals, d_out_BTNH):
    q_BTNH, k_BSKH, v_BSKH, mask_BTS, out_BTNH, lse = residuals
    rows = functools.partial(_rows, k_BSKH=k_BSKH)
    q, k, v, out, d_out = rows(q_BTNH), rows(k_BSKH), rows(v_BSKH), rows(out_BTNH), rows(d_out_BTNH)
    weights = jnp.exp(_scores(q, k, mask_BTS, scale, q_BTNH.shape[0]) - lse)
    # Equals the row sums of weights * d_weights, without a pass over [T, S].
    delta = jnp.sum(out.astype(jnp.float32) * d_out, axis=-1, keepdims=True)
    d_scores = (weights * (_dot("brh,bsh->brs", d_out, v) - delta) * scale).astype(q.dtype)
    d_q = _dot("brs,bsh->brh", d_scores, k)
    d_k = _dot("brs,brh->bsh", d_scores, q)
    d_v = _dot("brs,brh->bsh", weights.astype(q.dtype), d_out)
    grads = zip((d_q, d_k, d_v), (q_BTNH, k_BSKH, v_BSKH), strict=True)
    return *(_unrows(d, x.shape).astype(x.dtype) for d, x in grads), None


masked_attention.defvjp(_masked_attention_forward, _masked_attention_backward)


def _scores(q, k, mask_BTS, scale, B):
    scores = _dot("brh,bsh->brs", q, k) * scale
    if mask_BTS is None:
        return scores
    T, S = mask_BTS.shape[1:]
    per_head = scores.reshape(B, -1, T, S)
    return jnp.where(mask_BTS[:, None], per_head, -jnp.inf).reshape(scores.shape)


def _rows(x_BTNH, k_BSKH):
    """[B, T, N, H] -> [B * K, G * T, H]: one matrix product per key head."""
    B, T, N, H = x_BTNH.shape
    K = k_BSKH.shape[2]
    return x_BTNH.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4).reshape(B * K, N // K * T, H)


def _unrows(x, shape):
    B, T, N, H = shape
    return x.reshape(B, N, T, H).transpose(0, 2, 1, 3)


def _dot(equation, a, b):
    return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)


BLOCK, MAX_BLOCKS = 128, 8
"""On a CPU: least number of queries that the reference reads at a time, and most such blocks"""


def _xla(q, k, v, positions, kv_positions, rope, segments, kv_segments, q_offset, causal, scale):
    """The reference: exact, with all scores of a block of queries [T, S] in memory.

    On a CPU, causal attention leaves out keys that are after the last query of a block.
    """
    q, k = rotate(q, positions, rope), rotate(k, kv_positions, rope)
    T, S = q.shape[1], k.shape[1]
    blocked = causal and isinstance(q_offset, int) and dispatch.platform() == "cpu"
    size = BLOCK * max(1, -(-T // (BLOCK * MAX_BLOCKS))) if blocked else T

    def block(start):
        stop = min(start + size, T)
        keys = max(1, min(stop + q_offset, S)) if blocked else S
        mask = None
        if causal:
            t, s = jnp.arange(start, stop), jnp.arange(keys)
            mask = (s[None, :] <= t[:, None] + q_offset)[None]
        if segments is not None:
            same = segments[:, start:stop, None] == kv_segments[:, None, :keys]
            mask = same if mask is None else mask & same
        return masked_attention(q[:, start:stop], k[:, :keys], v[:, :keys], mask, scale)

    blocks = [block(start) for start in range(0, T, size)]
    return blocks[0] if len(blocks) == 1 else jnp.concatenate(blocks, axis=1)


def _check(q, k, v, positions, rope) -> None:
    if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape:
        raise ValueError(
            "expected q [B,T,N,H] and k, v [B,S,K,H] of one shape; "
            f"got q {q.shape}, k {k.shape}, v {v.shape}"
        )
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(f"q {q.shape} and k {k.shape} must agree in B (axis 0) and H (axis 3)")
    if 0 in (*q.shape, *k.shape) or q.shape[3] % 2:
        raise ValueError(
            f"expected no empty axis and an even H (axis 3); got q {q.shape}, k {k.shape}"
        )
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"{q.shape[2]} query heads are not a multiple of {k.shape[2]} key heads")
    floating = (jnp.float32, jnp.bfloat16, jnp.float16)
    if not (q.dtype == k.dtype == v.dtype) or q.dtype not in floating:
        raise ValueError(
            f"q, k, v must share one floating dtype; got {q.dtype}, {k.dtype}, {v.dtype}"
        )
    _check_numbers("positions_BT", positions, q.shape[:2])
    if rope.inv_freq_H2.shape != (q.shape[3] // 2,):
        raise ValueError(
            f"rope.inv_freq_H2 must have shape ({q.shape[3] // 2},); got {rope.inv_freq_H2.shape}"
        )


def _check_numbers(name: str, x, shape: tuple[int, ...]) -> None:
    if jnp.shape(x) != shape or not jnp.issubdtype(jnp.result_type(x), jnp.integer):
        raise ValueError(
            f"{name} must be integers of shape {shape}; got {jnp.result_type(x)} {jnp.shape(x)}"
        )


# Pallas takes a second to import, so it is imported only where it is used.


def _cudnn(*args):
    from pallas_kernels.rotary_attention_cudnn import cudnn

    return cudnn(*args)


def _gpu(*args):
    from pallas_kernels.rotary_attention_gpu import gpu

    return gpu(*args)


def _mosaic(*args):
    from pallas_kernels.rotary_attention_mosaic import mosaic

    return mosaic(*args)


def _tpu(*args):
    from pallas_kernels.rotary_attention_tpu import tpu

    return tpu(*args)


_IMPLEMENTATIONS = {
    "tpu": (("tpu",), _tpu),
    "cudnn": (("gpu", "cuda"), _cudnn),
    "gpu": (("gpu", "cuda"), _gpu),
    "mosaic": (("gpu", "cuda"), _mosaic),
    "xla": (("cpu", "gpu", "cuda", "rocm", "tpu"), _xla),
}
