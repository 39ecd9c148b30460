"""What a run says of itself: one log line, the same as JSON lines and TensorBoard scalars, and a
picture.

In: one record a log line. Out: the terminal, and ``metrics.jsonl``, ``tensorboard/`` and
``loss.png`` in the run folder.
"""

import contextlib
import importlib.metadata
import json
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax

from llama_jax.io import atomic_write

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


class Report:
    """Writes records of a run; lines after ``step`` left by a run that died are dropped.

    Only the first process of a job writes; in the others every method does nothing.
    """

    def __init__(self, folder: Path, step: int, say=print):
        self.active = jax.process_index() == 0
        self.say = say if self.active else lambda _: None
        if not self.active:
            return
        self._file = folder / "metrics.jsonl"
        self._picture = folder / "loss.png"
        self.records = [r for r in read_records(self._file) if r["step"] <= step]
        kept = "".join(json.dumps(r) + "\n" for r in self.records).encode()
        if not self._file.exists() or self._file.read_bytes() != kept:
            atomic_write(self._file, kept)
        from tensorboardX import SummaryWriter

        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1, flush_secs=20)

    def write(self, record: dict[str, Any]) -> None:
        """Keep a record ("kind": "train" or "eval"); it has a "step" and numbers."""
        if not self.active:
            return
        self.records.append(record)
        try:
            with self._file.open("a") as f:
                f.write(json.dumps(record) + "\n")
        except OSError as e:
            raise OSError(e.errno, e.strerror, str(self._file)) from None
        for key, value in flat(record):
            self._board.add_scalar(f"{record['kind']}/{key}", value, record["step"])

    def close(self, title: str) -> None:
        """Draw the picture and close the files."""
        if self.active:
            self._board.close()
            draw(self.records, self._picture, title)


def read_records(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a ``metrics.jsonl``; a last line cut by a crash is left out."""
    records = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            records.append(json.loads(line))
        except ValueError:
            break
    return records


def flat(record: dict[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    """Numbers of a nested record as ("a/b", value)."""
    out = []
    for key, value in record.items():
        if isinstance(value, dict):
            out += flat(value, f"{prefix}{key}/")
        elif isinstance(value, (int, float)) and key not in ("step",):
            out.append((prefix + key, value))
    return out


def line(r: dict[str, Any], steps: int) -> str:
    """The log line of a training record."""
    return (
        f"step {r['step']:>{len(str(steps))}}/{steps} | {r['tokens'] / 1e6:.2f}M tokens | loss "
        f"{r['loss']:.4f} | "
        f"grad {r['grad_norm']:.3f} | lr {r['learning_rate']:.2e} | {r['tokens_per_second']:,.0f} "
        "tok/s | "
        f"{r['tflops']:.3g} TFLOP/s | MFU {r['mfu']:.1%} | {r['memory_gib']:.2f} GiB | data wait "
        f"{r['data_wait']:.1%}"
    )


def draw(records: list[dict[str, Any]], path: Path, title: str) -> None:
    """Loss against tokens, as figure 1 of the paper."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    train = [r for r in records if r["kind"] == "train"]
    held_out = [r for r in records if r["kind"] == "eval"]
    if not train:
        return
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    axes.plot(
        [r["tokens"] / 1e6 for r in train], [r["loss"] for r in train], lw=1, label="training"
    )
    if held_out:
        tokens, losses = [r["tokens"] / 1e6 for r in held_out], [r["loss"] for r in held_out]
        axes.plot(tokens, losses, "o-", ms=4, label="held out")
        axes.axhline(
            held_out[-1]["unigram_entropy"],
            ls="--",
            c="0.5",
            lw=1,
            label="unigram entropy, held out",
        )
    axes.set(xlabel="million tokens", ylabel="loss, nats a token", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    partial = path.with_suffix(".partial.png")
    figure.savefig(partial, dpi=130)
    plt.close(figure)
    partial.replace(path)


def environment() -> str:
    """Commit, versions and machine, one line."""
    here = Path(__file__).parent
    git = lambda *args: subprocess.run(
        ["git", "-C", here, *args], capture_output=True, text=True
    ).stdout.strip()
    try:
        commit = git("rev-parse", "--short=12", "HEAD") + (
            "+changes" if git("status", "--porcelain", "-uno") else ""
        )
    except OSError:  # no git
        commit = ""
    versions = ", ".join(f"{p} {importlib.metadata.version(p)}" for p in PACKAGES)
    return (
        f"commit {commit or 'unknown'} | Python {platform.python_version()}, {versions} | "
        f"{platform.platform()}"
    )


def memory_gib() -> float:
    """Peak memory of a device of this process (of the process itself on a CPU), GiB."""
    stats = jax.local_devices()[0].memory_stats()
    if stats:
        return stats["peak_bytes_in_use"] / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


class Clock:
    """Throughput between log lines, without evaluations, and the share of it spent waiting for
    data."""

    def __init__(self):
        self._start = time.perf_counter()
        self._wait = self._paused = 0.0
        self._step: int | None = None
        self._steps = 0

    @contextlib.contextmanager
    def waiting(self):
        """Time spent in here is waiting for data."""
        start = time.perf_counter()
        yield
        self._wait += time.perf_counter() - start
        self._steps += 1

    @contextlib.contextmanager
    def paused(self):
        """Time spent in here does not count."""
        start = time.perf_counter()
        yield
        self._paused += time.perf_counter() - start

    def lap(self, step: int, tokens: int) -> tuple[float, float]:
        """(tokens a second, share of the time waiting) since the last lap, or the start."""
        now = time.perf_counter()
        seconds = now - self._start - self._paused
        steps = self._steps if self._step is None else step - self._step
        result = steps * tokens / seconds, self._wait / seconds
        self._start, self._wait, self._paused, self._step = now, 0.0, 0.0, step
        return result


class Profiler:
    """A trace of the steps asked for, in the run folder's ``profile``; of those that are left where
    a run continues among them."""

    def __init__(self, steps: tuple[int, int] | None, folder: Path):
        self._first, self._last = steps or (1, 0)
        self._folder = str(folder / "profile")
        self._running = False

    def before(self, step: int) -> None:
        if not self._running and self._first <= step <= self._last:
            jax.profiler.start_trace(self._folder)
            self._running = True

    def after(self, step: int, metrics: dict) -> None:
        if self._running and step >= self._last:
            jax.block_until_ready(metrics)
            self.close()

    def close(self) -> None:
        """End a trace that is under way."""
        if self._running:
            self._running = False
            jax.profiler.stop_trace()
