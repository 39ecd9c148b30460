"""Muon, warm-up-stable-decay, z-loss and skipped spikes, each beside a reference."""

import dataclasses
import functools
import math
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from train_tools import MODEL, write_recipe

from llama_jax.checkpoint.arrays import open_array
from llama_jax.config import MeshConfig, check_recipe
from llama_jax.convert import formats
from llama_jax.convert.job import convert
from llama_jax.data.batch import Batch, ShardBatch
from llama_jax.model.compute import ComputeConfig
from llama_jax.model.params import merge, structure
from llama_jax.model.sharding import mesh_for
from llama_jax.train import spikes
from llama_jax.train.__main__ import main
from llama_jax.train.metrics import read_records
from llama_jax.train.optim import make_optimizer, make_schedule
from llama_jax.train.spikes import MIN_STEPS, WINDOW, Spikes
from llama_jax.train.step import (
    abstract_state,
    compute_config,
    init_state,
    make_eval_step,
    make_train_step,
)  # fmt: skip

F32 = ComputeConfig(jnp.dtype(jnp.float32))


def make_recipe(optim=None, **train):
    return check_recipe(
        {
            "model": MODEL,
            "data": {"seq_len": 32, "sources": {"words": {"path": "unused"}}},
            "optim": {"peak_lr": 1e-2, "warmup_steps": 1, **(optim or {})},
            "train": {"steps": 20, "batch_size": 8, **train},
            "checkpoint": {"dir": "unused"},
        },
        "test",
    )


def batch():
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 288, (1, 8, 33), np.int32)
    mask = (rng.random((1, 8, 32)) < 0.7).astype(np.float32)
    return Batch(ids[..., :-1], ids[..., 1:], mask_BT=mask)


def named(params):
    flat, _ = jax.tree.flatten_with_path(params)
    return {"/".join(str(k.key) for k in path): np.asarray(x) for path, x in flat}


def close(got, want, tolerance):
    assert np.linalg.norm(got - want) <= tolerance * np.linalg.norm(want)


def test_warmup_stable_decay():
    optim = make_recipe({"schedule": "wsd", "warmup_steps": 4, "decay_fraction": 0.2}).optim
    rate = make_schedule(optim, 100)
    np.testing.assert_allclose([rate(0), rate(3)], [0.0025, 0.01], rtol=1e-6)
    np.testing.assert_allclose([rate(4), rate(50), rate(80)], 0.01, rtol=1e-6)
    np.testing.assert_allclose([rate(90), rate(100)], [0.0055, 0.001], rtol=1e-6)
    # A run that is shorter than warm-up and decay together decays as long as it can.
    short = make_schedule(dataclasses.replace(optim, decay_fraction=1.0), 10)
    np.testing.assert_allclose([short(4), short(7), short(10)], [0.01, 0.0055, 0.001], rtol=1e-6)


def orthogonal(g):
    """Newton-Schulz with Jordan's coefficients, written out; g is [in, out]."""
    x = np.float64(g.T if g.shape[0] > g.shape[1] else g)
    x = x / np.linalg.norm(x)
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.T if g.shape[0] > g.shape[1] else x


def test_muon_is_the_formula_for_each_matrix_of_each_layer():
    optim = make_recipe({"algorithm": "muon", "max_grad_norm": 0, "warmup_steps": 0}).optim
    params = jax.tree.map(
        np.asarray, jax.jit(functools.partial(init_state, make_recipe(), F32))().params
    )
    rng = np.random.default_rng(0)
    first, second = (
        jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), params)
        for _ in range(2)
    )
    muon = make_optimizer(optim, 20)
    adam = make_optimizer(dataclasses.replace(optim, algorithm="adamw"), 20)

    @jax.jit
    def second_updates(first, second, params):
        """The second update of each, which has momentum of the first."""
        out = []
        for optimizer in (muon, adam):
            _, state = optimizer.update(first, optimizer.init(params), params)
            out.append(optimizer.update(second, state, params)[0])
        return out

    updates, by_adam = map(named, second_updates(first, second, params))

    rate = float(make_schedule(optim, 20)(1))
    params, g1, g2 = named(params), named(first), named(second)
    matrices = 0
    for name, value in params.items():
        if not name.startswith("blocks") or "norm" in name:
            close(updates[name], by_adam[name], 1e-6)
            continue
        for layer in range(value.shape[0]):
            matrices += 1
            # Momentum of 0.95 with bias correction; Nesterov looks one step ahead.
            m = 0.95 * 0.05 * g1[name][layer] + 0.05 * g2[name][layer]
            m_hat = 0.95 * m / (1 - 0.95**3) + 0.05 * g2[name][layer] / (1 - 0.95**2)
            scale = 0.2 * math.sqrt(max(m.shape))
            want = -rate * (scale * orthogonal(m_hat) + 0.1 * value[layer])
            close(updates[name][layer], want, 1e-4)
    assert matrices == 14  # two layers of seven


def test_muon_on_a_mesh_equals_one_device():
    recipe = make_recipe({"algorithm": "muon"})
    step = make_train_step(recipe, F32)
    alone, _ = jax.jit(step)(jax.jit(functools.partial(init_state, recipe, F32))(), batch())
    sizes = MeshConfig(preset="fsdp_tensor", data=2, fsdp=2, tensor=2)
    on_mesh, mesh = mesh_for(dataclasses.replace(recipe, mesh=sizes))
    compute = compute_config(on_mesh, "cpu")
    with jax.set_mesh(mesh):
        abstract = abstract_state(on_mesh, compute, mesh)
        shardings = jax.tree.map(lambda x: x.sharding, abstract)
        state = jax.jit(functools.partial(init_state, on_mesh, compute), out_shardings=shardings)()
        put = ShardBatch(on_mesh, mesh, compute.rules.activation_without_tensor("BT"))
        whole, _ = jax.jit(make_train_step(on_mesh, compute))(state, put(batch()))
    for name, value in named(whole.params).items():
        np.testing.assert_allclose(value, named(alone.params)[name], rtol=0, atol=2e-5)
    same = lambda x, y: x.sharding.is_equivalent_to(y.sharding, x.ndim)
    assert jax.tree.all(jax.tree.map(same, whole, abstract))


@pytest.mark.parametrize("chunk", [0, 64])
def test_z_loss_is_the_formula_and_is_reported_beside_the_loss(chunk):
    recipe = make_recipe(z_loss=0.1, loss_chunk=chunk, gradient_accumulation=2)
    plain = make_recipe(loss_chunk=chunk)
    state = jax.jit(functools.partial(init_state, recipe, F32))()
    shape, microbatch = structure(recipe.model, F32), batch().microbatch(0)
    mask, count = microbatch.mask_BT, jnp.sum(microbatch.mask_BT)

    def formula(params):
        logits = merge(shape, params)(microbatch.inputs_BT)
        log_z = jnp.log(jnp.sum(jnp.exp(logits), axis=-1))
        log_p = jnp.take_along_axis(logits, microbatch.targets_BT[..., None], -1)[..., 0] - log_z
        nll, z = -jnp.sum(log_p * mask) / count, 0.1 * jnp.sum(log_z**2 * mask) / count
        return nll + z, (nll, z)

    grads, (nll, z) = jax.jit(jax.grad(formula, has_aux=True))(state.params)
    halves = jax.tree.map(lambda x: x.reshape(2, 4, 32), batch())
    _, metrics = jax.jit(make_train_step(recipe, F32))(state, halves)
    norm = math.sqrt(sum(np.sum(np.square(g)) for g in jax.tree.leaves(grads)))
    got = [metrics[k] for k in ("loss", "z_loss", "grad_norm")]
    np.testing.assert_allclose(got, [nll, z, norm], rtol=1e-5)
    assert z > 0.5
    # The validation loss has no z-loss.
    evaluate = [jax.jit(make_eval_step(r, F32))(state.params, batch()) for r in (recipe, plain)]
    np.testing.assert_allclose(evaluate[0], evaluate[1], rtol=1e-6)


def test_a_skipped_step_changes_the_learning_rate_alone():
    recipe = make_recipe({"skip_spikes": 3.0})
    state = jax.jit(functools.partial(init_state, recipe, F32))()
    step = jax.jit(make_train_step(recipe, F32))
    free, metrics = step(state, batch(), limit=np.float32(np.inf))
    norm = float(metrics["grad_norm"])
    assert metrics["skipped"] == 0
    taken, metrics = step(state, batch(), limit=np.float32(norm * 1.001))
    assert metrics["skipped"] == 0
    jax.tree.map(np.testing.assert_array_equal, taken, free)
    skipped, metrics = step(state, batch(), limit=np.float32(norm * 0.999))
    assert metrics["skipped"] == 1
    jax.tree.map(np.testing.assert_array_equal, skipped.params, state.params)
    jax.tree.map(np.testing.assert_array_equal, skipped.optimizer[:-1], state.optimizer[:-1])
    assert skipped.optimizer[-1].count == state.optimizer[-1].count + 1
    # With a limit that is never exceeded, nothing differs from a run without the setting.
    without, _ = jax.jit(make_train_step(make_recipe(), F32))(state, batch())
    jax.tree.map(np.testing.assert_array_equal, free, without)


def test_the_limit_is_a_multiple_of_the_median_of_earlier_norms():
    assert Spikes(0).arguments(1) == {}
    norms = Spikes(4.0)
    for step in range(1, 40):
        limit = norms.arguments(step)["limit"]
        known = list(range(1, step - 1))  # all earlier steps but the last
        want = 4 * np.median(known) if len(known) >= MIN_STEPS else np.inf
        assert limit == np.float32(want)
        norms.add(step, float(step), skipped=step == 30)
    assert norms.count == 1

    # The same limit whether or not the last step has been checked, and after a restart.
    ahead, behind = Spikes(4.0), Spikes(4.0)
    for step in range(1, WINDOW + 50):
        ahead.add(step, float(step % 7), skipped=False)
        if step < WINDOW + 49:
            behind.add(step, float(step % 7), skipped=False)
    restored = Spikes(4.0)
    restored.restore(ahead.state())
    limits = {float(s.arguments(WINDOW + 50)["limit"]) for s in (ahead, behind, restored)}
    assert limits == {4 * np.median([s % 7 for s in range(49, WINDOW + 49)][:WINDOW])}


def test_a_run_with_all_of_them_continues_exactly(tmp_path, monkeypatch, capsys):
    """Stopped in the middle, with steps that are skipped before and after."""
    monkeypatch.setattr(spikes, "MIN_STEPS", 2)
    recipe = write_recipe(
        tmp_path,
        optim={"algorithm": "muon", "schedule": "wsd", "skip_spikes": 0.97,
               "moment_dtype": "bfloat16"},
        train={"steps": 10, "eval_batches": 1, "z_loss": 1e-3, "param_dtype": "bfloat16",
               "gradient_accumulation": 2},
        checkpoint={"save_every": 5},
    )  # fmt: skip
    whole, parts = f"checkpoint.dir={tmp_path}/whole", f"checkpoint.dir={tmp_path}/parts"
    assert main([str(recipe), whole]) == 0
    skipped = re.findall(r"step (\d+): skipped", capsys.readouterr().out)
    assert len({int(step) > 5 for step in skipped}) == 2, skipped
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    shutil.rmtree(tmp_path / "parts/steps/10")
    assert main([str(recipe), parts]) == 0
    assert "continuing" in capsys.readouterr().out
    a, b = (read_records(tmp_path / run / "metrics.jsonl") for run in ("whole", "parts"))
    same = ("loss", "z_loss", "grad_norm", "learning_rate", "skipped_steps")
    train = lambda records: [[r[k] for k in same] for r in records if r["kind"] == "train"]
    assert train(a) == train(b)
    assert train(a)[-1][-1] == len(skipped)
    arrays = lambda run: {
        f"{item}.{p.name}": open_array(p.parent, p.name).read().result()
        for item in ("model", "optimizer")
        for p in sorted((tmp_path / run / "steps/10" / item).iterdir())
        if (p / "zarr.json").exists()
    }
    final, continued = arrays("whole"), arrays("parts")
    assert {k: x.tobytes() for k, x in final.items()} == {
        k: x.tobytes() for k, x in continued.items()
    }
    # Weights; momentum, or two moments of embedding and output matrix. Norms stay float32.
    matrices = {k for k, x in final.items() if x.ndim > 1 and "norm" not in k}
    assert {k for k, x in final.items() if x.dtype == jnp.bfloat16} == matrices
    assert len(matrices) == 9 + 7 + 2 * 2

    convert(tmp_path / "whole", tmp_path / "hf", to="hf", dtype="float32", log=None)
    path = tmp_path / "hf/model.safetensors"
    output = formats.view(formats.read_safetensors(path)["lm_head.weight"], formats.map_file(path))
    np.testing.assert_array_equal(output, np.float32(final["model.unembed"]).T)
    for setting in ("optim.algorithm=adamw", "optim.moment_dtype=float32"):
        assert main([str(recipe), whole, setting, "train.steps=12"]) == 2
        assert f"{setting.split('=')[0]}: was " in capsys.readouterr().err
    assert main([str(recipe), whole, "train.param_dtype=float32"]) == 2
    assert "train.param_dtype: was 'bfloat16', now 'float32'" in capsys.readouterr().err
