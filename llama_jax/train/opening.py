"""Opens a run, new or continued: its folder, its data, and its state on the devices."""

from typing import Any

import jax
from jax.sharding import Mesh

from llama_jax.checkpoint.checkpoints import Checkpoints
from llama_jax.checkpoint.steps import whole_steps
from llama_jax.config import ConfigError, Recipe
from llama_jax.data.batch import ShardBatch
from llama_jax.data.mixture import TrainData
from llama_jax.data.tokenizer import Tokenizer
from llama_jax.storage.paths import as_path
from llama_jax.train import agreement, inputs, metrics, run_folder
from llama_jax.train.benchmarks import Benchmarks, open_tasks
from llama_jax.train.clock import Clock
from llama_jax.train.evaluation import Best
from llama_jax.train.frozen import has_frozen, load_frozen
from llama_jax.train.initial_state import check_pretrained, initial_state
from llama_jax.train.interrupt import PreemptionHandler
from llama_jax.train.metrics import log
from llama_jax.train.schedule import schedule_change, with_steps
from llama_jax.train.spikes import Spikes
from llama_jax.train.step import TrainState, abstract_state, compute_config
from llama_jax.train.trackers import check_installed


class OpenRun:
    """A run before its first step: its folder, its data and its state.

    Args:
      recipe: the run, adapted to the mesh.
      mesh: the devices; it must be set (``jax.set_mesh``).
      preemption: the request to stop.
      peak_flops: peak FLOP/s per device, and where this number is from.

    Raises:
      ConfigError: the recipe, the data and the run folder do not fit together.
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
        self.folder = as_path(recipe.checkpoint.dir)
        self.platform = mesh.devices.flat[0].platform
        self.compute = compute_config(recipe, self.platform)
        self.best: Best | None = None
        self.losses: list[float] = []
        """Losses of the steps since the last log line."""
        self.spikes = Spikes(recipe.optim.skip_spikes)
        self.clock = Clock(preemption.started)
        check_installed(recipe.train.trackers)
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
        agreement.check_data(recipe, self.mixture)
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
        with self.clock.measure("restore"):
            params, optimizer, record = self.checkpoints.restore(*abstract)
        try:
            self.data.restore(record["data"])
        except ValueError as e:
            raise ConfigError(str(e)) from e
        self.losses = record.get("losses", [])  # absent in checkpoints of version 0.1
        if "spikes" in record:
            self.spikes.restore(record["spikes"])
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
