"""A run that is killed, stopped or moved to other devices continues as if uninterrupted."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import quick_options
from forked import Forked, job_environments, start_training
from train_tools import write_recipe

from llama_jax.checkpoint.arrays import open_array
from llama_jax.checkpoint.checkpoints import Checkpoints
from llama_jax.checkpoint.file_hashes import read_list
from llama_jax.model import sharding
from llama_jax.train.__main__ import main
from llama_jax.verify.__main__ import verify

ROOT = Path(__file__).parents[2]
STEPS = 24
SAVE_AT_THE_END = "checkpoint.save_every=1000"  # a save takes as long as 20 steps
HOST = os.uname().nodename


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a recipe, its text, and its shards made once."""
    folder = tmp_path_factory.mktemp("runs")
    write_recipe(
        folder, data={"packing": "segments"}, optim={"warmup_steps": 4},
        train={"steps": STEPS, "eval_batches": 1}, checkpoint={"dir": str(folder / "base")},
    )  # fmt: skip
    finish(start_python(folder, "base", SAVE_AT_THE_END))
    return folder


def start_python(folder: Path, run: str, *overrides: str):
    """The command in a new Python, as a user starts it."""
    env = {
        "JAX_PLATFORMS": "cpu", "XLA_FLAGS": quick_options.FLAGS, "PYTHONPATH": str(ROOT),
        "JAX_COMPILATION_CACHE_DIR": str(folder / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }  # fmt: skip
    return subprocess.Popen(
        [sys.executable, "-m", "llama_jax.train", *arguments(folder, run, overrides)],
        env=os.environ | env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def start(folder: Path, run: str, *overrides: str, **options: Any) -> Forked:
    return start_training(arguments(folder, run, overrides), folder / "cache", **options)


def arguments(folder: Path, run: str, overrides: tuple[str, ...]) -> list[str]:
    return [str(folder / "recipe.toml"), f"checkpoint.dir={folder / run}", *overrides]


def interleave() -> None:
    """Use the order of devices on a TPU torus: the hosts alternate."""
    make_mesh = sharding.make_mesh

    def interleaved(cfg, *_):
        first, second = ([d for d in jax.devices() if d.process_index == i] for i in (0, 1))
        mesh = make_mesh(cfg, [d for pair in zip(first, second, strict=True) for d in pair])
        assert [d.process_index for d in mesh.devices.flat] == [0, 1] * 4
        print("interleaved", flush=True)
        return mesh

    sharding.make_mesh = interleaved


def hold_saves() -> None:
    """A save never ends."""
    Checkpoints.save = lambda *_: threading.Event().wait()


def finish(process, code: int = 0, timeout: float = 180) -> str:
    out, _ = process.communicate(timeout=timeout)
    assert process.returncode == code, out
    return out


def losses(folder: Path) -> dict[int, float]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    records = [r for r in map(json.loads, lines) if r["kind"] == "train"]
    assert [r["step"] for r in records] == list(range(1, len(records) + 1))
    return {r["step"]: (r["loss"], r["grad_norm"], r["learning_rate"]) for r in records}


def count(folder: Path) -> int:
    """Steps logged so far."""
    return len(losses(folder)) if (folder / "metrics.jsonl").exists() else 0


def weights(folder: Path) -> dict[str, bytes]:
    """Every parameter and every number of the optimizer, of the last step."""
    out = {}
    for item in ("model", "optimizer"):
        step = folder / "steps" / str(STEPS) / item
        for path in sorted(p.parent for p in step.rglob("zarr.json")):
            name = str(path.relative_to(step))
            out[f"{item}/{name}"] = open_array(step, name).read().result().tobytes()
    assert len(out) > 30
    return out


def same_run(a: Path, b: Path) -> None:
    assert losses(a) == losses(b)
    assert len(losses(a)) == STEPS
    assert weights(a) == weights(b)


def same_losses(a: Path, b: Path, rtol: float = 1e-5) -> None:
    got, want = ([loss for loss, *_ in losses(x).values()] for x in (a, b))
    np.testing.assert_allclose(got, want, rtol=rtol)


def until(process, seen, timeout: float = 120) -> None:
    """Wait until a condition holds while the process is alive."""
    end = time.monotonic() + timeout
    while not seen() and process.poll() is None:
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.005)


def test_a_killed_run_ends_bit_for_bit_as_one_never_killed(place):
    """Killed while preparing, during the first save, and before a save has its checksums. Then data
    and text move, and a concurrent start finds the folder in use."""
    run = place / "killed"
    steps = lambda pattern: {p.name for p in run.glob(f"steps/{pattern}")}
    process = start(place, run.name, "data.prepared=")
    until(process, lambda: (run / "data").exists())
    kill(process)
    assert not (run / "recipe.toml").exists()
    process = start(place, run.name, "data.prepared=")
    until(process, lambda: steps("*tmp*"))
    kill(process)
    process, before = start(place, run.name, "data.prepared="), steps("*")
    until(process, lambda: {s for s in steps("*") - before if s.isdigit()})
    kill(process)
    assert str(STEPS) not in steps("*")
    assert any(map(str.isdigit, steps("*")))

    (run / "data").rename(place / "elsewhere")
    moved = [f"data.prepared={place}/elsewhere", "data.sources.words.path=/no/longer/there"]
    kept = {p: p.read_bytes() for p in (run / "recipe.toml", *place.glob("elsewhere/**/*.*"))}
    process = start(place, run.name, SAVE_AT_THE_END, *moved)
    until(process, lambda: (run / ".lock").read_text().endswith(f"{process.pid} on {HOST})\n"))
    assert main([str(place / "recipe.toml"), f"checkpoint.dir={run}"]) == 2
    finish(process)
    same_run(run, place / "base")
    assert not steps("*tmp*")
    assert all(p.read_bytes() == content for p, content in kept.items())


def kill(process) -> None:
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL


def test_asked_to_stop_saves_and_continues(place):
    """With SIGTERM, then with Ctrl-C."""
    run = place / "stopped"
    before = 0
    for number in (signal.SIGTERM, signal.SIGINT):
        process = start(place, run.name, SAVE_AT_THE_END)
        until(process, lambda before=before: count(run) > before + 2)
        process.send_signal(number)
        out = finish(process, 128 + number)
        stopped = max(int(p.name) for p in (run / "steps").iterdir())
        assert f"stopped by {number.name} after step {stopped}" in out
        assert "will end when a checkpoint is saved" in out
        assert before + 2 < stopped < STEPS
        before = stopped
    finish(start(place, run.name, SAVE_AT_THE_END))
    same_run(run, place / "base")


def test_another_mesh_continues_the_same_run(place):
    """From 8 devices to 4, FSDP to tensor and sequence: losses of one device within 1e-5."""
    run = place / "moved"
    meshes = [
        (8, ["mesh.preset=fsdp"]),
        (4, ["mesh.preset=fsdp_tensor", "mesh.tensor=2"]),
        (8, ["mesh.preset=tensor_sequence", "mesh.tensor=2", "mesh.context=2"]),
    ]
    for i, (devices, mesh) in enumerate(meshes):
        before = count(run)
        process = start(place, run.name, *mesh, "checkpoint.save_every=8", devices=devices)
        if i < 2:
            until(process, lambda before=before: count(run) > before + 2)
            process.send_signal(signal.SIGTERM)
        finish(process, 143 if i < 2 else 0)
    same_losses(run, place / "base")


def start_two(
    folder: Path, run: str, *overrides: str, second: tuple[str, ...] = (), devices=2, **options: Any
):
    return [
        start(folder, run, *overrides, *second * i, devices=devices, env=env, **options)
        for i, env in enumerate(job_environments(2))
    ]


def test_two_processes_train_save_stop_and_resume_together(place):
    """They continue with interleaved devices, where each process reads every other row: losses of
    one process."""
    run = place / "two"
    pair = start_two(place, run.name, SAVE_AT_THE_END)
    until(pair[0], lambda: count(run) > 2)
    pair[1].send_signal(signal.SIGTERM)  # one receives the signal, both stop
    for process in pair:
        finish(process, 143)
    assert max(int(p.name) for p in (run / "steps").iterdir() if p.name.isdigit()) < STEPS
    for process in start_two(place, run.name, SAVE_AT_THE_END, devices=4, patch=interleave):
        assert "interleaved" in finish(process)
    same_losses(run, place / "base", rtol=1e-6)
    evaluations = [
        [r["loss"] for r in map(json.loads, lines) if r["kind"] == "eval"]
        for lines in ((x / "metrics.jsonl").read_text().splitlines() for x in (run, place / "base"))
    ]
    np.testing.assert_allclose(*evaluations, rtol=1e-6)
    parts = [read_list(p) for p in run.glob(f"steps/{STEPS}/checksums.*-of-2.json")]
    assert len(parts) == 2
    assert min(map(len, parts)) > 10  # each process hashed its share
    assert not verify(run)


def test_an_error_of_one_process_ends_both_with_it(place):
    """An error of process 1 at the start, and of process 0 (the coordinator) in the loop."""
    began = time.monotonic()
    pair = start_two(place, "failed", second=("data.prepared=/no/such/shards",))
    for process in pair:
        last = finish(process, 2, timeout=60).splitlines()[-1]
        assert last.startswith("error: ")
        assert "/no/such/shards has no manifest.json" in last
    assert time.monotonic() - began < 60
    pair = start_two(place, "failed", "train.steps=100000", "checkpoint.save_every=1000")
    metrics = place / "failed/metrics.jsonl"
    until(pair[0], lambda: count(place / "failed") > 2)
    metrics.unlink()
    metrics.mkdir()
    for process in pair:
        last = finish(process, 1, timeout=60).splitlines()[-1]
        assert last.startswith("error: ")
        assert f"{metrics}: Is a directory" in last


def test_ctrl_c_ends_every_phase_at_once(place):
    """Without a traceback and with a line that names the phase; in the loop, the second Ctrl-C."""
    phases = {
        "starting": None,
        "preparing data": lambda run: (run / "data").exists(),
        "training": lambda run: (run / "metrics.jsonl").exists() and count(run) > 1,
    }
    text = "train.steps=1000000", "checkpoint.save_every=1000000", "data.prepared="
    for phase, reached in phases.items():
        run = place / f"interrupted {phase}"
        if phase == "starting":
            process = start_python(place, run.name, *text)
            time.sleep(1)  # importing
        else:
            process = start(place, run.name, *text, patch=hold_saves)
            until(process, lambda reached=reached, run=run: reached(run))
        process.send_signal(signal.SIGINT)
        if phase == "training":
            time.sleep(0.2)  # two signals at once would arrive as one
            process.send_signal(signal.SIGINT)
        began = time.monotonic()
        out = finish(process, 130, timeout=30)
        assert time.monotonic() - began < 2, phase
        assert f"Ctrl-C while {phase}" in out
        assert "Traceback" not in out
