"""How much a step slows down while a checkpoint is written.

    python -m benchmarks.async_save [--rounds 4]

Trains the `small` shape (34M parameters, 0.4 GB of weights and optimizer) on the CPU, with 2,048
and with 8,192 tokens a step. A round is steps without a save, then a save and the steps until it is
written. Reported for each: median step without a save, how long the call of `save` blocks, and the
mean of the steps while it writes. Result: benchmarks/results/async_save.json.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
import tqdm

from llama_jax.checkpoint.checkpoints import Checkpoints
from llama_jax.config import load_recipe
from llama_jax.data.batch import Batch
from llama_jax.model.sharding import make_mesh
from llama_jax.train.step import execution, init_state, make_train_step

ROOT = Path(__file__).parent.parent


def main() -> None:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--quiet-steps", type=int, default=3)
    arguments = parser.parse_args()
    result = {
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "jax": jax.__version__,
        "tokens a step": {},
    }
    for gradient_accumulation in (1, 4):
        rounds = measure(gradient_accumulation, arguments.rounds, arguments.quiet_steps)
        slowdowns = [
            sum(r["during"]) / (len(r["during"]) * statistics.median(r["quiet"])) - 1
            for r in rounds
            if r["during"]
        ]
        tokens = 2048 * gradient_accumulation
        print(
            f"{tokens} tokens a step: {statistics.median(slowdowns):+.1%} while a save is "
            f"under way ({min(slowdowns):+.1%} to {max(slowdowns):+.1%})"
        )
        result["tokens a step"][tokens] = {
            "slowdown_median": round(statistics.median(slowdowns), 4),
            "slowdown_range": [round(min(slowdowns), 4), round(max(slowdowns), 4)],
            "rounds": rounds,
        }
    (ROOT / "benchmarks/results/async_save.json").write_text(json.dumps(result, indent=1) + "\n")


def measure(gradient_accumulation: int, count: int, quiet_steps: int) -> list[dict]:
    """Seconds of ``count`` rounds: steps before, the call of save, steps while it writes."""
    settings = [
        "model.name=small",
        f"train.gradient_accumulation={gradient_accumulation}",
        f"train.batch_size={8 * gradient_accumulation}",
    ]
    recipe = load_recipe(ROOT / "configs/tiny.toml", settings)
    compute = execution(recipe, "cpu")
    with jax.set_mesh(make_mesh(recipe.mesh)), tempfile.TemporaryDirectory() as folder:
        state = jax.jit(lambda: init_state(recipe, compute))()
        step = jax.jit(make_train_step(recipe, compute), donate_argnums=0)
        ids = np.random.default_rng(0).integers(0, 8192, (gradient_accumulation, 8, 257), np.int32)
        stop = np.zeros(1, np.int32)
        batch = Batch(ids[..., :-1], ids[..., 1:])

        def train() -> float:
            nonlocal state
            start = time.perf_counter()
            state, metrics = step(state, batch, stop)
            jax.block_until_ready((state, metrics))
            return time.perf_counter() - start

        train(), train()
        rounds = []
        checkpoints = Checkpoints(folder, 1)
        for number in tqdm.trange(count, desc=f"accumulate {gradient_accumulation}"):
            quiet = [train() for _ in range(quiet_steps)]
            start = time.perf_counter()
            checkpoints.save(number, *state, {"step": number})
            blocked = time.perf_counter() - start
            during = []
            while checkpoints.saving():
                during.append(train())
            checkpoints.wait()
            rounds.append({"quiet": quiet, "blocked": blocked, "during": during})
        checkpoints.close()
    return rounds


if __name__ == "__main__":
    main()
