"""Compile a recipe's train step for a machine that may be absent."""

import dataclasses
import functools
import time
from typing import Any

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from llama_jax.chips import GIB, compiler_options
from llama_jax.config import Recipe
from llama_jax.data.batch import Batch, abstract_batch
from llama_jax.model.llama import ComputeConfig
from llama_jax.model.sharding import mesh_for, slice_ids
from llama_jax.plan import hlo
from llama_jax.plan.machines import Machine, PlanError, devices
from llama_jax.train.frozen import abstract_frozen, frozen_format, has_frozen
from llama_jax.train.remat import attempt, check_offload, fitting, shard_bytes
from llama_jax.train.step import (
    abstract_state,
    check_attention,
    compute_config,
    make_sums,
    make_train_step,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one device at the time of peak memory."""

    peak: float
    """of the compiled program; where it does not fit, what the compiler says it needs"""
    weights: float
    """those that are trained, and the base of LoRA or the reference of DPO"""
    optimizer: float
    gradients: float
    """in the dtype of the weights; with several microbatches they exist during the whole step"""
    activations: float
    """kept by the forward pass for the backward pass"""
    code: float

    @property
    def temporary(self) -> float:
        """The rest of the peak: arrays of one layer, gathered weights, logits, buffers of
        collectives."""
        kept = self.weights + self.optimizer + self.gradients + self.activations
        return max(0.0, self.peak - kept)


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A compiled train step; ``cost`` and ``program`` are None where it does not fit."""

    machine: Machine
    recipe: Recipe
    mesh: dict[str, int]
    slices: tuple[int, ...]
    """the slice of each device, in mesh order"""
    memory: Memory
    cost: hlo.Cost | None
    seconds: float
    """compile time"""
    program: Any
    """`jax.stages.Compiled`"""
    frozen: str = ""
    """number format of the weights that are not trained (LoRA, DPO), if there are any"""

    @property
    def fits(self) -> bool:
        return self.cost is not None and self.memory.peak <= self.machine.chip.memory * GIB


def compile_step(recipe: Recipe, machine: Machine) -> Compiled:
    """Compile the train step for a machine, with the recipe adapted to it as training does.

    Raises:
      PlanError: the machine's compiler is not installed, or fails.
      ConfigError: the recipe's mesh does not match the machine, or does not divide the model.
    """
    platform = machine.chip.platform
    recipe, mesh = mesh_for(recipe, devices(machine), machine.host_is_slice)
    check_attention(recipe, mesh)
    check_offload(recipe, mesh)
    start = time.perf_counter()
    with jax.set_mesh(mesh):
        compute = compute_config(recipe, platform)
        state = abstract_state(recipe, compute, mesh)
        batch = abstract_batch(recipe, mesh, compute.rules.activation_without_tensor("BT"))
        frozen = (abstract_frozen(recipe, compute, mesh),) if has_frozen(recipe) else ()
        compile_ = functools.partial(_compile, platform, (state, batch, *frozen))
        if recipe.train.remat == "auto":
            limit = machine.chip.memory * GIB
            recipe, program, peak = fitting(recipe, compute, mesh, (state, frozen), limit, compile_)
            compute = compute_config(recipe, platform)
        else:
            program, peak = compile_(recipe)
        activations = activation_bytes(recipe, compute, state.params, batch, *frozen)
    seconds = time.perf_counter() - start
    code, cost = 0.0, None
    if program is not None:
        code = program.memory_analysis().generated_code_size_in_bytes
        cost = hlo.count(program.as_text(), *_rates_per_cycle(machine))
    gradients, optimizer = shard_bytes(state.params), shard_bytes(state.optimizer)
    weights = gradients + shard_bytes(frozen)
    # Activations that XLA fuses with their use are never stored.
    activations = max(0.0, min(activations, peak - weights - gradients - optimizer))
    memory = Memory(peak, weights, optimizer, gradients, activations, code)
    slices = tuple(slice_ids(mesh.devices.flat, machine.host_is_slice))
    kind = frozen_format(recipe, compute) if frozen else ""
    return Compiled(machine, recipe, dict(mesh.shape), slices, memory, cost, seconds, program, kind)


def _compile(platform: str, arguments: tuple, recipe: Recipe) -> tuple[Any, float]:
    """The program and its peak memory; where it does not fit, None and what it needs."""

    def compile_(recipe: Recipe) -> Any:
        step = jax.jit(
            make_train_step(recipe, compute_config(recipe, platform)),
            donate_argnums=0,
            compiler_options=compiler_options(platform),
        )
        return step.lower(*arguments).compile()

    try:
        return attempt(compile_, platform, recipe)
    except jax.errors.JaxRuntimeError as e:
        reason = str(e).split("\n")[0]
        raise PlanError(f"the compiler failed: {reason}") from e


def _rates_per_cycle(machine: Machine) -> tuple[float, float]:
    """FLOPs and bytes per clock cycle; zeros if the clock is unknown."""
    chip = machine.chip
    return (chip.tflops * 1e3 / chip.clock, chip.bandwidth / chip.clock) if chip.clock else (0, 0)


def activation_bytes(
    recipe: Recipe, compute: ComputeConfig, params: Any, batch: Batch, *frozen: Any
) -> float:
    """Bytes of a device that JAX passes from the forward to the backward pass, without weights.

    Args:
      recipe: the recipe, adapted to the machine.
      compute: how the model computes.
      params: shapes of the weights that are trained.
      batch: from :func:`abstract_batch`.
      frozen: shapes of the base of LoRA or the reference of DPO, if there is one.
    """
    sums = make_sums(recipe, compute)

    def backward(params, microbatch, *frozen):
        return jax.vjp(lambda p: sums(p, microbatch, *frozen)[0], params)[1]

    microbatch = jax.tree.map(_without_first_axis, batch)
    residuals = jax.tree.leaves(jax.eval_shape(backward, params, microbatch, *frozen))
    # A weight, or its cast copy, is not an activation.
    weights = {x.shape for x in jax.tree.leaves((params, frozen)) if len(x.shape) > 1}
    return shard_bytes([x for x in residuals if x.shape not in weights])


def _without_first_axis(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    sharding = x.sharding
    assert isinstance(sharding, NamedSharding)
    inner = NamedSharding(sharding.mesh, P(*sharding.spec[1:]))
    return jax.ShapeDtypeStruct(x.shape[1:], x.dtype, sharding=inner)
