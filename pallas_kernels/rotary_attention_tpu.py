"""Rotary attention for TPU in Pallas (Mosaic): the forward kernel, and code shared with the
backward kernel. The algorithm is FlashAttention-2 (arXiv 2307.08691).

A program of the forward kernel holds a block of queries of one head, or of some query heads of one
key head as more rows of the products, and loops over blocks of keys.
If the keys and values of a head fit, they stay in VMEM; the keys are rotated there once per key
head and used by all G query heads. Otherwise they are streamed through VMEM in chunks, and XLA
rotates the keys beforehand. Queries are rotated when they are loaded. One backward kernel
(`rotary_attention_tpu_backward`) computes the three gradients and rotates them back in float32
before rounding.

Arrays keep the layout of the projections, [B, T, N * H], so nothing is transposed. If H = 64, two
heads share the 128 lanes of a register, which a block cannot split; then it is [B, N, T, H].

XLA computes a float32 table [B, T, H] of (cos | sin), for positions of any value, and the ranges of
blocks to visit (`block_ranges`). On a CPU the kernels run in Pallas' interpreter, for tests.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.ranges import block_ranges
from pallas_kernels.rotary_attention import Rope, rotate
from pallas_kernels.rotary_attention_tpu_sizes import LANES, idle_core, sizes

# Finite: a fully masked row computes with it, and inf - inf would be NaN.
MASK_VALUE = -0.7 * float(jnp.finfo(jnp.float32).max)


class KernelConfig(NamedTuple):
    """Compile-time constants of the kernels besides shapes."""

    causal: bool
    scale: float
    offset: int | None
    """q_offset if it is a constant, for the cost estimate"""
    T: int
    S: int
    """numbers of queries and keys; the rest is padding"""
    shares: int
    """programs on the parallel axes that divide the query heads of a key head"""
    heads: int
    """query heads of a key head that a program processes together"""
    block_q: int
    block_k: int
    forward_k: int
    """keys in VMEM at a time in the forward kernel: all, or a multiple of block_k"""
    backward_q: int
    backward_k: int
    """queries and keys in VMEM at a time in the backward kernel"""
    vmem: int
    """bytes a kernel may use"""
    interpret: bool


def tpu(q, k, v, positions, kv_positions, rope, segments, kv_segments, q_offset, causal, scale):
    """`rotary_attention` in Pallas for TPU, with positional arguments."""
    T, S, H = q.shape[1], k.shape[1], q.shape[3]
    if H not in (64, 128):
        raise NotImplementedError(f"head_dim {H}: the TPU kernels support 64 and 128")
    if q.dtype not in (jnp.float32, jnp.bfloat16):
        raise NotImplementedError(f"{q.dtype}: the TPU kernels support float32 and bfloat16")
    offset = q_offset if isinstance(q_offset, int) else None
    documents = segments is not None
    chosen = sizes(T, S, H, q.shape[2] // k.shape[2], q.dtype.itemsize, documents)
    groups = q.shape[2] // k.shape[2] // chosen[0]
    shares = 2 if groups % 2 == 0 and idle_core(q.shape[0] * k.shape[2]) else 1
    config = KernelConfig(causal, scale, offset, T, S, shares, *chosen)
    pad_q, pad_k = (
        functools.partial(_pad, config.block_q),
        functools.partial(_pad, config.block_k),
    )
    ids = None if segments is None else (pad_q(segments, "edge"), pad_k(kv_segments, "edge"))
    out = _attention(
        config, pad_q(q), pad_k(k), pad_k(v), pad_q(positions), pad_k(kv_positions), rope, ids,
        jnp.asarray(q_offset, jnp.int32).reshape(1),
    )  # fmt: skip
    return out[:, :T]


# The custom_vjp -----------------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(config, q, k, v, positions, kv_positions, rope, ids, offset):
    return _forward(config, q, k, v, positions, kv_positions, rope, ids, offset)[0]


def _forward(config, q, k, v, positions, kv_positions, rope, ids, offset):
    tables = cos_sin_table(positions, rope), cos_sin_table(kv_positions, rope)
    if config.forward_k < k.shape[1]:
        k_used, tables = rotate(k, kv_positions, rope), (tables[0], None)
    else:
        k_used = k
    q_k_v = tuple(map(to_kernel_layout, (q, k_used, v)))
    out, lse = _call(config, q.shape[3], q_k_v, tables, ids, offset)
    out, lse = checkpoint_name((out, lse), "attention")
    out = from_kernel_layout(out, q.shape)
    return out, (q, k, v, positions, kv_positions, rope, ids, offset, out, lse)


def _backward(config, residuals, d_out):
    from pallas_kernels.rotary_attention_tpu_backward import backward

    return *backward(config, residuals, d_out), *(None,) * 5


_attention.defvjp(_forward, _backward)


def cos_sin_table(positions, rope: Rope):
    """float32 [B, T, H]: cos in the first half of H and sin in the second, times ``rope.scale``."""
    angle = positions.astype(jnp.float32)[..., None] * rope.inv_freq_H2
    return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1) * rope.scale


def _pad(multiple: int, x, mode: str = "constant"):
    more = -x.shape[1] % multiple
    return jnp.pad(x, [(0, more if i == 1 else 0) for i in range(x.ndim)], mode) if more else x  # type: ignore[arg-type]


# Layout and block specs ---------------------------------------------------------------------------


def to_kernel_layout(x_BTNH):
    """[B, T, N, H] in the kernels' layout: [B, T, N * H] if H is 128, else [B, N, T, H]."""
    B, T, N, H = x_BTNH.shape
    return x_BTNH.reshape(B, T, N * H) if H == LANES else x_BTNH.transpose(0, 2, 1, 3)


def from_kernel_layout(x, shape):
    """The inverse of :func:`to_kernel_layout`; ``shape`` is [B, T, N, H]."""
    return x.reshape(shape) if shape[3] == LANES else x.transpose(0, 2, 1, 3)


def kernel_shape(shape):
    """The shape [B, T, N, H] in the kernels' layout."""
    B, T, N, H = shape
    return (B, T, N * H) if H == LANES else (B, N, T, H)


def head_spec(H: int, rows: int, at, heads: int | None = None):
    """Block spec of rows of a head, or of some heads for :func:`head`.

    Args:
      H: head dimension.
      rows: positions of a block.
      at: function from grid indices to (b, block, index of the head or of the group of heads).
      heads: number of heads of a block; None: one, without an axis for it.
    """

    def index(*grid):
        b, block, head = at(*grid)
        return (b, block, head) if H == LANES else (b, head, block, 0)

    block = (None, rows, (heads or 1) * H) if H == LANES else (None, heads, rows, H)
    return pl.BlockSpec(block, index)


def head(ref, n: int):
    """Head n of a block of :func:`head_spec`, as a ref [rows, H]."""
    return ref.at[:, n * LANES : (n + 1) * LANES] if len(ref.shape) == 2 else ref.at[n]


def number_spec(rows: int, at):
    """Block spec of [B, 1, T], one number per position; ``at`` maps grid indices to (b, block)."""

    def index(*grid):
        b, block = at(*grid)
        return b, 0, block

    return pl.BlockSpec((None, 1, rows), index)


# Shared by both kernels ---------------------------------------------------------------------------


def dot(a, b, contract: str):
    """Matrix product accumulated in float32: "nn" is a b, "nt" is a b^T, "tn" is a^T b."""
    a_axis, b_axis = int(contract[0] == "n"), int(contract[1] == "t")
    # Mosaic multiplies float32 in one bfloat16 pass by default.
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return lax.dot_general(
        a,
        b,
        (((a_axis,), (b_axis,)), ((), ())),
        precision=precision,
        preferred_element_type=jnp.float32,
    )


def rotate_block(x, table, inverse: bool = False):
    """Rows [rows, H] of a head, rotated by a table of (cos | sin) or its inverse, in float32."""
    h = x.shape[1] // 2
    if x.shape[1] == LANES:
        swap = lambda y: pltpu.roll(y, h, 1)
    else:
        swap = lambda y: jnp.concatenate([y[:, h:], y[:, :h]], axis=1)
    first_half = lax.broadcasted_iota(jnp.int32, x.shape, 1) < h
    swapped = swap(table)
    cos = jnp.where(first_half, table, swapped)
    sin = jnp.where(first_half, -swapped, table)
    x = x.astype(jnp.float32)
    return x * cos + swap(x) * (-sin if inverse else sin)


def rotate_all(x_ref, table_ref, out_ref, rows: int):
    """:func:`rotate_block` of a whole ref, some rows at a time."""

    def step(i, _):
        at = pl.ds(pl.multiple_of(i * rows, rows), rows)
        out_ref[at, :] = rotate_block(x_ref[at, :], table_ref[at, :]).astype(out_ref.dtype)

    lax.fori_loop(0, x_ref.shape[0] // rows, step, None)


def column(row):
    """[1, n] -> [n, LANES], each number copied to all lanes."""
    return jnp.broadcast_to(row, (LANES, row.shape[1])).T


def lanes(x, n: int):
    """[rows, LANES] with equal lanes -> [rows, n]."""
    return jnp.tile(x, (1, n // LANES)) if n >= LANES else x[:, :n]


def last_visible(config: KernelConfig, t, offset_ref):
    """Index of the last key that query t attends to."""
    if not config.causal:
        return jnp.full(t.shape, config.S - 1, jnp.int32)
    return jnp.minimum(t + offset_ref[0], config.S - 1)


def for_each_block(range_ref, at, first, n, step):
    """Calls step(is_partial, block) for the blocks in range ``at`` among n blocks from ``first``.

    The partial blocks before and after the full ones share one loop, to save code and compile time.
    """
    start, full_start, full_stop, stop = (
        jnp.clip(range_ref[at * 4 + i] - first, 0, n) for i in range(4)
    )
    lax.fori_loop(full_start, full_stop, lambda i, _: step(False, i), None)
    before = full_start - start
    either = lambda i: jnp.where(i < before, start + i, full_stop + i - before)
    lax.fori_loop(0, before + stop - full_stop, lambda i, _: step(True, either(i)), None)


def visible_pairs(config: KernelConfig) -> int:
    """Number of unmasked pairs of query and key without segments, for the cost estimate."""
    T, S = config.T, config.S
    if not config.causal or config.offset is None:
        return T * S
    # Query t attends to t + offset + 1 keys, limited to 0 .. S.
    low, high = (min(max(config.offset + t + 1, 0), S) for t in (0, T - 1))
    full_rows = max(0, T - max(0, S - config.offset))
    rising = max(0, min(T, S - config.offset) - max(0, -config.offset))
    return full_rows * S + (max(low, 1) + high) * rising // 2 if high else 0


# Forward ------------------------------------------------------------------------------------------


def _kernel(
    offset_ref, range_ref, q_ref, k_ref, v_ref, q_table_ref, k_table_ref, q_ids_ref, k_ids_ref,
    out_ref, lse_ref, q_s, k_s, q_ids_s, m_s, l_s, acc_s, *, config,
):  # fmt: skip
    b, i, g, chunk = (pl.program_id(n) for n in (0, 2, 3, 4))
    block, block_k = pl.num_programs(2) * b + i, config.block_k
    block_q, heads = config.block_q, range(config.heads)
    rows, H = q_s.shape
    if k_table_ref is not None:
        pl.when((i == 0) & (g == 0))(lambda: rotate_all(k_ref, k_table_ref, k_s, block_k))
    keys = k_ref if k_table_ref is None else k_s

    @pl.when(chunk == 0)
    def _():
        # exp2 is the hardware instruction; the factor log2(e) goes into the queries.
        factor = config.scale * math.log2(math.e)
        for n in heads:
            at = pl.ds(n * block_q, block_q)
            q = rotate_block(head(q_ref, n)[...], q_table_ref[...])
            q_s[at, :] = (q * factor).astype(q_s.dtype)
            if q_ids_ref is not None:
                q_ids_s[at, :] = column(q_ids_ref[...])
        m_s[...] = jnp.full_like(m_s, MASK_VALUE)
        l_s[...] = jnp.zeros_like(l_s)
        acc_s[...] = jnp.zeros_like(acc_s)

    def step(is_partial, j):
        at = pl.ds(pl.multiple_of(j * block_k, block_k), block_k)
        scores = dot(q_s[...], keys[at, :], "nt")
        if is_partial:
            first = chunk * k_ref.shape[0] + j * block_k
            row = lax.broadcasted_iota(jnp.int32, (rows, LANES), 0)
            t = i * block_q + (row & (block_q - 1))  # sizes of blocks are powers of 2
            last = lanes(last_visible(config, t, offset_ref) - first, block_k)
            visible = lax.broadcasted_iota(jnp.int32, scores.shape, 1) <= last
            if q_ids_ref is not None:
                visible &= lanes(q_ids_s[...], block_k) == k_ids_ref[:, at]
            scores = jnp.where(visible, scores, MASK_VALUE)
        m = m_s[...]
        m_new = jnp.maximum(m, jnp.max(scores, axis=1, keepdims=True))
        weights = jnp.exp2(scores - lanes(m_new, block_k))
        alpha = jnp.exp2(m - m_new)
        m_s[...] = m_new
        l_s[...] = l_s[...] * alpha + jnp.sum(weights, axis=1, keepdims=True)
        acc = dot(weights.astype(v_ref.dtype), v_ref[at, :], "nn")
        acc_s[...] = acc_s[...] * lanes(alpha, H) + acc

    for_each_block(
        range_ref, block, chunk * (k_ref.shape[0] // block_k), k_ref.shape[0] // block_k, step
    )

    @pl.when(chunk == pl.num_programs(4) - 1)
    def _():
        # A fully masked row has weights of 1 for masked keys: set its output to 0, and its lse so
        # large that all weights are 0 in the backward kernel.
        fully_masked = m_s[...] < MASK_VALUE / 2
        l = jnp.where(fully_masked, 1, l_s[...])
        out = jnp.where(lanes(fully_masked, H), 0, acc_s[...] / lanes(l, H))
        lse = jnp.where(fully_masked, -MASK_VALUE, m_s[...] + jnp.log2(l)).T[:1]
        for n in heads:
            at = slice(n * block_q, (n + 1) * block_q)
            head(out_ref, n)[...] = out[at].astype(out_ref.dtype)
            lse_ref[n] = lse[:, at]


def _call(config, H, q_k_v, tables, ids, offset):
    (q, k, v), (q_table, k_table) = q_k_v, tables
    (B, T), S = q_table.shape[:2], k.shape[1 if H == LANES else 2]
    count = lambda x: x.shape[2] // H if H == LANES else x.shape[1]
    N, K = count(q), count(k) * config.shares
    heads, rows, keys = config.heads, config.block_q, config.forward_k
    G = N // K // heads  # groups of heads
    ranges = block_ranges("q", rows, config.block_k, (B, T, S), config.S, config.causal, offset,
                   *(ids or (None, None)))  # fmt: skip
    of_q = head_spec(H, rows, lambda b, h, i, g, j, *_: (b, i, h * G + g), heads)
    of_k = head_spec(H, keys, lambda b, h, i, g, j, *_: (b, j, key_head(config, h)))
    table_spec = lambda n, at: pl.BlockSpec((None, n, H), at)
    number = lambda n, at: None if ids is None else number_spec(n, at)
    size, passes = q.dtype.itemsize, 1 if keys == S else T // rows * G
    moved = size * (2 * q.size + passes * 2 * k.size) + 4 * (B * N * T + B * (T + S) * H)
    scratch = [
        pltpu.VMEM((heads * rows, H), q.dtype),
        pltpu.VMEM((S if k_table is not None else 8, H), k.dtype),
        pltpu.VMEM((heads * rows if ids is not None else 8, LANES), jnp.int32),
        pltpu.VMEM((heads * rows, LANES), jnp.float32),
        pltpu.VMEM((heads * rows, LANES), jnp.float32),
        pltpu.VMEM((heads * rows, H), jnp.float32),
    ]
    lse_spec = pl.BlockSpec((None, heads, 1, rows), lambda b, h, i, g, j, *_: (b, h * G + g, 0, i))
    return pl.pallas_call(
        functools.partial(_kernel, config=config),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(B, K, T // rows, G, S // keys),
            in_specs=[
                of_q, of_k, of_k,
                table_spec(rows, lambda b, h, i, g, j, *_: (b, i, 0)),
                None if k_table is None else table_spec(S, lambda b, h, i, g, j, *_: (b, 0, 0)),
                number(rows, lambda b, h, i, g, j, *_: (b, i)),
                number(keys, lambda b, h, i, g, j, *_: (b, j)),
            ],
            out_specs=[of_q, lse_spec],
            scratch_shapes=scratch,
        ),
        out_shape=[
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((B, N, 1, T), jnp.float32),
        ],
        cost_estimate=pl.CostEstimate(
            flops=4 * H * B * N * visible_pairs(config),
            transcendentals=B * N * visible_pairs(config),
            bytes_accessed=moved,
        ),
        name="rotary_attention_forward",
        **parameters(config),
    )(offset, ranges.reshape(-1), q, k, v, q_table, k_table, *row_ids(ids))  # fmt: skip


def key_head(config: KernelConfig, h):
    """The key head of index h of the grid."""
    return h if config.shares == 1 else lax.div(h, jnp.int32(config.shares))


def row_ids(ids):
    """Segment ids [B, T] -> [B, 1, T]; None stays None."""
    return (None, None) if ids is None else tuple(x[:, None].astype(jnp.int32) for x in ids)


def parameters(config: KernelConfig) -> dict[str, Any]:
    """Arguments of both `pallas_call`s; batch rows and key heads may run on different cores."""
    return dict(
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", *("arbitrary",) * 3),
            vmem_limit_bytes=config.vmem,
        ),
        interpret=config.interpret,
    )
