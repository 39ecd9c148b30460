"""The loss: -log p(target) of the targets of a batch, in chunks of tokens, and the z-loss."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from llama_jax.data.batch import Batch
from llama_jax.model.llama import Llama
from llama_jax.model.sharding import no_mesh, reshard


def nll_sum(llama: Llama, batch: Batch, chunk: int) -> jax.Array:
    """Sum of -log p(target) over the targets that count, in nats, float32.

    Args:
      llama: the model.
      batch: one microbatch, [B, T].
      chunk: number of tokens per device whose logits exist at the same time; the backward pass
        recomputes them. 0: all.
    """
    return nll_and_z_sums(llama, batch, chunk, 0)[0]


def nll_and_z_sums(
    llama: Llama, batch: Batch, chunk: int, z_loss: float
) -> tuple[jax.Array, jax.Array]:
    """:func:`nll_sum`, and the sum of ``z_loss`` * log(sum of exp(logits))^2 over the same targets.

    Args:
      llama: the model.
      batch: one microbatch, [B, T].
      chunk: as for :func:`nll_sum`.
      z_loss: weight (PaLM, arXiv 2204.02311, section 5); 0: the logits are not read again.
    """
    chunks, num_chunks, logits = _loss_chunks(llama, batch, chunk)

    def chunk_sums(x, targets, mask):
        logits_BTV = logits(x)
        nll = jnp.sum(token_nll(logits_BTV, targets) * mask)
        if not z_loss:
            return nll, jnp.float32(0)
        z_BT = jnp.square(jax.nn.logsumexp(logits_BTV, axis=-1))
        return nll, z_loss * jnp.sum(z_BT * mask)

    if num_chunks == 1:
        return chunk_sums(*chunks)
    body = jax.checkpoint(lambda totals, a: (jax.tree.map(jnp.add, totals, chunk_sums(*a)), None))
    return jax.lax.scan(body, (jnp.float32(0), jnp.float32(0)), chunks)[0]


def masked_nll(llama: Llama, batch: Batch, chunk: int) -> jax.Array:
    """-log p(target) of each target that counts, 0 of the others, [B, T] float32.

    Args:
      llama: the model.
      batch: one microbatch, [B, T].
      chunk: as for :func:`nll_sum`.
    """
    return per_target(
        llama, batch, chunk, lambda logits, targets, mask: token_nll(logits, targets) * mask
    )


def per_target(llama: Llama, batch: Batch, chunk: int, compute: Callable[..., Any]) -> Any:
    """Arrays [B, T] made of the logits, targets and mask of each chunk.

    Args:
      llama: the model.
      batch: one microbatch, [B, T].
      chunk: as for :func:`nll_sum`.
      compute: the function from logits, targets and mask of a chunk to the arrays.
    """
    chunks, num_chunks, logits = _loss_chunks(llama, batch, chunk)
    on_chunk = lambda x, targets, mask: compute(logits(x), targets, mask)
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


def _loss_chunks(llama: Llama, batch: Batch, chunk: int) -> tuple[tuple, int, Callable]:
    """Hidden states, targets and mask, with a leading axis of chunks if there are several; the
    number of chunks; and the function from hidden states to logits."""
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
        return (x_BTD, targets_BT, mask_BT), 1, llama.logits
    # A chunk holds every num_chunks-th position, so that it is sharded as the whole along T.
    split = lambda a, letters: jnp.moveaxis(
        _split_positions(a, num_chunks, rules.activation_without_tensor(letters)), 2, 0
    )
    logits = functools.partial(llama.logits, unembed=llama.gathered_unembed())
    return (split(x_BTD, "BTD"), split(targets_BT, "BT"), split(mask_BT, "BT")), num_chunks, logits


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
    target = jnp.sum(jnp.where(is_target(logits_BTV, targets_BT), logits_BTV, 0), axis=-1)
    return lse[..., 0] - target, (logits_BTV, targets_BT, lse)


def _token_nll_backward(residuals, g_BT):
    logits_BTV, targets_BT, lse = residuals
    softmax = jnp.exp(logits_BTV - lse)
    return (softmax - is_target(logits_BTV, targets_BT)) * g_BT[..., None], None


token_nll.defvjp(_token_nll_forward, _token_nll_backward)


def is_target(logits_BTV: jax.Array, targets_BT: jax.Array) -> jax.Array:
    """Whether each token of the vocabulary is the target, [B, T, V]."""
    ids_V = jnp.arange(logits_BTV.shape[-1], dtype=jnp.int32)
    ids_V = reshard(ids_V, P(jax.typeof(logits_BTV).sharding.spec[2]))
    return ids_V == targets_BT[..., None]
