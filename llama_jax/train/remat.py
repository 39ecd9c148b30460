"""Chooses the activations that a training step keeps, so that it fits the device's memory."""

import dataclasses
import functools
import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental.multihost_utils import process_allgather
from jax.sharding import AbstractMesh, Mesh, NamedSharding

from llama_jax.chips import GIB
from llama_jax.config import ConfigError, Recipe
from llama_jax.config.activations import Remat
from llama_jax.model.compute import ComputeConfig
from llama_jax.model.remat import kept_names
from llama_jax.train.metrics import log
from llama_jax.train.step import TrainState, compute_config

AnyMesh = Mesh | AbstractMesh

USABLE = 0.94
"""Share of the device's memory that ``train.remat=auto`` fills; the rest is for batches,
evaluations and fragmentation."""

_SHAPES = {
    "gate": ("DF", "BTF"), "up": ("DF", "BTF"), "q": ("DQ", "BTQ"), "k": ("DE", "BTE"),
    "v": ("DE", "BTE"), "o": ("QD", "BTD"),
}  # fmt: skip
"""Matrix and output of the activations that the backward pass needs; it does not need "down"."""


def forward_flops(recipe: Recipe) -> dict[str, float]:
    """FLOPs per token, of all layers, that the backward pass repeats if it needs an activation that
    was not kept."""
    cfg = recipe.model
    flops = {
        name: 2.0 * cfg.num_layers * math.prod(cfg.shape(matrix))
        for name, (matrix, _) in _SHAPES.items()
    }
    # Two products of queries and keys; causal: half.
    return flops | {"attention": 2.0 * math.prod(cfg.shape("LQ")) * recipe.data.seq_len}


def recomputed(recipe: Recipe) -> list[str]:
    """The activations that the backward pass computes again."""
    kept = (*kept_names(recipe.train.remat), *recipe.train.offload)
    return [name for name in forward_flops(recipe) if name not in kept]


def kept_bytes(recipe: Recipe, compute: ComputeConfig, mesh: AnyMesh) -> dict[str, float]:
    """Bytes of each activation on one device, of all layers.

    Args:
      recipe: the run, adapted to the mesh.
      compute: how the model computes.
      mesh: the devices.
    """
    itemsize, size = compute.dtype.itemsize, functools.partial(_elements, recipe, compute, mesh)
    one_layer = {name: itemsize * size(output) for name, (_, output) in _SHAPES.items()}
    # The output, and a float32 per query and head.
    one_layer["attention"] = itemsize * size("BTQ") + 4 * size("BTN")
    return {name: recipe.model.num_layers * n for name, n in one_layer.items()}


def _elements(recipe: Recipe, compute: ComputeConfig, mesh: AnyMesh, letters: str) -> float:
    """Elements of an activation of one microbatch on one device."""
    cfg, train = recipe.model, recipe.train
    sizes = {"B": train.batch_size // train.gradient_accumulation, "T": recipe.data.seq_len}
    shape = tuple(sizes[x] if x in sizes else cfg.size(x) for x in letters)
    sharding = NamedSharding(mesh, compute.rules.activation(letters))
    return float(math.prod(sharding.shard_shape(shape)))


class Choice(NamedTuple):
    """Activations to keep, and a first estimate of the step's peak memory on one device."""

    names: tuple[str, ...]
    peak: float


def choices(recipe: Recipe, compute: ComputeConfig, mesh: AnyMesh, base: float) -> list[Choice]:
    """From keeping nothing to keeping everything; those that save the most FLOPs per byte first.

    Args:
      recipe: the run, adapted to the mesh.
      compute: how the model computes.
      mesh: the devices.
      base: estimated peak of a step that keeps nothing.
    """
    flops, sizes = forward_flops(recipe), kept_bytes(recipe, compute, mesh)
    names = [name for name in flops if name not in recipe.train.offload]
    names.sort(key=lambda name: -flops[name] / sizes[name])  # equal ones stay in order
    kept = [tuple(names[:n]) for n in range(len(names) + 1)]
    return [Choice(some, base + sum(sizes[name] for name in some)) for some in kept]


def with_names(recipe: Recipe, names: Remat) -> Recipe:
    """The recipe with this ``train.remat``."""
    return dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, remat=names))


def fit(
    possible: list[Choice], limit: float, compile_: Callable[[tuple[str, ...]], tuple[Any, float]]
) -> tuple[Choice, Any]:
    """The last choice whose compiled program fits, and that program.

    The estimates decide what is compiled first; the peak of a compiled program corrects those of
    the others. Usually one or two programs are compiled.

    Args:
      possible: from :func:`choices`.
      limit: bytes.
      compile_: from names to a program and its peak memory; the program is None if the compiler
        refuses it.

    Returns:
      The choice with its real peak; the first of all if none fits.
    """
    low, high, correction = 0, len(possible), 0.0
    best = tried = (possible[0], None)
    while low < high:
        expected = sum(c.peak + correction <= limit for c in possible)
        if low and expected <= low:
            break  # one of them fits, and the next should not
        i = min(max(expected - 1, low), high - 1)
        names = possible[i].names
        program, peak = compile_(names)
        tried, correction = (Choice(names, peak), program), peak - possible[i].peak
        if peak <= limit:
            best, low = tried, i + 1
        else:
            high = i
    return best if low else tried


def fitting(
    recipe: Recipe,
    compute: ComputeConfig,
    mesh: Mesh,
    arguments: tuple[Any, Any],
    limit: float,
    compile_: Callable[[Recipe], tuple[Any, float]],
) -> tuple[Recipe, Any, float]:
    """A recipe with ``train.remat=auto``, with the names that it stands for.

    Args:
      recipe: the run, adapted to the mesh.
      compute: how the model computes.
      mesh: the devices.
      arguments: shapes of the state and of the frozen weights, which the step reads.
      limit: bytes of a device; infinite on a CPU, where nothing is recomputed.
      compile_: from a recipe to a program and its peak memory.

    Returns:
      The recipe, its program, and the program's peak memory.
    """
    if limit == math.inf:
        recipe = with_names(recipe, "none")
        return recipe, *compile_(recipe)
    state, frozen = arguments
    base = shard_bytes((state, state.params, frozen)) + _temporary_bytes(recipe, compute, mesh)
    possible = choices(recipe, compute, mesh, base)
    choice, program = fit(
        possible, USABLE * limit, lambda names: compile_(with_names(recipe, names))
    )
    return with_names(recipe, choice.names), program, choice.peak


def _temporary_bytes(recipe: Recipe, compute: ComputeConfig, mesh: Mesh) -> float:
    """A rough estimate of what a step that keeps only the layers' inputs needs beside its state."""
    cfg, chunk = recipe.model, recipe.train.loss_chunk
    size = functools.partial(_elements, recipe, compute, mesh)
    inputs = cfg.num_layers * size("BTD")
    # One layer's gathered weights, in the forward pass, the backward pass and their gradients.
    weights = 3 * (cfg.num_params / cfg.num_layers) / mesh.shape["tensor"]
    tokens = size("BT")
    logits = size("BTV") * (min(1.0, chunk / tokens) if chunk else 1.0)
    return compute.dtype.itemsize * (inputs + weights + 3 * size("BTF")) + 8 * logits


def memory_limit() -> float:
    """Bytes that a program can use on a device, the least of all processes; infinite on a CPU."""
    return float(np.min(process_allgather(np.float32(_local_limit()))))


def _local_limit() -> float:
    stats = jax.local_devices()[0].memory_stats() or {}
    return float(stats.get("bytes_limit", math.inf))


def check_offload(recipe: Recipe, mesh: Mesh) -> None:
    """Raises a :class:`ConfigError` if ``train.offload`` is set and the devices have no memory
    besides the host's."""
    platform = mesh.devices.flat[0].platform
    if recipe.train.offload and platform not in ("tpu", "gpu", "cuda"):
        raise ConfigError(
            f"train.offload={list(recipe.train.offload)} needs a TPU or GPU: a {platform} device "
            "has no memory besides the host's; remove train.offload"
        )


def compile_fitting(
    recipe: Recipe,
    mesh: Mesh,
    state: TrainState,
    frozen: tuple,
    compile_: Callable[[Recipe], Any],
) -> Any:
    """The compiled step, with ``train.remat=auto`` replaced by what fits the devices of this job.

    All processes compile the same programs and know the same limit, so they choose the same.

    Args:
      recipe: the run, adapted to the mesh.
      mesh: the devices.
      state: what the step updates.
      frozen: weights that it reads only.
      compile_: from a recipe to a compiled program.

    Raises:
      ConfigError: the step does not fit even if nothing is kept.
    """
    if recipe.train.remat != "auto":
        return compile_(recipe)
    platform, limit = mesh.devices.flat[0].platform, memory_limit()
    compute, try_ = compute_config(recipe, platform), functools.partial(attempt, compile_, platform)
    recipe, program, peak = fitting(recipe, compute, mesh, (state, frozen), limit, try_)
    if program is None:
        raise ConfigError(
            f"the training step needs {peak / GIB:.1f} GiB per device, of which there are "
            f"{limit / GIB:.1f}, even if nothing is kept (train.remat=full); lower "
            "train.batch_size or raise train.gradient_accumulation"
        )
    if limit == math.inf:
        log("train.remat=auto: nothing is recomputed on a CPU")
    else:
        names = ", ".join(recipe.train.remat) or "only the inputs of layers"
        log(f"train.remat=auto: keeps {names}; peak {peak / GIB:.1f} of {limit / GIB:.1f} GiB")
    return program


def attempt(compile_: Callable[[Recipe], Any], platform: str, recipe: Recipe) -> tuple[Any, float]:
    """A compiled program and its peak memory; None and what it needs if the compiler refuses it for
    lack of memory.

    Args:
      compile_: from a recipe to a compiled program.
      platform: of the devices.
      recipe: what to compile.
    """
    try:
        program = compile_(recipe)
    except Exception as e:  # the compiler's own type
        if (needed := needed_bytes(e)) is None:
            raise
        return None, needed
    return program, peak_bytes(program.memory_analysis(), platform)


def needed_bytes(error: Exception) -> float | None:
    """Memory that the TPU compiler says a program needs; None if the error says something else."""
    text = str(error)
    unit = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
    for pattern in (r"Used ([\d.]+)([KMGT]) of", r"\(([\d.]+)([KMGT])\) exceeds available"):
        if "RESOURCE_EXHAUSTED" in text and (found := re.search(pattern, text)):
            return float(found[1]) * unit[found[2]]
    return None


def peak_bytes(stats: Any, platform: str) -> float:
    """Peak memory of a program, from its `memory_analysis()`."""
    if platform != "cpu":
        return float(stats.peak_memory_in_bytes)
    # XLA's peak on CPU does not include temporaries.
    outputs = stats.output_size_in_bytes - stats.alias_size_in_bytes
    return float(stats.argument_size_in_bytes + stats.temp_size_in_bytes + outputs)


def shard_bytes(tree: Any) -> float:
    """Bytes of one device's shards of a tree of shapes."""
    return float(sum(map(_shard_bytes, jax.tree.leaves(tree))))


def _shard_bytes(x: Any) -> int:
    shape = x.shape if x.sharding is None else x.sharding.shard_shape(x.shape)
    return math.prod(shape) * np.dtype(x.dtype).itemsize
