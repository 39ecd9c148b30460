"""The server's decode step compiled for absent chips: memory, in-place updates, bytes moved."""

import math
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding
from test_compile_decode import mesh_of

from llama_jax.chips import compile_for, topology
from llama_jax.config import MODELS
from llama_jax.model.llama import ComputeConfig
from llama_jax.model.params import abstract_params, merge, structure, unstack_layers
from llama_jax.model.sharding import PRESETS
from llama_jax.plan.hlo import count
from llama_jax.serve.programs import _empty_state, decode_step
from llama_jax.serve.sizes import Sizes

CFG = MODELS["llama2-7b"]
PAGE, CONTEXT = 256, 4096
REPLICATED = PartitionSpec()


def compiled(cfg, devices, slots, pages):
    """The decode step as `llama_jax.serve` compiles it, and the shapes of its state: on one GPU
    without a mesh and with unstacked layers; on TPUs stacked."""
    gpu = devices[0].platform != "tpu"
    mesh = None if gpu else mesh_of(devices)
    compute = ComputeConfig(jnp.dtype(jnp.bfloat16), PRESETS["fsdp_tensor"], unroll=gpu)
    sizes = Sizes(slots, PAGE, CONTEXT // PAGE, pages, cfg.vocab_size)
    graphdef = structure(cfg, compute, unstacked=gpu)

    def place(x, spec=REPLICATED):
        sharding = SingleDeviceSharding(devices[0]) if gpu else NamedSharding(mesh, spec)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    def step(params, state, words_BX, mask_BW):
        return decode_step(sizes, merge(graphdef, params), state, words_BX, mask_BW)

    with compile_for(devices[0]) if gpu else jax.set_mesh(mesh):
        params = abstract_params(cfg, compute)
        params = jax.tree.map(lambda x: x.update(dtype=jnp.bfloat16), params)
        if gpu:
            params = jax.tree.map(place, jax.eval_shape(unstack_layers, params))
        else:
            params = jax.tree.map(lambda x: place(x, x.sharding.spec), params)
        state = jax.eval_shape(lambda: _empty_state(compute, cfg, sizes))
        specs = state.cache.specs(compute.rules)
        k, v = (place(x, specs.k_LBKSH) for x in state.cache[:2])
        cache = jax.tree.map(place, state.cache)._replace(k_LBKSH=k, v_LBKSH=v)
        state = state._replace(cache=cache, rows=jax.tree.map(place, state.rows))
        integers = lambda *shape: place(jax.ShapeDtypeStruct(shape, jnp.int32))
        args = integers(slots, sizes.row.itemsize // 4), integers(slots, sizes.mask_words)
        return jax.jit(step, donate_argnums=1).lower(params, state, *args).compile(), state


@pytest.mark.parametrize(
    ("name", "chips", "slots", "pages"),
    [("v6e", 1, 32, 114), ("v6e", 4, 128, 470), ("h200", 1, 32, 470), ("h200", 1, 128, 470)],
)
def test_decode_step(name, chips, slots, pages, monkeypatch):
    """7B, bfloat16, context 4096: one pass over the weights and the live cache, updated in place.

    The live cache is the whole pool: as many pages as fit on the chip, or 120,000 positions. The
    filters of sampling and log-probabilities, which run only if a request asks, are not counted.
    """
    gpu = name == "h200"
    pytest.importorskip("jax_cuda13_plugin" if gpu else "libtpu", reason="needs the compiler")
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "true")
    program, state = compiled(CFG, topology(name)[:chips], slots, pages)
    text, memory = program.as_text(), program.memory_analysis()
    pool = state.cache.k_LBKSH
    stacks = 2 * pool.size * 2 // chips
    assert stacks <= memory.alias_size_in_bytes < stacks + slots * CFG.vocab_size * 6
    assert memory.temp_size_in_bytes < 128 << 20  # mostly logits; a page of all layers is 128 MiB
    L, P, K, *page = pool.shape
    of_pool = ",".join(map(str, (L, P, K // chips, *page)))
    assert not re.search(rf"= \w+\[{of_pool}\]\S* copy\(", text)
    assert "rotary_decode_attention" in text
    # No shape depends on the load: XLA writes a bound before a size that is not constant.
    assert "[<=" not in text
    assert not re.search(r"\[[\d,]*,<=", text)
    always = count(text.replace(" conditional(", " after-all("))
    matrices = 2 * (CFG.num_params - math.prod(CFG.shape("VD"))) // chips  # of the embedding, rows
    # What a GPU kernel reads of a cache is not in the program: its live blocks, by its loops.
    moved = always.bytes + (stacks if gpu else 0)
    assert 0.98 * (matrices + stacks) < moved < 1.05 * (matrices + stacks)
