"""Speed and memory of conversion against `cp` on the same disk.

    python -m benchmarks.convert --model llama-7b --dir /big/disk --rounds 3

Makes a Meta checkpoint of random float16 weights in the shape of a published model, then copies and
converts it. Each command is its own process; the commands of a round follow each other. Prints a
line per command: median and range of GB/s, of the ratio to `cp` in the same round, and peak
resident memory beyond that of the imports.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np

from llama_jax.config import MODELS, ModelConfig
from llama_jax.convert import meta
from llama_jax.convert.tensors import layer_tensors, rows_per_chunk

COMMANDS = {  # name: (source folder, format to write)
    "meta to orbax": ("source", "orbax"),
    "orbax to hf": ("orbax", "hf"),
    "hf to meta": ("hf", "meta"),
}


def make_source(folder: Path, cfg: ModelConfig) -> int:
    """Write a Meta folder of random float16 weights; returns their bytes."""
    folder.mkdir()
    dtypes = {t.spec.path: np.dtype(np.float16) for t in layer_tensors(cfg)}
    writer = meta.create_writer(folder, cfg, dtypes, 1, False)
    noise = (np.random.default_rng(0).standard_normal(8 << 20) * 0.02).astype(np.float16)
    for i, tensor in enumerate(layer_tensors(cfg)):
        rows, columns = tensor.shape(cfg)
        step = rows_per_chunk(tensor, cfg, noise.dtype)
        for start in range(0, rows, step):
            piece = np.resize(np.roll(noise, i + start), (min(step, rows - start), columns))
            writer.weights.write(tensor, start, piece)
        writer.finish_tensor(tensor)
    writer.finish()
    (folder / "params.json").write_text(json.dumps(meta.make_params(cfg)))
    return cfg.num_params * 2


def run(command: list[str]) -> tuple[float, int]:
    """(seconds, peak resident bytes) of a command; its output is shown only if it fails."""
    start = time.perf_counter()
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        if status:
            output.seek(0)
            sys.exit(f"{' '.join(command)} failed:\n{output.read()}")
    return seconds, usage.ru_maxrss * 1024


def measure(args: argparse.Namespace, place: Path) -> None:
    """Run all commands in every round and print the table."""
    size = make_source(place / "source", MODELS[args.model])
    idle = run([sys.executable, "-c", "import llama_jax.convert.job, orbax.checkpoint"])[1]
    convert = [sys.executable, "-m", "llama_jax.convert", "--max-memory", args.max_memory]
    rates: dict[str, list[float]] = {"cp": []}
    ratios: dict[str, list[float]] = {name: [] for name in COMMANDS}
    peaks: dict[str, int] = dict.fromkeys(COMMANDS, 0)
    for _ in range(args.rounds):
        seconds, _ = run(["cp", "-r", str(place / "source"), str(place / "copy")])
        shutil.rmtree(place / "copy")
        rates["cp"].append(size / seconds)
        for name, (source, to) in COMMANDS.items():
            taken, peak = run([*convert, str(place / source), str(place / to), "--to", to])
            print(f"{name}: {taken:.1f} s, cp {seconds:.1f} s", file=sys.stderr, flush=True)
            rates.setdefault(name, []).append(size / taken)
            ratios[name].append(seconds / taken)
            peaks[name] = max(peaks[name], peak - idle)
            if source != "source":
                shutil.rmtree(place / source)
        shutil.rmtree(place / "meta")
    print(f"{args.model}, {size / 1e9:.1f} GB of float16, --max-memory {args.max_memory}, ", end="")
    print(f"{args.rounds} rounds; idle import {idle / 2**30:.2f} GiB")
    packages = ("jax", "orbax-checkpoint", "tensorstore", "numpy")
    print(f"{os.cpu_count()} cores, Python {platform.python_version()}, ", end="")
    print(", ".join(f"{p} {version(p)}" for p in packages))
    for name, values in rates.items():
        line = f"{name:15} {_spread([v / 1e9 for v in values])} GB/s"
        if name in ratios:
            line += f", {_spread(ratios[name])} of cp, peak +{peaks[name] / 2**30:.2f} GiB"
        print(line)


def _spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f}-{max(values):.2f})"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="llama-7b", choices=list(MODELS))
    parser.add_argument("--dir", type=Path, help="working folder with space for three copies")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--max-memory", default="2GiB")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.dir) as place:
        measure(args, Path(place))


if __name__ == "__main__":
    main()
