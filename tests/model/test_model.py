"""The model equals transformers, and all ways of running it give the same numbers."""

import dataclasses
import functools
import importlib.util
import time

import jax
import jax.numpy as jnp
import model_tools as tools
import numpy as np
import pytest
from flax import nnx
from make_golden import GOLDEN, golden_of, sample

from llama_jax.config import MODELS, ModelConfig, RopeConfig
from llama_jax.model.cache import KVCache, bytes_per_position
from llama_jax.model.llama import ComputeConfig, Llama
from llama_jax.model.params import abstract_params, merge, params_of, structure, unstack_layers
from llama_jax.model.partial_sums import num_parts
from llama_jax.model.rope import rope_of
from pallas_kernels import Rope, rms_norm
from pallas_kernels.rotary_attention import rotate

HAS_TORCH = all(importlib.util.find_spec(name) for name in ("torch", "transformers"))
LOGITS, GRADS = 1e-5, 1e-5
"""Largest error over the range of the logits; relative L2 error of a weight's gradient."""
GOLDEN_ITSELF = 2e-6
"""Relative L2 error of the golden file: torch's own rounding on other processors."""


# Rotary types differ in numbers, not in the program of the gradient, which takes three times as
# long to compile: these cases compare gradients too.
GRADIENTS = (
    "heads", "grouped", "one_kv_head", "tied", "tied_grouped", "dynamic_long", "llama3",
    "yarn_mscale", "far_linear",
)  # fmt: skip


@pytest.mark.parametrize("case", tools.GRID)
def test_equals_golden(case):
    logits, grads = tools.our_run(*tools.GRID[case], gradients=case in GRADIENTS)
    with np.load(GOLDEN) as golden:
        low, high = golden[f"{case}/range"]
        error = np.abs(sample(logits) - golden[f"{case}/logits"]).max() / (high - low)
        want, norms = golden[f"{case}/grads"], golden[f"{case}/norms"]
    assert error < LOGITS
    if case not in GRADIENTS:
        return
    for i, name in enumerate(sorted(grads)):
        assert tools.relative_l2(sample(grads[name]), want[i]) < GRADS, name
        assert np.linalg.norm(grads[name]) == pytest.approx(norms[i], rel=GRADS), name
    assert len(want) == len(grads)


@pytest.mark.skipif(
    not HAS_TORCH, reason="needs torch and transformers; the golden file replaces them"
)
@pytest.mark.parametrize("case", ["grouped", "yarn_mscale", "far_llama3"])
def test_equals_transformers(case):
    """Every logit and gradient, where the golden file has samples."""
    logits, grads = tools.our_run(*tools.GRID[case])
    want_logits, want_grads = tools.hf_run(*tools.GRID[case])
    assert tools.logit_error(logits, want_logits) < LOGITS
    errors = {name: tools.relative_l2(grads[name], want) for name, want in want_grads.items()}
    assert grads.keys() == want_grads.keys()
    assert max(errors.values()) < GRADS, errors


@pytest.mark.skipif(not HAS_TORCH, reason="needs torch and transformers")
def test_golden_file_equals_transformers():
    """Our model is compared with the golden file in the tests above."""
    with np.load(GOLDEN) as golden:
        for case in tools.GRID:
            for name, want in golden_of(case).items():
                assert tools.relative_l2(golden[name], want) < GOLDEN_ITSELF, name


def test_golden_file_is_small_and_whole():
    assert GOLDEN.stat().st_size < 300_000
    with np.load(GOLDEN) as golden:
        assert {key.split("/")[0] for key in golden} == set(tools.GRID)


def test_grid_reaches_every_rope_type_and_far_positions():
    types = RopeConfig.__pydantic_fields__["type"].annotation.__args__
    models = [cfg for cfg, _, _ in tools.GRID.values()]
    assert {cfg.rope.type for cfg in models} == set(types)
    assert {cfg.rope.type for cfg, _, length in tools.GRID.values() if length > 2048} == set(types)
    assert any(cfg.head_dim * cfg.num_heads != cfg.dim for cfg in models)


# Parameter counts --------------------------------------------------------------------------------

# From the checkpoints as published (sums of the tensors' sizes).
PUBLISHED = {
    "llama-7b": 6_738_415_616,
    "llama-13b": 13_015_864_320,
    "llama-33b": 32_528_943_616,
    "llama-65b": 65_285_660_672,
    "llama2-7b": 6_738_415_616,
    "llama2-13b": 13_015_864_320,
    "llama2-70b": 68_976_648_192,
    "llama3-8b": 8_030_261_248,
    "llama3-70b": 70_553_706_496,
    "llama3.1-8b": 8_030_261_248,
    "llama3.1-70b": 70_553_706_496,
    "llama3.1-405b": 405_853_388_800,
    "llama3.2-1b": 1_235_814_400,
    "llama3.2-3b": 3_212_749_824,
}


@pytest.mark.parametrize("name", MODELS)
def test_parameter_counts_of_every_model(name):
    """Published counts, the formula and the arrays agree; no weight is allocated."""
    cfg = MODELS[name]
    compute = ComputeConfig(jnp.dtype("bfloat16"), remat="full")
    start = time.monotonic()
    shapes = abstract_params(cfg, compute)
    sizes = [np.prod(x.shape, dtype=np.int64) for x in jax.tree.leaves(shapes)]
    assert sum(sizes) == cfg.num_params == PUBLISHED.get(name, cfg.num_params)
    assert {x.dtype for x in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}
    tokens = jax.ShapeDtypeStruct((1, cfg.context), jnp.int32)
    logits = jax.eval_shape(lambda p, t: tools.model_of(cfg, compute)(p)(t), shapes, tokens)
    assert logits.shape == (1, cfg.context, cfg.vocab_size)
    assert logits.dtype == jnp.float32
    assert time.monotonic() - start < 20


# name -> (norm epsilon, rotary base, context, factor of Llama 3.1's scaling): the papers' and the
# published config.json's.
CONSTANTS = {
    **dict.fromkeys(("llama-7b", "llama-13b", "llama-33b"), (1e-6, 1e4, 2048, None)),
    "llama-65b": (1e-5, 1e4, 2048, None),
    **dict.fromkeys(("llama2-7b", "llama2-13b", "llama2-70b"), (1e-5, 1e4, 4096, None)),
    **dict.fromkeys(("llama3-8b", "llama3-70b"), (1e-5, 5e5, 8192, None)),
    **dict.fromkeys(("llama3.1-8b", "llama3.1-70b", "llama3.1-405b"), (1e-5, 5e5, 131072, 8.0)),
    **dict.fromkeys(("llama3.2-1b", "llama3.2-3b"), (1e-5, 5e5, 131072, 32.0)),
}


def test_published_constants():
    assert CONSTANTS.keys() == PUBLISHED.keys()
    for name, constants in CONSTANTS.items():
        cfg = MODELS[name]
        rope = cfg.rope
        assert (cfg.norm_eps, rope.theta, cfg.context, rope.factor) == constants, name
        scaled = (8192, 1.0, 4.0) if rope.factor else (None, None, None)
        assert (rope.original_context, rope.low_freq_factor, rope.high_freq_factor) == scaled, name


def test_flops_per_token():
    """Forward and backward: 6 per weight in a product, 12 L N H T / 2 for causal attention."""
    layer = 2 * 32 * 24 + 2 * 32 * 12 + 3 * 32 * 48 + 2 * 32
    attention = 6 * 2 * 4 * 6 * 100
    want = 6 * (2 * layer + 32 + 40 * 32) + attention
    assert tools.small().flops_per_token(100) == want
    assert tools.small(tie_embeddings=True).flops_per_token(100) == want


@pytest.mark.parametrize("std", [0.02, 0.3])
def test_initial_weights_have_the_stated_spread(std):
    """Residual outputs are scaled by 1 / sqrt(2 L); norms start at one."""
    cfg = tools.small(dim=64, head_dim=32, ffn_dim=96, vocab_size=200)
    weights = tools.flat_of(params_of(Llama(cfg, tools.F32, nnx.Rngs(0), std)))
    for name, w in weights.items():
        if name.endswith("norm"):
            assert (np.asarray(w) == 1).all()
        else:
            last = name in ("blocks.attention.o", "blocks.mlp.down")
            assert np.std(w) == pytest.approx(std / 2 if last else std, rel=0.05), name


# Every setting matters ---------------------------------------------------------------------------

DYNAMIC = {"type": "dynamic", "factor": 2.0}
YARN = {"type": "yarn", "factor": 4.0, "original_context": 2048, "theta": 1e3}
YARN_MSCALE = YARN | {"mscale": 1.5, "mscale_all_dim": 0.5}
LLAMA3 = tools.LLAMA3 | {"original_context": 32}

# field -> (model, the same model with this field changed)
MODEL_CHANGES = {
    "vocab_size": ({}, {"vocab_size": 41}),
    "dim": ({}, {"dim": 36}),
    "num_layers": ({}, {"num_layers": 3}),
    "num_heads": ({}, {"num_heads": 2}),
    "num_kv_heads": ({}, {"num_kv_heads": 1}),
    "head_dim": ({}, {"head_dim": 8}),
    "ffn_dim": ({}, {"ffn_dim": 44}),
    "norm_eps": ({}, {"norm_eps": 1e-2}),
    "rope": ({}, {"rope": {"theta": 100.0}}),
    "context": ({"rope": DYNAMIC, "context": 30}, {"rope": DYNAMIC, "context": 20}),
    "tie_embeddings": ({}, {"tie_embeddings": True}),
}
ROPE_CHANGES = {
    "theta": ({}, {"theta": 1e3}),
    "type": ({"type": "linear", "factor": 2.0}, DYNAMIC),
    "factor": ({"type": "linear", "factor": 2.0}, {"type": "linear", "factor": 3.0}),
    "original_context": (LLAMA3, LLAMA3 | {"original_context": 40}),
    "low_freq_factor": (LLAMA3, LLAMA3 | {"low_freq_factor": 2.0}),
    "high_freq_factor": (LLAMA3, LLAMA3 | {"high_freq_factor": 8.0}),
    "beta_fast": (YARN, YARN | {"beta_fast": 8.0}),
    "beta_slow": (YARN, YARN | {"beta_slow": 0.2}),
    "attention_factor": (YARN, YARN | {"attention_factor": 1.5}),
    "mscale": (YARN_MSCALE, YARN_MSCALE | {"mscale": 2.0}),
    "mscale_all_dim": (YARN_MSCALE, YARN_MSCALE | {"mscale_all_dim": 1.0}),
    "truncate": (YARN, YARN | {"truncate": False}),
}


@functools.cache
def _logits(cfg: ModelConfig) -> np.ndarray:
    """Without jit: models of the same shapes share the compiled operations."""
    tokens, params = tools.random_tokens(cfg, 1, 40), tools.tree_of(tools.random_weights(cfg))
    compute = dataclasses.replace(tools.F32, unroll=True)
    return np.asarray(tools.model_of(cfg, compute)(params)(tokens))


def _differs(one: ModelConfig, other: ModelConfig) -> bool:
    shapes = [{k: v.shape for k, v in tools.random_weights(c).items()} for c in (one, other)]
    return shapes[0] != shapes[1] or np.abs(_logits(one) - _logits(other)).max() > 1e-4


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(ModelConfig)])
def test_model_field_matters(field):
    base, changed = ({"head_dim": 6, "num_layers": 1} | c for c in MODEL_CHANGES[field])
    assert _differs(tools.small(**base), tools.small(**changed))


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(RopeConfig)])
def test_rope_field_matters(field):
    models = [tools.small(rope, num_layers=1, head_dim=16) for rope in ROPE_CHANGES[field]]
    assert _differs(*models)


# Ways of running the forward pass --------------------------------------------------------------

GQA = tools.small(num_layers=2)
DECODE_SLOTS = 20


@functools.cache
def _decoder(cfg: ModelConfig, unroll: bool):
    build = tools.model_of(cfg, dataclasses.replace(tools.F32, unroll=unroll))
    return jax.jit(lambda params, tokens, cache: build(params)(tokens, cache=cache))


@functools.cache
def _prefilled(cfg: ModelConfig) -> tuple[dict, np.ndarray, np.ndarray]:
    """(weights, tokens, their logits at once)."""
    tokens, params = tools.random_tokens(cfg, 2, 17), tools.tree_of(tools.random_weights(cfg))
    return params, tokens, np.asarray(jax.jit(lambda p: tools.model_of(cfg)(p)(tokens))(params))


@pytest.mark.parametrize("unroll", [False, True], ids=["scan", "unroll"])
@pytest.mark.parametrize("chunks", ["17", "+".join(["1"] * 17), "8+1+8"])
@pytest.mark.parametrize("case", ["heads", "grouped"])
def test_decode_equals_prefill(case, chunks, unroll):
    cfg = tools.GRID[case][0]
    params, tokens, want = _prefilled(cfg)
    cache = KVCache.empty(cfg, 2, DECODE_SLOTS, jnp.float32)
    out, at = [], 0
    for n in map(int, chunks.split("+")):
        logits, cache = _decoder(cfg, unroll)(params, tokens[:, at : at + n], cache)
        out.append(logits)
        at += n
    assert tools.logit_error(np.concatenate(out, axis=1), want) < 1e-6
    assert cache.lengths_B.tolist() == [17, 17]


def test_decode_equals_prefill_with_an_int8_cache():
    """Each key and value is read rounded to 8 bits, also by the call that appends it."""
    cfg = tools.GRID["grouped"][0]
    params, tokens, exact = _prefilled(cfg)
    outs = []
    for chunks in ([17], [8, 1, 8]):
        cache, out, at = KVCache.empty(cfg, 2, DECODE_SLOTS, jnp.int8), [], 0
        for n in chunks:
            logits, cache = _decoder(cfg, True)(params, tokens[:, at : at + n], cache)
            out.append(logits)
            at += n
        assert cache.k_LBKSH.dtype == cache.v_LBKSH.dtype == jnp.int8
        outs.append(np.concatenate(out, axis=1))
    # A rounding of other sums may give another integer.
    assert tools.logit_error(outs[1], outs[0]) < 2e-4
    assert 1e-5 < tools.logit_error(outs[0], exact) < 5e-3


def test_bytes_per_position_are_those_of_the_cache():
    for dtype in (jnp.float32, jnp.bfloat16, jnp.int8):
        cache = jax.eval_shape(lambda dtype=dtype: KVCache.empty(GQA, 3, 20, dtype))
        arrays = jax.tree.leaves(cache._replace(lengths_B=None))
        total = sum(x.size * x.dtype.itemsize for x in arrays)
        assert total == 3 * 20 * bytes_per_position(GQA, dtype)


def test_decode_rows_of_different_lengths():
    """Prompts padded to one length: the cache entries of padding are never read."""
    tokens = tools.random_tokens(GQA, 3, 16)
    params = tools.tree_of(tools.random_weights(GQA))
    want = np.asarray(jax.jit(lambda p: tools.model_of(GQA)(p)(tokens))(params))
    lengths = np.array([3, 9, 5], np.int32)
    cache = KVCache.empty(GQA, 3, DECODE_SLOTS, jnp.float32)
    decode = _decoder(GQA, False)
    prefill = jax.jit(
        lambda params, tokens, cache, counts: tools.model_of(GQA)(params)(
            tokens, cache=cache, counts_B=counts
        )
    )
    # In two chunks of 5: a row may have no real token in the second.
    for at in (0, 5):
        counts = jnp.clip(lengths - at, 0, 5)
        logits, cache = prefill(params, tokens[:, at : at + 5], cache, counts)
        for b, n in enumerate(counts.tolist()):
            if n:
                assert tools.logit_error(logits[b, :n], want[b, at : at + n]) < 1e-6
    assert cache.lengths_B.tolist() == lengths.tolist()
    for step in range(6):
        at = lengths + step
        logits, cache = decode(params, tokens[np.arange(3), at][:, None], cache)
        assert tools.logit_error(logits[:, 0], want[np.arange(3), at]) < 1e-6


def test_cache_takes_no_positions():
    build = tools.model_of(GQA)(tools.tree_of(tools.random_weights(GQA)))
    cache = KVCache.empty(GQA, 1, 4, jnp.float32)
    tokens = jnp.zeros((1, 2), jnp.int32)
    with pytest.raises(ValueError, match="positions follow from its lengths"):
        build(tokens, cache=cache, positions_BT=tokens)
    with pytest.raises(ValueError, match="counts_B requires a cache"):
        build(tokens, counts_B=jnp.ones(1, jnp.int32))


def test_packed_equals_unpacked():
    """Packed documents with segment ids give the logits and gradients of separate documents."""
    lengths = [7, 1, 7, 7]
    tokens = tools.random_tokens(GQA, 1, sum(lengths))
    segments = np.repeat(np.arange(1, 5, dtype=np.int32), lengths)[None]
    positions = np.concatenate([np.arange(n, dtype=np.int32) for n in lengths])[None]
    d_logits = tools.cotangent(GQA, 1, sum(lengths))
    params = tools.tree_of(tools.random_weights(GQA))
    build = tools.model_of(GQA)

    @jax.jit
    def run(tokens, d_logits, **documents):
        logits, pull = jax.vjp(lambda p: build(p)(tokens, **documents), params)
        return logits, pull(d_logits)[0]

    logits, grads = run(tokens, d_logits, segment_ids_BT=segments, positions_BT=positions)
    grads = tools.flat_of(grads)
    sums = dict.fromkeys(grads, 0.0)
    for at, n in zip(np.cumsum([0, *lengths]), lengths, strict=False):
        here = slice(at, at + n)
        want, want_grads = run(tokens[:, here], d_logits[:, here])
        assert tools.logit_error(logits[:, here], np.asarray(want)) < 1e-6
        sums = {name: sums[name] + x for name, x in tools.flat_of(want_grads).items()}
    for name, want in sums.items():
        assert tools.relative_l2(grads[name], want) < 2e-6, name


@functools.cache
def _loss_and_grads(remat, unroll: bool, dtype: str = "float32"):
    compute = ComputeConfig(jnp.dtype(dtype), remat=remat, unroll=unroll)
    tokens, d_logits = tools.random_tokens(GQA, 2, 24), tools.cotangent(GQA, 2, 24)
    build = tools.model_of(GQA, compute)
    loss = lambda p: jnp.vdot(build(p)(tokens), d_logits)
    value, grads = jax.jit(jax.value_and_grad(loss))(tools.tree_of(tools.random_weights(GQA)))
    return float(value), tools.flat_of(grads)


@pytest.mark.parametrize("unroll", [False, True], ids=["scan", "unroll"])
@pytest.mark.parametrize("remat", ["none", "matmuls", "full", ("gate", "attention", "k")])
def test_remat_and_unroll_change_nothing(remat, unroll):
    want, want_grads = _loss_and_grads("none", False)
    got, grads = _loss_and_grads(remat, unroll)
    assert got == pytest.approx(want, rel=1e-5)
    for name in grads:
        assert tools.relative_l2(grads[name], want_grads[name]) < 2e-6, name


def test_remat_keeps_the_stated_arrays():
    """Counts matrix products: "matmuls" recomputes those in attention, "full" all of them."""
    tokens, params = tools.random_tokens(GQA, 1, 8), tools.tree_of(tools.random_weights(GQA))

    def products(remat):
        compute = ComputeConfig(jnp.dtype("float32"), remat=remat, unroll=True)
        loss = lambda p: jnp.sum(tools.model_of(GQA, compute)(p)(tokens))
        return count(jax.make_jaxpr(jax.grad(loss))(params).jaxpr)

    def count(jaxpr):
        total = 0
        for eqn in jaxpr.eqns:
            inner = (getattr(x, "jaxpr", x) for x in eqn.params.values())
            total += sum(count(x) for x in inner if hasattr(x, "eqns"))
            total += eqn.primitive.name == "dot_general"
        return total

    none, matmuls, full = map(products, ("none", "matmuls", "full"))
    assert none < matmuls < full
    # A layer has seven matrices; the output of the last product is not needed again.
    assert full - matmuls >= 6 * GQA.num_layers
    assert matmuls - none <= 3 * GQA.num_layers


def test_bfloat16_is_near_and_gradients_are_float32():
    """bfloat16 has 8 bits: layers that preserve the variance give an error of about a percent."""
    _, want = _loss_and_grads("none", False)
    _, grads = _loss_and_grads("none", False, "bfloat16")
    for name in grads:
        assert grads[name].dtype == jnp.float32
        assert 1e-4 < tools.relative_l2(grads[name], want[name]) < 3e-2, name


# The small pieces against float64 ----------------------------------------------------------------


def test_rms_norm_against_float64():
    rng = np.random.default_rng(0)
    x, scale = rng.standard_normal((3, 5, 64)) * 30, rng.standard_normal(64)
    want = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-3) * scale
    got = rms_norm(jnp.float32(x), jnp.float32(scale), 1e-3)
    assert tools.relative_l2(got, want) < 2e-7
    half = rms_norm(jnp.bfloat16(x), jnp.bfloat16(scale), 1e-3)
    assert half.dtype == jnp.bfloat16
    assert tools.relative_l2(half, want) < 5e-3


def test_rms_norm_of_tiny_values_is_governed_by_eps():
    x = jnp.full((1, 1, 8), 1e-6, jnp.float32)
    got = rms_norm(x, jnp.ones(8), 1e-2)
    assert np.allclose(got, 1e-6 / np.sqrt(1e-12 + 1e-2), rtol=1e-6)


def test_rms_norm_in_bfloat16_rounds_where_meta_does():
    """Statistics in float32; rounded before and after the product with the scale."""
    rng = np.random.default_rng(0)
    x, scale = jnp.bfloat16(rng.standard_normal((40, 256)) * 3), np.float32(rng.random(256) + 0.5)
    exact = np.float64(x)
    normed = exact / np.sqrt((exact**2).mean(-1, keepdims=True) + 1e-5)
    want = jnp.bfloat16(np.float32(jnp.bfloat16(normed)) * scale)
    got = rms_norm(x, jnp.asarray(scale), 1e-5)
    # Not all: a number halfway between two bfloat16 values may round either way.
    assert np.mean(np.asarray(got) == np.asarray(want)) > 0.995


def test_norm_eps_is_in_all_three_norms():
    """With a very large eps, every norm divides by sqrt(eps), and the layers add almost nothing."""
    cfg = tools.small(num_layers=1, norm_eps=1e12)
    weights, tokens = tools.random_weights(cfg), tools.random_tokens(cfg, 2, 8)
    hidden = tools.model_of(cfg)(tools.tree_of(weights)).hidden(tokens)
    want = weights["embed"][tokens] * weights["norm"]
    np.testing.assert_allclose(hidden * 1e6, want, atol=1e-3)


def test_rope_against_float64():
    """Up to position 131,071, within the error of float32 angles, at most position * 2**-24."""
    H, theta = 16, 5e5
    cfg = tools.small({"theta": theta}, head_dim=H)
    inv_freq, scale = rope_of(cfg)
    exact = theta ** (-np.arange(0, H, 2) / H)
    # Two roundings, of the power and of its inverse: 2**-23.
    assert np.abs(np.float64(inv_freq) / exact - 1).max() < 2**-23
    assert scale == 1
    positions = np.array([[0, 1, 100, 2047, 131071]])
    x = np.random.default_rng(0).standard_normal((1, 5, 2, H))
    z = x[..., : H // 2] + 1j * x[..., H // 2 :]
    z = z * np.exp(1j * positions[0][:, None, None] * exact)
    want = np.concatenate([z.real, z.imag], axis=-1)
    got = rotate(jnp.float32(x), jnp.asarray(positions), Rope(inv_freq, scale))
    bound = 1e-6 + positions[0] * 2.0**-22
    assert (np.abs(got - want).max(axis=(0, 2, 3)) < 4 * bound).all()
    assert tools.relative_l2(got[:, :4], want[:, :4]) < 1e-4


@pytest.mark.parametrize("length", [10, 64, 65, 200])
def test_dynamic_rope_follows_the_length(length):
    """NTK scaling by the current length beyond the original context, unscaled within it."""
    cfg = tools.small({"type": "dynamic", "factor": 2.0}, context=64, head_dim=16)
    inv_freq, _ = rope_of(cfg, jnp.int32(length - 1))
    stretch = max(1.0, 2.0 * length / 64 - 1)
    want = (1e4 * stretch ** (16 / 14)) ** (-np.arange(0, 16, 2) / 16)
    assert np.abs(np.float64(inv_freq) / want - 1).max() < 2e-6


def test_dynamic_rope_does_not_count_padding():
    """A prompt gives the same logits with padding that exceeds the context."""
    cfg = tools.small({"type": "dynamic", "factor": 4.0}, context=16, num_layers=1, head_dim=16)
    llama = tools.model_of(cfg)(tools.tree_of(tools.random_weights(cfg)))
    tokens, count = tools.random_tokens(cfg, 1, 10), jnp.array([10], jnp.int32)
    padded = np.pad(tokens, ((0, 0), (0, 22)))
    out = []
    for given in (tokens, padded):
        cache = KVCache.empty(cfg, 1, 32, jnp.float32)
        out.append(llama(given, cache=cache, counts_B=count)[0][:, :10])
    assert tools.logit_error(out[1], np.asarray(out[0])) < 1e-6


def test_unstacked_layers_decode_the_same():
    """In a loop of decode steps, as in generation."""
    cfg = tools.small()
    compute = ComputeConfig(jnp.dtype(jnp.float32), unroll=True)
    tokens_TB = np.random.default_rng(0).integers(0, cfg.vocab_size, (5, 2), np.int32)

    def decode(params, unstacked):
        llama = merge(structure(cfg, compute, unstacked), params)

        def step(cache, tokens_B):
            logits_BTV, cache = llama(tokens_B[:, None], cache=cache)
            return cache, logits_BTV[:, 0]

        return jax.lax.scan(step, KVCache.empty(cfg, 2, 8, jnp.float32), tokens_TB)

    decode = jax.jit(decode, static_argnames="unstacked")
    params = params_of(Llama(cfg, compute, nnx.Rngs(0)))
    together = decode(params, unstacked=False)
    unstacked = decode(unstack_layers(params), unstacked=True)
    same = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    jax.tree.map(same, together, unstacked)


def test_unstacked_layers_are_compiled_once_on_a_cpu():
    """More layers give more matrix products but no other code, and no matrix is copied."""

    def compiled(num_layers):
        cfg = tools.small(num_layers=num_layers, num_kv_heads=2)
        compute = ComputeConfig(jnp.dtype(jnp.float32), unroll=True)
        params = unstack_layers(params_of(Llama(cfg, compute, nnx.Rngs(0))))
        cache = KVCache.empty(cfg, 1, 128, jnp.float32)
        of_model = functools.partial(merge, structure(cfg, compute, unstacked=True))
        program = jax.jit(
            lambda params, tokens, cache: of_model(params)(tokens, cache=cache), donate_argnums=2
        )
        matrices = sum(w.nbytes for w in jax.tree.leaves(params["blocks"]))
        return program.lower(params, jnp.zeros((1, 2), int), cache).compile(), matrices

    (few, matrices), (many, more_matrices) = compiled(2), compiled(6)
    assert few.as_text().count("exponential(") == many.as_text().count("exponential(")
    temp = lambda program: program.memory_analysis().temp_size_in_bytes
    assert temp(many) - temp(few) < (more_matrices - matrices) / 2


@pytest.mark.parametrize(("batch", "cache_dtype"), [(1, "float32"), (3, "float32"), (3, "int8")])
def test_partial_sums_decode_the_same(batch, cache_dtype, monkeypatch):
    """The path of decode steps on a GPU, here by the reference implementations of its kernels."""
    cfg = tools.small(num_kv_heads=2)
    compute = ComputeConfig(jnp.dtype(jnp.float32), unroll=True)
    tokens_BT = tools.random_tokens(cfg, batch, 9)
    params = unstack_layers(params_of(Llama(cfg, compute, nnx.Rngs(0))))

    def decode(params):
        llama = merge(structure(cfg, compute, unstacked=True), params)
        _, cache = llama(
            tokens_BT[:, :8], cache=KVCache.empty(cfg, batch, 12, jnp.dtype(cache_dtype))
        )
        return llama(tokens_BT[:, 8:], cache=cache)

    want = jax.jit(decode)(params)
    monkeypatch.setattr("llama_jax.model.llama.use_partial_sums", lambda tokens: tokens == 1)
    monkeypatch.setattr("llama_jax.model.partial_sums.num_parts", lambda *sizes: 4)
    got = jax.jit(lambda params: decode(params))(params)
    same = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    jax.tree.map(same, want, got)


@pytest.mark.parametrize(
    ("inputs", "outputs", "parts"),
    [
        (4096, 6144, 4), (4096, 4096, 8), (4096, 28672, 1), (14336, 4096, 8), (2048, 3072, 4),
        (8192, 2048, 16), (576, 960, 1), (1536, 576, 2), (96, 64, 1),
    ],
)  # fmt: skip
def test_number_of_partial_sums(inputs, outputs, parts):
    """On an H100; each part has at least 512 inputs, and divides them."""
    assert num_parts(inputs, outputs, 132) == parts
