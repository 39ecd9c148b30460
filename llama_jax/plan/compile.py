"""A recipe's real train step, compiled for a machine that need not be there.

In: a recipe and a :class:`~llama_jax.plan.machines.Machine`. Out: a :class:`Compiled`: memory,
and what one step does (:mod:`llama_jax.plan.hlo`), a device.
"""

import dataclasses
import math
import re
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from llama_jax import chips
from llama_jax.chips import GIB
from llama_jax.config import Recipe
from llama_jax.data.batch import Batch, abstract_batch
from llama_jax.model.llama import ComputeConfig
from llama_jax.model.params import merge, structure
from llama_jax.model.sharding import AXES, mesh_for, slice_ids
from llama_jax.plan import hlo
from llama_jax.plan.machines import Machine, PlanError, devices
from llama_jax.train.step import (
    abstract_state,
    check_attention,
    execution,
    make_train_step,
    nll_sum,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of one device when it holds most."""

    peak: float
    """what must fit; `peak_memory_in_bytes` of the compiled program, or what the compiler says it
    would need"""
    weights: float
    optimizer: float
    gradients: float
    """float32, as the weights; in a step of several parts they are there all the time"""
    activations: float
    """what the forward pass keeps for the backward pass"""
    code: float

    @property
    def temporary(self) -> float:
        """The rest of the peak: one layer's own arrays, gathered weights, logits, buffers of
        collectives."""
        return max(0.0, self.peak - self.kept)

    @property
    def kept(self) -> float:
        return self.weights + self.optimizer + self.gradients + self.activations


@dataclasses.dataclass(frozen=True)
class Compiled:
    """The step as compiled; ``cost`` and ``program`` are None where it does not fit."""

    machine: Machine
    recipe: Recipe
    mesh: dict[str, int]
    slices: tuple[int, ...]
    """of each device, in the order of the mesh: the slice it belongs to"""
    memory: Memory
    cost: hlo.Cost | None
    seconds: float
    """that compiling took"""
    program: Any
    """`jax.stages.Compiled`"""

    @property
    def fits(self) -> bool:
        return self.cost is not None and self.memory.peak <= self.machine.chip.memory * GIB


def compile_step(recipe: Recipe, on: Machine) -> Compiled:
    """Compile the train step for the machine; the recipe adapted to it, as `train` does.

    Raises:
      PlanError: the machine's compiler is not there.
      ConfigError: the recipe's mesh does not match the machine, or does not divide the model.
    """
    recipe, mesh = mesh_for(recipe, devices(on), on.host_is_slice)
    check_attention(recipe, mesh)
    compute = execution(recipe, on.chip.platform)
    start = time.perf_counter()
    program: Any = None
    with jax.set_mesh(mesh):
        state = abstract_state(recipe, compute, mesh)
        batch = abstract_batch(recipe, mesh, compute.rules.activation_without_tensor("BT"))
        flags = NamedSharding(mesh, P(AXES))
        stop = jax.ShapeDtypeStruct((mesh.size,), jnp.int32, sharding=flags)
        step = jax.jit(
            make_train_step(recipe, compute),
            donate_argnums=0,
            compiler_options=chips.compiler_options(on.chip.platform),
        )
        lowered = step.lower(state, batch, stop)
        try:
            program, needed = lowered.compile(), 0.0
        except Exception as e:  # the compiler's own type
            needed = _needed(e)
        kept = kept_bytes(recipe, compute, state.params, batch)
    seconds = time.perf_counter() - start
    code, cost = 0.0, None
    if program is not None:
        stats = program.memory_analysis()
        needed, code = peak_bytes(stats, on.chip.platform), stats.generated_code_size_in_bytes
        cost = hlo.count(program.as_text(), *_rates_a_cycle(on))
    weights = shard_bytes(state.params)
    optimizer = shard_bytes(state.optimizer)
    # What fuses with its use is handed over and never stored.
    kept = max(0.0, min(kept, needed - 2 * weights - optimizer))
    memory = Memory(needed, weights, optimizer, weights, kept, code)
    slices = tuple(slice_ids(mesh.devices.flat, on.host_is_slice))
    return Compiled(on, recipe, dict(mesh.shape), slices, memory, cost, seconds, program)


def peak_bytes(stats: Any, platform: str) -> float:
    """Bytes that a program holds when it holds most, of its `memory_analysis()`."""
    if platform != "cpu":
        return float(stats.peak_memory_in_bytes)
    # XLA for CPU counts no temporaries in its peak.
    written = stats.output_size_in_bytes - stats.alias_size_in_bytes
    return float(stats.argument_size_in_bytes + stats.temp_size_in_bytes + written)


def _rates_a_cycle(on: Machine) -> tuple[float, float]:
    """Operations and bytes of a clock cycle; zeros where the clock is not known."""
    if on.chip.clock is None:
        return 0.0, 0.0
    return on.chip.tflops * 1e3 / on.chip.clock, on.chip.bandwidth / on.chip.clock


def shard_bytes(tree: Any) -> float:
    """Bytes of one device's part of a tree of shapes."""
    return float(sum(map(_bytes, jax.tree.leaves(tree))))


def _bytes(x: Any) -> int:
    shape = x.shape if x.sharding is None else x.sharding.shard_shape(x.shape)
    return math.prod(shape) * np.dtype(x.dtype).itemsize


def kept_bytes(recipe: Recipe, compute: ComputeConfig, params: Any, batch: Batch) -> float:
    """Bytes a device keeps of the forward pass for the backward pass, weights not counted: the
    arrays that JAX itself hands from one to the other."""
    graphdef = structure(recipe.model, compute)

    def backward(params, microbatch):
        loss = lambda p: nll_sum(merge(graphdef, p), microbatch, recipe.train.loss_chunk)
        return jax.vjp(loss, params)[1]

    microbatch = jax.tree.map(_without_first_axis, batch)
    left = jax.tree.leaves(jax.eval_shape(backward, params, microbatch))
    # A weight, or its cast copy, that is handed over is no activation.
    weights = {x.shape for x in jax.tree.leaves(params) if len(x.shape) > 1}
    return float(sum(_bytes(x) for x in left if x.shape not in weights))


def _without_first_axis(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    sharding = x.sharding
    assert isinstance(sharding, NamedSharding)
    inner = NamedSharding(sharding.mesh, P(*sharding.spec[1:]))
    return jax.ShapeDtypeStruct(x.shape[1:], x.dtype, sharding=inner)


def _needed(error: Exception) -> float:
    """Bytes that the TPU compiler says a program would take; any other error is raised."""
    text = str(error)
    unit = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
    for pattern in (r"Used ([\d.]+)([KMGT]) of", r"\(([\d.]+)([KMGT])\) exceeds available"):
        if "RESOURCE_EXHAUSTED" in text and (found := re.search(pattern, text)):
            return float(found[1]) * unit[found[2]]
    raise PlanError(f"the compiler failed: {text.split(chr(10))[0]}") from error
