"""Goodput, checkpoints by time, and the watchdog that ends a run that hangs."""

import json
import re
import threading
import time
from pathlib import Path

import pytest
from forked import start_training
from train_tools import write_recipe

from llama_jax.config import ConfigError, load_recipe
from llama_jax.train import clock as clock_module
from llama_jax.train import loop, watchdog
from llama_jax.train.__main__ import main
from llama_jax.train.clock import PHASES, Clock, SaveTimer, duration, goodput_line
from llama_jax.train.metrics import read_records

ROOT = Path(__file__).parents[2]


@pytest.fixture
def now(monkeypatch):
    """A clock that the test moves: ``now[0] += 5``."""
    at = [100.0]
    for name in ("perf_counter", "monotonic"):
        monkeypatch.setattr(clock_module.time, name, lambda: at[0])
    return at


def spend(now, clock, phase, seconds):
    with clock.measure(phase):
        now[0] += seconds


def test_every_second_is_in_one_phase(now):
    clock = Clock(started=90.0)  # the imports took 10 s
    spend(now, clock, "restore", 4)
    spend(now, clock, "compile", 16)
    now[0] += 1
    assert clock.totals()["start"] == 11
    clock.begin()
    for _ in range(10):
        spend(now, clock, "data", 1)
        now[0] += 8
    spend(now, clock, "evaluation", 6)
    assert clock.lap(10, 900) == (100.0, pytest.approx(1 / 9))
    spend(now, clock, "checkpoint", 3)
    now[0] += 7
    assert clock.lap(12, 900) == (180.0, 0.0)  # saves count, evaluations do not
    totals = clock.totals()
    assert totals == {
        "start": 11, "compile": 16, "restore": 4, "data": 10, "evaluation": 6, "checkpoint": 3,
        "steps": 87, "lost": 0, "starts": 1,
    }  # fmt: skip
    assert sum(totals[p] for p in PHASES) == now[0] - 90
    assert goodput_line(clock.totals()) == (
        "goodput: 63.5% of 2 min 17 s in training steps; start 8.0%, compile 11.7%, restore 2.9%, "
        "data 7.3%, evaluation 4.4%, checkpoint 2.2%"
    )


def test_the_steps_that_a_killed_run_repeats_are_lost(now):
    first = Clock()
    first.begin()
    now[0] += 60
    kept = first.totals()  # with the checkpoint
    spend(now, first, "data", 5)
    now[0] += 15
    recorded = first.totals()
    now[0] += 1000  # nothing ran
    second = Clock()
    second.restore(recorded, kept)
    second.begin()
    now[0] += 20
    totals = second.totals()
    assert (totals["steps"], totals["lost"], totals["data"], totals["starts"]) == (80, 20, 0, 2)
    assert "80.0% of 1 min 40 s in 2 starts in training steps; lost 20.0%" in goodput_line(
        second.totals()
    )
    # Killed before its first checkpoint: everything is lost.
    third = Clock()
    third.restore(second.totals(), None)
    assert third.totals()["lost"] == 100
    assert third.totals()["starts"] == 3
    fresh = Clock()
    fresh.restore(None, None)
    assert fresh.totals()["starts"] == 1


def test_saves_by_steps_or_by_time(now, tmp_path):
    by_steps, by_time = SaveTimer(100), SaveTimer("10min")
    assert [by_steps.at(n) for n in (99, 100, 200)] == [False, True, True]
    assert not by_time.at(100)
    now[0] += 599
    assert not by_time.time_is_up()
    now[0] += 1
    assert by_time.time_is_up()
    assert not by_steps.time_is_up()
    by_time.saved()
    assert not by_time.time_is_up()
    for wrong in ("0s", "10 minutes", "-3h", "0", "1.h"):
        with pytest.raises(ConfigError, match=r"checkpoint\.save_every"):
            load_recipe(ROOT / "configs/tiny.toml", [f"checkpoint.save_every={wrong}"])
    assert load_recipe(ROOT / "configs/tiny.toml", ["checkpoint.save_every=90s"])
    assert [duration(s) for s in (0.25, 59, 61, 7260, 90000)] == [
        "0.2 s", "59.0 s", "1 min 1 s", "2 h 1 min", "1 d 1 h",
    ]  # fmt: skip


def test_a_run_saves_by_time_and_records_where_its_time_went(tmp_path, monkeypatch, capsys):
    """The time is up once, during the fourth step; then the run is killed and continued."""
    recipe = str(write_recipe(tmp_path, train={"steps": 6, "eval_batches": 1, "log_every": 1}))
    settings = [recipe, "checkpoint.save_every=1h", "train.eval_every=100"]
    times = iter([False] * 3 + [True] + [False] * 10)
    monkeypatch.setattr(SaveTimer, "time_is_up", lambda _: next(times))
    check = loop.Trainer._check

    def killed(self, step, *others):
        check(self, step, *others)
        if step == 6:
            raise SystemExit(9)

    monkeypatch.setattr(loop.Trainer, "_check", killed)
    with pytest.raises(SystemExit):
        main(settings)
    monkeypatch.undo()
    folder = tmp_path / "run"
    assert [p.name for p in (folder / "steps").iterdir() if p.name.isdigit()] == ["4"]
    at = {r["step"]: r["goodput"] for r in read_records(folder / "metrics.jsonl")}
    assert main(settings) == 0
    out = capsys.readouterr().out
    lost = sum(at[6][p] - at[4][p] for p in PHASES)
    last = read_records(folder / "metrics.jsonl")[-1]
    assert last["kind"] == "goodput"
    assert last["goodput"]["lost"] == pytest.approx(lost)
    assert last["goodput"]["starts"] == 2
    assert all(last["goodput"][p] > 0 for p in PHASES)
    found = re.search(r"goodput: ([\d.]+)% of .* in 2 starts in training steps; (.*)", out)
    whole = sum(last["goodput"][p] for p in PHASES)
    assert float(found[1]) == pytest.approx(100 * last["goodput"]["steps"] / whole, abs=0.051)


def test_only_long_steps_are_hangs(monkeypatch, tmp_path):
    ended = []
    monkeypatch.setattr(watchdog, "MIN_SECONDS", 0.3)
    stacks = tmp_path / "hang-process-0.txt"
    with watchdog.Watchdog(10, stacks, lambda *error: ended.append(error)) as dog:
        time.sleep(0.5)  # no step has finished: compiling may take long
        for step in range(1, 6):
            time.sleep(0.01)
            dog.step_finished(step)
        with dog.paused():
            time.sleep(0.6)
        assert not ended
        end = time.monotonic() + 20
        while not ended and time.monotonic() < end:
            time.sleep(0.05)
    ((text, code),) = ended
    assert code == watchdog.EXIT_CODE == 75
    assert text.startswith("step 6 has not finished after")
    assert "test_only_long_steps_are_hangs" in stacks.read_text()
    assert watchdog.Watchdog(0, stacks, ended.append).limit() == float("inf")


def test_a_hang_ends_the_job_if_the_run_folder_does_not_answer_either(monkeypatch, tmp_path):
    ended = []
    monkeypatch.setattr(watchdog, "MIN_SECONDS", 0.1)
    monkeypatch.setattr(watchdog, "WRITE_SECONDS", 0.1)
    monkeypatch.setattr(watchdog, "Mirror", lambda folder: threading.Event().wait())
    with watchdog.Watchdog(1, tmp_path / "x", lambda *error: ended.append(error)) as dog:
        dog.step_finished(1)
        end = time.monotonic() + 10
        while not ended and time.monotonic() < end:
            time.sleep(0.05)
    assert "the stacks" not in ended[0][0]


@pytest.mark.parametrize(
    "damage",
    [b"\xff", b"[" * 100_000, b"[1]", b'{"kind": "train", "step": "x"}', b'{"step": 1}',
     b'{"kind": "train", "step": 1, "tokens": 8, "loss": "a"}',
     b'{"kind": "goodput", "step": 1, "goodput": 5}',
     b'{"kind": "goodput", "step": 1, "goodput": {"steps": 1}}'],
)  # fmt: skip
def test_metrics_end_at_a_damaged_record(damage, tmp_path):
    good = {"kind": "train", "step": 1, "tokens": 8, "loss": 2.0}
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(json.dumps(good).encode() + b"\n" + damage + b"\n")
    assert read_records(path) == [good]


def hang() -> None:
    """Make step 5 wait forever."""
    watchdog.MIN_SECONDS = 1.0
    check = loop.Trainer._check

    def stuck_here(self, step, *others):
        check(self, step, *others)
        if step == 5:
            threading.Event().wait()

    loop.Trainer._check = stuck_here


def test_a_run_that_hangs_ends_with_its_stacks(tmp_path):
    recipe = write_recipe(tmp_path, train={"eval_batches": 1, "hang_factor": 3.0})
    process = start_training([str(recipe)], tmp_path / "cache", patch=hang)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 75, out
    assert "error: step 5 has not finished after" in out.splitlines()[-1]
    assert "stuck_here" in (tmp_path / "run/hang-process-0.txt").read_text()
