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
from llama_jax.model.sharding import PRESETS, first_position, no_mesh, reshard
from llama_jax.train.dpo import METRICS, dpo_sums, num_pairs
from llama_jax.train.optim import make_optimizer, make_schedule
from pallas_kernels import rotary_attention


class TrainState(NamedTuple):
    """What a training step updates."""

    params: Params
    """Float32 weights, as in the item `model` of a checkpoint; with LoRA, the adapters alone."""
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
    return TrainState(params, make_optimizer(recipe.optim, _num_steps(recipe)).init(params))


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
    frozen), where ``frozen`` is of :mod:`llama_jax.train.frozen`.

    The batch has a leading axis of microbatches. The metrics are scalars: "loss" (mean over the
    targets that count, nats/token; with DPO, over pairs), "grad_norm" (global, before clipping),
    "learning_rate" (of this update), and those of DPO.
    """
    optimizer = make_optimizer(recipe.optim, _num_steps(recipe))
    schedule = make_schedule(recipe.optim, _num_steps(recipe))
    sums = make_sums(recipe, compute)

    def train_step(state: TrainState, batch: Batch, *frozen: Params) -> tuple[TrainState, dict]:
        microbatches = batch.targets_BT.shape[0]
        counted = _num_counted(recipe, compute, batch)
        keys_M = None
        if recipe.lora and recipe.lora.dropout:
            seed = jax.random.key(recipe.train.seed)
            keys_M = jax.random.split(
                jax.random.fold_in(seed, _count(state.optimizer)), microbatches
            )

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

            def add(carry, microbatch_and_key):
                return jax.tree.map(jnp.add, carry, loss_and_grads(*microbatch_and_key)), None

            others = dict.fromkeys(METRICS, jnp.float32(0)) if recipe.dpo else {}
            zeros = (jnp.float32(0), others), jax.tree.map(jnp.zeros_like, state.params)
            (losses, grads), _ = jax.lax.scan(add, zeros, (batch, keys_M))
        metrics = {
            "loss": losses[0],
            "grad_norm": optax.tree.norm(grads),
            "learning_rate": schedule(_count(state.optimizer)),
            **losses[1],
        }
        updates, opt_state = optimizer.update(grads, state.optimizer, state.params)
        return TrainState(optax.apply_updates(state.params, updates), opt_state), metrics

    return train_step


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
    chunk = recipe.train.loss_chunk
    beta = recipe.dpo.beta if recipe.dpo else 0.0
    build, build_trained = _make_models(recipe, compute)

    def language_model(params, microbatch, *frozen, key=None):
        return nll_sum(build_trained(params, frozen, key), microbatch, chunk), {}

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


def nll_sum(llama: Llama, batch: Batch, chunk: int) -> jax.Array:
    """Sum of -log p(target) over the targets that count, in nats, float32.

    Args:
      llama: the model.
      batch: one microbatch, [B, T].
      chunk: number of tokens per device whose logits exist at the same time; the backward pass
        recomputes them. 0: all.
    """
    chunks, num_chunks = _loss_chunks(llama, batch, chunk)
    chunk_nll = lambda x, targets, mask: jnp.sum(token_nll(llama.logits(x), targets) * mask)
    if num_chunks == 1:
        return chunk_nll(*chunks)
    body = jax.checkpoint(lambda total, a: (total + chunk_nll(*a), None))
    return jax.lax.scan(body, jnp.float32(0), chunks)[0]


def masked_nll(llama: Llama, batch: Batch, chunk: int) -> jax.Array:
    """-log p(target) of each target that counts, 0 of the others, [B, T] float32.

    Args:
      llama: the model.
      batch: one microbatch, [B, T].
      chunk: as for :func:`nll_sum`.
    """
    return _per_target(
        llama, batch, chunk, lambda logits, targets, mask: token_nll(logits, targets) * mask
    )


def _per_target(llama: Llama, batch: Batch, chunk: int, compute: Callable[..., Any]) -> Any:
    """Arrays [B, T] that ``compute`` makes of the logits, targets and mask of each chunk."""
    chunks, num_chunks = _loss_chunks(llama, batch, chunk)
    on_chunk = lambda x, targets, mask: compute(llama.logits(x), targets, mask)
    if num_chunks == 1:
        return on_chunk(*chunks)
    body = jax.checkpoint(lambda _, a: (None, on_chunk(*a)))
    _, out_CBT = jax.lax.scan(body, None, chunks)
    return jax.tree.map(functools.partial(_join_positions, llama, batch), out_CBT)


def _join_positions(llama: Llama, batch: Batch, a_CBT: jax.Array) -> jax.Array:
    """Chunks, the inverse of :func:`_split_positions`, as [B, T]."""
    shape = batch.targets_BT.shape
    a_BTC = jnp.moveaxis(a_CBT, 0, 2)
    if no_mesh():
        return a_BTC.reshape(shape)
    BT = llama.compute.rules.activation_without_tensor("BT")
    return a_BTC.reshape(shape, out_sharding=BT)


def _loss_chunks(llama: Llama, batch: Batch, chunk: int) -> tuple[tuple, int]:
    """Hidden states, targets and mask, with a leading axis of chunks if there are several, and the
    number of chunks."""
    x_BTD = llama.hidden(
        batch.inputs_BT, positions_BT=batch.positions_BT, segment_ids_BT=batch.segment_ids_BT
    )
    targets_BT, mask_BT = batch.targets_BT, batch.mask_BT
    if mask_BT is None:
        mask_BT = jnp.ones(targets_BT.shape, jnp.float32)
    rules = llama.compute.rules
    targets_BT, mask_BT = (
        reshard(a, rules.activation_without_tensor("BT")) for a in (targets_BT, mask_BT)
    )
    num_chunks = _num_chunks(x_BTD, chunk)
    if num_chunks == 1:
        return (x_BTD, targets_BT, mask_BT), 1
    # A chunk holds every num_chunks-th position, so that it is sharded as the whole along T.
    split = lambda a, letters: jnp.moveaxis(
        _split_positions(a, num_chunks, rules.activation_without_tensor(letters)), 2, 0
    )
    return (split(x_BTD, "BTD"), split(targets_BT, "BT"), split(mask_BT, "BT")), num_chunks


def _num_chunks(x_BTD: jax.Array, chunk: int) -> int:
    """The smallest divisor of T (of one device) with at most ``chunk`` tokens per chunk."""
    if not chunk:
        return 1
    B, T = x_BTD.shape[:2] if no_mesh() else jax.typeof(x_BTD).sharding.shard_shape(x_BTD.shape)[:2]
    wanted = math.ceil(B * T / chunk)
    return next((n for n in range(wanted, T) if T % n == 0), T)


def _split_positions(a: jax.Array, num_chunks: int, spec: P) -> jax.Array:
    """[B, T, ...] as [B, T / num_chunks, num_chunks, ...]."""
    B, T, *rest = a.shape
    new = (B, T // num_chunks, num_chunks, *rest)
    if no_mesh():
        return a.reshape(new)
    return a.reshape(new, out_sharding=P(*spec[:2], None, *spec[2:]))


@jax.custom_vjp
def token_nll(logits_BTV: jax.Array, targets_BT: jax.Array) -> jax.Array:
    """-log softmax(logits)[target] of each token, [B, T] float32.

    The explicit backward pass, softmax(logits) - onehot, reads the logits once without a scatter.
    """
    return _token_nll_forward(logits_BTV, targets_BT)[0]


def _token_nll_forward(logits_BTV, targets_BT):
    m = jnp.max(logits_BTV, axis=-1, keepdims=True)
    lse = m + jnp.log(jnp.sum(jnp.exp(logits_BTV - m), axis=-1, keepdims=True))
    # A masked sum instead of a gather also works if V is sharded.
    target = jnp.sum(jnp.where(_is_target(logits_BTV, targets_BT), logits_BTV, 0), axis=-1)
    return lse[..., 0] - target, (logits_BTV, targets_BT, lse)


def _token_nll_backward(residuals, g_BT):
    logits_BTV, targets_BT, lse = residuals
    softmax = jnp.exp(logits_BTV - lse)
    return (softmax - _is_target(logits_BTV, targets_BT)) * g_BT[..., None], None


token_nll.defvjp(_token_nll_forward, _token_nll_backward)


def _is_target(logits_BTV, targets_BT):
    ids = jax.lax.broadcasted_iota(jnp.int32, logits_BTV.shape, 2)
    if not no_mesh():
        ids = reshard(ids, jax.typeof(logits_BTV).sharding.spec)
    return ids == targets_BT[..., None]


def make_eval_step(recipe: Recipe, compute: ComputeConfig) -> Callable[..., Any]:
    """The function to compile: (params, batch) -> :func:`nll_sum` of a batch of one microbatch.

    With LoRA, (params, batch, frozen). With DPO, the result is a dict of sums over pairs: "loss",
    :data:`METRICS`, and the number of "pairs".
    """
    sums = make_sums(recipe, compute)

    def eval_step(params: Params, batch: Batch, *frozen: Params) -> Any:
        loss, others = sums(params, batch.microbatch(0), *frozen)
        if not recipe.dpo:
            return loss
        return {"loss": loss, **others, "pairs": num_pairs(batch.microbatch(0), compute)}

    return eval_step


def make_score_step(recipe: Recipe, compute: ComputeConfig) -> Callable[..., Any]:
    """The function to compile: ``(params, batch, *frozen)`` -> two arrays [B, T], on every device:
    log p of each target that counts (float32; 0 of the others), and whether no other token is more
    likely."""
    _, build_trained = _make_models(recipe, compute)

    def score(logits_BTV, targets_BT, mask_BT):
        chosen_BTV = jnp.where(_is_target(logits_BTV, targets_BT), logits_BTV, -jnp.inf)
        greedy_BT = jnp.max(chosen_BTV, axis=-1) == jnp.max(logits_BTV, axis=-1)
        return -token_nll(logits_BTV, targets_BT) * mask_BT, greedy_BT

    def score_step(params: Params, batch: Batch, *frozen: Params) -> tuple[jax.Array, jax.Array]:
        model = build_trained(params, frozen, None)
        out = _per_target(model, batch.microbatch(0), recipe.train.loss_chunk, score)
        return jax.tree.map(lambda a: reshard(a, P()), out)

    return score_step
