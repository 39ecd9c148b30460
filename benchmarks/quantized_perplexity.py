"""Perplexity with int8 and int4 weights against float32.

    python -m llama_jax.train                        # trains the model: checkpoints/tiny
    python -m benchmarks.quantized_perplexity [RUN]  # writes results/quantized_perplexity.json

Measured on the validation split of the run's own sources; the layers' matrices are quantized.
"""

import argparse
import functools
import math
from pathlib import Path

import jax
import jax.numpy as jnp

from benchmarks.common import environment, write
from llama_jax.checkpoint.weights import load_weights
from llama_jax.config import load_recipe
from llama_jax.data.mixture import Mixture, eval_batches, open_mixture
from llama_jax.model.llama import ComputeConfig
from llama_jax.model.params import abstract_params
from llama_jax.model.quantize import quantize, weight_bytes
from llama_jax.train.step import make_eval_step

BATCH = 8


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", nargs="?", type=Path, default=Path("checkpoints/tiny"))
    run = parser.parse_args().run
    recipe = load_recipe(run / "recipe.toml", [])
    cfg, compute = recipe.model, ComputeConfig(jnp.dtype("float32"))
    params = load_weights(run, abstract_params(cfg, compute))
    mixture = open_mixture(run / "data")
    step = jax.jit(make_eval_step(recipe, compute))
    result = {}
    for kind in ("float32", "int8", "int4"):
        weights = params if kind == "float32" else quantize(params, kind)
        losses = {name: loss(recipe, mixture, name, functools.partial(step, weights))
                  for name in mixture.sources}  # fmt: skip
        perplexity = {name: math.exp(nats) for name, nats in losses.items()}
        result[kind] = {"bytes": weight_bytes(params, kind), "perplexity": perplexity}
        for name, value in perplexity.items():
            against = value / result["float32"]["perplexity"][name] - 1
            print(f"{kind:8} {name:6} perplexity {value:.3f} ({against:+.2%})")
    question = "perplexity of validation tokens, weights in float32, int8 and int4"
    model = f"{cfg.num_layers} layers, D {cfg.dim}, V {cfg.vocab_size}"
    write("quantized_perplexity", {"question": question, "model": model, **result, **environment()})


def loss(recipe, mixture: Mixture, source: str, step) -> float:
    """Mean nats/token over the whole validation split of a source."""
    total = count = 0.0
    for batch in eval_batches(mixture, recipe.data, BATCH, 10**6, source):
        total += float(step(jax.tree.map(lambda x: x[None], batch)))
        count += batch.mask_BT.sum()
    return total / count


if __name__ == "__main__":
    main()
