"""The command for a machine with a GPU runs on a CPU with tiny sizes."""

import json
import os
import subprocess
import sys

import pytest
import quick_options

from benchmarks.accelerator import __main__ as accelerator
from benchmarks.accelerator import ahead, table, torch_peers, train
from benchmarks.accelerator.common import TINY
from benchmarks.common import ROOT
from llama_jax.chips import gpu_topology
from llama_jax.config import MODELS

ABSENT = ("grain", "tensorboardX", "pyarrow", "orbax", "sentencepiece", "tokenizers", "matplotlib")


def run(folder, *args, block=(), **env):
    """The command in a process in which importing the packages in ``block`` fails."""
    blocked = folder / "blocked"
    for name in block:
        (blocked / name).mkdir(parents=True, exist_ok=True)
        text = f"raise ModuleNotFoundError('{name} is blocked', name='{name}')\n"
        (blocked / name / "__init__.py").write_text(text)
    path = os.pathsep.join([str(blocked), str(ROOT)])
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.accelerator", "--output", str(folder), *args],
        env=os.environ
        | {"PYTHONPATH": path, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": quick_options.FLAGS}
        | env,
        cwd=folder, capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """One run of all steps, without the packages that a GPU image lacks: process, JSON, folder."""
    pytest.importorskip("jax_cuda13_plugin", reason="two minutes: runs where the compilers are")
    folder = tmp_path_factory.mktemp("accelerator")
    process = run(folder, block=ABSENT)
    return process, json.loads((folder / "accelerator.json").read_text()), folder


def test_every_step_runs_and_passes(whole):
    process, results, _ = whole
    assert process.returncode == 0, process.stdout + process.stderr
    assert {row["step"] for row in results["rows"]} == set(accelerator.STEPS)
    for row in results["rows"]:
        assert not row.get("wrong"), row
        assert not row.keys() & {"error", "skipped"}, row


def test_each_time_has_median_and_spread(whole):
    times = [row["seconds"] for row in whole[1]["rows"] if "seconds" in row]
    assert len(times) > 15
    for time in times:
        assert 0 < time["min"] <= time["median"] <= time["max"]
        assert time["runs"] >= 2


def test_the_table_is_printed_last_and_says_what_was_not_measured(whole):
    process, results, folder = whole
    assert process.stdout == (folder / "table.txt").read_text() + "\n"
    assert results["command"].startswith("python -m benchmarks.accelerator")
    for row in results["rows"]:
        assert f"  {row['name']}" in process.stdout
    assert "CPU: tiny sizes" in process.stdout
    end = process.stdout.split("targets (for one H100)")[1].splitlines()
    targets = [line for line in end if line.startswith("  target: ")]
    assert len(targets) == len(table.TARGETS)
    assert all(line.endswith(": not measured") for line in targets)


def test_no_time_left(tmp_path):
    """Each step is skipped with the reason; that is no failure."""
    process = run(tmp_path, "--minutes", "0.05")
    assert process.returncode == 0
    rows = json.loads((tmp_path / "accelerator.json").read_text())["rows"]
    assert [row["name"] for row in rows] == list(accelerator.STEPS)
    assert rows[0]["skipped"] == "it needs about 30 s, and 3 s are left"
    assert "skipped: it needs about" in process.stdout


def test_a_step_that_fails_does_not_stop_the_next(tmp_path, monkeypatch):
    """A step that dies, and one that hangs."""
    steps = {"_dies": 5.0, "_hangs": 0.5, "_works": 5.0}
    monkeypatch.setattr(accelerator, "STEPS", steps)
    part = (
        "import os, sys, time\n"
        "if sys.argv[1] == '_hangs': time.sleep(60)\n"
        "print('row {\"name\": \"' + sys.argv[1] + '\"}', flush=True)\n"
        "if sys.argv[1] == '_dies': sys.exit('Segmentation fault')\n"
    )
    package = tmp_path / "benchmarks/accelerator"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package.parent / "__init__.py").touch()
    (package / "part.py").write_text(part)
    monkeypatch.setattr(accelerator, "ROOT", tmp_path)
    measured = accelerator.Run(tmp_path, minutes=1)
    for name in steps:
        measured.step(name)
    rows = json.loads((tmp_path / "accelerator.json").read_text())["rows"]
    assert [row["name"] for row in rows] == ["_dies", "_dies", "_hangs", "_works"]
    assert rows[1]["error"] == "exit status 1: Segmentation fault"
    assert rows[2]["error"] == "ended: it took too long"
    assert "error" not in rows[3]


def test_missing_packages_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(accelerator, "NEEDED", ("jax", "no_such_package", "nor_this"))
    monkeypatch.setattr(sys, "argv", ["accelerator", "--output", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"^missing packages: no_such_package, nor_this; install"):
        accelerator.main()


def _row(name, median, **numbers):
    return {"name": name, "seconds": {"median": median}, "numbers": numbers}


def test_targets():
    """Each target from rows of a GPU: met, not met."""
    start = "attention T 4096, forward + backward: "
    rows = [
        {"name": "card", "platform": "gpu"},
        _row(start + "cudnn", 0.9), _row(start + "gpu", 1.2), _row(start + "mosaic", 1.0),
        _row("generate llama3.1-8b, bfloat16, batch 1", 6e-3, **{"of copy": 0.79}),
        _row("generate llama3.1-8b, int8, batch 1", 3e-3, **{"of copy": 0.7}),
        _row("generate llama3.1-8b, torch, batch 1", 9e-3),
        _row("train llama3.2-1b, remat none, cudnn", 0.25, **{"MFU": 0.51, "tokens/s": 63_000.0}),
        _row("train llama3.2-1b, remat matmuls, gpu", 0.27, **{"MFU": 0.49, "tokens/s": 60_000.0}),
        _row("train llama3.2-1b, torch", 0.26, **{"tokens/s": 62_000.0}),
    ]  # fmt: skip
    said = {target.text: text for target, text in table.verdicts({r["name"]: r for r in rows})}
    assert list(said.values()) == [
        "0.90: met", "not measured", "0.79: NOT MET", "2.00: met", "not measured", "1.50: met",
        "0.51: met", "1.02: NOT MET",
    ]  # fmt: skip


# The peers in PyTorch run on a CPU here, eagerly -----------------------------------------------


def test_torch_attention_and_training_run():
    pytest.importorskip("torch")
    row = torch_peers.attention("cpu", TINY, 64, "cudnn", "forward + backward")
    assert row["seconds"]["runs"] == TINY.rounds
    pytest.importorskip("transformers")
    row = torch_peers.train("cpu", TINY._replace(train_model="stories260k"), compile_=False)
    assert row["numbers"]["tokens/s"] > 0


def test_the_static_cache_gives_the_tokens_of_generate():
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    model = torch_peers.llama(MODELS["stories260k"], "cpu", torch.float32).eval()
    ids = torch.randint(1, 512, (2, 9))
    each, tokens = torch_peers.greedy("cpu", model, ids, steps=3, compile_=False)
    want = model.generate(
        ids, do_sample=False, max_new_tokens=15, eos_token_id=None, pad_token_id=0
    )
    assert each["runs"] == 4
    assert torch.cat(tokens, dim=1).tolist() == want[:, 9:].tolist()


def test_without_cuda_the_row_says_so():
    assert torch_peers.guarded(pytest.fail)() == {"not measured": "no torch with CUDA"}


# Compiled for an absent H100 ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "gib"),
    [
        ("right: attention gpu, masked rows", 1),
        ("right: decode gpu, position 131071, H 64", 1),
        ("attention T 16384, forward: gpu, 128x128 8 warps 2 stages", 2),
        ("decode attention B 32, S 32768: gpu", 10),
        ("product of 16 rows, int4", 2),
        ("generate llama3.1-8b, largest random matrix", 20),
    ],
)
def test_full_sizes_compile(name, gib):
    pytest.importorskip("jax_cuda13_plugin", reason="needs jax's CUDA plugin")
    program = dict(ahead.programs(gpu_topology("h100")[0]))[name]()
    assert train.peak_gib(program.memory_analysis()) < gib


def test_every_part_has_programs_for_an_absent_gpu():
    pytest.importorskip("jax_cuda13_plugin", reason="needs jax's CUDA plugin")
    names = [name for name, _ in ahead.programs(gpu_topology("h100")[0])]
    assert len(names) == len(set(names)) > 60
