"""The length of a run: epochs, early stopping, and the checkpoint with the best validation loss."""

import json
import os
import signal
from pathlib import Path

import jax
import jax.numpy as jnp
import make_golden_run as golden
import numpy as np
import pytest
from train_tools import make_zeros

from llama_jax.checkpoint.steps import best_step, loaded_step, whole_steps
from llama_jax.config import ConfigError, load_recipe
from llama_jax.convert.job import open_folder
from llama_jax.data.mixture import TrainData
from llama_jax.generate import load as loading
from llama_jax.train import evaluation, initial_state, loop
from llama_jax.train.__main__ import main
from llama_jax.verify.__main__ import main as verify

VAL_LOSS = {2: 5.0, 4: 3.0, 6: 4.0, 8: 3.5, 10: 2.0, 12: 6.0}
"""validation loss after a step"""


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Run the command with a step that adds 1 to every weight, and validation losses of a table."""

    def make(recipe, compute):
        def step(state, batch):
            one = dict.fromkeys(("loss", "grad_norm", "learning_rate"), jnp.float32(1))
            return jax.tree.map(lambda x: x + 1, state), one

        return step

    table = np.ones(21, np.float32)
    table[list(VAL_LOSS)] = list(VAL_LOSS.values())

    def make_eval(recipe, compute):
        def step(params, batch):
            return jnp.asarray(table)[params["norm"][0].astype(int)]

        return step

    monkeypatch.setattr(loop, "make_train_step", make)
    monkeypatch.setattr(loop, "make_eval_step", make_eval)
    monkeypatch.setattr(initial_state, "init_state", make_zeros)

    def call(name: str, *overrides: str) -> int:
        paths = [f"data.sources.{n}.path={golden.FOLDER / n}" for n in ("letters", "numbers")]
        more = ["train.log_every=1000", f"checkpoint.dir={tmp_path / name}"]
        return main([str(golden.FOLDER / "recipe.toml"), *paths, *more, *overrides])

    return call


BEST = ("train.eval_every=2", "train.early_stopping=2", "checkpoint.keep_best=true",
        "checkpoint.keep=1", "checkpoint.save_every=100", "train.eval_batches=1")  # fmt: skip


def test_early_stopping_and_the_best_checkpoint(run, tmp_path, capsys, monkeypatch):
    """Also of a run that is stopped at an evaluation, and continued."""
    assert run("a", *BEST) == 0
    out = capsys.readouterr().out
    assert "stopped early after step 8, because 2 evaluations in a row were not better" in out
    assert "best validation loss" in out
    assert f"done: {tmp_path}/a/steps/8" in out
    folder = tmp_path / "a"
    assert whole_steps(folder) == [4, 8]
    assert best_step(folder) == loaded_step(folder) == 4
    with monkeypatch.context() as patch:  # the weights alone
        patch.setattr(loading, "LLM", lambda cfg, params, *_, **__: params)
        params = loading.load(folder)
    assert params["norm"][0] == 4
    assert "step 4, which has the best validation loss; the newest is 8" in capsys.readouterr().err
    found = open_folder(folder)
    assert any("step 4, which has the best validation loss" in w for w in found.warnings)
    assert verify([str(folder)]) == 0
    capsys.readouterr()
    assert run("a", *BEST) == 0
    assert "is finished: stopped early after step 8" in capsys.readouterr().out

    draw = TrainData.__next__

    def drawn(self):
        if self.state()["batches"] + 1 == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        return draw(self)

    monkeypatch.setattr(TrainData, "__next__", drawn)
    assert run("b", *BEST) == 143
    assert "stopped by SIGTERM after step 6" in capsys.readouterr().out
    monkeypatch.setattr(TrainData, "__next__", draw)
    assert run("b", *BEST) == 0
    kind = lambda name: [
        (r["step"], r["loss"])
        for r in map(json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines())
        if r["kind"] == "eval"
    ]
    assert kind("a") == kind("b")
    assert [step for step, _ in kind("a")] == [2, 4, 6, 8]
    for step in (4, 8):
        record = lambda name, step=step: (
            tmp_path / name / f"steps/{step}/run/metadata"
        ).read_bytes()
        assert record("a") == record("b")
    # More patience continues the run: step 10 is better, step 12 is not.
    capsys.readouterr()
    assert run("a", *BEST, "train.early_stopping=3", "train.steps=12") == 0
    assert whole_steps(folder) == [10, 12]
    assert loaded_step(folder) == 10
    assert "best validation loss" in capsys.readouterr().out


def test_epochs(run, tmp_path, capsys):
    steps = ["train.epochs=1.5", "checkpoint.save_every=100", "train.eval_every=0"]
    assert run("epochs", *steps, "train.eval_batches=1") == 0
    out = capsys.readouterr().out
    recipe = load_recipe(tmp_path / "epochs/recipe.toml")
    assert recipe.train.epochs == 1.5
    assert recipe.train.steps is None
    (line,) = [line for line in out.splitlines() if line.startswith("1.5 epochs of")]
    sequences, count = (int(line.split()[i].replace(",", "")) for i in (3, 6))
    assert count == -(-3 * sequences // (2 * recipe.train.batch_size))
    assert whole_steps(tmp_path / "epochs") == [count]
    assert run("epochs", *steps) == 0
    assert f"{count} steps; increase train.epochs to continue" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.steps=3", "train.epochs=2"], None),
        (["train.early_stopping=2", "train.eval_every=0"], "set train.eval_every"),
        (["checkpoint.keep_best=true", "train.eval_every=0"], "set train.eval_every"),
        (["train.epochs=0"], "train.epochs=0"),
    ],
)
def test_settings_that_contradict_each_other(overrides, message):
    if message is None:  # a later setting replaces the other one
        train = load_recipe("tiny", overrides).train
        assert (train.steps, train.epochs) == (None, 2)
        return
    with pytest.raises(ConfigError, match=message):
        load_recipe("tiny", overrides)


def test_one_length_of_a_run(tmp_path):
    path = tmp_path / "both.toml"
    path.write_text('extends = "tiny"\n[train]\nsteps = 3\nepochs = 2\n')
    with pytest.raises(ConfigError, match=r"train.steps=3 and train.epochs=2 both set the length"):
        load_recipe(path)
    path.write_text('extends = "tiny"\n[train]\nepochs = 2\n')
    assert load_recipe(path).train.steps is None


def test_a_loss_that_is_no_number_is_never_the_best():
    best = evaluation.update_best(None, 1, float("nan"))
    best = evaluation.update_best(best, 2, 4.0)
    assert best == (4.0, 2, 0)
    assert evaluation.update_best(best, 3, float("nan")) == (4.0, 2, 1)


def test_a_best_step_that_was_removed(tmp_path: Path):
    run = tmp_path / "steps/7/run"
    run.mkdir(parents=True)
    (run / "metadata").write_text('{"best_step": 3}')
    assert best_step(tmp_path) is None
    assert loaded_step(tmp_path) == 7
