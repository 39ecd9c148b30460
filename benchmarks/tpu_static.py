"""How many instructions does attention execute on a TPU, counted without one?

Compiles our kernel and splash attention for a v5p at the heads of Llama 3 8B and T = 4096, has
libtpu write down its final schedule, and counts the bundles (one issues a cycle) of each loop times
the loop's turns: cycles without waits for memory. Branches not taken count as if they were, for
both. Splash is told rotated queries and keys, so the count of its rotary is not in it.

    python -m benchmarks.tpu_static      writes benchmarks/results/tpu_static.json
"""

import argparse
import importlib.metadata
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from benchmarks.tokenise import machine, write

CHIP, T, G, H = "v5p", 4096, 4, 128
FORWARD = ("program", "turn_k", "clear", "masked")
BACKWARD = ("program", "turn_k", "prepare", "keys", "clear", "masked", "finish_q", "finish_k")
"""Loops of our kernels in the order of their code; the first is the grid's."""
SPLASH_BLOCK = 1024


class Loop(NamedTuple):
    """Addresses of a loop's first bundle and of the one after its last."""

    start: int
    stop: int


def main() -> None:
    """Compile each kernel, count, print and keep."""
    arguments = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    arguments.add_argument("--compile", choices=COMPILED, help="only compile this one, here")
    args = arguments.parse_args()
    if args.compile:
        compile_both_ways(args.compile)
        return
    counts = {"ours": ours(schedules("ours"))}
    for name in ("splash", "splash_fused"):
        counts[name] = splash(schedules(name))
    for name, count in counts.items():
        print(name, {k: v for k, v in count.items() if k != "loops"})
    compared = {
        f"backward_of_{name}": round(counts[name]["backward"] / counts["ours"]["backward"], 2)
        for name in ("splash", "splash_fused")
    }
    print(compared)
    shape = dict(chip=CHIP, T=T, queries_a_key_head=G, H=H, dtype="bfloat16", causal=True)
    compiler = f"libtpu {importlib.metadata.version('libtpu')}"
    result = {
        "machine": machine(),
        "compiler": compiler,
        "shape": shape,
        "bundles_a_head": counts,
        **compared,
    }
    write("tpu_static", result)


# Counting -----------------------------------------------------------------------------------------


def ours(kernels: dict[str, list[Loop]]) -> dict:
    """Bundles a query head; the turning of keys and their gradients is shared by G of them."""
    n = T // 512
    pairs = {"clear": n * (n - 1) // 2, "masked": n}
    turns = {
        "forward": {"program": n, "turn_k": n / G, **pairs},
        "backward": {"program": 1, "turn_k": n / G, "prepare": n, "keys": n, **pairs,
                     "finish_q": n, "finish_k": n / G},
    }  # fmt: skip
    found: dict = {"loops": {}}
    for way, names in (("forward", FORWARD), ("backward", BACKWARD)):
        loops = next(x for name, x in kernels.items() if f"attention_{way}" in name)
        if len(loops) != len(names):
            raise ValueError(f"{way} kernel: {len(loops)} loops where {names} are known")
        own = dict(zip(names, map(own_bundles(loops), loops), strict=True))
        found["loops"][way] = own
        found[way] = round(sum(own[name] * turns[way][name] for name in names))
    return found


def splash(kernels: dict[str, list[Loop]]) -> dict:
    """Bundles a query head: the grid's body, whose inner loop is unrolled, for each block run."""
    n = T // SPLASH_BLOCK
    bodies = {name: loops[0].stop - loops[0].start for name, loops in kernels.items()}
    total = {name: body * n * (n + 1) // 2 for name, body in bodies.items()}
    forward = sum(count for name, count in total.items() if "fwd" in name)
    return {"loops": bodies, "forward": forward, "backward": sum(total.values()) - forward}


def own_bundles(loops: list[Loop]):
    """A function: the bundles of a loop that are in none of the loops inside it."""

    def count(loop: Loop) -> int:
        inside = lambda a, b: a != b and b.start <= a.start and a.stop <= b.stop
        inner = [x for x in loops if inside(x, loop)]
        direct = [x for x in inner if not any(inside(x, y) for y in inner)]
        return loop.stop - loop.start - sum(x.stop - x.start for x in direct)

    return count


def schedules(name: str) -> dict[str, list[Loop]]:
    """The loops of each Pallas kernel of a program, from libtpu's dump of its compilation."""
    with tempfile.TemporaryDirectory() as folder:
        env = os.environ | {
            "JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",
            "LIBTPU_INIT_ARGS": f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true",
        }  # fmt: skip
        command = [sys.executable, "-m", "benchmarks.tpu_static", "--compile", name]
        run = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
        if run.returncode:
            raise RuntimeError(f"{name} did not compile:\n{run.stderr[-2000:]}")
        kernels = {}
        for path in sorted(Path(folder).glob("*-final_bundles.txt")):
            kernel = re.fullmatch(r"\d+-(.*?)-\d+-final_bundles.txt", path.name)
            if kernel and re.search("rotary|splash", kernel[1]):
                kernels[kernel[1]] = loops_of(path.read_text())
    return kernels


def loops_of(schedule: str) -> list[Loop]:
    """Loops by address: a bundle marked as a loop's body, and the branch back to its region."""
    address, body, starts, loops = 0, False, {}, []
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


# Compiling ----------------------------------------------------------------------------------------


def compile_both_ways(name: str) -> None:
    """Forward and backward of one key head and its queries, for one chip."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

    from pallas_kernels.bench_cases import both_ways
    from pallas_kernels.chips import topology

    mesh = Mesh(np.array(topology(CHIP)[:1]), ("x",), axis_types=(AxisType.Explicit,))
    everywhere = NamedSharding(mesh, PartitionSpec())
    of = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=everywhere)
    q, k = of(1, T, G, H), of(1, T, 1, H)
    with jax.set_mesh(mesh):
        program = jax.jit(lambda *x: both_ways(COMPILED[name], *x))
        program.lower(q, k, k, q).compile()


def _ours(q, k, v):
    import jax.numpy as jnp

    from pallas_kernels import Rope, rotary_attention

    positions, rope = jnp.arange(T)[None], Rope(jnp.ones(H // 2), 1.0)
    return rotary_attention(q, k, v, positions, rope, implementation="tpu")


def _splash(q, k, v, fused=False):
    import jax
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    block, part = SPLASH_BLOCK, 256
    only_unfused = {} if fused else dict(block_q_dq=block, block_kv_dq=block)
    sizes = kernels.BlockSizes(
        block_q=block, block_kv=block, block_kv_compute=part, block_q_dkv=block,
        block_kv_dkv=block, block_kv_dkv_compute=part, use_fused_bwd_kernel=fused, **only_unfused,
    )  # fmt: skip
    mask = masks.MultiHeadMask([masks.CausalMask((T, T))] * G)
    kernel = kernels.make_splash_mha(mask, head_shards=1, q_seq_shards=1, block_sizes=sizes)
    by_head = lambda x: x.swapaxes(1, 2)
    return by_head(jax.vmap(kernel)(by_head(q), by_head(k), by_head(v)))


COMPILED = {
    "ours": _ours,
    "splash": _splash,
    "splash_fused": lambda q, k, v: _splash(q, k, v, fused=True),
}

if __name__ == "__main__":
    main()
