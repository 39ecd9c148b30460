"""Weights that training reads and does not change: the base of LoRA's adapters, or the reference
model of DPO without LoRA. They are those of ``train.init_from``."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from llama_jax.checkpoint.model_json import read_metadata
from llama_jax.config import Recipe
from llama_jax.generate.read_params import on_devices, read_params
from llama_jax.model.compute import ComputeConfig
from llama_jax.model.params import Params, abstract_params
from llama_jax.model.quantize import KINDS, quantize
from llama_jax.storage.paths import as_path


def has_frozen(recipe: Recipe) -> bool:
    """Whether a run has such weights."""
    return recipe.lora is not None or recipe.dpo is not None


def frozen_format(recipe: Recipe, compute: ComputeConfig) -> str:
    """Their number format: that of ``lora.base``, or of the computation."""
    kind = "auto" if recipe.lora is None else recipe.lora.base
    return compute.dtype.name if kind == "auto" else kind


def abstract_frozen(recipe: Recipe, compute: ComputeConfig, mesh: Mesh) -> Params:
    """Shapes, dtypes and shardings of :func:`load_frozen`; no memory is used.

    Args:
      recipe: the run.
      compute: how the model is computed.
      mesh: devices of the run.
    """
    kind, like = frozen_format(recipe, compute), _unquantized(recipe, compute, mesh)
    if kind in KINDS:
        with jax.set_mesh(mesh):
            quantized = jax.eval_shape(functools.partial(quantize, kind=kind), like)
        like = on_devices(quantized, None, mesh)
    if not is_unstacked(recipe, compute):
        return like

    def layer_of(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        sharding = NamedSharding(mesh, P(*x.sharding.spec[1:]))
        return jax.ShapeDtypeStruct(x.shape[1:], x.dtype, sharding=sharding)

    layer = jax.tree.map(layer_of, like["blocks"])
    return {**like, "blocks": dict.fromkeys(range(recipe.model.num_layers), layer)}


def is_unstacked(recipe: Recipe, compute: ComputeConfig) -> bool:
    """Whether the base has one dict per layer: an unrolled step would slice each layer of a stack
    in every call."""
    return recipe.lora is not None and compute.unroll


def load_frozen(recipe: Recipe, compute: ComputeConfig, mesh: Mesh) -> Params:
    """Read them in their number format; quantized layer by layer.

    Args:
      recipe: the run.
      compute: how the model is computed.
      mesh: devices of the run; it must be set.

    Raises:
      ConfigError: the weights are missing, damaged, or of other shapes.
    """
    folder, kind = as_path(recipe.train.init_from), frozen_format(recipe, compute)
    stored = read_metadata(folder)[1].get("quantize")
    like = _unquantized(recipe, compute, mesh)
    quantized = kind if kind in KINDS else None
    unstacked = is_unstacked(recipe, compute)
    return read_params(folder, recipe.model, like, quantized, stored, unstacked)


def _unquantized(recipe: Recipe, compute: ComputeConfig, mesh: Mesh) -> Params:
    kind = frozen_format(recipe, compute)
    dtype = compute.dtype if kind in KINDS else jnp.dtype(kind)
    with jax.set_mesh(mesh):
        abstract = abstract_params(recipe.model, compute)
    return on_devices(abstract, dtype, mesh)
