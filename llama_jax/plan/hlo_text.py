"""Parse the text of optimized HLO: instructions, types, loops, device groups."""

import math
import re
from typing import NamedTuple

import numpy as np

SIZES = {"pred": 1, "bf16": 2, "f16": 2, "f32": 4, "f64": 8, "c64": 8}
SIZES |= {f"{sign}{n}": max(n // 8, 1) for sign in "su" for n in (2, 4, 8, 16, 32, 64)}


class Op(NamedTuple):
    """An instruction: name, result type, opcode, names of operands, and the whole line."""

    name: str
    type: str
    kind: str
    operands: tuple[str, ...]
    line: str


def parse(text: str) -> tuple[dict[str, dict[str, Op]], str]:
    """Computations by name, each with its instructions in order; and the entry's name."""
    computations: dict[str, dict[str, Op]] = {}
    entry, current, pending = "", None, ""

    def finish() -> None:
        op = _op(pending)
        if op is not None and current is not None:
            computations[current][op.name] = op

    for line in text.splitlines():
        if start := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            current = start[2]
            computations[current] = {}
            entry = current if start[1] else entry
            pending = ""
        elif line.startswith("}"):
            finish()
            current, pending = None, ""
        elif current is not None:
            if re.match(r"\s+(ROOT )?%?[\w.\-]+ = ", line):
                finish()
                pending = line.strip()
            else:
                pending += " " + line.strip()
    return computations, entry


_OP = re.compile(r"(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\(")


def _op(line: str) -> Op | None:
    line = re.sub(r"/\*.*?\*/", "", line)
    found = _OP.match(line)
    if not found:
        return None
    operands = re.match(r"[^()]*(?:\([^()]*\)[^()]*)*", line[found.end() :])
    names = re.findall(r"%([\w.\-]+)", operands[0]) if operands else []
    return Op(found[1], found[2], found[3], tuple(names), line)


def arrays(type_: str) -> list[tuple[str, tuple[int, ...]]]:
    """(dtype, shape) of each array of a type."""
    found = re.findall(r"\b([a-z]+\d*\w*)\[([\d,]*)\]", type_)
    return [(d, tuple(map(int, filter(None, s.split(","))))) for d, s in found if item_bytes(d)]


def num_bytes(type_: str) -> int:
    """Bytes of a type; of a tuple, the sum."""
    return sum(item_bytes(dtype) * math.prod(shape) for dtype, shape in arrays(type_))


def memory_bytes(type_: str) -> int:
    """As :func:`num_bytes`, without arrays in a TPU's on-chip memory (memory space 1)."""
    return num_bytes(re.sub(r"\b\w+\[[\d,]*\]\{[^}]*S\(1\)[^}]*\}", "", type_))


def item_bytes(dtype: str) -> int:
    """Bytes per element; 0 for a type without elements (token)."""
    return 1 if dtype.startswith("f8") else SIZES.get(dtype, 0)


def called(op: Op, attribute: str) -> str:
    """The computation that an attribute names; empty if there is none."""
    found = re.search(rf"\b{attribute}=%?([\w.\-]+)", op.line)
    return found[1] if found else ""


def all_called(op: Op) -> list[str]:
    """Every computation that a call or a conditional may run."""
    found = re.findall(
        r"\b(?:to_apply|calls|true_computation|false_computation)=%?([\w.\-]+)", op.line
    )
    if branches := re.search(r"branch_computations=\{([^}]*)\}", op.line):
        found += re.findall(r"%?([\w.\-]+)", branches[1])
    return found


def trip_count(computations: dict[str, dict[str, Op]], op: Op) -> int:
    """Iterations of a `while`: from XLA's annotation, or the constant in its condition.

    Raises:
      ValueError: it has neither.
    """
    if known := re.search(r'known_trip_count"?:\{"n":"?(\d+)', op.line):
        return int(known[1])
    condition = computations[called(op, "condition")].values()
    limits = [
        int(found[1])
        for each in condition
        if (found := re.search(r"[su]32\[\]\S* constant\((\d+)\)", each.line))
    ]
    if not limits:
        raise ValueError(f"trip count of {op.name} is unknown: its condition has no constant")
    return max(1, -(-max(limits) // _loop_step(computations, op)))


def _loop_step(computations: dict[str, dict[str, Op]], op: Op) -> int:
    """The increment of a loop's counter: 1, or 2 if XLA unrolled the loop by two."""
    condition = computations[called(op, "condition")]
    body = computations[called(op, "body")]
    counter = next((x for x in condition.values() if x.kind == "get-tuple-element"), None)
    root = next((x for x in body.values() if x.line.startswith("ROOT")), None)
    index = re.search(r"index=(\d+)", counter.line) if counter else None
    if index is None or root is None or int(index[1]) >= len(root.operands):
        return 1
    step = body.get(root.operands[int(index[1])])
    for name in step.operands if step and step.kind == "add" else ():
        if name in body and (found := re.search(r"constant\((\d+)\)", body[name].line)):
            return int(found[1])
    return 1


def first_group(line: str) -> tuple[int, ...]:
    """Devices of a collective's first group, as indices in mesh order; empty: all devices.

    HLO writes groups as lists, as a reshaped and transposed range, or as axes of a mesh.
    """
    if pairs := re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", line):
        return int(pairs[1]), int(pairs[2])
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", line):
        return tuple(map(int, listed[1].split(",")))
    number = r"\[([\d,]+)\]"
    if ranged := re.search(rf"replica_groups={number}<={number}(?:T\(([\d,]+)\))?", line):
        to, shape = (list(map(int, ranged[i].split(","))) for i in (1, 2))
        ids = np.arange(math.prod(shape)).reshape(shape)
        if ranged[3]:
            ids = ids.transpose(list(map(int, ranged[3].split(","))))
        return tuple(ids.reshape(to)[0].tolist())
    if meshed := re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\S+)? ?\{([^}]*)\}", line
    ):
        return _mesh_group(meshed[1], meshed[2])
    return ()


def _mesh_group(mesh: str, axes: str) -> tuple[int, ...]:
    """A group along axis ``'axis_1'``, or along part of an axis, as in ``'axis_0':(2)4``."""
    sizes = {k: int(n) for k, n in re.findall(r"'(\w+)'=(\d+)", mesh)}
    stride, strides = 1, {}
    for name in reversed(sizes):
        strides[name] = stride
        stride *= sizes[name]
    ids = np.zeros(1, int)
    for name, before, size in re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", axes):
        n = int(size) if size else sizes[name]
        step = strides[name] * (sizes[name] // (int(before) * n) if size else 1)
        ids = (ids[:, None] + step * np.arange(n)).reshape(-1)
    return tuple(ids.tolist())
