"""The benchmark's programs compiled for a chip that is not there, and what that tells."""

import functools
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from pallas_kernels import Rope, dispatch
from pallas_kernels.bench_cases import CACHES, MODELS, both_ways, candidates, cases, decode, shapes


def compiled(args, device: jax.Device) -> list[dict[str, Any]]:
    mesh = Mesh(np.array([device]), ("x",), axis_types=(AxisType.Explicit,))
    everywhere = NamedSharding(mesh, PartitionSpec())
    rows: list[dict[str, Any]] = []

    def of(shape, dtype=jnp.bfloat16) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=everywhere)

    def add(row, programs):
        for name, (function, arguments, options) in programs.items():
            try:
                row[name] = static(jax.jit(function, **options), arguments, mesh)
            except (NotImplementedError, jax.errors.JaxRuntimeError) as e:
                row["cannot"] = str(e)[:200]
                break
        rows.append(row)
        print({k: v for k, v in row.items() if v is not False}, flush=True)

    with jax.set_mesh(mesh):
        attentions = candidates("rotary_attention", dispatch.platform())
        decoders = candidates("rotary_decode_attention", dispatch.platform())
    for model, T, documents in cases(args):
        q, k, v, d_out = map(of, shapes(model, T).values())
        positions = of(q.shape[:2], jnp.int32)
        rope = Rope(of((q.shape[3] // 2,), jnp.float32), 1.0)
        rest = positions, rope, positions if documents else None
        for name, attend in attentions.items():
            row = dict(model=model, T=T, documents=documents, implementation=name)
            both = functools.partial(both_ways, attend)
            add(row, {"forward": (attend, (q, k, v, *rest), {}),
                      "both": (both, (q, k, v, d_out, *rest), {})})  # fmt: skip
    N, K, H = MODELS["8B"]
    for B, S in CACHES:
        for name in decoders:
            new = of((B, 1, N, H)), of((B, 1, K, H)), of((B, 1, K, H))
            cache, rope = of((1, B, K, S, H)), Rope(of((H // 2,), jnp.float32), 1.0)
            arguments = *new, cache, cache, of((B,), jnp.int32), rope
            call = functools.partial(decode, name), arguments, {"donate_argnums": (3, 4)}
            add(dict(model="8B", B=B, S=S, implementation=name), {"decode": call})
    return rows


def static(program, arguments, mesh) -> dict[str, float]:
    """What a compiled program is known to need: MiB beside its arguments, MB moved by XLA."""
    with jax.set_mesh(mesh):
        done = program.lower(*arguments).compile()
    moved = bytes_around(done.as_text())
    temporary = done.memory_analysis().temp_size_in_bytes
    return dict(temporary_mib=round(temporary / 2**20, 1), moved_mb=round(moved / 1e6, 1))


# Instructions that move nothing themselves, and the kernels, whose own reading is not XLA's.
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "custom-call",
         "after-all", "copy-done", "conditional", "while", "iota", "partition-id"}  # fmt: skip
_SIZES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4}


def bytes_around(hlo: str) -> int:
    """Bytes that the instructions of a program's entry read and write, kernels not counted.

    What a TPU keeps in its vector memory (space 1) is not moved; fetching it there is read once.
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
        # The start of a copy names what it makes, what it reads, and a context.
        sizes[name] = sum(arrays[:1] if opcode == "copy-start" else arrays)
        if opcode not in _FREE:
            operands = re.findall(r"%([\w.-]+)", rest.split(")")[0])
            total += sizes[name] + sum(sizes.get(x, 0) for x in operands)
    return total
