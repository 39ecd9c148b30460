"""Benchmarks during training: their scores on any mesh, and that they do not change the run."""

import functools
import importlib.util
import json
import random
import re
import shutil

import jax
import jax.numpy as jnp
import matplotlib.image
import numpy as np
import pytest
from train_tools import words, write_recipe

from llama_jax.checkpoint.arrays import open_array
from llama_jax.config import load_recipe
from llama_jax.data.batch import ShardBatch
from llama_jax.model.params import merge, structure
from llama_jax.model.sharding import make_mesh
from llama_jax.train.__main__ import main
from llama_jax.train.benchmarks import Benchmarks, PackedScorer, benchmark_lines, plot_benchmarks
from llama_jax.train.metrics import read_records
from llama_jax.train.step import abstract_state, compute_config, init_state


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A recipe, its text, and a small PIQA."""
    folder = tmp_path_factory.mktemp("evaluate")
    write_recipe(folder)
    rng = random.Random(0)
    text = functools.partial(words, rng)
    (folder / "piqa").mkdir()
    questions = [dict(goal=text(3), sol1=text(2), sol2=text(3)) for _ in range(24)]
    lines = "".join(json.dumps(q) + "\n" for q in questions)
    (folder / "piqa/valid.jsonl").write_text(lines)
    labels = "".join(f"{rng.randrange(2)}\n" for _ in questions)
    (folder / "piqa/valid-labels.lst").write_text(labels)
    return folder


def evaluate(folder, *tasks, **settings):
    values = {"tasks": list(tasks), "every": 2, "limit": 20, "data": str(folder)} | settings
    return [f"train.evaluate.{key}={json.dumps(value)}" for key, value in values.items()]


# Scores ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def alone(folder):
    """Weights, pairs of context and continuation, and the log-likelihood of each pair in a row of
    its own, on one device."""
    recipe = load_recipe(folder / "recipe.toml")
    compute = compute_config(recipe, "cpu")
    params = jax.jit(lambda: init_state(recipe, compute).params)()
    model = merge(structure(recipe.model, compute), params)
    rng = np.random.default_rng(0)
    ids = lambda length: rng.integers(0, 288, length).tolist()
    pairs = [(ids(rng.integers(1, 14)), ids(rng.integers(1, 6))) for _ in range(60)]
    pairs += [(ids(28), ids(5)), (ids(1), ids(32))]  # T + 1 tokens

    @jax.jit
    def log_probs(ids_BT):
        return jax.nn.log_softmax(model.logits(model.hidden(ids_BT)))

    def of_all():
        rows = [[*a, *b] + [0] * (33 - len(a) - len(b)) for a, b in pairs]
        return np.array(log_probs(jnp.array(rows + rows[:1] * (64 - len(rows)))))

    # The most likely continuation of two tokens, and one that is so only at its first token.
    context = pairs[0][0]
    pairs[0] = context, []
    for at in range(len(context) - 1, len(context) + 1):
        pairs[0][1].append(int(of_all()[0, at].argmax()))
    pairs.append((context, [pairs[0][1][0], (pairs[0][1][1] + 1) % 288]))
    values = [
        sum(float(row[len(a) - 1 + t, token]) for t, token in enumerate(b))
        for row, (a, b) in zip(of_all(), pairs, strict=False)
    ]
    return params, pairs, values


@pytest.mark.parametrize(
    "settings",
    [
        ["mesh.fsdp=1"],
        ["mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2", "mesh.preset=fsdp_tensor",
         "train.gradient_accumulation=2"],
        ["mesh.fsdp=2", "mesh.context=4", "mesh.preset=tensor_sequence", "train.loss_chunk=16"],
    ],
    ids=["one_device", "data_tensor", "context"],
)  # fmt: skip
def test_packed_scores_are_those_of_single_requests(folder, alone, settings):
    recipe = load_recipe(folder / "recipe.toml", settings)
    mesh = make_mesh(recipe.mesh, jax.devices()[: 1 if len(settings) == 1 else 8])
    compute = compute_config(recipe, "cpu")
    values, pairs, expected = alone
    with jax.set_mesh(mesh):
        like = abstract_state(recipe, compute, mesh).params
        params = jax.tree.map(lambda a, x: jax.device_put(a, x.sharding), values, like)
        shard_batch = ShardBatch(recipe, mesh, compute.rules.activation_without_tensor("BT"))
        scorer = PackedScorer(recipe, compute, shard_batch)
        found = {i: (logprob, greedy) for i, logprob, greedy in scorer(pairs, params)}
        assert scorer.num_batches(pairs) > 1
        assert list(scorer([], params)) == []
        assert scorer._step._cache_size() == 1
    np.testing.assert_allclose([found[i][0] for i in range(len(pairs))], expected, atol=1e-4)
    assert [i for i in sorted(found) if found[i][1]] == [0]


# Runs --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(folder):
    """The output of a run without benchmarks ("run") and of one with them ("evaluated")."""
    pytest.importorskip("lm_eval")
    recipe = str(folder / "recipe.toml")
    assert main([recipe]) == 0
    extra = [*evaluate(folder, "paper_piqa"), f"checkpoint.dir={folder}/evaluated"]
    assert main([recipe, *extra]) == 0
    return folder


def records(folder, kind):
    return [r for r in read_records(folder / "metrics.jsonl") if r["kind"] == kind]


def losses(folder):
    return [(r["step"], r["loss"], r["grad_norm"]) for r in records(folder, "train")]


def weights(folder):
    """Every number of the model and of the optimizer after the last step."""
    out = {}
    for item in ("model", "optimizer"):
        step = folder / "steps/6" / item
        for path in sorted(p.parent for p in step.rglob("zarr.json")):
            name = str(path.relative_to(step))
            out[f"{item}/{name}"] = open_array(step, name).read().result().tobytes()
    assert len(out) > 30
    return out


def scores(record):
    return {name: score["value"] for name, score in record["tasks"]["paper_piqa"].items()}


def test_benchmarks_do_not_change_the_run(runs):
    assert losses(runs / "evaluated") == losses(runs / "run")
    assert weights(runs / "evaluated") == weights(runs / "run")
    assert not records(runs / "run", "benchmark")
    found = records(runs / "evaluated", "benchmark")
    assert [(r["step"], r["tokens"]) for r in found] == [(2, 512), (4, 1024), (6, 1536)]
    for record in found:
        assert list(record["tasks"]["paper_piqa"]) == ["acc_norm", "acc"]  # the main one first
        assert record["tasks"]["paper_piqa"]["acc_norm"]["n"] == 20
        assert record["seconds"] > 0
    assert (runs / "evaluated/benchmarks.png").stat().st_size > 5000
    assert not (runs / "run/benchmarks.png").exists()


def test_accuracy_is_that_of_the_saved_checkpoint(runs, tmp_path):
    """As computed by the command on the checkpoint of the last step, on one device."""
    from llama_jax.evaluate.paper_task import TaskOptions
    from llama_jax.evaluate.run import evaluate as evaluate_checkpoint
    from llama_jax.generate.load import load

    options = TaskOptions(runs)
    evaluate_checkpoint(load(runs / "evaluated"), ["paper_piqa"], options, tmp_path, limit=20)
    report = json.loads((tmp_path / "report.json").read_text())
    expected = {k: s["value"] for k, s in report["tasks"]["paper_piqa"]["metrics"].items()}
    assert scores(records(runs / "evaluated", "benchmark")[-1]) == expected


def test_a_continued_run_does_not_repeat_benchmarks(runs, capsys, monkeypatch):
    """Killed after the checkpoint of step 4; or stopped at step 4, or after the validation loss of
    the last step, before the benchmarks of this step."""
    before = records(runs / "evaluated", "benchmark")
    calls = []
    run = Benchmarks.__call__
    monkeypatch.setattr(
        Benchmarks,
        "__call__",
        lambda self, step, *args: calls.append(step) or run(self, step, *args),
    )
    for name, expected in (("killed", [6]), ("stopped", [4, 6]), ("stopped_at_the_end", [6])):
        folder = runs / name
        shutil.copytree(runs / "evaluated", folder)
        if name != "stopped_at_the_end":
            shutil.rmtree(folder / "steps/6")
        if name != "killed":
            lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
            gone = lambda line, step=expected[0]: f'"kind": "benchmark", "step": {step},' in line
            (folder / "metrics.jsonl").write_text("".join(x for x in lines if not gone(x)))
        extra = [*evaluate(runs, "paper_piqa"), f"checkpoint.dir={folder}"]
        assert main([str(runs / "recipe.toml"), *extra]) == 0
        assert calls == expected
        calls.clear()
        after = records(folder, "benchmark")
        assert [(r["step"], r["tasks"]) for r in after] == [(r["step"], r["tasks"]) for r in before]
        assert [r["step"] for r in records(folder, "eval")] == [6]
        assert weights(folder) == weights(runs / "evaluated")
    assert "benchmarks took" in capsys.readouterr().out


def test_lora_starts_with_the_scores_of_its_base(runs, capsys):
    """New adapters change nothing, and the first benchmark of a fine-tuned model is before it."""
    extra = [*evaluate(runs, "paper_piqa"), f"checkpoint.dir={runs}/lora", "lora.rank=2"]
    extra += [f"train.init_from={runs}/evaluated", "train.steps=1", "optim.peak_lr=0.1"]
    assert main([str(runs / "recipe.toml"), *extra]) == 0
    found = records(runs / "lora", "benchmark")
    assert [r["step"] for r in found] == [0, 1]
    last = records(runs / "evaluated", "benchmark")[-1]
    assert scores(found[0]) == scores(last)
    out = capsys.readouterr().out
    score = scores(found[0])["acc_norm"]
    assert re.search(rf"benchmark/paper_piqa acc_norm {score:.3f} ± 0\.\d+, n=20", out)
    assert re.search(r"benchmarks every 2 steps: 40 requests of [\d,]+ tokens, as much as", out)


# Errors ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "data", "message"),
    [
        ("paper_piqa", "empty", "valid-labels.lst from"),
        ("paper_nq_0shot", None, "generates text"),
    ],
    ids=["missing", "generation"],
)
def test_errors_come_before_the_data_is_prepared(folder, tmp_path, capsys, task, data, message):
    pytest.importorskip("lm_eval")
    (tmp_path / "empty").mkdir()
    (tmp_path / "nq").mkdir()
    for name in ("dev", "test"):
        lines = [json.dumps({"question": "who", "answer": ["a"]})] * 3
        (tmp_path / f"nq/NQ-open.{name}.jsonl").write_text("\n".join(lines))
    place = tmp_path / data if data else tmp_path
    run = tmp_path / "run"
    extra = [f"checkpoint.dir={run}", f"data.prepared={tmp_path}/data"]
    assert main([str(folder / "recipe.toml"), *evaluate(place, task), *extra]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: train.evaluate: ")
    assert len(error.splitlines()) == 1
    assert message in error
    assert not run.exists()
    assert not (tmp_path / "data").exists()


def test_without_lm_eval(folder, tmp_path, capsys, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "lm_eval" else found(name, *a)
    )
    extra = [*evaluate(folder, "paper_piqa"), f"checkpoint.dir={tmp_path}/run"]
    assert main([str(folder / "recipe.toml"), *extra]) == 2
    error = capsys.readouterr().err
    assert error == "error: train.evaluate needs lm_eval: pip install 'llama_jax[eval]'\n"
    assert not (tmp_path / "run").exists()


def test_settings(folder):
    """`train.evaluate` is one value or a section."""
    one = load_recipe(folder / "recipe.toml", ['train.evaluate={tasks=["a"],every=5}'])
    other = load_recipe(
        folder / "recipe.toml", ['train.evaluate.tasks=["a"]', "train.evaluate.every=5"]
    )
    assert one == other
    assert one.train.evaluate.limit == 100
    with pytest.raises(ValueError, match=r"train\.evaluate\.tasks is empty"):
        load_recipe(folder / "recipe.toml", ["train.evaluate={tasks=[],every=5}"])


def test_plot(tmp_path):
    score = lambda value: {"value": value, "standard_error": None, "n": 5}
    points = [
        {
            "kind": "benchmark",
            "step": i,
            "tokens": i,
            "tasks": {t: {"acc": score(i / 9)} for t in ("a", "b", "$c$", "d_$")},
        }
        for i in (1, 2)
    ]
    plot_benchmarks([{"kind": "train"}], tmp_path / "none.png", "m")
    assert not (tmp_path / "none.png").exists()
    points[0]["tasks"]["e"] = {}  # its perplexity was infinite
    assert benchmark_lines(points[0] | {"seconds": 1.0})[-2:] == [
        "benchmark/e has no value that is finite", "benchmarks took 1.0 s",
    ]  # fmt: skip
    plot_benchmarks(points, tmp_path / "some.png", "m")
    assert matplotlib.image.imread(tmp_path / "some.png").shape[0] > 700  # two rows of panels
