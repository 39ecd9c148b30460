"""What fraction of a training step is spent waiting for data?

A simulated step keeps every core busy with matmuls for a fixed time. Before each step the loop
takes a batch; the time that this takes is the wait. Data: the embedded sources.

    python -m benchmarks.data_wait      writes benchmarks/results/data_wait.json
"""

import tempfile
import time
from typing import Any

import jax
import numpy as np

from benchmarks.common import environment, spread, write
from llama_jax.config import DataConfig, SourceConfig
from llama_jax.data.mixture import Mixture, TrainData, open_mixture
from llama_jax.prepare.mixture import prepare_mixture

STEP_SECONDS = 0.3
STEPS = 30
REPEATS = 3
SHAPES = ((8, 256), (64, 2048), (512, 2048))


def main() -> None:
    """Measure each batch shape and packing."""
    sources = {
        "code": SourceConfig(path="python:code", weight=0.7),
        "prose": SourceConfig(path="python:prose", weight=0.3),
    }
    step = busy_step(STEP_SECONDS)
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for packing in ("concat", "segments"):
            for batch_size, seq_len in SHAPES:
                cfg = DataConfig(sources=sources, seq_len=seq_len, packing=packing)
                mixture = open_mixture(prepare_mixture(cfg, 4096, folder))
                runs = [measure(mixture, cfg, batch_size, step) for _ in range(REPEATS)]
                results[f"{packing} {batch_size} x {seq_len}"] = {
                    "waiting_percent": spread([100 * r["share"] for r in runs]),
                    "longest_wait_ms": spread([1e3 * r["longest"] for r in runs]),
                    "step_ms": spread([1e3 * r["step"] for r in runs]),
                }
    question = f"time in next(data) of {STEPS} steps that keep all cores busy"
    print(results)
    write("data_wait", {"question": question, "batches": results, **environment()})


def busy_step(seconds: float) -> Any:
    """A function that computes on all cores for about ``seconds``."""
    x = np.full((1024, 1024), 1e-3, np.float32)
    once = jax.jit(lambda a, n: jax.lax.fori_loop(0, n, lambda _, y: y @ a, a))
    once(x, 1).block_until_ready()
    start = time.perf_counter()
    once(x, 50).block_until_ready()
    count = int(50 * seconds / (time.perf_counter() - start))
    return lambda: once(x, count).block_until_ready()


def measure(mixture: Mixture, cfg: DataConfig, batch_size: int, step: Any) -> dict[str, float]:
    """Fraction of time spent waiting, longest wait and mean step, after the first step."""
    data = TrainData(mixture, cfg, batch_size)
    next(data)
    step()
    waits = []
    start = time.perf_counter()
    for _ in range(STEPS):
        before = time.perf_counter()
        next(data)
        waits.append(time.perf_counter() - before)
        step()
    total = time.perf_counter() - start
    data.close()
    return {"share": sum(waits) / total, "longest": max(waits), "step": total / STEPS}


if __name__ == "__main__":
    main()
