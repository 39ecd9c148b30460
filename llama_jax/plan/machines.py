"""Machines to plan for, by names such as ``v5p:8x8x8``, ``h100:64`` or ``cpu:8``."""

import dataclasses
import importlib.util
import math
import re
from typing import Any

from llama_jax.chips import CHIPS, GPUS_PER_HOST, Chip, can_compile, gpu_topology, tpu_topology

MAX_CHIPS = 16384  # for many more chips, describing the devices alone takes minutes

EXAMPLES = (
    "v5e:16x16, v5p:8x8x8, 2xv5e:16x16, v6e:16x16, tpu7x:4x4x4, a100:2048, h100:64, h200:8, cpu:8"
)


class PlanError(ValueError):
    """A plan that cannot be made; the message says why and what to do."""


@dataclasses.dataclass(frozen=True)
class Machine:
    """A number of equal chips.

    Example:
      >>> parse_machine("2xv5e:4x4").chips
      32
    """

    name: str
    chip: Chip
    chips: int
    slices: int = 1
    """groups of chips with fast links (TPU slices, hosts of 8 GPUs), joined by the data-center
    network"""

    @property
    def host_is_slice(self) -> bool:
        """True for GPUs: a slice is a host. Otherwise JAX devices have a `slice_index`."""
        return self.chip.platform == "gpu"

    @property
    def devices(self) -> int:
        """Number of JAX devices."""
        return self.chips * self.chip.devices

    def rates(self) -> str:
        """Rates of a device, on one line."""
        c = self.chip
        ici = f", {c.interconnect_name} {c.interconnect:g} GB/s" if self.devices > 1 else ""
        other = "hosts" if self.host_is_slice else "slices"
        dcn = f", {c.dcn:g} GB/s to other {other}" if c.dcn and self.slices > 1 else ""
        return f"{c.tflops:g} TFLOP/s, memory {c.bandwidth:.0f} GB/s{ici}{dcn}"


def parse_machine(name: str, inference: bool = False) -> Machine:
    """Parse the name of a machine; the compiler is not asked whether it knows the topology.

    Args:
      name: ``v5p:8x8x8`` is a slice with that topology, ``2xv5e:4x4`` two slices, ``h100:64`` 64
        GPUs.
      inference: accept every chip with known memory; otherwise those that XLA can compile for.

    Raises:
      PlanError: no such chip, or no such topology.
    """
    num_slices, kind, size = _parts(name)
    known = [k for k, c in CHIPS.items() if c.memory and (can_compile(k) or inference)]
    if inference:
        known.remove("cpu")
    if kind not in known:
        raise PlanError(
            f"--on {name}: no chip {kind!r}; known: {', '.join(known)} (as v5p:8x8x8, h100:64)"
        )
    chip = CHIPS[kind]
    is_tpu, topologies = chip.platform == "tpu", ", ".join(chip.topologies)
    valid = re.fullmatch(r"[1-9]\d{0,6}(x[1-9]\d{0,6})*", size, re.ASCII)
    if not valid or (not is_tpu and "x" in size):
        hint = f" or their topology, one of {topologies}" if is_tpu else f", as in {kind}:8"
        raise PlanError(f"--on {name}: give the number of chips{hint}")
    shape = [int(n) for n in size.split("x")]
    if is_tpu and len(shape) != chip.topology_axes and shape != [1]:
        raise PlanError(
            f"--on {name}: topologies of {kind} have {chip.topology_axes} axes, as in {topologies}"
        )
    chips = math.prod(shape)
    if chips > chip.max_chips:
        unit = "slice" if is_tpu else "machine"
        raise PlanError(f"--on {name}: the largest {unit} of {kind} has {chip.max_chips:,} chips")
    if num_slices * chips > MAX_CHIPS:
        raise PlanError(f"--on {name}: a plan has at most {MAX_CHIPS:,} chips")
    if is_tpu:
        return Machine(name, chip, num_slices * chips, num_slices)
    if num_slices > 1:
        raise PlanError(f"--on {name}: only TPUs have slices; give all chips, as in {kind}:16")
    hosts = -(-chips // GPUS_PER_HOST) if chip.platform == "gpu" else 1
    return Machine(name, chip, chips, hosts)


def _parts(name: str) -> tuple[int, str, str]:
    """``2xv5e:4x4`` -> (2, "v5e", "4x4")."""
    kind, _, size = name.partition(":")
    found = re.fullmatch(r"([1-9]\d{0,3})x(\w+)", kind)
    return (int(found[1]), found[2], size) if found else (1, kind, size)


def devices(machine: Machine) -> list[Any]:
    """Devices of a machine, to build a mesh of and to compile for; except on cpu they hold no
    arrays.

    Raises:
      PlanError: the compiler for the machine is not installed, or does not know the topology.
    """
    import jax

    _, kind, size = _parts(machine.name)
    if kind == "cpu":
        found = jax.devices("cpu")
        if len(found) < machine.chips:
            raise PlanError(f"--on {machine.name}: this process simulates {len(found)} CPU devices")
        return found[: machine.chips]
    if machine.chip.platform == "gpu":
        try:
            return gpu_topology(kind, int(size))
        except (RuntimeError, ValueError) as e:
            extra = ", or pip install 'llama_jax[cuda]'" * isinstance(e, RuntimeError)
            raise PlanError(f"--on {machine.name}: {e}{extra}") from e
    if importlib.util.find_spec("libtpu") is None:
        raise PlanError(
            f"--on {machine.name}: the TPU compiler is not installed: pip install 'llama_jax[tpu]' "
            "(package libtpu; no TPU is needed)"
        )
    shape = tuple(map(int, size.split("x")))
    if shape == (1,):
        shape *= machine.chip.topology_axes
    try:
        return tpu_topology(kind, shape, machine.slices)
    except Exception as e:  # jaxlib's own type, which some versions do not export
        reason = str(e).split("\n")[0]
        raise PlanError(
            f"--on {machine.name}: the TPU compiler does not know this topology ({reason}); there "
            f"are {', '.join(machine.chip.topologies)}"
        ) from e
