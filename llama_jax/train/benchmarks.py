"""Benchmarks of lm-evaluation-harness on the weights in training (``train.evaluate``).

Every process runs the same harness on the same data; the devices score the requests together, many
of them in each row of a batch.
"""

import contextlib
import importlib.util
import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np

from llama_jax.config import ConfigError, Recipe
from llama_jax.data.batch import DTYPES, Batch, ShardBatch
from llama_jax.data.packing import first_fit
from llama_jax.data.tokenizer import Tokenizer
from llama_jax.evaluate.paper_task import TaskOptions
from llama_jax.evaluate.report import all_scores, main_metric
from llama_jax.io import save_figure
from llama_jax.model.compute import ComputeConfig
from llama_jax.train.step import make_score_step

if TYPE_CHECKING:
    from llama_jax.evaluate.selection import Selection

Pair = tuple[list[int], list[int]]
"""Token ids of a context and of its continuation."""


class Cost(NamedTuple):
    """What one evaluation computes."""

    requests: int
    tokens: int
    batches: int
    truncated: int
    """prompts longer than the sequence"""


class Benchmarks:
    """The tasks of ``train.evaluate``.

    Args:
      recipe: the run.
      compute: how the model is computed.
      tasks: of :func:`open_tasks`.
      tokenizer: of the model.
      shard_batch: places batches on the mesh.

    Raises:
      ConfigError: the data of a task cannot be used.

    Example::

      record = Benchmarks(recipe, compute, tasks, tokenizer, shard_batch)(100, params)
    """

    def __init__(
        self,
        recipe: Recipe,
        compute: ComputeConfig,
        tasks: "Selection",
        tokenizer: Tokenizer,
        shard_batch: ShardBatch,
    ):
        assert recipe.train.evaluate
        self._recipe, self._settings, self._tasks = recipe, recipe.train.evaluate, tasks
        self._tokenizer, self._shard_batch = tokenizer, shard_batch
        self._score = PackedScorer(recipe, compute, shard_batch)
        try:
            self.cost = self._find_cost()
        except ValueError as e:
            raise ConfigError(f"train.evaluate: {e}") from e

    def due(self, step: int, steps: int) -> bool:
        """Whether there is an evaluation after a step of a run of ``steps``; before the first
        step, only of a trained model."""
        if step == 0:
            return bool(self._recipe.train.init_from)
        return step == steps or step % self._settings.every == 0

    def line(self) -> str:
        """The log line about the cost."""
        cost, settings, recipe = self.cost, self._settings, self._recipe
        steps = cost.batches * self._shard_batch.microbatch_size / recipe.train.batch_size
        truncated = f"; {cost.truncated:,} prompts are truncated from the left"
        return (
            f"benchmarks every {settings.every:,} steps: {cost.requests:,} requests of "
            f"{cost.tokens:,} tokens, as much as {steps:.3g} training steps without their backward "
            f"pass{truncated if cost.truncated else ''}"
        )

    def __call__(self, step: int, params: Any, *frozen: Any) -> dict[str, Any]:
        """The record of an evaluation; the main metric of each task is the first.

        Args:
          step: number of updates so far.
          params: what is trained.
          frozen: the last argument of the training step, if it has one.
        """
        start = time.perf_counter()
        scores, _ = self._run(lambda pairs: self._score(pairs, params, *frozen))
        return {
            "kind": "benchmark",
            "step": step,
            "tokens": step * self._recipe.tokens_per_step,
            "seconds": time.perf_counter() - start,
            "tasks": {
                task: {name: of_task[name]._asdict() for name in _main_first(task, of_task)}
                for task, of_task in scores.items()
            },
        }

    def _run(self, score: Any) -> tuple[dict[str, Any], int]:
        """Scores of all tasks, from a function that scores pairs, and the number of prompts that
        were truncated."""
        from llama_jax.evaluate.harness_model import HarnessModel
        from llama_jax.evaluate.run import quiet, run_tasks

        model = HarnessModel(self._tokenizer, score, self._recipe.data.seq_len)
        with _unchanged_random_state(), quiet():
            results = run_tasks(model, self._tasks, self._settings.limit)
        return all_scores(results), sum(map(len, model.truncated.values()))

    def _find_cost(self) -> Cost:
        """Run the harness without the model, which also shows that tasks and data can be used."""
        found: list[Pair] = []

        def score(pairs: Sequence[Pair]) -> Iterator[tuple[int, float, bool]]:
            found.extend(pairs)
            return ((i, -1.0, False) for i in range(len(pairs)))

        _, truncated = self._run(score)
        tokens = sum(len(a) + len(b) for a, b in found)
        return Cost(len(found), tokens, self._score.num_batches(found), truncated)


class PackedScorer:
    """Scores continuations on the weights in training.

    Batches have the shape [B, T] of a microbatch, with several requests in each row, so that one
    program is compiled.

    Args:
      recipe: the run.
      compute: how the model is computed.
      shard_batch: places batches on the mesh.

    Example::

      scores = list(PackedScorer(recipe, compute, shard_batch)([([1, 5], [7])], params))
    """

    def __init__(self, recipe: Recipe, compute: ComputeConfig, shard_batch: ShardBatch):
        self._step = jax.jit(make_score_step(recipe, compute))
        self._shard_batch, self._seq_len = shard_batch, recipe.data.seq_len

    def num_batches(self, pairs: Sequence[Pair]) -> int:
        """Number of batches that pairs take."""
        rows = 1 + int(_rows(pairs, self._seq_len).max(initial=-1))
        return -(-rows // self._shard_batch.microbatch_size)

    def __call__(
        self, pairs: Sequence[Pair], params: Any, *frozen: Any
    ) -> Iterator[tuple[int, float, bool]]:
        """Index of each pair, log p of its continuation, and whether greedy decoding gives it.

        Args:
          pairs: together at most T + 1 tokens each; the same in every process.
          params: what is trained.
          frozen: the last argument of the training step, if it has one.
        """
        if not pairs:
            return
        rows = _rows(pairs, self._seq_len)
        size, mine = self._shard_batch.microbatch_size, self._shard_batch.microbatch_rows
        order = np.argsort(rows, kind="stable")
        for first in range(0, int(rows.max()) + 1, size):
            chosen = order[slice(*np.searchsorted(rows[order], [first, first + size]))]
            batch, places = self._batch(pairs, chosen, rows - first)
            local = jax.tree.map(lambda a: a[mine], batch)
            out = self._step(params, self._shard_batch(local), *frozen)
            logprobs_BT, greedy_BT = jax.device_get(out)
            for i, row, here in places:
                yield (
                    i,
                    float(np.sum(logprobs_BT[row, here], dtype=np.float64)),
                    bool(greedy_BT[row, here].all()),
                )

    def _batch(
        self, pairs: Sequence[Pair], chosen: np.ndarray, rows: np.ndarray
    ) -> tuple[Batch, list[tuple[int, int, slice]]]:
        """A batch [B, T] of all hosts, and index, row and positions of each continuation in it.

        Args:
          pairs: all pairs.
          chosen: indices of those in the batch, ordered by row.
          rows: the row of each pair, counted from the first row of the batch.
        """
        shape = self._shard_batch.microbatch_size, self._seq_len
        batch = Batch(*(np.zeros(shape, dtype) for dtype in DTYPES))
        used, segments = np.zeros((2, shape[0]), np.int32)
        places = []
        for i in chosen.tolist():
            (context, continuation), row = pairs[i], rows[i]
            ids = np.array([*context, *continuation], np.int32)
            start, end = used[row], used[row] + len(ids) - 1
            segments[row] += 1
            batch.inputs_BT[row, start:end], batch.targets_BT[row, start:end] = ids[:-1], ids[1:]
            batch.segment_ids_BT[row, start:end] = segments[row]
            batch.positions_BT[row, start:end] = np.arange(end - start)
            here = slice(end - len(continuation), end)
            batch.mask_BT[row, here] = 1
            places.append((i, row, here))
            used[row] = end
        for row, start in enumerate(used):  # padding is the last segment
            batch.segment_ids_BT[row, start:] = segments[row] + 1
            batch.positions_BT[row, start:] = np.arange(shape[1] - start)
        return batch, places


def _rows(pairs: Sequence[Pair], seq_len: int) -> np.ndarray:
    """The row of each pair, in sequences of T inputs; the last token is a target only."""
    return first_fit((len(a) + len(b) - 1 for a, b in pairs), seq_len)


def _main_first(task: str, of_task: dict[str, Any]) -> list[str]:
    main = main_metric(task, of_task)
    return sorted(of_task, key=lambda name: name != main)


def open_tasks(recipe: Recipe) -> "Selection | None":
    """The tasks of ``train.evaluate``, with their data.

    Raises:
      ConfigError: lm_eval is not installed, a task is unknown or generates text, or its data is
        missing.
    """
    settings = recipe.train.evaluate
    if settings is None:
        return None
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError("train.evaluate needs lm_eval: pip install 'llama_jax[eval]'")
    from llama_jax.evaluate.run import quiet
    from llama_jax.evaluate.selection import select_tasks

    options = TaskOptions(Path(settings.data) if settings.data else None)
    try:
        with _unchanged_random_state(), quiet():
            tasks = select_tasks(settings.tasks, options)
    except (ValueError, OSError) as e:
        raise ConfigError(f"train.evaluate: {e}") from e
    for name, task in tasks.loaded["tasks"].items():
        if task.OUTPUT_TYPE == "generate_until":
            raise ConfigError(
                f"train.evaluate: the task {name} generates text, which is not possible during "
                "training; name tasks that compare log-likelihoods, or evaluate a checkpoint with "
                "`llama-jax evaluate`"
            )
    if tasks.missing:
        name, reason = next(iter(tasks.missing.items()))
        raise ConfigError(f"train.evaluate: {name}: {reason}")
    return tasks


@contextlib.contextmanager
def _unchanged_random_state() -> Iterator[None]:
    """Restore the random states of Python and NumPy, which the harness seeds."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def benchmark_lines(record: dict[str, Any]) -> list[str]:
    """The log lines of a record: the main metric of each task, and the seconds of all."""
    lines = []
    for task, metrics in record["tasks"].items():
        if not metrics:
            lines.append(f"benchmark/{task} has no value that is finite")
            continue
        name, score = next(iter(metrics.items()))
        error = score["standard_error"]
        error = "" if error is None else f" ± {error:.3f}"
        lines.append(f"benchmark/{task} {name} {score['value']:.3f}{error}, n={score['n']:,}")
    return [*lines, f"benchmarks took {record['seconds']:.1f} s"]


def plot_benchmarks(records: Sequence[dict[str, Any]], path: Path, title: str) -> None:
    """Plot the main metric of each task against tokens, as figure 2 of the paper.

    Args:
      records: of ``metrics.jsonl``.
      path: file to write; its suffix is the format.
      title: title of the plot.
    """
    curves: dict[str, list[tuple[float, float, float]]] = {}
    for record in records:
        if record["kind"] == "benchmark":
            for task, metrics in record["tasks"].items():
                if not metrics:  # none is finite
                    continue
                name, score = next(iter(metrics.items()))
                point = record["tokens"] / 1e6, score["value"], score["standard_error"] or 0
                curves.setdefault(f"{task} {name}", []).append(point)
    if not curves:
        return
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = min(3, len(curves))
    rows = -(-len(curves) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(4 * columns, 0.4 + 2.8 * rows), layout="constrained",
        squeeze=False, sharex=True,
    )  # fmt: skip
    for axis, (name, points) in zip(axes.flat, curves.items(), strict=False):
        axis.errorbar(*np.array(points).T, fmt="o-", ms=4, lw=1, capsize=2)
        axis.set_title(name, fontsize="medium", parse_math=False)
        axis.grid(alpha=0.3)
    for axis in axes.flat[len(curves) :]:
        axis.axis("off")
    figure.supxlabel("million tokens")
    figure.suptitle(title)
    save_figure(figure, path)
    plt.close(figure)
