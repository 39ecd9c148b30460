"""The step's arithmetic, the run's folder, and what a run does with input that cannot be used."""

import functools
import json
import random

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llama_jax import train
from llama_jax.config import load_recipe
from llama_jax.model import Execution
from llama_jax.optim import decays, make_schedule
from llama_jax.step import init_state, make_train_step, merge, nll_sum, structure, token_nll

HOW = Execution(jnp.dtype(jnp.float32))
WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "some", "animals", "in", "1984"]
RECIPE = """
[model]
vocab_size = 288
dim = 16
num_layers = 2
num_heads = 4
num_kv_heads = 2
head_dim = 8
ffn_dim = 32
norm_eps = 1e-5
context = 64
tie_embeddings = false
rope = {{ theta = 10000.0 }}
[data]
seq_len = 32
holdout = 0.1
sources = {{ words = {{ path = "{folder}/text" }} }}
prepared = "{folder}/data"
[mesh]
data = -1
fsdp = 1
[optim]
peak_lr = 1e-2
warmup_steps = 2
[train]
steps = 6
batch_size = 8
log_every = 1
eval_batches = 1
[checkpoint]
dir = "{folder}/run"
every = 2
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a recipe, its text, and a finished run."""
    folder = tmp_path_factory.mktemp("train")
    rng = random.Random(0)
    (folder / "text").mkdir()
    for i in range(60):
        (folder / f"text/{i}.txt").write_text(" ".join(rng.choice(WORDS) for _ in range(120)))
    (folder / "recipe.toml").write_text(RECIPE.format(folder=folder))
    assert train.main([str(folder / "recipe.toml"), "train.profile_steps=[2, 3]"]) == 0
    return folder


@pytest.fixture
def run(place, capsys):
    """Run the command on the recipe; (exit code, standard output, standard error)."""

    def call(*overrides):
        code = train.main([str(place / "recipe.toml"), *overrides])
        return code, *capsys.readouterr()

    return call


def records(folder, kind):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [r for r in map(json.loads, lines) if r["kind"] == kind]


def recipe_of(place, *overrides):
    return load_recipe(place / "recipe.toml", overrides)


def batch(parts=1, rows=8, seed=0, mask=False):
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, 288, (parts, rows // parts, 33), np.int32)
    out = {"inputs_BT": ids[..., :-1], "targets_BT": ids[..., 1:], "stop": np.zeros(1, np.int32)}
    if mask:
        out["mask_BT"] = (rng.random(out["targets_BT"].shape) < 0.7).astype(np.float32)
    return out


def near(a, b, tolerance):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        x, y = np.asarray(x), np.asarray(y)
        assert np.linalg.norm(x - y) <= tolerance * np.linalg.norm(y)


def fresh_state(recipe):
    return jax.jit(functools.partial(init_state, recipe, HOW))()


def test_a_run_leaves_everything_behind(place):
    folder = place / "run"
    for name in ("model.json", "tokenizer.model", "loss.png", "recipe.toml", "steps/6/model"):
        assert (folder / name).exists()
    assert list((folder / "tensorboard").iterdir())
    assert list((folder / "profile").rglob("*.xplane.pb"))
    assert load_recipe(folder / "recipe.toml") == recipe_of(place, "train.profile_steps=[2,3]")
    lines = records(folder, "train")
    fields = "kind step tokens loss grad_norm learning_rate tokens_per_second tflops mfu memory_gib"
    assert set(lines[0]) == {*fields.split(), "data_wait", "sources"}
    assert [r["step"] for r in lines] == [1, 2, 3, 4, 5, 6]
    assert lines[-1]["tokens"] == 6 * 8 * 32
    schedule = make_schedule(recipe_of(place).optim, 6)
    np.testing.assert_allclose(
        [r["learning_rate"] for r in lines], [schedule(i) for i in range(6)], rtol=1e-6
    )
    (held_out,) = records(folder, "eval")
    assert held_out["loss"] < lines[0]["loss"]
    assert held_out["bits_per_byte"] > 0 < held_out["unigram_entropy"]


def test_a_finished_run_says_so(run, place):
    before = (place / "run/metrics.jsonl").read_text()
    code, out, _ = run("train.log_every=3")  # a setting that may change
    assert code == 0
    assert "is finished: 6 steps" in out
    assert (place / "run/metrics.jsonl").read_text() == before


def test_a_changed_recipe_on_an_old_folder_is_an_error(run):
    code, _, err = run("optim.peak_lr=0.5", "data.seed=3")
    assert code == 2
    assert "optim.peak_lr: was 0.01, now 0.5" in err
    assert "data.seed: was 0, now 3" in err


def test_a_loss_that_is_no_number_stops_the_run(run, place, monkeypatch):
    """The step is named, the last good checkpoint stays, and nothing is saved after it."""
    real = train.make_train_step

    def broken(recipe, how):
        step = real(recipe, how)

        def wrapped(state, batch):
            count = state.optimizer[-1].count
            state, metrics = step(state, batch)
            return state, metrics | {"loss": jnp.where(count >= 4, jnp.nan, metrics["loss"])}

        return wrapped

    monkeypatch.setattr(train, "make_train_step", broken)
    code, _, err = run(f"checkpoint.dir={place}/nan")
    assert code == 1
    assert "error: step 5: loss nan" in err
    assert [p.name for p in sorted((place / "nan/steps").iterdir())] == ["2", "4"]
    monkeypatch.undo()
    code, out, _ = run(f"checkpoint.dir={place}/nan")
    assert code == 0
    assert "from step 4" in out


def test_training_starts_from_given_weights(run, place):
    assert run(f"train.init_from={place}/run", f"checkpoint.dir={place}/tuned")[0] == 0
    assert records(place / "tuned", "train")[0]["loss"] < records(place / "run", "train")[2]["loss"]
    code, _, err = run(f"train.init_from={place}/nothing", f"checkpoint.dir={place}/t2")
    assert code == 2
    assert "is not a checkpoint" in err
    code, _, err = run(
        f"train.init_from={place}/run", f"checkpoint.dir={place}/t3", "model.ffn_dim=48"
    )
    assert code == 2
    assert "ffn_dim: was 32, now 48" in err
    about = json.loads((place / "run/model.json").read_text())
    (place / "q").mkdir()
    (place / "q/model.json").write_text(json.dumps(about | {"quantize": "int8"}))
    code, _, err = run(f"train.init_from={place}/q", f"checkpoint.dir={place}/t4")
    assert code == 2
    assert "holds int8 matrices, which are for sampling; give the weights" in err


def test_accumulation_equals_the_big_batch(place):
    """With a mask: parts of the batch then have different numbers of targets."""
    results = []
    for parts in (1, 4):
        recipe = recipe_of(place, f"train.accumulate={parts}")
        state = fresh_state(recipe)
        whole = batch(mask=True)
        cut = {k: v.reshape(parts, -1, 32) if k != "stop" else v for k, v in whole.items()}
        results.append(jax.jit(make_train_step(recipe, HOW))(state, cut))
    near(results[0][1], results[1][1], 1e-6)
    near(results[0][0].optimizer[1].mu, results[1][0].optimizer[1].mu, 1e-5)


def test_pieces_of_the_loss_equal_the_whole(place):
    recipe = recipe_of(place)
    params, shape = fresh_state(recipe).params, structure(recipe.model, HOW)
    part = {k: v[0] for k, v in batch(mask=True).items() if k != "stop"}
    loss = lambda chunk, p: nll_sum(merge(shape, p), part, chunk)
    whole, pieces = (
        jax.jit(jax.value_and_grad(functools.partial(loss, chunk)))(params) for chunk in (0, 64)
    )
    near(whole, pieces, 1e-5)
    text = jax.jit(functools.partial(loss, 64)).lower(params).as_text()
    assert "8x8x288" in text
    assert "8x32x288" not in text


def test_token_nll_is_the_cross_entropy():
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.normal(size=(2, 5, 11)) * 10, jnp.float32)
    targets = jnp.asarray(rng.integers(0, 11, (2, 5)))
    weight = jnp.asarray(rng.normal(size=(2, 5)), jnp.float32)
    reference = optax.softmax_cross_entropy_with_integer_labels
    ours, want = (
        jax.jit(jax.value_and_grad(lambda x, nll=nll: jnp.sum(nll(x, targets) * weight)))(logits)
        for nll in (token_nll, reference)
    )
    near(ours, want, 1e-6)


def test_the_schedule_and_the_update_are_the_papers(place):
    """AdamW written out: clip, moments, decay of matrices alone, the rate reported."""
    recipe = recipe_of(place, "optim.warmup_steps=4", "train.steps=20", "optim.clip=0.1")
    schedule = make_schedule(recipe.optim, 20)
    np.testing.assert_allclose([schedule(0), schedule(3)], [0.0025, 0.01], rtol=1e-6)
    np.testing.assert_allclose([schedule(4), schedule(20)], [0.01, 0.001], rtol=1e-6)
    np.testing.assert_allclose(schedule(12), 0.0055, rtol=1e-6)

    state = fresh_state(recipe)
    part = {k: v[0] for k, v in batch().items() if k != "stop"}
    shape = structure(recipe.model, HOW)
    loss = lambda p: nll_sum(merge(shape, p), part, 0) / 256
    grads = jax.tree.map(np.asarray, jax.jit(jax.grad(loss))(state.params))
    norm = np.sqrt(sum(np.sum(np.square(g)) for g in jax.tree.leaves(grads)))
    after, metrics = jax.jit(make_train_step(recipe, HOW))(state, batch())
    assert norm > 0.1
    np.testing.assert_allclose(
        [metrics["grad_norm"], metrics["learning_rate"]], [norm, 0.0025], 1e-5
    )

    def update(p, g, decay):
        g = g * (0.1 / norm)
        # The moments after one step.
        return np.asarray(p) - 0.0025 * (g / (np.abs(g) + 1e-8) + 0.1 * decay * np.asarray(p))

    want = jax.tree.map(update, state.params, grads, decays(state.params))
    near(after.params, want, 1e-4)  # elements whose gradient is near epsilon differ most
    norms = {k for k, v in jax.tree_util.tree_leaves_with_path(decays(state.params)) if not v}
    assert len(norms) == 3


BAD = {
    "train.stepz=3": "unknown setting train.stepz; did you mean train.steps?",
    "train.steps=many": "train.steps='many'",
    "nonsense": "not of the form section.key=value",
    "data.sources.words.path=/no/such/file.txt": "/no/such/file.txt",
    "model.vocab_size=5000": "5000",
    "data.seq_len=60000 model.context=60000": "60000",
    "mesh.data=7 mesh.fsdp=11": "device",
    "model.num_heads=3 model.num_kv_heads=2": "num_heads=3",
    "train.batch_size=9 train.accumulate=2": "train.batch_size=9",
    "data.sources.words.path={folder}/empty.txt": "empty.txt",
    "data.sources.words.path={folder}/binary.txt": "binary.txt",
    "data.tokenizer={folder}/empty.txt": "empty.txt",
}


@pytest.mark.parametrize("overrides", BAD)
def test_bad_input_is_one_clear_error(run, place, overrides, request):
    (place / "empty.txt").write_bytes(b"")
    (place / "binary.txt").write_bytes(bytes(range(256)) * 40)
    number = list(BAD).index(overrides)
    new = [f"checkpoint.dir={place}/bad{number}", f"data.prepared={place}/baddata{number}"]
    code, _, err = run(*overrides.format(folder=place).split(), *new)
    assert code == 2, err
    assert err.splitlines()[-1].strip()
    assert "error: " in err
    assert "Traceback" not in err
    assert BAD[overrides] in err
    assert not list(place.glob(f"bad{number}/steps/*"))


def test_a_missing_recipe_is_an_error(capsys):
    assert train.main(["configs/none.toml"]) == 2
    assert "recipe configs/none.toml does not exist" in capsys.readouterr().err


def test_a_mesh_that_does_not_divide_the_heads(run, place):
    if jax.device_count() < 8:
        pytest.fail("tests/conftest.py sets 8 devices")
    code, _, err = run(
        "mesh.preset=fsdp_tensor", "mesh.tensor=8", "mesh.data=1", f"checkpoint.dir={place}/m"
    )
    assert code == 2
    assert "model.num_heads=4 is not a multiple of 8 (tensor of the mesh)" in err
    assert "model.num_kv_heads=2" in err
