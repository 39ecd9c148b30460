"""How much does a training step slow down while a checkpoint is written?

    python -m benchmarks.async_save [--rounds 4]

Trains the `small` model (34M parameters, 0.4 GB of weights and optimizer) on the CPU with 2,048 and
8,192 tokens per step. A round: steps without a save, then a save and the steps until it is written.
Result, benchmarks/results/async_save.json: seconds of the steps without a save, of the blocking
call to `save`, and of the steps during the save.
"""

import argparse
import statistics
import tempfile
import time

import jax
import numpy as np
import tqdm

from benchmarks.common import ROOT, environment, write
from llama_jax.checkpoint.checkpoints import Checkpoints
from llama_jax.config import load_recipe
from llama_jax.data.batch import Batch
from llama_jax.model.sharding import make_mesh
from llama_jax.train.step import compute_config, init_state, make_train_step


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--quiet-steps", type=int, default=3)
    arguments = parser.parse_args()
    result = {**environment(), "tokens_per_step": {}}
    for gradient_accumulation in (1, 4):
        rounds = measure(gradient_accumulation, arguments.rounds, arguments.quiet_steps)
        slowdowns = [
            sum(r["during"]) / (len(r["during"]) * statistics.median(r["quiet"])) - 1
            for r in rounds
            if r["during"]
        ]
        tokens = 2048 * gradient_accumulation
        print(
            f"{tokens} tokens per step: {statistics.median(slowdowns):+.1%} during a save "
            f"({min(slowdowns):+.1%} to {max(slowdowns):+.1%})"
        )
        result["tokens_per_step"][tokens] = {
            "slowdown_median": round(statistics.median(slowdowns), 4),
            "slowdown_range": [round(min(slowdowns), 4), round(max(slowdowns), 4)],
            "rounds": rounds,
        }
    write("async_save", result)


def measure(gradient_accumulation: int, count: int, quiet_steps: int) -> list[dict]:
    """Seconds of ``count`` rounds: steps before, the call to `save`, steps during the save."""
    settings = [
        "model.name=small",
        f"train.gradient_accumulation={gradient_accumulation}",
        f"train.batch_size={8 * gradient_accumulation}",
    ]
    recipe = load_recipe(ROOT / "configs/tiny.toml", settings)
    compute = compute_config(recipe, "cpu")
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
        for number in tqdm.trange(count, desc=f"{gradient_accumulation} microbatches"):
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
