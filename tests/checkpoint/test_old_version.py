"""A run of the version before settings were renamed (commit bbe08e8) loads and continues.

``golden/run_before_renamed_settings.tar.xz`` is its run folder after 2 of 4 steps, made with
``train RECIPE train.steps=2``; the values below are those of the same version when it continues to
4 steps.
"""

import json
import tarfile
from pathlib import Path

import pytest

import llama_jax
from llama_jax import chips
from llama_jax.train import __main__ as train
from llama_jax.train import metrics
from llama_jax.verify.__main__ import verify

ARCHIVE = Path(__file__).parents[1] / "golden/run_before_renamed_settings.tar.xz"
LOSSES = {1: 5.67006778717041, 2: 5.624483108520508, 3: 5.537793159484863, 4: 5.44327974319458}
NORMS = {3: 0.6941028237342834, 4: 0.7378633618354797}
VAL_LOSS = 5.386598594515932
TEXTS = [" thew\ufffd\x7fi\ufffd i", " ani\ufffd\ufffd ani\ufffd "]
"""after 2 steps, greedy"""

RECIPE = """
[model]
vocab_size = 288
dim = 8
num_layers = 2
num_heads = 2
num_kv_heads = 1
head_dim = 4
ffn_dim = 16
norm_eps = 1e-5
context = 64
tie_embeddings = false
rope = { theta = 10000.0 }
[data]
seq_len = 32
val_fraction = 0.1
packing = "segments"
sources = { words = { path = "text" } }
[mesh]
data = -1
fsdp = 1
[optim]
peak_lr = 1e-2
warmup_steps = 2
max_grad_norm = 0.5
[train]
steps = 4
batch_size = 8
gradient_accumulation = 1
log_every = 1
eval_batches = 1
[checkpoint]
save_every = 2
keep = 1
"""


@pytest.fixture
def run(tmp_path):
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path / "run"


def test_a_run_of_the_old_version_loads(run):
    assert verify(run) == []
    llm = llama_jax.load(run)
    texts = llm.generate(["the cat", "on"], max_new_tokens=8, sampling=llama_jax.Greedy())
    assert texts == TEXTS


def test_a_run_of_the_old_version_continues(run, tmp_path, monkeypatch):
    """With the new names of its settings, on eight devices; its text is not needed."""
    monkeypatch.setattr(chips, "peak_flops", lambda device: (1e12, "of this test"))
    monkeypatch.setattr(metrics, "plot_losses", lambda *_: None)
    (tmp_path / "recipe.toml").write_text(RECIPE)
    assert train.main([str(tmp_path / "recipe.toml"), f"checkpoint.dir={run}"]) == 0
    records = list(map(json.loads, (run / "metrics.jsonl").read_text().splitlines()))
    steps = {r["step"]: r for r in records if r["kind"] == "train"}
    assert {step: r["loss"] for step, r in steps.items()} == pytest.approx(LOSSES, rel=1e-5)
    assert {step: steps[step]["grad_norm"] for step in NORMS} == pytest.approx(NORMS, rel=1e-4)
    validation = [r["loss"] for r in records if r["kind"] == "eval"]
    assert validation[-1] == pytest.approx(VAL_LOSS, rel=1e-5)
    changes = json.loads((run / "changes.jsonl").read_text())["changed"]
    assert changes == {"train.steps": {"was": 2, "now": 4}}
    assert verify(run) == []


def test_the_old_recipe_names_the_new_settings(run, capsys):
    assert train.main([str(run / "recipe.toml")]) == 2
    error = capsys.readouterr().err
    for old, new in (
        ("data.holdout", "data.val_fraction"),
        ("optim.clip", "optim.max_grad_norm"),
        ("train.accumulate", "train.gradient_accumulation"),
        ("checkpoint.every", "checkpoint.save_every"),
    ):
        assert f"unknown setting {old}: it is now called {new}" in error
