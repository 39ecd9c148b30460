"""Empty folders of weights, laid out and ready to be filled by pieces: Meta, Hugging Face or Orbax.

In comes a model and how many files it shall have; out comes a :class:`Target`. Every file has its
final size and every tensor its place before the first byte; the heads, without which no file is
readable, come last.
"""

import dataclasses
import json
import math
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from llama_jax.config import ModelConfig
from llama_jax.convert import formats, torch_files
from llama_jax.convert import orbax as orbax_weights
from llama_jax.convert import tensors as weights
from llama_jax.convert.formats import Region
from llama_jax.convert.layouts import Found, Kind, LayoutError, meta_axis, shard_shape
from llama_jax.convert.orbax import OrbaxWeights
from llama_jax.convert.tensors import Part, TorchWeights, Unit, Weights, units
from llama_jax.io import atomic_write


def cuts_rows(found: Found) -> bool:
    """Whether Meta's own files of this family cut the embedding along the vocabulary (Llama 3),
    not the width."""
    return found.cfg.vocab_size >= 100_000 or any(t.kind == "tiktoken" for t in found.tokenizers)


def check_shards(kind: Kind, cfg: ModelConfig, shards: int | None, by_rows: bool) -> None:
    """Raise LayoutError when a model cannot be written as so many files; says which numbers fit."""
    if shards is None:
        return
    if kind == "orbax":
        raise LayoutError("--shards is for Meta and Hugging Face; Orbax fits any number of devices")
    if shards < 1:
        raise LayoutError(f"--shards {shards} must be at least 1")
    if kind == "hf":
        if shards > (count := len(units(cfg))):
            raise LayoutError(f"--shards {shards}: the model has {count} tensors only")
        return
    sizes = dict(
        n_heads=cfg.num_heads,
        n_kv_heads=cfg.num_kv_heads,
        ffn_dim=cfg.ffn_dim,
        vocab_size=cfg.vocab_size,
    )
    sizes |= {} if by_rows else {"dim": cfg.dim}
    if bad := [f"{k}={v}" for k, v in sizes.items() if v % shards]:
        fits = [
            n for n in range(1, cfg.num_kv_heads + 1) if all(v % n == 0 for v in sizes.values())
        ]
        raise LayoutError(
            f"--shards {shards} does not divide {', '.join(bad)}; this model can be cut into "
            f"{', '.join(map(str, fits))}"
        )


@dataclasses.dataclass
class Target:
    """An empty folder of a layout, to be filled by pieces."""

    weights: Weights
    done: Callable[[Unit], None]
    """to be called when a unit is whole"""
    finish: Callable[[], None]
    """writes the heads, without which no file is readable"""


def create(
    kind: Kind,
    folder: Path,
    cfg: ModelConfig,
    dtypes: dict[str, np.dtype],
    shards: int | None,
    by_rows: bool,
    quantize: str | None = None,
) -> Target:
    """Lay a folder out; every file gets its final size and place before the first byte.

    Args:
      shards: files; None: one Meta shard, Hugging Face files of 5 GB at most.
      by_rows: Meta's embedding is cut along the vocabulary (Llama 3), not along the width.
      quantize: Orbax's matrices, "int8" or "int4".
    """
    if kind == "meta":
        return _create_meta(folder, cfg, dtypes, shards or 1, by_rows)
    if kind == "hf":
        return _create_hf(folder, cfg, dtypes, shards)
    model = folder / "steps" / "0" / "model"
    if (model / "_METADATA").exists():
        out = OrbaxWeights(model, cfg, quantize)
    else:
        out = orbax_weights.create(folder / "steps", cfg, dtypes, quantize)
    return Target(out, lambda unit: None, lambda: None)


def _create_meta(
    folder: Path, cfg: ModelConfig, dtypes: dict[str, np.dtype], shards: int, by_rows: bool
) -> Target:
    # Meta's loader does not insist on output.weight: a tied model would run with random weights.
    whole = {u.torch_name(True): u for u in units(cfg)}
    if cfg.tie_embeddings:
        whole["output.weight"] = Unit(weights.TABLE[-1], None)
    plans: list[torch_files.Layout] = []
    parts: dict[str, list[Part]] = {u.name: [] for u in units(cfg)}
    for i in range(shards):
        tensors = {}
        for name, unit in whole.items():
            axis = meta_axis(unit, by_rows)
            shape = shard_shape(unit.torch_shape(cfg), axis, shards)
            assert shape is not None
            tensors[name] = (shape, dtypes.get(unit.row.path, dtypes["embed"]))
        plan = torch_files.plan(folder / f"consolidated.{i:02d}.pth", tensors)
        plans.append(plan)
        for name, unit in whole.items():
            start, axis = [0, 0], meta_axis(unit, by_rows)
            if axis >= 0:
                start[axis] = i * tensors[name][0][axis]
            parts.get(unit.name, parts["embed"]).append(Part(plan.regions[name], *start))
    out = TorchWeights(cfg, parts, interleaved=True)
    for plan in plans:
        out.allocate(next(iter(plan.regions.values())).path, plan.end)
    return _meta_target(out, plans)


def _meta_target(out: TorchWeights, plans: list[torch_files.Layout]) -> Target:
    crc: dict[Region, int] = {}

    def done(unit: Unit) -> None:
        crc.update({part.region: out.checksum(part.region) for part in out.parts[unit.name]})

    def finish() -> None:
        for plan in plans:
            path = next(iter(plan.regions.values())).path
            sums = {record: zlib.crc32(data) for record, data in plan.small.items()}
            sums |= {plan.records[name]: crc[region] for name, region in plan.regions.items()}
            for offset, data in torch_files.headers(plan, sums):
                out.put(path, offset, data)
        out.close()

    return Target(out, done, finish)


def _create_hf(
    folder: Path, cfg: ModelConfig, dtypes: dict[str, np.dtype], shards: int | None
) -> Target:
    tensors = {u.torch_name(False): (u.torch_shape(cfg), dtypes[u.row.path]) for u in units(cfg)}
    sizes = {n: math.prod(s) * d.itemsize for n, (s, d) in tensors.items()}
    total = sum(sizes.values())
    shards = shards or math.ceil(total / 5e9)
    groups: list[list[str]] = [[] for _ in range(shards)]
    before, k = 0, 0
    for i, (name, size) in enumerate(sizes.items()):
        ideal = int((before + size / 2) * shards / total)
        least = shards - (len(sizes) - i)  # no file may stay empty
        if groups[k] and k < max(ideal, least):
            k += 1
        groups[k].append(name)
        before += size
    files = [
        "model.safetensors" if shards == 1 else f"model-{i:05d}-of-{shards:05d}.safetensors"
        for i in range(1, shards + 1)
    ]
    heads: dict[str, bytes] = {}
    parts: dict[str, list[Part]] = {}
    for file, group in zip(files, groups, strict=True):
        heads[file], regions = formats.plan_safetensors(
            folder / file, {n: tensors[n] for n in group}
        )
        parts |= {n: [Part(r, 0, 0)] for n, r in regions.items()}
    out = TorchWeights(
        cfg, {u.name: parts[u.torch_name(False)] for u in units(cfg)}, interleaved=False
    )
    for file, group in zip(files, groups, strict=True):
        out.allocate(folder / file, len(heads[file]) + sum(sizes[n] for n in group))

    def finish() -> None:
        for file, head in heads.items():
            out.put(folder / file, 0, head)
        out.close()
        if shards > 1:
            index = {
                "metadata": {"total_size": total, "total_parameters": cfg.num_params},
                "weight_map": {
                    n: file for file, group in zip(files, groups, strict=True) for n in group
                },
            }
            content = json.dumps(index, indent=2) + "\n"
            atomic_write(folder / "model.safetensors.index.json", content.encode())

    return Target(out, lambda unit: None, finish)
