"""The training loop: trains a recipe, evaluates, logs, and saves checkpoints in the run folder.

The same code runs on a laptop and on a TPU or GPU cluster: the recipe's mesh says how arrays are
sharded over the devices. Starting the same recipe again continues the run.
"""

import contextlib
import signal
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from llama_jax import chips
from llama_jax.checkpoint.checkpoints import CheckpointError
from llama_jax.checkpoint.steps import BEST_STEP
from llama_jax.config import Recipe
from llama_jax.data.batch import Batch, abstract_batch
from llama_jax.model.sharding import changed_settings, mesh_for
from llama_jax.storage.paths import as_path
from llama_jax.train import agreement, metrics, run_folder, stragglers
from llama_jax.train.benchmarks import benchmark_lines
from llama_jax.train.clock import SaveTimer, goodput_line
from llama_jax.train.distributed import SAVE, STOP, exchange
from llama_jax.train.evaluation import Evaluation, early_stop, update_best
from llama_jax.train.interrupt import PreemptionHandler
from llama_jax.train.metrics import log
from llama_jax.train.opening import OpenRun
from llama_jax.train.remat import check_offload, compile_fitting
from llama_jax.train.step import (
    check_attention,
    compute_config,
    make_eval_step,
    make_train_step,
)  # fmt: skip
from llama_jax.train.trackers import Trackers
from llama_jax.train.watchdog import Watchdog, watch_steps


class TrainingError(RuntimeError):
    """The run cannot continue; the message says at which step and why."""


def run(recipe: Recipe, preemption: PreemptionHandler) -> "Trainer | None":
    """Train to the recipe's last step, from the newest checkpoint of the run folder if it has one.

    Args:
      recipe: the run.
      preemption: the request to stop; the run saves and stops after the current step.

    Returns:
      The finished run; None if it was stopped, or had already finished before.

    Raises:
      ConfigError: the recipe does not fit the devices, the data or the run folder, or another
        process uses the folder.
      TrainingError: the loss or the gradient is not finite.
      CheckpointError: a checkpoint could not be written or read.
    """
    given = recipe
    agreement.check_recipe(recipe)
    recipe, mesh = mesh_for(given)
    check_attention(recipe, mesh)
    check_offload(recipe, mesh)
    if changed := changed_settings(given, recipe):
        text = ", ".join(f"{name}={value}" for name, value in changed.items())
        log(f"adapted to {mesh.size} devices, which the recipe's sizes do not divide: {text}")
    peak_flops = chips.peak_flops(jax.local_devices()[0])
    with run_folder.locked(as_path(recipe.checkpoint.dir)), jax.set_mesh(mesh):
        trainer = Trainer(recipe, mesh, preemption, peak_flops)
        return trainer if trainer.train() else None


class Trainer(OpenRun):
    """A run in progress.

    Example::

      with jax.set_mesh(mesh):
        finished = Trainer(recipe, mesh, preemption, chips.peak_flops(jax.devices()[0])).train()
    """

    evaluated_step = -1
    """The step of the last evaluation of this start."""

    def train(self) -> bool:
        """Train to the last step; True if this call reached it and finished the evaluation."""
        steps = self.steps
        peak = self.peak_flops, self.peak_source
        for line in metrics.settings_lines(
            self.recipe, self.compute, self.mesh, peak, self.mixture.sources
        ):
            log(line)
        if finished := self._finished():
            log(f"{self.folder} is finished: {finished}")
            self.data.close()
            self.checkpoints.close()
            return False
        self.metrics_log = metrics.MetricsLog(self.folder, self.step if self.saved else -1)
        self.clock.restore(*self.metrics_log.goodput)
        self.trackers = Trackers(self.recipe, self.folder)
        with self._closing():
            if self.step >= steps:  # stopped at the last step, before its evaluations
                self.preemption.phase("evaluating")
                if not self._has_record("eval"):
                    self._evaluate()
                if self.benchmarks and not self._has_record("benchmark"):
                    self._run_benchmarks()
                self.trackers.finished()
                log(f"done: the last evaluation of {self.folder}")
                return True
            train_step = self._compile()
            self._write_start()
            if self._benchmarks_due() and not self._has_record("benchmark"):
                self.preemption.phase("evaluating")
                self._run_benchmarks()
            self.preemption.phase(f"training {self.folder}", saves=True)
            steps_bar = dict(total=steps, initial=self.step, unit="step", dynamic_ncols=True)
            with tqdm(**steps_bar, disable=None) as bar, watch_steps(self.recipe) as watchdog:
                self._loop(train_step, bar, watchdog)
            with self.clock.measure("checkpoint"):
                self.checkpoints.wait()
            totals = self.clock.totals()
            self._record({"kind": "goodput", "step": self.step, "goodput": totals})
            log(goodput_line(totals))
        self.preemption.phase(f"finishing {self.folder}, which is saved")
        checkpoint = f"{self.folder}/steps/{self.step}"
        if self.evaluated_step == self.step and (self.step == steps or self._stops_early()):
            if self.recipe.checkpoint.keep_best and self.best:
                log(f"best validation loss {self.best.loss:.3f} after step {self.best.step}")
            self.trackers.finished()
            log(f"done: {checkpoint}; metrics.jsonl and loss.png are in {self.folder}")
            return True
        self.trackers.close()
        self.preemption.stopped = True
        number = self.preemption.signal
        name = signal.Signals(number).name if number else "another process"
        log(
            f"stopped by {name} after step {self.step}: saved {checkpoint}; run the same command "
            "again to continue"
        )
        return False

    def release(self) -> None:
        """Free the arrays on the devices, after training."""
        for x in jax.tree.leaves((self.state, self.frozen)):
            x.delete()

    def _finished(self) -> str:
        """Why the run is finished, and how to continue; "" if a step or its last evaluation is left
        to do."""
        if self._stops_early():
            return f"{early_stop(self.best, self.step)}; increase train.early_stopping to continue"
        kinds = ("eval", "benchmark") if self.benchmarks else ("eval",)
        if self.step < self.steps or not all(map(self._has_record, kinds)):
            return ""
        setting = "train.epochs" if self.given.train.epochs else "train.steps"
        return f"{self.step} steps; increase {setting} to continue"

    def _has_record(self, kind: str) -> bool:
        records = metrics.read_records(self.folder / "metrics.jsonl")
        return any(r["kind"] == kind and r["step"] == self.step for r in records)

    def _stops_early(self) -> bool:
        patience = self.recipe.train.early_stopping
        return bool(patience) and self.best is not None and self.best.since >= patience

    @contextlib.contextmanager
    def _closing(self) -> Iterator[None]:
        """Close data, checkpoints and metrics at the end; an error of the block takes precedence
        over errors of closing."""
        title = f"{self.recipe.model.num_params / 1e6:,.1f}M parameters"
        close = [
            self.data.close,
            self.checkpoints.close,
            lambda: self.metrics_log.close(title),
            lambda: self.trackers.picture(self.folder / "loss.png"),
        ]
        try:
            yield
        except BaseException:
            for closes in [*close, self.trackers.close]:
                with contextlib.suppress(Exception):
                    closes()
            raise
        with contextlib.ExitStack() as stack:
            for closes in reversed(close):
                stack.callback(closes)

    def _compile(self) -> Any:
        self.preemption.phase("compiling")
        start = time.perf_counter()
        batch = abstract_batch(self.recipe, self.mesh, self.batch_spec)
        limit, options = self.spikes.arguments(1), chips.compiler_options(self.platform)

        def compile_(recipe: Recipe) -> Any:
            step = make_train_step(recipe, compute_config(recipe, self.platform))
            step = jax.jit(step, donate_argnums=0, compiler_options=options)
            return step.lower(self.state, batch, *self.frozen, **limit).compile()

        with self.clock.measure("compile"):
            compiled = compile_fitting(self.recipe, self.mesh, self.state, self.frozen, compile_)
        log(f"compiled the training step in {time.perf_counter() - start:.1f} s")
        return compiled

    def _loop(self, train_step: Any, bar: tqdm, watchdog: Watchdog) -> None:
        train, checkpoint = self.recipe.train, self.recipe.checkpoint
        # Both depend on every evaluation, which a continued run would not repeat.
        must_evaluate = checkpoint.keep_best or train.early_stopping
        saves = SaveTimer(checkpoint.save_every)
        self.clock.begin()
        self.host = stragglers.HostTime(self.clock, self.step)
        profiler = metrics.Profiler(train.profile_steps, self.folder)
        unchecked: list[tuple[int, int, dict]] = []
        while self.step < self.steps and not self._stops_early():
            with self.clock.measure("data"):
                batch, batch_number = self._next_batch()
            profiler.before(self.step + 1)
            request = STOP if self.preemption.signal else SAVE if saves.time_is_up() else 0
            host_seconds = self.host.per_step(self.step + 1, (self.step + 1) % train.log_every == 0)
            with self.host.waiting():
                agreed, self.host_seconds = exchange(request, host_seconds, self.mesh)
                self.step += 1
                arguments = self.state, self.shard_batch(batch), *self.frozen
                limit = self.spikes.arguments(self.step)
                self.state, step_metrics = train_step(*arguments, **limit)
                profiler.after(self.step, step_metrics)
                unchecked.append((self.step, batch_number, step_metrics))
                agreed = int(agreed)
            stop, last = agreed == STOP, self.step == self.steps
            evaluate = last or (train.eval_every and self.step % train.eval_every == 0)
            benchmarks = self._benchmarks_due()
            save = last or agreed > 0 or saves.at(self.step) or bool(evaluate and must_evaluate)
            check = save or evaluate or benchmarks or self.step % train.log_every == 0
            # Otherwise check the previous step while this one runs, so that the devices never wait
            # for the host.
            while len(unchecked) > (0 if check else 1):
                self._check(*unchecked.pop(0))
                watchdog.step_finished(self.step)
            bar.update()
            with self.clock.measure("evaluation"), watchdog.paused():
                if evaluate and (must_evaluate or not stop):
                    self._evaluate()
                if benchmarks and not stop:
                    self._run_benchmarks()
            if save:
                # A copy of the losses: Orbax writes the record later, during the next steps.
                record = {
                    "step": self.step, "data": self.data.state(), "seed": train.seed,
                    "losses": list(self.losses), "spikes": self.spikes.state(),
                    "best": self.best,
                }  # fmt: skip
                if checkpoint.keep_best and self.best:
                    record[BEST_STEP] = self.best.step
                with self.clock.measure("checkpoint"), watchdog.paused():
                    self.metrics_log.upload()
                    self.checkpoints.save(self.step, *self.state, record)
                saves.saved()
            if stop:
                break
        profiler.close()
        if self._stops_early():
            log(early_stop(self.best, self.step))

    def _next_batch(self) -> tuple[Batch, int]:
        """The next batch outside ``data.skip_batches``, and its number in the data, from 1."""
        while True:
            batch = next(self.data)
            number = self.data.state()["batches"]
            if not any(a <= number <= b for a, b in self.recipe.data.skip_batches):
                return batch, number

    def _check(self, step: int, batch_number: int, step_metrics: dict) -> None:
        """Check that a step's loss and gradient are finite, and log every ``log_every`` steps.

        Raises:
          TrainingError: they are not. Nothing is saved after that.
        """
        with self.host.waiting():
            values = {k: float(x) for k, x in jax.device_get(step_metrics).items()}
        loss, grad_norm = values.pop("loss"), values["grad_norm"]
        if not (np.isfinite(loss) and np.isfinite(grad_norm)):
            with contextlib.suppress(CheckpointError):
                self.checkpoints.wait()
            found = f"step {step}: loss {loss}, gradient norm {grad_norm}"
            raise TrainingError(
                run_folder.not_finite(self.folder, self.recipe, found, batch_number)
            )
        if skipped := bool(values.pop("skipped", 0)):
            log(f"step {step}: skipped, the gradient norm {grad_norm:.3g} is over the limit")
        self.spikes.add(step, grad_norm, skipped)
        self.losses.append(loss)
        if step % self.recipe.train.log_every != 0 and step != self.steps:
            return
        self.checkpoints.poll()
        values |= {"loss": sum(self.losses) / len(self.losses)}
        if self.spikes.multiple:
            values["skipped_steps"] = self.spikes.count
        speed = self.clock.lap(step, self.recipe.tokens_per_step)
        peak = self.peak_flops, self.mesh.size
        record = metrics.train_record(self.recipe, step, values, speed, peak)
        record["sources"] = {k: p._asdict() for k, p in self.data.progress().items()}
        record["goodput"] = self.clock.totals()
        self.losses = []
        log(metrics.train_line(record, self.steps))
        if self.host_seconds is not None:
            record["slowest"] = stragglers.slowest(self.host_seconds, self.mesh)
            step_seconds = self.recipe.tokens_per_step / speed[0]
            if line := stragglers.line(record["slowest"], step, step_seconds):
                log(line)
        self._record(record)

    def _record(self, record: metrics.Record) -> None:
        self.metrics_log.write(record)
        values = {f"{record['kind']}/{key}": value for key, value in metrics.flatten(record)}
        self.trackers.metrics(record["step"], values)

    def _evaluate(self) -> None:
        """Validation loss of each source, and of the mixture by the sources' weights."""
        if not hasattr(self, "_evaluation"):
            step = jax.jit(make_eval_step(self.recipe, self.compute))
            self._evaluation = Evaluation(self.recipe, self.mixture, self.shard_batch, step)
        record = self._evaluation(self.step, self.state.params, *self.frozen)
        for line in metrics.eval_lines(record):
            log(line)
        self._record(record)
        self.evaluated_step = self.step
        self.best = update_best(self.best, self.step, record["loss"])

    def _benchmarks_due(self) -> bool:
        return self.benchmarks is not None and self.benchmarks.due(self.step, self.steps)

    def _run_benchmarks(self) -> None:
        assert self.benchmarks
        try:
            record = self.benchmarks(self.step, self.state.params, *self.frozen)
        except ValueError as e:
            raise TrainingError(f"step {self.step}: train.evaluate: {e}") from e
        for line in benchmark_lines(record):
            log(line)
        self._record(record)
