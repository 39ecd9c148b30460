"""Search the fastest mesh, number of microbatches and kept activations for a recipe on a machine.

An estimate from shapes chooses the meshes and microbatches to compile; with each of them, as many
activations are kept as fit. The compiled programs decide.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.sharding import AbstractMesh
from tqdm import tqdm

from llama_jax.chips import GIB
from llama_jax.config import MeshConfig, Recipe
from llama_jax.model.lora import num_adapter_params
from llama_jax.model.sharding import AXES
from llama_jax.plan.compile import Compiled, compile_step
from llama_jax.plan.machines import Machine
from llama_jax.plan.report import kept_text, metrics, recomputed_flops
from llama_jax.train.remat import choices, with_names
from llama_jax.train.step import compute_config, flops_per_token

MAX_COMPILED = 4


class Candidate(NamedTuple):
    """A recipe with its estimated bytes per device and seconds per step."""

    recipe: Recipe
    memory: float
    seconds: float

    def __str__(self) -> str:
        mesh, train = self.recipe.mesh, self.recipe.train
        sizes = (
            f"data {mesh.data} x " * (mesh.data > 1)
            + f"fsdp {mesh.fsdp}"
            + f" x tensor {mesh.tensor}" * (mesh.tensor > 1)
        )
        return f"{sizes}, {train.gradient_accumulation} microbatch(es), {kept_text(train)}"

    @property
    def way(self) -> tuple[MeshConfig, int]:
        """Everything but what is kept for the backward pass."""
        return self.recipe.mesh, self.recipe.train.gradient_accumulation


def candidates(recipe: Recipe, machine: Machine) -> list[Candidate]:
    """All settings that divide mesh, model and batch; the shortest estimated step first."""
    model, found = recipe.model, []
    widths = (model.num_heads, model.num_kv_heads, model.ffn_dim, model.vocab_size)
    # Between TPU slices: `fsdp`, or one replica of the model per slice.
    replicas = {1, machine.slices} if machine.chip.platform == "tpu" else {1}
    # With more devices than the width can be divided by: the fewest replicas that make it possible.
    replicas.add(machine.devices // math.gcd(machine.devices, model.dim))
    for data, tensor in itertools.product(sorted(replicas), (1, 2, 4, 8)):
        fsdp = machine.devices // data // tensor
        ok = machine.devices % (data * tensor) == 0 and not any(w % tensor for w in widths)
        if not ok or model.dim % fsdp or (tensor > 1 and recipe.data.seq_len % tensor):
            continue
        mesh = MeshConfig(data=data, fsdp=fsdp)
        if tensor > 1:
            mesh = MeshConfig(preset="tensor_sequence", data=data, fsdp=fsdp, tensor=tensor)
        per_shard = recipe.train.batch_size / (data * fsdp)
        for n in [2**i for i in range(12) if per_shard % 2**i == 0 and per_shard >= 2**i]:
            train = dataclasses.replace(recipe.train, gradient_accumulation=n)
            each = dataclasses.replace(recipe, mesh=mesh, train=train)
            found += _with_names(each, machine)
    return sorted(found, key=lambda c: c.seconds)


def _with_names(recipe: Recipe, machine: Machine) -> list[Candidate]:
    """A recipe with each of the :func:`choices` of activations to keep."""
    sizes = recipe.mesh
    mesh = AbstractMesh((sizes.data, sizes.fsdp, sizes.tensor, 1), AXES)
    compute = compute_config(recipe, machine.chip.platform)
    base, _ = _estimate(recipe, machine)
    possible = choices(recipe, compute, mesh, base)
    recipes = [with_names(recipe, choice.names) for choice in possible]
    return [
        Candidate(r, choice.peak, _estimate(r, machine)[1])
        for r, choice in zip(recipes, possible, strict=True)
    ]


def _estimate(recipe: Recipe, machine: Machine) -> tuple[float, float]:
    """(bytes per device if only the inputs of layers are kept, seconds per step) from shapes: good
    enough to rank candidates."""
    model, mesh, train, chip = recipe.model, recipe.mesh, recipe.train, machine.chip
    tokens = recipe.tokens_per_step / machine.devices
    D, F, Q, E = model.dim, model.ffn_dim, *(model.size(x) * model.head_dim for x in "NK")
    inputs = 2 * model.num_layers * D * tokens / train.gradient_accumulation
    layer = 4 * (D * (2 * Q + 2 * E) + 3 * D * F) / mesh.tensor
    # A weight, its gradient and its two moments.
    sizes = [jnp.dtype(x).itemsize for x in (train.param_dtype, recipe.optim.moment_dtype)]
    per_param = 2.0 * sum(sizes)
    weights_and_state = per_param * model.num_params
    if recipe.lora:
        base = {"float32": 4, "int8": 1, "int4": 0.5}.get(recipe.lora.base, 2)
        adapters = num_adapter_params(model, recipe.lora)
        weights_and_state = base * model.num_params + per_param * adapters
    memory = weights_and_state / (mesh.fsdp * mesh.tensor) + inputs + 2 * layer
    flops = (flops_per_token(recipe) + recomputed_flops(recipe)) * tokens
    compute = flops / (chip.tflops * 1e12)
    # Weights are gathered twice and gradients reduced once per microbatch, 2 bytes each.
    weights = 6 * model.num_params / mesh.tensor * train.gradient_accumulation
    ici = weights / (chip.interconnect * 1e9)
    # Residual-stream activations are gathered and reduced over `tensor` four times per layer.
    activations_moved = 8 * 2 * model.num_layers * D * tokens * (mesh.tensor - 1)
    ici += activations_moved / (chip.interconnect * 1e9)
    dcn = 0.0
    if machine.slices > 1 and chip.dcn:
        # A slice receives the weights it lacks once, split among its devices; replicas exchange
        # gradients only.
        in_slice = machine.devices // machine.slices // mesh.tensor
        received = weights / in_slice if mesh.data == 1 else weights / (3 * mesh.fsdp)
        dcn = received / (chip.dcn * 1e9)
    return memory, max(compute, dcn, ici) + 0.1 * (compute + dcn + ici)


def step_seconds(c: Compiled) -> float:
    """Time of a compiled step: the lower bound, or the compiler's estimate if that is longer."""
    time = metrics(c)["time"]
    return max(time["step"], time["compiler_estimate"] or 0.0)


def search(
    recipe: Recipe, machine: Machine, log: Callable[[str], object] = print
) -> tuple[list[Compiled], Compiled | None]:
    """Compile the most promising candidates, with a progress bar.

    Args:
      recipe: its mesh, gradient_accumulation and remat are varied.
      machine: where it is to run.
      log: receives a line for each compiled candidate.

    Returns:
      (plans that fit, fastest first; of those that do not fit, the one with the lowest peak).
    """
    every = candidates(recipe, machine)
    fitting: list[Compiled] = []
    nearest: Compiled | None = None

    def compile_(candidate: Candidate) -> None:
        nonlocal nearest
        compiled = compile_step(with_names(candidate.recipe, "auto"), machine)
        candidate = candidate._replace(recipe=compiled.recipe)
        peak = f"{compiled.memory.peak / GIB:.2f} GiB"
        if compiled.fits:
            fitting.append(compiled)
            log(f"{candidate}: {step_seconds(compiled):.3g} s per step, {peak}")
        else:
            log(f"{candidate}: does not fit, {peak}")
            if nearest is None or compiled.memory.peak < nearest.memory.peak:
                nearest = compiled

    by_memory = sorted(every, key=lambda c: c.memory)
    fastest: dict[Any, Candidate] = {}
    for c in every:
        if c.memory < machine.chip.memory * GIB:
            fastest.setdefault(c.way, c)
    likely = list(fastest.values())
    # If none should fit, compile the smallest: the estimate may be wrong.
    chosen = likely[:MAX_COMPILED] or by_memory[:2]
    for candidate in tqdm(chosen, unit="plan", disable=None):
        compile_(candidate)
    if likely and not fitting and by_memory[0] not in chosen:
        compile_(by_memory[0])
    return sorted(fitting, key=step_seconds), nearest
