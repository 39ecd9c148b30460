"""Count what a compiled program does on one device, from the text of its optimized HLO.

XLA's own `cost_analysis` counts the body of a loop once; here it counts once per iteration.
"""

import dataclasses
import json
import math
import re
from collections import Counter
from typing import NamedTuple

from llama_jax.plan.hlo_text import (
    Op,
    all_called,
    arrays,
    called,
    first_group,
    item_bytes,
    memory_bytes,
    num_bytes,
    parse,
    trip_count,
)

COLLECTIVES = (
    "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute",
    "ragged-all-to-all", "collective-broadcast",
)  # fmt: skip
_TRANSFERS = (*COLLECTIVES, "send", "recv")
# Ops that move no bytes themselves.
_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional",
    "call", "after-all", "partition-id", "replica-id", "iota", "opt-barrier", "async-done",
}  # fmt: skip


class Collective(NamedTuple):
    """A kind of collective, and the devices of its first group."""

    kind: str
    group: tuple[int, ...]
    slices: int = 0
    """number of TPU slices of a transfer through their hosts (``group`` is empty); otherwise 0"""


@dataclasses.dataclass
class Cost:
    """Totals of one execution on one device."""

    flops: float = 0.0
    """of matmuls, and what kernels declare"""
    bytes: float = 0.0
    """read and written in memory by each fusion, matmul and copy: an upper bound"""
    cycles: float = 0.0
    """estimated by the TPU compiler; 0 on other platforms"""
    matmul_cycles: float = 0.0
    """of fusions with a matmul, and of kernels"""
    collectives: Counter[Collective] = dataclasses.field(default_factory=Counter)
    """bytes of the whole arrays that are gathered, reduced or moved"""
    collective_counts: Counter[Collective] = dataclasses.field(default_factory=Counter)
    kernels: Counter[str] = dataclasses.field(default_factory=Counter)
    """calls of Pallas and cuDNN kernels, by name"""
    kernels_without_flops: int = 0
    """calls of kernels that declare no FLOPs"""
    launches: int = 0
    """on a GPU, kernels launched: fusions, products, copies and calls of kernels"""

    def by_kind(self) -> dict[str, float]:
        """Bytes of each kind of collective."""
        total: Counter[str] = Counter()
        for collective, size in self.collectives.items():
            total[collective.kind] += size
        return dict(total)


def count(text: str, cycle_flops: float = 0.0, cycle_bytes: float = 0.0) -> Cost:
    """Count a program.

    Args:
      text: `jax.stages.Compiled.as_text()`.
      cycle_flops: FLOPs of a TPU per clock cycle. With ``cycle_bytes``, it turns the FLOPs and
        bytes that a kernel declares into cycles, which the compiler does not estimate.
      cycle_bytes: bytes of memory traffic per clock cycle.
    """
    computations, entry = parse(text)
    counter = _Counter(computations, cycle_flops, cycle_bytes)
    counter.computation(entry, 1)
    return counter.cost


def is_launch(op: Op) -> bool:
    """Whether an instruction that is no loop, branch or call starts a kernel or copy on a GPU."""
    return op.kind not in _FREE and not op.kind.endswith(("-done", "async-update"))


class _Counter:
    def __init__(self, computations, cycle_flops, cycle_bytes):
        self.computations = computations
        self.cycle_flops, self.cycle_bytes = cycle_flops, cycle_bytes
        self.cost = Cost()
        self.chains: set[tuple[str, str]] = set()

    def computation(self, name: str, times: int) -> None:
        """Count a computation that runs ``times`` times."""
        for op in self.computations[name].values():
            if op.kind == "while":
                trips = trip_count(self.computations, op)
                self.computation(called(op, "body"), times * trips)
            elif op.kind in ("call", "conditional", "async-start", "call-start"):
                for inner in all_called(op):
                    if inner in self.computations:
                        self.computation(inner, times)
            else:
                self._instruction(self.computations[name], op, times)

    def _instruction(self, table: dict[str, Op], op: Op, times: int) -> None:
        inner = self.computations.get(called(op, "calls"), {}) if op.kind == "fusion" else {}
        flops = _matmul_flops(table, op) + self._fused(inner, called(op, "calls"), times)
        self._collective(op, "", times)
        self.cost.launches += times * is_launch(op)
        moved: float = 0 if op.kind in _FREE else self._moved(table, op, inner)
        cycles = _estimated_cycles(op)
        is_matmul = flops > 0
        if op.kind == "custom-call" and (declared := _kernel(op)) is not None:
            kernel_flops, kernel_bytes = declared
            kernel_flops = kernel_flops or _cudnn_flops(table, op) or _quantized_flops(table, op)
            is_matmul = True
            self.cost.kernels[_kernel_name(op)] += times
            self.cost.kernels_without_flops += 0 if kernel_flops or flops else times
            flops += kernel_flops
            moved = kernel_bytes or moved - _in_place(table, op)
            if not cycles and self.cycle_flops:
                cycles = max(kernel_flops / self.cycle_flops, moved / self.cycle_bytes)
        self.cost.flops += flops * times
        self.cost.bytes += moved * times
        self.cost.cycles += cycles * times
        self.cost.matmul_cycles += cycles * times * is_matmul

    def _fused(self, inner: dict[str, Op], name: str, times: int) -> float:
        """FLOPs of a fused computation; also counts its collectives."""
        flops = 0.0
        for op in inner.values():
            flops += _matmul_flops(inner, op)
            self._collective(op, name, times)
            if op.kind == "fusion":
                deeper = called(op, "calls")
                flops += self._fused(self.computations.get(deeper, {}), deeper, times)
        return flops

    def _collective(self, op: Op, inside: str, times: int) -> None:
        kind = op.kind.removesuffix("-start")
        if kind == "send" and (between := _between_slices(op)):
            self._add(*between, times)
            return
        if kind not in COLLECTIVES:
            return
        # On TPU a gather may be split to overlap with matmuls; its pieces share a chain id.
        if chain := re.search(r'chain_id="(\d+)"', op.line):
            channel = re.search(r"channel_id=(\d+)", op.line)
            key = (chain[1], channel[1] if channel else "")
            if key in self.chains:
                return
            self.chains.add(key)
        group = first_group(op.line)
        if len(group) == 1:
            return
        size = _whole(op, len(group))
        # On TPU a reduce-scatter is a fusion with this name that contains an all-reduce.
        if kind == "all-reduce" and inside.startswith("all-reduce-scatter"):
            kind = "reduce-scatter"
        self._add(Collective(kind, group), size, times)

    def _add(self, collective: Collective, size: int, times: int) -> None:
        self.cost.collectives[collective] += size * times
        self.cost.collective_counts[collective] += times

    def _moved(self, table: dict[str, Op], op: Op, inner: dict[str, Op]) -> float:
        """Bytes that an instruction reads and writes in main memory; for slices and in-place
        updates, only the part that is touched."""
        if op.kind.endswith("-done") or op.kind.removesuffix("-start") in _TRANSFERS:
            return 0.0
        if op.kind == "dynamic-slice":
            stack = table[op.operands[0]].type
            return memory_bytes(op.type) + (num_bytes(op.type) if memory_bytes(stack) else 0.0)
        if op.kind == "dynamic-update-slice":
            return 2.0 * memory_bytes(table[op.operands[1]].type)
        parameters = [x for x in inner.values() if x.kind == "parameter"]
        if not parameters:
            read = math.fsum(memory_bytes(table[x].type) for x in op.operands if x in table)
            return read + memory_bytes(op.type)
        read = math.fsum(self._read(inner, x) for x in parameters)
        root = next(x for x in inner.values() if x.line.startswith("ROOT"))
        roots = [inner[x] for x in root.operands] if root.kind == "tuple" else [root]
        return read + math.fsum(_written(inner, x) for x in roots)

    def _read(self, inner: dict[str, Op], op: Op) -> float:
        """Bytes that a fused computation reads of a parameter, or of a bitcast of it."""
        total, whole = 0.0, memory_bytes(op.type)
        for user in inner.values() if whole else ():
            for i, name in enumerate(user.operands):
                if name != op.name:
                    continue
                if user.kind == "bitcast":
                    total += self._read(inner, user)
                elif user.kind in ("dynamic-slice", "slice", "gather") and i == 0:
                    total += num_bytes(user.type)
                elif user.kind == "dynamic-update-slice" and i == 0:
                    continue
                elif user.kind == "fusion":
                    deeper = self.computations[called(user, "calls")]
                    total += self._read(deeper, _parameter(deeper, i))
                else:
                    return whole
        return min(total, whole)


def _between_slices(op: Op) -> tuple[Collective, int] | None:
    """The collective that a send to other TPU slices belongs to, and the bytes of its array."""
    kind = re.search(r'_xla_megascale_transfer_type="(\w+)"', op.line)
    target = re.search(r'_xla_megascale_target="\{([\d,:]+)\}', op.line)
    if kind is None or target is None:
        return None
    slices = 0
    for each in target[1].split(","):
        first, _, last = each.partition(":")
        slices += int(last or first) - int(first) + 1
    sent = arrays(op.type)[:1]
    size = sum(item_bytes(dtype) * math.prod(shape) for dtype, shape in sent)
    name = kind[1].lower().replace("_", "-")
    size *= slices if name == "all-gather" else 1
    return Collective(name, (), slices), size


def _whole(op: Op, members: int) -> int:
    """Bytes of the whole array that a collective gathers, reduces or moves."""
    sizes = [item_bytes(dtype) * math.prod(shape) for dtype, shape in arrays(op.type)]
    before: list[int] = []
    if op.kind.endswith("-start") and op.kind != "all-reduce-start" and op.type.startswith("("):
        # The type is (operands, results), for a permute followed by two 4-byte counters.
        n = len(op.operands)
        before, sizes = sizes[:n], sizes[n : 2 * n]
    if op.kind.startswith("reduce-scatter"):
        return sum(before) or sum(sizes) * members
    return sum(sizes)


def _matmul_flops(table: dict[str, Op], op: Op) -> float:
    """2 b m n k for a matmul in any form (dot, convolution, library call); 0 for any other op.

    |left| |right| |out| = b^3 (m n k)^2, and the op's attributes give b.
    """
    gemm = op.kind == "custom-call" and re.search(r"__(?:cublas|triton_gemm)|\$matmul", op.line)
    if op.kind not in ("dot", "convolution") and not gemm:
        return 0.0
    left, right = (arrays(table[name].type)[0][1] for name in op.operands[:2])
    out = arrays(op.type)[0][1]
    if labels := re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", op.line):
        sizes = zip(labels.groups(), (left, right, out), strict=True)
        at = [{c: shape[i] for i, c in enumerate(word)} for word, shape in sizes]
        shared = [at[2][c] for c in at[2] if c.isdigit() and at[0][c] == at[1][c] == at[2][c]]
        batch = math.prod(shared)
    else:
        dims = re.search(r'lhs_batch_dim(?:s|ensions"?)[=:][\{\[]([^}\]]*)[\}\]]', op.line)
        batch = math.prod(left[int(i)] for i in re.findall(r"\d+", dims[1])) if dims else 1
    product = math.prod(left) * math.prod(right) * math.prod(out)
    return 2.0 * math.sqrt(product / batch)


def _parameter(inner: dict[str, Op], number: int) -> Op:
    return next(
        x for x in inner.values() if x.kind == "parameter" and f"parameter({number})" in x.line
    )


def _written(inner: dict[str, Op], op: Op) -> float:
    while op.kind == "bitcast":
        op = inner[op.operands[0]]
    if op.kind == "dynamic-update-slice":
        return memory_bytes(inner[op.operands[1]].type)
    return memory_bytes(op.type) if op.kind != "parameter" else 0.0


def _estimated_cycles(op: Op) -> float:
    found = re.search(r'"estimated_cycles":"(\d+)"', op.line)
    return float(found[1]) if found else 0.0


_KERNELS = re.compile(
    r'custom_call_target="(tpu_custom_call|__gpu\$xla\.gpu\.triton|mosaic_gpu\w*|__cudnn\$fmha\w*)"'
)


def _kernel(op: Op) -> tuple[float, float] | None:
    """(FLOPs, bytes) that a kernel declares, zeros if it does not; None for any other op."""
    if not _KERNELS.search(op.line):
        return None
    found = re.search(r'"cost_estimate":(\{[^}]*\})', op.line)
    declared = json.loads(found[1]) if found else {}
    return float(declared.get("flops", 0)), float(declared.get("bytes_accessed", 0))


def _in_place(table: dict[str, Op], op: Op) -> float:
    """Bytes of the arrays that a kernel updates in place, read and written: how much of such an
    array (a cache) it touches is unknown."""
    pairs = re.search(r"output_to_operand_aliasing=\{(.*?\)\})", op.line)
    indices = re.findall(r"\((\d+), \{\}", pairs[1]) if pairs else []
    return 2.0 * math.fsum(memory_bytes(table[op.operands[int(i)]].type) for i in indices)


def _cudnn_flops(table: dict[str, Op], op: Op) -> float:
    """FLOPs of cuDNN's attention, from q [B, T, N, H] and k [B, S, K, H]; causal: half. The
    backward pass has five matmuls, the forward pass two."""
    if "__cudnn$fmha" not in op.line:
        return 0.0
    q, k = (arrays(table[name].type)[0][1] for name in op.operands[:2])
    causal = 0.5 if '"mask_type":"CAUSAL"' in op.line else 1.0
    return 4.0 * math.prod(q) * k[1] * causal * (2.5 if "Backward" in op.line else 1.0)


def _quantized_flops(table: dict[str, Op], op: Op) -> float:
    """FLOPs of a quantized product, from x [rows, in] and the result [..., out]."""
    if _kernel_name(op) != "quantized_matmul":
        return 0.0
    x, out = arrays(table[op.operands[0]].type)[0][1], arrays(op.type)[0][1]
    return 2.0 * math.prod(x) * out[-1]


def _kernel_name(op: Op) -> str:
    """A kernel's name: on TPU the instruction's, on GPU the last part of its JAX name stack."""
    name = re.sub(r"[.\d]+$", "", op.name)
    if name not in ("custom-call", "pallas_call"):
        return name
    path = re.search(r'op_name="([^"]*)"', op.line)
    parts = [part for part in path[1].split("/") if part != "pallas_call"] if path else []
    return parts[-1] if parts else name
