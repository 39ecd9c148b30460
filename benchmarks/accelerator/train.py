"""Step 6: a training step, as `llama_jax.train` compiles it on one device, without data."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks.accelerator.common import Row, Rows, Sizes, seconds
from benchmarks.accelerator.correctness import kernels
from llama_jax import chips
from llama_jax.config import (
    MODELS,
    CheckpointConfig,
    DataConfig,
    Recipe,
    SourceConfig,
    TrainConfig,
)
from llama_jax.data.batch import Batch
from llama_jax.model.sharding import make_mesh
from llama_jax.train.step import abstract_state, compute_config, init_state, make_train_step
from pallas_kernels.rotary_attention import _IMPLEMENTATIONS

LOSS_CHUNK = 4096
"""tokens whose logits are in memory at a time; all 16384 would take 8 GB of a vocabulary of 128k"""


def rows(s: Sizes, earlier: dict[str, Row]) -> Rows:
    for attention in kernels(_IMPLEMENTATIONS):
        for remat in ("matmuls", "none")[: 2 if s.every_row else 1]:
            yield (
                f"train {s.train_model}, remat {remat}, {attention}",
                functools.partial(measure, s, remat, attention),
            )


def recipe_of(s: Sizes, remat: Any, attention: str) -> Recipe:
    """The run; no file of it is read or written."""
    B, T = s.train_batch
    data = DataConfig(sources={"none": SourceConfig(path="none")}, seq_len=T)
    train = TrainConfig(
        steps=1000, batch_size=B, remat=remat, attention=attention,
        loss_chunk=LOSS_CHUNK if B * T > LOSS_CHUNK else 0,
    )  # fmt: skip
    return Recipe(
        model=MODELS[s.train_model], data=data, train=train, checkpoint=CheckpointConfig(dir="none")
    )


def program(recipe: Recipe, platform: str) -> Callable[..., Any]:
    """The jitted step: (state, batch) -> (state, metrics)."""
    step = make_train_step(recipe, compute_config(recipe, platform))
    return jax.jit(step, donate_argnums=0, compiler_options=chips.compiler_options(platform))


def arguments(recipe: Recipe, mesh: Mesh, platform: str) -> tuple[Any, Batch]:
    """Shapes of state and batch, with shardings."""
    compute = compute_config(recipe, platform)
    where = NamedSharding(mesh, P(None, *compute.rules.activation_without_tensor("BT")))
    shape = (1, recipe.train.batch_size, recipe.data.seq_len)
    ids = jax.ShapeDtypeStruct(shape, np.int32, sharding=where)
    return abstract_state(recipe, compute, mesh), Batch(ids, ids)


def measure(s: Sizes, remat: str, attention: str) -> Row:
    """Time, tokens per second, MFU and memory."""
    recipe, device = recipe_of(s, remat, attention), jax.devices()[0]
    mesh = make_mesh(recipe.mesh, [device])
    compute = compute_config(recipe, device.platform)
    with jax.set_mesh(mesh):
        shapes = arguments(recipe, mesh, device.platform)
        compiled = program(recipe, device.platform).lower(*shapes).compile()
        shardings = jax.tree.map(lambda x: x.sharding, shapes[0])
        init = functools.partial(init_state, recipe, compute)
        state = jax.jit(init, out_shardings=shardings)()
        batches = [_batch(recipe, shapes[1], seed) for seed in range(4)]
        losses: list[Any] = []

        def run(n: int) -> None:
            nonlocal state
            for i in range(n):
                state, metrics = compiled(state, batches[i % len(batches)])
                losses.append(metrics["loss"])
            losses[-1].block_until_ready()

        time = seconds(run, s)
    tokens = recipe.tokens_per_step / time["median"]
    numbers = {"tokens/s": tokens}
    if device.platform != "cpu":
        peak, _ = chips.peak_flops(device)
        numbers["MFU"] = tokens * recipe.model.flops_per_token(recipe.data.seq_len) / peak
    memory = compiled.memory_analysis()
    first, last = float(losses[0]), float(losses[-1])
    numbers |= {"GiB": peak_gib(memory), "first loss": first, "last loss": last}
    right = math.isfinite(last) and abs(first - math.log(recipe.model.vocab_size)) < 1
    return {"seconds": time, "numbers": numbers, "wrong": "" if right else "loss"}


def peak_gib(memory: Any) -> float:
    """Arguments, temporaries and outputs that are not in the place of arguments."""
    new = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return (memory.argument_size_in_bytes + memory.temp_size_in_bytes + new) / 2**30


def _batch(recipe: Recipe, like: Batch, seed: int) -> Batch:
    rng = np.random.default_rng(seed)
    B, T = like.inputs_BT.shape[1:]
    ids = rng.integers(0, recipe.model.vocab_size, (1, B, T + 1), np.int32)
    put = lambda x: jax.device_put(x, like.inputs_BT.sharding)
    return Batch(put(ids[..., :-1]), put(ids[..., 1:]))
