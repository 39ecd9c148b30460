"""Compiles the kernel benchmark for an absent chip and prints what is known without running.

``python -m benchmarks.kernels`` starts it in a separate process, in which libtpu dumps its
schedules: ``python -m benchmarks.kernels.compiled CHIP``.
"""

import argparse
import functools
import math
import os
import re
import tempfile
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from benchmarks.kernels import schedule as bench_schedule
from benchmarks.kernels.cases import (
    CACHES,
    MODELS,
    add_arguments,
    both_ways,
    candidates,
    cases,
    decode,
    keep,
    shapes,
)  # fmt: skip
from llama_jax import chips
from pallas_kernels import Rope, dispatch

WAYS = ("forward", "both", "decode")


def main() -> None:
    arguments = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    arguments.add_argument("chip")
    args = add_arguments(arguments).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        # libtpu reads these when it is loaded, by the first call of topology.
        os.environ.update(bench_schedule.compiler_options(folder))
        try:
            device = chips.topology(args.chip)[0]
        except RuntimeError as e:
            print(f"{args.chip}: {e}")
            return
        keep(args, f"{args.chip} (compiled only)", compiled(args, device, folder))


def compiled(args, device: jax.Device, folder: str) -> list[dict[str, Any]]:
    """One row per shape and implementation; libtpu dumps its schedules into ``folder``."""
    mesh = Mesh(np.array([device]), ("x",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        attentions = candidates("rotary_attention", dispatch.platform(), others=False)
        decoders = candidates("rotary_decode_attention", dispatch.platform())
    todo = [
        *(attention(args.chip, mesh, name, attend, *case) for case in cases(args)
          for name, attend in attentions.items()),
        *(decoding(mesh, name, *cache) for cache in CACHES for name in decoders),
    ]  # fmt: skip
    rows = []
    for n, (row, blocks, programs) in enumerate(todo, 1):
        started = time.perf_counter()
        try:
            for way, (program, arguments) in programs.items():
                row[way] = static(program, arguments, mesh, blocks, folder)
        except (NotImplementedError, jax.errors.JaxRuntimeError) as e:
            row["cannot"] = str(e)[:200]
        rows.append(row)
        print(
            f"{n:>3}/{len(todo)} {line(row)}  ({time.perf_counter() - started:.0f} s)", flush=True
        )
    return rows


def attention(chip, mesh, name, attend, model, T, documents):
    """(row to fill, blocks per head if known, programs to compile)."""
    of = functools.partial(_of, mesh)
    q, k, v, d_out = map(of, shapes(model, T).values())
    positions, rope = of(q.shape[:2], jnp.int32), Rope(of((q.shape[3] // 2,), jnp.float32), 1.0)
    rest = positions, rope, positions if documents else None
    both = functools.partial(both_ways, attend)
    row = dict(model=model, T=T, documents=documents, implementation=name)
    blocks = None
    if name == "tpu" and not documents:
        with jax.set_mesh(mesh):
            blocks = bench_schedule.blocks_of(chip, T, q.shape[3], q.shape[2] // k.shape[2])
    return row, blocks, {"forward": (jax.jit(attend), (q, k, v, *rest)),
                         "both": (jax.jit(both), (q, k, v, d_out, *rest))}  # fmt: skip


def decoding(mesh, name, B, S):
    """The same for decoding one token per row with the heads of the 8B."""
    of, (N, K, H) = functools.partial(_of, mesh), MODELS["8B"]
    new = of((B, 1, N, H)), of((B, 1, K, H)), of((B, 1, K, H))
    cache, rope = of((1, B, K, S, H)), Rope(of((H // 2,), jnp.float32), 1.0)
    arguments = *new, cache, cache, of((B,), jnp.int32), rope
    call = jax.jit(functools.partial(decode, name), donate_argnums=(3, 4))
    return dict(model="8B", B=B, S=S, implementation=name), None, {"decode": (call, arguments)}


def _of(mesh, shape, dtype=jnp.bfloat16) -> Any:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec()))


def static(program, arguments, mesh, blocks, folder) -> dict[str, Any]:
    """Compiles a program and returns its temporary memory (MiB), the bytes that XLA moves outside
    the kernels (MB), and on a TPU the bundles of the kernels' loops, per head if `blocks` is given.
    """
    with jax.set_mesh(mesh):
        done = program.lower(*arguments).compile()
    temporary = done.memory_analysis().temp_size_in_bytes
    found: dict[str, Any] = dict(
        temporary_mib=round(temporary / 2**20, 2),
        moved_mb=round(bytes_around(done.as_text()) / 1e6, 1),
    )
    for kernel, loops in bench_schedule.take(folder).items():
        way = next((w for w in ("forward", "backward") if f"rotary_attention_{w}" in kernel), None)
        own = (
            bench_schedule.by_loop(way, loops) if way else {"step": loops[0].stop - loops[0].start}
        )
        if way and blocks:
            own |= bench_schedule.count_head(way, own, blocks)
        found.setdefault("bundles", {})[way or kernel] = own
    return found


def line(row: dict[str, Any]) -> str:
    """The printed line of a row."""
    where = f"T {row['T']:>6}" if "T" in row else f"decode, {row['B']} rows of {row['S']}"
    head = f"{row['model']:>4} {where} {'documents' if row.get('documents') else ''}"
    head = f"{head:<28} {row['implementation']:8}"
    if "cannot" in row:
        return f"{head} cannot: {row['cannot'][:90]}"
    parts = []
    for way in WAYS:
        if way in row:
            said = row[way]
            parts.append(f"{way} {said['temporary_mib']:.1f} MiB, {said['moved_mb']:.0f} MB")
    most = row["both" if "both" in row else "decode"]
    for kernel, own in most.get("bundles", {}).items():
        loops = [f"{name} {own[name]:,}" for name in ("full", "partial", "step") if name in own]
        parts.append(f"{kernel} bundles: {', '.join(loops)}")
        if "at_least" in own:
            parts[-1] += (
                f"; a head at least {own['at_least']:,} cycles (bundles {own['bundles']:,}, "
                f"floor of the matrix unit {own['mxu_floor']:,})"
            )
    return f"{head} {' | '.join(parts)}"


# Instructions that move no data, and the kernels, whose memory traffic is not XLA's.
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "custom-call",
         "after-all", "copy-done", "conditional", "while", "iota", "partition-id"}  # fmt: skip
_SIZES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4}


def bytes_around(hlo: str) -> int:
    """Bytes that the instructions of a program's entry read and write, without kernels.

    Arrays in a TPU's vector memory (memory space 1) do not count, except for one read when fetched.
    """
    entry = hlo[hlo.index("\nENTRY ") :]
    sizes, total = {}, 0
    for line in entry.splitlines():
        found = re.match(r"\s+(?:ROOT )?%?([\w.-]+) = (\(.*?\)|\S+) ([\w-]+)\((.*)", line)
        if not found:
            continue
        name, kind, opcode, rest = found.groups()
        arrays = [
            0 if "S(1)" in layout else _SIZES.get(dtype, 0) * math.prod(map(int, dims.split(",")))
            for dtype, dims, layout in re.findall(r"(\w+)\[([\d,]+)\](\{[^}]*\})?", kind)
        ]
        # The result of copy-start is (destination, source, context).
        sizes[name] = sum(arrays[:1] if opcode == "copy-start" else arrays)
        if opcode not in _FREE:
            operands = re.findall(r"%([\w.-]+)", rest.split(")")[0])
            total += sizes[name] + sum(sizes.get(x, 0) for x in operands)
    return total


if __name__ == "__main__":
    main()
