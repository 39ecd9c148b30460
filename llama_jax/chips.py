"""What is known of chips, and GPU machines to compile for that are not there.

`peak_tflops` and `gpu_topology` are all of it. Compiling for a GPU needs the packages
`jax-cuda13-plugin` and `jax-cuda13-pjrt` of jax's own version, and no GPU, driver or CUDA.
"""

import re
from typing import Any

import jax
from jax.experimental import topologies

PEAK_TFLOPS = {
    "TPU v4": 275.0,
    "TPU v5 lite": 197.0,
    "TPU v5e": 197.0,
    "TPU v5": 459.0,
    "TPU v5p": 459.0,
    "TPU v6 lite": 918.0,
    "TPU v6e": 918.0,
    "TPU7x": 1153.5,
    "A100": 312.0,
    "A100 PCIe": 312.0,
    "A800": 312.0,
    "A800 PCIe": 312.0,
    "H100": 989.0,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H200": 989.0,
    "H200 NVL": 835.0,
    "H800": 989.0,
    "H20": 148.0,
    "GH200": 989.0,
    "B200": 2250.0,
    "L4": 121.0,
    "L40S": 362.0,
    "RTX 3090": 71.0,
    "RTX 4090": 165.2,
    "RTX 5090": 209.5,
}
"""Dense bfloat16 TFLOP/s of one JAX device by its `device_kind` without maker, form and memory,
from the vendors' data sheets (cloud.google.com/tpu/docs for TPU, half a chip of TPU7x; NVIDIA's for
data-center cards, the SXM form where nothing else is said, and its architecture white papers for
RTX, summed in float32)."""


def peak_tflops(device_kind: str) -> float | None:
    """The row of :data:`PEAK_TFLOPS` for a `device_kind`; None where the chip has none.

    Every word counts: "RTX A1000" is no A100, and "RTX 4090 Laptop GPU" or a part of a card
    ("H100 80GB HBM3 MIG 1g.10gb") has a rate of its own.
    """
    vendor = re.compile(r"NVIDIA|GeForce|SXM\d?|\d+GB|HBM\w+", re.IGNORECASE)
    words = [w for w in re.split(r"[-\s]+", device_kind) if not vendor.fullmatch(w)]
    rates = {name.lower(): rate for name, rate in PEAK_TFLOPS.items()}
    return rates.get(" ".join(words).lower())


# Multiprocessors, float32 lanes in each, shared memory of each and the most one block may ask for
# (bytes), memory bandwidth (bytes/s), L2 and memory (bytes), clock (GHz), capability, name. As XLA
# lists them for itself (openxla/xla, xla/backends/gpu/target_config/specs, read at 4336d12:
# h100_sxm, h200, a100_sxm_80), where they were read off real devices.
_GPUS: dict[str, dict[str, Any]] = {
    "a100": dict(
        cores=108, lanes=64, shared=167936, shared_block=166912, bandwidth=2039040000000,
        l2=41943040, memory=85100068864, clock=1.41, capability="major: 8",
        name="NVIDIA A100-SXM4-80GB",
    ),
    "h100": dict(
        cores=132, lanes=128, shared=233472, shared_block=232448, bandwidth=3352320000000,
        l2=52428800, memory=84942979072, clock=1.98,
        capability="major: 9 feature_extension: ACCELERATED_FEATURES",
        name="NVIDIA H100 80GB HBM3",
    ),
    "h200": dict(
        cores=132, lanes=128, shared=233472, shared_block=232448, bandwidth=4800000000000,
        l2=52428800, memory=151397597184, clock=1.98,
        capability="major: 9 feature_extension: ACCELERATED_FEATURES",
        name="NVIDIA H200 141GB HBM3e",
    ),
}  # fmt: skip

# What all three share; cuDNN is the release that jax's CUDA 13 packages ask for at least.
_TARGET = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  shared_memory_per_block: 49152 shared_memory_per_core: {shared}
  shared_memory_per_block_optin: {shared_block}
  core_count: {cores} fpus_per_core: {lanes} clock_rate_ghz: {clock}
  memory_bandwidth: {bandwidth} l2_cache_size: {l2} device_memory_size: {memory}
  cuda_compute_capability {{ {capability} }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
device_description_str: "{name}"
"""


# TPU topologies of one host, as their compiler names them.
_TPUS = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}


def topology(name: str) -> list[jax.Device]:
    """Devices of one host of a chip by its short name (v5e, v5p, v6e, a100, h100, h200).

    Raises:
      ValueError: no such chip.
      RuntimeError: its compiler is not installed: libtpu, or jax's CUDA plugin.
    """
    if name not in _TPUS:
        if name not in _GPUS:
            raise ValueError(f"no chip {name!r}; there are {', '.join([*_TPUS, *_GPUS])}")
        return gpu_topology(name)
    return topologies.get_topology_desc(platform="tpu", topology_name=_TPUS[name]).devices


def gpu_topology(name: str, count: int = 1) -> list[jax.Device]:
    """Devices of a machine with GPUs that need not exist: to build a mesh of, and to compile for.

    Args:
      name: "a100" (80 GB), "h100" or "h200", each in the SXM form.
      count: how many GPUs; more than 8 are hosts of 8.

    Returns:
      ``count`` devices, which compile but hold no array.

    Raises:
      ValueError: no such GPU, or a count that is no whole number of hosts.
      RuntimeError: jax's CUDA plugin is not installed.
    """
    if name not in _GPUS:
        raise ValueError(f"no GPU {name!r}; there are {', '.join(_GPUS)}")
    if count > 8 and count % 8:
        raise ValueError(f"{count} GPUs are not a whole number of hosts of 8")
    shape = f"1x{count // 8}x8" if count > 8 else f"1x1x{count}"
    try:
        return topologies.get_topology_desc(
            name, platform="cuda", topology=shape, target_config=_TARGET.format(**_GPUS[name])
        ).devices
    except (KeyError, NotImplementedError) as e:
        raise RuntimeError(
            f"to compile for a GPU, install jax's CUDA plugin: pip install --no-deps "
            f"jax-cuda13-plugin=={jax.__version__} jax-cuda13-pjrt=={jax.__version__}"
        ) from e
