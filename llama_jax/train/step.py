"""The training step (loss, gradient, update), which `train` runs and `plan` compiles."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from llama_jax.config import ConfigError, Recipe
from llama_jax.data.batch import Batch
from llama_jax.model.llama import ComputeConfig, Llama
from llama_jax.model.lora import init_adapters, num_adapter_params, with_adapters
from llama_jax.model.params import Params, merge, params_of, structure
from llama_jax.model.rope import rope_of
from llama_jax.model.sharding import PRESETS, first_position, reshard
from llama_jax.train.dpo import METRICS, dpo_sums, num_pairs
from llama_jax.train.loss import is_target, masked_nll, nll_and_z_sums, per_target, token_nll
from llama_jax.train.optim import cast_matrices, make_optimizer, make_schedule
from llama_jax.train.rounding import round_like, to_float32
from pallas_kernels import rotary_attention

_ROUNDING = 2**32 - 1
"""Separates the random keys of rounding from those of dropout, whose number is the step."""


class TrainState(NamedTuple):
    """What a training step updates."""

    params: Params
    """Weights in `train.param_dtype`, as in the item `model` of a checkpoint; with LoRA, the
    adapters alone."""
    optimizer: Any
    """State of :func:`llama_jax.train.optim.make_optimizer`."""


def compute_config(recipe: Recipe, platform: str) -> ComputeConfig:
    """How the recipe's model is computed on ``platform``."""
    train = recipe.train
    dtype = train.compute_dtype
    if dtype == "auto":
        dtype = "float32" if platform == "cpu" else "bfloat16"
    return ComputeConfig(
        jnp.dtype(dtype),
        PRESETS[recipe.mesh.preset],
        train.remat,
        train.offload,
        train.unroll,
        train.attention or None,
        reduce_float32=train.reduce_dtype == "float32",
    )


def check_attention(recipe: Recipe, mesh: Mesh) -> None:
    """Check that the implementation named by ``train.attention`` exists and supports this run.

    Nothing is compiled.

    Raises:
      ConfigError: it does not; with the reason.
    """
    name, cfg, S = recipe.train.attention, recipe.model, recipe.data.seq_len
    if not name:
        return
    compute = compute_config(recipe, mesh.devices.flat[0].platform)
    T, num_shards = S // mesh.shape["context"], mesh.shape["tensor"]
    shape = lambda x, heads: jax.ShapeDtypeStruct(
        (1, x, heads // num_shards, cfg.head_dim), compute.dtype
    )
    keys = shape(S, cfg.num_kv_heads)

    def attend(q, k, v, positions, kv_positions):
        segmented = recipe.data.has_segments or recipe.train.evaluate is not None
        return rotary_attention(
            q, k, v, positions, rope_of(cfg, jnp.int32(S)), kv_positions_BS=kv_positions,
            segment_ids_BT=positions if segmented else None,
            kv_segment_ids_BS=kv_positions if segmented and T != S else None,
            q_offset=first_position(T), implementation=name,
        )  # fmt: skip

    positions = [jax.ShapeDtypeStruct((1, n), jnp.int32) for n in (T, S)]
    on_device = jax.shard_map(attend, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False)
    try:
        with jax.set_mesh(mesh):
            jax.eval_shape(on_device, shape(T, cfg.num_heads), keys, keys, *positions)
    except (NotImplementedError, ValueError) as e:
        raise ConfigError(
            f"train.attention={name!r} cannot be used here: {e}; remove train.attention to use "
            "the best implementation for the platform"
        ) from e


def init_state(recipe: Recipe, compute: ComputeConfig) -> TrainState:
    """Random weights (with LoRA, adapters) from ``train.seed``, and the initial state of the
    optimizer."""
    if recipe.lora:
        key = jax.random.key(recipe.train.seed)
        params = init_adapters(recipe.model, compute, recipe.lora, key)
    else:
        rngs = nnx.Rngs(recipe.train.seed)
        params = params_of(Llama(recipe.model, compute, rngs, recipe.train.init_std))
    moments = make_optimizer(recipe.optim, _num_steps(recipe)).init(params)
    return TrainState(
        cast_matrices(params, recipe.train.param_dtype),
        cast_matrices(moments, recipe.optim.moment_dtype),
    )


def _num_steps(recipe: Recipe) -> int:
    """Steps of the schedule. With train.epochs, the loop replaces them by steps as soon as the data
    is known; before that, the planner compiles the same program with any number."""
    return recipe.train.steps or 1


def abstract_state(recipe: Recipe, compute: ComputeConfig, mesh: Mesh) -> TrainState:
    """Shapes, dtypes and shardings of :func:`init_state`; no memory is used.

    Args:
      recipe: the run.
      compute: how the model is computed.
      mesh: devices of the run.
    """
    with jax.set_mesh(mesh):
        state = jax.eval_shape(functools.partial(init_state, recipe, compute))
    # Vectors and counters have no sharding: they are replicated.
    spec = lambda x: P() if x.sharding is None else x.sharding.spec
    place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec(x)))
    return jax.tree.map(place, state)


def flops_per_token(recipe: Recipe) -> float:
    """FLOPs of the model per training token, without what the backward pass recomputes.

    6 per parameter (forward pass, gradients of inputs and of weights), and attention; with LoRA, 4
    per parameter of the base and 6 per parameter of the adapters. DPO adds the forward pass of the
    reference.
    """
    model, T = recipe.model, recipe.data.seq_len
    all_weights = model.flops_per_token(T)
    lookup = 0 if model.tie_embeddings else math.prod(model.shape("VD"))
    weight_gradients = 2.0 * (model.num_params - lookup)
    flops = all_weights
    if recipe.lora:
        flops += 6.0 * num_adapter_params(model, recipe.lora) - weight_gradients
    return flops + (all_weights / 3 if recipe.dpo else 0)


def make_train_step(
    recipe: Recipe, compute: ComputeConfig
) -> Callable[..., tuple[TrainState, dict]]:
    """The function to compile: (state, batch) -> (state, metrics); with LoRA or DPO, (state, batch,
    frozen), where ``frozen`` is of :mod:`llama_jax.train.frozen`. With ``optim.skip_spikes``, the
    argument ``limit`` is the gradient norm over which parameters and moments do not change.

    The batch has a leading axis of microbatches. The metrics are scalars: "loss" (mean over the
    targets that count, nats/token, without the z-loss; with DPO, over pairs), "grad_norm" (global,
    before clipping), "learning_rate" (of this update), "z_loss" and "skipped" (0 or 1) if the
    recipe has these settings, and those of DPO.
    """
    optimizer = make_optimizer(recipe.optim, _num_steps(recipe))
    schedule = make_schedule(recipe.optim, _num_steps(recipe))
    sums = make_sums(recipe, compute)

    def train_step(
        state: TrainState, batch: Batch, *frozen: Params, limit: jax.Array | None = None
    ) -> tuple[TrainState, dict]:
        microbatches = batch.targets_BT.shape[0]
        counted = _num_counted(recipe, compute, batch)
        seed, count = jax.random.key(recipe.train.seed), _count(state.optimizer)
        keys_M = None
        if recipe.lora and recipe.lora.dropout:
            keys_M = jax.random.split(jax.random.fold_in(seed, count), microbatches)
        # Other keys than those of the dropout.
        rounding = jax.random.fold_in(jax.random.fold_in(seed, _ROUNDING), count)

        def loss_and_grads(microbatch: Batch, key: jax.Array | None) -> tuple[Any, Params]:
            def loss(params):
                total, others = sums(params, microbatch, *frozen, key=key)
                return total / counted, jax.tree.map(lambda x: x / counted, others)

            return jax.value_and_grad(loss, has_aux=True)(state.params)

        if microbatches == 1:
            losses, grads = loss_and_grads(
                batch.microbatch(0), None if keys_M is None else keys_M[0]
            )
        else:

            def add(carry, inputs):
                microbatch, key, m = inputs
                terms = to_float32((carry, loss_and_grads(microbatch, key)))
                total = jax.tree.map(jnp.add, *terms)
                return round_like(jax.random.fold_in(rounding, m), total, carry), None

            others = dict.fromkeys(_other_metrics(recipe), jnp.float32(0))
            zeros = (jnp.float32(0), others), jax.tree.map(jnp.zeros_like, state.params)
            inputs = batch, keys_M, jnp.arange(microbatches)
            (losses, grads), _ = jax.lax.scan(add, zeros, inputs)
        grads = to_float32(grads)
        metrics = {
            "loss": losses[0] - losses[1].get("z_loss", 0),
            "grad_norm": optax.tree.norm(grads),
            "learning_rate": schedule(count),
            **losses[1],
        }
        new = update_state(optimizer, state, grads, jax.random.fold_in(rounding, microbatches))
        if limit is not None:
            skip = metrics["grad_norm"] > limit
            # The learning rate follows the number of steps, skipped ones included.
            kept = TrainState(state.params, (*state.optimizer[:-1], new.optimizer[-1]))
            new = jax.tree.map(lambda old, updated: jnp.where(skip, old, updated), kept, new)
            metrics["skipped"] = skip.astype(jnp.float32)
        return new, metrics

    return train_step


def update_state(
    optimizer: optax.GradientTransformation, state: TrainState, grads: Params, key: jax.Array
) -> TrainState:
    """The state after a step, computed in float32 and rounded to the dtypes of the state.

    Args:
      optimizer: of the state.
      state: before the step.
      grads: gradients, float32.
      key: random key of the rounding.
    """
    params, moments = to_float32(state)
    updates, moments = optimizer.update(grads, moments, params)
    return round_like(key, TrainState(optax.apply_updates(params, updates), moments), state)


def _other_metrics(recipe: Recipe) -> tuple[str, ...]:
    """What is summed beside the loss."""
    if recipe.dpo:
        return METRICS
    return ("z_loss",) if recipe.train.z_loss else ()


def _make_models(recipe: Recipe, compute: ComputeConfig) -> tuple[Callable, Callable]:
    """The functions params -> model, and (params in training, frozen arguments, key of the
    dropout) -> model in training."""
    graphdef = functools.cache(functools.partial(structure, recipe.model, compute))

    def build(params: Params) -> Llama:
        return merge(graphdef(0 in params["blocks"]), params)

    def build_trained(params: Params, frozen: tuple, key: jax.Array | None) -> Llama:
        if recipe.lora:
            params = with_adapters(frozen[0], params, recipe.lora, key)
        return build(params)

    return build, build_trained


def make_sums(recipe: Recipe, compute: ComputeConfig) -> Callable[..., tuple[jax.Array, dict]]:
    """The function ``(params, microbatch, *frozen, key)`` -> sums of the loss and of other metrics
    over the targets, or the pairs, that count."""
    chunk, z_loss = recipe.train.loss_chunk, recipe.train.z_loss
    beta = recipe.dpo.beta if recipe.dpo else 0.0
    build, build_trained = _make_models(recipe, compute)

    def language_model(params, microbatch, *frozen, key=None):
        model = build_trained(params, frozen, key)
        nll, z = nll_and_z_sums(model, microbatch, chunk, z_loss)
        return nll + z, {"z_loss": z} if z_loss else {}

    def preferences(params, microbatch, reference, key=None):
        policy = build_trained(params, (reference,), key)
        reference_BT = -masked_nll(build(reference), microbatch, chunk)
        policy_BT = -masked_nll(policy, microbatch, chunk)
        reference_BT = jax.lax.stop_gradient(reference_BT)
        return dpo_sums(policy_BT, reference_BT, microbatch, beta, compute)

    return preferences if recipe.dpo else language_model


def _num_counted(recipe: Recipe, compute: ComputeConfig, batch: Batch) -> jax.Array:
    """Number of targets, or pairs, that count in all microbatches; at least 1, because a batch of
    a small data set may have none."""
    if recipe.dpo:
        pairs = jax.lax.map(functools.partial(num_pairs, compute=compute), batch)
        return jnp.maximum(jnp.sum(pairs), 1)
    if batch.mask_BT is None:
        return jnp.float32(batch.targets_BT.size)
    return jnp.maximum(jnp.sum(batch.mask_BT), 1)


def _count(opt_state: Any) -> jax.Array:
    """Number of updates, from the counter that the learning rate itself uses."""
    return opt_state[-1].count


def make_eval_step(recipe: Recipe, compute: ComputeConfig) -> Callable[..., Any]:
    """The function to compile: (params, batch) -> :func:`llama_jax.train.loss.nll_sum` of a batch
    of one microbatch.

    With LoRA, (params, batch, frozen). With DPO, the result is a dict of sums over pairs: "loss",
    :data:`METRICS`, and the number of "pairs".
    """
    sums = make_sums(recipe, compute)

    def eval_step(params: Params, batch: Batch, *frozen: Params) -> Any:
        loss, others = sums(params, batch.microbatch(0), *frozen)
        if not recipe.dpo:
            return loss - others.get("z_loss", 0)
        return {"loss": loss, **others, "pairs": num_pairs(batch.microbatch(0), compute)}

    return eval_step


def make_score_step(recipe: Recipe, compute: ComputeConfig) -> Callable[..., Any]:
    """The function to compile: ``(params, batch, *frozen)`` -> two arrays [B, T], on every device:
    log p of each target that counts (float32; 0 of the others), and whether no other token is more
    likely."""
    _, build_trained = _make_models(recipe, compute)

    def score(logits_BTV, targets_BT, mask_BT):
        chosen_BTV = jnp.where(is_target(logits_BTV, targets_BT), logits_BTV, -jnp.inf)
        greedy_BT = jnp.max(chosen_BTV, axis=-1) == jnp.max(logits_BTV, axis=-1)
        return -token_nll(logits_BTV, targets_BT) * mask_BT, greedy_BT

    def score_step(params: Params, batch: Batch, *frozen: Params) -> tuple[jax.Array, jax.Array]:
        model = build_trained(params, frozen, None)
        out = per_target(model, batch.microbatch(0), recipe.train.loss_chunk, score)
        return jax.tree.map(lambda a: reshard(a, P()), out)

    return score_step
