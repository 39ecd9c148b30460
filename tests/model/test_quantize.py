"""Weight-only quantization: error bounds, products, sizes, loss, and sharding."""

import math
import shutil

import convert_tools as tools
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from model_tools import F32, small

from llama_jax.checkpoint.arrays import ORBAX, open_array
from llama_jax.checkpoint.weights import load_layers, load_weights
from llama_jax.config import MODELS, ConfigError
from llama_jax.convert.job import convert
from llama_jax.generate.read_params import read_params
from llama_jax.model.cache import KVCache
from llama_jax.model.llama import ComputeConfig, Llama
from llama_jax.model.params import abstract_params, merge, params_of, structure, unstack_layers
from llama_jax.model.quantize import (
    QuantizedWeight,
    bytes_of,
    is_quantized,
    matmul,
    quantize,
    quantize_weight,
    weight_bytes,
)
from llama_jax.model.sharding import AXES, PRESETS

GB = 1e9


def shapes(name):
    return abstract_params(MODELS[name], F32)


@pytest.mark.parametrize("shape", [(128, 48), (256, 32), (96, 40)])
@pytest.mark.parametrize(("kind", "most"), [("int8", 127), ("int4", 7)])
def test_each_weight_is_within_half_a_step(shape, kind, most):
    w = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    whole = quantize_weight(w, kind)
    back = np.asarray(whole.astype(jnp.float32))
    assert back.shape == shape
    # One scale for each output, and in int4 for each group of inputs.
    group = shape[0] if kind == "int8" else 32 if shape[0] == 96 else 64
    assert (whole.bits, whole.group) == (int(kind[3:]), group)
    assert whole.scale.shape == (shape[0] // group, shape[1])
    step = np.repeat(whole.scale, group, axis=0)
    assert (np.abs(back - w) <= step * 0.5001).all()
    np.testing.assert_allclose(np.abs(back / step).max(), most, rtol=1e-6)
    assert bytes_of(whole) == math.prod(shape) * whole.bits // 8 + whole.scale.size * 4


def test_a_channel_of_zeros_stays_zero():
    w = jnp.zeros((64, 3)).at[:, 1].set(1.0)
    for kind in ("int8", "int4"):
        whole = quantize_weight(w, kind)
        np.testing.assert_array_equal(whole.astype(jnp.float32), w)
        assert (np.asarray(whole.scale) > 0).all()  # what NaN is as an integer differs by platform


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_the_model_equals_one_with_the_rounded_weights(kind):
    """Prefill, then a step with the cache."""
    cfg = small(dim=64, head_dim=16)
    graphdef = structure(cfg, F32)
    params = params_of(Llama(cfg, F32, nnx.Rngs(0)))
    quantized = quantize(params, kind)
    rounded = jax.tree.map(
        lambda x: jax.vmap(lambda layer: layer.astype(jnp.float32))(x) if is_quantized(x) else x,
        quantized, is_leaf=is_quantized,
    )  # fmt: skip
    assert jax.tree.map(jnp.shape, rounded) == jax.tree.map(jnp.shape, params)
    tokens_BT = jnp.arange(12).reshape(2, 6)

    @jax.jit
    def logits(weights):
        llama = merge(graphdef, weights)
        first, cache = llama(tokens_BT, cache=KVCache.empty(cfg, 2, 8, jnp.dtype("float32")))
        return jnp.concatenate([first, llama(tokens_BT[:, :1], cache=cache)[0]], axis=1)

    of_quantized = logits(quantized)
    np.testing.assert_allclose(of_quantized, logits(rounded), atol=2e-6)
    assert not np.allclose(of_quantized, logits(params), atol=1e-6)


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_the_product_is_summed_in_float32_and_rounded_once(kind):
    """In bfloat16, within half of the last bit of the exact result; differentiable in x."""
    rng = np.random.default_rng(0)
    w = quantize_weight(rng.standard_normal((512, 24), np.float32), kind)
    x = jnp.asarray(rng.standard_normal((2, 3, 512)), jnp.bfloat16)
    exact = np.asarray(x, np.float64) @ np.asarray(w.astype(jnp.float32), np.float64)
    got, pull = jax.vjp(lambda x: matmul(x, w, jnp.bfloat16), x)
    assert got.dtype == jnp.bfloat16
    # In int4 the scaled weights are rounded as well.
    error, most = np.abs(np.asarray(got, np.float64) - exact), np.abs(exact).max()
    slack = 1e-5 if kind == "int8" else 0.01
    assert (error <= 2.0**-8 * np.abs(exact) + slack * most).all()
    gradient = jnp.asarray(rng.standard_normal(got.shape), jnp.bfloat16)
    want = np.asarray(gradient, np.float32) @ np.asarray(w.astype(jnp.float32)).T
    (d_x,) = pull(gradient)
    assert d_x.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(d_x, np.float32), want, atol=0.02 * np.abs(want).max())


def test_sizes_of_the_published_models():
    """13B in int8 fits on a 24 GB GPU, 65B in int4 (and int8) on one of 80 GB."""
    assert weight_bytes(shapes("llama-7b"), "bfloat16") == 2 * 6_738_415_616
    assert 13.0 * GB < weight_bytes(shapes("llama-13b"), "int8") < 13.5 * GB
    assert 33.0 * GB < weight_bytes(shapes("llama-65b"), "int4") < 38.0 * GB
    assert weight_bytes(shapes("llama-65b"), "int8") < 67.0 * GB


def test_bytes_are_those_of_the_arrays():
    params = params_of(Llama(small(), F32, nnx.Rngs(0)))
    assert weight_bytes(params, "float32") == sum(x.nbytes for x in jax.tree.leaves(params))
    held = quantize(jax.tree.map(lambda x: x.astype(jnp.bfloat16), params), "int8")
    assert weight_bytes(params, "int8") == sum(x.nbytes for x in jax.tree.leaves(held))


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_sharded_equals_one_device(kind):
    """Groups divide a device's share of the inputs; here the same with and without a mesh."""
    cfg = small(num_heads=4, num_kv_heads=4, dim=32, head_dim=64, ffn_dim=256)
    tokens_BT = jnp.arange(16).reshape(2, 8)
    params = jax.tree.map(np.asarray, params_of(Llama(cfg, F32, nnx.Rngs(0))))
    want = merge(structure(cfg, F32), quantize(params, kind))(tokens_BT)
    mesh = jax.make_mesh((1, 1, 4, 1), AXES, (AxisType.Explicit,) * 4, devices=jax.devices()[:4])
    with jax.set_mesh(mesh):
        compute = ComputeConfig(jnp.dtype("float32"), PRESETS["fsdp_tensor"])
        like = abstract_params(cfg, compute)
        placed = jax.tree.map(
            lambda x, s: jax.device_put(x, NamedSharding(mesh, s.sharding.spec)), params, like
        )
        quantized = quantize(placed, kind)
        q = quantized["blocks"]["mlp"]["up"].q
        assert q.addressable_shards[0].data.size * 4 == q.size
        got = jax.jit(lambda p, t: merge(structure(cfg, compute), p)(t))(quantized, tokens_BT)
    np.testing.assert_allclose(got, want, atol=2e-6)


@pytest.fixture(scope="module", params=["a layer a chunk", "one chunk"])
def checkpoint(request, tmp_path_factory):
    """A model config, and a checkpoint folder as conversion or a training run writes it."""
    cfg = tools.small(dim=64, head_dim=16, num_heads=4, ffn_dim=96)
    folder = tmp_path_factory.mktemp("weights")
    state = tools.meta_state(cfg, tools.DTYPES["float32"], make=tools.random_values)
    made = convert(tools.make_meta(folder / "meta", state, cfg), folder / "made")
    item = made / "steps/0/model"
    if request.param == "one chunk":
        whole = load_weights(made, params_of(Llama(cfg, F32, nnx.Rngs(0))))
        shutil.rmtree(item)
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(**ORBAX)) as files:
            files.save(item, whole)
    chunk = open_array(item, "blocks/mlp/up").chunk_layout.read_chunk.shape
    assert chunk[0] == (cfg.num_layers if request.param == "one chunk" else 1)
    return cfg, made


@pytest.mark.parametrize(("kind", "tensor"), [("int8", 1), ("int8", 4), ("int4", 4)])
def test_quantized_while_loading_equals_afterwards(checkpoint, kind, tensor):
    cfg, folder = checkpoint
    mesh = jax.make_mesh(
        (1, 1, tensor, 1), AXES, (AxisType.Explicit,) * 4, devices=jax.devices()[:tensor]
    )
    with jax.set_mesh(mesh):
        compute = ComputeConfig(jnp.dtype("float32"), PRESETS["fsdp_tensor"])
        like = abstract_params(cfg, compute)
        place = lambda x: jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=NamedSharding(mesh, x.sharding.spec)
        )
        like = jax.tree.map(place, like)
        want = quantize(load_weights(folder, like), kind)
        stacked = read_params(folder, cfg, like, kind)
        unstacked = read_params(folder, cfg, like, kind, unstacked=True)
        same = lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
        jax.tree.map(same, stacked, want)
        jax.tree.map(same, unstacked, unstack_layers(want))
        q = unstacked["blocks"][1]["mlp"]["up"].q
        assert q.addressable_shards[0].data.size * tensor == q.size


def test_weights_of_another_shape_are_an_error(checkpoint):
    _, folder = checkpoint
    with pytest.raises(ConfigError, match=r"blocks/mlp/up is .*, not \(3, 4, 5\)"):
        list(load_layers(folder, "blocks/mlp/up", (3, 4, 5)))


def test_unknown_kind():
    with pytest.raises(ValueError, match="quantize='int3' must be 'int8' or 'int4'"):
        quantize({"blocks": {}}, "int3")


def test_is_a_tree():
    whole = quantize_weight(jnp.ones((64, 2)), "int8")
    assert isinstance(jax.tree.map(lambda x: x, whole), QuantizedWeight)
    assert len(jax.tree.leaves(whole)) == 2


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_a_quantized_stack_is_unstacked(kind):
    """Each layer has its own integers and scales; the projections are fused."""
    cfg = MODELS["tiny"]
    compute = ComputeConfig(jnp.dtype("float32"))
    params = quantize(params_of(Llama(cfg, compute, nnx.Rngs(0))), kind)
    down = params["blocks"]["mlp"]["down"]
    layers = unstack_layers(params)["blocks"]
    assert sorted(layers) == list(range(cfg.num_layers))
    for i, layer in layers.items():
        np.testing.assert_array_equal(layer["mlp"]["down"].q, down.q[i])
        np.testing.assert_array_equal(layer["mlp"]["down"].scale, down.scale[i])
        assert layer["mlp"]["gate_up"].q.shape[-1] == 2 * cfg.ffn_dim
