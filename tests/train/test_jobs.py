"""Jobs of several processes: killed, hanging, slow, missing and different ones."""

import functools
import os
import re
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from forked import job_environments, start_training
from train_tools import write_recipe

from llama_jax.checkpoint.steps import whole_steps
from llama_jax.config import load_recipe
from llama_jax.data.mixture import TrainData
from llama_jax.prepare.mixture import prepare_mixture
from llama_jax.train import distributed, remat, watchdog
from llama_jax.train.metrics import read_records

STEPS = 8
MESH = "mesh.data=2", "mesh.fsdp=2"
EXIT_TEMPFAIL = 75
LIMIT = 0.65e6
"""bytes, between the peaks of a step that keeps nothing and of one that keeps everything"""


def at_batch_6(action) -> None:
    """Let this process do something when it draws its batch number 6."""
    draw = TrainData.__next__

    def drawn_here(self):
        if self.state()["batches"] == 5:
            action()
        return draw(self)

    TrainData.__next__ = drawn_here


def killed(run: Path, index: int) -> None:
    def kill_after_the_save():
        while 4 not in whole_steps(run):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)

    if index == 2:
        at_batch_6(kill_after_the_save)


def stuck(index: int) -> None:
    watchdog.MIN_SECONDS = 2.0
    if index == 1:
        at_batch_6(threading.Event().wait)


def slow(index: int) -> None:
    draw = TrainData.__next__
    if index == 3:
        TrainData.__next__ = lambda self: time.sleep(0.5) or draw(self)


def impatient(index: int) -> None:
    distributed.JOIN_SECONDS = 3


def little_memory(index: int) -> None:
    """The device of process 1 has less memory; every process says what it has chosen."""
    fit = remat.fit

    def fit_here(possible, *others):
        choice, program = fit(possible, *others)
        print("chosen:", *choice.names, "of", *possible[-1].names, choice.peak, flush=True)
        return choice, program

    remat.fit = fit_here
    remat._local_limit = lambda: (1e12, LIMIT)[index]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("jobs")
    train = {"steps": STEPS, "eval_batches": 1, "hang_factor": 3.0}
    write_recipe(folder, train=train, checkpoint={"save_every": 4})
    return folder


def run_job(place, commands, started=None, slices=1, patch=None) -> list[tuple[int, str]]:
    """Exit status and output of each process of a job.

    Args:
      place: folder with the cache of compiled programs.
      commands: arguments of each process.
      started: number of processes that are started, if not all.
      slices: number of slices, of equally many processes.
      patch: called with its number in each process first.
    """
    env = job_environments(len(commands), slices)
    patches = [patch and functools.partial(patch, i) for i in range(len(commands))]
    job = [
        start_training(commands[i], place / "cache", patch=patches[i], env=env[i])
        for i in range(started or len(commands))
    ]
    texts = [process.communicate(timeout=400)[0] for process in job]
    return [(process.returncode, text) for process, text in zip(job, texts, strict=True)]


def command(place, run, *overrides):
    return [str(place / "recipe.toml"), f"checkpoint.dir={place / run}", *overrides]


def errors(results, code):
    """The error lines of the processes that ended with an exit status, without stack traces."""
    for status, text in results:
        if status == code:
            assert "Traceback" not in text
            assert "@  " not in text, text
            (line,) = [x for x in text.splitlines() if x.startswith("error: ")]
            yield line


def losses(folder):
    return {r["step"]: r["loss"] for r in read_records(folder / "metrics.jsonl") if "loss" in r}


def test_a_killed_process_of_two_slices_and_a_restart(place):
    """The others name it and end; the same command ends as a run of one process. In the second
    start a process is slow."""
    ((code, text),) = run_job(place, [command(place, "one")])
    assert code == 0, text
    arguments = [command(place, "four", *MESH)] * 4
    results = run_job(place, arguments, slices=2, patch=functools.partial(killed, place / "four"))
    assert [code for code, _ in results] == [EXIT_TEMPFAIL, EXIT_TEMPFAIL, -9, EXIT_TEMPFAIL]
    for line in errors(results, EXIT_TEMPFAIL):
        assert re.match(r"error: process 2 on \S+ ended without an error message \(killed, ", line)
        assert line.endswith("start the same command again: it continues from the last checkpoint")
    results = run_job(place, arguments, slices=2, patch=slow)
    assert [code for code, _ in results] == [0] * 4, results[0][1]
    assert f"continuing {place / 'four'} from step 4" in results[0][1]
    one, four = losses(place / "one"), losses(place / "four")
    assert list(four) == list(one) == list(range(1, STEPS + 1))
    np.testing.assert_allclose(list(four.values()), list(one.values()), rtol=1e-5)
    found = re.findall(r"step \d+: process (\d) on \S+ is the slowest: (\S+) s per", results[0][1])
    assert len(found) > 2
    assert {process for process, _ in found} == {"3"}
    records = read_records(place / "four/metrics.jsonl")
    last = [r["slowest"] for r in records if r["kind"] == "train"][-1]
    assert last["process"] == 3
    assert last["seconds"] > 0.4 > 2 * last["median"]


def test_one_process_that_hangs_ends_all_with_their_stacks(place):
    results = run_job(place, [command(place, "stuck")] * 2, patch=stuck)
    lines = list(errors(results, EXIT_TEMPFAIL))
    assert len(lines) == 2, results
    assert len(set(lines)) == 1
    assert "has not finished after" in lines[0]
    stacks = [(place / f"stuck/hang-process-{i}.txt").read_text() for i in range(2)]
    assert ["drawn_here" in text for text in stacks] == [False, True]
    assert all("in _loop" in text for text in stacks)


def test_a_process_with_another_recipe_or_other_data(place):
    both = [command(place, "other"), command(place, "other", "train.seed=7", "data.workers=1")]
    lines = list(errors(run_job(place, both), 2))
    assert len(lines) == 2
    for line in lines:
        assert line.startswith("error: process 1 on ")
        assert line.endswith(
            ": not the recipe and software of process 0: train.seed=7 (process 0: 0); start the "
            "same command with the same software on every host"
        )
    (place / "others").mkdir()
    (place / "others/text.txt").write_text("another text\n" * 2000)
    changed = f"data.sources.words.path={place}/others", f"data.prepared={place}/changed"
    recipe = load_recipe(place / "recipe.toml", changed)
    prepare_mixture(recipe.data, recipe.model.vocab_size, place / "changed")
    both[1] = command(place, "other", f"data.prepared={place}/changed")
    lines = list(errors(run_job(place, both), 2))
    assert len(lines) == 2
    for line in lines:
        assert line.startswith("error: process 1 on ")
        assert f"the shards of source words and the tokenizer in {place}/changed" in line


def test_a_process_that_never_starts(place):
    results = run_job(place, [command(place, "three")] * 4, started=3, patch=impatient)
    lines = list(errors(results, EXIT_TEMPFAIL))
    assert len(lines) == 3, results
    for i, line in enumerate(lines):
        assert f"error: process {i} of 4, coordinator 127.0.0.1:" in line
        assert "start all of them together" in line


def test_tensor_parallelism_across_slices(place):
    mesh = 'mesh.preset="fsdp_tensor"', "mesh.fsdp=1", "mesh.tensor=4"
    results = run_job(place, [command(place, "across", *mesh)] * 4, slices=2)
    lines = list(errors(results, 2))
    assert len(lines) == 4, results
    for line in lines:
        assert "mesh.tensor=4 x mesh.context=1 would cross slices: there are 2 slices of 2" in line


def test_all_processes_keep_the_same_activations(place):
    """train.remat=auto: what fits the smallest device of the job."""
    arguments = command(place, "auto", "train.remat=auto", "train.steps=1")
    results = run_job(place, [arguments] * 2, patch=little_memory)
    assert [code for code, _ in results] == [0, 0], results
    first, second = [re.findall(r"chosen: (.*) of (.*) ", text) for _, text in results]
    assert first == second
    assert 0 < len(first[0][0].split()) < len(first[0][1].split()), first
