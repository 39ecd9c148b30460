"""Loads the model to evaluate."""

from typing import TYPE_CHECKING

import jax

from llama_jax.config.recipe import MeshConfig
from llama_jax.generate.load import load
from llama_jax.model.sharding import make_mesh

if TYPE_CHECKING:
    from llama_jax.generate.llm import LLM


def load_model(
    checkpoint: str,
    *,
    adapter: str | None = None,
    dtype: str | None = None,
    quantize: str | None = None,
    cache: str | None = None,
    tensor: int = 1,
) -> "LLM":
    """A model as :func:`llama_jax.load` loads it.

    Args:
      checkpoint: folder, file or name of the weights.
      adapter: folder of a LoRA adapter.
      dtype: "float32" or "bfloat16".
      quantize: "int8" or "int4".
      cache: "int8" for keys and values in 8 bits.
      tensor: number of devices that each weight is sharded over.

    Raises:
      ValueError: as for :func:`llama_jax.load`, or too few devices.
    """
    mesh = None
    if tensor != 1:
        devices = jax.devices()
        if not 1 <= tensor <= len(devices):
            raise ValueError(f"tensor={tensor} must be 1 to {len(devices)}, the number of devices")
        mesh = make_mesh(MeshConfig(preset="fsdp_tensor", fsdp=1, tensor=tensor), devices[:tensor])
    return load(checkpoint, adapter=adapter, dtype=dtype, quantize=quantize, cache=cache, mesh=mesh)
