"""Metrics of a run: log lines, ``metrics.jsonl``, TensorBoard, ``loss.png``, memory, profiles."""

import importlib.metadata
import json
import platform
import resource
import sys
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from tqdm import tqdm

from llama_jax.config import Recipe
from llama_jax.data.manifest import SPLITS
from llama_jax.data.sequences import Source
from llama_jax.io import atomic_write, save_figure
from llama_jax.model.compute import ComputeConfig
from llama_jax.model.lora import num_adapter_params
from llama_jax.storage.copies import Mirror
from llama_jax.train.benchmarks import plot_benchmarks
from llama_jax.train.clock import PHASES, Seconds
from llama_jax.train.frozen import frozen_format
from llama_jax.train.step import flops_per_token
from llama_jax.versions import source_version

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
LINE_WIDTH = 120
"""Largest width of a log line, in columns."""

Record = dict[str, Any]
"""One line of ``metrics.jsonl``: "kind" ("train", "eval", "benchmark" or "goodput"), "step", and
numbers."""


class MetricsLog:
    """Writes the records of a run to ``metrics.jsonl`` and TensorBoard.

    Records of later steps than ``step``, left by a run that was killed, are removed. Only process 0
    writes; in other processes every method does nothing.

    Args:
      folder: the run folder.
      step: the step from which the run continues; -1 for a new run.

    Example::

      log = MetricsLog(Path("checkpoints/tiny"), step=-1)
      log.write({"kind": "train", "step": 1, "tokens": 2048, "loss": 8.3})
      log.close("2.6M parameters")
    """

    def __init__(self, folder: Path, step: int):
        self.active = jax.process_index() == 0
        self.goodput: tuple[Seconds | None, Seconds | None] = (None, None)
        """Those that the last start recorded, and those recorded up to ``step``."""
        if not self.active:
            return
        self._mirror = Mirror(folder)
        self._mirror.fetch("metrics.jsonl")
        folder = self._mirror.folder
        self._file = folder / "metrics.jsonl"
        self._picture = folder / "loss.png"
        before = read_records(self._file)
        self.records = [r for r in before if r["step"] <= step]
        recorded = [r["goodput"] for r in before if "goodput" in r]
        kept = [r["goodput"] for r in self.records if "goodput" in r]
        self.goodput = (recorded or [None])[-1], (kept or [None])[-1]
        text = "".join(json.dumps(r) + "\n" for r in self.records).encode()
        if not self._file.exists() or self._file.read_bytes() != text:
            atomic_write(self._file, text)
        from tensorboardX import SummaryWriter

        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1, flush_secs=20)

    def write(self, record: Record) -> None:
        """Append a record to ``metrics.jsonl`` and its numbers to TensorBoard."""
        if not self.active:
            return
        self.records.append(record)
        try:
            with self._file.open("a") as f:
                f.write(json.dumps(record) + "\n")
        except OSError as e:
            raise OSError(e.errno, e.strerror, str(self._file)) from None
        for key, value in flatten(record):
            self._board.add_scalar(f"{record['kind']}/{key}", value, record["step"])
        self._mirror.upload_soon()

    def upload(self) -> None:
        """For a run folder in a bucket, upload what was written; done before each checkpoint, so
        that no record is lost when the run continues from it."""
        if self.active:
            self._mirror.upload()

    def close(self, title: str) -> None:
        """Plot the losses and the benchmarks, and close the files."""
        if self.active:
            self._board.close()
            plot_losses(self.records, self._picture, title)
            plot_benchmarks(self.records, self._picture.with_name("benchmarks.png"), title)
            self._mirror.close()


def read_records(path: Path) -> list[Record]:
    """The records of a ``metrics.jsonl`` up to the first damaged line (cut off by a crash)."""
    records = []
    for line in path.read_bytes().splitlines() if path.exists() else []:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            break
        if not _is_record(record):
            break
        records.append(record)
    return records


def _is_record(record: Any) -> bool:
    """Whether a value has what the log reads again: it may have been changed by something else."""
    if not isinstance(record, dict) or not isinstance(record.get("kind"), str):
        return False
    numbers = [record.get("step")]
    if record["kind"] in ("train", "eval"):
        numbers += [record.get("tokens"), record.get("loss")]
    if "goodput" in record:
        goodput = record["goodput"] if isinstance(record["goodput"], dict) else {}
        numbers += [goodput.get(name) for name in (*PHASES, "starts")]
    return all(isinstance(x, int | float) for x in numbers)


def flatten(record: Record, prefix: str = "") -> list[tuple[str, float]]:
    """Numbers of a nested record as ("a/b", value)."""
    out = []
    for key, value in record.items():
        if isinstance(value, dict):
            out += flatten(value, f"{prefix}{key}/")
        elif isinstance(value, (int, float)) and key != "step":
            out.append((prefix + key, value))
    return out


# Text --------------------------------------------------------------------------------------------


def log(text: str) -> None:
    """Print a line from process 0, above the progress bar."""
    if jax.process_index() == 0:
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()


def settings_lines(
    recipe: Recipe,
    compute: ComputeConfig,
    mesh: Mesh,
    peak: tuple[float, str],
    sources: Mapping[str, Source],
) -> list[str]:
    """The lines at the start of a run about devices, model and data.

    Args:
      recipe: the run, with train.steps.
      compute: how the model is computed.
      mesh: the devices.
      peak: peak FLOP/s per device, and where this number is from.
      sources: the prepared sources.
    """
    model, devices, steps = recipe.model, list(mesh.devices.flat), recipe.train.steps or 0
    sizes = " x ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
    tokens = recipe.tokens_per_step
    lines = [
        f"devices: {len(devices)} x {devices[0].device_kind} in {jax.process_count()} "
        f"process(es), mesh {sizes} ({recipe.mesh.preset})",
        f"peak: {peak[0] / 1e12:.3g} TFLOP/s per device ({peak[1]})",
        f"model: {model.num_params:,} parameters, {compute.dtype} compute | "
        f"{steps:,} steps of {tokens:,} tokens = {short(steps * tokens)}",
    ]
    if lora := recipe.lora:
        lines.append(
            f"LoRA: {num_adapter_params(model, lora):,} trainable parameters, rank {lora.rank} on "
            f"{', '.join(lora.targets)}; base in {frozen_format(recipe, compute)}"
        )
    if recipe.dpo:
        lines.append(f"DPO: beta {recipe.dpo.beta:g}, reference {recipe.train.init_from}")
    for name, source in sources.items():
        tokens, val = (source.manifest["splits"][k]["tokens"] for k in SPLITS)
        lines.append(
            f"source {name}: weight {source.weight}, {tokens:,} tokens, {val:,} for validation"
        )
    return lines


def train_record(
    recipe: Recipe,
    step: int,
    values: dict[str, float],
    speed: tuple[float, float],
    peak: tuple[float, int],
) -> Record:
    """The record of a log line, without the progress in the sources and the clock.

    Args:
      recipe: the run.
      step: the last step since the line before.
      values: "loss", "grad_norm", "learning_rate" and further metrics.
      speed: tokens per second and fraction of time waiting for data.
      peak: peak FLOP/s of a device, and the number of devices.
    """
    tokens_per_second, data_wait = speed
    peak_flops, devices = peak
    flops = tokens_per_second * flops_per_token(recipe) / devices
    return {
        "kind": "train",
        "step": step,
        "tokens": step * recipe.tokens_per_step,
        **values,
        "tokens_per_second": tokens_per_second,
        "tflops": flops / 1e12,
        "mfu": flops / peak_flops,
        "memory_gib": memory_gib(),
        "data_wait": data_wait,
    }


def train_line(r: Record, steps: int) -> str:
    """The log line of a training record, at most :data:`LINE_WIDTH` columns wide."""
    rewards = ""
    if "rewards/margin" in r:
        rewards = f", margin {r['rewards/margin']:.2f}, acc {r['rewards/accuracy']:.0%}"
    return (
        f"step {r['step']:>{len(str(steps))}}/{steps} | {short(r['tokens'])} tokens | "
        f"loss {r['loss']:.3f}{rewards}, grad {r['grad_norm']:.2f}, lr {r['learning_rate']:.1e} | "
        f"{short(r['tokens_per_second'])} tok/s, MFU {r['mfu']:.1%}, "
        f"wait {r['data_wait']:.1%} | {r['memory_gib']:.1f} GiB"
    )


def eval_lines(record: Record) -> list[str]:
    """The log lines of a validation record: one per source, and one for their weighted mean."""
    losses = record["sources"]
    if len(losses) > 1:
        losses = losses | {"mixture": record}
    return [f"val/{name} loss {r['loss']:.3f}{_beside_loss(r)}" for name, r in losses.items()]


def _beside_loss(r: Record) -> str:
    if "rewards/margin" in r:
        return f", margin {r['rewards/margin']:.2f}, accuracy {r['rewards/accuracy']:.0%}"
    return f" ({r['bits_per_byte']:.2f} bits/byte), unigram baseline {r['unigram_entropy']:.3f}"


def short(number: float) -> str:
    """Three significant digits and a unit: 1234567 as "1.23M"."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= 0.9995 * size:  # rounds to 1.00 of this unit
            return f"{number / size:#.3g}".rstrip(".") + unit
    return f"{number:.0f}"


def environment() -> str:
    """Source version, package versions and machine, as log lines."""
    versions = ", ".join(f"{p} {importlib.metadata.version(p)}" for p in PACKAGES)
    text = f"llama_jax {source_version()} | Python {platform.python_version()}, {versions} | "
    text += platform.platform()
    return textwrap.fill(text, LINE_WIDTH, subsequent_indent="  ", break_on_hyphens=False)


def plot_losses(records: list[Record], path: Path, title: str) -> None:
    """Plot training and validation loss against tokens, as figure 1 of the paper.

    Args:
      records: of ``metrics.jsonl``.
      path: file to write; its suffix is the format.
      title: title of the plot.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    train = [r for r in records if r["kind"] == "train"]
    val = [r for r in records if r["kind"] == "eval"]
    if not train:
        return
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    points = lambda rs: ([r["tokens"] / 1e6 for r in rs], [r["loss"] for r in rs])
    axes.plot(*points(train), lw=1, label="training")
    if val:
        axes.plot(*points(val), "o-", ms=4, label="validation")
        if (baseline := val[-1].get("unigram_entropy")) is not None:
            axes.axhline(baseline, ls="--", c="0.5", lw=1, label="unigram baseline, validation")
    axes.set(xlabel="million tokens", ylabel="loss (nats/token)", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    save_figure(figure, path)
    plt.close(figure)


# Memory and profiles -----------------------------------------------------------------------------


def memory_gib() -> float:
    """Peak memory of a local device (on CPU: of this process), GiB."""
    stats = jax.local_devices()[0].memory_stats()
    if stats:
        return stats["peak_bytes_in_use"] / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


class Profiler:
    """Traces the steps ``[first, last]`` into the run folder's ``profile``.

    A run that continues inside this range traces the remaining steps.

    Example::

      profiler = Profiler(steps=(10, 12), folder=Path("checkpoints/tiny"))
      profiler.before(10)  # starts the trace
      profiler.after(12, metrics)  # ends it
    """

    def __init__(self, steps: tuple[int, int] | None, folder: Path):
        self._first, self._last = steps or (1, 0)
        self._run_folder = folder
        self._running = False

    def before(self, step: int) -> None:
        if not self._running and self._first <= step <= self._last:
            self._mirror = Mirror(self._run_folder)
            jax.profiler.start_trace(str(self._mirror.folder / "profile"))
            self._running = True

    def after(self, step: int, step_metrics: dict[str, Any]) -> None:
        if self._running and step >= self._last:
            jax.block_until_ready(step_metrics)
            self.close()

    def close(self) -> None:
        """End the trace, if one is running."""
        if self._running:
            self._running = False
            jax.profiler.stop_trace()
            self._mirror.close()
