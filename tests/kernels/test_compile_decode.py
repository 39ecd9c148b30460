"""The decode step compiled for absent chips: memory, in-place updates, bytes moved."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from llama_jax.chips import compile_for, topology
from llama_jax.config import MODELS, LoraConfig
from llama_jax.generate.decode import FULL_CHUNK
from llama_jax.model.cache import KVCache
from llama_jax.model.llama import ComputeConfig
from llama_jax.model.lora import abstract_adapters, add_adapters, num_adapter_params
from llama_jax.model.params import abstract_params, merge, structure, unstack_layers
from llama_jax.model.quantize import quantize
from llama_jax.model.sharding import AXES, PRESETS, reshard
from llama_jax.plan.hlo import count
from pallas_kernels import Rope, rotary_decode_attention

CFG = MODELS["llama2-7b"]
SLOTS = 4096
MIB = 1 << 20


@pytest.fixture
def machine(monkeypatch):
    """A TPU by name -> a mesh of one of its chips."""
    pytest.importorskip("libtpu", reason="needs the TPU compiler")
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "true")

    return lambda name: mesh_of(topology(name)[:1])


def mesh_of(devices):
    """The devices along `tensor`."""
    grid = np.array(devices).reshape(1, 1, len(devices), 1)
    return Mesh(grid, AXES, axis_types=(AxisType.Explicit,) * 4)


@pytest.mark.parametrize("name", ["v5e", "v5p", "v6e"])
@pytest.mark.parametrize(
    ("B", "T", "N", "K", "dtype"),
    [
        (1, 1, 32, 32, "bfloat16"),
        (1, 1, 32, 8, "bfloat16"),
        (16, 1, 32, 8, "bfloat16"),
        (2, 5, 4, 4, "float32"),
    ],
    ids=["one_row", "one_row_of_8b", "rows", "few_positions"],
)
def test_the_kernel_alone(machine, name, B, T, N, K, dtype):
    """Both caches aliased and no temporary memory; XLA's cost estimate: one pass over the layer."""
    L, H = 4, 128
    mesh = machine(name)
    everywhere = NamedSharding(mesh, PartitionSpec())
    of = lambda *shape, t=dtype: jax.ShapeDtypeStruct(shape, t, sharding=everywhere)
    cache, number = of(L, B, K, SLOTS, H), functools.partial(of, t="int32")
    new = of(B, T, N, H), of(B, T, K, H), of(B, T, K, H)

    def decode(*arguments):
        rope = Rope(arguments[-1], 1.0)
        return rotary_decode_attention(*arguments[:-1], rope, implementation="tpu")

    arguments = *new, cache, cache, number(), number(B), of(H // 2, t="float32")
    with jax.set_mesh(mesh):
        program = jax.jit(decode, donate_argnums=(3, 4)).lower(*arguments).compile()
    memory = program.memory_analysis()
    one = math.prod(cache.shape) * cache.dtype.itemsize
    # libtpu of jax 0.12 keeps 95 KiB for itself on a v5p; one key head's cache has 1 MiB.
    assert memory.temp_size_in_bytes <= (0 if jax.__version_info__ < (0, 12) else 1 << 17)
    assert memory.alias_size_in_bytes == 2 * one
    assert program.cost_analysis()["bytes accessed"] < 1.05 * 2 * one / L


def _step(cfg, devices, B, quantized=None, cache_dtype=jnp.bfloat16, lora=None):
    """A greedy decode step as in `llama_jax.load`, and the shapes of its cache.

    On one GPU without a mesh and with unstacked layers; on TPUs stacked.
    """
    gpu = devices[0].platform != "tpu"
    mesh = None if gpu else mesh_of(devices)
    compute = ComputeConfig(jnp.dtype(jnp.bfloat16), PRESETS["fsdp_tensor"], unroll=gpu)
    graphdef = structure(cfg, compute, unstacked=gpu)
    place = lambda x, spec, dtype=None: jax.ShapeDtypeStruct(
        x.shape,
        dtype or x.dtype,
        sharding=SingleDeviceSharding(devices[0]) if gpu else NamedSharding(mesh, spec),
    )

    def step(params, tokens_BT, cache):
        logits_BTV, cache = merge(graphdef, params)(tokens_BT, cache=cache)
        whole_BTV = reshard(logits_BTV, PartitionSpec())
        return jnp.argmax(whole_BTV, axis=-1).astype(jnp.int32), cache

    def weights():
        params = abstract_params(cfg, compute)
        params = jax.tree.map(lambda x: x.update(dtype=jnp.bfloat16), params)
        if quantized:
            params = jax.eval_shape(lambda p: quantize(p, quantized), params)
        if gpu:
            params = jax.eval_shape(unstack_layers, params)
        if lora:
            adapters = abstract_adapters(cfg, compute, lora)
            adapters = jax.tree.map(lambda x: x.update(dtype=jnp.bfloat16), adapters)
            add = functools.partial(add_adapters, cfg, lora=lora)
            params = jax.eval_shape(lambda p, a: add(p, adapters=a), params, adapters)
        return params

    spec_of = lambda x: None if gpu else x.sharding.spec
    with compile_for(devices[0]) if gpu else jax.set_mesh(mesh):
        params = jax.tree.map(lambda x: place(x, spec_of(x)), weights())
        cache = jax.eval_shape(lambda: KVCache.empty(cfg, B, SLOTS, cache_dtype))
        spec = compute.rules.activation
        specs = KVCache(spec("LBKSH"), spec("LBKSH"), spec("B"), spec("LBKS"))
        cache = KVCache(
            *map(place, cache[:3], specs),
            cache.scales and tuple(place(x, specs.scales) for x in cache.scales),
        )
        tokens = place(jax.ShapeDtypeStruct((B, 1), jnp.int32), spec("BT"))
        return jax.jit(step, donate_argnums=2).lower(params, tokens, cache).compile(), cache


@pytest.mark.parametrize(
    ("name", "chips", "B"),
    [("v5e", 1, 1), ("v6e", 1, 1), ("v5e", 4, 16), ("v6e", 4, 16), ("h200", 1, 1), ("h200", 1, 16)],
)
def test_the_whole_step(name, chips, B, monkeypatch):
    """7B, bfloat16, greedy, cache length 4096: one pass over weights and cache, and nothing copied.

    The cache of 16 rows alone is 34 GB: on four TPU chips.
    """
    gpu = name == "h200"
    package = "jax_cuda13_plugin" if gpu else "libtpu"
    pytest.importorskip(package, reason="needs the compiler")
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "true")
    program, cache = _step(CFG, topology(name)[:chips], B)
    memory = program.memory_analysis()
    stacks = (cache.k_LBKSH.size + cache.v_LBKSH.size) * 2 // chips
    assert stacks <= memory.alias_size_in_bytes < stacks + 1024
    # A copy of one matrix of a layer would be 32 MiB.
    assert memory.temp_size_in_bytes < (32 if gpu else 1) * MIB
    matrices = 2 * (CFG.num_params - math.prod(CFG.shape("VD"))) // chips  # of the embedding, rows
    # What a GPU kernel reads of a cache is not in the program: its live blocks, by its loops.
    moved = count(program.as_text()).bytes + (stacks if gpu else 0)
    assert 0.99 * (matrices + stacks) < moved < 1.05 * (matrices + stacks)


@pytest.mark.parametrize(
    ("B", "quantized", "cache_dtype"),
    [(1, None, "bfloat16"), (16, None, "int8"), (1, "int8", "bfloat16")],
)
def test_kernel_launches_of_a_layer(B, quantized, cache_dtype):
    """8B on an H100: four products, attention and its merging, two norms and SwiGLU.

    Counted as what a second layer adds to a program with one.
    """
    pytest.importorskip("jax_cuda13_plugin", reason="needs the compiler")
    launches = []
    for layers in (1, 2):
        cfg = dataclasses.replace(MODELS["llama3.1-8b"], num_layers=layers)
        program, cache = _step(cfg, topology("h100")[:1], B, quantized, jnp.dtype(cache_dtype))
        launches.append(count(program.as_text()).launches)
    assert launches[1] - launches[0] <= 9
    arrays = jax.tree.leaves(cache._replace(lengths_B=None))
    memory = program.memory_analysis()
    assert memory.alias_size_in_bytes >= sum(x.size * x.dtype.itemsize for x in arrays)
    assert memory.temp_size_in_bytes < 16 * MIB


@pytest.mark.parametrize("name", ["h100", "v5p", "v6e"])
def test_a_chunk_of_a_prompt(name, monkeypatch):
    """8B, 1,024 tokens: the training kernel, the cache updated in place, and no [T, S] in memory.

    The keys and values of one layer are copied to the kernel's layout.
    """
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "true")
    pytest.importorskip("jax_cuda13_plugin" if name == "h100" else "libtpu")
    N, K, H = MODELS["llama3.1-8b"].shape("NKH")
    device = topology(name)[0]
    of = lambda *shape, t="bfloat16": jax.ShapeDtypeStruct(
        shape, t, sharding=SingleDeviceSharding(device)
    )
    cache, new = of(2, 1, K, SLOTS, H), of(1, FULL_CHUNK, K, H)
    numbers = of(t="int32"), of(1, t="int32"), of(H // 2, t="float32")

    def attend(*arguments):
        return rotary_decode_attention(*arguments[:-1], Rope(arguments[-1], 1.0))

    arguments = of(1, FULL_CHUNK, N, H), new, new, cache, cache, *numbers
    with compile_for(device):
        program = jax.jit(attend, donate_argnums=(3, 4)).lower(*arguments).compile()
    assert "rotary_attention_forward" in program.as_text()
    memory, layer = program.memory_analysis(), K * SLOTS * H * 2
    assert memory.alias_size_in_bytes == 4 * layer
    assert memory.temp_size_in_bytes < 6 * layer < N * FULL_CHUNK * SLOTS * 4 / 10


@pytest.mark.parametrize("name", ["v5e", "h200"])
def test_a_step_with_an_adapter(name, monkeypatch):
    """The adapter is read beside the weights: nothing is merged or copied."""
    gpu = name == "h200"
    pytest.importorskip("jax_cuda13_plugin" if gpu else "libtpu", reason="needs the compiler")
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "true")
    cfg, lora = dataclasses.replace(CFG, num_layers=2), LoraConfig(rank=16)
    program, cache = _step(cfg, topology(name)[:1], 1, lora=lora)
    assert program.memory_analysis().temp_size_in_bytes < MIB
    if gpu:
        stacks = 2 * (cache.k_LBKSH.size + cache.v_LBKSH.size)
        weights = 2 * (cfg.num_params - math.prod(cfg.shape("VD")))
        adapters = 2 * num_adapter_params(cfg, lora)
        moved = count(program.as_text()).bytes + stacks
        assert 0.99 * (weights + stacks) < moved < 1.02 * (weights + stacks + 2 * adapters)
