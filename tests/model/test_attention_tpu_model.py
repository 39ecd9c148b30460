"""The model with the TPU kernel: sharded in the interpreter, and a layer compiled for a TPU."""

import importlib.metadata
import os

import jax
import jax.numpy as jnp
import model_tools as tools
import pytest
import test_sharding as sharding
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks.kernels.compiled import bytes_around
from llama_jax.chips import topology
from llama_jax.config import MeshConfig
from llama_jax.model.llama import Attention, AttentionInputs, ComputeConfig
from llama_jax.model.rope import rope_of
from llama_jax.model.sharding import PRESETS, make_mesh

# Heads of 64 for the kernel; two documents a row that end at different places.
CFG = tools.small(
    vocab_size=64, dim=32, num_layers=1, num_heads=8, num_kv_heads=4, head_dim=64, ffn_dim=64
)


@pytest.mark.parametrize(
    ("preset", "sizes"),
    [("fsdp", dict(data=2, context=2)), ("tensor_sequence", dict(tensor=4))],
    ids=["fsdp-data2-context2", "tensor_sequence-tensor4"],
)
def test_model_over_the_kernel_equals_one_device(preset, sizes):
    """Loss and gradients on eight devices with the kernel equal those of one without it."""
    compute = ComputeConfig(jnp.dtype("float32"), PRESETS[preset], attention="tpu")
    mesh = make_mesh(MeshConfig(preset=preset, **sizes))
    want, want_grads = sharding._one_device(CFG)
    with jax.set_mesh(mesh):
        specs = sharding._specs(CFG, compute, mesh)
        params = jax.device_put(tools.tree_of(tools.random_weights(CFG)), specs)
        batch = [jax.device_put(x, P(("data", "fsdp"))) for x in sharding._batch(CFG)]
        step = jax.jit(jax.value_and_grad(sharding._loss(CFG, compute)))
        lowered = step.lower(params, *batch).as_text(debug_info=True)
        loss, grads = step(params, *batch)
    assert "rotary_attention_forward" in lowered
    assert float(loss) == pytest.approx(want, rel=1e-5)
    for name, grad in tools.flat_of(grads).items():
        assert tools.relative_l2(grad, want_grads[name]) < 1e-5, name


@pytest.fixture(scope="module")
def v5p():
    pytest.importorskip("libtpu", reason="needs libtpu")
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "true"
    return topology("v5p")[0]


def _layer(device, B, T):
    """Projections and attention of Llama 3 8B, forward and backward, compiled for a chip."""
    cfg = tools.small(dim=4096, num_layers=1, num_heads=32, num_kv_heads=8, head_dim=128)
    compute = ComputeConfig(jnp.dtype("bfloat16"))
    mesh = make_mesh(MeshConfig(), [device])
    with jax.set_mesh(mesh):
        abstract = nnx.eval_shape(lambda: Attention(cfg, compute, 0.02, nnx.Rngs(0)))
        graph, state = nnx.split(abstract)
        of = lambda x, dtype: jax.ShapeDtypeStruct(
            x.shape, dtype, sharding=NamedSharding(mesh, P())
        )
        state = jax.tree.map(lambda x: of(x, jnp.bfloat16), state)
        x_BTD = of(jax.ShapeDtypeStruct((B, T, cfg.dim), jnp.bfloat16), jnp.bfloat16)
        ids = of(jax.ShapeDtypeStruct((B, T), jnp.int32), jnp.int32)

        def both_ways(state, x_BTD, d_out, positions, segments):
            attn_inputs = AttentionInputs(rope_of(cfg), positions, segments)
            run = lambda state, x: nnx.merge(graph, state)(x, attn_inputs)[0]
            out, pull = jax.vjp(run, state, x_BTD)
            return out, *pull(jax.sharding.reshard(d_out, jax.typeof(out).sharding.spec))

        return jax.jit(both_ways).lower(state, x_BTD, x_BTD, ids, ids).compile()


def test_fused_layer_moves_little(v5p):
    """16384 tokens of the 8B in packed documents: bytes moved outside the kernels, and memory."""
    program = _layer(v5p, 4, 4096)
    text = program.as_text()
    assert "rotary_attention_forward" in text
    assert "rotary_attention_backward" in text
    # The sum of the gradients of q, k and v is separate from their products: 0.13e9 bytes and 50
    # MiB more, and fewer cycles.
    assert bytes_around(text) < 3.5e9
    memory = program.memory_analysis()
    # Before its version 0.0.50, libtpu stores temporary arrays also where the results will be; then
    # their bytes are not counted.
    libtpu = tuple(map(int, importlib.metadata.version("libtpu").split(".")[:3]))
    results = memory.output_size_in_bytes if libtpu >= (0, 0, 50) else 0
    assert memory.temp_size_in_bytes < (460 << 20) + results
