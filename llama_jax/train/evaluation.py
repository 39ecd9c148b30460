"""Validation losses of a run, and the best of them so far."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from llama_jax.config import Recipe
from llama_jax.data.batch import ShardBatch
from llama_jax.data.mixture import Mixture, eval_batches, val_stats
from llama_jax.train.dpo import METRICS

MEANS = ("loss", "bits_per_byte", "unigram_entropy", *METRICS)
"""Values of a source that the mixture has too, weighted by the sources' weights."""


class Best(NamedTuple):
    """The best validation loss so far: the state of early stopping, saved with each checkpoint."""

    loss: float
    step: int
    since: int = 0
    """later evaluations, none of which was better"""


def update_best(best: Best | None, step: int, loss: float) -> Best:
    """The best loss after one more evaluation."""
    if best is None or loss < best.loss or math.isnan(best.loss):
        return Best(loss, step)
    return best._replace(since=best.since + 1)


class Evaluation:
    """Evaluates the validation split of each source.

    Args:
      recipe: the run.
      mixture: its prepared sources.
      shard_batch: places batches on the mesh.
      eval_step: the jitted function of :func:`llama_jax.train.step.make_eval_step`.

    Example::

      record = Evaluation(recipe, mixture, shard_batch, eval_step)(100, params)
    """

    def __init__(
        self,
        recipe: Recipe,
        mixture: Mixture,
        shard_batch: ShardBatch,
        eval_step: Callable[..., Any],
    ):
        self._recipe, self._mixture = recipe, mixture
        self._shard_batch, self._eval_step = shard_batch, eval_step
        rows, max_batches = shard_batch.microbatch_size, recipe.train.eval_batches
        self._size = rows, max_batches
        names = () if recipe.dpo else mixture.sources  # the loss of pairs is a mean over pairs
        self._val_targets = {
            name: val_stats(mixture, recipe.data, rows, max_batches, name) for name in names
        }

    def __call__(self, step: int, params: Any, *frozen: Any) -> dict[str, Any]:
        """The record of an evaluation: losses of each source, and of the mixture by their weights.

        Args:
          step: number of updates so far.
          params: what is trained.
          frozen: the last argument of the evaluation step, if it has one.
        """
        recipe, sources = self._recipe, self._mixture.sources
        losses = {name: self._source(name, params, *frozen) for name in sources}
        total_weight = sum(s.weight for s in sources.values())
        mean = lambda key: (
            sum(r[key] * sources[name].weight for name, r in losses.items()) / total_weight
        )
        return {
            "kind": "eval",
            "step": step,
            "tokens": step * recipe.tokens_per_step,
            **{key: mean(key) for key in next(iter(losses.values())) if key in MEANS},
            "sources": losses,
        }

    def _source(self, name: str, params: Any, *frozen: Any) -> dict[str, Any]:
        batches = eval_batches(
            self._mixture, self._recipe.data, *self._size, name, self._shard_batch.microbatch_rows
        )
        results = [self._eval_step(params, self._shard_batch(b), *frozen) for b in batches]
        sums = jax.tree.map(lambda *x: float(sum(map(np.float64, x))), *jax.device_get(results))
        if self._recipe.dpo:
            pairs = sums.pop("pairs")
            return {key: total / pairs for key, total in sums.items()} | {"pairs": int(pairs)}
        nll = sums
        targets = self._val_targets[name]
        return {
            "loss": nll / targets.tokens, "bits_per_byte": nll / targets.text_bytes / np.log(2),
            "unigram_entropy": targets.unigram_entropy, "tokens": targets.tokens,
        }  # fmt: skip


def early_stop(best: Best | None, step: int) -> str:
    """Why the run stopped at ``step``."""
    assert best
    return (
        f"stopped early after step {step}, because {best.since} evaluations in a row were not "
        f"better than validation loss {best.loss:.3f} of step {best.step}"
    )
