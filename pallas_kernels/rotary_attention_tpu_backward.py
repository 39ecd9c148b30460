"""Rotary attention for TPU: the backward kernel, for the gradients of q, k and v.

A program holds queries of one or some heads and keys, all of them if VMEM allows, and loops over
the blocks of keys and, for each, the blocks of queries that attend to it. Scores have keys as rows:
of the five products, only the gradient of q needs a transpose. The float32 gradients of a key head
stay in VMEM until all its queries have been processed.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.ranges import block_ranges
from pallas_kernels.rotary_attention import rotate
from pallas_kernels.rotary_attention_tpu import (
    LANES,
    MASK_VALUE,
    KernelConfig,
    column,
    cos_sin_table,
    dot,
    for_each_block,
    from_kernel_layout,
    head,
    head_spec,
    kernel_shape,
    key_head,
    lanes,
    last_visible,
    number_spec,
    parameters,
    rotate_all,
    rotate_block,
    row_ids,
    to_kernel_layout,
    visible_pairs,
)


def backward(config: KernelConfig, residuals, d_out):
    """Gradients of q, k and v in their dtypes; ``residuals`` are those of `_forward`."""
    q, k, v, positions, kv_positions, rope, ids, offset, out, lse = residuals
    k_used = k if config.backward_k == k.shape[1] else rotate(k, kv_positions, rope)
    arrays = *map(to_kernel_layout, (q, k_used, v, out, d_out)), lse
    tables = cos_sin_table(positions, rope), cos_sin_table(kv_positions, rope)
    d_q, *d_kv = _call(config, q.shape, k.shape, arrays, tables, ids, offset)
    B, S, K, H = k.shape
    # The programs that share a key head have gradients of their own.
    parts = (from_kernel_layout(d, (B, S, K * config.shares, H)) for d in d_kv)
    d_kv = [d.reshape(B, S, K, config.shares, H).sum(3) if config.shares > 1 else d for d in parts]
    return from_kernel_layout(d_q, q.shape), *d_kv


def _kernel(
    offset_ref, range_ref, q_ref, k_ref, v_ref, out_ref, d_out_ref, lse_ref, q_table_ref,
    k_table_ref, q_ids_ref, k_ids_ref, d_q_ref, d_k_ref, d_v_ref,
    q_s, k_s, delta_s, d_q_s, d_k_s, d_v_s, *, config, chunks,
):  # fmt: skip
    b, i, g, j = (pl.program_id(n) for n in (0, 2, 3, 4))
    block_q, block_k, heads = config.block_q, config.block_k, range(config.heads)
    rows = len(heads) * block_q
    queries, (keys, H) = q_table_ref.shape[0], k_ref.shape
    blocks_q, blocks_k = queries // block_q, keys // block_k
    resident = chunks == 1
    k_rotated = k_s if resident else k_ref
    q_at = lambda n: pl.ds(pl.multiple_of(n * block_q, block_q), block_q)
    # In scratch, the rows of the heads in a block of queries are together.
    rows_at = lambda n: pl.ds(pl.multiple_of(n * rows, rows), rows)
    head_at = lambda n, h: pl.ds(pl.multiple_of(n * rows + h * block_q, block_q), block_q)

    @pl.when((i == 0) & (g == 0) & (j == 0))
    def _():
        d_k_s[...] = jnp.zeros_like(d_k_s)
        d_v_s[...] = jnp.zeros_like(d_v_s)
        if resident:
            rotate_all(k_ref, k_table_ref, k_s, block_k)

    @pl.when(j == 0)
    def _():
        def prepare(n, _):
            at = q_at(n)
            d_q_s[rows_at(n), :] = jnp.zeros((rows, H), jnp.float32)
            # As in the forward kernel.
            factor = config.scale * math.log2(math.e)
            for h in heads:
                q = rotate_block(head(q_ref, h)[at, :], q_table_ref[at, :])
                q_s[head_at(n, h), :] = (q * factor).astype(q_s.dtype)
                # Equals the row sums of weights * d_weights, without a pass over [T, S].
                out, d_out = (head(x, h)[at, :].astype(jnp.float32) for x in (out_ref, d_out_ref))
                delta = jnp.sum(out * d_out, axis=1, keepdims=True)
                delta_s[:, head_at(n, h)] = jnp.broadcast_to(delta, (block_q, LANES)).T[:8]

        lax.fori_loop(0, blocks_q, prepare, None)

    def key_block(n, _):
        at_k = pl.ds(pl.multiple_of(n * block_k, block_k), block_k)
        first = j * keys + n * block_k
        at_sum = pl.ds(pl.multiple_of(first, block_k), block_k)
        k_ids = None if k_ids_ref is None else column(k_ids_ref[:, at_k])

        def step(is_partial, m):
            at, at_rows = q_at(m), rows_at(m)
            of_heads = lambda parts, axis: jnp.concatenate(list(parts), axis)
            d_out = of_heads((head(d_out_ref, h)[at, :] for h in heads), 0)
            lse = of_heads((lse_ref[h, :, at] for h in heads), 1)
            k, q = k_rotated[at_k, :], q_s[at_rows, :]
            scores = dot(k, q, "nt")
            if is_partial:
                row = lax.broadcasted_iota(jnp.int32, (1, rows), 1) & (block_q - 1)
                last = last_visible(config, i * queries + m * block_q + row, offset_ref)
                visible = lax.broadcasted_iota(jnp.int32, scores.shape, 0) <= last - first
                if k_ids is not None:
                    visible &= lanes(k_ids, rows) == of_heads([q_ids_ref[:, at]] * len(heads), 1)
                scores = jnp.where(visible, scores, MASK_VALUE)
            weights = jnp.exp2(scores - lse)
            d_v_s[at_sum, :] += dot(weights.astype(d_out.dtype), d_out, "nn")
            d_weights = dot(v_ref[at_k, :], d_out, "nt")
            d_scores = (weights * (d_weights - delta_s[:1, at_rows])).astype(q.dtype)
            d_k_s[at_sum, :] += dot(d_scores, q, "nn")
            d_q_s[at_rows, :] += dot(d_scores, k, "tn")

        block = (b * chunks + j) * blocks_k + n
        for_each_block(range_ref, block, i * blocks_q, blocks_q, step)

    lax.fori_loop(0, blocks_k, key_block, None)

    @pl.when(j == chunks - 1)
    def _():
        def finish(n, _):
            at = q_at(n)
            for h in heads:
                d_q = d_q_s[head_at(n, h), :] * config.scale
                d_q = rotate_block(d_q, q_table_ref[at, :], inverse=True)
                head(d_q_ref, h)[at, :] = d_q.astype(d_q_ref.dtype)

        lax.fori_loop(0, blocks_q, finish, None)

    @pl.when((i == pl.num_programs(2) - 1) & (g == pl.num_programs(3) - 1))
    def _():
        def finish(n, _):
            at = pl.ds(pl.multiple_of(n * block_k, block_k), block_k)
            at_sum = pl.ds(pl.multiple_of(j * keys + n * block_k, block_k), block_k)
            # q includes the scale and log2(e); the product with ln(2) removes the latter.
            d_k = rotate_block(d_k_s[at_sum, :] * math.log(2), k_table_ref[at, :], inverse=True)
            d_k_ref[at, :] = d_k.astype(d_k_ref.dtype)
            d_v_ref[at, :] = d_v_s[at_sum, :].astype(d_v_ref.dtype)

        lax.fori_loop(0, blocks_k, finish, None)


def _call(config, q_shape, k_shape, arrays, tables, ids, offset):
    q, k = arrays[:2]
    (B, T, N, H), (_, S, K, _) = q_shape, k_shape
    heads, queries, keys = config.heads, config.backward_q, config.backward_k
    K *= config.shares
    G = N // K // heads  # groups of heads
    chunks_q, chunks = T // queries, S // keys
    ranges = block_ranges("k", config.block_q, config.block_k, (B, T, S), config.S, config.causal,
                   offset, *(ids or (None, None)))  # fmt: skip
    of_q = head_spec(H, queries, lambda b, h, i, g, j, *_: (b, i, h * G + g), heads)
    of_k = head_spec(H, keys, lambda b, h, i, g, j, *_: (b, j, key_head(config, h)))
    # The gradients of keys are written after their last queries; until then block 0 stays mapped.
    last = lambda i, g, j: jnp.where((i == chunks_q - 1) & (g == G - 1), j, 0)
    of_d_k = head_spec(H, keys, lambda b, h, i, g, j, *_: (b, last(i, g, j), h))
    number = lambda n, at: None if ids is None else number_spec(n, at)
    size, passes = q.dtype.itemsize, 1 if chunks == 1 else chunks_q * G
    moved = size * (4 * q.size + (2 * passes + 2) * k.size)
    moved += 4 * (B * N * T + B * T * H * (1 if chunks_q == 1 else K) + B * S * H)
    return pl.pallas_call(
        functools.partial(_kernel, config=config, chunks=chunks),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(B, K, chunks_q, G, chunks),
            in_specs=[
                of_q, of_k, of_k, of_q, of_q,
                pl.BlockSpec((None, heads, 1, queries),
                             lambda b, h, i, g, j, *_: (b, h * G + g, 0, i)),
                pl.BlockSpec((None, queries, H), lambda b, h, i, g, j, *_: (b, i, 0)),
                pl.BlockSpec((None, keys, H), lambda b, h, i, g, j, *_: (b, last(i, g, j), 0)),
                number(queries, lambda b, h, i, g, j, *_: (b, i)),
                number(keys, lambda b, h, i, g, j, *_: (b, j)),
            ],
            out_specs=[of_q, of_d_k, of_d_k],
            scratch_shapes=[
                pltpu.VMEM((heads * queries, H), q.dtype),
                pltpu.VMEM((keys if chunks == 1 else 8, H), k.dtype),
                pltpu.VMEM((8, heads * queries), jnp.float32),
                pltpu.VMEM((heads * queries, H), jnp.float32),
                pltpu.VMEM((S, H), jnp.float32),
                pltpu.VMEM((S, H), jnp.float32),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct(kernel_shape(shape), q.dtype)
            for shape in (q_shape, *[(B, S, K, H)] * 2)
        ],
        cost_estimate=pl.CostEstimate(
            flops=10 * H * B * N * visible_pairs(config),
            transcendentals=B * N * visible_pairs(config),
            bytes_accessed=moved,
        ),
        name="rotary_attention_backward",
        **parameters(config),
    )(offset, ranges.reshape(-1), *arrays, *tables, *row_ids(ids))  # fmt: skip
