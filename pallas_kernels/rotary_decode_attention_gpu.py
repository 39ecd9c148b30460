"""Rotary decode attention for NVIDIA GPUs, in Pallas through Triton.

One kernel turns the new queries and keys, writes the new keys and values into the cache in place,
and attends; a reduction by XLA follows. Decoding one token, a row's heads are too few programs for
a GPU: each row's live part is split evenly over several (Flash-Decoding,
https://crfm.stanford.edu/2023/10/12/flashdecoding.html), whose partial softmaxes are then merged.
Slots that are not live are not read. New keys are attended to as they came, by the first split,
which also writes them: no program reads what another writes.

Letters as in `rotary_decode_attention`; h = H // 2. A program works on rows of queries, t * G + g
being query t of head g in its key head's group.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels import dispatch
from pallas_kernels.rotary_attention_gpu import LOWEST, _dot

BLOCK_K = 64
"""Keys loaded at a time: 32 KiB of keys and values in flight a stage, three stages, two programs a
multiprocessor. Computed for a Hopper GPU, not measured."""

PROGRAMS = 264
"""Programs wanted, for the two that each of 132 multiprocessors holds."""


def gpu(q, k, v, cache_k, cache_v, layer, lengths, rope, scale):
    """`rotary_decode_attention` in Pallas; arguments as its front door passes them."""
    B, T, N, H = q.shape
    K, S = cache_k.shape[2:4]
    G = N // K
    if H not in (32, 64, 128):
        raise NotImplementedError(f"head_dim {H}: the GPU kernels have 32, 64 and 128")
    if q.dtype not in (jnp.float32, jnp.bfloat16):
        raise NotImplementedError(f"{q.dtype}: the GPU kernels have float32 and bfloat16")
    rows = min(64, max(16, pl.next_power_of_2(T * G)))
    row_blocks = pl.cdiv(T * G, rows)
    wanted = PROGRAMS // (B * K * row_blocks)
    splits = max(1, min(wanted, pl.cdiv(S, 4 * BLOCK_K)))
    q_rows = q.reshape(B, T, K, G, H).transpose(0, 2, 1, 3, 4).reshape(B, K, T * G, H)
    factor = scale * math.log2(math.e)
    sums, top, total, *caches = _call(
        q_rows, k, v, cache_k, cache_v, layer, lengths, rope, G, rows, row_blocks, splits, factor
    )
    # [B, K, splits, rows]: each split's largest score and sum to the largest of all.
    share = jnp.exp2(top - jnp.max(top, axis=2, keepdims=True))
    out = jnp.einsum("bksr,bksrh->bkrh", share, sums)
    out = out / jnp.sum(total * share, axis=2)[..., None]
    out = out[:, :, : T * G].reshape(B, K, T, G, H).transpose(0, 2, 1, 3, 4)
    return out.reshape(q.shape).astype(q.dtype), *caches


def _call(q, k, v, cache_k, cache_v, layer, lengths, rope, G, rows, row_blocks, splits, factor):
    (L, B, K, S, H), T = cache_k.shape, k.shape[1]
    # Programs: (split, block of rows, row of the batch and key head).
    b, n = lambda z: lax.div(z, K), lambda z: lax.rem(z, K)
    part = (None, None, None, rows)
    index = lambda i, r, z: (b(z), n(z), i, r)
    new = pl.BlockSpec((None, T, None, H), lambda i, r, z: (b(z), 0, n(z), 0))
    cache = pl.BlockSpec((L, None, None, S, H), lambda i, r, z: (0, b(z), n(z), 0, 0))
    partial = (B, K, splits, row_blocks * rows)
    of = jax.ShapeDtypeStruct
    return pl.pallas_call(
        functools.partial(_kernel, G=G, T=T, splits=splits, factor=factor),
        grid=(splits, row_blocks, B * K),
        in_specs=[
            pl.BlockSpec((1,), lambda i, r, z: (0,)),
            pl.BlockSpec((1,), lambda i, r, z: (b(z),)),
            pl.BlockSpec((H // 2,), lambda i, r, z: (0,)),
            pl.BlockSpec((1,), lambda i, r, z: (0,)),
            pl.BlockSpec((None, None, rows, H), lambda i, r, z: (b(z), n(z), r, 0)),
            new, new, cache, cache,
        ],
        out_specs=[
            pl.BlockSpec((*part, H), lambda *at: (*index(*at), 0)),
            pl.BlockSpec(part, index), pl.BlockSpec(part, index), cache, cache,
        ],
        out_shape=[
            of((*partial, H), jnp.float32), of(partial, jnp.float32), of(partial, jnp.float32),
            of(cache_k.shape, cache_k.dtype), of(cache_v.shape, cache_v.dtype),
        ],
        input_output_aliases={7: 3, 8: 4},
        compiler_params=plt.CompilerParams(num_warps=4, num_stages=3),
        interpret=dispatch.platform() == "cpu",
        name="rotary_decode_attention",
    )(
        layer.reshape(1), lengths, rope.inv_freq_H2,
        jnp.asarray(rope.scale, jnp.float32).reshape(1), q, k, v, cache_k, cache_v,
    )  # fmt: skip


def _kernel(
    layer_ref, length_ref, inv_freq_ref, scale_ref, q_ref, k_ref, v_ref, cache_k_ref, cache_v_ref,
    sums_ref, top_ref, total_ref, new_cache_k_ref, new_cache_v_ref, *, G, T, splits, factor,
):  # fmt: skip
    split, block = pl.program_id(0), pl.program_id(1)
    rows, H = q_ref.shape
    h, dtype = H // 2, q_ref.dtype
    layer, length = layer_ref[0], length_ref[0]
    low, high, whole = pl.ds(0, h), pl.ds(h, h), pl.ds(0, H)

    def turned(a, b, t):
        """Halves of rows whose new position is t, in float32."""
        angle = (length + t).astype(jnp.float32)[:, None] * inv_freq_ref[...][None, :]
        cos, sin = jnp.cos(angle) * scale_ref[0], jnp.sin(angle) * scale_ref[0]
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
        return a * cos - b * sin, b * cos + a * sin

    row = block * rows + jnp.arange(rows)
    t, there = lax.div(row, G), (row < T * G)[:, None]
    load = lambda ref, at, mask: plt.load(ref.at[at], mask=mask, other=0)
    q_a, q_b = turned(
        load(q_ref, (slice(None), low), there), load(q_ref, (slice(None), high), there), t
    )
    q_a, q_b = (q_a * factor).astype(dtype), (q_b * factor).astype(dtype)

    def attend(carry, k_a, k_b, v, seen):
        sums, top, total = carry
        scores = jnp.where(seen, _dot(q_a, k_a, True) + _dot(q_b, k_b, True), -jnp.inf)
        new_top = jnp.maximum(top, jnp.max(scores, axis=1))
        weights, shrink = jnp.exp2(scores - new_top[:, None]), jnp.exp2(top - new_top)
        sums = sums * shrink[:, None] + _dot(weights.astype(dtype), v)
        return sums, new_top, total * shrink + jnp.sum(weights, axis=1)

    def old(j, carry):
        s = j * BLOCK_K + jnp.arange(BLOCK_K)
        at, live = pl.ds(j * BLOCK_K, BLOCK_K), (s < length)[:, None]
        k_a, k_b, v = (
            load(ref, (layer, at, half), live).astype(dtype)
            for ref, half in ((cache_k_ref, low), (cache_k_ref, high), (cache_v_ref, whole))
        )
        return attend(carry, k_a, k_b, v, (s < length)[None, :])

    size = min(BLOCK_K, max(16, pl.next_power_of_2(T)))

    def arrived(j):
        """New keys, turned and rounded to the cache's dtype as later calls will read them."""
        s = j * size + jnp.arange(size)
        at, mask = pl.ds(j * size, size), (s < T)[:, None]
        k_a, k_b = turned(load(k_ref, (at, low), mask), load(k_ref, (at, high), mask), s)
        k_a, k_b = k_a.astype(cache_k_ref.dtype), k_b.astype(cache_k_ref.dtype)
        return s, k_a, k_b, load(v_ref, (at, whole), mask).astype(cache_v_ref.dtype)

    def new(j, carry):
        s, k_a, k_b, v = arrived(j)
        seen = (s[None, :] <= t[:, None]) & (s < T)[None, :]
        return attend(carry, k_a.astype(dtype), k_b.astype(dtype), v.astype(dtype), seen)

    def write(j, _):
        s, k_a, k_b, v = arrived(j)
        at, mask = pl.ds(length + j * size, size), (s < T)[:, None]
        plt.store(new_cache_k_ref.at[layer, at, low], k_a, mask=mask)
        plt.store(new_cache_k_ref.at[layer, at, high], k_b, mask=mask)
        plt.store(new_cache_v_ref.at[layer, at, whole], v, mask=mask)

    # As many blocks of the live part for each split; for the first, what is new besides.
    blocks = lax.div(length + BLOCK_K - 1, BLOCK_K)
    each = lax.div(blocks + splits - 1, splits)
    first, last_t = split == 0, jnp.minimum(lax.div(block * rows + rows - 1, G), T - 1)
    carry = (
        jnp.zeros((rows, H), jnp.float32),
        jnp.full((rows,), LOWEST, jnp.float32),
        jnp.zeros((rows,), jnp.float32),
    )
    carry = lax.fori_loop(split * each, jnp.minimum((split + 1) * each, blocks), old, carry)
    carry = lax.fori_loop(0, jnp.where(first, lax.div(last_t, size) + 1, 0), new, carry)
    pl.when(first & (block == 0))(lambda: lax.fori_loop(0, pl.cdiv(T, size), write, None))
    sums_ref[...], top_ref[...], total_ref[...] = carry
