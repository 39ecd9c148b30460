"""The model with a paged cache: prefill of one row at a time, decoding of all rows, meshes."""

import functools

import jax
import jax.numpy as jnp
import model_tools as tools
import numpy as np
import pytest

from llama_jax.config import MeshConfig
from llama_jax.model.cache import KVCache, bytes_per_position
from llama_jax.model.compute import ComputeConfig
from llama_jax.model.params import abstract_params
from llama_jax.model.sharding import PRESETS, make_mesh, reshard, use_mesh

CFG = tools.small(num_layers=2)
PAGE, B, M = 8, 3, 4
PAGES = np.array([[5, 2, 9, 7], [11, 4, 1, 0], [0, 0, 0, 0]], np.int32)
PROMPTS = 19, 5, 0
"""tokens of each row; the last is idle"""
COMPUTE = {preset: ComputeConfig(jnp.dtype("float32"), PRESETS[preset]) for preset in PRESETS}


@functools.cache
def program(preset="fsdp"):
    """Tokens, cache and counts to logits and cache."""
    build = tools.model_of(CFG, COMPUTE[preset])
    call = lambda params, tokens, cache, counts: build(params)(tokens, cache=cache, counts_B=counts)
    return jax.jit(call)


def paged(dtype, preset="fsdp"):
    cache = KVCache.paged(CFG, 13, PAGE, B, M, jnp.dtype(dtype)).shard(COMPUTE[preset].rules)
    return cache._replace(pages_BM=jnp.asarray(PAGES))


def generated(cache, preset="fsdp", steps=6):
    """Logits of each real position [n, V] per row, after chunks of a page of one row at a time and
    then steps of all rows."""
    tokens = tools.random_tokens(CFG, B, 32)
    params = jax.tree.map(
        lambda x, like: reshard(jnp.asarray(x), like.sharding.spec) if like.sharding else x,
        tools.tree_of(tools.random_weights(CFG)),
        abstract_params(CFG, COMPUTE[preset]),
    )
    out = [[] for _ in range(B)]
    arrays, paged_cache = cache, cache.pages_BM is not None
    for b, n in enumerate(PROMPTS):
        for at in range(0, n, PAGE):
            count = min(PAGE, n - at)
            # One row of a paged cache is its own row of the table; all other arrays are shared.
            row = arrays
            if paged_cache:
                row = arrays._replace(
                    lengths_B=jnp.array([at], jnp.int32), pages_BM=jnp.asarray(PAGES[b : b + 1])
                )
                given, counts = tokens[b : b + 1, at : at + PAGE], [count]
            else:
                given = np.zeros((B, PAGE), np.int32)
                given[b] = tokens[b, at : at + PAGE]
                counts = np.where(np.arange(B) == b, count, 0)
            logits, row = program(preset)(params, given, row, jnp.array(counts, jnp.int32))
            out[b].append(np.asarray(logits)[0 if paged_cache else b, :count])
            arrays = arrays.with_arrays(row.k_LBKSH, row.v_LBKSH, row.scales)
            if not paged_cache:
                arrays = row
    lengths, active = np.array(PROMPTS, np.int32), np.array(PROMPTS) > 0
    cache = arrays._replace(lengths_B=jnp.asarray(lengths))
    if paged_cache:
        cache = cache._replace(pages_BM=jnp.asarray(PAGES))
    for step in range(steps):
        given = tokens[np.arange(B), lengths + step][:, None]
        logits, cache = program(preset)(params, given, cache, jnp.asarray(active, jnp.int32))
        for b in np.flatnonzero(active):
            out[b].append(np.asarray(logits)[b])
    assert (cache.lengths_B == lengths + steps * active).all()
    return [np.concatenate(x) for x in out if x], cache


@functools.cache
def want():
    """Logits of the tokens without a cache."""
    tokens, params = tools.random_tokens(CFG, B, 32), tools.tree_of(tools.random_weights(CFG))
    return np.asarray(jax.jit(lambda p: tools.model_of(CFG)(p)(tokens))(params))


def test_prefill_and_decoding():
    """Idle rows and padding change no page of others."""
    logits, cache = generated(paged("float32"))
    for b, got in enumerate(logits):
        assert tools.logit_error(got, want()[b, : len(got)]) < 1e-6
    k = np.asarray(cache.k_LBKSH)
    assert k.shape == (2, 13, 2, PAGE, 6)
    assert (k[:, [3, 6, 8, 10, 12]] == 0).all()  # of nobody
    assert (k[:, 1] == 0).all()  # of row 1, beyond its length
    assert (k[:, [5, 2, 9, 7, 11, 4]] != 0).any(axis=(0, 2, 3, 4)).all()


def test_prefill_and_decoding_with_an_int8_cache():
    logits, cache = generated(paged("int8"))
    empty = KVCache.empty(CFG, B, 40, jnp.dtype("int8"))
    contiguous, _ = generated(empty)
    assert cache.scales[0].shape == (2, 13, 2, PAGE)
    for got, exact in zip(logits, contiguous, strict=True):
        # A rounding of other sums may give another integer.
        assert tools.logit_error(got, exact) < 2e-4


@pytest.mark.parametrize(
    ("preset", "sizes", "dtype"),
    [
        ("fsdp_tensor", dict(tensor=2, fsdp=1), "int8"),
    ],
)
def test_meshes(preset, sizes, dtype):
    """Heads are sharded; every device has all pages."""
    exact = generated(paged(dtype))[0]
    devices = jax.devices()[: sizes["tensor"] * sizes["fsdp"]]
    with use_mesh(make_mesh(MeshConfig(preset=preset, **sizes), devices)):
        logits, cache = generated(paged(dtype, preset), preset)
        (shard, *_) = cache.k_LBKSH.addressable_shards
        assert shard.data.shape == (2, 13, 1, PAGE, 6)
        for x, y in zip(logits, exact, strict=True):
            assert tools.logit_error(x, y) < (1e-6 if dtype == "float32" else 2e-4)


def test_sizes():
    for dtype in ("float32", "int8"):
        cache = KVCache.paged(CFG, 13, PAGE, B, M, jnp.dtype(dtype))
        assert cache.pages_BM.shape == (B, M)
        assert cache.lengths_B.shape == (B,)
        arrays = jax.tree.leaves((cache[:2], cache.scales))
        total = sum(x.nbytes for x in arrays)
        assert total == 13 * PAGE * bytes_per_position(CFG, jnp.dtype(dtype))
