"""Activations kept by name: which operations the backward pass repeats, and the same gradients."""

import jax
import jax.numpy as jnp
import model_tools as tools
import pytest

from llama_jax.config import ConfigError, load_recipe
from llama_jax.config.activations import REMAT_NAMES
from llama_jax.model.llama import ComputeConfig
from llama_jax.model.remat import MATMULS
from llama_jax.model.sharding import mesh_for
from llama_jax.train.remat import Choice, check_offload, choices, fit, forward_flops, recomputed
from llama_jax.train.step import compute_config

CFG = tools.small()
L = CFG.num_layers


def operations(jaxpr, counts):
    """Adds up a program's operations by name, with those inside loops as often as they run."""
    for eqn in jaxpr.eqns:
        times = eqn.params["length"] if eqn.primitive.name == "scan" else 1
        inner = [x for p in eqn.params.values() for x in (p if isinstance(p, tuple) else (p,))]
        for x in inner:
            if hasattr(x := getattr(x, "jaxpr", x), "eqns"):
                found = operations(x, {})
                for name, n in found.items():
                    counts[name] = counts.get(name, 0) + n * times
        counts[eqn.primitive.name] = counts.get(eqn.primitive.name, 0) + 1
    return counts


def count(remat):
    """Of the gradient; nothing is compiled."""
    tokens, params = tools.random_tokens(CFG, 1, 8), tools.tree_of(tools.random_weights(CFG))
    build = tools.model_of(CFG, ComputeConfig(jnp.dtype("float32"), remat=remat))
    gradient = jax.grad(lambda params: jnp.sum(build(params)(tokens) ** 2))
    return operations(jax.make_jaxpr(gradient)(params).jaxpr, {})["dot_general"]


@pytest.fixture(scope="module")
def full():
    return count("full")


@pytest.mark.parametrize("name", [*MATMULS, "attention"])
def test_a_kept_activation_is_not_computed_again(name, full):
    """Its product with a weight; for attention, the products with keys and values."""
    saved = full - count((name,))
    assert saved == {"down": 0, "attention": 2 * L}.get(name, L)


@pytest.mark.parametrize("word", ["matmuls", "none"])
def test_words_are_lists(word):
    names = {"matmuls": MATMULS, "none": REMAT_NAMES}[word]
    assert count(word) == count(names)


# Choosing by memory -------------------------------------------------------------------------------


def recipe(*overrides):
    return load_recipe("llama-7b-tpu", ["train.batch_size=8", "train.steps=2", *overrides])


def test_what_is_recomputed():
    assert set(recomputed(recipe("train.remat=full"))) == set(REMAT_NAMES) - {"down"}
    assert recomputed(recipe("train.remat=matmuls")) == ["attention"]
    assert recomputed(recipe("train.remat=none")) == []
    some = recipe('train.remat=["gate", "q"]', 'train.offload=["up"]')
    assert set(recomputed(some)) == {"k", "v", "attention", "o"}


@pytest.mark.parametrize("extra", [-25, 0, 5, 15, 33, 200])
@pytest.mark.parametrize("limit", [20, 35, 49, 1e9])
def test_the_most_that_fits_is_found_with_few_compilations(extra, limit):
    """The real peaks are ``extra`` over the estimates."""
    possible = [Choice(tuple("abcde"[:n]), 10.0 * n) for n in range(6)]
    tried = []

    def compile_(names):
        tried.append(names)
        return "program", 10 * len(names) + extra

    found, program = fit(possible, limit, compile_)
    fitting = [n for n in range(6) if 10 * n + extra <= limit]
    assert len(found.names) == max(fitting, default=0)
    assert (found.peak, program) == (10 * len(found.names) + extra, "program")
    assert len(tried) <= 2
    assert len(tried) == 1 or extra != 0


def test_choices_are_ordered_by_flops_per_byte():
    """7B: attention over 4096 positions has no more FLOPs per byte than the products with weights;
    over 65536 it has. Arrays are [8 rows, T, width] in float32."""
    wide = recipe("data.seq_len=4096", "model.context=4096")
    recipe_, mesh = mesh_for(wide)
    compute = compute_config(recipe_, "cpu")
    found = choices(recipe_, compute, mesh, 100.0)
    assert [c.names for c in found[:3]] == [(), ("gate",), ("gate", "up")]
    assert set(found[-1].names) == set(REMAT_NAMES) - {"down"}
    assert found[-1].names[-1] == "attention"
    rows = 8 * 4096 / mesh.size
    assert found[1].peak == 100 + 32 * rows * 11008 * 4
    assert found[-1].peak - found[-2].peak == 32 * rows * (4096 * 4 + 32 * 4)
    far = recipe("data.seq_len=65536", "model.context=65536")
    assert choices(far, compute, mesh, 0.0)[1].names == ("attention",)
    kept = recipe(
        "data.seq_len=4096", "model.context=4096", 'train.offload=["gate"]', "train.remat=auto"
    )
    assert choices(kept, compute, mesh, 0.0)[1].names == ("up",)


def test_flops_of_a_forward_pass():
    small = recipe()
    per_layer = 2 * (4 * 4096 * 4096 + 2 * 4096 * 11008)  # without down
    assert sum(forward_flops(small).values()) == 32 * (per_layer + 2 * 4096 * 2048)


def test_offload_needs_an_accelerator():
    changed, mesh = mesh_for(recipe("train.remat=full", 'train.offload=["gate"]'))
    with pytest.raises(ConfigError, match=r"train.offload=\['gate'\].*TPU or GPU"):
        check_offload(changed, mesh)
