"""The rate that a device is measured against, and compiler options worth setting."""

import time
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.chips import PEAK_TFLOPS


def peak_flops(device: jax.Device) -> tuple[float, str]:
    """FLOP/s that utilisation is measured against, and where the number is from.

    A CPU has no figure of its own: the rate of a large float32 matrix product is measured (0.1 s).
    """
    for name in sorted(PEAK_TFLOPS, key=len, reverse=True):
        if name in device.device_kind:
            return PEAK_TFLOPS[name] * 1e12, "data sheet, bfloat16"
    n = 1536
    x = jax.device_put(jnp.ones((n, n), jnp.float32), device)
    product = jax.jit(lambda x: x @ x)
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        product(x).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return 2 * n**3 / min(seconds), f"measured, float32 product of {n} x {n}"


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
