"""How a model is computed; what it computes is :class:`llama_jax.config.ModelConfig`."""

import dataclasses

import jax.numpy as jnp

from llama_jax.config.activations import Remat
from llama_jax.model.sharding import PRESETS, Rules


@dataclasses.dataclass(frozen=True)
class ComputeConfig:
    """Number formats, sharding and memory of a model's computation.

    Example:
      compute = ComputeConfig(jnp.dtype("bfloat16"), unroll=True)
    """

    dtype: jnp.dtype
    """of activations and matrix products; weights are cast to it where they are used"""
    rules: Rules = PRESETS["fsdp"]
    """sharding rules, used when a mesh is set"""
    remat: Remat = "none"
    """what the backward pass recomputes, see TrainConfig.remat"""
    offload: tuple[str, ...] = ()
    """activations kept in the host's memory, see TrainConfig.offload"""
    unroll: bool = False
    """a Python loop over the layers instead of a scan"""
    attention: str | None = None
    """attention implementation by name; None: the first one that the platform supports"""
    cache_dtype: jnp.dtype | None = None
    """of the cache of keys and values; None: ``dtype``"""
    reduce_float32: bool = False
    """sum weight gradients over devices in float32 instead of ``dtype``"""
