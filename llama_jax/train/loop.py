"""Pretrain and fine-tune: a recipe in, a run folder with checkpoints, metrics and a picture out.

    python -m llama_jax.train [RECIPE.toml] [section.key=value ...]

The same code runs on a laptop and on a pod: the recipe's mesh says how arrays lie over the
devices, and a job of several hosts is started by what starts such jobs (see the README).
Starting the same recipe again continues the run.
"""

import argparse
import contextlib
import dataclasses
import functools
import shutil
import signal
import sys
import textwrap
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from tqdm import tqdm

from llama_jax import chips
from llama_jax.checkpoint.checkpoints import CheckpointError, Checkpoints
from llama_jax.checkpoint.file_hashes import record_files
from llama_jax.checkpoint.model_json import read_metadata, write_model_files
from llama_jax.checkpoint.weights import check_weights, load_weights, whole_steps
from llama_jax.config import (
    ConfigError,
    DataConfig,
    Recipe,
    SettingsHelp,
    load_recipe,
    recipe_names,
    recipes_folder,
    to_dict,
)
from llama_jax.data.batch import Batch, ShardBatch, abstract_batch
from llama_jax.data.mixture import TrainData, eval_batches, held_out, open_mixture
from llama_jax.data.tokenizer import Tokenizer
from llama_jax.io import atomic_write, folder_lock, sha256
from llama_jax.model.llama import ComputeConfig
from llama_jax.model.sharding import AXES, changed_settings, mesh_for
from llama_jax.prepare.mixture import prepare_mixture
from llama_jax.train import failure, interrupt, run_folder
from llama_jax.train import metrics as report
from llama_jax.train.distributed import start_distributed
from llama_jax.train.interrupt import PreemptionHandler
from llama_jax.train.optim import make_schedule
from llama_jax.train.step import (
    TrainState,
    abstract_state,
    check_attention,
    execution,
    init_state,
    make_eval_step,
    make_train_step,
)  # fmt: skip

# What a checkpoint of a chat model has beside its weights, tokenizer.model and model.json.
CHAT_FILES = (
    "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json",
    "added_tokens.json", "generation_config.json",
)  # fmt: skip


class TrainingError(RuntimeError):
    """A run that cannot go on; the message says at which step and why."""


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code: 0 done, or stopped by SIGTERM after saving; 1 the run
    failed; 2 the recipe is wrong; 130 Ctrl-C."""
    arguments = _parser().parse_args(argv)
    given = list(arguments.arguments)
    is_recipe = bool(given) and ("=" not in given[0] or Path(given[0]).is_file())
    path = given.pop(0) if is_recipe else recipes_folder() / "tiny.toml"
    with interrupt.listening() as stop, _quiet_threads():
        try:
            recipe = load_recipe(path, given)
            start_distributed()
            stop.install()  # jax.distributed takes SIGTERM
            if failure.several():
                stop.before_end = failure.end_all
            failure.watch()
            run(recipe, stop)
        except KeyboardInterrupt:
            return 128 + (stop.signal or signal.SIGINT)
        except ConfigError as e:
            return _fail(str(e), 2)
        except (TrainingError, CheckpointError, OSError) as e:
            return _fail(str(e), 1)
        except Exception as e:
            text = (str(e).strip() or type(e).__name__).splitlines()[0]
            if "RESOURCE_EXHAUSTED" in text:
                return _fail(
                    f"out of memory while {stop.doing}: {text:.300}\nlower train.batch_size, or "
                    'raise train.gradient_accumulation, or set train.remat="full"',
                    1,
                )
            if not failure.several():
                raise
            traceback.print_exc()
            return _fail(f"{type(e).__name__}: {text}", 1)
        finally:
            failure.stop_watching()
    return 128 + signal.SIGINT if stop.signal == signal.SIGINT else 0


@contextlib.contextmanager
def _quiet_threads() -> Iterator[None]:
    """A full disk ends the writing threads of libraries too; the main thread reports it, once."""
    before = threading.excepthook
    threading.excepthook = lambda e: None if isinstance(e.exc_value, OSError) else before(e)
    try:
        yield
    finally:
        threading.excepthook = before


def _fail(error: str, code: int) -> int:
    if failure.several():
        failure.end_all(error, code)
    print(f"error: {error}", file=sys.stderr)
    return code


def run(recipe: Recipe, stop: PreemptionHandler) -> None:
    """Train from nothing, or from the newest checkpoint of the run folder, to the recipe's last
    step.

    Raises:
      ConfigError: the recipe does not fit the devices, the data or the run folder, or another
        process uses the folder.
      TrainingError: the loss or the gradient stopped being a number.
      CheckpointError: a checkpoint could not be written or read.
    """
    given = recipe
    recipe, mesh = mesh_for(given)
    check_attention(recipe, mesh)
    if (changed := changed_settings(given, recipe)) and jax.process_index() == 0:
        text = ", ".join(f"{name}={value}" for name, value in changed.items())
        print(f"adapted to {mesh.size} devices, which the recipe's sizes do not divide: {text}")
    peak = chips.peak_flops(jax.local_devices()[0])
    with _owned(Path(recipe.checkpoint.dir)):
        with jax.set_mesh(mesh):
            training = Run(recipe, mesh, stop, peak)
            finished = training.train()
        if finished:
            training.sample()  # on one device, where no mesh may be set


@contextlib.contextmanager
def _owned(folder: Path) -> Iterator[None]:
    """Hold the run folder for this job: process 0 has its lock until the block ends.

    Other processes go on only when process 0 has it. A folder that was made here and got no content
    is removed again.
    """
    if jax.process_index() != 0:
        _barrier("locked")
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(folder_lock(folder, "training"))
            except ValueError as e:
                raise ConfigError(str(e)) from None
            _barrier("locked")
            try:
                yield
            finally:
                if [p.name for p in folder.iterdir()] == [".lock"]:
                    shutil.rmtree(folder, ignore_errors=True)
    except OSError as e:
        if e.errno is not None and e.filename is None:
            e.filename = str(folder)
        raise


class Run:
    """A run under way: its folder, its data, its state."""

    def __init__(
        self, recipe: Recipe, mesh: Mesh, stop: PreemptionHandler, peak: tuple[float, str]
    ):
        self.recipe, self.mesh, self.stop = recipe, mesh, stop
        self.peak, self.peak_source = peak
        self.evaluated = -1  # the step of the last evaluation
        self.platform = mesh.devices.flat[0].platform
        self.compute = execution(recipe, self.platform)
        self.folder = Path(recipe.checkpoint.dir)
        self.first = jax.process_index() == 0
        self.say(f"{report.environment()}")
        stop.phase("opening the run folder")
        self._open_folder()
        try:
            self._open_init_from()
            stop.phase("preparing data")
            self._open_data()
            stop.phase("reading the checkpoint" if self.saved else "making the weights")
            self._check_prompts()
        except ValueError as e:
            raise ConfigError(str(e)) from e
        self.checkpoints = Checkpoints(self.folder, recipe.checkpoint.keep)
        self.step, self.state = self._start()

    def say(self, text: str) -> None:
        """A line on the terminal, from the first process."""
        if jax.process_index() == 0:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def _open_folder(self) -> None:
        """Find out whether this run continues one, and move what it goes back over out of the
        way."""
        self.saved = run_folder.read_saved(self.folder, self.recipe)
        _barrier("folder read")
        if self.saved and (step := self.saved.restart_from):
            if self.first and (aside := run_folder.set_aside(self.folder, step)):
                self.say(f"going back to step {step}: newer checkpoints are now in {aside}")
            _barrier("set aside")

    def _open_init_from(self) -> None:
        """Check what a new run starts from: its model, and its tokenizer against the recipe's."""
        self.init_metadata: dict[str, Any] = {}
        self.keeps_tokenizer = False
        folder, data = self.recipe.train.init_from, self.recipe.data
        if self.saved or not folder:
            return
        cfg, self.init_metadata = read_metadata(folder)
        if kind := self.init_metadata.get("quantize"):
            raise ConfigError(
                f"train.init_from={folder} holds {kind} matrices, which are for sampling; give the "
                "weights that it was made of"
            )
        if changes := run_folder.differences(to_dict(cfg), to_dict(self.recipe.model)):
            raise ConfigError(
                f"train.init_from={folder} is another model:\n  "
                + "\n  ".join(run_folder.lines(changes))
            )
        own = Tokenizer.load(folder)
        given = Tokenizer.load(data.tokenizer) if data.tokenizer else own
        self.keeps_tokenizer = sha256(given.path) == sha256(own.path)
        if not self.keeps_tokenizer and not self.recipe.train.allow_other_tokenizer:
            raise ConfigError(
                f"data.tokenizer={data.tokenizer} is not the tokenizer of train.init_from={folder} "
                f"({own.path}), so the model's embeddings would stand for other text; leave "
                "data.tokenizer out, or set train.allow_other_tokenizer=true if this is intended"
            )

    def _data_config(self) -> DataConfig:
        """The recipe's data, with the tokenizer of the checkpoint that the run starts from."""
        data = self.recipe.data
        if self.keeps_tokenizer:
            return dataclasses.replace(data, tokenizer=self.recipe.train.init_from)
        return data

    def _open_data(self) -> None:
        """Prepare what a new run needs, or open what a run that continues was made with; ValueError
        says what is wrong with it."""
        data = self.recipe.data
        prepared = Path(data.prepared or self.folder / "data")
        if self.saved is None:
            if self.first:
                prepare_mixture(self._data_config(), self.recipe.model.vocab_size, prepared)
            _barrier("prepared")
            self.mixture = open_mixture(prepared)
        else:
            # Never prepared again: text that changed since would replace what the model was
            # trained with. Folders made by `prepare` may have moved; their content is compared.
            self.say(f"data: the shards in {prepared}; the text is not read again")
            paths = {name: Path(source.path) for name, source in data.sources.items()}
            moved = {n: p.resolve() for n, p in paths.items() if (p / "manifest.json").is_file()}
            self.mixture = open_mixture(prepared, moved)
            self._check_tokenizer()
        self.tokenizer = Tokenizer.load(self.mixture.tokenizer)
        self.spec = self.compute.rules.activation_without_tensor("BT")
        self.shard_batch = ShardBatch(self.recipe, self.mesh, self.spec)
        batch_size = self.recipe.train.batch_size
        self.data = TrainData(self.mixture, data, batch_size, self.shard_batch.batch_rows)

    def _check_tokenizer(self) -> None:
        """The tokenizer of a run that continues is the one saved with its weights."""
        saved, used = self.folder / "tokenizer.model", self.mixture.tokenizer
        if sha256(used) != sha256(saved):
            raise ConfigError(
                f"{used} is not the tokenizer that this run was trained with, {saved}; the shards "
                "were prepared again: bring the old ones back, or take another checkpoint.dir"
            )
        given = Path(self.recipe.data.tokenizer)
        if given.is_file() and sha256(given) != sha256(saved):
            raise ConfigError(
                f"data.tokenizer={given} is not the tokenizer of this run, {saved}; leave it as it "
                "was, or take another checkpoint.dir"
            )

    def _check_prompts(self) -> None:
        """Prompts that leave no place for an answer are found before training."""
        bos = self.tokenizer.bos_id is not None
        for i, prompt in enumerate(self.recipe.train.sample_prompts):
            count = len(self.tokenizer.encode(prompt, bos=bos))
            if not 0 < count < self.recipe.model.context:
                raise ConfigError(
                    f"train.sample_prompts: prompt {i + 1} has {count} tokens; it must have from 1 "
                    f"to {self.recipe.model.context - 1}, one less than model.context"
                )

    def _save_start(self) -> None:
        """Write what describes the run, when all checks have passed: model.json and tokenizer of a
        new one, changed settings of one that continues."""
        if not self.first:
            return
        if self.saved is None:
            tokenizer, folder = self.tokenizer, Path(self.recipe.train.init_from)
            ids: dict[str, Any] = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id}
            ids = {k: v for k, v in ids.items() if v is not None}
            if self.keeps_tokenizer:
                ids = self.init_metadata.get("token_ids", ids)
                for name in CHAT_FILES:
                    if (folder / name).is_file():
                        atomic_write(self.folder / name, (folder / name).read_bytes())
                        record_files(self.folder, name)
            write_model_files(self.folder, self.recipe.model, self.mixture.tokenizer, ids)
        else:
            for line in run_folder.lines(self.saved.changes):
                self.say(f"from step {self.step} on, {line}")
            if {"train.steps", "optim.peak_lr"} & self.saved.changes.keys():
                was, now = (
                    float(make_schedule(r.optim, r.train.steps)(self.step))
                    for r in (self.saved.recipe, self.recipe)
                )
                self.say(
                    f"the learning rate follows the schedule of all {self.recipe.train.steps} "
                    f"steps: {now:.2e} after step {self.step}, {was:.2e} by the old settings"
                )
        run_folder.record(self.folder, self.recipe, self.saved, self.step)

    def _start(self) -> tuple[int, TrainState]:
        """The newest checkpoint, or fresh weights."""
        abstract = abstract_state(self.recipe, self.compute, self.mesh)
        if self.checkpoints.latest() is not None:
            params, optimizer, record = self.checkpoints.restore(*abstract)
            try:
                self.data.restore(record["data"])
            except ValueError as e:
                raise ConfigError(str(e)) from e
            self.say(f"continuing {self.folder} from step {record['step']}")
            return record["step"], TrainState(params, optimizer)
        shardings = jax.tree.map(lambda x: x.sharding, abstract)
        state = jax.jit(
            functools.partial(init_state, self.recipe, self.compute), out_shardings=shardings
        )()
        if self.recipe.train.init_from:
            check_weights(self.recipe.train.init_from)
            state = state._replace(
                params=load_weights(self.recipe.train.init_from, abstract.params)
            )
        return 0, state

    def train(self) -> bool:
        """Train to the last step, evaluating and saving on the way; True when that is reached
        now."""
        steps = self.recipe.train.steps
        self._say_what_runs()
        if self._is_finished():
            self.say(
                f"{self.folder} is finished: {self.step} steps; nothing to do (with more "
                "train.steps it continues)"
            )
            self.data.close()
            self.checkpoints.close()
            return False
        self.report = report.Report(self.folder, self.step, self.say)
        with self._closing():
            if self.step >= steps:
                return self._finish_evaluation()
            compiled = self._compile()
            self._save_start()
            self.stop.phase(f"training {self.folder}", saves=True)
            with tqdm(
                total=steps, initial=self.step, unit="step", disable=None, dynamic_ncols=True
            ) as bar:
                self._loop(compiled, bar)
        self.stop.phase(f"finishing {self.folder}, which is saved")
        where = f"{self.folder}/steps/{self.step}"
        if self.evaluated == steps:
            self.say(f"done: {where}, {self.folder}/metrics.jsonl, {self.folder}/loss.png")
            return True
        name = signal.Signals(self.stop.signal).name if self.stop.signal else "another process"
        self.say(
            f"stopped by {name} after step {self.step}: saved {where}; start the same recipe "
            "again to continue"
        )
        return False

    def _is_finished(self) -> bool:
        """Whether all steps are done, and the evaluation after the last."""
        records = report.read_records(self.folder / "metrics.jsonl")
        evaluated = any(r["kind"] == "eval" and r["step"] == self.step for r in records)
        return self.step >= self.recipe.train.steps and evaluated

    def _finish_evaluation(self) -> bool:
        """Of a run that was asked to stop at its last step: the evaluation after it."""
        self.stop.phase("evaluating")
        self._evaluate()
        self.say(f"done: the last evaluation of {self.folder}")
        return True

    @contextlib.contextmanager
    def _closing(self) -> Iterator[None]:
        """Close data, checkpoints and report at the end; an error of the block is the one raised,
        whatever closing says."""
        close = [
            self.data.close,
            self.checkpoints.close,
            lambda: self.report.close(f"{self.recipe.model.num_params / 1e6:,.1f}M parameters"),
        ]
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

    def _say_what_runs(self) -> None:
        model, train = self.recipe.model, self.recipe.train
        devices = jax.devices()
        sizes = " x ".join(f"{a}={n}" for a, n in self.mesh.shape.items())
        tokens = train.batch_size * self.recipe.data.seq_len
        self.say(
            f"{len(devices)} x {devices[0].device_kind} in {jax.process_count()} process(es), "
            f"mesh {sizes} ({self.recipe.mesh.preset}), "
            f"peak {self.peak / 1e12:.3g} TFLOP/s each ({self.peak_source})\n"
            f"model: {model.num_params:,} parameters, {self.compute.dtype} compute | "
            f"{train.steps:,} steps of {tokens:,} tokens "
            f"= {train.steps * tokens / 1e6:,.1f}M"
        )
        for name, part in self.mixture.sources.items():
            tokens, held = (part.manifest["splits"][k]["tokens"] for k in ("train", "holdout"))
            self.say(f"source {name}: weight {part.weight}, {tokens:,} tokens, {held:,} held out")

    def _compile(self) -> Any:
        self.stop.phase("compiling")
        start = time.perf_counter()
        batch = abstract_batch(self.recipe, self.mesh, self.spec)
        step = jax.jit(
            make_train_step(self.recipe, self.compute),
            donate_argnums=0,
            compiler_options=chips.compiler_options(self.platform),
        )
        compiled = step.lower(self.state, batch, self._stop_flags()).compile()
        self.say(f"compiled the step in {time.perf_counter() - start:.1f} s")
        return compiled

    def _stop_flags(self) -> jax.Array:
        """A flag per device, so that any process can ask all of them to stop."""
        stop = np.full(1, self.stop.signal is not None, np.int32)
        flags = NamedSharding(self.mesh, P(AXES))
        return jax.make_array_from_callback((self.mesh.size,), flags, lambda _: stop)

    def _loop(self, compiled: Any, bar: tqdm) -> None:
        train, every = self.recipe.train, self.recipe.checkpoint.save_every
        clock = report.Clock()
        pending: list[tuple[int, dict]] = []
        profiler = report.Profiler(train.profile_steps, self.folder)
        while self.step < train.steps:
            with clock.waiting():
                batch, number = self._next_batch()
            profiler.before(self.step + 1)
            self.state, metrics = compiled(self.state, self.shard_batch(batch), self._stop_flags())
            self.step += 1
            profiler.after(self.step, metrics)
            pending.append((self.step, metrics | {"batch": number}))
            last = self.step == train.steps
            evaluate = last or (train.eval_every and self.step % train.eval_every == 0)
            settle = last or evaluate or self.step % every == 0 or self.step % train.log_every == 0
            # The step before is looked at while this one runs, so that the devices never wait for
            # the host.
            stop = False
            while len(pending) > (0 if settle else 1):
                stop |= self._check(*pending.pop(0), clock)
            bar.update()
            if stop and not settle:
                while pending:
                    self._check(*pending.pop(0), clock)
            if evaluate and not stop:
                with clock.paused():
                    self._evaluate()
            if last or stop or self.step % every == 0:
                record = {"step": self.step, "data": self.data.state(), "seed": train.seed}
                self.checkpoints.save(self.step, *self.state, record)
            if stop:
                break
        profiler.close()

    def _next_batch(self) -> tuple[Batch, int]:
        """The next batch that is not skipped, and its number in the order of the data, from 1."""
        while True:
            batch = next(self.data)
            number = self.data.state()["batches"]
            if not any(a <= number <= b for a, b in self.recipe.data.skip_batches):
                return batch, number

    def _check(self, step: int, metrics: dict, clock: report.Clock) -> bool:
        """Look at a finished step; True when a process asks to stop.

        Raises:
          TrainingError: its loss or gradient is not finite. Nothing is saved after that.
        """
        loss, grad_norm, rate, stop = (
            float(x)
            for x in jax.device_get(
                [metrics[k] for k in ("loss", "grad_norm", "learning_rate", "stop")]
            )
        )
        if not (np.isfinite(loss) and np.isfinite(grad_norm)):
            raise TrainingError(self._not_finite(step, metrics["batch"], loss, grad_norm))
        if step % self.recipe.train.log_every == 0 or step == self.recipe.train.steps:
            self.checkpoints.poll()
            recipe = self.recipe
            tokens = recipe.train.batch_size * recipe.data.seq_len
            per_second, wait = clock.lap(step, tokens)
            flops = per_second * recipe.model.flops_per_token(recipe.data.seq_len) / self.mesh.size
            record = {
                "kind": "train",
                "step": step,
                "tokens": step * tokens,
                "loss": loss,
                "grad_norm": grad_norm,
                "learning_rate": rate,
                "tokens_per_second": per_second,
                "tflops": flops / 1e12,
                "mfu": flops / self.peak,
                "memory_gib": report.memory_gib(),
                "data_wait": wait,
                "sources": {k: p._asdict() for k, p in self.data.progress().items()},
            }
            self.say(report.line(record, recipe.train.steps))
            self.report.write(record)
        return stop > 0

    def _not_finite(self, step: int, batch: int, loss: float, grad_norm: float) -> str:
        """What happened, and what can be done about it with the same command."""
        text = f"step {step}: loss {loss}, gradient norm {grad_norm} (batch {batch} of the data); "
        text += "stopped, nothing saved after it; "
        with contextlib.suppress(CheckpointError):
            self.checkpoints.wait()
        kept = whole_steps(self.folder)
        if not kept:
            text += f"{self.folder} has no checkpoint yet.\nStart again with"
        else:
            text += f"checkpoints in {self.folder}: {', '.join(map(str, kept))}.\n"
            text += f"The same command goes on from step {kept[-1]}; add to it"
        rate = self.recipe.optim.peak_lr / 2
        text += f"\n  optim.peak_lr={rate:.1e} for a lower learning rate (or a longer warm-up)"
        # With those left out before, which the setting would otherwise bring back.
        skip = [list(r) for r in (*self.recipe.data.skip_batches, (batch, batch))]
        skipped = str(skip).replace(" ", "")
        text += f"\n  data.skip_batches={skipped} to leave out batches, first to last"
        if kept[:-1]:
            text += f"\n  train.restart_from={kept[-2]} to go back to an older checkpoint"
        return text

    def _evaluate(self) -> None:
        """Held-out loss of each source, and of the mixture by the sources' weights."""
        recipe, rows = self.recipe, self.shard_batch.microbatch_size
        if not hasattr(self, "_eval_step"):
            self._eval_step = jax.jit(make_eval_step(recipe, self.compute))
            self._held_out = {
                name: held_out(self.mixture, recipe.data, rows, recipe.train.eval_batches, name)
                for name in self.mixture.sources
            }
        rowsets, total_weight = {}, sum(s.weight for s in self.mixture.sources.values())
        for name in self.mixture.sources:
            batches = eval_batches(
                self.mixture,
                recipe.data,
                rows,
                recipe.train.eval_batches,
                name,
                self.shard_batch.microbatch_rows,
            )
            sums = [self._eval_step(self.state.params, self.shard_batch(b)) for b in batches]
            of = self._held_out[name]
            nll = float(sum(np.float64(x) for x in jax.device_get(sums)))
            rowsets[name] = {
                "loss": nll / of.tokens, "bits_per_byte": nll / of.text_bytes / np.log(2),
                "unigram_entropy": of.unigram_entropy, "tokens": of.tokens,
            }  # fmt: skip
        mean = lambda key: (
            sum(r[key] * self.mixture.sources[n].weight for n, r in rowsets.items()) / total_weight
        )
        record = {
            "kind": "eval",
            "step": self.step,
            "tokens": self.step * recipe.train.batch_size * recipe.data.seq_len,
        }
        record |= {key: mean(key) for key in ("loss", "bits_per_byte", "unigram_entropy")} | {
            "sources": rowsets
        }
        for name, r in (
            [*rowsets.items(), ("mixture", record)] if len(rowsets) > 1 else rowsets.items()
        ):
            self.say(
                f"held out, {name}: {r['loss']:.4f} nats a token, {r['bits_per_byte']:.4f} bits a "
                "byte | "
                f"unigram entropy {r['unigram_entropy']:.4f} nats a token, "
                f"{r['unigram_entropy'] - r['loss']:.4f} above the loss"
            )
        self.report.write(record)
        self.evaluated = self.step

    def sample(self) -> None:
        """Continue the recipe's prompts, where one process holds all the weights."""
        from llama_jax.generate.llm import LLM
        from llama_jax.generate.sampler import Sample

        self.stop.phase("sampling; the run is finished and saved")
        if self.recipe.train.sample_prompts and jax.process_count() == 1:
            params = jax.device_get(self.state.params)
            compute = ComputeConfig(np.dtype("float32"), unroll=self.compute.unroll)
            llm = LLM(self.recipe.model, params, self.tokenizer, compute)
            prompts = self.recipe.train.sample_prompts
            texts = llm.generate(
                prompts, max_new_tokens=100, sampling=Sample(temperature=0.7),
                seed=self.recipe.train.seed,
            )  # fmt: skip
            for prompt, text in zip(prompts, texts, strict=True):
                self.say("sample:\n" + textwrap.indent(prompt + text, "  | "))


def _barrier(name: str) -> None:
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m llama_jax.train",
        usage="%(prog)s [RECIPE] [section.key=value ...]",
        description="Pretrain or fine-tune a LLaMA. RECIPE is a TOML file or the name of a shipped "
        f"recipe: {', '.join(recipe_names())}. The default, tiny, needs no download.",
        add_help=False,
    )
    parser.add_argument(
        "arguments", nargs="*", metavar="section.key=value", help="a setting: TOML or plain text"
    )
    parser.add_argument("-h", "--help", action=SettingsHelp, help="settings of a section, or all")
    return parser
