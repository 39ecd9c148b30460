"""The loss of direct preference optimization (DPO, arXiv 2305.18290).

A pair is two segments of one row: 2k - 1 is the chosen conversation and 2k the rejected one. Only
the counted tokens of the answers are in the sums of log-probabilities.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from llama_jax.data.batch import Batch
from llama_jax.model.compute import ComputeConfig
from llama_jax.model.sharding import no_mesh, reshard

METRICS = ("rewards/chosen", "rewards/rejected", "rewards/accuracy", "rewards/margin")
"""Means over pairs; a reward is beta * (log-probability of the model - that of the reference)."""


def dpo_sums(
    policy_BT: jax.Array, reference_BT: jax.Array, batch: Batch, beta: float, compute: ComputeConfig
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Sums over the pairs of a microbatch: the loss -log sigmoid(margin), and :data:`METRICS`.

    Args:
      policy_BT: log-probability of each counted target, 0 elsewhere.
      reference_BT: the same of the reference model.
      batch: one microbatch, [B, T].
      beta: how strongly the model is kept near the reference.
      compute: has the sharding rules.
    """
    chosen_BK, rejected_BK, is_pair_BK = _per_pair(policy_BT - reference_BT, batch, compute)
    chosen_BK, rejected_BK = beta * chosen_BK, beta * rejected_BK
    margin_BK = chosen_BK - rejected_BK
    total = lambda x_BK: jnp.sum(jnp.where(is_pair_BK, x_BK, 0))
    values = (chosen_BK, rejected_BK, (margin_BK > 0).astype(jnp.float32), margin_BK)
    sums = jax.lax.stop_gradient([total(x) for x in values])
    return total(-jax.nn.log_sigmoid(margin_BK)), dict(zip(METRICS, sums, strict=True))


def num_pairs(batch: Batch, compute: ComputeConfig) -> jax.Array:
    """Number of pairs with a counted token in a microbatch, float32."""
    return jnp.sum(_per_pair(batch.mask_BT, batch, compute)[2].astype(jnp.float32))


def _per_pair(x_BT: jax.Array, batch: Batch, compute: ComputeConfig) -> tuple[jax.Array, ...]:
    """Sums of x over the counted tokens of each chosen and each rejected segment, and which of
    these pairs exist; all [B, K], where K is at least the number of pairs in a row."""
    mask_BT, segments_BT = batch.mask_BT, batch.segment_ids_BT
    assert mask_BT is not None
    assert segments_BT is not None
    arrays: tuple = (x_BT, mask_BT, segments_BT)
    if no_mesh():
        return _local_per_pair(*arrays)
    rows = P(compute.rules.activation_without_tensor("BT")[0])
    spec = P(*rows, None)
    per_row = jax.shard_map(_local_per_pair, in_specs=spec, out_specs=spec)
    return per_row(*(reshard(x, spec) for x in arrays))


def _local_per_pair(x_BT, mask_BT, segments_BT):
    # Two tokens for each side of a pair, at least: an input and its target.
    pair_of = functools.partial(jax.lax.broadcasted_iota, jnp.int32)
    shape = (*x_BT.shape, max(1, x_BT.shape[1] // 2))
    of_pair_BTK = (segments_BT[..., None] - 1) // 2 == pair_of(shape, 2)
    is_chosen_BT1 = (segments_BT % 2 == 1)[..., None]
    x_BT1 = (x_BT * mask_BT)[..., None]
    chosen_BK = jnp.sum(jnp.where(of_pair_BTK & is_chosen_BT1, x_BT1, 0), axis=1)
    rejected_BK = jnp.sum(jnp.where(of_pair_BTK & ~is_chosen_BT1, x_BT1, 0), axis=1)
    counted_BK = jnp.sum(jnp.where(of_pair_BTK, mask_BT[..., None], 0), axis=1)
    return chosen_BK, rejected_BK, counted_BK > 0
