"""Pretrain and fine-tune: a recipe in, a run folder with checkpoints, metrics and a picture out.

    python -m llama_jax.train [RECIPE.toml] [section.key=value ...]

The same code runs on a laptop and on a pod: the recipe's mesh says how arrays lie over the
devices, and a job of several hosts is started by what starts such jobs (see the README).
Starting the same recipe again continues the run.
"""

import argparse
import functools
import signal
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from llama_jax import hardware, report
from llama_jax.checkpoint import (
    CheckpointError,
    Checkpoints,
    check_weights,
    load_weights,
    read_about,
    write_about,
)  # fmt: skip
from llama_jax.config import ConfigError, Recipe, load_recipe, settings, to_dict, to_toml
from llama_jax.data import TrainData, eval_batches, held_out, open_mixture
from llama_jax.distributed import start_distributed
from llama_jax.feed import Feed
from llama_jax.file_hashes import record_files
from llama_jax.io import atomic_write
from llama_jax.model import Execution
from llama_jax.prepare import prepare_mixture
from llama_jax.sharding import check_fits, make_mesh
from llama_jax.step import (
    TrainState,
    abstract_state,
    execution,
    init_state,
    make_eval_step,
    make_train_step,
)  # fmt: skip
from llama_jax.tokenizer import Tokenizer

DEFAULT_RECIPE = Path(__file__).parent.parent / "configs" / "tiny.toml"

# Settings that do not change what a run computes (beyond rounding): free to change when it is
# continued.
FREE = {
    "mesh",
    "checkpoint",
    "data.workers",
    "data.prepared",
    *("train." + name for name in ["accumulate", "remat", "unroll", "loss_chunk", "attention"]),
    *("train." + name for name in ["log_every", "eval_every", "eval_batches", "profile_steps"]),
    "train.sample_prompts",
}


class TrainingError(RuntimeError):
    """A run that cannot go on; the message says at which step and why."""


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code: 0 done or stopped on request, 1 the run failed, 2 the
    recipe is wrong."""
    arguments = _parser().parse_args(argv)
    given = list(arguments.arguments)
    path = given.pop(0) if given and "=" not in given[0] else DEFAULT_RECIPE
    try:
        recipe = load_recipe(path, given)
        start_distributed()
        run(recipe)
    except ConfigError as e:
        return _fail(e, 2)
    except (TrainingError, CheckpointError) as e:
        return _fail(e, 1)
    except OSError as e:
        return _fail(e, 1)
    return 0


def _fail(error: Exception, code: int) -> int:
    print(f"error: {error}", file=sys.stderr)
    return code


def run(recipe: Recipe) -> None:
    """Train from nothing, or from the newest checkpoint of the run folder, to the recipe's last
    step.

    Raises:
      ConfigError: the recipe does not fit the devices, the data or the run folder.
      TrainingError: the loss or the gradient stopped being a number.
      CheckpointError: a checkpoint could not be written or read.
    """
    mesh = make_mesh(recipe.mesh)
    check_fits(recipe, mesh)
    peak = hardware.peak_flops(jax.local_devices()[0])
    with jax.set_mesh(mesh), Stop() as stop:
        training = Run(recipe, mesh, stop, peak)
        finished = training.train()
    if finished:
        training.sample()


class Stop:
    """SIGTERM and Ctrl-C as a flag; a second Ctrl-C interrupts at once."""

    def __init__(self):
        self.signal: int | None = None

    def __enter__(self):
        self._before = {s: signal.signal(s, self._handle) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_):
        for s, handler in self._before.items():
            signal.signal(s, handler)

    def _handle(self, number, _):
        if self.signal is not None:
            raise KeyboardInterrupt
        self.signal = number


class Run:
    """A run under way: its folder, its data, its state."""

    def __init__(self, recipe: Recipe, mesh: Mesh, stop: Stop, peak: tuple[float, str]):
        self.recipe, self.mesh, self.stop = recipe, mesh, stop
        self.peak, self.peak_source = peak
        self.platform = mesh.devices.flat[0].platform
        self.how = execution(recipe, self.platform)
        self.folder = Path(recipe.checkpoint.dir)
        first = jax.process_index() == 0
        self.say(f"{report.environment()}")
        self._open_folder(first)
        try:
            self._open_data(first)
        except ValueError as e:
            raise ConfigError(str(e)) from e
        if first:
            ids = {"bos": self.tokenizer.bos_id, "eos": self.tokenizer.eos_id}
            write_about(
                self.folder,
                recipe.model,
                self.mixture.tokenizer,
                {k: v for k, v in ids.items() if v is not None},
            )
        self.checkpoints = Checkpoints(self.folder, recipe.checkpoint.keep)
        self.step, self.state = self._start()
        self.report = report.Report(self.folder, self.step, self.say)

    def say(self, text: str) -> None:
        """A line on the terminal, from the first process."""
        if jax.process_index() == 0:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def _open_data(self, first: bool) -> None:
        """Prepare what is not prepared, and open it; ValueError says what is wrong with it."""
        prepared = Path(self.recipe.data.prepared or self.folder / "data")
        if first:
            prepare_mixture(self.recipe.data, self.recipe.model.vocab_size, prepared)
        _barrier("prepared")
        self.mixture = open_mixture(prepared)
        self.tokenizer = Tokenizer.load(self.mixture.tokenizer)
        self.feed = Feed(self.recipe, self.mesh, self.how.rules.operand("BT"))
        batch_size = self.recipe.train.batch_size
        self.data = TrainData(self.mixture, self.recipe.data, batch_size, self.feed.batch_rows)

    def _open_folder(self, first: bool) -> None:
        saved = self.folder / "recipe.toml"
        if saved.exists():
            before = load_recipe(saved)
            if changes := differences(to_dict(before), to_dict(self.recipe)):
                raise ConfigError(
                    f"{self.folder} holds a run of another recipe:\n  " + "\n  ".join(changes)
                    + "\ntake the old settings to continue it, or another checkpoint.dir to start "
                    "a new run"
                )  # fmt: skip
        elif self.folder.exists() and (self.folder / "steps").exists():
            raise ConfigError(
                f"{self.folder} holds a checkpoint that is no training run; take another "
                "checkpoint.dir"
            )
        if first:
            self.folder.mkdir(parents=True, exist_ok=True)
            atomic_write(saved, to_toml(self.recipe).encode())
            record_files(self.folder, "recipe.toml")
        _barrier("folder")

    def _start(self) -> tuple[int, TrainState]:
        """The newest checkpoint, or fresh weights."""
        abstract = abstract_state(self.recipe, self.how, self.mesh)
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
            functools.partial(init_state, self.recipe, self.how), out_shardings=shardings
        )()
        if self.recipe.train.init_from:
            cfg, about = read_about(self.recipe.train.init_from)
            if kind := about.get("quantize"):
                raise ConfigError(
                    f"train.init_from={self.recipe.train.init_from} holds {kind} matrices, which "
                    "are for sampling; give the weights that it was made of"
                )
            if changes := differences(to_dict(cfg), to_dict(self.recipe.model)):
                raise ConfigError(
                    f"train.init_from={self.recipe.train.init_from} is another model:\n  "
                    + "\n  ".join(changes)
                )
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
        if self.step >= steps:
            self.say(
                f"{self.folder} is finished: {steps} steps; nothing to do (more steps are a new "
                "run)"
            )
            self.data.close()
            self.checkpoints.close()
            return False
        compiled = self._compile()
        try:
            with tqdm(
                total=steps, initial=self.step, unit="step", disable=None, dynamic_ncols=True
            ) as bar:
                self._loop(compiled, bar)
        finally:
            self.data.close()
            self.checkpoints.close()
            self.report.close(f"{self.recipe.model.num_params / 1e6:,.1f}M parameters")
        where = f"{self.folder}/steps/{self.step}"
        if self.step == steps:
            self.say(f"done: {where}, {self.folder}/metrics.jsonl, {self.folder}/loss.png")
            return True
        name = signal.Signals(self.stop.signal).name if self.stop.signal else "another process"
        self.say(
            f"stopped by {name} after step {self.step}: saved {where}; start the same recipe "
            "again to continue"
        )
        return False

    def _say_what_runs(self) -> None:
        model, train = self.recipe.model, self.recipe.train
        devices = jax.devices()
        sizes = " x ".join(f"{a}={n}" for a, n in self.mesh.shape.items())
        tokens = train.batch_size * self.recipe.data.seq_len
        self.say(
            f"{len(devices)} x {devices[0].device_kind} in {jax.process_count()} process(es), "
            f"mesh {sizes} ({self.recipe.mesh.preset}), "
            f"peak {self.peak / 1e12:.3g} TFLOP/s each ({self.peak_source})\n"
            f"model: {model.num_params:,} parameters, {self.how.dtype} compute | {train.steps:,} "
            f"steps of {tokens:,} tokens "
            f"= {train.steps * tokens / 1e6:,.1f}M"
        )
        for name, part in self.mixture.sources.items():
            tokens, held = (part.manifest["splits"][k]["tokens"] for k in ("train", "holdout"))
            self.say(f"source {name}: weight {part.weight}, {tokens:,} tokens, {held:,} held out")

    def _compile(self) -> Any:
        start = time.perf_counter()
        batch = self.feed(self._example(), False)
        step = jax.jit(
            make_train_step(self.recipe, self.how),
            donate_argnums=0,
            compiler_options=hardware.compiler_options(self.platform),
        )
        compiled = step.lower(self.state, batch).compile()
        self.say(f"compiled the step in {time.perf_counter() - start:.1f} s")
        return compiled

    def _example(self) -> dict[str, np.ndarray]:
        """A batch of the shapes that training batches have."""
        shape = (len(self.feed.batch_rows), self.recipe.data.seq_len)
        dtypes: dict[str, Any] = {"inputs_BT": np.int32, "targets_BT": np.int32}
        if self.recipe.data.packing == "segments":
            dtypes |= {"segment_ids_BT": np.int32, "positions_BT": np.int32, "mask_BT": np.float32}
        return {key: np.zeros(shape, dtype) for key, dtype in dtypes.items()}

    def _loop(self, compiled: Any, bar: tqdm) -> None:
        train, every = self.recipe.train, self.recipe.checkpoint.every
        clock = report.Clock()
        pending: list[tuple[int, dict]] = []
        profiler = report.Profiler(train.profile_steps, self.folder)
        while self.step < train.steps:
            with clock.waiting():
                batch = next(self.data)
            profiler.before(self.step + 1)
            self.state, metrics = compiled(
                self.state, self.feed(batch, self.stop.signal is not None)
            )
            self.step += 1
            profiler.after(self.step, metrics)
            pending.append((self.step, metrics))
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
                return

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
            good = self.checkpoints.latest()
            kept = "no checkpoint was made yet" if good is None else f"the last good one is {good}"
            raise TrainingError(
                f"step {step}: loss {loss}, gradient norm {grad_norm}; stopped, nothing saved; "
                f"checkpoints in {self.folder}: {kept}.\nLower optim.peak_lr, lengthen "
                "optim.warmup_steps, or look at the data of this step."
            )
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

    def _evaluate(self) -> None:
        """Held-out loss of each source, and of the mixture by the sources' weights."""
        recipe, rows = self.recipe, self.feed.rows
        if not hasattr(self, "_eval_step"):
            self._eval_step = jax.jit(make_eval_step(recipe, self.how))
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
                self.feed.part_rows,
            )
            sums = [
                self._eval_step(self.state.params, self.feed(batch, False, parts=1))
                for batch in batches
            ]
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

    def sample(self) -> None:
        """Continue the recipe's prompts, where one process holds all the weights."""
        from llama_jax.llm import LLM
        from llama_jax.sampling import Sample

        if self.recipe.train.sample_prompts and jax.process_count() == 1:
            params = jax.device_get(self.state.params)
            how = Execution(np.dtype("float32"), unroll=self.how.unroll)
            llm = LLM(self.recipe.model, params, self.tokenizer, how)
            prompts = self.recipe.train.sample_prompts
            texts = llm.generate(
                prompts, max_new_tokens=100, sampling=Sample(temperature=0.7),
                seed=self.recipe.train.seed,
            )  # fmt: skip
            for prompt, text in zip(prompts, texts, strict=True):
                self.say("sample:\n" + textwrap.indent(prompt + text, "  | "))


def differences(before: dict[str, Any], now: dict[str, Any], prefix: str = "") -> list[str]:
    """Settings that differ and that a run cannot change, as "name: was X, now Y"."""
    lines = []
    for key in before.keys() | now.keys():
        name, a, b = prefix + key, before.get(key), now.get(key)
        if name in FREE or a == b:
            continue
        if isinstance(a, dict) and isinstance(b, dict):
            lines += differences(a, b, name + ".")
        else:
            lines.append(f"{name}: was {a!r}, now {b!r}")
    return sorted(lines)


def _barrier(name: str) -> None:
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)


def _parser() -> argparse.ArgumentParser:
    width = max(len(s.name) for s in settings())
    lines = [f"  {s.name:{width}}  {s.meaning} ({s.type}; default {s.default})" for s in settings()]
    wrap = functools.partial(textwrap.fill, width=118, subsequent_indent=" " * (width + 4))
    parser = argparse.ArgumentParser(
        prog="python -m llama_jax.train",
        usage="%(prog)s [RECIPE.toml] [section.key=value ...]",
        description="Pretrain or fine-tune a LLaMA. Without a recipe: configs/tiny.toml, which "
        "needs no download.",
        epilog="settings (in the recipe, or on the command line):\n" + "\n".join(map(wrap, lines)),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("arguments", nargs="*", metavar="RECIPE.toml | section.key=value")
    return parser


if __name__ == "__main__":
    sys.exit(main())
