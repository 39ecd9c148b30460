"""A small model and texts for the tests of training."""

import random

import jax
import jax.numpy as jnp
import tomli_w

from llama_jax.train.step import init_state

WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "some", "animals", "in", "1984"]
ROPE = {"theta": 10000.0}
MODEL = {
    "vocab_size": 288, "dim": 16, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2,
    "head_dim": 8, "ffn_dim": 32, "norm_eps": 1e-5, "context": 64, "tie_embeddings": False,
    "rope": ROPE,
}  # fmt: skip

# The command without the measurement of the processor and the plot, which take a second each.
QUICK = """
import sys
from llama_jax.train import interrupt
interrupt.start_command()
from llama_jax import chips
from llama_jax.train import metrics
from llama_jax.train.__main__ import main
chips.peak_flops = lambda device: (1e12, "of this test")
metrics.plot_losses = lambda *_: None
"""
RUN = "sys.exit(main(sys.argv[1:]))\n"


def words(rng, count):
    """Random words."""
    return " ".join(rng.choice(WORDS) for _ in range(count))


def make_zeros(recipe, compute):
    """An initial state of zeros, which compiles fast."""
    state = jax.eval_shape(lambda: init_state(recipe, compute))
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), state)


def write_recipe(folder, **sections):
    """Write 60 texts and a recipe, whose runs are in ``folder/run``; returns its path.

    Args:
      folder: for texts, prepared data, the recipe and its run.
      sections: settings in place of the recipe's, or beside them.
    """
    rng = random.Random(0)
    (folder / "text").mkdir()
    for i in range(60):
        (folder / f"text/{i}.txt").write_text(words(rng, 120))
    recipe = {
        "model": MODEL,
        "data": {
            "seq_len": 32, "val_fraction": 0.1, "prepared": str(folder / "data"),
            "sources": {"words": {"path": str(folder / "text")}},
        },
        "optim": {"peak_lr": 1e-2, "warmup_steps": 2},
        "train": {"steps": 6, "batch_size": 8, "log_every": 1},
        "checkpoint": {"dir": str(folder / "run"), "save_every": 2},
    }  # fmt: skip
    for name, settings in sections.items():
        recipe[name] = recipe.get(name, {}) | settings
    path = folder / "recipe.toml"
    path.write_text(tomli_w.dumps(recipe))
    return path
