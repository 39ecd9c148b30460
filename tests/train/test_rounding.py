"""Weights and moments in bfloat16, rounded stochastically."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from train_tools import MODEL

from llama_jax.config import MeshConfig, check_recipe
from llama_jax.data.batch import abstract_batch
from llama_jax.model.sharding import make_mesh, mesh_for
from llama_jax.plan.machines import parse_machine
from llama_jax.plan.search import candidates
from llama_jax.train import rounding
from llama_jax.train.loss import token_nll
from llama_jax.train.optim import cast_matrices, make_optimizer
from llama_jax.train.rounding import round_like, stochastic_round, to_float32
from llama_jax.train.step import (
    TrainState,
    abstract_state,
    compute_config,
    make_train_step,
    update_state,
)  # fmt: skip


def make_recipe(optim=None, **train):
    return check_recipe(
        {
            "model": {**MODEL, "num_layers": 1},
            "data": {"seq_len": 32, "sources": {"words": {"path": "unused"}}},
            "optim": {"warmup_steps": 0, "b2": 0.999, "weight_decay": 0.0, **(optim or {})},
            "train": {"steps": 10**6, "batch_size": 8, "unroll": True, **train},
            "checkpoint": {"dir": "unused"},
        },
        "test",
    )


def bfloat16_bits(bits):
    return np.asarray(bits, np.uint16).view(ml_dtypes.bfloat16)


# Rounding ----------------------------------------------------------------------------------------


def test_the_mean_over_draws_is_the_number():
    """Each draw is one of the two neighbors, and the upper one as often as the lower half says."""
    rng = np.random.default_rng(0)
    x = np.float32(rng.normal(size=200) * 10.0 ** rng.integers(-30, 30, 200))
    draws = 4096
    keys = jax.random.split(jax.random.key(1), draws)
    out = np.asarray(jax.jit(jax.vmap(stochastic_round, (0, None)))(keys, x))
    toward_zero = bfloat16_bits(x.view(np.uint32) >> 16)
    away = bfloat16_bits((x.view(np.uint32) >> 16) + 1)
    is_away = out == away
    assert np.all(is_away | (out == toward_zero))
    p = (x.view(np.uint32) & 0xFFFF) / 65536
    error = (is_away.mean(0) - p) / np.sqrt(p * (1 - p) / draws + 1e-12)
    assert np.abs(error).max() < 5
    assert abs(error.mean()) < 5 / np.sqrt(len(x))
    # Nor do neighboring elements, or two keys, have the same bits.
    assert abs(np.corrcoef(is_away[:, 0] - p[0], is_away[:, 1] - p[1])[0, 1]) < 0.1
    assert len({row.tobytes() for row in is_away}) == draws


def test_what_bfloat16_holds_stays_as_it_is():
    every = bfloat16_bits(np.arange(2**16))  # zeros, subnormal numbers, infinities and NaN too
    out = np.asarray(jax.jit(stochastic_round)(jax.random.key(0), every.astype(np.float32)))
    nan = np.isnan(every.astype(np.float32))
    np.testing.assert_array_equal(out.view(np.uint16)[~nan], every.view(np.uint16)[~nan])
    assert np.isnan(out.astype(np.float32)[nan]).all()
    # NaN whose upper half alone would be infinite, or that a carry would make zero.
    nan = np.array([0x7F800001, 0xFF800001, 0x7FFFFFFF, 0xFFFFFFFF] * 100, np.uint32)
    out = jax.jit(stochastic_round)(jax.random.key(0), nan.view(np.float32))
    assert np.isnan(np.asarray(out, np.float32)).all()


def test_the_random_bits_are_the_same_on_any_mesh():
    x = np.random.default_rng(0).normal(size=(4, 16, 24)).astype(np.float32)
    tree = {"a": x, "b": x, "c": jnp.int32(3), "d": x}
    like = {**tree, "a": x.astype(jnp.bfloat16), "b": x.astype(jnp.bfloat16)}
    alone = jax.jit(round_like)(jax.random.key(5), tree, like)
    assert [alone[k].dtype.name for k in "abcd"] == ["bfloat16", "bfloat16", "int32", "float32"]
    assert not np.array_equal(alone["a"], alone["b"])
    mesh = make_mesh(MeshConfig(preset="fsdp_tensor", fsdp=4, tensor=2))
    place = lambda x: jax.device_put(x, NamedSharding(mesh, P(None, "fsdp", "tensor")))
    with jax.set_mesh(mesh):
        sharded = jax.jit(round_like)(
            jax.random.key(5), *(t | {k: place(t[k]) for k in "abd"} for t in (tree, like))
        )
        assert sharded["a"].sharding.spec == P(None, "fsdp", "tensor")
    jax.tree.map(np.testing.assert_array_equal, alone, jax.device_get(sharded))


# Training ----------------------------------------------------------------------------------------


def losses(dtype):
    """The losses of a model of pairs of tokens, softmax(w[a])[b], in 300 steps."""
    optim = make_recipe({"peak_lr": 2e-5}).optim
    optimizer = make_optimizer(optim, 10**6)
    a, b = np.random.default_rng(0).integers(0, 32, (2, 256))
    params = {"w": 0.02 * jax.random.normal(jax.random.key(0), (32, 32))}
    state = TrainState(params, optimizer.init(params))
    state = TrainState(*(cast_matrices(x, dtype) for x in state))

    def loss(params):
        return jnp.mean(token_nll(params["w"].astype(jnp.float32)[a][None], b[None]))

    def step(state, i):
        value, grads = jax.value_and_grad(loss)(state.params)
        key = jax.random.fold_in(jax.random.key(1), i)
        return update_state(optimizer, state, to_float32(grads), key), value

    state, out = jax.jit(lambda: jax.lax.scan(step, state, jnp.arange(300)))()
    assert state.params["w"].dtype == state.optimizer[1].nu["w"].dtype == jnp.dtype(dtype)
    return np.asarray(out)


def test_training_learns_where_rounding_to_nearest_stalls(monkeypatch):
    """Each update is a tenth of the distance between most weights and their neighbors."""
    every = [losses("float32"), losses("bfloat16")]
    monkeypatch.setattr(rounding, "stochastic_round", lambda key, x: x.astype(jnp.bfloat16))
    every.append(losses("bfloat16"))
    wide, stochastic, nearest = (float(x[0] - x[-1]) for x in every)
    assert abs(stochastic - wide) < 0.1 * wide
    assert nearest < 0.5 * wide


@pytest.mark.parametrize("reduce_dtype", ["compute", "float32"])
def test_a_step_on_a_mesh_keeps_dtypes_and_shardings(reduce_dtype):
    recipe = make_recipe(
        {"algorithm": "muon", "moment_dtype": "bfloat16"}, param_dtype="bfloat16",
        gradient_accumulation=2, reduce_dtype=reduce_dtype, compute_dtype="bfloat16",
    )  # fmt: skip
    sizes = MeshConfig(preset="fsdp_tensor", data=2, fsdp=2, tensor=2)
    recipe, mesh = mesh_for(dataclasses.replace(recipe, mesh=sizes))
    compute = compute_config(recipe, "cpu")
    with jax.set_mesh(mesh):
        state = abstract_state(recipe, compute, mesh)
        batch = abstract_batch(recipe, mesh, compute.rules.activation_without_tensor("BT"))
        out, _ = jax.eval_shape(make_train_step(recipe, compute), state, batch)
    same = lambda x, y: (
        (x.shape, x.dtype) == (y.shape, y.dtype)
        and y.sharding.is_equivalent_to(NamedSharding(mesh, x.sharding.spec), x.ndim)
    )
    assert jax.tree.all(jax.tree.map(same, out, state))
    assert state.params["blocks"]["mlp"]["up"].dtype == jnp.bfloat16


# Planning ----------------------------------------------------------------------------------------


def test_the_plan_counts_the_bytes_of_each_format():
    recipe = make_recipe({"moment_dtype": "bfloat16"}, param_dtype="bfloat16")
    estimate = lambda recipe: min(c.memory for c in candidates(recipe, parse_machine("h100:1")))
    assert estimate(make_recipe()) - estimate(recipe) == 8 * recipe.model.num_params
