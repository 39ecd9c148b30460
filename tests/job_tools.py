"""Jobs of several processes on this machine: forks of one process that has imported everything."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import quick_options

ROOT = Path(__file__).parents[1]


class Parent:
    """The process that is forked; it imports jax and the training once for all jobs.

    Args:
      folder: for logs, and the cache of compiled programs.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        env = {
            "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1",
            "XLA_FLAGS": f"--xla_force_host_platform_device_count=1 {quick_options.FLAGS}",
            "JAX_COMPILATION_CACHE_DIR": str(folder / "cache"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        }  # fmt: skip
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__))], env=os.environ | env, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


class Job:
    """A running job of ``python -m llama_jax.train``.

    Args:
      parent: forked for each process.
      arguments: of each process.
      started: number of processes that are started, if not all.
      slices: number of slices, of equally many processes.
      code: Python source that every process runs first; ``index`` is its number.
    """

    def __init__(
        self,
        parent: Parent,
        arguments: list[list[str]],
        started: int | None = None,
        slices: int = 1,
        code: str = "",
    ):
        count = len(arguments)
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{s.getsockname()[1]}"
        several = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(count)}
        self.logs = [parent.folder / f"{time.monotonic_ns()}-{i}.log" for i in range(count)]
        spec: list[dict[str, Any]] = []
        for i in range(count if started is None else started):
            env = several | {"JAX_PROCESS_ID": str(i)} if count > 1 else {}
            if slices > 1:
                env["JAX_PARTITION_INDEX"] = str(i * slices // count)
            log = str(self.logs[i])
            spec.append({"arguments": arguments[i], "env": env, "log": log, "code": code})
        assert parent.process.stdin
        assert parent.process.stdout
        parent.process.stdin.write(json.dumps(spec) + "\n")
        parent.process.stdin.flush()
        self._answers = parent.process.stdout
        self.pids: list[int] = json.loads(self._answers.readline())
        self._timer = threading.Timer(400, lambda: [self.kill(i) for i in range(len(self.pids))])
        self._timer.start()

    def kill(self, index: int, number: int = signal.SIGKILL) -> None:
        os.kill(self.pids[index], number)

    def finish(self) -> list[tuple[int, str]]:
        """Exit status and output of each process, once all have ended."""
        codes = json.loads(self._answers.readline())
        self._timer.cancel()
        return [(codes[i], self.logs[i].read_text()) for i in range(len(codes))]


def _run_jobs() -> None:
    """The parent: for each line of standard input, fork the processes that it describes."""
    import tensorboardX

    from llama_jax import chips
    from llama_jax.train import loop, metrics

    chips.peak_flops = lambda device: (1e12, "of this test")  # type: ignore[assignment]
    metrics.plot_losses = lambda *_: None  # type: ignore[assignment]
    assert loop
    assert tensorboardX
    for line in sys.stdin:
        pids = [_fork(i, **process) for i, process in enumerate(json.loads(line))]
        print(json.dumps(pids), flush=True)
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        print(json.dumps(codes), flush=True)


def _fork(index: int, arguments: list[str], env: dict[str, str], log: str, code: str) -> int:
    if pid := os.fork():
        return pid
    file = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(file, stream)
    os.environ.update(env)
    from llama_jax.train import interrupt
    from llama_jax.train.__main__ import main

    interrupt.start_command()
    exec(code, {"index": index})
    sys.exit(main(arguments))


if __name__ == "__main__":
    _run_jobs()
