"""Where the tasks of a stage run: processes of this machine, Slurm, or Ray.

The classes are datatrove's executors with three changes. A task is complete when the file with its
counts exists, which the writer writes last. The controlling process waits for all tasks. A task
whose process dies ends the run with an error (datatrove's pool of processes waits forever).
"""

import json
import logging
import math
import multiprocessing
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from multiprocessing import connection
from pathlib import Path
from typing import Any

import dill
from datatrove.executor.local import LocalPipelineExecutor
from datatrove.executor.ray import RayPipelineExecutor
from datatrove.executor.slurm import SlurmPipelineExecutor
from datatrove.pipeline.base import PipelineStep
from loguru import logger

POLL_SECONDS = 0.5
MAX_SLURM_JOBS = 1000  # in one array; Slurm's default limit is 1001
MAX_SQUEUE_SECONDS = 10.0  # between two calls of squeue
FILE_SYSTEM_SECONDS = 60.0  # until other hosts see a new file, with NFS's default settings


@dataclass(frozen=True)
class Local:
    """Tasks run in processes of this machine, ``workers`` at a time."""

    workers: int


@dataclass(frozen=True)
class Slurm:
    """Tasks are an array job of a Slurm partition; all hosts see the folders of input and output.

    Time limit, account and so on: the variables ``SBATCH_TIMELIMIT``, ``SBATCH_ACCOUNT``, ...
    """

    partition: str


@dataclass(frozen=True)
class Ray:
    """Tasks run on a Ray cluster; "local" starts one on this machine."""

    address: str


Place = Local | Slurm | Ray


class TaskError(ValueError):
    """A task that did not complete; the message names its log."""


@dataclass(frozen=True)
class Job:
    """The tasks of a stage.

    Attributes:
        name: Name of the stage.
        pipeline: Steps of each task.
        tasks: Number of tasks.
        counts: Folder with a file of every complete task.
        logs: Folder for logs.
    """

    name: str
    pipeline: Sequence[PipelineStep]
    tasks: int
    counts: Path
    logs: Path


def execute(job: Job, place: Place, progress: Callable[[], None]) -> None:
    """Runs the tasks that are not complete, and waits for them.

    Args:
        job: What to run.
        place: Where to run it.
        progress: Called about twice a second.

    Raises:
        TaskError: A task failed.
    """
    logger.disable("datatrove")  # in this process; tasks log to files
    match place:
        case Local():
            _run_local(_LocalExecutor(job, place), job, progress)
        case Slurm():
            _run_slurm(_SlurmExecutor(job, place), job, progress)
        case Ray():
            _run_ray(_RayExecutor(job), job, place, progress)


class _Completion:
    """Makes datatrove's executors take the counts of a task as the sign that it is complete."""

    counts: Path

    def is_rank_completed(self, rank: int) -> bool:
        return counts_of(self.counts, rank).is_file()

    def mark_rank_as_completed(self, rank: int) -> None:
        """The writer has done it."""

    def get_incomplete_ranks(
        self, ranks: Iterable[int] | None = None, skip_completed: bool | None = None
    ) -> list[int]:
        complete = {path.stem for path in self.counts.glob("*.json")}
        ranks = range(self.world_size) if ranks is None else ranks  # type: ignore[attr-defined]
        return [rank for rank in ranks if f"{rank:05d}" not in complete]


# Local -------------------------------------------------------------------------------------------


class _LocalExecutor(_Completion, LocalPipelineExecutor):
    def __init__(self, job: Job, place: Local):
        super().__init__(
            list(job.pipeline), tasks=job.tasks, workers=place.workers, logging_dir=str(job.logs)
        )
        self.counts = job.counts


def _run_local(executor: _LocalExecutor, job: Job, progress: Callable[[], None]) -> None:
    """Runs each task in a process of its own, so that its memory is released."""
    if not (waiting := deque(executor.get_incomplete_ranks())):
        return
    pickled = _save_pickle(executor, job)
    # Forks of a server without threads are safe, and need not import the modules again.
    context = multiprocessing.get_context("forkserver")
    modules = sorted({type(step).__module__ for step in job.pipeline})
    context.set_forkserver_preload([__name__, *modules])
    running: dict[int, Any] = {}
    try:
        while waiting or running:
            while waiting and len(running) < executor.workers:
                rank = waiting.popleft()
                arguments = (pickled, rank, _log_of(job, rank))
                running[rank] = context.Process(target=run_task, args=arguments)
                running[rank].start()
            connection.wait([p.sentinel for p in running.values()], timeout=POLL_SECONDS)
            progress()
            for rank, process in list(running.items()):
                if process.exitcode is not None:
                    del running[rank]
                    if process.exitcode or not executor.is_rank_completed(rank):
                        raise _local_error(job, rank, process.exitcode)
    finally:
        for process in running.values():
            process.kill()
            process.join()


def _local_error(job: Job, rank: int, exitcode: int) -> TaskError:
    log = _log_of(job, rank)
    if exitcode >= 0:
        return _task_error(job, rank, _failure(log), log)
    name = signal.Signals(-exitcode).name
    hint = " (out of memory? give fewer --workers)" if name == "SIGKILL" else ""
    return _task_error(job, rank, f"its process ended by {name}{hint}", log)


def run_task(pickled: Path, rank: int, log: Path) -> None:
    """Runs one task in this process; its output and errors go to ``log``."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its tasks
    threading.Thread(target=_end_with_parent, daemon=True).start()
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        run_pickled(pickled, rank)
    except Exception as e:
        traceback.print_exc()
        print(_one_line(e), file=sys.stderr, flush=True)
        sys.exit(1)


def _end_with_parent() -> None:
    if parent := multiprocessing.parent_process():
        connection.wait([parent.sentinel])
        os._exit(1)


def _log_of(job: Job, rank: int) -> Path:
    return job.logs / "tasks" / f"{rank:05d}.log"


# Slurm -------------------------------------------------------------------------------------------


class _SlurmExecutor(_Completion, SlurmPipelineExecutor):
    def __init__(self, job: Job, place: Slurm):
        scripts = shlex.quote(sysconfig.get_path("scripts"))
        super().__init__(
            list(job.pipeline),
            tasks=job.tasks,
            time="",
            qos="",
            partition=place.partition,
            job_name=f"llama-jax-{job.name}",
            logging_dir=str(job.logs),
            slurm_logs_folder=str(job.logs / "slurm"),
            env_command=f"export PATH={scripts}:$PATH",  # for datatrove's command
        )
        self.counts = job.counts

    def get_sbatch_args(self, max_array: int = 1) -> dict[str, Any]:
        """Without a time limit: that of the partition holds."""
        arguments = super().get_sbatch_args(max_array)
        del arguments["time"]
        return arguments

    def launch_merge_stats(self) -> None:
        """Not needed: the counts are merged when the run is complete."""


def _run_slurm(executor: _SlurmExecutor, job: Job, progress: Callable[[], None]) -> None:
    if not (ranks := executor.get_incomplete_ranks()):
        return
    if not shutil.which("sbatch"):
        raise ValueError("--slurm needs the command sbatch: call this on a host of the cluster")
    id_file = job.logs / "slurm_job"
    id_ = id_file.read_text() if id_file.exists() else ""
    if not id_ or not _slurm_job_exists(id_):  # else it goes on, after this process was killed
        executor.tasks_per_job = math.ceil(len(ranks) / MAX_SLURM_JOBS)
        try:
            executor.launch_job()
        except subprocess.CalledProcessError:
            raise ValueError("Slurm refused the job; the message of sbatch is above") from None
        id_ = str(executor.job_id)
        id_file.write_text(id_)
    try:
        _wait_for_slurm(executor, id_, progress)
    except KeyboardInterrupt:
        subprocess.run(["scancel", id_], check=False)
        raise
    if failed := executor.get_incomplete_ranks():
        saved = json.loads((job.logs / "ranks_to_run.json").read_bytes())
        index = saved.index(failed[0]) // executor.tasks_per_job
        log = job.logs / "slurm" / f"{id_}_{index}.out"
        raise _task_error(job, failed[0], f"job {id_}: {_failure(log)}", log)


def _wait_for_slurm(executor: _SlurmExecutor, id_: str, progress: Callable[[], None]) -> None:
    """Returns when all tasks are complete, or when the job is over and they will not be."""
    pause, over_since = POLL_SECONDS, 0.0
    while executor.get_incomplete_ranks():
        progress()
        if over_since and time.monotonic() > over_since + FILE_SYSTEM_SECONDS:
            return
        if not over_since and not _slurm_job_exists(id_):
            over_since, pause = time.monotonic(), POLL_SECONDS
        time.sleep(pause)
        pause = min(1.2 * pause, MAX_SQUEUE_SECONDS)


def _slurm_job_exists(id_: str) -> bool:
    """Whether a job waits or runs; also if Slurm does not answer."""
    command = ["squeue", "--noheader", f"--jobs={id_}", "--format=%T"]
    done = subprocess.run(command, capture_output=True, text=True)
    return bool(done.stdout.strip()) or bool(done.returncode and "Invalid job" not in done.stderr)


def cancel_slurm_jobs(logs: Path) -> None:
    """Cancels jobs that a killed process has left.

    Args:
        logs: Folder with the log folders of stages.
    """
    for path in logs.glob("*/slurm_job"):
        subprocess.run(["scancel", path.read_text()], check=False)


# Ray ---------------------------------------------------------------------------------------------


class _RayExecutor(_Completion, RayPipelineExecutor):
    def __init__(self, job: Job):
        super().__init__(list(job.pipeline), tasks=job.tasks, logging_dir=str(job.logs))
        self.counts = job.counts


def _run_ray(executor: _RayExecutor, job: Job, place: Ray, progress: Callable[[], None]) -> None:
    """Runs each task as a task of Ray, which repeats those whose process dies up to 3 times.

    datatrove's ``RayPipelineExecutor.run`` starts a pool of processes in each task and waits
    forever if one of them dies.
    """
    _check_address(place.address)
    try:
        import ray
    except ImportError:
        raise ValueError(
            "--ray needs Ray on this host and those of the cluster: pip install ray"
        ) from None
    if not (ranks := executor.get_incomplete_ranks()):
        return
    own: dict[str, Any] = {"include_dashboard": False} if place.address == "local" else {}
    try:
        if not ray.is_initialized():  # it stays so for the next stages
            ray.init(place.address, log_to_driver=False, logging_level=logging.ERROR, **own)
    except (ConnectionError, ValueError, RuntimeError) as e:
        raise ValueError(f"--ray {place.address}: {' '.join(str(e).split())}") from None
    remote = ray.remote(num_cpus=1, max_retries=3)(run_pickled)
    pickled = _save_pickle(executor, job)
    waiting = {remote.remote(pickled, rank): rank for rank in ranks}
    try:
        while waiting:
            done, _ = ray.wait(list(waiting), timeout=POLL_SECONDS)
            progress()
            for task in done:
                rank = waiting.pop(task)
                try:
                    ray.get(task)
                except ray.exceptions.RayTaskError as e:
                    why = f"{type(e.cause).__name__}: {e.cause}"
                    raise _task_error(job, rank, why, job.logs / "logs") from None
                except ray.exceptions.RayError as e:
                    raise _task_error(job, rank, _one_line(e), job.logs / "logs") from None
    finally:
        for task in waiting:
            ray.cancel(task, force=True)


def _check_address(address: str) -> None:
    """Checks that a cluster answers: Ray itself tries for minutes."""
    if found := re.fullmatch(r"(?:ray://)?([^:/]+):(\d+)", address):
        try:
            socket.create_connection((found[1], int(found[2])), timeout=10).close()
        except OSError as e:
            raise ValueError(f"--ray {address} does not answer: {e}") from None


# Common ------------------------------------------------------------------------------------------


def _save_pickle(executor: Any, job: Job) -> Path:
    path = job.logs / "executor.pik"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        dill.dump(executor, file, fmode=dill.CONTENTS_FMODE)
    return path


def run_pickled(pickled: Path, rank: int) -> None:
    """Runs one task of a saved executor in this process."""
    with pickled.open("rb") as file:
        executor = dill.load(file)
    executor._run_for_rank(rank, local_rank=1)  # 1: prints only errors


def counts_of(folder: Path, rank: int) -> Path:
    return folder / f"{rank:05d}.json"


def _task_error(job: Job, rank: int, why: str, log: Path) -> TaskError:
    return TaskError(f"stage {job.name}, task {rank}: {why}; log: {log}")


def _failure(log: Path) -> str:
    """The last line of a log that names an exception, else the last line."""
    if not log.exists():
        return "it ended before it started, or was cancelled"
    lines = [line for line in log.read_text("utf-8", "replace").split("\n") if line.strip()]
    errors = [line for line in lines if re.match(r"(\d+: )?[\w.]*(Error|Exception)\b", line)]
    return (errors or lines or ["it left no message"])[-1]


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
