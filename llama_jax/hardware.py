"""The rate that a device is measured against, and compiler options worth setting."""

import time
from typing import Any

import jax
import jax.numpy as jnp

from llama_jax.chips import peak_tflops


def peak_flops(device: jax.Device) -> tuple[float, str]:
    """FLOP/s that utilisation is measured against, and where the number is from.

    A chip that is not in the table (:func:`llama_jax.chips.peak_tflops`), and a CPU, is
    measured: the rate of a large matrix product in the dtype of training there, bfloat16 on TPU and
    GPU, float32 on a CPU.
    """
    if (rate := peak_tflops(device.device_kind)) is not None:
        return rate * 1e12, "data sheet, bfloat16"
    n, dtype = (1536, "float32") if device.platform == "cpu" else (8192, "bfloat16")
    x = jax.device_put(jnp.ones((n, n), dtype), device)
    product = jax.jit(lambda x: x @ x)
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        product(x).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return 2 * n**3 / min(seconds), f"measured, {dtype} product of {n} x {n}"


def compiler_options(platform: str) -> dict[str, Any]:
    """Options for compiling a training step: overlap collectives with computation."""
    return _COMPILER_OPTIONS.get(platform, {})


_COMPILER_OPTIONS: dict[str, dict[str, Any]] = {
    "gpu": {
        "xla_gpu_enable_latency_hiding_scheduler": True,
        "xla_gpu_all_gather_combine_threshold_bytes": 128 << 20,
        "xla_gpu_reduce_scatter_combine_threshold_bytes": 64 << 20,
        "xla_gpu_all_reduce_combine_threshold_bytes": 128 << 20,
    },
    "tpu": {
        "xla_tpu_enable_async_collective_fusion": True,
        "xla_tpu_enable_async_collective_fusion_fuse_all_gather": True,
        "xla_tpu_enable_async_collective_fusion_multiple_steps": True,
        "xla_tpu_overlap_compute_collective_tc": True,
        "xla_enable_async_all_gather": True,
    },
}
