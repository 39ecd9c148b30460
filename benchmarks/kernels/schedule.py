"""Bundles of a TPU kernel's loops, counted in the schedule that libtpu writes down.

A bundle issues a cycle: bundles are cycles without waits for memory. A kernel's grid is a loop of
its schedule, and so is each loop in its body. Branches not taken count as if they were.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

FORWARD = ("program", "turn_k", "clear", "masked")
BACKWARD = ("program", "turn_k", "prepare", "keys", "clear", "masked", "finish_q", "finish_k")
"""Loops of our attention kernels in the order of their code; the first is the grid's. Where keys
are streamed, nothing turns them in the kernel and there is no turn_k."""


class Loop(NamedTuple):
    """Addresses of a loop's first bundle and of the one after its last."""

    start: int
    stop: int


class Blocks(NamedTuple):
    """How often the loops run for one query head of T causal positions."""

    G: int
    blocks: int
    """of queries, and of keys: T over a block's length"""
    forward: int
    """parts that the keys come to VMEM in, forward"""
    backward: tuple[int, int]
    """parts that the queries and the keys come in, backward"""


def compiler_options(folder: str) -> dict[str, str]:
    """Environment in which libtpu, loaded after, writes its schedules to a folder."""
    return {
        "JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",
        "LIBTPU_INIT_ARGS": f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
        " --xla_jf_dump_llo_pass_label_regex=final_bundles",
    }  # fmt: skip


def take(folder: str) -> dict[str, list[Loop]]:
    """The loops of each Pallas kernel compiled since the last call; empties the folder."""
    kernels = {}
    for path in sorted(Path(folder).iterdir()):
        kernel = re.fullmatch(r"\d+-(.*?)-\d+-final_bundles.txt", path.name)
        if kernel and re.search("rotary|splash", kernel[1]):
            kernels[kernel[1]] = loops_of(path.read_text())
        path.unlink()
    return kernels


def loops_of(schedule: str) -> list[Loop]:
    """Loops by address: a bundle marked as a loop's body, and the branch back to its region."""
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
                # Four more bundles issue before the branch is taken.
                loops.append(Loop(starts[region], address + 5))
    return sorted(loops, key=lambda x: (x.start, -x.stop))


def own_bundles(loops: Sequence[Loop]) -> list[int]:
    """For each loop, the bundles that are in none of the loops inside it."""

    def count(loop: Loop) -> int:
        inside = lambda a, b: a != b and b.start <= a.start and a.stop <= b.stop
        inner = [x for x in loops if inside(x, loop)]
        direct = [x for x in inner if not any(inside(x, y) for y in inner)]
        return loop.stop - loop.start - sum(x.stop - x.start for x in direct)

    return list(map(count, loops))


def by_loop(way: str, loops: Sequence[Loop]) -> dict[str, int]:
    """Bundles of one turn of each loop of our attention kernel, by the loop's name.

    Raises:
      ValueError: the kernel's loops are not those that are known here.
    """
    names: tuple[str, ...] = FORWARD if way == "forward" else BACKWARD
    if len(loops) == len(names) - 1:
        names = tuple(name for name in names if name != "turn_k")
    if len(loops) != len(names):
        raise ValueError(f"{way} kernel: {len(loops)} loops where {names} are known")
    return dict(zip(names, own_bundles(loops), strict=True))


def a_head(way: str, own: Mapping[str, int], blocks: Blocks) -> int:
    """Bundles a query head, without documents; what turns keys is shared by G heads."""
    G, n, forward, (queries, keys) = blocks
    turns = {"turn_k": n / G, "clear": n * (n - 1) // 2, "masked": n}
    if way == "forward":
        turns["program"] = n * forward
    else:
        turns |= {"program": queries * keys, "prepare": n, "keys": n * queries,
                  "finish_q": n, "finish_k": n / G}  # fmt: skip
    return round(sum(count * turns[name] for name, count in own.items()))
