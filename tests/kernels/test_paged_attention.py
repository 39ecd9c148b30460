"""Decode attention over a paged cache, against the same over a contiguous cache.

On a CPU the kernels run in Pallas' interpreter.
"""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_rotary_decode_attention import (
    TOLERANCE,
    L,
    decode64,
    normal,
    relative_l2,
    rope_for,
)

from pallas_kernels import fused_decode_attention, rotary_decode_attention
from pallas_kernels.rotary_decode_attention import quantize_rows
from pallas_kernels.rotary_decode_attention_tpu import _live_blocks


def to_pages(cache_LBKS, page, pages_BM, num_pages):
    """A pool with the positions of a contiguous cache, and NaN (int8: 127) in all other pages."""
    cache = np.asarray(cache_LBKS)
    dead = 127 if cache.dtype == np.int8 else np.nan
    L, _, K, _, *H = cache.shape
    pool = np.full((L, num_pages, K, page, *H), dead).astype(cache.dtype)
    for (b, m), number in np.ndenumerate(pages_BM):
        if number:
            pool[:, number] = cache[:, b, :, m * page : (m + 1) * page]
    return jnp.asarray(pool)


def from_pages(pool_LPKS, pages_BM):
    """The contiguous cache of the rows of a table."""
    parts = [np.asarray(pool_LPKS)[:, ids] for ids in np.asarray(pages_BM).T]
    return np.concatenate(parts, axis=3)


_quantize_rows = jax.jit(quantize_rows)


def inputs(shape, lengths, page, dtype="float32", cache_dtype=None):
    """New positions, contiguous caches and their scales with NaN in invalid positions, and a table
    of shuffled pages. Two pages of the pool, and page 0, belong to no row; a row of length 0 has no
    pages.

    Args:
      shape: B, T, M, N, K, H.
      lengths: of the rows.
      page: positions per page.
      dtype: of queries, keys and values.
      cache_dtype: "int8", or None for ``dtype``.
    """
    B, T, M, N, K, H = shape
    rng = np.random.default_rng([*shape, page])
    q, k, v = (normal(rng, (B, T, n, H), dtype) for n in (N, K, K))
    lengths = np.array(lengths, np.int32)
    dead = (np.arange(M * page) >= lengths[:, None])[:, None, :, None]
    caches = [normal(rng, (L, B, K, M * page, H), dtype) for _ in range(2)]
    scales = None
    if cache_dtype == "int8":
        caches, scales = zip(*map(_quantize_rows, caches), strict=True)
        scales = tuple(np.where(dead[..., 0], np.asarray(np.nan, x.dtype), x) for x in scales)
    else:
        caches = [np.where(dead, np.asarray(np.nan, x.dtype), x) for x in caches]
    pages_BM = 1 + rng.permutation(B * M + 2)[: B * M].reshape(B, M).astype(np.int32)
    pages_BM[lengths == 0] = 0
    return (q, k, v), tuple(caches), scales, lengths, pages_BM


def run(implementation, new, caches, scales, lengths, rope, pages_BM=None):
    """Output and caches, then scales, of layer 1."""
    call = functools.partial(rotary_decode_attention, implementation=implementation)
    out = jax.jit(call)(*new, *caches, 1, lengths, rope, scales=scales, pages_BM=pages_BM)
    return jax.tree.leaves(out)


def both(implementation, shape, lengths, page, dtype="float32", cache_dtype=None):
    """(results over the contiguous cache, over the paged one as contiguous, pool before and after);
    the contiguous one by the reference."""
    new, caches, scales, lengths, pages_BM = inputs(shape, lengths, page, dtype, cache_dtype)
    rope, num_pages = rope_for(shape[-1]), pages_BM.size + 3
    want = run("xla", new, caches, scales, lengths, rope)
    pool = jax.tree.map(lambda x: to_pages(x, page, pages_BM, num_pages), (caches, scales))
    got = run(implementation, new, *pool, lengths, rope, pages_BM)
    before = [np.asarray(x) for x in jax.tree.leaves(pool)]
    for x, old in zip(got[1:], before, strict=True):
        assert (x.shape, x.dtype) == (old.shape, old.dtype)
    return want, got, before, lengths, pages_BM


def assert_only_new_positions_changed(got, before, lengths, pages_BM, T, page):
    """Of the layer, in the rows' own pages. What is written to page 0 has no meaning."""
    new = np.zeros(got[1].shape[:2] + got[1].shape[3:4], bool)  # [L, P, page]
    for b, length in enumerate(lengths):
        for at in range(length, length + T):
            m = at // page
            number = pages_BM[b, m] if m < pages_BM.shape[1] else 0
            new[1, number, at % page] = True
    for x, old in zip(got[1:], before, strict=True):
        same = (np.asarray(x) == old) | (np.isnan(np.float32(x)) & np.isnan(np.float32(old)))
        same = same.all(axis=(2, *range(4, same.ndim)))
        assert same[:, 1:][~new[:, 1:]].all()
        assert same[[0, 2]].all()


# (B, T, M, N, K, H), lengths; pages of 128 positions, the blocks of the contiguous reference
SAME_BLOCKS = {
    "one": ((4, 1, 3, 4, 2, 16), [0, 3, 383, 128]),
    "few": ((3, 5, 2, 4, 2, 16), [126, 0, 251]),
    "page": ((2, 128, 3, 4, 2, 16), [77, 256]),
}


@pytest.mark.parametrize(
    ("cache_dtype", "case"), [*((None, case) for case in SAME_BLOCKS), ("int8", "few")]
)
def test_reference_equals_contiguous_bit_for_bit(case, cache_dtype):
    """Very different lengths, shuffled pages, appends that end at and cross a page's border, an
    idle row; NaN in all positions and pages that belong to nobody or to others."""
    shape, lengths = SAME_BLOCKS[case]
    want, got, before, lengths, pages = both("xla", shape, lengths, 128, cache_dtype=cache_dtype)
    used, T = lengths > 0, shape[1]
    assert np.isfinite(np.asarray(got[0])[used]).all()
    assert (np.asarray(got[0])[used] == np.asarray(want[0])[used]).all()
    for x, exact in zip(got[1:], want[1:], strict=True):
        x, exact = np.float32(from_pages(x, pages)), np.float32(exact)
        np.testing.assert_array_equal(x[:, used], exact[:, used])
    assert_only_new_positions_changed(got, before, lengths, pages, T, 128)


@pytest.mark.parametrize("page", [160, 256])
def test_reference_with_other_pages(page):
    """Pages longer than a block, also ones that are not a multiple of it."""
    shape = 3, min(page, 9), 3, 4, 2, 16
    lengths = [2 * page - 4, 1, 3 * page - shape[1]]
    new, caches, _, lengths, _ = inputs(shape, lengths, page)
    clean = [np.nan_to_num(np.float64(x)) for x in caches]
    exact = decode64(*map(np.float64, new), *clean, 1, lengths, rope_for(16))[0]
    _, got, before, lengths, pages = both("xla", shape, lengths, page)
    assert relative_l2(got[0], exact) < TOLERANCE["float32"]
    assert_only_new_positions_changed(got, before, lengths, pages, shape[1], page)


def test_padding_beyond_the_table_is_written_to_page_0():
    """As the last chunk of a prompt that ends with its last page."""
    (q, k, v), caches, _, _, _ = inputs((1, 8, 2, 2, 1, 8), [8], 8)
    pages = jnp.array([[2, 3]])
    pools = [to_pages(np.nan_to_num(x), 8, np.asarray(pages), 4) for x in caches]
    call = functools.partial(rotary_decode_attention, implementation="xla", pages_BM=pages)
    out = jax.jit(call)(q, k, v, *pools, 1, jnp.array([12]), rope_for(8))
    for x, old in zip(out[1:], pools, strict=True):
        x, old = np.asarray(x), np.asarray(old)
        assert np.isnan(old[1, 0, :, :4]).all()
        assert np.isfinite(x[1, 0, :, :4]).all()
        assert (x[1, 3, :, :4] == old[1, 3, :, :4]).all()
        assert (x[1, 3, :, 4:] != old[1, 3, :, 4:]).all()
        assert (x[1, 2] == old[1, 2]).all()


def test_rows_do_not_depend_on_each_other():
    """Bits of a row: whatever its slot, its pages, and what the others are and have."""
    shape, page, rope = (4, 1, 3, 4, 2, 16), 32, rope_for(16)
    new, caches, _, lengths, pages = inputs(shape, [70, 5, 0, 33], page)
    pools = [to_pages(x, page, pages, 16) for x in caches]
    want = run("xla", new, pools, None, lengths, rope, pages)[0][0]
    # Row 0 alone, in slot 2, in other pages.
    alone = np.zeros_like(pages)
    alone[2] = [9, 15, 4]
    moved = [np.full(x.shape, np.nan, x.dtype) for x in pools]
    for x, old in zip(moved, pools, strict=True):
        x[:, alone[2]] = np.asarray(old)[:, pages[0]]
    shuffled = [x[[2, 1, 0, 3]] for x in new]
    got = run("xla", shuffled, moved, None, np.array([0, 0, 70, 0], np.int32), rope, alone)[0][2]
    assert (np.asarray(got) == np.asarray(want)).all()


# Shapes as above, lengths, page, dtype of the cache if not that of the queries.
KERNELS = {
    "tpu-one": ((4, 1, 3, 4, 2, 64), [0, 3, 95, 32], 32, None),
    "tpu-few": ((3, 5, 2, 4, 2, 64), [30, 0, 59], 32, None),
    "tpu-page": ((2, 16, 3, 4, 2, 64), [7, 32], 16, None),
    "gpu-one": ((4, 1, 3, 4, 2, 64), [0, 3, 383, 128], 128, "int8"),
    "gpu-page": ((2, 64, 3, 4, 2, 32), [100, 64], 64, None),
    "tpu_prefill-page": ((1, 128, 3, 8, 2, 64), [77], 128, None),
    "gpu_prefill-page": ((1, 128, 3, 8, 2, 64), [77], 128, None),
}


@pytest.mark.parametrize("case", KERNELS)
def test_kernels(case, monkeypatch):
    """Output and caches as the reference over a contiguous cache; TPU: without races."""
    monkeypatch.setattr("pallas_kernels.rotary_prefill_attention.MAX_DECODE_QUERIES", 100)
    shape, lengths, page, cache_dtype = KERNELS[case]
    name = case.split("-")[0]
    with races_on_tpu(name == "tpu") as races:
        want, got, before, lengths, pages = both(
            name, shape, lengths, page, cache_dtype=cache_dtype
        )
        assert not races()
    used, T = lengths > 0, shape[1]
    out, exact = np.asarray(got[0])[used], np.float64(want[0])[used]
    assert relative_l2(out, exact) < TOLERANCE["float32"]
    for x, exact in zip(got[1:], want[1:], strict=True):
        x, exact = np.float32(from_pages(x, pages))[:, used], np.float32(exact)[:, used]
        np.testing.assert_allclose(x, exact, rtol=1e-6, atol=1e-6)
    assert_only_new_positions_changed(got, before, lengths, pages, T, page)


@contextlib.contextmanager
def races_on_tpu(is_tpu):
    """A function that says whether the interpreter of TPU kernels has detected races."""
    if not is_tpu:
        yield lambda: False
        return
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call
    from jax.experimental.pallas import tpu as pltpu

    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True)):
        yield lambda: interpret_pallas_call.races.races_found


def test_tpu_steps_are_live_blocks():
    """Also where rows could have a long context; a row without positions has one step."""
    rows, firsts = jax.jit(_live_blocks, static_argnums=(1, 2))(
        np.array([0, 1, 128, 129, 4096, 300], np.int32), 128, 4096
    )
    assert np.diff(firsts).tolist() == [1, 1, 1, 2, 32, 3]
    want = np.repeat(np.arange(6), np.diff(firsts))
    assert np.asarray(rows)[: len(want)].tolist() == want.tolist()
    assert np.asarray(rows).max() == 5


@pytest.mark.parametrize("implementation", ["xla", "gpu"])
def test_fused_queries_keys_and_values(implementation):
    (q, k, v), caches, _, lengths, pages = inputs((3, 1, 2, 4, 2, 32), [3, 77, 127], 64)
    pools = [to_pages(x, 64, pages, 9) for x in caches]
    want = run("xla", (q, k, v), pools, None, lengths, rope_for(32), pages)
    qkv = np.concatenate([q, k, v], axis=2)[None]
    got = fused_decode_attention(
        qkv, *pools, jnp.int32(1), lengths, rope_for(32), jnp.dtype("float32"),
        pages_BM=jnp.asarray(pages), implementation=implementation,
    )  # fmt: skip
    for x, exact in zip(got, want, strict=True):
        np.testing.assert_allclose(x, exact, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(T=9), "9 new positions do not fit in one page, which has length 8"),
        (dict(pages=np.zeros(2, np.int32)), r"pages_BM must be \[2, M\]; got \(2,\)"),
        (dict(pages=np.zeros((3, 2), np.int32)), r"pages_BM must be integers of shape \(2, 2\)"),
        (dict(pages=np.zeros((2, 2))), "pages_BM must be integers"),
        (dict(pages=np.full((2, 2), 4)), r"pages_BM must be from 0 to 3 \(a pool of 4 pages\)"),
        (dict(lengths=np.array([0, 16], np.int32)), r"lengths_B must be from 0 to 15"),
        (dict(K=3), r"caches must be \[L, P, 1, S, 8\]"),
        (dict(implementation="mosaic"), "the Mosaic GPU kernel does not support a paged cache"),
        (dict(implementation="gpu", H=64), "pages of 8 positions: .* a multiple of 64"),
        (dict(implementation="tpu", H=64), "cache length 8: .* a multiple of 16"),
    ],
)
def test_refuses(changes, message):
    given = dict(T=1, K=1, pages=np.ones((2, 2), np.int32), lengths=np.zeros(2, np.int32))
    given |= dict(implementation="xla", H=8) | changes
    new = jnp.zeros((2, given["T"], 1, given["H"]))
    pool = jnp.zeros((1, 4, given["K"], 8, given["H"]))
    error = ValueError if given["implementation"] == "xla" else NotImplementedError
    with pytest.raises(error, match=message):
        rotary_decode_attention(
            new, new, new, pool, pool, 0, given["lengths"], rope_for(given["H"]),
            pages_BM=given["pages"], implementation=given["implementation"],
        )  # fmt: skip


@pytest.mark.parametrize(("B", "T"), [(4, 1), (4, 8), (1, 16)])
def test_the_pool_is_not_copied(B, T):
    """On a CPU: carried through the loop over layers, donated; temporary memory below one layer's
    share of the pool."""
    jax.config.update("jax_disable_most_optimizations", False)  # the last test of the file
    L, P, K, page, H = 6, 65, 2, 16, 8
    pool = jax.ShapeDtypeStruct((L, P, K, page, H), jnp.float32)

    def layers(k, v, x, lengths, pages):
        def layer(carry, i):
            return tuple(
                rotary_decode_attention(carry[0], *[carry[0]] * 2, *carry[1:], i, lengths,
                                        rope_for(H), pages_BM=pages)
            ), None  # fmt: skip

        return jax.lax.scan(layer, (x, k, v), jnp.arange(L))[0]

    of = jax.ShapeDtypeStruct
    args = of((B, T, K, H), jnp.float32), of((B,), jnp.int32), of((B, 16), jnp.int32)
    program = jax.jit(layers, donate_argnums=(0, 1)).lower(pool, pool, *args).compile()
    memory, size = program.memory_analysis(), 4 * np.prod(pool.shape)
    assert memory.alias_size_in_bytes == 2 * size
    assert memory.temp_size_in_bytes < size / L
