"""Rotary decode attention for TPU in Pallas (Mosaic).

The cache stays in HBM and is updated in place: it is an aliased output, of which only the tiles
around the new positions are read, merged with the new rows and written back. The valid part is
streamed once through VMEM, a block of positions of a few heads at a time; blocks beyond a row's
length are neither fetched nor computed. The new keys and values are attended to at the end from
VMEM, so nothing waits for the write. The softmax is FlashAttention's (arXiv 2205.14135).

The queries of a key head are one operand, [G * T, H]. With head_dim 64 the kernel's layout of the
cache is padded to 128 lanes, and XLA uses another layout for the arguments of a program, so the
whole cache is copied on entry and exit: keep the decoding loop inside one program.

The grid over a paged cache has one step per live block: it ends with the last block of the last
row, and the rows and pages of its steps are operands that the scalar core reads in advance. So a
long context costs nothing where rows are short.

On a chip with two cores a single block of heads is divided, so that both cores work. One core stays
idle with one row and one key head, and with a few new positions if no smaller block of key heads
has a multiple of eight query heads.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import dispatch
from pallas_kernels.rotary_attention_tpu_sizes import idle_core

TILE_ROWS = 16  # rows of a bfloat16 tile, to which copies into the cache are aligned
MASK_VALUE = float(jnp.finfo(jnp.float32).min)
MAX_UNROLLED = 8  # the loop over new positions is unrolled up to this number
MAX_QUERIES = 512  # queries of a key head; beyond, their scores leave too little VMEM for the cache
BLOCK_BYTES = 1 << 20  # of keys per block: its load takes long compared to 0.4 us per grid step


class KernelConfig(NamedTuple):
    """Compile-time constants of the kernel besides shapes."""

    scale: float
    new: int
    """T"""
    block_k: int
    """positions per block"""
    window: int
    """positions around the new ones that are rewritten"""
    precision: lax.Precision | None
    max_pages: int | None
    """pages of a row; None for a contiguous cache"""


def tpu(q, k, v, cache_k, cache_v, layer, lengths, rope, scale, pages=None):
    """`rotary_decode_attention` in Pallas for TPU, with positional arguments."""
    B, T, N, H = q.shape
    K, S = cache_k.shape[2:4]  # S: of a row, or of a page
    rows = N // K * T
    window = TILE_ROWS * (pl.cdiv(T - 1, TILE_ROWS) + 1)
    if pages is None:
        window = min(window, S)
    _check_supported(q.dtype, cache_k.dtype, H, S, rows)
    # The rows of a paged cache are not divided among cores.
    few, heads = T <= MAX_UNROLLED, _heads(B if pages is None else 1, K, T, N // K)
    block_k = min(
        512, S, max(1, BLOCK_BYTES // (TILE_ROWS * heads * H * q.dtype.itemsize)) * TILE_ROWS
    )
    interpret = dispatch.platform() == "cpu"
    if pages is not None or (interpret and jax.__version_info__ >= (0, 11)):
        # This interpreter pads an aliased input to whole blocks, but not its output.
        block_k = math.gcd(block_k, S)
    # Mosaic multiplies float32 in one bfloat16 pass by default.
    precision = lax.Precision.HIGHEST if q.dtype == jnp.float32 else None
    config = KernelConfig(
        scale, T, block_k, window, precision, None if pages is None else pages.shape[1]
    )
    scalars = [layer[None], lengths.astype(jnp.int32)]
    grid: tuple[Any, ...]
    place: Callable[..., tuple]
    if pages is None:
        grid = (B, K // heads, pl.cdiv(S, block_k))
        place = lambda b, h, j, *_: (b, h, j)
    else:
        row_of_step, first_step_of_row = _live_blocks(lengths, block_k, S * pages.shape[1])
        grid = (K // heads, first_step_of_row[B])
        scalars += [pages.reshape(-1).astype(jnp.int32), row_of_step, first_step_of_row]

        def place_of_step(h, i, layer, lengths, pages, rows, firsts):
            return rows[i], h, i - firsts[rows[i]]

        place = place_of_step

    def by_place(shape, index):
        return pl.BlockSpec(shape, lambda *args: index(*place(*args)))

    # A few positions keep their layout: changing it would be a copy in HBM.
    layout = lambda x: x if few else _by_head(x, K)
    if few:

        def by_head(n):
            height = heads * n // T
            if height % 8:  # Not whole tiles: every program gets all rows.
                return by_place((None, T, K * n // T, H), lambda b, h, j: (b, 0, 0, 0))
            return by_place((None, T, height, H), lambda b, h, j: (b, 0, h, 0))
    else:
        by_head = lambda n: by_place((None, heads, n, H), lambda b, h, j: (b, h, 0, 0))
    cos_sin_B2TH = _cos_sin(lengths, T, rope)
    # In the layout by head, row g * T + t is position t.
    q_cos_sin = cos_sin_B2TH if few else jnp.tile(cos_sin_B2TH, (1, 1, N // K, 1))

    def block(*args):
        b, h, j = place(*args)
        layer, lengths, *paged = args[len(grid) :]
        if paged:
            page = paged[0][b * config.max_pages + lax.div(j, jnp.int32(S // block_k))]
            return layer[0], page, h, lax.rem(j, jnp.int32(S // block_k)), 0
        # Beyond the length: the last block again, which is not fetched.
        last = lax.div(jnp.maximum(lengths[b] - 1, 0), jnp.int32(block_k))
        return layer[0], b, h, jnp.minimum(j, last), 0

    per_row = lambda n: by_place((None, 2, n, H), lambda b, h, j: (b, 0, 0, 0))
    cached = pl.BlockSpec((None, None, heads, block_k, H), block)
    hbm = pl.BlockSpec(memory_space=pl.ANY)
    semantics: Any = (*["parallel"] * (len(grid) - 1), "arbitrary")
    float32 = lambda *shape: pltpu.VMEM((heads, *shape), jnp.float32)
    out, cache_k, cache_v = pl.pallas_call(
        functools.partial(_kernel, config),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=grid,
            in_specs=[by_head(rows), by_head(T), by_head(T), per_row(q_cos_sin.shape[2]),
                      per_row(T), cached, cached],
            out_specs=[by_head(rows), hbm, hbm],
            scratch_shapes=[
                pltpu.VMEM((heads, rows, H), q.dtype),
                float32(rows, 1), float32(rows, 1), float32(rows, H),
                float32(window, H), float32(window, H),
                pltpu.VMEM((2, heads, window, H), q.dtype),
                pltpu.SemaphoreType.DMA((2,)),
            ],
        ),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (layout(q), cache_k, cache_v)],
        input_output_aliases={len(scalars) + 5: 1, len(scalars) + 6: 2},
        cost_estimate=_cost(q, k, cache_k, pages),
        compiler_params=pltpu.CompilerParams(dimension_semantics=semantics),
        interpret=interpret,
        name="rotary_decode_attention",
    )(*scalars, *map(layout, (q, k, v)), q_cos_sin, cos_sin_B2TH,
      cache_k, cache_v)  # fmt: skip
    if not few:
        out = out.reshape(B, K, N // K, T, H).transpose(0, 3, 1, 2, 4)
    return out.reshape(q.shape), cache_k, cache_v


def _heads(B: int, K: int, T: int, G: int) -> int:
    """Key heads per block; with few positions they are the rows of a tile: eight, or all.

    If that leaves a core idle, fewer heads, whose queries with few positions are whole tiles.
    """
    few, divisors = T <= MAX_UNROLLED, [n for n in range(1, 9) if K % n == 0]
    heads = K if few and divisors[-1] not in (8, K) else divisors[-1]
    if idle_core(B * (K // heads)):
        return max((n for n in divisors if n < K and (not few or n * G % 8 == 0)), default=heads)
    return heads


def _live_blocks(lengths_B, block_k, cache_len):
    """The row of each step of a grid over the live blocks of all rows, and each row's first step
    (of B + 1 rows). A row without positions has one step, for its new ones."""
    blocks_B = jnp.maximum((lengths_B + block_k - 1) // block_k, 1).astype(jnp.int32)
    firsts = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(blocks_B)])
    steps = jnp.arange(len(lengths_B) * pl.cdiv(cache_len, block_k))
    rows = jnp.sum(firsts[1:, None] <= steps, axis=0, dtype=jnp.int32)
    return jnp.minimum(rows, len(lengths_B) - 1), firsts


def _by_head(x_BTNH, K):
    """[B, T, N, H] -> [B, K, G * T, H]: one operand per key head."""
    B, T, N, H = x_BTNH.shape
    return x_BTNH.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4).reshape(B, K, -1, H)


def _check_supported(dtype, cache_dtype, H, S, rows):
    if H not in (64, 128):
        raise NotImplementedError(f"head_dim {H}: the TPU kernel supports 64 and 128")
    if dtype not in (jnp.float32, jnp.bfloat16):
        raise NotImplementedError(f"{dtype}: the TPU kernel supports float32 and bfloat16")
    if cache_dtype != dtype:
        raise NotImplementedError(f"a {cache_dtype} cache for {dtype} queries")
    if S % TILE_ROWS:
        raise NotImplementedError(
            f"cache length {S}: the TPU kernel needs a multiple of {TILE_ROWS}"
        )
    if rows > MAX_QUERIES:
        raise NotImplementedError(
            f"{rows} queries per key head (G * T): the TPU kernel supports up to {MAX_QUERIES}"
        )


def _cost(q, k, cache, pages):
    """The cost of a full cache: lengths are unknown at compile time."""
    (B, T, N, H), (_, P, K, S, _) = q.shape, cache.shape
    if pages is not None:
        S *= min(P / B, pages.shape[1])  # of a row, with the whole pool in use
    moved = int(2 * B * K * S * H) * cache.dtype.itemsize + 2 * q.nbytes + 2 * k.nbytes
    scores = int(B * N * T * S)
    return pl.CostEstimate(flops=4 * scores * H, transcendentals=scores, bytes_accessed=moved)


def _cos_sin(lengths, T, rope):
    """cos and signed sin of the new positions for :func:`_rotate`, float32 [B, 2, T, H]."""
    positions = (lengths[:, None] + jnp.arange(T, dtype=lengths.dtype)).astype(jnp.float32)
    angle = positions[..., None] * rope.inv_freq_H2
    cos, sin = jnp.cos(angle) * rope.scale, jnp.sin(angle) * rope.scale
    both = lambda a, b: jnp.concatenate([a, b], axis=-1)
    return jnp.stack([both(cos, cos), both(-sin, sin)], axis=1)


def _rotate(x, cos_sin):
    x, half = x.astype(jnp.float32), x.shape[-1] // 2
    return x * cos_sin[0] + jnp.concatenate([x[:, half:], x[:, :half]], axis=1) * cos_sin[1]


def _kernel(config, layer_ref, lengths_ref, *refs: Any):
    if config.max_pages is None:
        b, h, j = (pl.program_id(i) for i in range(3))
        is_last = j == pl.num_programs(2) - 1
    else:
        (pages_ref, rows_ref, firsts_ref), refs = refs[:3], refs[3:]
        h, i = pl.program_id(0), pl.program_id(1)
        b = rows_ref[i]
        j, is_last = i - firsts_ref[b], i + 1 == firsts_ref[b + 1]
    (q_ref, k_ref, v_ref, q_cos_sin, k_cos_sin, keys_ref, values_ref, out_ref, cache_k, cache_v,
     q_s, m_ref, l_ref, acc_ref, new_k, new_v, window, sems) = refs  # fmt: skip
    length, heads = lengths_ref[b], range(acc_ref.shape[0])
    new, R = config.new, acc_ref.shape[1]
    few, G = new <= MAX_UNROLLED, R // new
    start = lax.div(length, jnp.int32(TILE_ROWS)) * TILE_ROWS
    page, of_heads = cache_k.shape[3], pl.ds(h * len(heads), len(heads))
    if config.max_pages is None:
        start = jnp.minimum(start, page - config.window)

    def for_each_copy(do):
        """Calls ``do(number of the cache, its part, part of the window)``: the whole window, or, as
        it may lie in two pages, each of its tiles."""
        part = config.window if config.max_pages is None else TILE_ROWS

        def copy(t, _):
            at = start + t * part
            row = b
            if config.max_pages is not None:
                m = lax.div(at, jnp.int32(page))
                number = pages_ref[b * config.max_pages + jnp.minimum(m, config.max_pages - 1)]
                row = jnp.where(m < config.max_pages, number, 0)
                at = lax.rem(at, jnp.int32(page))
            place = layer_ref[0], row, of_heads, pl.ds(pl.multiple_of(at, TILE_ROWS), part)
            tile = slice(None), pl.ds(pl.multiple_of(t * part, TILE_ROWS), part)
            for i, cache in enumerate((cache_k, cache_v)):
                do(i, cache.at[place], window.at[(i, *tile)])

        lax.fori_loop(0, config.window // part, copy, None)

    fetch = lambda i, cache, part: pltpu.make_async_copy(cache, part, sems.at[i])
    put = lambda i, cache, part: pltpu.make_async_copy(part, cache, sems.at[i])

    def part(ref, t, n, each):
        """Position t of head n, whose place in a block of all heads depends on the program."""
        x = ref[t, pl.ds(n * each, each), :].astype(jnp.float32)
        for other in range(1, ref.shape[1] // (len(heads) * each)):
            at = pl.ds((other * len(heads) + n) * each, each)
            x = jnp.where(h == other, ref[t, at, :].astype(jnp.float32), x)
        return x

    def rows_of(ref, n, each, cos_sin=None):
        """Rows of head n in float32, rotated if ``cos_sin`` is given; with few positions, row t *
        each + g is position t."""
        if not few:
            return _rotate(ref[n], cos_sin) if cos_sin is not None else ref[n].astype(jnp.float32)
        parts = [part(ref, t, n, each) for t in range(new)]
        if cos_sin is not None:
            parts = [_rotate(x, cos_sin[:, t : t + 1]) for t, x in enumerate(parts)]
        return jnp.concatenate(parts, axis=0)

    @pl.when(j == 0)
    def _start():
        m_ref[...] = jnp.full_like(m_ref, MASK_VALUE)
        l_ref[...], acc_ref[...] = jnp.zeros_like(l_ref), jnp.zeros_like(acc_ref)
        for n in heads:
            q_s[n] = rows_of(q_ref, n, G, q_cos_sin).astype(q_s.dtype)
        for_each_copy(lambda *x: fetch(*x).start())

    def attend(n, keys, values, visible):
        """Attends with the queries of head n to keys; ``visible`` [R, keys] is the mask or None."""
        dot = functools.partial(
            lax.dot_general, precision=config.precision, preferred_element_type=jnp.float32
        )
        scores = dot(q_s[n], keys, (((1,), (1,)), ((), ()))) * config.scale
        if visible is not None:
            scores = jnp.where(visible, scores, MASK_VALUE)
        m = jnp.maximum(m_ref[n], jnp.max(scores, axis=1, keepdims=True))
        alpha, weights = jnp.exp(m_ref[n] - m), jnp.exp(scores - m)
        m_ref[n] = m
        l_ref[n] = l_ref[n] * alpha + jnp.sum(weights, axis=1, keepdims=True)
        added = dot(weights.astype(values.dtype), values, (((1,), (0,)), ((), ())))
        acc_ref[n] = acc_ref[n] * alpha + added

    first = j * config.block_k

    @pl.when(first + config.block_k <= length)
    def _whole_block():
        for n in heads:
            attend(n, keys_ref[n], values_ref[n], None)

    @pl.when((first < length) & (length < first + config.block_k))
    def _last_block():
        rows = (R, config.block_k)
        visible = first + lax.broadcasted_iota(jnp.int32, rows, 1) < length
        valid = first + lax.broadcasted_iota(jnp.int32, values_ref.shape[1:], 0) < length
        for n in heads:
            # Invalid values may be NaN, and 0 * NaN is NaN.
            attend(n, keys_ref[n], jnp.where(valid, values_ref[n], 0), visible)

    @pl.when(is_last)
    def _finish():
        for_each_copy(lambda *x: fetch(*x).wait())
        rows = (R, config.window)
        row = lax.broadcasted_iota(jnp.int32, rows, 0)
        t_query = lax.div(row, jnp.int32(G)) if few else lax.rem(row, jnp.int32(new))
        visible = lax.broadcasted_iota(jnp.int32, rows, 1) <= t_query
        shape = new_k.shape[1:]
        at = start + lax.broadcasted_iota(jnp.int32, shape, 0)
        is_new = (at >= length) & (at < length + new)
        new_k[...], new_v[...] = jnp.zeros_like(new_k), jnp.zeros_like(new_v)
        for n in heads:
            new_k[n, :new] = rows_of(k_ref, n, 1, k_cos_sin)
            new_v[n, :new] = rows_of(v_ref, n, 1)
            attend(n, new_k[n].astype(q_ref.dtype), new_v[n].astype(q_ref.dtype), visible)
            for i, arrived in enumerate((new_k, new_v)):
                placed = pltpu.roll(arrived[n], length - start, 0).astype(window.dtype)
                window[i, n] = jnp.where(is_new, placed, window[i, n])
            out = (acc_ref[n] / l_ref[n]).astype(out_ref.dtype)
            if few:
                for t in range(new):
                    out_ref[t, pl.ds(n * G, G), :] = out[t * G : (t + 1) * G]
            else:
                out_ref[n] = out
        for_each_copy(lambda *x: put(*x).start())
        for_each_copy(lambda *x: put(*x).wait())
