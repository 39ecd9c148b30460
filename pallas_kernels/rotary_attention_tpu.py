"""Rotary attention for TPU, in Pallas through Mosaic: the forward kernel and what both share.

One program of the forward kernel holds a block of queries of one head and walks over the blocks of
keys it may see. Keys and values of a head lie in VMEM whole where they fit; the keys are then
turned there, once a key head, and used by all G query heads. Longer sequences are streamed through
VMEM in chunks of keys, turned beforehand. Queries are turned where they are loaded. The backward
kernel (`rotary_attention_tpu_backward`) is one kernel for the three gradients, turned back in
float32 before they are rounded.

Arrays stay as the projections make them, [B, T, N * H]: nothing is transposed. (With H = 64 two
heads share the 128 lanes of a register, which a block cannot cut: there it is [B, N, T, H].)

cos and sin come from a table that XLA computes, float32 [B, T, H] of (cos | sin): positions of any
value, as exact as the reference's. What a block need not look at and where it need not mask is
worked out by XLA too (`ranges`). The method is FlashAttention-2's (arXiv 2307.08691).

On a CPU the same kernels run in Pallas' interpreter: slow, for tests.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import dispatch
from pallas_kernels.ranges import ranges
from pallas_kernels.rotary_attention import Rope, rotate

LANES = 128
# Finite: a row that has seen nothing computes with it, and inf - inf would be NaN.
LOWEST = -0.7 * float(jnp.finfo(jnp.float32).max)


class Setting(NamedTuple):
    """What the kernels are compiled for, besides their shapes."""

    causal: bool
    scale: float
    offset: int | None
    """q_offset where it is known when compiling, for the estimate of cost"""
    T: int
    S: int
    """queries and keys there are; those beyond are padding"""
    block_q: int
    block_k: int
    forward_k: int
    """keys in VMEM at a time, forward; all of them, or a multiple of block_k"""
    backward_q: int
    backward_k: int
    """queries and keys in VMEM at a time, backward"""
    vmem: int
    """bytes a kernel may use"""
    interpret: bool


def tpu(q, k, v, positions, kv_positions, rope, segments, kv_segments, q_offset, causal, scale):
    """`rotary_attention` in Pallas for TPU; arguments as its front door passes them."""
    T, S, H = q.shape[1], k.shape[1], q.shape[3]
    if H not in (64, 128):
        raise NotImplementedError(f"head_dim {H}: the TPU kernels have 64 and 128")
    if q.dtype not in (jnp.float32, jnp.bfloat16):
        raise NotImplementedError(f"{q.dtype}: the TPU kernels have float32 and bfloat16")
    offset = q_offset if isinstance(q_offset, int) else None
    setting = Setting(causal, scale, offset, T, S, *sizes(T, S, H, q.dtype.itemsize))
    pad_q, pad_k = (
        functools.partial(_pad, setting.block_q),
        functools.partial(_pad, setting.block_k),
    )
    ids = None if segments is None else (pad_q(segments, "edge"), pad_k(kv_segments, "edge"))
    out = _attention(
        setting, pad_q(q), pad_k(k), pad_k(v), pad_q(positions), pad_k(kv_positions), rope, ids,
        jnp.asarray(q_offset, jnp.int32).reshape(1),
    )  # fmt: skip
    return out[:, :T]


# Sizes --------------------------------------------------------------------------------------------

_VMEM_MIB = {"TPU v5 lite": 128, "TPU v5e": 128, "TPU v6 lite": 128, "TPU v6e": 128}
"""By chip; 64 for v5p and TPU7x, and for what is not listed."""


def sizes(T: int, S: int, H: int, itemsize: int):
    """The last seven fields of :class:`Setting`.

    Blocks of 512 by 512: below that the matrix unit waits for the softmax's row statistics, above
    it the masked half of a block on the diagonal grows. A shorter block where padding to 512 would
    add more than an eighth.

    VMEM then decides how many keys (and in the backward pass queries) are held at a time. The sums
    below count each array once, those that the pipeline loads or stores twice.
    """
    block_q, block_k = _block(T), _block(S)
    T, S = T + -T % block_q, S + -S % block_k
    capacity = _VMEM_MIB.get(dispatch.device_kind(), 64) << 20
    budget = capacity * 7 // 8
    lanes = max(H, LANES)
    scores = 4 * block_q * block_k

    def forward(chunks):
        keys = S // chunks
        held = lanes * (4 * itemsize * keys + (itemsize + 8) * keys * (chunks == 1))
        return held + block_q * lanes * (5 * itemsize + 8 + 12 + 4) + 4 * scores

    def backward(chunks_q, chunks_k):
        queries, keys = T // chunks_q, S // chunks_k
        rows = 160 * (queries + keys)  # the sums of a row, ids: one number takes eight
        of_q = queries * lanes * (9 * itemsize + 8 + 4)
        of_k = keys * lanes * (9 * itemsize + 8) + S * lanes * 8
        return of_q + of_k + rows + 5 * scores

    fit_forward = [n for n in _divisors(S // block_k) if forward(n) <= budget]
    pairs = [(n, m) for n in _divisors(T // block_q) for m in _divisors(S // block_k)]
    # Fewest loads; and rather all keys at once, which are then turned in the kernel.
    pairs.sort(key=lambda pair: (pair[0] * pair[1], pair[1]))
    fit_backward = [pair for pair in pairs if backward(*pair) <= budget]
    if not fit_forward or not fit_backward:
        raise NotImplementedError(
            f"{S} keys: their float32 gradients do not fit {capacity >> 20} MiB of VMEM; "
            "split the sequence over more devices"
        )
    chunks_q, chunks_k = fit_backward[0]
    return (
        block_q, block_k, S // fit_forward[0], T // chunks_q, S // chunks_k, capacity * 15 // 16,
        dispatch.platform() == "cpu",
    )  # fmt: skip


def _block(n: int) -> int:
    for block in (512, 256):
        if -n % block <= n // 8:
            return block
    return LANES


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


# The differentiable whole -------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(setting, q, k, v, positions, kv_positions, rope, ids, offset):
    return _forward(setting, q, k, v, positions, kv_positions, rope, ids, offset)[0]


def _forward(setting, q, k, v, positions, kv_positions, rope, ids, offset):
    tables = table(positions, rope), table(kv_positions, rope)
    if setting.forward_k < k.shape[1]:
        k_used, tables = rotate(k, kv_positions, rope), (tables[0], None)
    else:
        k_used = k
    q_k_v = tuple(map(inside, (q, k_used, v)))
    out, log_total = _call(setting, q.shape[3], q_k_v, tables, ids, offset)
    out = outside(out, q.shape)
    return out, (q, k, v, positions, kv_positions, rope, ids, offset, out, log_total)


def _backward(setting, residuals, d_out):
    from pallas_kernels.rotary_attention_tpu_backward import backward

    return *backward(setting, residuals, d_out), *(None,) * 5


_attention.defvjp(_forward, _backward)


def table(positions, rope: Rope):
    """cos in the first half of H and sin in the second, times the rope's scale: float32 [B,T,H]."""
    angle = positions.astype(jnp.float32)[..., None] * rope.inv_freq_H2
    return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1) * rope.scale


def _pad(multiple: int, x, mode: str = "constant"):
    more = -x.shape[1] % multiple
    return jnp.pad(x, [(0, more if i == 1 else 0) for i in range(x.ndim)], mode) if more else x  # type: ignore[arg-type]


# Layout and block specs ---------------------------------------------------------------------------


def inside(x_BTNH):
    """As the kernels take it: [B, T, N * H], or [B, N, T, H] where H is not a register's width."""
    B, T, N, H = x_BTNH.shape
    return x_BTNH.reshape(B, T, N * H) if H == LANES else x_BTNH.transpose(0, 2, 1, 3)


def outside(x, shape):
    """The inverse of :func:`inside`; shape is that of [B, T, N, H]."""
    return x.reshape(shape) if shape[3] == LANES else x.transpose(0, 2, 1, 3)


def inside_shape(shape):
    """What :func:`inside` makes of a shape."""
    B, T, N, H = shape
    return (B, T, N * H) if H == LANES else (B, N, T, H)


def head_spec(H: int, rows: int, at):
    """Blocks of a head's rows; ``at`` takes the grid's indices to (b, block, head)."""

    def index(*grid):
        b, block, head = at(*grid)
        return (b, block, head) if H == LANES else (b, head, block, 0)

    return pl.BlockSpec((None, rows, H) if H == LANES else (None, None, rows, H), index)


def number_spec(rows: int, at):
    """Blocks of [B, 1, T]: one number a position; ``at`` takes the grid's indices to (b, block)."""

    def index(*grid):
        b, block = at(*grid)
        return b, 0, block

    return pl.BlockSpec((None, 1, rows), index)


# Pieces of both kernels ---------------------------------------------------------------------------


def dot(a, b, contract: str):
    """Matrix product into float32: contract "nn" a b, "nt" a b^T, "tn" a^T b."""
    a_axis, b_axis = int(contract[0] == "n"), int(contract[1] == "t")
    # Mosaic's default for float32 is one bfloat16 pass.
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return lax.dot_general(
        a,
        b,
        (((a_axis,), (b_axis,)), ((), ())),
        precision=precision,
        preferred_element_type=jnp.float32,
    )


def turn(x, table, back: bool = False):
    """Rows of a head turned (or turned back) by rows of (cos | sin); float32 [rows, H]."""
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
    return x * cos + swap(x) * (-sin if back else sin)


def turn_all(x_ref, table_ref, out_ref, rows: int):
    """:func:`turn` of a whole ref, some rows at a time."""

    def step(i, _):
        at = pl.ds(pl.multiple_of(i * rows, rows), rows)
        out_ref[at, :] = turn(x_ref[at, :], table_ref[at, :]).astype(out_ref.dtype)

    lax.fori_loop(0, x_ref.shape[0] // rows, step, None)


def column(row):
    """[1, n] -> [n, LANES], each number in every lane."""
    return jnp.broadcast_to(row, (LANES, row.shape[1])).T


def lanes(x, n: int):
    """[rows, LANES] with one number a row -> [rows, n]."""
    return jnp.tile(x, (1, n // LANES)) if n >= LANES else x[:, :n]


def last_seen(setting: Setting, t, offset_ref):
    """Index of the last key that the query at t may see."""
    if not setting.causal:
        return jnp.full(t.shape, setting.S - 1, jnp.int32)
    return jnp.minimum(t + offset_ref[0], setting.S - 1)


def walk(range_ref, at, first, n, step):
    """step(is_masked, block) for those of the n blocks from ``first`` on that a range names.

    The blocks before and after the clear ones are one loop: a loop is code, and compile time.
    """
    local = [jnp.clip(range_ref[at * 4 + i] - first, 0, n) for i in range(4)]
    start, clear, masked, stop = local
    lax.fori_loop(clear, masked, lambda i, _: step(False, i), None)
    before = clear - start
    either = lambda i: jnp.where(i < before, start + i, masked + i - before)
    lax.fori_loop(0, before + stop - masked, lambda i, _: step(True, either(i)), None)


def pairs_seen(setting: Setting) -> int:
    """Pairs of query and key that are computed, for the estimate of cost; documents not known."""
    T, S = setting.T, setting.S
    if not setting.causal or setting.offset is None:
        return T * S
    # Query t sees t + offset + 1 keys, from 0 to S.
    low, high = (min(max(setting.offset + t + 1, 0), S) for t in (0, T - 1))
    whole = max(0, T - max(0, S - setting.offset))
    rising = max(0, min(T, S - setting.offset) - max(0, -setting.offset))
    return whole * S + (max(low, 1) + high) * rising // 2 if high else 0


# Forward ------------------------------------------------------------------------------------------


def _kernel(
    offset_ref, range_ref, q_ref, k_ref, v_ref, q_table_ref, k_table_ref, q_ids_ref, k_ids_ref,
    out_ref, log_total_ref, q_s, k_s, q_ids_s, top_s, total_s, sums_s, *, setting,
):  # fmt: skip
    b, i, g, chunk = (pl.program_id(n) for n in (0, 2, 3, 4))
    block, block_k = pl.num_programs(2) * b + i, setting.block_k
    rows, H = q_ref.shape
    if k_table_ref is not None:
        pl.when((i == 0) & (g == 0))(lambda: turn_all(k_ref, k_table_ref, k_s, block_k))
    keys = k_ref if k_table_ref is None else k_s

    @pl.when(chunk == 0)
    def _():
        # Exponentials are to base 2, as the hardware has them: its factor goes into the queries.
        factor = setting.scale * math.log2(math.e)
        q_s[...] = (turn(q_ref[...], q_table_ref[...]) * factor).astype(q_s.dtype)
        if q_ids_ref is not None:
            q_ids_s[...] = column(q_ids_ref[...])
        top_s[...] = jnp.full_like(top_s, LOWEST)
        total_s[...] = jnp.zeros_like(total_s)
        sums_s[...] = jnp.zeros_like(sums_s)

    def step(is_masked, j):
        at = pl.ds(pl.multiple_of(j * block_k, block_k), block_k)
        scores = dot(q_s[...], keys[at, :], "nt")
        if is_masked:
            first = chunk * k_ref.shape[0] + j * block_k
            t = i * rows + lax.broadcasted_iota(jnp.int32, (rows, LANES), 0)
            last = lanes(last_seen(setting, t, offset_ref) - first, block_k)
            seen = lax.broadcasted_iota(jnp.int32, scores.shape, 1) <= last
            if q_ids_ref is not None:
                seen &= lanes(q_ids_s[...], block_k) == k_ids_ref[:, at]
            scores = jnp.where(seen, scores, LOWEST)
        top = top_s[...]
        new_top = jnp.maximum(top, jnp.max(scores, axis=1, keepdims=True))
        weights = jnp.exp2(scores - lanes(new_top, block_k))
        shrink = jnp.exp2(top - new_top)
        top_s[...] = new_top
        total_s[...] = total_s[...] * shrink + jnp.sum(weights, axis=1, keepdims=True)
        sums = dot(weights.astype(v_ref.dtype), v_ref[at, :], "nn")
        sums_s[...] = sums_s[...] * lanes(shrink, H) + sums

    walk(range_ref, block, chunk * (k_ref.shape[0] // block_k), k_ref.shape[0] // block_k, step)

    @pl.when(chunk == pl.num_programs(4) - 1)
    def _():
        # A row that saw nothing has weights of 1 for hidden keys: zeros, and a total so large that
        # the backward pass finds weights of 0.
        blind = top_s[...] < LOWEST / 2
        total = jnp.where(blind, 1, total_s[...])
        out = jnp.where(lanes(blind, H), 0, sums_s[...] / lanes(total, H))
        out_ref[...] = out.astype(out_ref.dtype)
        log_total = jnp.where(blind, -LOWEST, top_s[...] + jnp.log2(total))
        log_total_ref[...] = log_total.T[:1]


def _call(setting, H, q_k_v, tables, ids, offset):
    (q, k, v), (q_table, k_table) = q_k_v, tables
    (B, T), S = q_table.shape[:2], k.shape[1 if H == LANES else 2]
    heads = lambda x: x.shape[2] // H if H == LANES else x.shape[1]
    N, K = heads(q), heads(k)
    G, rows, keys = N // K, setting.block_q, setting.forward_k
    where = ranges("q", rows, setting.block_k, (B, T, S), setting.S, setting.causal, offset,
                   *(ids or (None, None)))  # fmt: skip
    of_q = head_spec(H, rows, lambda b, h, i, g, j, *_: (b, i, h * G + g))
    of_k = head_spec(H, keys, lambda b, h, i, g, j, *_: (b, j, h))
    table_spec = lambda n, at: pl.BlockSpec((None, n, H), at)
    number = lambda n, at: None if ids is None else number_spec(n, at)
    size, passes = q.dtype.itemsize, 1 if keys == S else T // rows * G
    moved = size * (2 * q.size + passes * 2 * k.size) + 4 * (B * N * T + B * (T + S) * H)
    scratch = [
        pltpu.VMEM((rows, H), q.dtype),
        pltpu.VMEM((S if k_table is not None else 8, H), k.dtype),
        pltpu.VMEM((rows, LANES) if ids is not None else (8, LANES), jnp.int32),
        pltpu.VMEM((rows, LANES), jnp.float32),
        pltpu.VMEM((rows, LANES), jnp.float32),
        pltpu.VMEM((rows, H), jnp.float32),
    ]
    log_total_spec = pl.BlockSpec(
        (None, None, 1, rows), lambda b, h, i, g, j, *_: (b, h * G + g, 0, i)
    )
    return pl.pallas_call(
        functools.partial(_kernel, setting=setting),
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
            out_specs=[of_q, log_total_spec],
            scratch_shapes=scratch,
        ),
        out_shape=[
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((B, N, 1, T), jnp.float32),
        ],
        cost_estimate=pl.CostEstimate(
            flops=4 * H * B * N * pairs_seen(setting),
            transcendentals=B * N * pairs_seen(setting),
            bytes_accessed=moved,
        ),
        name="rotary_attention_forward",
        **parameters(setting),
    )(offset, where.reshape(-1), q, k, v, q_table, k_table, *row_ids(ids))  # fmt: skip


def row_ids(ids):
    """[B, T] -> [B, 1, T], or nothing."""
    return (None, None) if ids is None else tuple(x[:, None].astype(jnp.int32) for x in ids)


def parameters(setting: Setting) -> dict[str, Any]:
    """What both calls give `pallas_call`; rows and key heads may go to different cores."""
    return dict(
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", *("arbitrary",) * 3),
            vmem_limit_bytes=setting.vmem,
        ),
        interpret=setting.interpret,
    )
