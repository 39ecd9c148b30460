"""What the benchmarks share: the environment, results files, and processes that take turns."""

import datetime
import importlib.metadata
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results"
LOAD = os.getloadavg()
# By default glibc returns large buffers to the kernel, so each step faults them in again. With
# these settings PyTorch and JAX are both faster.
ALLOCATOR = {
    "MALLOC_ARENA_MAX": "1",
    "GLIBC_TUNABLES": "glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=17179869184:"
    "glibc.malloc.top_pad=268435456:glibc.malloc.hugetlb=1",
}


def environment(packages: tuple[str, ...] = ("sentencepiece", "numpy", "grain", "jax")) -> dict:
    """CPU, versions of Python and packages, load, commit and date of a measurement."""
    cpu = platform.processor()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((x.partition(": ")[2] for x in lines if x.startswith("model name")), cpu)
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": {p: importlib.metadata.version(p) for p in packages},
        "load_before": [round(x, 2) for x in LOAD],
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
    }


def commit() -> str:
    """The commit that is checked out; empty without git."""
    if not shutil.which("git"):
        return ""
    git = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    return subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()


def spread(values: list[float]) -> dict[str, float]:
    """Median, minimum and maximum with three digits, and the number of values."""
    numbers = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return {k: float(f"{v:.3g}") for k, v in numbers.items()} | {"runs": len(values)}


def write(name: str, result: dict[str, Any]) -> None:
    """Write results/NAME.json."""
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written: {path.relative_to(ROOT)}")


class Worker:
    """A process that measures one round per line on its standard input.

    It prints "ready" with a JSON value once it has warmed up, then a number per line.

    Example:
      worker = Worker("benchmarks.train_step", "jax", "small")
      milliseconds = worker.measure()
    """

    def __init__(self, module: str, *args: str):
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, "--worker", *args],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT,
            env=os.environ | ALLOCATOR | {"JAX_PLATFORMS": "cpu"},
        )  # fmt: skip
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._input, self._output = self._process.stdin, self._process.stdout
        for line in self._output:
            if line.startswith("ready "):
                self.ready = json.loads(line[6:])
                return
        sys.exit(f"{module} {' '.join(args)} ended with exit code {self._process.wait()}")

    def measure(self) -> float:
        self._input.write("\n")
        self._input.flush()
        return float(self._output.readline())

    def close(self) -> None:
        self._input.close()
        self._process.wait()


def take_turns(
    workers: dict[str, Worker], rounds: int, per_round: int = 1
) -> dict[str, list[float]]:
    """Measurements of each worker, ``per_round`` in each round; ends the workers."""
    values: dict[str, list[float]] = {name: [] for name in workers}
    for _ in range(rounds):
        for name, worker in workers.items():
            values[name] += [worker.measure() for _ in range(per_round)]
    for worker in workers.values():
        worker.close()
    return values
