"""Counts the VLIW bundles of a TPU kernel's loops in the schedule that libtpu dumps.

One bundle issues per cycle, but a bundle can wait for memory or for the matrix unit, so a count is
a lower bound of the cycles, never a time. The products of a step need a number of cycles of their
own, the floor; a step is counted as its bundles or its floor, whichever is more. A kernel's grid is
a loop of its schedule, like each loop in its body. Branches count as taken.
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
    """How our attention kernels divide the T causal positions of G query heads of a key head."""

    chip: str
    T: int
    H: int
    G: int
    heads: int
    """query heads per step"""
    block_q: int
    block_k: int
    """queries and keys per step"""
    forward: int
    """chunks of keys in the forward kernel"""
    backward: tuple[int, int]
    """chunks of queries and of keys in the backward kernel"""


MXU = {"v5e": (4 * 128**2, 128), "v5p": (4 * 128**2, 128),
       "v6e": (4 * 256**2, 256), "tpu7x": (4 * 256**2, 256)}  # fmt: skip
"""Multiplications per cycle of a core (published FLOP/s divided by two and by the clock, 1.5, 1.75,
1.75 and 2.2 GHz) and the side of its matrix units. A product that contracts over H < side, or has
H < side columns, uses H / side of a unit."""

PRODUCTS = {"forward": 2, "backward": 5}


def mxu_floor(chip: str, products: int, scores: int, H: int) -> int:
    """Cycles that the matrix units need at least for the products of a block.

    Args:
      chip: a key of :data:`MXU`.
      products: number of products.
      scores: number of scores of the block.
      H: head dimension.
    """
    rate, side = MXU[chip]
    return products * scores * -(-H // side) * side // rate


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
    """Bundles, or cycles, per query head, without documents; G heads share the rotated keys.

    Args:
      way: "forward" or "backward".
      own: bundles or cycles of each loop.
      blocks: how the kernel divides the positions.
    """
    _, T, _, G, heads, block_q, block_k, forward, (queries, keys) = blocks
    n, n_k = T // block_q, T // block_k
    full = sum(i * block_q // block_k for i in range(n))
    visited = sum(-(-(i + 1) * block_q // block_k) for i in range(n))
    trips: dict[str, float] = {"full": full, "partial": visited - full}
    trips["rotate_k"] = n_k * heads / G
    if way == "forward":
        trips["program"] = n * forward
    else:
        trips |= {"program": queries * keys, "prepare": n, "keys": n_k * queries,
                  "finish_q": n, "finish_k": n_k * heads / G}  # fmt: skip
    return round(sum(count * trips[name] for name, count in own.items()) / heads)


def count_head(way: str, own: Mapping[str, int], blocks: Blocks) -> dict[str, int]:
    """Per query head: bundles, cycles of the products, and the larger of both, step by step.

    Args:
      way: "forward" or "backward".
      own: bundles of each loop, from :func:`by_loop`.
      blocks: how the kernel divides the positions.
    """
    scores = blocks.heads * blocks.block_q * blocks.block_k
    step = mxu_floor(blocks.chip, PRODUCTS[way], scores, blocks.H)
    floor = {name: step if name in ("full", "partial") else 0 for name in own}
    at_least = {name: max(n, floor[name]) for name, n in own.items()}
    counts = {"bundles": own, "mxu_floor": floor, "at_least": at_least}
    return {name: per_head(way, loops, blocks) for name, loops in counts.items()}


def blocks_of(chip: str, T: int, H: int, G: int) -> Blocks:
    """The blocks of our kernels for bfloat16 without documents, on the chip of the mesh.

    Args:
      chip: its name, a key of :data:`MXU`.
      T: number of positions.
      H: head dimension.
      G: query heads per key head.
    """
    from pallas_kernels.rotary_attention_tpu_sizes import sizes

    heads, block_q, block_k, keys, *backward, _, _ = sizes(T, T, H, G, 2, documents=False)
    chunks = T // backward[0], T // backward[1]
    return Blocks(chip, T, H, G, heads, block_q, block_k, T // keys, chunks)
