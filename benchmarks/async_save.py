"""How much a step slows down while a checkpoint is written.

    python benchmarks/async_save.py [--rounds 4]

Trains the `small` shape (34M parameters, 0.4 GB of weights and optimizer) on the CPU. A round is
steps without a save, then
a save and the steps until it is written. Reported: median step without a save, how long the call
of `save` blocks, and the
mean of the steps while it writes.
Result: benchmarks/results/async_save.json.
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

from llama_jax.checkpoint import Checkpoints
from llama_jax.config import load_recipe
from llama_jax.sharding import make_mesh
from llama_jax.step import execution, init_state, make_train_step

ROOT = Path(__file__).parent.parent


def main() -> None:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--quiet-steps", type=int, default=5)
    arguments = parser.parse_args()
    recipe = load_recipe(ROOT / "configs/tiny.toml", ["model.name=small"])
    jax.set_mesh(make_mesh(recipe.mesh))
    how = execution(recipe, "cpu")
    state = jax.jit(lambda: init_state(recipe, how))()
    step = jax.jit(make_train_step(recipe, how), donate_argnums=0)
    ids = np.random.default_rng(0).integers(0, 8192, (1, 8, 257), np.int32)
    batch = {"inputs_BT": ids[..., :-1], "targets_BT": ids[..., 1:], "stop": np.zeros(1, np.int32)}

    def train() -> float:
        nonlocal state
        start = time.perf_counter()
        state, metrics = step(state, batch)
        jax.block_until_ready((state, metrics))
        return time.perf_counter() - start

    train(), train()
    rounds = []
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = Checkpoints(folder, 1)
        for number in range(arguments.rounds):
            quiet = [train() for _ in range(arguments.quiet_steps)]
            start = time.perf_counter()
            checkpoints.save(number, *state, {"step": number})
            blocked = time.perf_counter() - start
            during = []
            while checkpoints.saving():
                during.append(train())
            checkpoints.wait()
            rounds.append({"quiet": quiet, "blocked": blocked, "during": during})
            print(
                f"round {number}: step {statistics.median(quiet):.2f} s; save returns after "
                f"{blocked:.2f} s; steps while it writes: {', '.join(f'{x:.2f}' for x in during)} "
                "s",
                flush=True,
            )
        checkpoints.close()
    result = {
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "jax": jax.__version__,
        "rounds": rounds,
    }
    slowdowns = [
        sum(r["during"]) / (len(r["during"]) * statistics.median(r["quiet"])) - 1
        for r in rounds
        if r["during"]
    ]
    if slowdowns:
        print(f"steps while a save is under way: {statistics.median(slowdowns):+.1%} "
              f"({min(slowdowns):+.1%} to {max(slowdowns):+.1%})")  # fmt: skip
    (ROOT / "benchmarks/results/async_save.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
