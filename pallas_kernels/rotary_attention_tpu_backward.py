"""Rotary attention for TPU: the backward kernel, for the gradients of q, k and v together.

A program holds some queries of one head and some keys, all of them where VMEM allows, and goes
through the blocks of keys and, for each, the blocks of queries that see it. Scores have keys as
rows here: of the five products, only the queries' gradient needs a transpose. The float32 gradients
of a key head stay in VMEM until all its queries were there.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.ranges import ranges
from pallas_kernels.rotary_attention import rotate
from pallas_kernels.rotary_attention_tpu import (
    LANES,
    LOWEST,
    Setting,
    column,
    dot,
    head_spec,
    inside,
    inside_shape,
    lanes,
    last_seen,
    number_spec,
    outside,
    pairs_seen,
    parameters,
    row_ids,
    table,
    turn,
    turn_all,
    walk,
)


def backward(setting: Setting, residuals, d_out):
    """Gradients of q, k and v, in their dtypes; residuals as the forward pass leaves them."""
    q, k, v, positions, kv_positions, rope, ids, offset, out, log_total = residuals
    k_used = k if setting.backward_k == k.shape[1] else rotate(k, kv_positions, rope)
    arrays = *map(inside, (q, k_used, v, out, d_out)), log_total
    tables = table(positions, rope), table(kv_positions, rope)
    grads = _call(setting, q.shape, k.shape, arrays, tables, ids, offset)
    return tuple(outside(d, x.shape) for d, x in zip(grads, (q, k, v), strict=True))


def _kernel(
    offset_ref, range_ref, q_ref, k_ref, v_ref, out_ref, d_out_ref, log_total_ref, q_table_ref,
    k_table_ref, q_ids_ref, k_ids_ref, d_q_ref, d_k_ref, d_v_ref,
    q_s, k_s, delta_s, d_q_s, d_k_s, d_v_s, *, setting, chunks,
):  # fmt: skip
    b, i, g, j = (pl.program_id(n) for n in (0, 2, 3, 4))
    block_q, block_k = setting.block_q, setting.block_k
    (queries, H), keys = q_ref.shape, k_ref.shape[0]
    blocks_q, blocks_k = queries // block_q, keys // block_k
    whole = chunks == 1
    k_turned = k_s if whole else k_ref
    q_at = lambda n: pl.ds(pl.multiple_of(n * block_q, block_q), block_q)

    @pl.when((i == 0) & (g == 0) & (j == 0))
    def _():
        d_k_s[...] = jnp.zeros_like(d_k_s)
        d_v_s[...] = jnp.zeros_like(d_v_s)
        if whole:
            turn_all(k_ref, k_table_ref, k_s, block_k)

    @pl.when(j == 0)
    def _():
        def prepare(n, _):
            at = q_at(n)
            # As the forward kernel has them.
            factor = setting.scale * math.log2(math.e)
            q_s[at, :] = (turn(q_ref[at, :], q_table_ref[at, :]) * factor).astype(q_s.dtype)
            d_q_s[at, :] = jnp.zeros((block_q, H), jnp.float32)
            # Equal to the row sum of weights * d_weights, without that pass over T x S.
            product = out_ref[at, :].astype(jnp.float32) * d_out_ref[at, :].astype(jnp.float32)
            delta = jnp.sum(product, axis=1, keepdims=True)
            delta_s[:, at] = jnp.broadcast_to(delta, (block_q, LANES)).T[:8]

        lax.fori_loop(0, blocks_q, prepare, None)

    def key_block(n, _):
        at_k = pl.ds(pl.multiple_of(n * block_k, block_k), block_k)
        first = j * keys + n * block_k
        at_sum = pl.ds(pl.multiple_of(first, block_k), block_k)
        k_ids = None if k_ids_ref is None else column(k_ids_ref[:, at_k])

        def step(is_masked, m):
            at = q_at(m)
            k, q, d_out = k_turned[at_k, :], q_s[at, :], d_out_ref[at, :]
            scores = dot(k, q, "nt")
            if is_masked:
                row = lax.broadcasted_iota(jnp.int32, (1, block_q), 1)
                last = last_seen(setting, i * queries + m * block_q + row, offset_ref)
                seen = lax.broadcasted_iota(jnp.int32, scores.shape, 0) <= last - first
                if k_ids is not None:
                    seen &= lanes(k_ids, block_q) == q_ids_ref[:, at]
                scores = jnp.where(seen, scores, LOWEST)
            weights = jnp.exp2(scores - log_total_ref[:, at])
            d_v_s[at_sum, :] += dot(weights.astype(d_out.dtype), d_out, "nn")
            d_weights = dot(v_ref[at_k, :], d_out, "nt")
            d_scores = (weights * (d_weights - delta_s[:1, at])).astype(q.dtype)
            d_k_s[at_sum, :] += dot(d_scores, q, "nn")
            d_q_s[at, :] += dot(d_scores, k, "tn")

        block = (b * chunks + j) * blocks_k + n
        walk(range_ref, block, i * blocks_q, blocks_q, step)

    lax.fori_loop(0, blocks_k, key_block, None)

    @pl.when(j == chunks - 1)
    def _():
        def finish(n, _):
            at = q_at(n)
            d_q = turn(d_q_s[at, :] * setting.scale, q_table_ref[at, :], back=True)
            d_q_ref[at, :] = d_q.astype(d_q_ref.dtype)

        lax.fori_loop(0, blocks_q, finish, None)

    @pl.when((i == pl.num_programs(2) - 1) & (g == pl.num_programs(3) - 1))
    def _():
        def finish(n, _):
            at = pl.ds(pl.multiple_of(n * block_k, block_k), block_k)
            at_sum = pl.ds(pl.multiple_of(j * keys + n * block_k, block_k), block_k)
            # The queries came with the scale and the factor of base 2; the latter is taken out.
            d_k = turn(d_k_s[at_sum, :] * math.log(2), k_table_ref[at, :], back=True)
            d_k_ref[at, :] = d_k.astype(d_k_ref.dtype)
            d_v_ref[at, :] = d_v_s[at_sum, :].astype(d_v_ref.dtype)

        lax.fori_loop(0, blocks_k, finish, None)


def _call(setting, q_shape, k_shape, arrays, tables, ids, offset):
    q, k = arrays[:2]
    (B, T, N, H), (_, S, K, _) = q_shape, k_shape
    G, queries, keys = N // K, setting.backward_q, setting.backward_k
    chunks_q, chunks = T // queries, S // keys
    where = ranges("k", setting.block_q, setting.block_k, (B, T, S), setting.S, setting.causal,
                   offset, *(ids or (None, None)))  # fmt: skip
    of_q = head_spec(H, queries, lambda b, h, i, g, j, *_: (b, i, h * G + g))
    of_k = head_spec(H, keys, lambda b, h, i, g, j, *_: (b, j, h))
    # The keys' gradients are written when their last queries are there: until then block 0 stays.
    last = lambda i, g, j: jnp.where((i == chunks_q - 1) & (g == G - 1), j, 0)
    of_d_k = head_spec(H, keys, lambda b, h, i, g, j, *_: (b, last(i, g, j), h))
    number = lambda n, at: None if ids is None else number_spec(n, at)
    size, passes = q.dtype.itemsize, 1 if chunks == 1 else chunks_q * G
    moved = size * (4 * q.size + (2 * passes + 2) * k.size)
    moved += 4 * (B * N * T + B * T * H * (1 if chunks_q == 1 else K) + B * S * H)
    return pl.pallas_call(
        functools.partial(_kernel, setting=setting, chunks=chunks),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(B, K, chunks_q, G, chunks),
            in_specs=[
                of_q, of_k, of_k, of_q, of_q,
                pl.BlockSpec((None, None, 1, queries),
                             lambda b, h, i, g, j, *_: (b, h * G + g, 0, i)),
                pl.BlockSpec((None, queries, H), lambda b, h, i, g, j, *_: (b, i, 0)),
                pl.BlockSpec((None, keys, H), lambda b, h, i, g, j, *_: (b, last(i, g, j), 0)),
                number(queries, lambda b, h, i, g, j, *_: (b, i)),
                number(keys, lambda b, h, i, g, j, *_: (b, j)),
            ],
            out_specs=[of_q, of_d_k, of_d_k],
            scratch_shapes=[
                pltpu.VMEM((queries, H), q.dtype),
                pltpu.VMEM((keys if chunks == 1 else 8, H), k.dtype),
                pltpu.VMEM((8, queries), jnp.float32),
                pltpu.VMEM((queries, H), jnp.float32),
                pltpu.VMEM((S, H), jnp.float32),
                pltpu.VMEM((S, H), jnp.float32),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct(inside_shape(shape), q.dtype)
            for shape in (q_shape, k_shape, k_shape)
        ],
        cost_estimate=pl.CostEstimate(
            flops=10 * H * B * N * pairs_seen(setting),
            transcendentals=B * N * pairs_seen(setting),
            bytes_accessed=moved,
        ),
        name="rotary_attention_backward",
        **parameters(setting),
    )(offset, where.reshape(-1), *arrays, *tables, *row_ids(ids))  # fmt: skip
