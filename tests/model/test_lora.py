"""LoRA in the model: equal to merged weights, on any mesh, with packed batches and quantization."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import model_tools as tools
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from lora_tools import merged, random_adapters

from llama_jax.config import LoraConfig, MeshConfig
from llama_jax.model.cache import KVCache
from llama_jax.model.compute import ComputeConfig
from llama_jax.model.lora import (
    TARGETS,
    abstract_adapters,
    add_adapters,
    fuse_adapters,
    init_adapters,
    scale_of,
    with_adapters,
)
from llama_jax.model.params import FUSED, abstract_params, merge, structure, unstack_layers
from llama_jax.model.partial_sums import partial_products
from llama_jax.model.projection import LoraWeight, project
from llama_jax.model.quantize import quantize_weight
from llama_jax.model.sharding import PRESETS, make_mesh

CFG = tools.small(vocab_size=64, dim=32, num_heads=8, num_kv_heads=4, head_dim=4, ffn_dim=64)
LORA = LoraConfig(rank=3, alpha=6.0)
B, T = 8, 16


def loss_of(cfg, compute, lora):
    """(adapters, base, batch, dropout key) -> a scalar, and the same of merged weights."""
    build = tools.model_of(cfg, compute)

    def total(params, batch):
        tokens, segments, positions, d_logits = batch
        logits = build(params)(tokens, segment_ids_BT=segments, positions_BT=positions)
        return jnp.sum(logits * d_logits)

    unmerged = lambda adapters, base, batch, key=None: total(
        with_adapters(base, adapters, lora, key), batch
    )
    return unmerged, lambda adapters, base, batch: total(merged(base, adapters, lora), batch)


def batch_of(cfg):
    """Tokens, two segments per row, and a random gradient of the logits."""
    cut, at = np.arange(B)[:, None] + 3, np.arange(T)[None]
    segments = (at >= cut).astype(np.int32)
    positions = np.where(segments == 1, at - cut, at).astype(np.int32)
    return tools.random_tokens(cfg, B, T), segments, positions, tools.cotangent(cfg, B, T) / B / T


@functools.cache
def expected():
    """Loss and gradients on one device, through the merged weights."""
    adapters = random_adapters(CFG, LORA)
    step = jax.jit(jax.value_and_grad(loss_of(CFG, tools.F32, LORA)[1]))
    return step(adapters, tools.tree_of(tools.random_weights(CFG)), batch_of(CFG))


def assert_same(got, want, tolerance=2e-5):
    assert float(got[0]) == pytest.approx(float(want[0]), rel=tolerance)
    got, want = tools.flat_of(got[1]), tools.flat_of(want[1])
    assert got.keys() == want.keys()
    for name in got:
        assert got[name].dtype == jnp.float32
        assert tools.relative_l2(got[name], want[name]) < tolerance, name


@pytest.mark.parametrize(
    "compute", [dict(remat="full"), dict(remat="matmuls", unroll=True)], ids=str
)
def test_equals_merged_weights(compute):
    """Loss and the gradients of the adapters equal those through the sum of the matrices."""
    unmerged, _ = loss_of(CFG, dataclasses.replace(tools.F32, **compute), LORA)
    base = tools.tree_of(tools.random_weights(CFG))
    got = jax.jit(jax.value_and_grad(unmerged))(random_adapters(CFG, LORA), base, batch_of(CFG))
    assert_same(got, expected())


def test_targets_and_rslora():
    lora = dataclasses.replace(LORA, rslora=True, targets=("q", "v", "down"))
    assert scale_of(lora) == pytest.approx(6 / 3**0.5)
    assert scale_of(LORA) == 2
    adapters = random_adapters(CFG, lora)
    assert {k: sorted(v) for k, v in adapters["blocks"].items()} == {
        "attention": ["q", "v"], "mlp": ["down"]
    }  # fmt: skip
    base, batch = tools.tree_of(tools.random_weights(CFG)), batch_of(CFG)
    got, want = (jax.jit(loss)(adapters, base, batch) for loss in loss_of(CFG, tools.F32, lora))
    assert float(got) == pytest.approx(float(want), rel=1e-5)


@pytest.mark.parametrize(
    ("preset", "sizes", "remat"),
    [
        ("fsdp", dict(data=2), "none"),
        ("fsdp_tensor", dict(tensor=2, context=2), "full"),
        ("tensor_sequence", dict(tensor=2, data=2), "matmuls"),
    ],
)
def test_eight_devices_equal_one(preset, sizes, remat, capfd):
    compute = ComputeConfig(
        jnp.dtype("float32"), PRESETS[preset], remat=remat, reduce_float32=remat == "none"
    )
    mesh = make_mesh(MeshConfig(preset=preset, **sizes))
    adapters = random_adapters(CFG, LORA)
    with jax.set_mesh(mesh):
        place = lambda x: NamedSharding(mesh, x.sharding.spec)
        shardings = functools.partial(jax.tree.map, place)
        specs = shardings(abstract_adapters(CFG, compute, LORA))
        adapters = jax.device_put(adapters, specs)
        base = tools.tree_of(tools.random_weights(CFG))
        base = jax.device_put(base, shardings(abstract_params(CFG, compute)))
        batch = [jax.device_put(x, P(("data", "fsdp"))) for x in batch_of(CFG)]
        unmerged, _ = loss_of(CFG, compute, LORA)
        got = jax.jit(jax.value_and_grad(unmerged))(adapters, base, batch)
    assert "full rematerialization" not in capfd.readouterr().err
    assert_same(got, expected())
    placed = tools.flat_of(specs)
    for name, grad in tools.flat_of(got[1]).items():
        assert grad.sharding.is_equivalent_to(placed[name], grad.ndim), name


@pytest.mark.parametrize("targets", [LORA.targets, ("v", "o", "up"), ("down",)])
def test_fused_adapters(targets):
    """The product of the fused matrices is that of each beside the others, or zero."""
    lora = dataclasses.replace(LORA, targets=targets)
    adapters = random_adapters(CFG, lora)["blocks"]
    fused = fuse_adapters(CFG, adapters)
    product = lambda pair: pair["a"] @ pair["b"]
    for module, (name, parts) in FUSED.items():
        if not set(parts) & set(targets):
            assert name not in fused.get(module, {})
            continue
        widths = CFG.shape("QEE" if module == "attention" else "FF")
        zero = lambda width: np.zeros((CFG.num_layers, CFG.dim, width))
        want = [
            product(adapters[module][part]) if part in targets else zero(width)
            for part, width in zip(parts, widths, strict=True)
        ]
        np.testing.assert_allclose(product(fused[module][name]), np.concatenate(want, 2), atol=1e-6)
        assert not set(parts) & set(fused[module])


def test_unstacked_layers_equal_stacked():
    """Decoding with fused projections, in a loop that chooses the layer, equals merged weights."""
    lora = dataclasses.replace(LORA, targets=("q", "v", "o", "up", "down"))
    adapters = random_adapters(CFG, lora)
    base = tools.tree_of(jax.tree.map(jnp.asarray, tools.random_weights(CFG)))
    tokens = tools.random_tokens(CFG, 2, 5)

    def last_logits(params):
        llama = merge(structure(CFG, tools.F32, unstacked=0 in params["blocks"]), params)
        cache = KVCache.empty(CFG, 2, 8, jnp.dtype("float32"))
        _, cache = llama(tokens[:, :4], cache=cache)
        return llama(tokens[:, 4:], cache=cache)[0]

    want = jax.jit(last_logits)(merged(base, adapters, lora))
    params = unstack_layers({**base, "blocks": jax.tree.map(lambda x: x, base["blocks"])})
    got = jax.jit(last_logits)(add_adapters(CFG, params, adapters, lora))
    assert tools.logit_error(got, want) < 1e-5


def test_partial_sums_of_a_product():
    """A GPU's decode step: the parts add up to the product with the merged matrix."""
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
    for rows in (1, 3):
        x, base, a, b = normal(rows, 1, 1024), normal(1024, 128), normal(1024, 3), normal(3, 128)
        parts = partial_products(x, LoraWeight(base, a, b, 0.5))
        assert parts.shape[0] == 2
        want = x[:, 0] @ (base + 0.5 * a @ b)
        np.testing.assert_allclose(parts.sum(0)[:rows, 0], want, rtol=1e-4, atol=1e-3)


def test_packed_rows_equal_rows_alone():
    """With adapters too, a token attends to its own segment alone."""
    adapters = random_adapters(CFG, LORA)
    base = tools.tree_of(jax.tree.map(jnp.asarray, tools.random_weights(CFG)))
    build, tokens, split = tools.model_of(CFG), batch_of(CFG)[0], T // 2

    @jax.jit
    def logits(tokens, segments, positions):
        llama = build(with_adapters(base, adapters, LORA))
        return llama(tokens, segment_ids_BT=segments, positions_BT=positions)

    at = np.arange(T, dtype=np.int32)[None].repeat(B, 0)
    packed = logits(tokens, (at >= split).astype(np.int32), at % split)
    for part in (slice(split), slice(split, T)):
        alone = logits(tokens[:, part], np.zeros((B, split), np.int32), at[:, :split])
        assert tools.logit_error(packed[:, part], alone) < 1e-5


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_quantized_base(kind):
    """The product and its gradients equal those with the dequantized base."""
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
    x, a, b, d_y = normal(B, T, 32), normal(32, 3), normal(3, 24), normal(B, T, 24)
    base = quantize_weight(normal(32, 24), kind)

    def product(base, x, a, b):
        y = project(tools.F32, x, LoraWeight(base, a, b, 0.5), "DF", "BTF")
        return jnp.sum(y * d_y), y

    step = lambda base: jax.value_and_grad(product, (1, 2, 3), has_aux=True)(base, x, a, b)
    got, want = step(base), step(base.astype(jnp.float32))
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, rtol=1e-4, atol=1e-3), got, want)


def test_dropout():
    """A part of the inputs of each a is zero, another part in each layer, matrix and step; the
    expected product is the same, and evaluation has no dropout."""
    lora = dataclasses.replace(LORA, dropout=0.25)
    adapters = random_adapters(CFG, lora)
    base = tools.tree_of(tools.random_weights(CFG))
    blocks = with_adapters(base, adapters, lora, jax.random.key(0))["blocks"]
    x = jnp.ones((64, CFG.dim))
    weights = [
        jax.tree.map(lambda a, i=i: a[i], blocks[module][name])
        for module, name in (("attention", "q"), ("attention", "k"), ("mlp", "gate"))
        for i in range(CFG.num_layers)
    ]
    dropped = [np.asarray(w.drop(x)) for w in weights]
    for y in dropped:
        assert set(np.unique(y)) == {np.float32(0), np.float32(1 / 0.75)}
        assert np.mean(y) == pytest.approx(1, abs=0.05)
    assert len({y.tobytes() for y in dropped}) == len(dropped)
    layer = lambda i: jax.tree.map(lambda a: a[i], base["blocks"])
    unstacked = {**base, "blocks": {i: layer(i) for i in range(CFG.num_layers)}}
    blocks = with_adapters(unstacked, adapters, lora, jax.random.key(0))["blocks"]
    for i, w in enumerate(weights[: CFG.num_layers]):  # q of each layer
        jax.tree.map(np.testing.assert_array_equal, blocks[i]["attention"]["q"].a, w.a)
        np.testing.assert_array_equal(blocks[i]["attention"]["q"].drop(x), dropped[i])
    evaluated = with_adapters(base, adapters, lora)["blocks"]["mlp"]["down"]
    assert evaluated.drop(x) is x
    with jax.set_mesh(make_mesh(MeshConfig(preset="fsdp_tensor", tensor=2))):
        placed = weights[0].drop(jax.device_put(x, P("fsdp", "tensor")))
    np.testing.assert_array_equal(placed, dropped[0])
    unmerged, _ = loss_of(CFG, tools.F32, lora)
    step = jax.jit(unmerged)
    losses = [float(step(adapters, base, batch_of(CFG), jax.random.key(i))) for i in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]


def test_initial_adapters():
    """As PEFT's: a uniform in +-1 / sqrt(in), b zero; the model is the base."""
    adapters = init_adapters(CFG, tools.F32, LORA, jax.random.key(0))
    seen = []
    for module, name in TARGETS:
        pair = adapters["blocks"][module][name]
        bound = 1 / np.sqrt(pair["a"].shape[1])
        assert bound * 0.9 < np.abs(pair["a"]).max() <= bound
        assert np.std(pair["a"]) == pytest.approx(bound / np.sqrt(3), rel=0.15)
        assert not pair["b"].any()
        seen.append(np.asarray(pair["a"]).ravel()[:8].tobytes())
    assert len(set(seen)) == 7
