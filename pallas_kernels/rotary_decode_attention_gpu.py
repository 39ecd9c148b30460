"""Rotary decode attention for NVIDIA GPUs in Pallas (Triton).

One kernel rotates the new queries and keys, writes the new keys and values into the cache in place,
and attends. With one new token there are fewer heads than a GPU needs programs, so the valid
positions of each row are split evenly over several programs, whose softmaxes XLA then merges
(Flash-Decoding, https://crfm.stanford.edu/2023/10/12/flashdecoding.html). Invalid positions are not
read. The first split attends to the new keys directly and writes them: no program reads what
another writes.

Letters as in `rotary_decode_attention`; h = H // 2. The rows of a program are queries of one key
head; row t * G + g is query t of head g.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import dispatch
from pallas_kernels.rotary_attention_gpu import MASK_VALUE, _dot, check_triton, plt

BLOCK_K = 64
"""keys loaded at a time: 32 KiB of keys and values per stage, three stages, two programs per
multiprocessor; estimated for a Hopper GPU, not measured"""

PROGRAMS = 264
"""minimal number of programs: two for each of 132 multiprocessors"""


def gpu(q, k, v, cache_k, cache_v, layer, lengths, rope, scale):
    """`rotary_decode_attention` in Pallas, with positional arguments."""
    check_triton()
    B, T, N, H = q.shape
    K, S = cache_k.shape[2:4]
    G = N // K
    if H not in (32, 64, 128):
        raise NotImplementedError(f"head_dim {H}: the GPU kernels support 32, 64 and 128")
    if q.dtype not in (jnp.float32, jnp.bfloat16):
        raise NotImplementedError(f"{q.dtype}: the GPU kernels support float32 and bfloat16")
    rows = min(64, max(16, pl.next_power_of_2(T * G)))
    row_blocks = pl.cdiv(T * G, rows)
    wanted = PROGRAMS // (B * K * row_blocks)
    splits = max(1, min(wanted, pl.cdiv(S, 4 * BLOCK_K)))
    q_rows = q.reshape(B, T, K, G, H).transpose(0, 2, 1, 3, 4).reshape(B, K, T * G, H)
    factor = scale * math.log2(math.e)
    acc, m, l, *caches = _call(
        q_rows, k, v, cache_k, cache_v, layer, lengths, rope, G, rows, row_blocks, splits, factor
    )
    # Rescales each split, [B, K, splits, rows], to the maximum over all splits.
    alpha = jnp.exp2(m - jnp.max(m, axis=2, keepdims=True))
    out = jnp.einsum("bksr,bksrh->bkrh", alpha, acc)
    out = out / jnp.sum(l * alpha, axis=2)[..., None]
    out = out[:, :, : T * G].reshape(B, K, T, G, H).transpose(0, 2, 1, 3, 4)
    return out.reshape(q.shape).astype(q.dtype), *caches


def _call(q, k, v, cache_k, cache_v, layer, lengths, rope, G, rows, row_blocks, splits, factor):
    (L, B, K, S, H), T = cache_k.shape, k.shape[1]
    # Grid: (split, block of rows, batch row and key head).
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
    acc_ref, m_ref, l_ref, new_cache_k_ref, new_cache_v_ref, *, G, T, splits, factor,
):  # fmt: skip
    split, block = pl.program_id(0), pl.program_id(1)
    rows, H = q_ref.shape
    h, dtype = H // 2, q_ref.dtype
    layer, length = layer_ref[0], length_ref[0]
    half_a, half_b, full = pl.ds(0, h), pl.ds(h, h), pl.ds(0, H)

    def rotated(a, b, t):
        """Halves of rows, rotated as new position t, in float32."""
        angle = (length + t).astype(jnp.float32)[:, None] * inv_freq_ref[...][None, :]
        cos, sin = jnp.cos(angle) * scale_ref[0], jnp.sin(angle) * scale_ref[0]
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
        return a * cos - b * sin, b * cos + a * sin

    row = block * rows + jnp.arange(rows)
    t, valid = lax.div(row, G), (row < T * G)[:, None]
    load = lambda ref, at, mask: plt.load(ref.at[at], mask=mask, other=0)
    q_a, q_b = rotated(
        load(q_ref, (slice(None), half_a), valid), load(q_ref, (slice(None), half_b), valid), t
    )
    q_a, q_b = (q_a * factor).astype(dtype), (q_b * factor).astype(dtype)

    def attend(carry, k_a, k_b, v, visible):
        acc, m, l = carry
        scores = jnp.where(visible, _dot(q_a, k_a, True) + _dot(q_b, k_b, True), -jnp.inf)
        m_new = jnp.maximum(m, jnp.max(scores, axis=1))
        weights, alpha = jnp.exp2(scores - m_new[:, None]), jnp.exp2(m - m_new)
        acc = acc * alpha[:, None] + _dot(weights.astype(dtype), v)
        return acc, m_new, l * alpha + jnp.sum(weights, axis=1)

    def attend_cached(j, carry):
        s = j * BLOCK_K + jnp.arange(BLOCK_K)
        at, valid = pl.ds(j * BLOCK_K, BLOCK_K), (s < length)[:, None]
        k_a, k_b, v = (
            load(ref, (layer, at, half), valid).astype(dtype)
            for ref, half in ((cache_k_ref, half_a), (cache_k_ref, half_b), (cache_v_ref, full))
        )
        return attend(carry, k_a, k_b, v, (s < length)[None, :])

    size = min(BLOCK_K, max(16, pl.next_power_of_2(T)))

    def load_new(j):
        """New keys, rotated, and values, rounded to the cache's dtype as later calls read them."""
        s = j * size + jnp.arange(size)
        at, mask = pl.ds(j * size, size), (s < T)[:, None]
        k_a, k_b = rotated(load(k_ref, (at, half_a), mask), load(k_ref, (at, half_b), mask), s)
        k_a, k_b = k_a.astype(cache_k_ref.dtype), k_b.astype(cache_k_ref.dtype)
        return s, k_a, k_b, load(v_ref, (at, full), mask).astype(cache_v_ref.dtype)

    def attend_new(j, carry):
        s, k_a, k_b, v = load_new(j)
        visible = (s[None, :] <= t[:, None]) & (s < T)[None, :]
        return attend(carry, k_a.astype(dtype), k_b.astype(dtype), v.astype(dtype), visible)

    def write_new(j, _):
        s, k_a, k_b, v = load_new(j)
        at, mask = pl.ds(length + j * size, size), (s < T)[:, None]
        plt.store(new_cache_k_ref.at[layer, at, half_a], k_a, mask=mask)
        plt.store(new_cache_k_ref.at[layer, at, half_b], k_b, mask=mask)
        plt.store(new_cache_v_ref.at[layer, at, full], v, mask=mask)

    # Each split has the same number of blocks; the first also has the new positions.
    blocks = lax.div(length + BLOCK_K - 1, BLOCK_K)
    per_split = lax.div(blocks + splits - 1, splits)
    is_first, last_t = split == 0, jnp.minimum(lax.div(block * rows + rows - 1, G), T - 1)
    carry = (
        jnp.zeros((rows, H), jnp.float32),
        jnp.full((rows,), MASK_VALUE, jnp.float32),
        jnp.zeros((rows,), jnp.float32),
    )
    carry = lax.fori_loop(
        split * per_split, jnp.minimum((split + 1) * per_split, blocks), attend_cached, carry
    )
    carry = lax.fori_loop(0, jnp.where(is_first, lax.div(last_t, size) + 1, 0), attend_new, carry)
    pl.when(is_first & (block == 0))(lambda: lax.fori_loop(0, pl.cdiv(T, size), write_new, None))
    acc_ref[...], m_ref[...], l_ref[...] = carry
