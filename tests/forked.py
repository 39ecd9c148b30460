"""Processes that need not import JAX and this package, which takes a new Python several seconds.

They are forked from a server that has imported both and has started no thread.
"""

import atexit
import gc
import multiprocessing
import multiprocessing.forkserver
import os
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import quick_options

FORK = multiprocessing.get_context("forkserver")
IMPORTED = [
    "pytest", "tensorboardX", "llama_jax.train.__main__", "llama_jax.train.loop",
    "llama_jax.convert.job",
]  # fmt: skip


class Forked:
    """A running process, with the methods of `subprocess.Popen`.

    Args:
      target: a function of a module, which the process runs.
      arguments: of the function.
      env: environment variables beside those of this process. JAX has read its own variables
        before; the function has to update `jax.config`.
    """

    def __init__(self, target: Callable, *arguments: Any, env: dict[str, str] | None = None):
        number, self.output = tempfile.mkstemp(".log")
        os.close(number)
        more = os.environ | (env or {})
        FORK.set_forkserver_preload(IMPORTED)
        self.process = FORK.Process(
            target=run,
            args=(self.output, more, target, arguments),
            daemon=True,  # ended at the end of the tests
        )
        self.process.start()
        self.pid = self.process.pid

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float | None = None) -> tuple[str, None]:
        """The output and the errors of the process, once it has ended."""
        self.process.join(timeout)
        out = Path(self.output).read_text()
        assert self.returncode is not None, f"still running:\n{out}"
        return out, None


def stop_server() -> None:
    """Lets the next process start a server that imports other modules."""
    multiprocessing.forkserver._forkserver._stop()


def run(output: str, env: dict[str, str], target: Callable, arguments: tuple) -> None:
    file = os.open(output, os.O_WRONLY)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ.clear()
    os.environ.update(env)
    gc.freeze()  # what is imported needs no collection
    try:
        target(*arguments)
    finally:  # as a Python that ends; multiprocessing leaves this out
        threading._shutdown()
        atexit._run_exitfuncs()


def start_training(
    arguments: list[str],
    cache: Path,
    devices: int = 1,
    patch: Callable[[], None] | None = None,
    env: dict[str, str] | None = None,
) -> Forked:
    """Start ``python -m llama_jax.train`` without the measurement of the processor and the plot,
    which take a second each.

    Args:
      arguments: of the command.
      cache: folder of compiled programs.
      devices: number of simulated CPU devices.
      patch: a function of a module that changes something in the process first.
      env: environment variables beside those of this process.
    """
    flags = f"--xla_force_host_platform_device_count={devices} {quick_options.FLAGS}"
    return Forked(train, arguments, cache, patch, env={"XLA_FLAGS": flags} | (env or {}))


def train(arguments: list[str], cache: Path, patch: Callable[[], None] | None) -> None:
    import jax

    from llama_jax import chips
    from llama_jax.train import interrupt, metrics
    from llama_jax.train.__main__ import main

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    # Half the time to compile; steps are small.
    jax.config.update("jax_disable_most_optimizations", True)
    interrupt.start_command()
    chips.peak_flops = lambda device: (1e12, "of this test")
    metrics.plot_losses = lambda *_: None
    if patch:
        patch()
    sys.exit(main(arguments))


def job_environments(processes: int, slices: int = 1) -> list[dict[str, str]]:
    """Environment variables of each process of one job on this machine.

    Args:
      processes: of the job.
      slices: number of slices, of equally many processes.
    """
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{s.getsockname()[1]}"
    environments = []
    for i in range(processes if processes > 1 else 0):
        env = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(processes)}
        env["JAX_PROCESS_ID"] = str(i)
        if slices > 1:
            env["JAX_PARTITION_INDEX"] = str(i * slices // processes)
        environments.append(env)
    return environments or [{}]
