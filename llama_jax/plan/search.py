"""The fastest way to run a recipe on a machine: mesh, parts of a batch, recomputation.

In: a recipe and a machine. Out: the plans compiled, fastest first. What to compile is chosen by an
estimate from shapes; what wins, by what was compiled.
"""

import dataclasses
import itertools
import math
from typing import NamedTuple

from tqdm import tqdm

from llama_jax.chips import GIB
from llama_jax.config import MeshConfig, Recipe
from llama_jax.plan.compile import Compiled, compile_step
from llama_jax.plan.machines import Machine
from llama_jax.plan.report import figures

TRIES = 4  # that are compiled


class Candidate(NamedTuple):
    """A recipe, and what shapes say of it: bytes of a device, seconds of a step."""

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
        return f"{sizes}, {train.gradient_accumulation} part(s), remat {train.remat}"


def candidates(recipe: Recipe, on: Machine) -> list[Candidate]:
    """Every way that the mesh divides, the shortest estimated step first."""
    model, found = recipe.model, []
    widths = (model.num_heads, model.num_kv_heads, model.ffn_dim, model.vocab_size)
    # TPU slices along `fsdp`, or one copy of the model in each.
    copies = {1, on.slices} if on.chip.platform == "tpu" else {1}
    # More devices than the width divides: the fewest copies that leave a size that does.
    copies.add(on.devices // math.gcd(on.devices, model.dim))
    for data, tensor in itertools.product(sorted(copies), (1, 2, 4, 8)):
        fsdp = on.devices // data // tensor
        ok = on.devices % (data * tensor) == 0 and not any(w % tensor for w in widths)
        if not ok or model.dim % fsdp or (tensor > 1 and recipe.data.seq_len % tensor):
            continue
        mesh = MeshConfig(data=data, fsdp=fsdp)
        if tensor > 1:
            mesh = MeshConfig(preset="tensor_sequence", data=data, fsdp=fsdp, tensor=tensor)
        most = recipe.train.batch_size / (data * fsdp)
        for parts in [2**i for i in range(12) if most % 2**i == 0 and most >= 2**i]:
            for remat in ("none", "matmuls", "full"):
                train = dataclasses.replace(recipe.train, gradient_accumulation=parts, remat=remat)
                each = dataclasses.replace(recipe, mesh=mesh, train=train)
                found.append(Candidate(each, *_estimate(each, on)))
    return sorted(found, key=lambda c: c.seconds)


def _estimate(recipe: Recipe, on: Machine) -> tuple[float, float]:
    """(bytes of a device, seconds of a step), from shapes: good for an order, not for a plan."""
    model, mesh, train = recipe.model, recipe.mesh, recipe.train
    tokens = train.batch_size * recipe.data.seq_len / on.devices
    D, F, N, K = model.dim, model.ffn_dim, *(model.size(x) * model.head_dim for x in "NK")
    outputs = N + 2 * K + 2 * D + 2 * F
    # The residual stream is kept everywhere; of the wide arrays each tensor device has its part.
    wide = {"full": 0, "matmuls": outputs, "none": 2.5 * outputs}[train.remat]
    kept = 2 * model.num_layers * (D + wide) * tokens / train.gradient_accumulation
    layer = 4 * (D * (2 * N + 2 * K) + 3 * D * F) / mesh.tensor
    memory = 16 * model.num_params / (mesh.fsdp * mesh.tensor) + kept + 2 * layer
    own = model.flops_per_token(recipe.data.seq_len) * tokens
    compute = own * (4 / 3 if train.remat == "full" else 1.03) / (on.chip.tflops * 1e12)
    # Weights come twice a part, gradients leave once, 2 bytes each.
    weights = 6 * model.num_params / mesh.tensor * train.gradient_accumulation
    # What a slice lacks comes in once, shared by its devices; copies exchange gradients alone.
    near = on.devices // on.slices // mesh.tensor
    between = weights / near if mesh.data == 1 else weights / (3 * mesh.fsdp)
    far = on.slices > 1 and on.chip.dcn
    moved = between / on.chip.dcn / 1e9 if far and on.chip.dcn else 0.0
    links = weights / (on.chip.interconnect * 1e9)
    # The residual stream is gathered and summed between tensor devices, four times a layer.
    crossing = 8 * 2 * model.num_layers * D * tokens * (mesh.tensor - 1)
    links += crossing / (on.chip.interconnect * 1e9)
    return memory, max(compute, moved, links) + 0.1 * (compute + moved + links)


def seconds(c: Compiled) -> float:
    """Of a step as compiled: its slowest term, and no less than the compiler's own estimate."""
    time = figures(c, None, None)["time"]
    return max(time["step"], time["compiler_estimate"] or 0.0)


def search(recipe: Recipe, on: Machine, say=print) -> tuple[list[Compiled], Compiled | None]:
    """(plans that fit, fastest first; of those that do not, the one that lacks least).

    Compiles at most :data:`TRIES`, with a progress bar.
    """
    every = candidates(recipe, on)
    room = on.chip.memory * GIB
    likely = [c for c in every if c.memory < room]
    # Where nothing seems to fit, what takes least is compiled: the estimate may be wrong.
    chosen = likely[:TRIES] or sorted(every, key=lambda c: c.memory)[:2]
    fitting: list[Compiled] = []
    nearest: Compiled | None = None
    for candidate in tqdm(chosen, unit="plan", disable=None):
        compiled = compile_step(candidate.recipe, on)
        peak = compiled.memory.peak / GIB
        if compiled.fits:
            fitting.append(compiled)
            say(f"{candidate}: {seconds(compiled):.3g} s a step, {peak:.2f} GiB")
        else:
            say(f"{candidate}: does not fit, {peak:.2f} GiB")
            if nearest is None or compiled.memory.peak < nearest.memory.peak:
                nearest = compiled
    if not fitting and likely:
        least = min(every, key=lambda c: c.memory)
        if least not in chosen:
            compiled = compile_step(least.recipe, on)
            say(f"{least}: {compiled.memory.peak / GIB:.2f} GiB")
            if compiled.fits:
                fitting.append(compiled)
            elif nearest is None or compiled.memory.peak < nearest.memory.peak:
                nearest = compiled
    return sorted(fitting, key=seconds), nearest if math.isfinite(room) else None
