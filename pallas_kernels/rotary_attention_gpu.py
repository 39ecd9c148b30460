"""Rotary attention for NVIDIA GPUs, in Pallas through Triton: forward and backward.

Queries are turned where a block of them is loaded, in float32, once; keys are turned by XLA in one
pass before: inside the loop each key would be turned again for every block of queries, which was
46 to 61% more instructions. Gradients are turned back in float32 before they are rounded.

The method is FlashAttention-2's (arXiv 2307.08691). What a block need not look at (keys after it,
other documents) and where it need not mask is worked out beforehand by XLA, as four numbers a block
(`ranges`), so that documents before a block's own cost nothing.

Letters as in `rotary_attention`; h = H // 2. A head is worked on in its two halves, because that is
how the rotation pairs it and Triton cannot cut an array that is in registers.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels import dispatch
from pallas_kernels.ranges import ranges
from pallas_kernels.rotary_attention import Rope, rotate

LOWEST = float(jnp.finfo(jnp.float32).min)


class Blocks(NamedTuple):
    """Queries and keys a program works on at a time, warps, and loads in flight."""

    q: int
    k: int
    warps: int
    stages: int


class Setting(NamedTuple):
    """What a kernel is compiled for, besides its shapes."""

    causal: bool
    scale: float
    keys: int
    """how many keys there are; those beyond are padding"""
    forward: Blocks
    d_q: Blocks
    d_kv: Blocks


def gpu(q, k, v, positions, kv_positions, rope, segments, kv_segments, q_offset, causal, scale):
    """`rotary_attention` in Pallas; arguments as its front door passes them."""
    T, S, H = q.shape[1], k.shape[1], q.shape[3]
    if H not in (32, 64, 128):
        raise NotImplementedError(f"head_dim {H}: the GPU kernels have 32, 64 and 128")
    if q.dtype not in (jnp.float32, jnp.bfloat16):
        raise NotImplementedError(f"{q.dtype}: the GPU kernels have float32 and bfloat16")
    setting = Setting(causal, scale, S, *blocks(H, q.dtype, T, S))
    bq = math.lcm(*(b.q for b in setting[3:]))
    bk = math.lcm(*(b.k for b in setting[3:]))
    if segments is not None:
        segments, kv_segments = _pad(segments, bq, "edge"), _pad(kv_segments, bk, "edge")
    out = _attention(
        setting, _pad(q, bq), _pad(k, bk), _pad(v, bk), _pad(positions, bq), _pad(kv_positions, bk),
        rope, segments, kv_segments, jnp.asarray(q_offset, jnp.int32).reshape(1),
    )  # fmt: skip
    return out[:, :T]


def blocks(H: int, dtype, T: int, S: int) -> tuple[Blocks, Blocks, Blocks]:
    """Block sizes of the forward pass, of the queries' gradient and of the keys'.

    Computed, not measured. A program of 8 warps has 255 registers a thread, and they decide: the
    forward pass holds an output of bq * H and scores of bq * bk in float32, the queries' gradient
    the same and a second array of scores, the keys' gradient two outputs of bk * H each. NVIDIA's
    assembler for sm_90a says, for H 128 in bfloat16, with documents: 207, 196 and 255 registers,
    of which the last spills 47 (none at bq 32, but so narrow a product reads shared memory for
    longer than it computes). Queries by 128 and not by 64: at 64 the keys would be read from L2
    faster than an H100 can. Float32 is computed without tensor cores. A block is no longer than its
    sequence, and no shorter than the 16 rows that a tensor core takes.
    """
    if dtype == jnp.float32:
        table = Blocks(64, 32, 8, 2), Blocks(32, 32, 8, 2), Blocks(32, 32, 8, 2)
    else:
        table = (
            Blocks(128, 64, 8 if H == 128 else 4, 3),
            Blocks(128, 64, 8, 2),
            Blocks(64, 128, 8, 2),
        )
    fit = lambda block, n: min(block, max(16, pl.next_power_of_2(n)))
    return tuple(b._replace(q=fit(b.q, T), k=fit(b.k, S)) for b in table)  # type: ignore[return-value]


# The differentiable whole -------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(setting, q, k, v, positions, kv_positions, rope, segments, kv_segments, offset):
    return _forward(setting, q, k, v, positions, kv_positions, rope, segments, kv_segments, offset)[
        0
    ]


def _forward(setting, q, k, v, positions, kv_positions, rope, segments, kv_segments, offset):
    cos_sin = _cos_sin(positions, rope)
    where = _ranges(setting, setting.forward, q, k, segments, kv_segments, offset, "q")
    out, log_total = _call_forward(
        setting, where, q, rotate(k, kv_positions, rope), v, cos_sin, segments, kv_segments, offset
    )
    residuals = (
        q,
        k,
        v,
        positions,
        kv_positions,
        rope,
        segments,
        kv_segments,
        offset,
        out,
        log_total,
    )
    return out, residuals


def _backward(setting, residuals, d_out):
    q, k, v, positions, kv_positions, rope, segments, kv_segments, offset, out, log_total = (
        residuals
    )
    # Equal to the row sum of weights * d_weights, without that pass over T x S.
    delta_BNT = jnp.einsum("btnh,btnh->bnt", out, d_out, preferred_element_type=jnp.float32)
    # As the forward kernel has them: turned and scaled in float32, rounded once.
    factor = setting.scale * math.log2(math.e)
    turned = rotate(q.astype(jnp.float32), positions, rope)
    inputs = (
        (turned * factor).astype(q.dtype), rotate(k, kv_positions, rope), v, d_out, log_total,
        delta_BNT,
    )  # fmt: skip
    where = _ranges(setting, setting.d_q, q, k, segments, kv_segments, offset, "q")
    d_q = _call_d_q(
        setting, where, *inputs, _cos_sin(positions, rope), segments, kv_segments, offset
    )
    where = _ranges(setting, setting.d_kv, q, k, segments, kv_segments, offset, "k")
    d_k, d_v = _call_d_kv(
        setting, where, *inputs, _cos_sin(kv_positions, rope), segments, kv_segments, offset
    )
    return d_q, d_k, d_v, *(None,) * 6


_attention.defvjp(_forward, _backward)


def _cos_sin(positions, rope: Rope):
    """[B, T, h] each, float32."""
    angle = positions.astype(jnp.float32)[..., None] * rope.inv_freq_H2
    return jnp.cos(angle) * rope.scale, jnp.sin(angle) * rope.scale


def _pad(x, multiple: int, mode: str = "constant"):
    """Axis 1 made longer, to a multiple; nothing where it is one."""
    more = -x.shape[1] % multiple
    return jnp.pad(x, [(0, more if i == 1 else 0) for i in range(x.ndim)], mode) if more else x  # type: ignore[arg-type]


def _ranges(setting: Setting, block: Blocks, q, k, segments, kv_segments, offset, of: str):
    """`ranges` for one of the kernels' blocks."""
    shape = q.shape[0], q.shape[1], k.shape[1]
    return ranges(
        of, block.q, block.k, shape, setting.keys, setting.causal, offset, segments, kv_segments
    )


# Inside the kernels -------------------------------------------------------------------------------


def _dot(a, b, trans_b=False):
    """A product into float32; float32 inputs are not rounded to TF32."""
    exact = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return plt.dot(a, b, trans_b=trans_b, precision=exact)


def _loop(range_ref, step, carry):
    """Run step(is_masked, block, carry) over a block's range: masked, clear, masked."""
    start, clear, masked, stop = (range_ref[n] for n in range(4))
    carry = lax.fori_loop(start, clear, functools.partial(step, True), carry)
    carry = lax.fori_loop(clear, masked, functools.partial(step, False), carry)
    return lax.fori_loop(masked, stop, functools.partial(step, True), carry)


def _hide(scores, setting: Setting, offset_ref, t, s, q_ids, k_ids):
    """Scores with -inf where a query at index t may not see the key at index s."""
    seen = s < setting.keys
    if setting.causal:
        seen &= s <= t + offset_ref[0]
    if q_ids is not None:
        seen &= q_ids == k_ids
    return jnp.where(seen, scores, -jnp.inf)


def _forward_kernel(
    offset_ref, range_ref, q_ref, k_ref, v_ref, cos_ref, sin_ref, q_ids_ref, k_ids_ref,
    out_ref, log_total_ref, *, setting,
):  # fmt: skip
    bq, bk = setting.forward[:2]
    H = q_ref.shape[1]
    h, dtype = H // 2, k_ref.dtype
    # The last block first: it has the most keys under a causal mask, and would be waited for.
    t = (pl.num_programs(0) - 1 - pl.program_id(0)) * bq + jnp.arange(bq)[:, None]
    a, b = q_ref[:, :h].astype(jnp.float32), q_ref[:, h:].astype(jnp.float32)
    cos, sin = cos_ref[...], sin_ref[...]
    # Exponentials are to base 2, as the hardware has them: its factor goes into the queries.
    factor = setting.scale * math.log2(math.e)
    turned_a = ((a * cos - b * sin) * factor).astype(dtype)
    turned_b = ((b * cos + a * sin) * factor).astype(dtype)
    q_ids = None if q_ids_ref is None else q_ids_ref[...][:, None]

    def step(is_masked, j, carry):
        sums, top, total = carry
        rows = pl.ds(j * bk, bk)
        scores = _dot(turned_a, k_ref[rows, :h], True) + _dot(turned_b, k_ref[rows, h:], True)
        if is_masked:
            s = j * bk + jnp.arange(bk)[None, :]
            k_ids = None if k_ids_ref is None else k_ids_ref[rows][None, :]
            scores = _hide(scores, setting, offset_ref, t, s, q_ids, k_ids)
        new_top = jnp.maximum(top, jnp.max(scores, axis=1))
        weights = jnp.exp2(scores - new_top[:, None])
        shrink = jnp.exp2(top - new_top)
        sums = sums * shrink[:, None] + _dot(weights.astype(dtype), v_ref[rows, :])
        return sums, new_top, total * shrink + jnp.sum(weights, axis=1)

    # A finite lowest value: a query that has seen nothing has exp2(-inf - lowest) = 0, not NaN.
    nothing = jnp.full((bq,), LOWEST, jnp.float32)
    carry = jnp.zeros((bq, H), jnp.float32), nothing, jnp.zeros((bq,), jnp.float32)
    sums, top, total = _loop(range_ref, step, carry)
    total = jnp.where(total == 0, 1, total)
    out_ref[...] = (sums / total[:, None]).astype(out_ref.dtype)
    log_total_ref[...] = top + jnp.log2(total)


def _turn_back(a, b, cos, sin, out_ref):
    """The rotation's transpose, of two halves in float32."""
    h = cos.shape[1]
    out_ref[:, :h] = (a * cos + b * sin).astype(out_ref.dtype)
    out_ref[:, h:] = (b * cos - a * sin).astype(out_ref.dtype)


def _d_q_kernel(
    offset_ref, range_ref, q_ref, k_ref, v_ref, d_out_ref, log_total_ref, delta_ref, cos_ref,
    sin_ref, q_ids_ref, k_ids_ref, d_q_ref, *, setting,
):  # fmt: skip
    bq, bk = setting.d_q[:2]
    h, dtype = q_ref.shape[1] // 2, k_ref.dtype
    t = (pl.num_programs(0) - 1 - pl.program_id(0)) * bq + jnp.arange(bq)[:, None]
    a, b, d_out = q_ref[:, :h], q_ref[:, h:], d_out_ref[...]
    log_total, delta = log_total_ref[...][:, None], delta_ref[...][:, None]
    q_ids = None if q_ids_ref is None else q_ids_ref[...][:, None]

    def step(is_masked, j, carry):
        d_a, d_b = carry
        rows = pl.ds(j * bk, bk)
        k_a, k_b = k_ref[rows, :h], k_ref[rows, h:]
        scores = _dot(a, k_a, True) + _dot(b, k_b, True)
        if is_masked:
            s = j * bk + jnp.arange(bk)[None, :]
            k_ids = None if k_ids_ref is None else k_ids_ref[rows][None, :]
            scores = _hide(scores, setting, offset_ref, t, s, q_ids, k_ids)
        weights = jnp.exp2(scores - log_total)
        d_scores = (weights * (_dot(d_out, v_ref[rows, :], True) - delta)).astype(dtype)
        return d_a + _dot(d_scores, k_a), d_b + _dot(d_scores, k_b)

    zeros = jnp.zeros((bq, h), jnp.float32)
    d_a, d_b = _loop(range_ref, step, (zeros, zeros))
    scale = setting.scale
    _turn_back(d_a * scale, d_b * scale, cos_ref[...], sin_ref[...], d_q_ref)


def _d_kv_kernel(
    offset_ref, range_ref, q_ref, k_ref, v_ref, d_out_ref, log_total_ref, delta_ref, cos_ref,
    sin_ref, q_ids_ref, k_ids_ref, d_k_ref, d_v_ref, *, setting,
):  # fmt: skip
    bq, bk = setting.d_kv[:2]
    G, H = q_ref.shape[1:]
    h, dtype = H // 2, k_ref.dtype
    s = pl.program_id(0) * bk + jnp.arange(bk)[:, None]
    k_a, k_b, v = k_ref[:, :h], k_ref[:, h:], v_ref[...]
    k_ids = None if k_ids_ref is None else k_ids_ref[...][:, None]

    def head(g, carry):
        def step(is_masked, i, carry):
            d_a, d_b, d_v = carry
            rows = pl.ds(i * bq, bq)
            a, b, d_out = q_ref[rows, g, :h], q_ref[rows, g, h:], d_out_ref[rows, g, :]
            # Scores with keys as rows: what follows needs no transpose.
            scores = _dot(k_a, a, True) + _dot(k_b, b, True)
            if is_masked:
                t = i * bq + jnp.arange(bq)[None, :]
                q_ids = None if q_ids_ref is None else q_ids_ref[rows][None, :]
                scores = _hide(scores, setting, offset_ref, t, s, q_ids, k_ids)
            weights = jnp.exp2(scores - log_total_ref[g, rows][None, :])
            d_v += _dot(weights.astype(dtype), d_out)
            d_weights = _dot(v, d_out, True) - delta_ref[g, rows][None, :]
            d_scores = (weights * d_weights).astype(dtype)
            return d_a + _dot(d_scores, a), d_b + _dot(d_scores, b), d_v

        return _loop(range_ref, step, carry)

    zeros = jnp.zeros((bk, h), jnp.float32)
    d_a, d_b, d_v = lax.fori_loop(0, G, head, (zeros, zeros, jnp.zeros((bk, H), jnp.float32)))
    d_v_ref[...] = d_v.astype(d_v_ref.dtype)
    # The queries came with the scale and the factor of base 2; the latter is taken out.
    ln2 = math.log(2)
    _turn_back(d_a * ln2, d_b * ln2, cos_ref[...], sin_ref[...], d_k_ref)


# Calling them -------------------------------------------------------------------------------------


def _compiled(kernel, setting: Setting, block: Blocks, name: str, **kwargs: Any):
    return pl.pallas_call(
        functools.partial(kernel, setting=setting),
        compiler_params=plt.CompilerParams(num_warps=block.warps, num_stages=block.stages),
        interpret=dispatch.platform() == "cpu",
        name=name,
        **kwargs,
    )


def _by_query(block: Blocks, T: int, S: int, G: int, H: int, segmented: bool):
    """Block specs of programs (block of queries, query head, row), by what they are for."""
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


def _call_forward(setting, where, q, k, v, cos_sin, segments, kv_segments, offset):
    (B, T, N, H), (_, S, K, _) = q.shape, k.shape
    block = setting.forward
    spec = _by_query(block, T, S, N // K, H, segments is not None)
    names = ("offset", "range", "q", "k", "k", "cos", "cos", "q_ids", "k_ids")
    return _compiled(
        _forward_kernel, setting, block, "rotary_attention_forward",
        grid=(T // block.q, N, B),
        in_specs=[spec[name] for name in names],
        out_specs=[spec["q"], spec["row"]],
        out_shape=[
            jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct((B, N, T), jnp.float32)
        ],
    )(offset, where, q, k, v, *cos_sin, segments, kv_segments)  # fmt: skip


def _call_d_q(
    setting, where, q, k, v, d_out, log_total, delta, cos_sin, segments, kv_segments, offset
):
    (B, T, N, H), (_, S, K, _) = q.shape, k.shape
    block = setting.d_q
    spec = _by_query(block, T, S, N // K, H, segments is not None)
    names = ("offset", "range", "q", "k", "k", "q", "row", "row", "cos", "cos", "q_ids", "k_ids")
    return _compiled(
        _d_q_kernel, setting, block, "rotary_attention_d_q",
        grid=(T // block.q, N, B),
        in_specs=[spec[name] for name in names],
        out_specs=spec["q"],
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
    )(
        offset, where, q, k, v, d_out, log_total, delta, *cos_sin, segments, kv_segments
    )  # fmt: skip


def _call_d_kv(
    setting, where, q, k, v, d_out, log_total, delta, cos_sin, segments, kv_segments, offset
):
    (B, T, N, H), (_, S, K, _) = q.shape, k.shape
    block, G, segmented = setting.d_kv, N // K, segments is not None
    # Programs: (block of keys, key head, row); each goes through the G heads of queries.
    heads = pl.BlockSpec((None, T, G, H), lambda j, n, b: (b, 0, n, 0))
    keys = pl.BlockSpec((None, block.k, None, H), lambda j, n, b: (b, j, n, 0))
    row = pl.BlockSpec((None, G, T), lambda j, n, b: (b, n, 0))
    cos = pl.BlockSpec((None, block.k, H // 2), lambda j, n, b: (b, j, 0))
    return _compiled(
        _d_kv_kernel, setting, block, "rotary_attention_d_kv",
        grid=(S // block.k, K, B),
        in_specs=[
            pl.BlockSpec((1,), lambda j, n, b: (0,)),
            pl.BlockSpec((None, None, 4), lambda j, n, b: (b, j, 0)),
            heads, keys, keys, heads, row, row, cos, cos,
            pl.BlockSpec((None, T), lambda j, n, b: (b, 0)) if segmented else None,
            pl.BlockSpec((None, block.k), lambda j, n, b: (b, j)) if segmented else None,
        ],
        out_specs=[keys, keys],
        out_shape=[jax.ShapeDtypeStruct(k.shape, k.dtype), jax.ShapeDtypeStruct(v.shape, v.dtype)],
    )(
        offset, where, q, k, v, d_out, log_total, delta, *cos_sin, segments, kv_segments
    )  # fmt: skip
