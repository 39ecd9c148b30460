"""Instruction bundles of our TPU attention and of splash attention, counted without a TPU.

Compiles our kernel and splash attention for a v5p with the heads of Llama 3 8B and T = 4096, and
multiplies the bundles of each loop in libtpu's schedule by the loop's iterations
(`benchmarks.kernels.schedule`). Splash attention gets rotated queries and keys, so its count does
not include the rotation. All shapes of our kernels: ``python -m benchmarks.kernels``.

    python -m benchmarks.tpu_static      writes benchmarks/results/tpu_static.json
"""

import argparse
import importlib.metadata
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence

from benchmarks.common import environment, write
from benchmarks.kernels.schedule import Blocks, Loop, by_loop, compiler_options, per_head, take

CHIP, T, G, H = "v5p", 4096, 4, 128
SPLASH_BLOCK = 1024


def main() -> None:
    """Compile each kernel, count, and write the result."""
    arguments = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    arguments.add_argument("--compile", choices=COMPILED, help="compile this one and exit")
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
        "machine": environment(),
        "compiler": compiler,
        "shape": shape,
        "bundles_per_head": counts,
        **compared,
    }
    write("tpu_static", result)


# Counting -----------------------------------------------------------------------------------------


def ours(kernels: dict[str, Sequence[Loop]]) -> dict:
    """Bundles per query head, when all its keys and queries are in VMEM."""
    found: dict = {"loops": {}}
    for way in ("forward", "backward"):
        loops = next(x for name, x in kernels.items() if f"attention_{way}" in name)
        found["loops"][way] = by_loop(way, loops)
        found[way] = per_head(way, found["loops"][way], Blocks(G, T // 512, 1, (1, 1)))
    return found


def splash(kernels: dict[str, list[Loop]]) -> dict:
    """Bundles per query head: the grid's body, with its inner loop unrolled, once per block."""
    n = T // SPLASH_BLOCK
    bodies = {name: loops[0].stop - loops[0].start for name, loops in kernels.items()}
    total = {name: body * n * (n + 1) // 2 for name, body in bodies.items()}
    forward = sum(count for name, count in total.items() if "fwd" in name)
    return {"loops": bodies, "forward": forward, "backward": sum(total.values()) - forward}


def schedules(name: str) -> dict[str, list[Loop]]:
    """The loops of each Pallas kernel of a program, compiled in its own process."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "benchmarks.tpu_static", "--compile", name]
        env = os.environ | compiler_options(folder)
        run = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
        if run.returncode:
            raise RuntimeError(f"{name} did not compile:\n{run.stderr[-2000:]}")
        return take(folder)


# Compiling ----------------------------------------------------------------------------------------


def compile_both_ways(name: str) -> None:
    """Compile forward and backward of one key head and its query heads, for one chip."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

    from benchmarks.kernels.cases import both_ways
    from llama_jax.chips import topology

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
