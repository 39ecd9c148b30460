"""Where tasks run: processes that are killed and continue, Slurm and Ray with the same result."""

import contextlib
import os
import random
import signal
import time

import pytest

pytest.importorskip("datatrove", reason="needs the extra corpus")

import corpus_tools as tools
import slurm_tools
from test_wikipedia import dump

from llama_jax.corpus import executors
from llama_jax.corpus.__main__ import main

FILES = {f"{i}": f"{i}\ntwo\nfar too long\n{i}{i}\n".encode() for i in range(4)}


def wait_for(condition, seconds=60.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "not within the time"
        time.sleep(0.01)


def test_killed_at_random_moments_and_continued(tmp_path, corpus):
    tools.write_inputs(tmp_path / "in", FILES)
    arguments = ("toy", "in", "--workers", "2", "sleep=0.15", "--output")
    rng = random.Random(0)
    suffixes = (".part", ".zst", ".json")
    for number in (4, 10):  # files, also those that are not complete
        command = tools.start(tmp_path, *arguments, "killed")
        files = lambda: sum(1 for p in tmp_path.glob("killed/*/**/*") if p.suffix in suffixes)
        wait_for(lambda: files() >= number or command.poll() is not None)  # noqa: B023
        time.sleep(rng.uniform(0, 0.05))
        command.kill()
        command.communicate()
        assert not (tmp_path / "killed/manifest.json").exists()
    assert corpus(*arguments, "killed")[0] == 0
    assert corpus(*arguments, "whole")[0] == 0
    assert tools.tree(tmp_path / "killed") == tools.tree(tmp_path / "whole")


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGKILL])
def test_processes_of_tasks_end_with_the_command(tmp_path, corpus, sent):
    waiting = tmp_path / "in/waiting"
    tools.write_inputs(tmp_path / "in", {"a": b"wait\n"})
    command = tools.start(tmp_path, "toy", "in/a.txt", "--output", "out")
    wait_for(lambda: waiting.exists() and waiting.read_text())
    status, _, errors = corpus("toy", "in/a.txt", "--output", "out")
    assert status == 1
    assert f"out is in use: making the corpus toy (process {command.pid} on " in errors
    command.send_signal(sent)
    _, errors = command.communicate(timeout=60)
    if sent == signal.SIGINT:
        assert command.returncode == 130
        assert errors == "interrupted; the same command continues from here\n"
    wait_for(lambda: not os.path.exists(f"/proc/{waiting.read_text()}"), 10)


def test_a_process_that_dies_is_reported(tmp_path, corpus):
    tools.write_inputs(tmp_path / "in", {"a": b"one\n", "b": b"two\ndie\n"})
    status, _, errors = corpus("toy", "in", "--output", "out")
    assert status == 1
    assert "stage lines, task 1: its process ended by SIGKILL (out of memory? " in errors
    assert errors.endswith("/work/logs/lines/tasks/00001.log\n")
    assert errors.count("\n") == 1


@pytest.fixture(scope="module")
def wikipedia(tmp_path_factory):
    """Makes a corpus of a small dump in several parts; returns its files.

    Args of the function: name of the folder, and where the tasks run.
    """
    folder = tmp_path_factory.mktemp("wikipedia")
    (folder / "dump.xml").write_text(dump(), encoding="utf-8")

    def make(name, *where):
        arguments = [folder / "dump.xml", "--output", folder / name, "part_bytes=1000", *where]
        assert main(["wikipedia", *map(str, arguments)]) == 0
        return tools.tree(folder / name)

    return make


@pytest.fixture(scope="module")
def local(wikipedia):
    files = wikipedia("local")
    assert sum(name.startswith("documents/") for name in files) > 1
    return files


# Slurm -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    """The environment of a Slurm cluster on this machine."""
    folder = tmp_path_factory.mktemp("slurm")
    with contextlib.ExitStack() as stack:
        try:
            yield stack.enter_context(slurm_tools.cluster(folder))
        except slurm_tools.Unavailable as e:
            pytest.skip(str(e))


@pytest.fixture
def on_slurm(slurm, monkeypatch):
    for name in ("PATH", "SLURM_CONF", "LD_LIBRARY_PATH"):
        monkeypatch.setenv(name, slurm[name])
    monkeypatch.setenv("PYTHONPATH", tools.PYTHONPATH)
    monkeypatch.setattr(executors, "FILE_SYSTEM_SECONDS", 1.0)
    return ("--slurm", slurm_tools.PARTITION)


def test_slurm_gives_the_same_bytes(wikipedia, local, on_slurm):
    assert wikipedia("slurm", *on_slurm) == local


def test_a_failed_task_on_slurm_is_reported(corpus, tmp_path, on_slurm):
    tools.write_inputs(tmp_path / "in", {"a": b"one\n", "fail": b"one\n"})
    status, _, errors = corpus("toy", "in", "--output", "out", *on_slurm)
    assert status == 1
    assert "ValueError: no model: run llama-jax corpus models toy; log: " in errors
    assert errors.rstrip().endswith("_0.out")
    status, _, errors = corpus("toy", "in", "--output", "new", "--slurm", "nowhere")
    assert status == 1
    assert "Slurm refused the job" in errors


# Ray ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def on_ray():
    ray = pytest.importorskip("ray")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", tools.PYTHONPATH)  # of Ray's processes
        yield ("--ray", "local")
    ray.shutdown()


def test_ray_gives_the_same_bytes(wikipedia, local, on_ray):
    assert wikipedia("ray", *on_ray) == local


def test_a_failed_task_on_ray_is_reported(corpus, tmp_path, on_ray):
    tools.write_inputs(tmp_path / "in", {"fail": b"one\n"})
    status, _, errors = corpus("toy", "in", "--output", "out", *on_ray)
    assert status == 1
    assert "ValueError: no model: run llama-jax corpus models toy; log: " in errors


def test_without_slurm_or_ray(corpus, tmp_path, monkeypatch):
    tools.write_inputs(tmp_path / "in")
    monkeypatch.setenv("PATH", "")
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    assert "needs the command sbatch" in corpus("toy", "in", "--output", "a", "--slurm", "x")[2]
    assert "pip install ray" in corpus("toy", "in", "--output", "b", "--ray", "local")[2]
    errors = corpus("toy", "in", "--output", "c", "--ray", "localhost:1")[2]
    assert errors.startswith("error: --ray localhost:1 does not answer: ")
