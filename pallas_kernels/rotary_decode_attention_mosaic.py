"""Rotary decode attention for Hopper GPUs in Pallas (Mosaic GPU).

XLA rotates the new queries and keys and writes the new keys and values into the cache in place. The
kernel attends to the valid positions of each row, split over several programs, whose softmaxes XLA
merges (Flash-Decoding, https://crfm.stanford.edu/2023/10/12/flashdecoding.html). In each program
one warpgroup loads blocks of the cache by TMA into a ring of slots in shared memory and one
computes.

Letters as in `rotary_decode_attention`. R: the rows of a key head, T * G queries and padding; row
t * G + g is query t of head g.
"""

# mypy: ignore-errors
# The oldest jax, with which mypy runs, declares other arguments for these functions.

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import dispatch
from pallas_kernels.rotary_attention import rotate
from pallas_kernels.rotary_attention_gpu import MASK_VALUE
from pallas_kernels.rotary_attention_mosaic import (
    add_product,
    check_device,
    float_array,
    interpreter,
)
from pallas_kernels.rotary_decode_attention_gpu import BLOCK_K, RESIDENT, num_splits

ROWS = 64
"""queries of a program: the rows of a wgmma instruction"""
SLOTS = 4
"""blocks of keys and of values in shared memory; with 174 registers per thread (H 128), one program
runs at a time on a multiprocessor"""
LOADER, COMPUTE = 0, 1


def mosaic(q, k, v, cache_k, cache_v, layer, lengths, rope, scale):
    """`rotary_decode_attention` in Pallas, with positional arguments."""
    check_device()
    (B, T, N, H), (K, S) = q.shape, cache_k.shape[2:4]
    G = N // K
    if H not in (64, 128):
        raise NotImplementedError(f"head_dim {H}: the Mosaic GPU kernel supports 64 and 128")
    if not q.dtype == cache_k.dtype == jnp.bfloat16:
        raise NotImplementedError(
            f"{q.dtype}, cache {cache_k.dtype}: the Mosaic GPU kernel supports bfloat16"
        )
    if S < BLOCK_K:
        raise NotImplementedError(f"cache length {S}: the Mosaic GPU kernel reads {BLOCK_K} keys")
    positions_BT = lengths[:, None] + jnp.arange(T, dtype=lengths.dtype)
    at = layer, jnp.arange(B)[:, None], slice(None), positions_BT
    cache_k = cache_k.at[at].set(rotate(k, positions_BT, rope))
    cache_v = cache_v.at[at].set(v)
    padding = [(0, -T * G % ROWS)]
    rotated = rotate(q.astype(jnp.float32), positions_BT, rope) * (scale * math.log2(math.e))
    q_BKRH = rotated.astype(q.dtype).reshape(B, T, K, G, H).transpose(0, 2, 1, 3, 4)
    q_BKRH = jnp.pad(q_BKRH.reshape(B, K, T * G, H), [(0, 0)] * 2 + padding + [(0, 0)])
    positions_BR = jnp.pad(jnp.repeat(positions_BT, G, axis=1), [(0, 0), *padding], "edge")
    acc, m, l = _call(q_BKRH, positions_BR, cache_k, cache_v, layer.reshape(1), lengths, T, T * G)
    # Rescales each split, [splits, B, K, rows], to the maximum over all splits.
    alpha = jnp.exp2(m - jnp.max(m, axis=0))
    out = jnp.einsum("sbkr,sbkrh->bkrh", alpha, acc) / jnp.sum(l * alpha, axis=0)[..., None]
    out = out[:, :, : T * G].reshape(B, K, T, G, H).transpose(0, 2, 1, 3, 4)
    return out.reshape(q.shape).astype(q.dtype), cache_k, cache_v


def _call(q, positions, cache_k, cache_v, layer, lengths, T, rows):
    """Sums, maxima and normalizers of each split: [splits, B, K, rows] and H."""
    (B, K, R, H), S = q.shape, cache_k.shape[3]
    row_blocks = R // ROWS
    # Only rows that hold queries are written, a multiple of 8 because TMA copies 16 bytes or more.
    written = ROWS if row_blocks > 1 else -(-rows // 8) * 8
    resident = (dispatch.num_cores() or 132) // RESIDENT  # one program per multiprocessor, not two
    splits = num_splits(B * K * row_blocks, S, resident)
    transforms = plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)
    tile = lambda *shape: plgpu.SMEM(shape, q.dtype, transforms=transforms)
    barriers = plgpu.Barrier(num_barriers=SLOTS)
    partial = splits, B, K, row_blocks * written
    return plgpu.kernel(
        functools.partial(_kernel, T=T, written=written, splits=splits),
        out_type=[
            jax.ShapeDtypeStruct((*partial, H), jnp.float32),
            *[jax.ShapeDtypeStruct(partial, jnp.float32)] * 2,
        ],
        scratch_types=[
            tile(ROWS, H), tile(SLOTS, BLOCK_K, H), tile(SLOTS, BLOCK_K, H),
            plgpu.SMEM((ROWS, H), jnp.float32), *[plgpu.SMEM((ROWS,), jnp.float32)] * 2,
            plgpu.Barrier(), *[barriers] * 4,
        ],
        grid=(splits, K * row_blocks, B),
        grid_names=("split", "head", "batch"),
        num_threads=2,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpreter(),
        kernel_name="rotary_decode_attention",
    )(layer, lengths, positions, q, cache_k, cache_v)  # fmt: skip


def _kernel(
    layer_ref, lengths_ref, positions_ref, q_ref, k_ref, v_ref, acc_ref, m_ref, l_ref,
    q_smem, k_smem, v_smem, acc_smem, m_smem, l_smem, q_filled, k_filled, v_filled, k_read, v_read,
    *, T, written, splits,
):  # fmt: skip
    warpgroup, b = lax.axis_index("warpgroup"), lax.axis_index("batch")
    split, z = lax.axis_index("split"), lax.axis_index("head")
    row_blocks = jnp.int32(q_ref.shape[2] // ROWS)
    n, row_block = lax.div(z, row_blocks), lax.rem(z, row_blocks)
    rows = pl.ds(row_block * ROWS, ROWS)
    S, H = k_ref.shape[3:]
    length = lengths_ref[b]
    num_blocks = lax.div(length + (T + BLOCK_K - 1), jnp.int32(BLOCK_K))
    per_split = lax.div(num_blocks + (splits - 1), jnp.int32(splits))
    first = split * per_split
    count = jnp.maximum(jnp.minimum(first + per_split, num_blocks) - first, 0)
    # The first new position sees all of these blocks.
    num_full = jnp.clip(lax.div(length + 1, jnp.int32(BLOCK_K)) - first, 0, count)

    def start(i):
        """The first position of block i of this split; the last block ends with the cache."""
        return jnp.minimum((first + i) * BLOCK_K, S - BLOCK_K)

    def for_each_slot(first, last, function):
        lax.fori_loop(first, last, lambda i, _: function(i, lax.rem(i, jnp.int32(SLOTS))), None)

    @pl.when(warpgroup == LOADER)
    def load():
        plgpu.copy_gmem_to_smem(q_ref.at[b, n, rows], q_smem, q_filled)

        def copy(i, slot):
            at = layer_ref[0], b, n, pl.ds(start(i), BLOCK_K)
            for source, target, filled, read in (
                (k_ref, k_smem, k_filled, k_read), (v_ref, v_smem, v_filled, v_read)
            ):  # fmt: skip
                pl.when(i >= SLOTS)(lambda read=read: plgpu.barrier_wait(read.at[slot]))
                plgpu.copy_gmem_to_smem(source.at[at], target.at[slot], filled.at[slot])

        def drain(i, slot):
            """The interpreter requires that each phase of a barrier is awaited."""
            plgpu.barrier_wait(k_read.at[slot])
            plgpu.barrier_wait(v_read.at[slot])

        for_each_slot(0, count, copy)
        for_each_slot(jnp.maximum(count - SLOTS, 0), count, drain)

    @pl.when(warpgroup == COMPUTE)
    def compute():
        last = plgpu.load(
            positions_ref.at[b, rows], layout=plgpu.Layout.WGMMA.reduce(1), optimized=False
        )

        def attend(is_partial, i, carry):
            acc, m, l = carry
            slot = lax.rem(i, jnp.int32(SLOTS))
            plgpu.barrier_wait(k_filled.at[slot])

            def product(scores_ref):
                plgpu.wgmma(scores_ref, q_smem, k_smem.at[slot].transpose((1, 0)))
                return scores_ref[...]  # waits for the product

            scores = pl.run_scoped(product, plgpu.ACC((ROWS, BLOCK_K), jnp.float32))
            plgpu.barrier_arrive(k_read.at[slot])
            if is_partial:
                s = _iota(scores.shape, 1) + start(i)
                # The last block may overlap the one before.
                visible = s >= (first + i) * BLOCK_K
                visible &= s <= lax.broadcast_in_dim(last, scores.shape, [0])
                scores = jnp.where(visible, scores, -jnp.inf)
            m_new = jnp.maximum(m, jnp.max(scores, axis=1))
            weights = jnp.exp2(scores - lax.broadcast_in_dim(m_new, scores.shape, [0]))
            alpha = jnp.exp2(m - m_new)
            l = l * alpha + jnp.sum(weights, axis=1)
            plgpu.barrier_wait(v_filled.at[slot])
            values = v_smem.at[slot]
            if is_partial:
                _clear(values, length + T - start(i))
            acc = acc * lax.broadcast_in_dim(alpha, acc.shape, [0])
            acc = add_product(acc, weights.astype(v_smem.dtype), values)
            plgpu.barrier_arrive(v_read.at[slot])
            return acc, m_new, l

        # m starts finite: in a fully masked row, exp2(-inf - m) is 0 instead of NaN.
        carry = (
            float_array((ROWS, H), 0, plgpu.Layout.WGMMA),
            float_array((ROWS,), MASK_VALUE, plgpu.Layout.WGMMA.reduce(1)),
            float_array((ROWS,), 0, plgpu.Layout.WGMMA.reduce(1)),
        )
        plgpu.barrier_wait(q_filled)
        carry = lax.fori_loop(0, num_full, functools.partial(attend, False), carry)
        carry = lax.fori_loop(num_full, count, functools.partial(attend, True), carry)
        for smem, x in zip((acc_smem, m_smem, l_smem), carry, strict=True):
            smem[...] = x
        # TMA reads shared memory through another proxy: without this, it may read old data.
        plgpu.commit_smem()
        at = split, b, n, pl.ds(row_block * written, written)
        for smem, out_ref in ((acc_smem, acc_ref), (m_smem, m_ref), (l_smem, l_ref)):
            plgpu.copy_smem_to_gmem(smem.at[pl.ds(0, written)], out_ref.at[at])
        plgpu.wait_smem_to_gmem(0)


def _iota(shape, axis):
    return plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=plgpu.Layout.WGMMA)


def _clear(values_ref, valid):
    """Zeros from row ``valid`` on: there the cache may hold NaN, and 0 * NaN is NaN."""
    values = plgpu.load(values_ref, layout=plgpu.Layout.WGMMA, optimized=False)
    values_ref[...] = jnp.where(_iota(values.shape, 0) < valid, values, jnp.zeros_like(values))
    # wgmma reads shared memory through another proxy than these writes.
    plgpu.commit_smem()
