"""Rotary attention for NVIDIA GPUs in Pallas (Triton), forward and backward: FlashAttention-2
(arXiv 2307.08691).

jax 0.11.0 deprecated Pallas' Triton lowering, which "will be removed in a future version". With a
jax that lacks it, these kernels raise NotImplementedError. They will be deleted when Mosaic GPU
kernels have been measured to be as fast on a device.

Queries are rotated in float32 when a block of them is loaded. Keys are rotated by XLA beforehand:
rotating them in the kernel, again for every block of queries, took 46 to 61% more instructions.
Gradients are rotated back in float32 before rounding, those of keys by XLA.

XLA computes for each block the range of blocks to visit and those that need no mask
(`block_ranges`), so other documents are skipped.

Letters as in `rotary_attention`; h = H // 2. Where a kernel rotates, the two halves of a head are
separate arrays, because the rotation pairs them and Triton cannot slice an array in registers.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl

from pallas_kernels import dispatch
from pallas_kernels.ranges import block_ranges
from pallas_kernels.rotary_attention import Rope, rotate

try:
    from jax.experimental.pallas import triton as plt
except ImportError:  # a later jax
    plt = None  # type: ignore[assignment]

MASK_VALUE = float(jnp.finfo(jnp.float32).min)


class Blocks(NamedTuple):
    """Block sizes of queries and keys, warps per program, and pipeline stages."""

    q: int
    k: int
    warps: int
    stages: int


class KernelConfig(NamedTuple):
    """Compile-time constants of the kernels besides shapes."""

    causal: bool
    scale: float
    keys: int
    """number of keys; the rest is padding"""
    forward: Blocks
    d_q: Blocks
    d_kv: Blocks


def gpu(q, k, v, positions, kv_positions, rope, segments, kv_segments, q_offset, causal, scale):
    """`rotary_attention` in Pallas, with positional arguments."""
    check_triton()
    T, S, H = q.shape[1], k.shape[1], q.shape[3]
    if H not in (32, 64, 128):
        raise NotImplementedError(f"head_dim {H}: the GPU kernels support 32, 64 and 128")
    if q.dtype not in (jnp.float32, jnp.bfloat16):
        raise NotImplementedError(f"{q.dtype}: the GPU kernels support float32 and bfloat16")
    config = KernelConfig(causal, scale, S, *blocks(H, q.dtype, T, S))
    bq = math.lcm(*(b.q for b in config[3:]))
    bk = math.lcm(*(b.k for b in config[3:]))
    inputs = q, k, v, positions, kv_positions, rope, segments, kv_segments, q_offset
    return _padded_call(functools.partial(_attention, config), bq, bk, *inputs)


def _padded_call(
    attention, bq, bk, q, k, v, positions, kv_positions, rope, segments, kv_segments, q_offset
):
    """Calls ``attention`` with lengths padded to whole blocks; returns the real queries' output."""
    if segments is not None:
        segments, kv_segments = _pad(segments, bq, "edge"), _pad(kv_segments, bk, "edge")
    out = attention(
        _pad(q, bq), _pad(k, bk), _pad(v, bk), _pad(positions, bq), _pad(kv_positions, bk),
        rope, segments, kv_segments, jnp.asarray(q_offset, jnp.int32).reshape(1),
    )  # fmt: skip
    return out[:, : q.shape[1]]


def check_triton() -> None:
    """Raises NotImplementedError if this jax has no Triton lowering of Pallas."""
    if plt is None:
        raise NotImplementedError(
            f"jax {jax.__version__} has no Triton lowering of Pallas, which the GPU kernels need"
        )


def blocks(H: int, dtype, T: int, S: int) -> tuple[Blocks, Blocks, Blocks]:
    """Block sizes for the forward kernel, the gradient of q, and the gradients of k and v.

    Estimated, not measured. The limit is 255 registers per thread in a program of 8 warps. In
    float32, the forward kernel holds an output [bq, H] and scores [bq, bk]; the gradient of q needs
    a second array of scores, and the gradients of k and v two outputs [bk, H]. For H = 128 and
    bfloat16, ptxas for sm_90a reports at most 248, 200 and 255 registers and no spills. From 4096
    keys on, the forward kernel loads 128 at a time: half as many rescalings, and still one program
    per multiprocessor. With bq = 64 in the forward kernel, keys would be read faster than an H100's
    L2 bandwidth. Float32 does not use tensor cores. A block is at most as long as the sequence
    rounded up to a power of 2, and at least 16, the smallest size of a tensor core.

    Args:
      H: head dimension.
      dtype: of q, k and v.
      T: number of queries.
      S: number of keys.
    """
    if dtype == jnp.float32:
        table = Blocks(64, 32, 8, 2), Blocks(32, 32, 8, 2), Blocks(32, 32, 8, 2)
    else:
        table = (
            Blocks(128, 128, 8, 2)
            if H == 128 and S >= 4096
            else Blocks(128, 64, 8 if H == 128 else 4, 3),
            Blocks(128, 64, 8, 2),
            Blocks(64, 128, 8, 2),
        )
    fit = lambda block, n: min(block, max(16, pl.next_power_of_2(n)))
    return tuple(b._replace(q=fit(b.q, T), k=fit(b.k, S)) for b in table)  # type: ignore[return-value]


# The custom_vjp -----------------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(config, *args):
    return _forward(config, *args)[0]


def _forward(config, *args):
    q, k, v, positions, kv_positions, rope, segments, kv_segments, offset = args
    cos_sin = _cos_sin(positions, rope)
    ranges = _ranges(config, config.forward, q, k, segments, kv_segments, offset, "q")
    out, lse = _call_forward(
        config, ranges, q, rotate(k, kv_positions, rope), v, cos_sin, segments, kv_segments, offset
    )
    out, lse = checkpoint_name((out, lse), "attention")
    return out, (*args, out, lse)


def _backward(config, residuals, d_out):
    q, k, v, positions, kv_positions, rope, segments, kv_segments, offset, out, lse = residuals
    # Equals the row sums of weights * d_weights, without a pass over [T, S].
    delta_BNT = jnp.einsum("btnh,btnh->bnt", out, d_out, preferred_element_type=jnp.float32)
    # As in the forward kernel: rotated and scaled in float32, rounded once.
    factor = config.scale * math.log2(math.e)
    rotated = rotate(q.astype(jnp.float32), positions, rope)
    inputs = (
        (rotated * factor).astype(q.dtype), rotate(k, kv_positions, rope), v, d_out, lse,
        delta_BNT,
    )  # fmt: skip
    ranges = _ranges(config, config.d_q, q, k, segments, kv_segments, offset, "q")
    d_q = _call_d_q(
        config, ranges, *inputs, _cos_sin(positions, rope), segments, kv_segments, offset
    )
    ranges = _ranges(config, config.d_kv, q, k, segments, kv_segments, offset, "k")
    d_k, d_v = _call_d_kv(config, ranges, *inputs, segments, kv_segments, offset)
    d_k = rotate(jnp.sum(d_k, axis=0), -kv_positions, rope).astype(k.dtype)
    return d_q, d_k, jnp.sum(d_v, axis=0).astype(v.dtype), *(None,) * 6


_attention.defvjp(_forward, _backward)


def _cos_sin(positions, rope: Rope):
    """[B, T, h] each, float32."""
    angle = positions.astype(jnp.float32)[..., None] * rope.inv_freq_H2
    return jnp.cos(angle) * rope.scale, jnp.sin(angle) * rope.scale


def _pad(x, multiple: int, mode: str = "constant"):
    """Pads axis 1 to a multiple."""
    more = -x.shape[1] % multiple
    return jnp.pad(x, [(0, more if i == 1 else 0) for i in range(x.ndim)], mode) if more else x  # type: ignore[arg-type]


def _ranges(config: KernelConfig, block: Blocks, q, k, segments, kv_segments, offset, of: str):
    """`block_ranges` for the block sizes of one kernel."""
    shape = q.shape[0], q.shape[1], k.shape[1]
    return block_ranges(
        of, block.q, block.k, shape, config.keys, config.causal, offset, segments, kv_segments
    )


# Inside the kernels -------------------------------------------------------------------------------


def _dot(a, b, trans_b=False):
    """Matrix product accumulated in float32; float32 inputs are not rounded to TF32."""
    exact = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return plt.dot(a, b, trans_b=trans_b, precision=exact)


def for_each_block(range_ref, step, carry):
    """Folds step(is_partial, block, carry) over the range: partial blocks, full ones, partial.

    Args:
      range_ref: start, full_start, full_stop and stop of the range.
      step: function of (is_partial, block, carry), which returns the carry.
      carry: its first value.
    """
    start, full_start, full_stop, stop = (range_ref[n] for n in range(4))
    carry = lax.fori_loop(start, full_start, functools.partial(step, True), carry)
    carry = lax.fori_loop(full_start, full_stop, functools.partial(step, False), carry)
    return lax.fori_loop(full_stop, stop, functools.partial(step, True), carry)


def _mask(scores, config: KernelConfig, offset_ref, t, s, q_ids, k_ids):
    """Scores with -inf where query t does not attend to key s."""
    visible = s < config.keys
    if config.causal:
        visible &= s <= t + offset_ref[0]
    if q_ids is not None:
        visible &= q_ids == k_ids
    return jnp.where(visible, scores, -jnp.inf)


def _forward_kernel(
    offset_ref, range_ref, q_ref, k_ref, v_ref, cos_ref, sin_ref, q_ids_ref, k_ids_ref,
    out_ref, lse_ref, *, config,
):  # fmt: skip
    bq, bk = config.forward[:2]
    H = q_ref.shape[1]
    h, dtype = H // 2, k_ref.dtype
    # The last block starts first: with a causal mask it has the most keys and takes longest.
    t = (pl.num_programs(0) - 1 - pl.program_id(0)) * bq + jnp.arange(bq)[:, None]
    a, b = q_ref[:, :h].astype(jnp.float32), q_ref[:, h:].astype(jnp.float32)
    cos, sin = cos_ref[...], sin_ref[...]
    # exp2 is the hardware instruction; the factor log2(e) goes into the queries.
    factor = config.scale * math.log2(math.e)
    rotated_a = ((a * cos - b * sin) * factor).astype(dtype)
    rotated_b = ((b * cos + a * sin) * factor).astype(dtype)
    q_ids = None if q_ids_ref is None else q_ids_ref[...][:, None]

    def step(is_partial, j, carry):
        acc, m, l = carry
        rows = pl.ds(j * bk, bk)
        scores = _dot(rotated_a, k_ref[rows, :h], True) + _dot(rotated_b, k_ref[rows, h:], True)
        if is_partial:
            s = j * bk + jnp.arange(bk)[None, :]
            k_ids = None if k_ids_ref is None else k_ids_ref[rows][None, :]
            scores = _mask(scores, config, offset_ref, t, s, q_ids, k_ids)
        m_new = jnp.maximum(m, jnp.max(scores, axis=1))
        weights = jnp.exp2(scores - m_new[:, None])
        alpha = jnp.exp2(m - m_new)
        acc = acc * alpha[:, None] + _dot(weights.astype(dtype), v_ref[rows, :])
        return acc, m_new, l * alpha + jnp.sum(weights, axis=1)

    # m starts finite: in a fully masked row, exp2(-inf - m) is 0 instead of NaN.
    m = jnp.full((bq,), MASK_VALUE, jnp.float32)
    carry = jnp.zeros((bq, H), jnp.float32), m, jnp.zeros((bq,), jnp.float32)
    acc, m, l = for_each_block(range_ref, step, carry)
    l = jnp.where(l == 0, 1, l)
    out_ref[...] = (acc / l[:, None]).astype(out_ref.dtype)
    lse_ref[...] = m + jnp.log2(l)


def _rotate_inverse(a, b, cos, sin, out_ref):
    """Writes the two float32 halves of a head, rotated by the negative angle."""
    h = cos.shape[1]
    out_ref[:, :h] = (a * cos + b * sin).astype(out_ref.dtype)
    out_ref[:, h:] = (b * cos - a * sin).astype(out_ref.dtype)


def _d_q_kernel(
    offset_ref, range_ref, q_ref, k_ref, v_ref, d_out_ref, lse_ref, delta_ref, cos_ref,
    sin_ref, q_ids_ref, k_ids_ref, d_q_ref, *, config,
):  # fmt: skip
    bq, bk = config.d_q[:2]
    h, dtype = q_ref.shape[1] // 2, k_ref.dtype
    t = (pl.num_programs(0) - 1 - pl.program_id(0)) * bq + jnp.arange(bq)[:, None]
    a, b, d_out = q_ref[:, :h], q_ref[:, h:], d_out_ref[...]
    lse, delta = lse_ref[...][:, None], delta_ref[...][:, None]
    q_ids = None if q_ids_ref is None else q_ids_ref[...][:, None]

    def step(is_partial, j, carry):
        d_a, d_b = carry
        rows = pl.ds(j * bk, bk)
        k_a, k_b = k_ref[rows, :h], k_ref[rows, h:]
        scores = _dot(a, k_a, True) + _dot(b, k_b, True)
        if is_partial:
            s = j * bk + jnp.arange(bk)[None, :]
            k_ids = None if k_ids_ref is None else k_ids_ref[rows][None, :]
            scores = _mask(scores, config, offset_ref, t, s, q_ids, k_ids)
        weights = jnp.exp2(scores - lse)
        d_scores = (weights * (_dot(d_out, v_ref[rows, :], True) - delta)).astype(dtype)
        return d_a + _dot(d_scores, k_a), d_b + _dot(d_scores, k_b)

    zeros = jnp.zeros((bq, h), jnp.float32)
    d_a, d_b = for_each_block(range_ref, step, (zeros, zeros))
    scale = config.scale
    _rotate_inverse(d_a * scale, d_b * scale, cos_ref[...], sin_ref[...], d_q_ref)


def _d_kv_kernel(
    offset_ref, range_ref, q_ref, k_ref, v_ref, d_out_ref, lse_ref, delta_ref,
    q_ids_ref, k_ids_ref, d_k_ref, d_v_ref, *, config,
):  # fmt: skip
    """Gradients of rotated keys and of values, summed over the query heads of q_ref.

    The heads are not split in halves: with two arrays for each of q, k and d_k, ptxas spilled up to
    200 bytes per thread.
    """
    bq, bk = config.d_kv[:2]
    heads, H = q_ref.shape[1:]
    dtype = k_ref.dtype
    s = pl.program_id(0) * bk + jnp.arange(bk)[:, None]
    k, v = k_ref[...], v_ref[...]
    k_ids = None if k_ids_ref is None else k_ids_ref[...][:, None]

    def head(g, carry):
        def step(is_partial, i, carry):
            d_k, d_v = carry
            rows = pl.ds(i * bq, bq)
            q, d_out = q_ref[rows, g, :], d_out_ref[rows, g, :]
            # Scores with keys as rows, so the products below need no transpose.
            scores = _dot(k, q, True)
            if is_partial:
                t = i * bq + jnp.arange(bq)[None, :]
                q_ids = None if q_ids_ref is None else q_ids_ref[rows][None, :]
                scores = _mask(scores, config, offset_ref, t, s, q_ids, k_ids)
            # At most 1; rounding differs from the forward kernel, which adds two products.
            weights = jnp.exp2(jnp.minimum(scores - lse_ref[g, rows][None, :], 0))
            d_v += _dot(weights.astype(dtype), d_out)
            d_weights = _dot(v, d_out, True) - delta_ref[g, rows][None, :]
            d_scores = (weights * d_weights).astype(dtype)
            return d_k + _dot(d_scores, q), d_v

        return for_each_block(range_ref, step, carry)

    zeros = jnp.zeros((bk, H), jnp.float32)
    d_k, d_v = lax.fori_loop(0, heads, head, (zeros, zeros))
    # q includes the scale and log2(e); the product with ln(2) removes the latter.
    d_k_ref[...] = d_k * math.log(2)
    d_v_ref[...] = d_v.astype(d_v_ref.dtype)


# Calls of the kernels -----------------------------------------------------------------------------


def _compiled(kernel, config: KernelConfig, block: Blocks, name: str, **kwargs: Any):
    return pl.pallas_call(
        functools.partial(kernel, config=config),
        compiler_params=plt.CompilerParams(num_warps=block.warps, num_stages=block.stages),
        interpret=dispatch.platform() == "cpu",
        name=name,
        **kwargs,
    )


def _by_query(block: Blocks, T: int, S: int, G: int, H: int, segmented: bool):
    """Block specs by name, for a grid of (block of queries, query head, batch row)."""
    at = lambda i: T // block.q - 1 - i
    return dict(
        offset=pl.BlockSpec((1,), lambda i, n, b: (0,)),
        range=pl.BlockSpec((None, None, 4), lambda i, n, b: (b, at(i), 0)),
        q=pl.BlockSpec((None, block.q, None, H), lambda i, n, b: (b, at(i), n, 0)),
        k=pl.BlockSpec((None, S, None, H), lambda i, n, b: (b, 0, lax.div(n, G), 0)),
        row=pl.BlockSpec((None, None, block.q), lambda i, n, b: (b, n, at(i))),
        cos=pl.BlockSpec((None, block.q, H // 2), lambda i, n, b: (b, at(i), 0)),
        q_ids=pl.BlockSpec((None, block.q), lambda i, n, b: (b, at(i))) if segmented else None,
        k_ids=pl.BlockSpec((None, S), lambda i, n, b: (b, 0)) if segmented else None,
    )


def _call_forward(config, ranges, q, k, v, cos_sin, segments, kv_segments, offset):
    (B, T, N, H), (_, S, K, _) = q.shape, k.shape
    block = config.forward
    spec = _by_query(block, T, S, N // K, H, segments is not None)
    names = ("offset", "range", "q", "k", "k", "cos", "cos", "q_ids", "k_ids")
    return _compiled(
        _forward_kernel, config, block, "rotary_attention_forward",
        grid=(T // block.q, N, B),
        in_specs=[spec[name] for name in names],
        out_specs=[spec["q"], spec["row"]],
        out_shape=[
            jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct((B, N, T), jnp.float32)
        ],
    )(offset, ranges, q, k, v, *cos_sin, segments, kv_segments)  # fmt: skip


def _call_d_q(config, ranges, q, k, v, d_out, lse, delta, cos_sin, segments, kv_segments, offset):
    (B, T, N, H), (_, S, K, _) = q.shape, k.shape
    block = config.d_q
    spec = _by_query(block, T, S, N // K, H, segments is not None)
    names = ("offset", "range", "q", "k", "k", "q", "row", "row", "cos", "cos", "q_ids", "k_ids")
    return _compiled(
        _d_q_kernel, config, block, "rotary_attention_d_q",
        grid=(T // block.q, N, B),
        in_specs=[spec[name] for name in names],
        out_specs=spec["q"],
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
    )(
        offset, ranges, q, k, v, d_out, lse, delta, *cos_sin, segments, kv_segments
    )  # fmt: skip


def query_head_parts(programs: int, G: int) -> int:
    """Into how many parts the G query heads of a key head are divided in the gradients of k and v.

    One program for each block of keys leaves an H100 (132 multiprocessors, one program each) idle
    with one key head per device.

    Args:
      programs: number of programs with one part.
      G: query heads per key head.

    Returns:
      The smallest divisor of G with at least 132 programs, or else G.
    """
    return next(n for n in range(1, G + 1) if G % n == 0 and (n * programs >= 132 or n == G))


def _call_d_kv(config, ranges, q, k, v, d_out, lse, delta, segments, kv_segments, offset):
    """Gradients of rotated keys (float32) and of values, to be summed over axis 0."""
    (B, T, N, H), (_, S, K, _) = q.shape, k.shape
    block, G, segmented = config.d_kv, N // K, segments is not None
    parts = query_head_parts(S // block.k * K * B, G)
    # Grid: (block of keys, key head and part of its query heads, batch row).
    heads = pl.BlockSpec((None, T, G // parts, H), lambda j, n, b: (b, 0, n, 0))
    keys = pl.BlockSpec((None, block.k, None, H), lambda j, n, b: (b, j, lax.div(n, parts), 0))
    row = pl.BlockSpec((None, G // parts, T), lambda j, n, b: (b, n, 0))
    out = pl.BlockSpec(
        (None, None, block.k, None, H),
        lambda j, n, b: (lax.rem(n, parts), b, j, lax.div(n, parts), 0),
    )
    return _compiled(
        _d_kv_kernel, config, block, "rotary_attention_d_kv",
        grid=(S // block.k, K * parts, B),
        in_specs=[
            pl.BlockSpec((1,), lambda j, n, b: (0,)),
            pl.BlockSpec((None, None, 4), lambda j, n, b: (b, j, 0)),
            heads, keys, keys, heads, row, row,
            pl.BlockSpec((None, T), lambda j, n, b: (b, 0)) if segmented else None,
            pl.BlockSpec((None, block.k), lambda j, n, b: (b, j)) if segmented else None,
        ],
        out_specs=[out, out],
        out_shape=[
            jax.ShapeDtypeStruct((parts, *k.shape), jnp.float32),
            jax.ShapeDtypeStruct((parts, *v.shape), jnp.float32 if parts > 1 else v.dtype),
        ],
    )(offset, ranges, q, k, v, d_out, lse, delta, segments, kv_segments)  # fmt: skip
