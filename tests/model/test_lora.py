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

from llama_jax.config import LoraConfig, MeshConfig
from llama_jax.model.compute import ComputeConfig
from llama_jax.model.lora import abstract_adapters, init_adapters, scale_of, with_adapters
from llama_jax.model.params import abstract_params
from llama_jax.model.sharding import PRESETS, make_mesh

CFG = tools.small(vocab_size=64, dim=32, num_heads=8, num_kv_heads=4, head_dim=4, ffn_dim=64)
LORA = LoraConfig(rank=3, alpha=6.0)
B, T = 8, 16


def random_adapters(cfg, lora, seed=0):
    """Adapters whose update is about as large as the weights."""
    adapters = init_adapters(cfg, tools.F32, lora, jax.random.key(seed))
    rng = np.random.default_rng(seed)
    noise = lambda x: np.asarray(x) + 0.3 * rng.standard_normal(x.shape).astype(np.float32)
    return jax.tree.map(noise, adapters)


def merged(params, adapters, lora):
    """The weights plus the scaled products of the adapters."""
    blocks = {k: dict(v) if isinstance(v, dict) else v for k, v in params["blocks"].items()}
    for module, matrices in adapters["blocks"].items():
        for name, x in matrices.items():
            blocks[module][name] += scale_of(lora) * jnp.einsum("Lir,Lro->Lio", x["a"], x["b"])
    return {**params, "blocks": blocks}


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
def expected(rslora=False, targets=LORA.targets):
    """Loss and gradients on one device, through the merged weights."""
    lora = dataclasses.replace(LORA, rslora=rslora, targets=targets)
    adapters = random_adapters(CFG, lora)
    step = jax.jit(jax.value_and_grad(loss_of(CFG, tools.F32, lora)[1]))
    return step(adapters, tools.tree_of(tools.random_weights(CFG)), batch_of(CFG))


def assert_same(got, want, tolerance=2e-5):
    assert float(got[0]) == pytest.approx(float(want[0]), rel=tolerance)
    got, want = tools.flat_of(got[1]), tools.flat_of(want[1])
    assert got.keys() == want.keys()
    for name in got:
        assert got[name].dtype == jnp.float32
        assert tools.relative_l2(got[name], want[name]) < tolerance, name


@pytest.mark.parametrize("compute", [
    dict(), dict(remat="full"), dict(remat="matmuls", unroll=True)
], ids=str)  # fmt: skip
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
    unmerged, _ = loss_of(CFG, tools.F32, lora)
    base = tools.tree_of(tools.random_weights(CFG))
    adapters = random_adapters(CFG, lora)
    assert {k: sorted(v) for k, v in adapters["blocks"].items()} == {
        "attention": ["q", "v"], "mlp": ["down"]
    }  # fmt: skip
    got = jax.jit(jax.value_and_grad(unmerged))(adapters, base, batch_of(CFG))
    assert_same(got, expected(True, lora.targets))


@pytest.mark.parametrize(
    ("preset", "sizes", "remat"),
    [
        ("fsdp", dict(data=2), "none"),
        ("fsdp", dict(context=2), "full"),
        ("fsdp_tensor", dict(tensor=2), "full"),
        ("fsdp_tensor", dict(tensor=2, context=2), "none"),
        ("tensor_sequence", dict(tensor=2, data=2), "matmuls"),
        ("tensor_sequence", dict(tensor=2, context=2), "full"),
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
