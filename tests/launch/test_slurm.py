"""launch/slurm.sbatch on a real Slurm cluster of two nodes: a preempted job continues exactly."""

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import quick_options
import slurm_tools
from train_tools import QUICK, RUN, write_recipe

ROOT = Path(__file__).parents[2]
STEPS = 100


class Cluster:
    """Jobs of launch/slurm.sbatch, whose command `llama-jax train` is that of this environment."""

    def __init__(self, folder: Path, environment: dict[str, str]):
        self.folder, self.environment = folder, environment
        with socket.socket() as s:
            s.bind(("", 0))
            port = s.getsockname()[1]
        environment |= {
            "PATH": f"{folder}/bin:{environment['PATH']}", "PYTHONPATH": str(ROOT),
            "JAX_PLATFORMS": "cpu", "JAX_COORDINATOR_PORT": str(port),
            "XLA_FLAGS": quick_options.FLAGS, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
            "JAX_COMPILATION_CACHE_DIR": f"{folder}/cache",
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }  # fmt: skip
        (folder / "bin").mkdir()
        (folder / "train.py").write_text(QUICK + RUN)
        self.command(f'shift; exec {sys.executable} {folder}/train.py "$@"')

    def command(self, text: str) -> None:
        path = self.folder / "bin/llama-jax"
        path.write_text(f"#!/bin/bash\n{text}\n")
        path.chmod(0o755)

    def run(self, *command: str) -> str:
        done = subprocess.run(
            command, env=self.environment, cwd=self.folder, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def submit(self, name: str, *arguments: str) -> str:
        options = ["--parsable", "--nodes=2", "--gpus-per-node=0", f"--job-name={name}"]
        return self.run("sbatch", *options, f"{ROOT}/launch/slurm.sbatch", *arguments)

    def log(self, name: str, job: str) -> str:
        path = self.folder / f"{name}-{job}.log"
        return path.read_text() if path.exists() else ""

    def wait(self, job: str, *states: str, seconds: float = 200) -> dict[str, str]:
        """The job as Slurm describes it, when it is in one of the states."""
        end = time.monotonic() + seconds
        while True:
            words = self.run("scontrol", "show", "job", "--oneliner", job).split()
            about = dict(word.partition("=")[::2] for word in words)
            if about["JobState"] in states:
                return about
            text = f"job {job} is not {states}: {about}\n{self.log(about['JobName'], job)}"
            ended = about["JobState"] in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")
            assert not ended, text
            assert time.monotonic() < end, text
            time.sleep(0.1)

    def start_soon(self, job: str) -> None:
        """Start a requeued job, which Slurm would start after two minutes.

        Slurm revokes the credentials of the first start, and new ones are valid a second later.
        """
        self.wait(job, "PENDING")
        self.run("scontrol", "update", f"jobid={job}", "StartTime=now+3")


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    if os.environ.get("LLAMA_JAX_DOWNLOADS") != "1":
        pytest.skip("downloads Slurm and takes minutes; set LLAMA_JAX_DOWNLOADS=1")
    folder = tmp_path_factory.mktemp("slurm")
    with contextlib.ExitStack() as stack:
        try:
            environment = stack.enter_context(slurm_tools.cluster(folder))
        except slurm_tools.Unavailable as e:
            pytest.skip(str(e))
        yield Cluster(folder, environment)


def losses(folder: Path) -> list[tuple]:
    path = folder / "metrics.jsonl"
    records = map(json.loads, path.read_text().splitlines() if path.exists() else ())
    names = "step", "loss", "grad_norm", "learning_rate"
    return [tuple(r[n] for n in names) for r in records if r["kind"] == "train"]


def arrays(folder: Path) -> dict[str, bytes]:
    """Files of the weights and of the optimizer state after the last step."""
    step = folder / "steps" / str(STEPS)
    paths = [p for item in ("model", "optimizer") for p in (step / item).rglob("c/**/*")]
    return {str(p.relative_to(step)): p.read_bytes() for p in paths if p.is_file()}


def test_a_preempted_job_ends_as_one_that_was_not(slurm):
    """`scontrol requeue` in the middle: SIGTERM, a checkpoint, a second start on both nodes."""
    recipe = write_recipe(slurm.folder, train={"steps": STEPS}, checkpoint={"save_every": 1000})
    whole, preempted = slurm.folder / "whole", slurm.folder / "preempted"
    job = slurm.submit("whole", str(recipe), f"checkpoint.dir={whole}")
    slurm.wait(job, "COMPLETED")

    job = slurm.submit("preempted", str(recipe), f"checkpoint.dir={preempted}")
    while len(losses(preempted)) < 3:
        slurm.wait(job, "PENDING", "CONFIGURING", "RUNNING")
    slurm.run("scontrol", "requeue", job)
    slurm.start_soon(job)
    slurm.wait(job, "COMPLETED")
    log = slurm.log("preempted", job)
    (stopped,) = map(int, re.findall(r"stopped by SIGTERM after step (\d+): saved", log))
    assert 3 <= stopped < STEPS
    assert f"continuing {preempted} from step {stopped}" in log
    assert len(losses(whole)) == STEPS
    assert losses(preempted) == losses(whole)
    assert len(arrays(whole)) > 30
    assert arrays(preempted) == arrays(whole)


def test_which_errors_start_the_job_again(slurm):
    """Exit code 75 and a signal do, up to a limit; an error does not."""
    code = slurm.folder / "code"
    slurm.command(f"echo arguments: $*; [ $SLURM_PROCID = 1 ] || exit $(cat {code})")
    code.write_text("75")
    job = slurm.submit("codes", "tiny", "train.sample_prompts=['a b']")
    for i, next_code in enumerate(("143", "1"), start=1):
        while f"restart {i} of at most 100" not in slurm.log("codes", job):
            slurm.wait(job, "PENDING", "RUNNING")
        code.write_text(next_code)
        slurm.start_soon(job)
    about = slurm.wait(job, "FAILED", seconds=60)
    assert (about["Restarts"], about["ExitCode"]) == ("2", "1:0")
    log = slurm.log("codes", job)
    assert log.count("arguments: train tiny train.sample_prompts=['a b']") == 6
    assert "exit code 75: restart 1 of at most 100" in log
    assert "exit code 143: restart 2 of at most 100" in log


@pytest.mark.parametrize(
    ("option", "misspelt"),
    [("--requeue", "--requeuee"), ("--ntasks-per", "--ntask-per"), ("=TERM@300", "=TREM@300")],
)
def test_misspelt_options_are_refused(slurm, option, misspelt):
    text = (ROOT / "launch/slurm.sbatch").read_text()
    assert text.count(option) == 1
    path = slurm.folder / "misspelt.sbatch"
    command = ["sbatch", "--test-only", "--nodes=2", "--gpus-per-node=0", str(path)]
    path.write_text(text)
    slurm.run(*command)
    path.write_text(text.replace(option, misspelt))
    with pytest.raises(AssertionError, match=r"nvalid|unrecognized"):
        slurm.run(*command)
