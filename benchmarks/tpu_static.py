"""Cycles that our TPU attention and splash attention need at least, counted without a TPU.

Compiles our kernel and splash attention with the heads of Llama 3 8B and T = 4096, multiplies the
bundles of each loop in libtpu's schedule by the loop's iterations, and takes the cycles of the
matrix unit where its products need more (`benchmarks.kernels.schedule`). Splash attention gets
rotated queries and keys, so its count does not include the rotation. All shapes of our kernels:
``python -m benchmarks.kernels``.

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
from benchmarks.kernels.schedule import (
    MXU,
    PRODUCTS,
    Blocks,
    Loop,
    blocks_of,
    by_loop,
    compiler_options,
    count_head,
    mxu_floor,
    take,
)

T, G, H = 4096, 4, 128
SPLASH_BLOCK = 1024


def main() -> None:
    """Compile each kernel for each chip, count, and write the result."""
    arguments = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    arguments.add_argument("--chips", nargs="+", default=list(MXU), choices=MXU)
    arguments.add_argument("--compile", choices=COMPILED, help="compile this one and exit")
    args = arguments.parse_args()
    if args.compile:
        compile_both_ways(args.compile, args.chips[0])
        return
    chips = {chip: counted(chip) for chip in args.chips}
    for chip, kernels in chips.items():
        for name, ways in kernels.items():
            for way, count in ways.items():
                print(line(chip, name, way, count))
    write("tpu_static", {
        "machine": environment(),
        "compiler": f"libtpu {importlib.metadata.version('libtpu')}",
        "shape": dict(T=T, queries_a_key_head=G, H=H, dtype="bfloat16", causal=True),
        "per_head": chips,
    })  # fmt: skip


def line(chip: str, name: str, way: str, count: dict) -> str:
    """The printed line of one kernel: never the bundles without the floor."""
    return (
        f"{chip:5} {name:12} {way:8} at least {count['at_least']:>7,} cycles per head "
        f"(bundles {count['bundles']:,}, floor of the matrix unit {count['mxu_floor']:,})"
    )


# Counting -----------------------------------------------------------------------------------------


def counted(chip: str, names: Sequence[str] = ("ours", "splash", "splash_fused")) -> dict:
    """name -> way -> counts of each kernel."""
    import jax

    with jax.set_mesh(mesh_of(chip)):
        blocks = blocks_of(chip, T, H, G)
    found = {}
    for name in names:
        kernels = schedules(name, chip)
        found[name] = ours(kernels, blocks) if name == "ours" else splash(chip, name, kernels)
    return found


def ours(kernels: dict[str, Sequence[Loop]], blocks: Blocks) -> dict[str, dict]:
    """Counts per query head, when all its keys are in VMEM."""
    found = {}
    for way in PRODUCTS:
        loops = next(x for name, x in kernels.items() if f"attention_{way}" in name)
        own = by_loop(way, loops)
        found[way] = {"loops": own, **count_head(way, own, blocks)}
    return found


def splash(chip: str, name: str, kernels: dict[str, list[Loop]]) -> dict[str, dict]:
    """Counts per query head: the grid's body, with its inner loop unrolled, once per block."""
    n = T // SPLASH_BLOCK
    steps = n * (n + 1) // 2
    products = {"fwd": 2, "dq": 3, "dkv": 5 if name == "splash_fused" else 4}
    found = {way: dict(loops={}, bundles=0, mxu_floor=0, at_least=0) for way in PRODUCTS}
    for kernel, loops in kernels.items():
        body = loops[0].stop - loops[0].start
        part = next(part for part in products if part in kernel)
        floor = mxu_floor(chip, products[part], SPLASH_BLOCK**2, H)
        count = found["forward" if part == "fwd" else "backward"]
        count["loops"][kernel] = body
        for key, cycles in (
            ("bundles", body),
            ("mxu_floor", floor),
            ("at_least", max(body, floor)),
        ):
            count[key] += steps * cycles
    return found


def schedules(name: str, chip: str) -> dict[str, list[Loop]]:
    """The loops of each Pallas kernel of a program, compiled in its own process."""
    with tempfile.TemporaryDirectory() as folder:
        module = [sys.executable, "-m", "benchmarks.tpu_static"]
        command = [*module, "--compile", name, "--chips", chip]
        env = os.environ | compiler_options(folder)
        run = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
        if run.returncode:
            raise RuntimeError(f"{name} did not compile:\n{run.stderr[-2000:]}")
        return take(folder)


# Compiling ----------------------------------------------------------------------------------------


def mesh_of(chip: str):
    """A mesh of one absent chip."""
    import numpy as np
    from jax.sharding import AxisType, Mesh

    from llama_jax.chips import topology

    # Other processes may have loaded libtpu.
    os.environ.update(TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="true")
    return Mesh(np.array(topology(chip)[:1]), ("x",), axis_types=(AxisType.Explicit,))


def compile_both_ways(name: str, chip: str) -> None:
    """Compile forward and backward of one key head and its query heads.

    For ours there are twice as many query heads: a grid of one program would be no loop.
    """
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding, PartitionSpec

    from benchmarks.kernels.cases import both_ways

    mesh = mesh_of(chip)
    everywhere = NamedSharding(mesh, PartitionSpec())
    of = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=everywhere)
    q, k = of(1, T, 2 * G if name == "ours" else G, H), of(1, T, 1, H)
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

    from pallas_kernels import dispatch

    # The best measured blocks (tokamax's table): 256 keys per product on v5p, 512 on wider units.
    wide = "v6" in dispatch.device_kind() or "7x" in dispatch.device_kind()
    block, part = SPLASH_BLOCK, 512 if wide else 256
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
