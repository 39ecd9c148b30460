"""Counts the VLIW bundles of a TPU kernel's loops in the schedule that libtpu dumps.

One bundle issues per cycle, so bundles are cycles without waits for memory. A kernel's grid is a
loop of its schedule, like each loop in its body. Branches count as taken.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

FORWARD = ("program", "rotate_k", "full", "partial")
BACKWARD = ("program", "rotate_k", "prepare", "keys", "full", "partial", "finish_q", "finish_k")
"""Loops of our attention kernels in code order; the first is the grid. Streamed keys are not
rotated in the kernel, which then has no rotate_k."""


class Loop(NamedTuple):
    """Addresses of a loop's first bundle and of the one after its last."""

    start: int
    stop: int


class Blocks(NamedTuple):
    """Trip counts of the loops for one query head of T causal positions."""

    G: int
    blocks: int
    """blocks of queries, and of keys: T / block length"""
    forward: int
    """chunks of keys in the forward kernel"""
    backward: tuple[int, int]
    """chunks of queries and of keys in the backward kernel"""


def compiler_options(folder: str) -> dict[str, str]:
    """Environment in which libtpu, when loaded, dumps its schedules to a folder."""
    return {
        "JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",
        "LIBTPU_INIT_ARGS": f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
        " --xla_jf_dump_llo_pass_label_regex=final_bundles",
    }  # fmt: skip


def take(folder: str) -> dict[str, list[Loop]]:
    """Loops of each Pallas kernel compiled since the last call; empties the folder."""
    kernels = {}
    for path in sorted(Path(folder).iterdir()):
        kernel = re.fullmatch(r"\d+-(.*?)-\d+-final_bundles.txt", path.name)
        if kernel and re.search("rotary|splash", kernel[1]):
            kernels[kernel[1]] = loops_of(path.read_text())
        path.unlink()
    return kernels


def loops_of(schedule: str) -> list[Loop]:
    """Loops in address order: from a bundle marked as a loop body to the branch back to it."""
    address, body, loops = 0, False, []
    starts: dict[str, int] = {}
    for line in schedule.splitlines():
        if found := re.match(r"\s*(0x[0-9a-f]+|0)\s+([A-Z]{2})?.*\{", line):
            address, body = int(found[1], 16), found[2] == "LB"
        for region in re.findall(r"Start region (\d+)", line):
            if body:
                starts.setdefault(region, address)
        for region in re.findall(r"sbr\.rel \([^)]*\) target = \$region(\d+)", line):
            if region in starts:
                # Four more bundles issue before the branch takes effect.
                loops.append(Loop(starts[region], address + 5))
    return sorted(loops, key=lambda x: (x.start, -x.stop))


def own_bundles(loops: Sequence[Loop]) -> list[int]:
    """Bundles of each loop, without those of loops inside it."""

    def count(loop: Loop) -> int:
        inside = lambda a, b: a != b and b.start <= a.start and a.stop <= b.stop
        inner = [x for x in loops if inside(x, loop)]
        direct = [x for x in inner if not any(inside(x, y) for y in inner)]
        return loop.stop - loop.start - sum(x.stop - x.start for x in direct)

    return list(map(count, loops))


def by_loop(way: str, loops: Sequence[Loop]) -> dict[str, int]:
    """Bundles of one iteration of each loop of our attention kernel, by the loop's name.

    Raises:
      ValueError: the kernel has another number of loops.
    """
    names: tuple[str, ...] = FORWARD if way == "forward" else BACKWARD
    if len(loops) == len(names) - 1:
        names = tuple(name for name in names if name != "rotate_k")
    if len(loops) != len(names):
        raise ValueError(f"{way} kernel: {len(loops)} loops, expected {names}")
    return dict(zip(names, own_bundles(loops), strict=True))


def per_head(way: str, own: Mapping[str, int], blocks: Blocks) -> int:
    """Bundles per query head, without documents; G heads share the rotation of keys."""
    G, n, forward, (queries, keys) = blocks
    trips = {"rotate_k": n / G, "full": n * (n - 1) // 2, "partial": n}
    if way == "forward":
        trips["program"] = n * forward
    else:
        trips |= {"program": queries * keys, "prepare": n, "keys": n * queries,
                  "finish_q": n, "finish_k": n / G}  # fmt: skip
    return round(sum(count * trips[name] for name, count in own.items()))
