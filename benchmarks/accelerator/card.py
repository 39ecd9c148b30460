"""Step 0: versions, the card, and its ceilings: a copy, and a square matrix product."""

import importlib.metadata
import os
import platform
import shutil
import subprocess

import jax
import jax.numpy as jnp

from benchmarks.accelerator.common import Row, Rows, Sizes, random_arrays, seconds, time_calls
from benchmarks.common import commit
from llama_jax import chips

PACKAGES = (
    "jax", "jaxlib", "flax", "optax", "numpy", "jax-cuda13-plugin", "jax-cuda12-plugin",
    "nvidia-cudnn-cu13", "nvidia-cudnn-cu12", "libtpu", "torch", "transformers", "triton",
)  # fmt: skip


def rows(s: Sizes, earlier: dict[str, Row]) -> Rows:
    yield "card", card
    yield "copy", lambda: copy(s)
    yield f"product {s.product}^3", lambda: product(s)


def card() -> Row:
    device = jax.devices()[0]
    memory = (device.memory_stats() or {}).get("bytes_limit", 0)
    peak, source = chips.peak_flops(device) if device.platform != "cpu" else (0.0, "none")
    return {
        "platform": device.platform, "device": device.device_kind, "driver": _driver(),
        "commit": commit(), "python": platform.python_version(), "cores": os.cpu_count(),
        "versions": {p: v for p in PACKAGES if (v := _version(p))},
        "numbers": {"GB": memory / 1e9, "peak TFLOP/s": peak / 1e12}, "peak": source,
    }  # fmt: skip


def copy(s: Sizes) -> Row:
    """Reads and writes every byte of a large array."""
    x = random_arrays(0, [(s.copy_bytes // 4,)], jnp.float32)[0]
    call = jax.jit(lambda x: x + 1, donate_argnums=0)

    def run(n: int) -> None:
        nonlocal x
        for _ in range(n):
            x = call(x)
        x.block_until_ready()

    time = seconds(run, s)
    return {"seconds": time, "numbers": {"GB/s": 2 * s.copy_bytes / time["median"] / 1e9}}


def product(s: Sizes) -> Row:
    """bfloat16, summed in float32, random inputs."""
    n = s.product
    inputs = [tuple(random_arrays(seed, [(n, n)] * 2)) for seed in range(2)]
    time = time_calls(jax.jit(lambda a, b: a @ b), inputs, s)
    return {"seconds": time, "numbers": {"TFLOP/s": 2 * n**3 / time["median"] / 1e12}}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _driver() -> str:
    if not shutil.which("nvidia-smi"):
        return ""
    command = [
        "nvidia-smi",
        "--query-gpu=name,driver_version,memory.total",
        "--format=csv,noheader",
    ]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
