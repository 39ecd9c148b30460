"""Chips: their rates, compiler options for them, and devices to compile for without hardware.

Compiling for a GPU needs the packages `jax-cuda13-plugin` and `jax-cuda13-pjrt` of the same version
as jax, but no GPU, driver or CUDA. Compiling for a TPU needs the package `libtpu`.
"""

import dataclasses
import math
import re
import time
from typing import Any

GIB = 2**30
GPUS_PER_HOST = 8


@dataclasses.dataclass(frozen=True)
class Chip:
    """Rates of one JAX device of a chip (a TPU7x chip has two devices).

    Example:
      >>> CHIPS["h100"].tflops
      989.0
    """

    kinds: tuple[str, ...]
    """`jax.Device.device_kind` without vendor, form factor and memory size; several where chips
    have the same rate"""
    platform: str
    tflops: float
    """dense bfloat16 TFLOP/s"""
    memory: float = 0.0
    """GiB that a program can use; 0: plans do not cover the chip"""
    bandwidth: float = math.nan
    """GB/s of that memory"""
    interconnect: float = math.nan
    """GB/s that a chip receives over ICI (TPU slice), NVLink or PCIe (GPU host)"""
    dcn: float | None = None
    """GB/s that a chip receives from other slices (GPU: other hosts); None: unknown"""
    watts: float | None = None
    """maximum power of a chip, as the paper uses; None: unknown"""
    clock: float | None = None
    """GHz; converts the TPU compiler's cycles to seconds"""
    devices: int = 1
    """JAX devices per chip; hours, watts and prices are per chip"""
    topologies: tuple[str, ...] = ()
    """of TPU slices on offer (of the large ones, some)"""
    max_chips: int = 16384
    """in one slice (TPU) or one machine"""
    form: str = ""
    """memory size and form factor, for titles"""

    @property
    def title(self) -> str:
        return f"{self.kinds[0]} {self.form}".rstrip()

    @property
    def interconnect_name(self) -> str:
        return "ici" if self.platform == "tpu" else "nvlink"

    @property
    def topology_axes(self) -> int:
        """Dimensions of a TPU's topologies."""
        return self.topologies[0].count("x") + 1 if self.topologies else 1


# GPUs to compile for: number of multiprocessors, float32 lanes per multiprocessor, shared memory
# per multiprocessor and the maximum per block (bytes), memory bandwidth (bytes/s), L2 cache and
# memory (bytes), clock (GHz), compute capability, device name. Copied from XLA's own descriptions,
# which were read from real devices (openxla/xla, xla/backends/gpu/target_config/specs at 4336d12:
# h100_sxm, h200, a100_sxm_80).
_GPU_SPECS: dict[str, dict[str, Any]] = {
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

# What the three have in common. cuDNN: the oldest release that jax's CUDA 13 packages accept.
_GPU_TARGET = """
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

_USABLE = 0.92  # XLA_PYTHON_CLIENT_MEM_FRACTION=.92 leaves the rest to CUDA and NCCL


def _from_spec(name: str) -> dict[str, Any]:
    spec = _GPU_SPECS[name]
    return {"memory": _USABLE * spec["memory"] / GIB, "bandwidth": spec["bandwidth"] / 1e9}


_2D = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_3D = (
    "2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16",
)  # fmt: skip

# Sources.
# TPU: pages v4, v5e, v5p, v6e and tpu7x of cloud.google.com/tpu/docs: TFLOP/s, GB/s, topologies
# (TPU7x: half a chip). ICI is half of the "bidirectional" number: what a chip receives. DCN: the
# pages state Gb/s per chip (v5p) or Tb/s per pod of 256 chips (v5e, v6e), nothing for tpu7x.
# Memory: what libtpu 0.0.42 reports as available when a program asks for too much. Clock: TFLOP/s
# divided by the FLOPs per cycle of 128 x 128 units, 4 per core. Google publishes no watts.
# Data-center GPUs: NVIDIA's data sheets, SXM form unless the name says otherwise: TFLOP/s without
# sparsity, NVLink in one direction, maximum power; DCN is the host's network divided by 8 GPUs,
# 200 Gb/s each in DGX A100, 400 Gb/s in DGX H100 and H200.
# Other GPUs: data sheets, and the white papers of Ampere GA102, Ada AD102 and Blackwell GB202
# (bfloat16 summed in float32, without sparsity; T4: float16); PCIe in one direction.
CHIPS: dict[str, Chip] = {
    "v4": Chip(("TPU v4",), "tpu", 275.0),
    "v5e": Chip(
        ("TPU v5e", "TPU v5 lite"), "tpu", 197.0, 15.75, 819, 200, 3.125, clock=1.5,
        topologies=_2D, max_chips=256,
    ),
    "v5p": Chip(
        ("TPU v5p", "TPU v5"), "tpu", 459.0, 95.74, 2765, 600, 6.25, clock=1.75,
        topologies=_3D, max_chips=6144,
    ),
    "v6e": Chip(
        ("TPU v6e", "TPU v6 lite"), "tpu", 918.0, 31.25, 1638, 400, 12.5,
        topologies=_2D, max_chips=256,
    ),
    "tpu7x": Chip(
        ("TPU7x",), "tpu", 1153.5, 94.75, 3690, 300, devices=2, topologies=_3D, max_chips=9216
    ),
    "a100": Chip(
        ("A100", "A100 PCIe", "A800", "A800 PCIe"), "gpu", 312.0, **_from_spec("a100"),
        interconnect=300, dcn=25, watts=400, form="80 GB SXM",
    ),
    "h100": Chip(
        ("H100", "H800", "GH200"), "gpu", 989.0, **_from_spec("h100"),
        interconnect=450, dcn=50, watts=700, form="80 GB SXM",
    ),
    "h200": Chip(
        ("H200",), "gpu", 989.0, **_from_spec("h200"),
        interconnect=450, dcn=50, watts=700, form="141 GB SXM",
    ),
    "h100-pcie": Chip(("H100 PCIe",), "gpu", 756.0),
    "h100-nvl": Chip(("H100 NVL", "H200 NVL"), "gpu", 835.0),
    "h20": Chip(("H20",), "gpu", 148.0),
    "b200": Chip(("B200",), "gpu", 2250.0),
    "l40s": Chip(("L40S",), "gpu", 362.0),
    "t4": Chip(("T4",), "gpu", 65.0, _USABLE * 15.0, 320, 16, watts=70),
    "l4": Chip(("L4",), "gpu", 121.0, _USABLE * 22.5, 300, 32, watts=72),
    "rtx3090": Chip(("RTX 3090",), "gpu", 71.0, _USABLE * 24.0, 936, 32, watts=350),
    "rtx4090": Chip(("RTX 4090",), "gpu", 165.2, _USABLE * 24.0, 1008, 32, watts=450),
    "rtx5090": Chip(("RTX 5090",), "gpu", 209.5, _USABLE * 32.0, 1792, 64, watts=575),
    "cpu": Chip(("CPU",), "cpu", math.nan, math.inf, max_chips=256),
}  # fmt: skip
"""Every chip with a known rate, by short name"""


def can_compile(name: str) -> bool:
    """Whether this machine's XLA can compile for a chip that is absent."""
    return name == "cpu" or name in _GPU_SPECS or bool(CHIPS[name].topologies)


def peak_tflops(device_kind: str) -> float | None:
    """Dense bfloat16 TFLOP/s for a `jax.Device.device_kind`; None for a chip not in `CHIPS`.

    Every word counts: "RTX A1000" is not an A100, and "RTX 4090 Laptop GPU" or a partition of a
    GPU ("H100 80GB HBM3 MIG 1g.10gb") has a different rate.
    """
    vendor = re.compile(r"NVIDIA|GeForce|SXM\d?|\d+GB|HBM\w+", re.IGNORECASE)
    words = [w for w in re.split(r"[-\s]+", device_kind) if not vendor.fullmatch(w)]
    kind = " ".join(words).lower()
    for chip in CHIPS.values():
        if chip.platform != "cpu" and kind in map(str.lower, chip.kinds):
            return chip.tflops
    return None


def peak_flops(device: Any) -> tuple[float, str]:
    """FLOP/s of a `jax.Device` for computing MFU, and the source of the number.

    A device without a row in `CHIPS`, or a CPU, is measured: the rate of a large matmul in
    bfloat16 (TPU, GPU) or float32 (CPU).
    """
    import jax
    import jax.numpy as jnp

    if (rate := peak_tflops(device.device_kind)) is not None:
        return rate * 1e12, "data sheet, bfloat16"
    n, dtype = (1536, "float32") if device.platform == "cpu" else (8192, "bfloat16")
    x = jax.device_put(jnp.ones((n, n), dtype), device)
    matmul = jax.jit(lambda x: x @ x)
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        matmul(x).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return 2 * n**3 / min(seconds), f"measured, {dtype} matmul of {n} x {n}"


def compiler_options(platform: str) -> dict[str, Any]:
    """XLA options of a train step: overlap collectives with computation."""
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


# Devices of absent machines: they compile, but hold no arrays -------------------------------------


def compile_for(device: Any) -> Any:
    """Context manager in which a program without a mesh is compiled for an absent device."""
    from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

    # A mesh without axes: there is nothing to shard over, but kernels find their chip in it.
    cores = getattr(device, "num_cores", None) or getattr(device, "core_count", None)
    chip = AbstractDevice(device.device_kind, num_cores=cores, platform=device.platform)
    return use_abstract_mesh(AbstractMesh((), (), abstract_device=chip))


def topology(name: str) -> list[Any]:
    """Devices of one TPU host (v5e, v5p, v6e, tpu7x) or of one GPU (a100, h100, h200).

    They compile, but hold no arrays.

    Raises:
      ValueError: no such chip.
      RuntimeError: the compiler, libtpu or jax's CUDA plugin, is not installed.
    """
    hosts = {"v5e": (2, 2), "v5p": (2, 2, 1), "v6e": (2, 2), "tpu7x": (2, 2, 1)}
    if name in hosts:
        return tpu_topology(name, hosts[name])
    if name not in _GPU_SPECS:
        raise ValueError(f"no chip {name!r}; there are {', '.join([*hosts, *_GPU_SPECS])}")
    return gpu_topology(name)


def tpu_topology(name: str, shape: tuple[int, ...], num_slices: int = 1) -> list[Any]:
    """Devices of absent TPU slices, for compiling.

    Args:
      name: a TPU in `CHIPS`.
      shape: chips of a slice along each axis, such as (8, 8, 8).
      num_slices: equal slices joined by the data-center network.

    Raises:
      RuntimeError: libtpu is not installed, or does not know the topology.
    """
    from jax.experimental import topologies

    options: dict[str, Any] = {"wrap": wraps(shape), "num_slices": num_slices}
    if math.prod(shape) < 4:  # less than a host
        options["chips_per_host_bounds"] = (*shape, 1)[:3]
    return list(
        topologies.get_topology_desc(
            platform="tpu", topology_name=f"{name}:{'x'.join(map(str, shape))}", **options
        ).devices
    )


def wraps(shape: tuple[int, ...]) -> tuple[bool, bool, bool]:
    """Along which axes of a TPU slice the last chip has a link to the first.

    In three dimensions: along all axes of slices made of 4 x 4 x 4 cubes; in two: along an axis as
    long as a pod's, 16 (Google's pages above). Without this, libtpu assumes no such links, and over
    more than 32 chips compiles each gather to a sum of zero-padded arrays with twice the traffic.
    """
    if len(shape) == 3:
        return (all(n % 4 == 0 for n in shape),) * 3
    x, y = shape
    return x == 16, y == 16, False


def gpu_topology(name: str, count: int = 1) -> list[Any]:
    """Devices of an absent GPU machine, for compiling.

    Args:
      name: "a100" (80 GB), "h100" or "h200", each in the SXM form.
      count: number of GPUs; above 8, a multiple of 8 (hosts of 8).

    Returns:
      ``count`` devices, which compile but hold no arrays.

    Raises:
      ValueError: no such GPU, or a count that is not a whole number of hosts.
      RuntimeError: jax's CUDA plugin is not installed.
    """
    import jax
    from jax.experimental import topologies

    if name not in _GPU_SPECS:
        raise ValueError(f"no GPU {name!r}; there are {', '.join(_GPU_SPECS)}")
    per_host = min(count, GPUS_PER_HOST)
    if count % per_host:
        raise ValueError(f"{count} GPUs are not a whole number of hosts of {GPUS_PER_HOST}")
    shape = f"1x{count // per_host}x{per_host}"
    target = _GPU_TARGET.format(**_GPU_SPECS[name])
    try:
        return list(
            topologies.get_topology_desc(
                name, platform="cuda", topology=shape, target_config=target
            ).devices
        )
    except (KeyError, NotImplementedError) as e:
        raise RuntimeError(
            f"to compile for a GPU, install jax's CUDA plugin: pip install --no-deps "
            f"jax-cuda13-plugin=={jax.__version__} jax-cuda13-pjrt=={jax.__version__}"
        ) from e
