"""One training run compared with a reference without llama_jax, and the metrics of the run.

The run is the whole command, on a mesh of eight devices (data, fsdp and context of two each), with
packed documents, masks, two sources and two microbatches. The reference values are computed by
tests/make_golden_run.py in float64.
"""

import json
import math
import types

import jax
import make_golden_run as golden
import numpy as np
import pytest

from llama_jax import chips
from llama_jax.checkpoint.arrays import open_array
from llama_jax.data import mixture as data
from llama_jax.data.batch import ShardBatch
from llama_jax.train import clock
from llama_jax.train.__main__ import main

# Bounds for steps 1 to 10 and 11 to 20, float32 against float64. The weights differ more and more:
# Adam divides by the size of the gradient, so that a rounding error in a small one moves its weight
# by as much as one in a large one. How errors round depends on the CPU's instructions.
# Measured with SSE4.2, AVX and AVX-512 (--xla_cpu_max_isa): at most 1e-7 and 1.0e-6 for the loss,
# 1.2e-6 and 3.3e-5 for the gradient norm.
LOSS, NORM = (2e-6, 2e-6), (1e-5, 1e-4)
PEAK = 1e9  # FLOP/s of a device, instead of what this CPU does
WAIT, TRANSFER = 1.0, 3.0  # seconds that a batch and its transfer take on the clock of the test


@pytest.fixture(scope="module")
def values():
    return dict(np.load(golden.VALUES))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The run folder. On the test's clock, only reading and transferring a batch take time."""
    folder = tmp_path_factory.mktemp("golden")
    now = [0.0]

    def taking(seconds, function):
        def call(*args, **kwargs):
            now[0] += seconds
            return function(*args, **kwargs)

        return call

    overrides = [f"checkpoint.dir={folder / 'run'}", "checkpoint.keep=5"]
    overrides += [
        f"data.sources.{name}.path={golden.FOLDER / name}"
        for name in golden.settings()["data"]["sources"]
    ]
    with pytest.MonkeyPatch.context() as patch:
        times = types.SimpleNamespace(perf_counter=lambda: now[0], monotonic=lambda: now[0])
        patch.setattr(clock, "time", times)
        patch.setattr(chips, "peak_flops", lambda device: (PEAK, "the test"))
        patch.setattr(data.TrainData, "__next__", taking(WAIT, data.TrainData.__next__))
        patch.setattr(ShardBatch, "__call__", taking(TRANSFER, ShardBatch.__call__))
        assert main([str(golden.FOLDER / "recipe.toml"), *overrides]) == 0
    return folder / "run"


@pytest.fixture(scope="module")
def records(run):
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    found: dict[str, list] = {"train": [], "eval": [], "goodput": []}
    for record in lines:
        found[record["kind"]].append(record)
    return found


@pytest.mark.parametrize(
    ("key", "bounds"), [("loss", LOSS), ("grad_norm", NORM), ("learning_rate", (1e-6, 1e-6))]
)
def test_every_step_is_the_references(records, values, key, bounds):
    assert [r["step"] for r in records["train"]] == list(range(1, 21))
    found = np.array([r[key] for r in records["train"]])
    for steps, bound in zip((slice(10), slice(10, 20)), bounds, strict=True):
        np.testing.assert_allclose(found[steps], values[key][steps], rtol=bound)


def test_validation_is_the_references(records, values):
    """Masks, padding, bits per byte, entropy, and the mixture by the weights of its sources."""
    assert [r["step"] for r in records["eval"]] == [10, 20]
    for name, want in values.items():
        if not name.startswith("eval/"):
            continue
        *source, key = name.removeprefix("eval/").split("/")
        of = [r["sources"][source[0]] if source else r for r in records["eval"]]
        np.testing.assert_allclose([r[key] for r in of], want, rtol=LOSS[1], err_msg=name)


def test_the_weights_are_the_references(run, values):
    """What the 20 steps changed, from the checkpoint: the initial weights too are as recorded."""
    for name in (k.removeprefix("final/") for k in values if k.startswith("final/")):
        path = next(p.name for p in (run / "steps/20/model").iterdir() if ends(p.name, name))
        found = open_array(run / "steps/20/model", path).read().result()
        start, want = values[f"initial/{name}"], values[f"final/{name}"]
        change = np.linalg.norm(want - start)
        assert np.linalg.norm(found - want) < 1e-4 * change, name


def ends(path: str, name: str) -> bool:
    return path == name or path.endswith("." + name)


def test_initial_weights_are_the_recipes(values):
    """They depend on train.seed alone and are the same on every machine."""
    found = golden.recorded_weights()
    assert found.keys() == {k.removeprefix("initial/") for k in values if k.startswith("initial/")}
    for name, value in found.items():
        np.testing.assert_allclose(value, values[f"initial/{name}"], rtol=1e-5, atol=1e-7)
    golden.check_initial(found, golden.settings())


def test_throughput_is_of_training_alone(records):
    """A device's share of the peak, without the time of evaluations; the share spent waiting."""
    recipe = golden.settings()
    model, tokens = recipe["model"], 8 * 32
    attention = model["dim"] * model["head_dim"] * (2 * 4 + 2 * 2)  # q, o; k, v
    layer = attention + 3 * model["dim"] * model["ffn_dim"] + 2 * model["dim"]
    weights = 2 * layer + model["dim"] + model["dim"] * model["vocab_size"]
    causal = 12 * 2 * (4 * model["head_dim"]) * 32 / 2
    for r in records["train"][1:]:
        assert r["tokens_per_second"] == pytest.approx(tokens / (WAIT + TRANSFER)), r["step"]
        assert r["data_wait"] == pytest.approx(WAIT / (WAIT + TRANSFER))
        flops = r["tokens_per_second"] * (6 * weights + causal) / 8
        assert r["tflops"] * 1e12 == pytest.approx(flops)
        assert r["mfu"] == pytest.approx(flops / PEAK)
        assert r["tokens"] == r["step"] * tokens


def test_shares_and_epochs_of_the_sources(records, values):
    for r in records["train"]:
        drawn = values["order"][: r["step"] * 8, 0]
        for source, name in enumerate(golden.settings()["data"]["sources"]):
            count = int((drawn == source).sum())
            length = (len(golden.read_split(name, "train")[0]) - 1) // 32
            assert r["sources"][name]["share"] == pytest.approx(count / len(drawn))
            assert r["sources"][name]["epochs"] == pytest.approx(count / length)


def test_the_stored_values_are_the_references(values):
    """Recomputed in float64 from the recorded inputs, where torch is installed."""
    pytest.importorskip("torch")
    again = golden.reference(*golden.inputs_of(values))
    assert again.keys() == {k for k in values if k != "order" and not k.startswith("initial/")}
    for name, value in again.items():
        np.testing.assert_allclose(value, values[name], rtol=1e-6, atol=1e-9, err_msg=name)


def test_the_reference_is_no_part_of_the_project():
    """The part of the script that computes the reference does not import llama_jax."""
    text = golden.__loader__.get_source(golden.__name__)
    half = text.split("# What is recorded from llama_jax")[0].split('"""', 2)[2]
    assert "llama_jax" not in half.replace("without llama_jax", "")
    assert "jax" not in half
    assert math.isclose(golden.learning_rate(20, golden.settings()["optim"], 20), 2e-2 * 0.25)
    assert jax.device_count() == 8
