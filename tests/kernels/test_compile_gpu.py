"""Programs compiled for absent GPUs by XLA's CUDA compiler on a CPU."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from llama_jax.chips import gpu_topology
from pallas_kernels import Rope, rotary_attention, rotary_decode_attention
from pallas_kernels.rotary_attention_gpu import query_head_parts
from pallas_kernels.rotary_decode_attention_gpu import num_splits

needs_compiler = pytest.mark.usefixtures("compiler")


@pytest.fixture(scope="module")
def compiler():
    pytest.importorskip("jax_cuda13_plugin", reason="needs jax's CUDA plugin")


NO_SPILLS = {"xla_gpu_fail_ptx_compilation_on_register_spilling": True}


def compiled_for(gpu, function, *shapes, count=1, donate=(), options=None):
    """The function compiled for a GPU by name; shapes are arrays or ShapeDtypeStructs."""
    mesh = Mesh(np.array(gpu_topology(gpu, count)), ("x",), axis_types=(AxisType.Explicit,))
    everywhere = NamedSharding(mesh, PartitionSpec())
    place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere)
    with jax.set_mesh(mesh):
        lowered = jax.jit(function, donate_argnums=donate).lower(*jax.tree.map(place, shapes))
        return lowered.compile(compiler_options=options)


@needs_compiler
@pytest.mark.parametrize(
    ("gpu", "kind"), [("a100", "A100-SXM4-80GB"), ("h100", "H100 80GB"), ("h200", "H200 141GB")]
)
def test_a_product_compiles(gpu, kind):
    x = jax.ShapeDtypeStruct((256, 512), jnp.bfloat16)
    program = compiled_for(gpu, lambda x: x @ x.T, x)
    assert kind in gpu_topology(gpu)[0].device_kind
    assert program.memory_analysis().output_size_in_bytes == 256 * 256 * 2


@needs_compiler
def test_many_gpus_are_hosts_of_eight():
    devices = gpu_topology("h100", 32)
    assert [d.process_index for d in devices[::8]] == [0, 1, 2, 3]
    assert len(gpu_topology("h100", 2)) == 2
    with pytest.raises(ValueError, match="12 GPUs are not a whole number of hosts of 8"):
        gpu_topology("h100", 12)


def test_unknown_gpu():
    with pytest.raises(ValueError, match="no GPU 'h300'; there are a100, h100, h200"):
        gpu_topology("h300")


def _arguments(B, T, N, K, H, dtype=jnp.bfloat16, documents=False):
    of = jax.ShapeDtypeStruct
    q, k = of((B, T, N, H), dtype), of((B, T, K, H), dtype)
    ids = of((B, T), jnp.int32) if documents else None
    return q, k, k, of((B, T), jnp.int32), of((H // 2,), jnp.float32), ids


def _attend(implementation, q, k, v, positions, inv_freq, ids):
    rope = Rope(inv_freq, 1.0)
    return rotary_attention(
        q, k, v, positions, rope, segment_ids_BT=ids, implementation=implementation
    )


def _both_ways(implementation, q, k, v, *rest):
    attend = lambda q, k, v: _attend(implementation, q, k, v, *rest)
    out, pull = jax.vjp(attend, q, k, v)
    return out, pull(out)


@needs_compiler
@pytest.mark.parametrize(("gpu", "H", "documents"), [("h100", 128, True), ("h200", 64, False)])
def test_attention_compiles(gpu, H, documents):
    """No registers are spilled. Temporary memory holds little more than rotated keys and one number
    per query and head.
    """
    T, N, K = 4096, 32, 8
    arguments = _arguments(1, T, N, K, H, documents=documents)
    q_bytes, k_bytes, number = T * N * H * 2, T * K * H * 2, T * N * 4
    angles = 2 * T * H // 2 * 4
    forward = compiled_for(gpu, functools.partial(_attend, "gpu"), *arguments)
    assert "rotary_attention_forward" in forward.as_text()
    assert forward.memory_analysis().temp_size_in_bytes < k_bytes + number + angles + (1 << 18)
    both = compiled_for(gpu, functools.partial(_both_ways, "gpu"), *arguments, options=NO_SPILLS)
    for kernel in ("d_q", "d_kv"):
        assert f"rotary_attention_{kernel}" in both.as_text()
    # Also rotated queries, the gradient of rotated keys in float32, and one more number per query
    # and head.
    limit = q_bytes + 3 * k_bytes + 2 * (number + angles) + (1 << 18)
    assert both.memory_analysis().temp_size_in_bytes < limit


@needs_compiler
@pytest.mark.parametrize(
    ("gpu", "B", "T", "H", "documents", "dtype"),
    [
        ("h100", 2, 1000, 64, True, jnp.bfloat16),
        ("h200", 1, 32768, 128, False, jnp.bfloat16),
        ("a100", 1, 2048, 128, True, jnp.bfloat16),
        ("h100", 1, 256, 128, True, jnp.float32),
    ],
)
def test_attention_compiles_at_any_length(gpu, B, T, H, documents, dtype):
    arguments = _arguments(B, T, 4, 2, H, dtype, documents)
    compiled_for(gpu, functools.partial(_both_ways, "gpu"), *arguments)


@needs_compiler
def test_one_key_head_fills_the_gpu():
    """The gradients of keys and values run in at least 132 programs, the multiprocessors of an
    H100, with 8 query heads and one key head on a device; without spills.
    """
    T, G, H = 4096, 8, 128
    arguments = _arguments(1, T, G, 1, H, documents=True)
    both = compiled_for("h100", functools.partial(_both_ways, "gpu"), *arguments, options=NO_SPILLS)
    d_kv = next(x for x in both.as_text().splitlines() if "rotary_attention_d_kv" in x)
    # Each program writes a block of 128 keys of one part of the heads.
    assert f"f32[8,1,{T},1,{H}]" in d_kv


@pytest.mark.parametrize(
    ("programs", "G", "parts"), [(32, 8, 8), (64, 8, 4), (132, 8, 1), (1, 4, 4), (50, 6, 3)]
)
def test_parts_of_query_heads(programs, G, parts):
    assert query_head_parts(programs, G) == parts


@needs_compiler
@pytest.mark.parametrize(
    ("gpu", "T", "S", "dtype"),
    [
        ("h100", 1, 8192, jnp.bfloat16),
        ("h200", 4, 5000, jnp.bfloat16),
        ("h100", 300, 4096, jnp.bfloat16),
        ("h200", 1, 4096, jnp.float32),
    ],
)
def test_decoding_compiles(gpu, T, S, dtype):
    """The caches are written in place: no memory but the partial results of the real rows."""
    B, N, K, H = 4, 32, 8, 128
    of = jax.ShapeDtypeStruct
    cache = of((2, B, K, S, H), dtype)
    program = compiled_for(
        gpu,
        lambda q, k, v, cache_k, cache_v, layer, lengths, inv_freq: rotary_decode_attention(
            q, k, v, cache_k, cache_v, layer, lengths, Rope(inv_freq, 1.0), implementation="gpu"
        ),
        of((B, T, N, H), dtype), of((B, T, K, H), dtype), of((B, T, K, H), dtype), cache, cache,
        of((), jnp.int32), of((B,), jnp.int32), of((H // 2,), jnp.float32),
        donate=(3, 4),
    )  # fmt: skip
    memory = program.memory_analysis()
    assert "rotary_decode_attention" in program.as_text()
    assert memory.alias_size_in_bytes == 2 * math.prod(cache.shape) * cache.dtype.itemsize
    row_blocks = -(-T * N // K // 64)
    splits = num_splits(B * K * row_blocks, S, 132)
    partial = 4 * splits * B * T * N * (H + 2) if splits > 1 else 0
    assert partial <= memory.temp_size_in_bytes < partial + (1 << 16)
