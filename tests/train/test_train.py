"""The arithmetic of the training step, the run folder, and errors for invalid input."""

import functools
import json
import os
import re
import shutil
import signal
import threading

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from train_tools import write_recipe

import llama_jax
from llama_jax.checkpoint.arrays import open_array
from llama_jax.checkpoint.file_hashes import record_files
from llama_jax.config import ConfigError, load_recipe
from llama_jax.data.batch import Batch
from llama_jax.data.mixture import TrainData
from llama_jax.io import folder_lock
from llama_jax.model.llama import ComputeConfig
from llama_jax.model.params import merge, structure
from llama_jax.prepare.tokenizer import train_tokenizer
from llama_jax.train import loop, metrics
from llama_jax.train.__main__ import _quiet_threads, main
from llama_jax.train.loss import nll_sum, token_nll
from llama_jax.train.metrics import plot_losses
from llama_jax.train.optim import decays, make_schedule
from llama_jax.train.run_folder import locked
from llama_jax.train.step import init_state, make_train_step

HOW = ComputeConfig(jnp.dtype(jnp.float32))
FIRST = ("train.profile_steps=[2, 3]", 'train.sample_prompts=["the cat"]')
"""of the finished run"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a recipe, its text and a finished run."""
    folder = tmp_path_factory.mktemp("train")
    write_recipe(folder, mesh={"data": -1, "fsdp": 1}, train={"eval_batches": 1})
    with pytest.MonkeyPatch.context() as patch:  # the other runs are not plotted
        patch.setattr(metrics, "plot_losses", plot_losses)
        assert main([str(folder / "recipe.toml"), *FIRST]) == 0
    return folder


@pytest.fixture
def run(place, capsys):
    """Run the command on the recipe; (exit code, standard output, standard error)."""

    def call(*overrides):
        code = main([str(place / "recipe.toml"), *overrides])
        return code, *capsys.readouterr()

    return call


def records(folder, kind):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [r for r in map(json.loads, lines) if r["kind"] == kind]


def recipe_of(place, *overrides):
    return load_recipe(place / "recipe.toml", overrides)


def batch(mask=False):
    """One microbatch of 8 rows."""
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 288, (1, 8, 33), np.int32)
    out = Batch(ids[..., :-1], ids[..., 1:])
    if mask:
        out = out._replace(mask_BT=(rng.random(out.targets_BT.shape) < 0.7).astype(np.float32))
    return out


def near(a, b, tolerance):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        x, y = np.asarray(x), np.asarray(y)
        assert np.linalg.norm(x - y) <= tolerance * np.linalg.norm(y)


def fresh_state(recipe):
    return jax.jit(functools.partial(init_state, recipe, HOW))()


def test_a_run_writes_all_its_files(place):
    folder = place / "run"
    for name in ("model.json", "tokenizer.model", "loss.png", "recipe.toml", "steps/6/model"):
        assert (folder / name).exists()
    assert list((folder / "tensorboard").iterdir())
    assert list((folder / "profile").rglob("*.xplane.pb"))
    assert load_recipe(folder / "recipe.toml") == recipe_of(place, *FIRST)
    lines = records(folder, "train")
    fields = "kind step tokens loss grad_norm learning_rate tokens_per_second tflops mfu memory_gib"
    assert set(lines[0]) == {*fields.split(), "data_wait", "goodput", "sources"}
    assert [r["step"] for r in lines] == [1, 2, 3, 4, 5, 6]
    assert lines[-1]["tokens"] == 6 * 8 * 32
    schedule = make_schedule(recipe_of(place).optim, 6)
    np.testing.assert_allclose(
        [r["learning_rate"] for r in lines], [schedule(i) for i in range(6)], rtol=1e-6
    )
    (val,) = records(folder, "eval")
    assert val["loss"] < lines[0]["loss"]
    assert val["bits_per_byte"] > 0 < val["unigram_entropy"]


def test_a_finished_run_reports_it(run, place):
    before = (place / "run/metrics.jsonl").read_text()
    code, out, _ = run("train.log_every=3")  # a setting that may change
    assert code == 0
    assert "is finished: 6 steps" in out
    assert (place / "run/metrics.jsonl").read_text() == before


def test_a_changed_recipe_on_an_old_folder_is_an_error(run):
    code, _, err = run("optim.b1=0.5", "train.seed=4", "data.seed=3")
    assert code == 2
    assert "train.seed: was 0, now 4" in err
    assert "data.seed: was 0, now 3" in err


def test_a_non_finite_loss_stops_the_run(run, place, monkeypatch):
    """The error names the step; the last good checkpoint stays, and nothing is saved after it."""
    real = loop.make_train_step

    def broken(recipe, compute):
        step = real(recipe, compute)

        def wrapped(state, batch):
            count = state.optimizer[-1].count
            state, metrics = step(state, batch)
            return state, metrics | {"loss": jnp.where(count >= 4, jnp.nan, metrics["loss"])}

        return wrapped

    monkeypatch.setattr(loop, "make_train_step", broken)
    folder = place / "nan"
    code, _, err = run(f"checkpoint.dir={folder}", "optim.peak_lr=0.02")
    assert code == 1
    assert "error: step 5: loss nan" in err
    for advice in ("peak_lr=1.0e-02", "skip_batches=[[5,5]]", "restart_from=2"):
        assert advice in err
    assert [p.name for p in sorted((folder / "steps").iterdir())] == ["2", "4"]
    # The advice after a second failure keeps the batches that were skipped before.
    code, _, err = run(
        f"checkpoint.dir={place}/nan3", "optim.peak_lr=0.02", "data.skip_batches=[[1,2]]"
    )
    assert code == 1
    assert "data.skip_batches=[[1,2],[7,7]] to leave out" in err
    monkeypatch.undo()

    # Following the advice gives the same result with and without an interruption.
    shutil.copytree(folder, place / "nan2")
    changes = ["train.restart_from=2", "data.skip_batches=[[4,5],[7,7]]", "optim.peak_lr=1e-2"]
    code, out, _ = run(f"checkpoint.dir={folder}", *changes)
    assert code == 0
    for line in ("going back to step 2", "from step 2 on, optim.peak_lr: was 0.02, now 0.01"):
        assert line in out
    stop_at(monkeypatch, 6)
    again = run(f"checkpoint.dir={place}/nan2", *changes)
    assert again[0] == 143
    assert "stopped by SIGTERM after step 4" in again[1]
    monkeypatch.undo()
    code, out, _ = run(f"checkpoint.dir={place}/nan2", *changes)
    assert code == 0
    assert "going back" not in out
    assert "from step 4" in out
    exact = lambda f: [(r["loss"], r["learning_rate"]) for r in records(f, "train")]
    assert exact(folder) == exact(place / "nan2")
    assert weights(folder, 6) == weights(place / "nan2", 6)
    schedule = make_schedule(recipe_of(place).optim, 6)
    assert exact(folder)[2][1] == pytest.approx(float(schedule(2)))
    assert [p.name for p in (folder / "set-aside-1").iterdir()] == ["metrics.jsonl", "4"]
    (change,) = map(json.loads, (place / "nan2/changes.jsonl").read_text().splitlines())
    assert change["step"] == change["restart_from"] == 2
    assert change["changed"]["optim.peak_lr"] == {"was": 0.02, "now": 0.01}
    assert load_recipe(folder / "recipe.toml").data.skip_batches == ((4, 5), (7, 7))
    code, _, err = run(f"checkpoint.dir={folder}", *changes, "train.steps=9")
    assert code == 2
    assert "already gone back to step 2" in err
    code, _, err = run(f"checkpoint.dir={folder}", "train.restart_from=3")
    assert code == 2
    assert "no such checkpoint, only 4, 6" in err


def stop_at(monkeypatch, batch):
    """Send SIGTERM when the batch of that number is drawn."""
    draw = TrainData.__next__

    def drawn(self):
        if self.state()["batches"] + 1 == batch:
            os.kill(os.getpid(), signal.SIGTERM)
        return draw(self)

    monkeypatch.setattr(TrainData, "__next__", drawn)


def weights(folder, step):
    """Bytes of every weight and optimizer number of a step."""
    out = {}
    for item in ("model", "optimizer"):
        root = folder / "steps" / str(step) / item
        for path in sorted(p.parent for p in root.rglob("zarr.json")):
            name = str(path.relative_to(root))
            out[item, name] = open_array(root, name).read().result().tobytes()
    assert len(out) > 30
    return out


def contents(*folders):
    return {p: p.read_bytes() for f in folders for p in f.rglob("*") if p.is_file()}


def test_a_start_never_rewrites_saved_files(run, place):
    """The text has changed or is missing, the shards have moved, and train.steps is larger."""
    folder, data, text = (place / name for name in ("kept", "kept_data", "kept_text"))
    shutil.copytree(place / "run", folder)
    shutil.copytree(place / "data", data)
    shutil.copytree(place / "text", text)
    (text / "0.txt").write_text("another text of other words " * 40)
    new = [f"checkpoint.dir={folder}", f"data.prepared={data}", f"data.sources.words.path={text}"]
    before = contents(folder, data)
    assert run(*new)[0] == 0
    after = contents(folder, data)
    assert {p for p in after if after[p] != before.get(p)} <= {folder / ".lock"}
    shutil.rmtree(text)
    code, out, _ = run(*new, "train.steps=8")
    assert code == 0
    assert "from step 6 on, train.steps: was 6, now 8" in out
    recipe = recipe_of(place, "train.steps=8")
    rate = make_schedule(recipe.optim, 8)(6)
    assert f"{rate:.2e} after step 6, 1.00e-03 by the old settings" in out
    assert records(folder, "train")[6]["learning_rate"] == pytest.approx(float(rate))
    after = contents(folder, data)
    changed = {str(p.relative_to(place)) for p in before if after.get(p) != before[p]}
    assert not {name for name in changed if name.startswith("kept_data/")}
    assert not changed & {"kept/model.json", "kept/tokenizer.model"}
    assert load_recipe(folder / "recipe.toml").train.steps == 8

    # A new tokenizer in the data folder is detected, and the model keeps its own.
    train_tokenizer(["other words make another tokenizer " * 9], 280, data / "tokenizer.model")
    code, _, err = run(*new, "train.steps=8")
    assert code == 2
    assert "tokenizer" in err


def test_a_file_in_place_of_the_run_folder(tmp_path):
    (tmp_path / "file").write_text("text")
    for name, problem in (("file", "it is a file"), ("file/run", "Not a directory")):
        message = f"checkpoint.dir={tmp_path / name}: {problem}; choose another folder"
        with pytest.raises(ConfigError, match=re.escape(message)), locked(tmp_path / name):
            pass


def test_a_run_folder_has_one_owner(run, place):
    with folder_lock(place / "run", "training"):
        code, _, err = run()
    assert code == 2
    assert f"is in use: training (process {os.getpid()} on" in err
    assert run()[0] == 0


def test_a_failed_start_leaves_the_folder_free(run, place, monkeypatch):
    """No recipe is written, even if the run fails after preparing the data; it can be corrected."""
    new = f"checkpoint.dir={place}/🦙 corrected"
    code, _, _ = run(new, "data.sources.words.path=/no/such/folder", "data.prepared=")
    assert code == 2
    folder = place / "🦙 corrected"
    assert not (folder / "recipe.toml").exists()
    monkeypatch.setattr(loop.Trainer, "_compile", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(new, "optim.peak_lr=0.5")
    assert not (folder / "recipe.toml").exists()
    monkeypatch.undo()

    # Stopped at the last step: the run is saved, and the next start evaluates it.
    stop_at(monkeypatch, 6)
    code, out, _ = run(new, "checkpoint.save_every=1000")
    assert code == 143
    assert "stopped by SIGTERM after step 6" in out
    assert not records(folder, "eval")
    monkeypatch.undo()
    code, out, _ = run(new)
    assert code == 0
    assert "done: the last evaluation" in out
    assert len(records(folder, "eval")) == 1
    assert records(folder, "eval")[0]["loss"] == records(place / "run", "eval")[0]["loss"]
    assert "is finished" in run(new)[1]


def test_fine_tuning_keeps_tokenizer_template_and_stop_ids(run, place):
    chat, tuned = place / "chat", place / "chat_tuned"
    shutil.copytree(place / "run", chat)
    about = json.loads((chat / "model.json").read_text())
    about["token_ids"] = {"bos": 1, "eos": [2, 5]}
    (chat / "model.json").write_text(json.dumps(about))
    record_files(chat, "model.json")
    (chat / "chat_template.jinja").write_text("{{ messages[0].content }}")
    (place / "other").mkdir()
    (place / "other/a.txt").write_text(
        "\n\n".join(f"quite other text {i} " * 60 for i in range(60))
    )
    new = [f"train.init_from={chat}", f"checkpoint.dir={tuned}", "data.prepared="]
    new += [f"data.sources.words.path={place}/other", "train.steps=1"]
    train_tokenizer(["other words make another tokenizer " * 9], 280, place / "other.model")
    given = f"data.tokenizer={place}/other.model"
    code, _, err = run(*new, given)
    assert code == 2
    assert "is not the tokenizer of train.init_from" in err
    assert "train.allow_other_tokenizer=true" in err
    assert not tuned.exists()
    assert run(*new)[0] == 0
    for name in ("tokenizer.model", "data/tokenizer.model"):
        assert (tuned / name).read_bytes() == (chat / "tokenizer.model").read_bytes()
    llm = llama_jax.load(tuned)
    assert list(llm.eos_ids) == [2, 5]
    assert llm.chat_template == "{{ messages[0].content }}"


def test_profiling_of_a_continued_run(monkeypatch, tmp_path):
    done = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: done.append("start"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: done.append("stop"))
    for first, last, want in [
        (1, 9, "2-4"),
        (4, 9, "4-4"),
        (5, 9, ""),
        (1, 2, "2-2"),
        (3, 3, "3-3"),
    ]:
        profiler = metrics.Profiler((2, 4), tmp_path)
        traced = []
        for step in range(first, last + 1):
            before = len(done)
            profiler.before(step)
            profiler.after(step, {})
            traced += [step] * (len(done) > before)
        profiler.close()
        ends = f"{traced[0]}-{traced[-1]}" if traced else ""
        assert ends == want
        assert done.count("start") == done.count("stop")


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
    """With a mask, so that microbatches have different numbers of targets."""
    results = []
    for count in (1, 4):
        recipe = recipe_of(place, f"train.gradient_accumulation={count}")
        state = fresh_state(recipe)
        microbatches = jax.tree.map(lambda x, n=count: x.reshape(n, -1, 32), batch(mask=True))
        results.append(jax.jit(make_train_step(recipe, HOW))(state, microbatches))
    near(results[0][1], results[1][1], 1e-6)
    near(results[0][0].optimizer[1].mu, results[1][0].optimizer[1].mu, 1e-5)


def test_chunked_loss_equals_the_whole(place):
    recipe = recipe_of(place)
    params, shape = fresh_state(recipe).params, structure(recipe.model, HOW)
    microbatch = batch(mask=True).microbatch(0)
    loss = lambda chunk, p: nll_sum(merge(shape, p), microbatch, chunk)
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
    recipe = recipe_of(place, "optim.warmup_steps=4", "train.steps=20", "optim.max_grad_norm=0.1")
    schedule = make_schedule(recipe.optim, 20)
    np.testing.assert_allclose([schedule(0), schedule(3)], [0.0025, 0.01], rtol=1e-6)
    np.testing.assert_allclose([schedule(4), schedule(20)], [0.01, 0.001], rtol=1e-6)
    np.testing.assert_allclose(schedule(12), 0.0055, rtol=1e-6)

    state = fresh_state(recipe)
    shape = structure(recipe.model, HOW)
    loss = lambda p: nll_sum(merge(shape, p), batch().microbatch(0), 0) / 256
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
    "train.batch_size=9 train.gradient_accumulation=2": "train.batch_size=9",
    "train.attention=flash": "train.attention='flash' cannot be used here",
    "train.attention=nonsense": "train.attention='nonsense' cannot be used here",
    "train.sample_prompts=['the','" + "cat,sat," * 30 + "']": "prompt 2 has",
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
    assert main(["configs/none.toml"]) == 2
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


def test_a_full_disk_is_reported_by_the_main_thread_alone(monkeypatch):
    said = []
    monkeypatch.setattr(threading, "excepthook", lambda e: said.append(e.exc_type))

    def write(error):
        raise error

    with _quiet_threads():
        for error in (OSError(28, "No space left on device"), KeyError("a bug")):
            thread = threading.Thread(target=write, args=(error,))
            thread.start()
            thread.join()
    assert said == [KeyError]


def test_samples_have_their_own_seeds_and_every_line_is_marked(monkeypatch, capsys):
    """Also for the largest seed, whose successor would be refused after hours of training."""
    from types import SimpleNamespace

    from llama_jax.train.__main__ import _print_samples

    seeds, sent = [], []

    class Model:
        def __init__(self, *_):
            pass

        def generate(self, prompt, *, seed, **_):
            seeds.append(seed)
            return "a\n\nb"

    monkeypatch.setattr("llama_jax.generate.llm.LLM", Model)
    settings = SimpleNamespace(seed=2**32 - 1, sample_prompts=("x", "x"))
    trainer = SimpleNamespace(
        recipe=SimpleNamespace(train=settings, model=None),
        compute=SimpleNamespace(unroll=False),
        state=SimpleNamespace(params={}),
        tokenizer=None,
        frozen=(),
        mixture=SimpleNamespace(chat_template=None),
        step=1,
        trackers=SimpleNamespace(samples=lambda step, texts: sent.extend(texts)),
    )
    _print_samples(trainer)
    assert sent == ["xa\n\nb"] * 2
    assert seeds == [2**32 - 1, 0]
    lines = [line for line in capsys.readouterr().out.splitlines() if line != "sample:"]
    assert len(lines) == 6
    assert all(line.startswith("  | ") for line in lines)
