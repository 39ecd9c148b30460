"""Rotary attention over a cache for TPUs, in Pallas through Mosaic.

The cache stays in main memory and is changed in place: an aliased output of which only the rows
around the new positions are read, spliced and written back. What is live in it passes once through
the pipeline, a block of slots of a few heads at a time; blocks beyond a row's length are neither
fetched nor computed. The new keys and values join the softmax from registers at the end, so nothing
waits for what is being written.

Rows of queries that share a key head are one operand, [G * T, H]. The method is FlashAttention's
running softmax (arXiv 2205.14135). On a TPU an array of 64 columns laid out as the kernel reads it
takes the room of 128, and XLA chooses another layout for a cache that enters a program: with
head_dim 64 the cache is turned whole on the way in and out. Keep such a loop inside one program.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import dispatch

ROWS = 16  # slots that a copy into the cache starts and ends on: a tile of bfloat16
LOWEST = float(jnp.finfo(jnp.float32).min)
FEW = 8  # new positions that a loop over them is written out for
MOST_QUERIES = 512  # rows of queries of a key head; beyond, scores crowd out the cache in VMEM
BLOCK_BYTES = 1 << 20  # of keys in flight: long enough that a step's 0.4 us do not show


class Setting(NamedTuple):
    """What the kernel is compiled for, besides its shapes."""

    scale: float
    new: int
    """T"""
    slots: int
    """of a block"""
    window: int
    """slots around the new positions that are rewritten"""
    precision: lax.Precision | None


def tpu(q, k, v, cache_k, cache_v, layer, lengths, rope, scale):
    """`rotary_decode_attention` in Pallas; arguments as its front door passes them."""
    B, T, N, H = q.shape
    K, S = cache_k.shape[2:4]
    rows = N // K * T
    window = min(ROWS * (pl.cdiv(T - 1, ROWS) + 1), S)
    _check(q.dtype, cache_k.dtype, H, S, rows)
    few, heads = T <= FEW, _heads(K, T)
    slots = min(512, S, max(1, BLOCK_BYTES // (ROWS * heads * H * q.dtype.itemsize)) * ROWS)
    interpret = dispatch.platform() == "cpu"
    if interpret and jax.__version_info__ >= (0, 11):
        # That interpreter pads an aliased input to whole blocks, and its output not.
        slots = math.gcd(slots, S)
    # float32 in one pass of the matrix unit would be bfloat16.
    precision = lax.Precision.HIGHEST if q.dtype == jnp.float32 else None
    setting = Setting(scale, T, slots, window, precision)

    # A few positions are taken as they come: another layout would be a copy in main memory.
    inside = lambda x: x if few else _by_head(x, K)
    if few:
        by_head = lambda n: pl.BlockSpec(
            (None, T, heads * n // T, H), lambda b, h, j, *_: (b, 0, h, 0)
        )
    else:
        by_head = lambda n: pl.BlockSpec((None, heads, n, H), lambda b, h, j, *_: (b, h, 0, 0))
    turns_B2TH = _turns(lengths, T, rope)
    # By head, row g * T + t turns as position t.
    q_turns = turns_B2TH if few else jnp.tile(turns_B2TH, (1, 1, N // K, 1))

    def block(b, h, j, layer, lengths):  # past the live part: the last block again, not fetched
        last = lax.div(jnp.maximum(lengths[b] - 1, 0), jnp.int32(slots))
        return layer[0], b, h, jnp.minimum(j, last), 0

    per_row = lambda n: pl.BlockSpec((None, 2, n, H), lambda b, h, j, *_: (b, 0, 0, 0))
    cached = pl.BlockSpec((None, None, heads, slots, H), block)
    whole = pl.BlockSpec(memory_space=pl.ANY)
    float32 = lambda *shape: pltpu.VMEM((heads, *shape), jnp.float32)
    out, cache_k, cache_v = pl.pallas_call(
        functools.partial(_kernel, setting),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(B, K // heads, pl.cdiv(S, slots)),
            in_specs=[by_head(rows), by_head(T), by_head(T), per_row(q_turns.shape[2]),
                      per_row(T), cached, cached],
            out_specs=[by_head(rows), whole, whole],
            scratch_shapes=[
                pltpu.VMEM((heads, rows, H), q.dtype),
                float32(rows, 1), float32(rows, 1), float32(rows, H),
                float32(window, H), float32(window, H),
                pltpu.VMEM((2, heads, window, H), q.dtype),
                pltpu.SemaphoreType.DMA((2,)),
            ],
        ),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (inside(q), cache_k, cache_v)],
        input_output_aliases={7: 1, 8: 2},
        cost_estimate=_cost(q, k, cache_k),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary")
        ),
        interpret=interpret,
        name="rotary_decode_attention",
    )(layer[None], lengths.astype(jnp.int32), *map(inside, (q, k, v)), q_turns, turns_B2TH,
      cache_k, cache_v)  # fmt: skip
    if not few:
        out = out.reshape(B, K, N // K, T, H).transpose(0, 3, 1, 2, 4)
    return out.reshape(q.shape), cache_k, cache_v


def _heads(K: int, T: int) -> int:
    """Key heads of a block. Of a few positions heads are rows of a tile: eight of them, or all."""
    most = max(n for n in range(1, 9) if K % n == 0)
    return K if T <= FEW and most not in (8, K) else most


def _by_head(x_BTNH, K):
    """[B, K, G * T, H]: what reads one key head is one operand."""
    B, T, N, H = x_BTNH.shape
    return x_BTNH.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4).reshape(B, K, -1, H)


def _check(dtype, cache_dtype, H, S, rows):
    if H not in (64, 128):
        raise NotImplementedError(f"head_dim {H}: the TPU kernel has 64 and 128")
    if dtype not in (jnp.float32, jnp.bfloat16):
        raise NotImplementedError(f"{dtype}: the TPU kernel has float32 and bfloat16")
    if cache_dtype != dtype:
        raise NotImplementedError(f"a {cache_dtype} cache for {dtype} queries")
    if S % ROWS:
        raise NotImplementedError(f"{S} slots: the TPU kernel wants a multiple of {ROWS}")
    if rows > MOST_QUERIES:
        raise NotImplementedError(
            f"{rows} queries of a key head (G * T): the TPU kernel takes {MOST_QUERIES}"
        )


def _cost(q, k, cache):
    """As if every slot were live: lengths are not known here."""
    (B, T, N, H), (K, S) = q.shape, cache.shape[2:4]
    moved = 2 * B * K * S * H * cache.dtype.itemsize + 2 * q.nbytes + 2 * k.nbytes
    scores = B * N * T * S
    return pl.CostEstimate(flops=4 * scores * H, transcendentals=scores, bytes_accessed=moved)


def _turns(lengths, T, rope):
    """cos and signed sin of the new positions, [B, 2, T, H] float32: x * cos + swapped x * sin."""
    positions = (lengths[:, None] + jnp.arange(T, dtype=lengths.dtype)).astype(jnp.float32)
    angle = positions[..., None] * rope.inv_freq_H2
    cos, sin = jnp.cos(angle) * rope.scale, jnp.sin(angle) * rope.scale
    both = lambda a, b: jnp.concatenate([a, b], axis=-1)
    return jnp.stack([both(cos, cos), both(-sin, sin)], axis=1)


def _turned(x, turns):
    x, half = x.astype(jnp.float32), x.shape[-1] // 2
    return x * turns[0] + jnp.concatenate([x[:, half:], x[:, :half]], axis=1) * turns[1]


def _kernel(
    setting, layer_ref, lengths_ref, q_ref, k_ref, v_ref, q_turns, k_turns, keys_ref, values_ref,
    out_ref, cache_k, cache_v, q_s, top_ref, total_ref, sum_ref, new_k, new_v, window,
    sems,
):  # fmt: skip
    b, h, j = (pl.program_id(i) for i in range(3))
    length, heads = lengths_ref[b], range(sum_ref.shape[0])
    new, R = setting.new, sum_ref.shape[1]
    few, G = new <= FEW, R // new
    start = jnp.minimum(
        lax.div(length, jnp.int32(ROWS)) * ROWS, cache_k.shape[3] - setting.window
    )  # fmt: skip
    place = (layer_ref[0], b, pl.ds(h * len(heads), len(heads)),
             pl.ds(pl.multiple_of(start, ROWS), setting.window))  # fmt: skip
    copies = lambda make: [
        make(c.at[place], window.at[i], sems.at[i]) for i, c in enumerate((cache_k, cache_v))
    ]
    fetch = functools.partial(copies, pltpu.make_async_copy)
    put = functools.partial(copies, lambda c, w, s: pltpu.make_async_copy(w, c, s))

    def rows_of(ref, n, each, turns=None):
        """Rows of head n, turned, in float32; of a few positions, t * each + g."""
        if not few:
            return _turned(ref[n], turns) if turns is not None else ref[n].astype(jnp.float32)
        at = pl.ds(n * each, each)
        parts = [ref[t, at, :].astype(jnp.float32) for t in range(new)]
        if turns is not None:
            parts = [_turned(x, turns[:, t : t + 1]) for t, x in enumerate(parts)]
        return jnp.concatenate(parts, axis=0)

    @pl.when(j == 0)
    def _start():
        top_ref[...] = jnp.full_like(top_ref, LOWEST)
        total_ref[...], sum_ref[...] = jnp.zeros_like(total_ref), jnp.zeros_like(sum_ref)
        for n in heads:
            q_s[n] = rows_of(q_ref, n, G, q_turns).astype(q_s.dtype)
        for copy in fetch():
            copy.start()

    def attend(n, keys, values, seen):
        """Head n's queries over some keys; `seen` [R, keys] or None for all."""
        dot = functools.partial(
            lax.dot_general, precision=setting.precision, preferred_element_type=jnp.float32
        )
        scores = dot(q_s[n], keys, (((1,), (1,)), ((), ()))) * setting.scale
        if seen is not None:
            scores = jnp.where(seen, scores, LOWEST)
        top = jnp.maximum(top_ref[n], jnp.max(scores, axis=1, keepdims=True))
        fade, weights = jnp.exp(top_ref[n] - top), jnp.exp(scores - top)
        top_ref[n] = top
        total_ref[n] = total_ref[n] * fade + jnp.sum(weights, axis=1, keepdims=True)
        added = dot(weights.astype(values.dtype), values, (((1,), (0,)), ((), ())))
        sum_ref[n] = sum_ref[n] * fade + added

    first = j * setting.slots

    @pl.when(first + setting.slots <= length)
    def _whole_block():
        for n in heads:
            attend(n, keys_ref[n], values_ref[n], None)

    @pl.when((first < length) & (length < first + setting.slots))
    def _last_block():
        rows = (R, setting.slots)
        seen = first + lax.broadcasted_iota(jnp.int32, rows, 1) < length
        live = first + lax.broadcasted_iota(jnp.int32, values_ref.shape[1:], 0) < length
        for n in heads:
            # A weight of zero would not silence a dead NaN.
            attend(n, keys_ref[n], jnp.where(live, values_ref[n], 0), seen)

    @pl.when(j == pl.num_programs(2) - 1)
    def _finish():
        for copy in fetch():
            copy.wait()
        rows = (R, setting.window)
        row = lax.broadcasted_iota(jnp.int32, rows, 0)
        t_query = lax.div(row, jnp.int32(G)) if few else lax.rem(row, jnp.int32(new))
        seen = lax.broadcasted_iota(jnp.int32, rows, 1) <= t_query
        shape = new_k.shape[1:]
        at = start + lax.broadcasted_iota(jnp.int32, shape, 0)
        is_new = (at >= length) & (at < length + new)
        new_k[...], new_v[...] = jnp.zeros_like(new_k), jnp.zeros_like(new_v)
        for n in heads:
            new_k[n, :new] = rows_of(k_ref, n, 1, k_turns)
            new_v[n, :new] = rows_of(v_ref, n, 1)
            attend(n, new_k[n].astype(q_ref.dtype), new_v[n].astype(q_ref.dtype), seen)
            for i, arrived in enumerate((new_k, new_v)):
                placed = pltpu.roll(arrived[n], length - start, 0).astype(window.dtype)
                window[i, n] = jnp.where(is_new, placed, window[i, n])
            out = (sum_ref[n] / total_ref[n]).astype(out_ref.dtype)
            if few:
                for t in range(new):
                    out_ref[t, pl.ds(n * G, G), :] = out[t * G : (t + 1) * G]
            else:
                out_ref[n] = out
        for copy in put():
            copy.start()
        for copy in put():
            copy.wait()
