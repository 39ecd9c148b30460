"""Rotary decode attention for NVIDIA GPUs in Pallas (Triton).

One kernel rotates the new queries and keys, writes the new keys and values into the cache in place,
and attends. With one new token there are fewer heads than a GPU needs programs, so the valid
positions of each row are split evenly over several programs, whose softmaxes a second kernel merges
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
from pallas_kernels.rotary_decode_attention import scale_of, to_int8

BLOCK_K = 64
"""keys loaded at a time: 32 KiB of keys and values per stage, three stages, two programs per
multiprocessor; estimated for a Hopper GPU, not measured"""

RESIDENT = 2
"""programs that run at a time on one multiprocessor, estimated as above"""


def gpu(q, k, v, cache_k, cache_v, scales, layer, lengths, rope, scale, pages=None):
    """`rotary_decode_attention` in Pallas, with positional arguments."""
    sources = tuple((x[None], 0) for x in (q, k, v))
    caches = cache_k, cache_v, *(scales or ())
    return _decode(sources, q.dtype, caches, layer, lengths, rope, scale, pages)


def gpu_fused(qkv_PBTMH, cache_k, cache_v, scales, layer, lengths, rope, scale, pages, dtype):
    """`fused_decode_attention` in Pallas, with positional arguments."""
    K = cache_k.shape[2]
    N = qkv_PBTMH.shape[3] - 2 * K
    sources = tuple((qkv_PBTMH, first_head) for first_head in (0, N, N + K))
    caches = cache_k, cache_v, *(scales or ())
    return _decode(sources, dtype, caches, layer, lengths, rope, scale, pages)


def num_splits(programs: int, cache_len: int, multiprocessors: int) -> int:
    """Into how many programs the positions of a row and key head are split.

    The time is proportional to the number of waves of programs times the blocks of a split. The
    smallest number of splits within 10% of the shortest time is chosen: each writes partial sums.

    Args:
      programs: without splits.
      cache_len: S; a split has at least four blocks of it.
      multiprocessors: of the GPU.
    """
    blocks, slots = pl.cdiv(cache_len, BLOCK_K), RESIDENT * multiprocessors
    choices = range(1, pl.cdiv(blocks, 4) + 1)
    times = [pl.cdiv(programs * n, slots) * pl.cdiv(blocks, n) for n in choices]
    return next(n for n, time in zip(choices, times, strict=True) if time <= 1.1 * min(times))


def _decode(sources, dtype, caches, layer, lengths, rope, scale, pages):
    """Attention of queries, keys and values, each given as (array, first head).

    The array, [P, B, T, heads, H], holds P partial sums, which are added and rounded to ``dtype``.
    """
    check_triton()
    (q, _), (_, first_key), _ = sources
    (_, _, K, S, H), T, B = caches[0].shape, q.shape[2], len(lengths)
    G = (first_key or q.shape[3]) // K  # in a fused array, the keys follow the queries
    if H not in (32, 64, 128):
        raise NotImplementedError(f"head_dim {H}: the GPU kernels support 32, 64 and 128")
    if dtype not in (jnp.float32, jnp.bfloat16):
        raise NotImplementedError(f"{dtype}: the GPU kernels support float32 and bfloat16")
    if pages is not None and S % BLOCK_K:
        raise NotImplementedError(
            f"pages of {S} positions: the GPU kernels need a multiple of {BLOCK_K}"
        )
    rows = min(64, max(16, pl.next_power_of_2(T * G)))
    row_blocks = pl.cdiv(T * G, rows)
    splits = num_splits(
        B * K * row_blocks, S if pages is None else S * pages.shape[1], dispatch.num_cores() or 132
    )
    factor = scale * math.log2(math.e)
    partial, caches = _call(
        sources, dtype, caches, layer, lengths, rope, pages, G, rows, row_blocks, splits, factor
    )
    out = partial[0] if splits == 1 else _merge(*partial, dtype)  # type: ignore[call-arg]
    return out, *caches[:2], caches[2:] or None


def _call(sources, dtype, caches, layer, lengths, rope, pages, G, rows, row_blocks, splits, factor):
    """The result, or the sums, maxima and normalizers of each split; and the caches."""
    (_, _, K, _, H), T, B = caches[0].shape, sources[0][0].shape[2], len(lengths)
    # Grid: (split, block of rows, batch row and key head).
    b, n = lambda z: lax.div(z, K), lambda z: lax.rem(z, K)

    def source(array, first_head, heads):
        index = lambda i, r, z: (0, b(z), 0, n(z) + first_head // heads, 0)
        return pl.BlockSpec((array.shape[0], None, T, heads, H), index)

    def cached(x):
        """Of one key head, the row, or all pages."""
        L, P, _, *rest = x.shape
        row, number = (None, b) if pages is None else (P, lambda z: 0)
        index = lambda i, r, z: (0, number(z), n(z), *[0] * len(rest))
        return pl.BlockSpec((L, row, None, *rest), index)

    cache_specs = [cached(x) for x in caches]
    tables = [] if pages is None else [pages]
    table_specs = [pl.BlockSpec((None, x.shape[1]), lambda i, r, z: (b(z), 0)) for x in tables]
    index = lambda i, r, z: (i, b(z), 0, n(z))
    acc = pl.BlockSpec((None, None, T, G, H), lambda *at: (*index(*at), 0))
    number = pl.BlockSpec((None, None, T, G), index)
    of = jax.ShapeDtypeStruct
    out_specs, out_shape = [acc], [of((splits, B, T, K * G, H), jnp.float32)]
    if splits == 1:
        out_shape = [of((1, B, T, K * G, H), dtype)]
    else:
        out_specs += [number] * 2
        out_shape += [of((splits, B, T, K * G), jnp.float32)] * 2
    results = pl.pallas_call(
        functools.partial(
            _kernel, dtype=dtype, rows=rows, splits=splits, factor=factor, num_caches=len(caches),
            is_paged=pages is not None,
        ),
        grid=(splits, row_blocks, B * K),
        in_specs=[
            pl.BlockSpec((1,), lambda i, r, z: (0,)),
            pl.BlockSpec((1,), lambda i, r, z: (b(z),)),
            pl.BlockSpec((H // 2,), lambda i, r, z: (0,)),
            pl.BlockSpec((1,), lambda i, r, z: (0,)),
            *(source(*x, heads) for x, heads in zip(sources, (G, 1, 1), strict=True)),  # type: ignore[call-arg]
            *table_specs,
            *cache_specs,
        ],
        out_specs=[*out_specs, *cache_specs],
        out_shape=[*out_shape, *(of(x.shape, x.dtype) for x in caches)],
        input_output_aliases={
            7 + len(tables) + i: len(out_specs) + i for i in range(len(caches))
        },
        compiler_params=plt.CompilerParams(num_warps=4, num_stages=3),
        interpret=dispatch.platform() == "cpu",
        name="rotary_decode_attention",
    )(
        layer.reshape(1), lengths, rope.inv_freq_H2,
        jnp.asarray(rope.scale, jnp.float32).reshape(1), *(x for x, _ in sources),
        *tables, *caches,
    )  # fmt: skip
    partial, caches = results[: len(out_specs)], tuple(results[len(out_specs) :])
    return ([partial[0][0]] if splits == 1 else partial), caches


def _kernel(
    layer_ref, length_ref, inv_freq_ref, scale_ref, q_ref, k_ref, v_ref, *refs,
    dtype, rows, splits, factor, num_caches, is_paged,
):  # fmt: skip
    *tables, cache_k_ref, cache_v_ref = refs[: is_paged + 2]
    scale_refs, refs = refs[is_paged + 2 : is_paged + num_caches], refs[is_paged + num_caches :]
    partial_refs, new_refs = refs[:-num_caches], refs[-num_caches:]
    page = jnp.int32(cache_k_ref.shape[-2])
    split, block = pl.program_id(0), pl.program_id(1)
    _, T, G, H = q_ref.shape
    h = H // 2
    layer, length = layer_ref[0], length_ref[0]
    half_a, half_b, full = pl.ds(0, h), pl.ds(h, h), pl.ds(0, H)
    columns_a = jnp.arange(h)[None, :]
    load = lambda ref, at, mask: plt.load(ref.at[at], mask=mask, other=0)

    def summed(ref, at, mask):
        """Partial sums, added in float32 and rounded."""
        parts = (load(ref, (jnp.int32(i), *at), mask) for i in range(ref.shape[0]))
        return functools.reduce(jnp.add, parts).astype(dtype)

    def rotated(a, b, t):
        """Halves of rows, rotated as new position t, in float32."""
        angle = (length + t).astype(jnp.float32)[:, None] * inv_freq_ref[...][None, :]
        cos, sin = jnp.cos(angle) * scale_ref[0], jnp.sin(angle) * scale_ref[0]
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
        return a * cos - b * sin, b * cos + a * sin

    row = block * rows + jnp.arange(rows)
    t, g, valid = lax.div(row, G), lax.rem(row, G), row < T * G
    query = t[:, None], g[:, None]
    q_a, q_b = rotated(
        summed(q_ref, (*query, columns_a), valid[:, None]),
        summed(q_ref, (*query, columns_a + h), valid[:, None]),
        t,
    )
    q_a, q_b = (q_a * factor).astype(dtype), (q_b * factor).astype(dtype)

    def attend(carry, k_a, k_b, v, scales, visible):
        acc, m, l = carry
        scores = _dot(q_a, k_a.astype(dtype), True) + _dot(q_b, k_b.astype(dtype), True)
        if scales:
            scores = scores * scales[0].astype(jnp.float32)[None, :]
        scores = jnp.where(visible, scores, -jnp.inf)
        m_new = jnp.maximum(m, jnp.max(scores, axis=1))
        weights, alpha = jnp.exp2(scores - m_new[:, None]), jnp.exp2(m - m_new)
        l = l * alpha + jnp.sum(weights, axis=1)
        if scales:
            weights = weights * scales[1].astype(jnp.float32)[None, :]
        return acc * alpha[:, None] + _dot(weights.astype(dtype), v.astype(dtype)), m_new, l

    def attend_cached(j, carry):
        first, place = j * BLOCK_K, [layer]
        valid = first + jnp.arange(BLOCK_K) < length
        if is_paged:
            place.append(tables[0][lax.div(first, page)])
            first = lax.rem(first, page)
        place.append(pl.ds(first, BLOCK_K))
        k_a, k_b, v = (
            load(ref, (*place, half), valid[:, None])
            for ref, half in ((cache_k_ref, half_a), (cache_k_ref, half_b), (cache_v_ref, full))
        )
        scales = [load(ref, tuple(place), valid) for ref in scale_refs]
        return attend(carry, k_a, k_b, v, scales, valid[None, :])

    size, head = min(BLOCK_K, max(16, pl.next_power_of_2(T))), jnp.int32(0)

    def load_new(j):
        """New keys, rotated, and values, rounded to the cache's dtype as later calls read them."""
        s = j * size + jnp.arange(size)
        at, mask = pl.ds(j * size, size), (s < T)[:, None]
        k_a, k_b = (summed(k_ref, (at, head, half), mask) for half in (half_a, half_b))
        k_a, k_b = rotated(k_a, k_b, s)
        v = summed(v_ref, (at, head, full), mask)
        if not scale_refs:
            return s, *(x.astype(cache_k_ref.dtype) for x in (k_a, k_b, v)), []
        largest = lambda x: jnp.max(jnp.abs(x), axis=1)
        # In the dtype of the keys that the reference quantizes.
        k_a, k_b, v = (x.astype(dtype).astype(jnp.float32) for x in (k_a, k_b, v))
        k_scale, v_scale = scale_of(jnp.maximum(largest(k_a), largest(k_b))), scale_of(largest(v))
        k_a, k_b = to_int8(k_a, k_scale[:, None]), to_int8(k_b, k_scale[:, None])
        return s, k_a, k_b, to_int8(v, v_scale[:, None]), [k_scale, v_scale]

    def attend_new(j, carry):
        s, k_a, k_b, v, scales = load_new(j)
        visible = (s[None, :] <= t[:, None]) & (s < T)[None, :]
        return attend(carry, k_a, k_b, v, scales, visible)

    def write_new(j, _):
        s, k_a, k_b, v, scales = load_new(j)
        mask, place = s < T, [layer]
        at = length + s
        if is_paged:
            m = lax.div(at, page)
            place.append(load(tables[0], (m,), mask & (m < tables[0].shape[0])))  # else page 0
            at = lax.rem(at, page)
        place.append(at)
        of_rows = tuple(x if x.ndim == 0 else x[:, None] for x in place)
        plt.store(new_refs[0].at[(*of_rows, columns_a)], k_a, mask=mask[:, None])
        plt.store(new_refs[0].at[(*of_rows, columns_a + h)], k_b, mask=mask[:, None])
        plt.store(new_refs[1].at[(*of_rows, jnp.arange(H)[None, :])], v, mask=mask[:, None])
        for ref, scale in zip(new_refs[2:], scales, strict=True):
            plt.store(ref.at[tuple(place)], scale, mask=mask)

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
    acc, m, l = carry
    columns = jnp.arange(H)[None, :]
    if splits == 1:
        out = (acc / l[:, None]).astype(dtype)
        plt.store(partial_refs[0].at[(*query, columns)], out, mask=valid[:, None])
        return
    plt.store(partial_refs[0].at[(*query, columns)], acc, mask=valid[:, None])
    for ref, number in zip(partial_refs[1:], (m, l), strict=True):
        plt.store(ref.at[t, g], number, mask=valid)


def _merge(acc, m, l, dtype):
    """Rescales each split, [splits, B, T, N, H], to the maximum over all splits, and adds them."""
    splits, *rows, H = acc.shape
    R, padded = math.prod(rows), pl.next_power_of_2(splits)

    def kernel(acc_ref, m_ref, l_ref, out_ref):
        i, columns = jnp.arange(padded), jnp.arange(H)[None, :]
        load = lambda ref, other: plt.load(ref.at[i], mask=i < splits, other=other)
        m, l = load(m_ref, MASK_VALUE), load(l_ref, 0)
        acc = plt.load(acc_ref.at[i[:, None], columns], mask=(i < splits)[:, None], other=0)
        alpha = jnp.exp2(m - jnp.max(m))
        out = jnp.sum(alpha[:, None] * acc, axis=0) / jnp.sum(alpha * l)
        out_ref[...] = out.astype(dtype)

    number = pl.BlockSpec((splits, None), lambda r: (0, r))
    out = pl.pallas_call(
        kernel,
        grid=(R,),
        in_specs=[pl.BlockSpec((splits, None, H), lambda r: (0, r, 0)), number, number],
        out_specs=pl.BlockSpec((None, H), lambda r: (r, 0)),
        out_shape=jax.ShapeDtypeStruct((R, H), dtype),
        compiler_params=plt.CompilerParams(num_warps=2),
        interpret=dispatch.platform() == "cpu",
        name="merge_splits",
    )(acc.reshape(splits, R, H), m.reshape(splits, R), l.reshape(splits, R))
    return out.reshape(*rows, H)
