"""The training loop: trains a recipe, evaluates, logs, and saves checkpoints in the run folder.

The same code runs on a laptop and on a TPU or GPU cluster: the recipe's mesh says how arrays are
sharded over the devices. Starting the same recipe again continues the run.
"""

import contextlib
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from llama_jax import chips
from llama_jax.checkpoint.checkpoints import CheckpointError, Checkpoints
from llama_jax.checkpoint.steps import BEST_STEP, whole_steps
from llama_jax.config import ConfigError, Recipe
from llama_jax.data.batch import Batch, ShardBatch, abstract_batch
from llama_jax.data.mixture import TrainData
from llama_jax.data.tokenizer import Tokenizer
from llama_jax.model.sharding import changed_settings, mesh_for
from llama_jax.train import inputs, metrics, run_folder
from llama_jax.train.benchmarks import Benchmarks, benchmark_lines, open_tasks
from llama_jax.train.distributed import any_process
from llama_jax.train.evaluation import Best, Evaluation, update_best
from llama_jax.train.frozen import has_frozen, load_frozen
from llama_jax.train.initial_state import check_pretrained, initial_state
from llama_jax.train.interrupt import PreemptionHandler
from llama_jax.train.schedule import schedule_change, with_steps
from llama_jax.train.step import (
    TrainState,
    abstract_state,
    check_attention,
    compute_config,
    flops_per_token,
    make_eval_step,
    make_train_step,
)  # fmt: skip


class TrainingError(RuntimeError):
    """The run cannot continue; the message says at which step and why."""


def log(text: str) -> None:
    """Print a line from process 0, above the progress bar."""
    if jax.process_index() == 0:
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()


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
    recipe, mesh = mesh_for(given)
    check_attention(recipe, mesh)
    if changed := changed_settings(given, recipe):
        text = ", ".join(f"{name}={value}" for name, value in changed.items())
        log(f"adapted to {mesh.size} devices, which the recipe's sizes do not divide: {text}")
    peak_flops = chips.peak_flops(jax.local_devices()[0])
    with run_folder.locked(Path(recipe.checkpoint.dir)), jax.set_mesh(mesh):
        trainer = Trainer(recipe, mesh, preemption, peak_flops)
        return trainer if trainer.train() else None


class Trainer:
    """A run in progress: its folder, its data and its state.

    Args:
      recipe: the run, adapted to the mesh.
      mesh: the devices; it must be set (``jax.set_mesh``).
      preemption: the request to stop.
      peak_flops: peak FLOP/s per device, and where this number is from.

    Example::

      with jax.set_mesh(mesh):
        finished = Trainer(recipe, mesh, preemption, chips.peak_flops(jax.devices()[0])).train()
    """

    def __init__(
        self,
        recipe: Recipe,
        mesh: Mesh,
        preemption: PreemptionHandler,
        peak_flops: tuple[float, str],
    ):
        self.given, self.recipe, self.mesh, self.preemption = recipe, recipe, mesh, preemption
        self.peak_flops, self.peak_source = peak_flops
        self.folder = Path(recipe.checkpoint.dir)
        self.platform = mesh.devices.flat[0].platform
        self.compute = compute_config(recipe, self.platform)
        self.evaluated_step = -1
        self.best: Best | None = None
        self.losses: list[float] = []
        """Losses of the steps since the last log line."""
        log(metrics.environment())
        preemption.phase("opening the run folder")
        self.saved = run_folder.open_saved(self.folder, recipe)
        if self.saved and (moved := self.saved.set_aside):
            step = self.saved.restart_from
            log(f"going back to step {step}: newer checkpoints are now in {moved}")
        tasks = open_tasks(recipe)
        try:
            self._open_data()
        except ValueError as e:
            raise ConfigError(str(e)) from e
        self.recipe, line = with_steps(recipe, self.data.sequences_per_epoch)
        self.steps: int = self.recipe.train.steps or 0
        if line:
            log(line)
        self.frozen = self._load_frozen()
        self.checkpoints = Checkpoints(self.folder, recipe.checkpoint.keep)
        self.benchmarks = self._open_benchmarks(tasks) if tasks else None
        self.step, self.state = self._restore() if self.saved else (0, self._initial_state())

    def _open_data(self) -> None:
        recipe, preemption = self.recipe, self.preemption
        if self.saved:
            self.pretrained = None
            preemption.phase("opening the data")
            log(f"data: the shards in {inputs.prepared_folder(recipe)}; the text is not read again")
            self.mixture = inputs.reopen_data(recipe)
            preemption.phase("reading the checkpoint")
        else:
            self.pretrained = inputs.open_pretrained(recipe)
            preemption.phase("preparing data")
            self.mixture = inputs.prepare_data(recipe, self.pretrained)
            preemption.phase("initializing the weights")
        inputs.check_sources(recipe, self.mixture)
        self.tokenizer = Tokenizer.load(self.mixture.tokenizer)
        self.batch_spec = self.compute.rules.activation_without_tensor("BT")
        self.shard_batch = ShardBatch(recipe, self.mesh, self.batch_spec)
        self.data = TrainData(
            self.mixture, recipe.data, recipe.train.batch_size, self.shard_batch.batch_rows
        )
        inputs.check_prompts(recipe, self.tokenizer)

    def _restore(self) -> tuple[int, TrainState]:
        """Step and state of the newest checkpoint."""
        abstract = abstract_state(self.recipe, self.compute, self.mesh)
        params, optimizer, record = self.checkpoints.restore(*abstract)
        try:
            self.data.restore(record["data"])
        except ValueError as e:
            raise ConfigError(str(e)) from e
        self.losses = record.get("losses", [])  # absent in checkpoints of version 0.1
        self.best = Best(*record["best"]) if record.get("best") else None
        if self.recipe.checkpoint.keep_best and not self._has_best():
            self.best = None
        log(f"continuing {self.folder} from step {record['step']}")
        return record["step"], TrainState(params, optimizer)

    def _has_best(self) -> bool:
        """Whether the checkpoint with the best loss exists: not if the setting is new."""
        return self.best is not None and self.best.step in whole_steps(self.folder)

    def _load_frozen(self) -> tuple:
        """The base of LoRA or the reference of DPO, as the last argument of the compiled steps."""
        if not has_frozen(self.recipe):
            return ()
        self.preemption.phase(f"reading {self.recipe.train.init_from}")
        self._check_pretrained()
        if self.saved:
            inputs.check_base(self.recipe)
        return (load_frozen(self.recipe, self.compute, self.mesh),)

    def _open_benchmarks(self, tasks: Any) -> Benchmarks:
        tokenizer = inputs.model_tokenizer(self.recipe, self.mixture, self.pretrained)
        benchmarks = Benchmarks(self.recipe, self.compute, tasks, tokenizer, self.shard_batch)
        log(benchmarks.line())
        return benchmarks

    def _initial_state(self) -> TrainState:
        recipe = self.recipe
        if recipe.train.init_from and not recipe.lora and not self.frozen:
            self._check_pretrained()
        return initial_state(recipe, self.compute, self.mesh)

    def _check_pretrained(self) -> None:
        if note := check_pretrained(self.recipe):
            log(note)

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
        with self._closing():
            if self.step >= steps:  # stopped at the last step, before its evaluations
                self.preemption.phase("evaluating")
                if not self._has_record("eval"):
                    self._evaluate()
                if self.benchmarks and not self._has_record("benchmark"):
                    self._run_benchmarks()
                log(f"done: the last evaluation of {self.folder}")
                return True
            train_step = self._compile()
            self._write_start()
            if self._benchmarks_due() and not self._has_record("benchmark"):
                self.preemption.phase("evaluating")
                self._run_benchmarks()
            self.preemption.phase(f"training {self.folder}", saves=True)
            with tqdm(
                total=steps, initial=self.step, unit="step", disable=None, dynamic_ncols=True
            ) as bar:
                self._loop(train_step, bar)
        self.preemption.phase(f"finishing {self.folder}, which is saved")
        checkpoint = f"{self.folder}/steps/{self.step}"
        if self.evaluated_step == self.step and (self.step == steps or self._stops_early()):
            if self.recipe.checkpoint.keep_best and self.best:
                log(f"best validation loss {self.best.loss:.3f} after step {self.best.step}")
            log(f"done: {checkpoint}; metrics.jsonl and loss.png are in {self.folder}")
            return True
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
            return f"{self._early_stop()}; increase train.early_stopping to continue"
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

    def _early_stop(self) -> str:
        assert self.best
        return (
            f"stopped early after step {self.step}, because {self.best.since} evaluations in a row "
            f"were not better than validation loss {self.best.loss:.3f} of step {self.best.step}"
        )

    @contextlib.contextmanager
    def _closing(self) -> Iterator[None]:
        """Close data, checkpoints and metrics at the end; an error of the block takes precedence
        over errors of closing."""
        title = f"{self.recipe.model.num_params / 1e6:,.1f}M parameters"
        close = [self.data.close, self.checkpoints.close, lambda: self.metrics_log.close(title)]
        try:
            yield
        except BaseException:
            for closes in close:
                with contextlib.suppress(Exception):
                    closes()
            raise
        with contextlib.ExitStack() as stack:
            for closes in reversed(close):
                stack.callback(closes)

    def _compile(self) -> Any:
        self.preemption.phase("compiling")
        start = time.perf_counter()
        step = jax.jit(
            make_train_step(self.recipe, self.compute),
            donate_argnums=0,
            compiler_options=chips.compiler_options(self.platform),
        )
        batch = abstract_batch(self.recipe, self.mesh, self.batch_spec)
        compiled = step.lower(self.state, batch, *self.frozen).compile()
        log(f"compiled the training step in {time.perf_counter() - start:.1f} s")
        return compiled

    def _write_start(self) -> None:
        """Describe the run in its folder, now that all checks have passed."""
        if jax.process_index() != 0:
            return
        if self.saved is None:
            inputs.write_start(self.recipe, self.tokenizer, self.mixture, self.pretrained)
        else:
            for line in run_folder.lines(self.saved.changes):
                log(f"from step {self.step} on, {line}")
            if line := schedule_change(self.saved, self.recipe, self.step, self.data):
                log(line)
        run_folder.record(self.folder, self.given, self.saved, self.step)

    def _loop(self, train_step: Any, bar: tqdm) -> None:
        train, checkpoint = self.recipe.train, self.recipe.checkpoint
        # Both depend on every evaluation, which a continued run would not repeat.
        must_evaluate = checkpoint.keep_best or train.early_stopping
        timer = metrics.StepTimer()
        profiler = metrics.Profiler(train.profile_steps, self.folder)
        unchecked: list[tuple[int, int, dict]] = []
        while self.step < self.steps and not self._stops_early():
            with timer.waiting():
                batch, batch_number = self._next_batch()
            profiler.before(self.step + 1)
            stop_requested = any_process(self.preemption.signal is not None, self.mesh)
            self.state, step_metrics = train_step(self.state, self.shard_batch(batch), *self.frozen)
            self.step += 1
            profiler.after(self.step, step_metrics)
            unchecked.append((self.step, batch_number, step_metrics))
            stop, last = bool(stop_requested), self.step == self.steps
            evaluate = last or (train.eval_every and self.step % train.eval_every == 0)
            benchmarks = self._benchmarks_due()
            save = last or stop or self.step % checkpoint.save_every == 0
            save |= bool(evaluate and must_evaluate)
            check = save or evaluate or benchmarks or self.step % train.log_every == 0
            # Otherwise check the previous step while this one runs, so that the devices never wait
            # for the host.
            while len(unchecked) > (0 if check else 1):
                self._check(*unchecked.pop(0), timer)
            bar.update()
            with timer.paused():
                if evaluate and (must_evaluate or not stop):
                    self._evaluate()
                if benchmarks and not stop:
                    self._run_benchmarks()
            if save:
                # A copy of the losses: Orbax writes the record later, during the next steps.
                record = {
                    "step": self.step, "data": self.data.state(), "seed": train.seed,
                    "losses": list(self.losses), "best": self.best,
                }  # fmt: skip
                if checkpoint.keep_best and self.best:
                    record[BEST_STEP] = self.best.step
                self.checkpoints.save(self.step, *self.state, record)
            if stop:
                break
        profiler.close()
        if self._stops_early():
            log(self._early_stop())

    def _next_batch(self) -> tuple[Batch, int]:
        """The next batch outside ``data.skip_batches``, and its number in the data, from 1."""
        while True:
            batch = next(self.data)
            number = self.data.state()["batches"]
            if not any(a <= number <= b for a, b in self.recipe.data.skip_batches):
                return batch, number

    def _check(
        self, step: int, batch_number: int, step_metrics: dict, timer: metrics.StepTimer
    ) -> None:
        """Check that a step's loss and gradient are finite, and log every ``log_every`` steps.

        Raises:
          TrainingError: they are not. Nothing is saved after that.
        """
        values = {k: float(x) for k, x in jax.device_get(step_metrics).items()}
        loss, grad_norm = values.pop("loss"), values["grad_norm"]
        if not (np.isfinite(loss) and np.isfinite(grad_norm)):
            with contextlib.suppress(CheckpointError):
                self.checkpoints.wait()
            found = f"step {step}: loss {loss}, gradient norm {grad_norm}"
            raise TrainingError(
                run_folder.not_finite(self.folder, self.recipe, found, batch_number)
            )
        self.losses.append(loss)
        recipe = self.recipe
        if step % recipe.train.log_every != 0 and step != self.steps:
            return
        self.checkpoints.poll()
        tokens = recipe.tokens_per_step
        tokens_per_second, data_wait = timer.lap(step, tokens)
        flops = tokens_per_second * flops_per_token(recipe)
        flops_per_device = flops / self.mesh.size
        record = {
            "kind": "train",
            "step": step,
            "tokens": step * tokens,
            "loss": sum(self.losses) / len(self.losses),
            **values,
            "tokens_per_second": tokens_per_second,
            "tflops": flops_per_device / 1e12,
            "mfu": flops_per_device / self.peak_flops,
            "memory_gib": metrics.memory_gib(),
            "data_wait": data_wait,
            "sources": {k: p._asdict() for k, p in self.data.progress().items()},
        }
        self.losses = []
        log(metrics.train_line(record, self.steps))
        self.metrics_log.write(record)

    def _evaluate(self) -> None:
        """Validation loss of each source, and of the mixture by the sources' weights."""
        if not hasattr(self, "_evaluation"):
            step = jax.jit(make_eval_step(self.recipe, self.compute))
            self._evaluation = Evaluation(self.recipe, self.mixture, self.shard_batch, step)
        record = self._evaluation(self.step, self.state.params, *self.frozen)
        for line in metrics.eval_lines(record):
            log(line)
        self.metrics_log.write(record)
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
        self.metrics_log.write(record)
