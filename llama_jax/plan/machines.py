"""Machines to plan for: what a chip can do, where the number is from, and its devices for the
compiler, none of which need exist.

In: a name such as ``v5p:8x8x8``, ``h100:64`` or ``cpu:8``. Out: a :class:`Machine`.
"""

import dataclasses
import importlib.util
import math
import re
from collections.abc import Mapping
from typing import Any

GIB = 2**30
MOST_CHIPS = 16384  # that are planned for; their description alone takes minutes for many more
MOST_CPUS = 256  # that one process simulates


class PlanError(ValueError):
    """A plan that cannot be made; the message says why and what to do."""


@dataclasses.dataclass(frozen=True)
class Chip:
    """Rates of one device as JAX counts them (a TPU7x chip is two)."""

    kind: str
    platform: str
    tflops: float
    """dense bfloat16 TFLOP/s"""
    memory: float
    """GiB that a program can use"""
    bandwidth: float
    """GB/s of that memory"""
    link: float
    """GB/s a chip can receive from the chips near it: of its slice, or of its host of 8"""
    network: float | None = None
    """GB/s a chip can receive from other slices (of GPUs: other hosts); None: not known"""
    watts: float | None = None
    """of a chip under load (the paper takes the maximum that the maker states); None: not known"""
    clock: float | None = None
    """GHz, to turn the compiler's cycles into seconds"""
    devices: int = 1
    """JAX devices of one chip; hours, watts and prices are of a chip"""
    grids: str = ""
    """of a TPU's slices, those that can be had (same pages; of large ones, some)"""
    most: int = MOST_CHIPS
    """chips of the largest slice"""
    int8_tops: float | None = None
    """dense int8 TOP/s, where products of int8 weights run faster"""


# TPU: cloud.google.com/tpu/docs pages v5e, v5p, v6e, tpu7x (TFLOP/s, GB/s; the link is half of the
# "bidirectional" figure, what comes in). Memory: what libtpu 0.0.42 says is available when a
# program asks for too much. Clock: TFLOP/s over the products a cycle of 128 x 128 units, 4 a core
# (same pages). The network between slices: Gb/s a chip (v5p), Tb/s a pod of 256 chips (v5e,
# v6e); not stated for tpu7x. Google publishes no watts of these chips: give --power.
# GPU: NVIDIA's data sheets of A100 80 GB, H100 and H200, SXM form (TFLOP/s without sparsity, NVLink
# one way, maximum power); a host's network: 8 x 200 Gb/s (DGX A100) and 8 x 400 Gb/s (DGX H100,
# H200). Memory: 92% of what the device has; XLA_PYTHON_CLIENT_MEM_FRACTION=.92 leaves the rest to
# CUDA and NCCL.
_FLAT = "1x1 2x2 2x4 4x4 4x8 8x8 8x16 16x16"
_DEEP = "2x2x1 2x2x2 2x2x4 2x4x4 4x4x4 4x4x8 4x8x8 8x8x8 8x8x16 8x16x16"
CHIPS: dict[str, Chip] = {
    "v5e": Chip("TPU v5e", "tpu", 197, 15.75, 819, 200, 3.125, clock=1.5, grids=_FLAT, most=256),
    "v5p": Chip("TPU v5p", "tpu", 459, 95.74, 2765, 600, 6.25, clock=1.75, grids=_DEEP, most=6144),
    "v6e": Chip("TPU v6e", "tpu", 918, 31.25, 1638, 400, 12.5, grids=_FLAT, most=256),
    "tpu7x": Chip("TPU7x", "tpu", 1153.5, 94.75, 3690, 300, devices=2, grids=_DEEP, most=9216),
    "a100": Chip("A100 80 GB SXM", "gpu", 312, 0.92 * 79.25, 2039, 300, 25, 400, int8_tops=624),
    "h100": Chip("H100 80 GB SXM", "gpu", 989, 0.92 * 79.11, 3352, 450, 50, 700, int8_tops=1979),
    "h200": Chip("H200 141 GB SXM", "gpu", 989, 0.92 * 141.0, 4800, 450, 50, 700, int8_tops=1979),
    "cpu": Chip("CPU", "cpu", math.nan, math.inf, math.nan, math.nan, most=MOST_CPUS),
}

GPUS_PER_HOST = 8

EXAMPLES = (
    "v5e:16x16, v5p:8x8x8, 2xv5e:16x16, v6e:16x16, tpu7x:4x4x4, a100:2048, h100:64, h200:8, cpu:8"
)


@dataclasses.dataclass(frozen=True)
class Machine:
    """Chips of one kind that work together."""

    name: str
    chip: Chip
    chips: int
    slices: int = 1
    """groups of chips with fast links inside, joined by the data-center network: TPU slices, hosts
    of 8 GPUs"""

    @property
    def host_is_slice(self) -> bool:
        """Whether the devices of a host are a slice (GPUs); else `slice_index` says it."""
        return self.chip.platform == "gpu"

    @property
    def devices(self) -> int:
        """JAX devices."""
        return self.chips * self.chip.devices

    def rate(self) -> str:
        """What a device can do, one line."""
        c = self.chip
        near = f", links {c.link:g} GB/s" if self.devices > 1 else ""
        other = "hosts" if self.host_is_slice else "slices"
        far = f", {c.network:g} GB/s to other {other}" if c.network and self.slices > 1 else ""
        return f"{c.tflops:g} TFLOP/s, memory {c.bandwidth:g} GB/s{near}{far}"


def machine(name: str, chips: Mapping[str, Chip] = CHIPS) -> Machine:
    """Read a machine's name, without asking the compiler for it.

    ``v5p:8x8x8`` is a slice of that grid, ``2xv5e:4x4`` two slices, ``h100:64`` 64 GPUs.

    Raises:
      PlanError: no such chip, or no such arrangement of it.
    """
    times, kind, size = _parts(name)
    if kind not in chips:
        known = ", ".join(chips)
        raise PlanError(f"--on {name}: no chip {kind!r}; known: {known} (as v5p:8x8x8, h100:64)")
    chip = chips[kind]
    sizes = re.fullmatch(r"[1-9]\d{0,6}(x[1-9]\d{0,6})*", size, re.ASCII)
    if not sizes or (chip.platform != "tpu" and "x" in size):
        what = f" or their grid, one of {chip.grids}" if chip.grids else f", as in {kind}:8"
        raise PlanError(f"--on {name}: give the number of chips{what}")
    grid = [int(n) for n in size.split("x")]
    axes = grid_axes(kind)
    if chip.platform == "tpu" and len(grid) != axes and grid != [1]:
        raise PlanError(
            f"--on {name}: chips of a {kind} lie in a grid of {axes} axes, as in {chip.grids}"
        )
    if math.prod(grid) > chip.most:
        largest = "slice" if chip.platform == "tpu" else "machine"
        raise PlanError(f"--on {name}: the largest {largest} of {kind} has {chip.most:,} chips")
    chips_a_slice = math.prod(grid)
    if times * chips_a_slice > MOST_CHIPS:
        raise PlanError(f"--on {name}: plans are for {MOST_CHIPS:,} chips at most")
    if chip.platform == "tpu":
        return Machine(name, chip, times * chips_a_slice, times)
    if times > 1:
        raise PlanError(f"--on {name}: only TPUs come in slices; give all chips, as in {kind}:16")
    hosts = -(-chips_a_slice // GPUS_PER_HOST) if chip.platform == "gpu" else 1
    return Machine(name, chip, chips_a_slice, hosts)


def _parts(name: str) -> tuple[int, str, str]:
    """``2xv5e:4x4`` as (2, "v5e", "4x4")."""
    kind, _, size = name.partition(":")
    found = re.fullmatch(r"([1-9]\d{0,3})x(\w+)", kind)
    return (int(found[1]), found[2], size) if found else (1, kind, size)


def grid_axes(kind: str) -> int:
    """Dimensions of the grid in which a TPU's chips lie."""
    return 3 if kind in ("v5p", "tpu7x") else 2


def wraps(grid: tuple[int, ...]) -> tuple[bool, bool, bool]:
    """Along which axes the last chip of a TPU slice has a link to the first (same pages): in three
    dimensions along all from one cube of 4 x 4 x 4 on, in two along an axis as long as a pod's, 16.

    libtpu takes a slice for a mesh without such links unless it is told; over more than 32 chips it
    then makes each gather a sum of arrays filled up with zeros, at twice the traffic.
    """
    if len(grid) == 3:
        return (all(n % 4 == 0 for n in grid),) * 3
    x, y = grid
    return x == 16, y == 16, False


def devices(of: Machine) -> list[Any]:
    """Its devices, to build a mesh of and to compile for; they hold no arrays.

    Raises:
      PlanError: the compiler for it is not installed, or knows no such arrangement.
    """
    import jax

    _, kind, size = _parts(of.name)
    if kind == "cpu":
        found = jax.devices("cpu")
        if len(found) < of.chips:
            raise PlanError(f"--on {of.name}: this process simulates {len(found)} CPU devices")
        return found[: of.chips]
    if of.chip.platform == "gpu":
        from llama_jax.chips import gpu_topology

        try:
            return list(gpu_topology(kind, int(size)))
        except (RuntimeError, ValueError) as e:
            extra = "; pip install 'llama_jax[cuda]' has it" * isinstance(e, RuntimeError)
            raise PlanError(f"--on {of.name}: {e}{extra}") from e
    if importlib.util.find_spec("libtpu") is None:
        raise PlanError(
            f"--on {of.name}: the TPU compiler is not installed: pip install 'llama_jax[tpu]' "
            "(package libtpu; no TPU is needed)"
        )
    from jax.experimental import topologies

    in_slice = of.chips // of.slices
    grid = tuple(map(int, size.split("x"))) if in_slice > 1 else (1,) * grid_axes(kind)
    name = f"{kind}:{'x'.join(map(str, grid))}"
    options: dict[str, Any] = {"wrap": wraps(grid), "num_slices": of.slices}
    if in_slice < 4:  # less than a host
        options["chips_per_host_bounds"] = (*grid, 1)[:3]
    try:
        topology = topologies.get_topology_desc(platform="tpu", topology_name=name, **options)
    except Exception as e:  # jaxlib's own type, which it does not export on every version
        reason = str(e).split("\n")[0]
        raise PlanError(
            f"--on {of.name}: the TPU compiler knows no such grid ({reason}); there are "
            f"{of.chip.grids}"
        ) from e
    return list(topology.devices)
