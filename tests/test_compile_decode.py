"""The decode step compiled for TPUs that are not there: memory, changes in place, bytes moved."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from llama_jax.config import MODELS
from llama_jax.model import Execution, KVCache, Llama
from llama_jax.sharding import AXES, PRESETS
from llama_jax.step import merge, split, structure
from pallas_kernels import Rope, rotary_decode_attention

CFG = MODELS["llama2-7b"]
SLOTS = 4096
MIB = 1 << 20


@pytest.fixture
def machine(monkeypatch):
    """(topology, chips of it) -> mesh, the chips along `tensor`."""
    pytest.importorskip("libtpu", reason="needs the TPU compiler")
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "true")

    def make(name, chips):
        devices = topologies.get_topology_desc(platform="tpu", topology_name=name).devices[:chips]
        grid = np.array(devices).reshape(1, 1, chips, 1)
        return Mesh(grid, AXES, axis_types=(AxisType.Explicit,) * 4)

    return make


@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
@pytest.mark.parametrize(
    ("B", "T", "N", "K", "dtype"),
    [(1, 1, 32, 32, "bfloat16"), (16, 1, 32, 8, "bfloat16"), (2, 5, 4, 4, "float32")],
    ids=["one_row", "rows", "few_positions"],
)
def test_the_kernel_alone(machine, topology, B, T, N, K, dtype):
    """Both caches aliased; told to XLA: one pass over a layer's cache. No temporary memory, but for
    the small operands on a chip of two cores (v5p)."""
    L, H = 4, 128
    mesh = machine(topology, 1)
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
    assert memory.temp_size_in_bytes <= (MIB // 4 if topology.startswith("v5p") else 0)
    assert memory.alias_size_in_bytes == 2 * one
    assert program.cost_analysis()["bytes accessed"] < 1.05 * 2 * one / L


@pytest.mark.parametrize(
    ("topology", "chips", "B"),
    [("v5e:2x2", 1, 1), ("v6e:2x2", 1, 1), ("v5e:2x2", 4, 16), ("v6e:2x2", 4, 16)],
)
def test_the_whole_step(machine, topology, chips, B):
    """7B, bfloat16, greedy, 4096 slots. 16 rows' cache alone is 34 GB: on four chips."""
    mesh = machine(topology, chips)
    how = Execution(jnp.dtype(jnp.bfloat16), PRESETS["fsdp_tensor"])
    graphdef = structure(CFG, how)
    place = lambda x, spec, dtype=None: jax.ShapeDtypeStruct(
        x.shape, dtype or x.dtype, sharding=NamedSharding(mesh, spec)
    )

    def step(params, tokens_BT, cache):
        logits_BTV, cache = merge(graphdef, params)(tokens_BT, cache=cache)
        whole_BTV = jax.sharding.reshard(logits_BTV, PartitionSpec())
        return jnp.argmax(whole_BTV, axis=-1).astype(jnp.int32), cache

    with jax.set_mesh(mesh):
        weights = jax.eval_shape(lambda: split(Llama(CFG, how, nnx.Rngs(0)))[1])
        params = jax.tree.map(lambda x: place(x, x.sharding.spec, jnp.bfloat16), weights)
        cache = jax.eval_shape(lambda: KVCache.empty(CFG, B, SLOTS, jnp.bfloat16))
        act = how.rules.act
        specs = KVCache(act("LBKSH"), act("LBKSH"), act("B"))
        cache = KVCache(*map(place, cache, specs))
        tokens = place(jax.ShapeDtypeStruct((B, 1), jnp.int32), act("BT"))
        program = jax.jit(step, donate_argnums=2).lower(params, tokens, cache).compile()
    memory = program.memory_analysis()
    stacks = (cache.k_LBKSH.size + cache.v_LBKSH.size) * 2 // chips
    assert stacks <= memory.alias_size_in_bytes < stacks + 1024
    assert memory.temp_size_in_bytes < 100 * MIB
    if (topology, chips) == ("v5e:2x2", 1):
        # A copy of one projection of a layer in main memory would be 32 MiB. The v6e program makes
        # one: see benchmarks/NOTES.md.
        assert memory.temp_size_in_bytes < MIB
        moved, needed = _moved(program, params, cache, chips)
        assert 0.95 * needed < moved < 1.05 * needed


def _moved(program, params, cache, chips):
    """Bytes a chip moves to and from main memory in one step, and what weights and cache are.

    XLA counts the body of the scan once; what it reads outside is the output matrix. It counts what
    is put into the chip's own memory (space 1) and read from there too: those are taken off.
    """
    bytes_of = lambda tree: sum(x.size * 2 for x in jax.tree.leaves(tree)) // chips
    outside = bytes_of(params["unembed"])
    blocks = bytes_of(params["blocks"])
    stacks = bytes_of((cache.k_LBKSH, cache.v_LBKSH))
    pattern = r"ROOT \S+ = bf16\[([\d,]+)\]\{[^}]*S\(1\)\} dynamic-slice\("
    slices = [math.prod(map(int, s.split(","))) * 2 for s in re.findall(pattern, program.as_text())]
    inside = sum(n for n in slices if n > MIB)  # weights; small ones are activations
    body = program.cost_analysis()["bytes accessed"] - outside - 2 * inside
    return body * CFG.num_layers + outside, blocks + stacks + outside
