"""LLaMA in JAX and Flax: train, convert, sample. Importing it loads nothing heavy.

llm = llama_jax.load("checkpoints/tiny")
llm.generate("def main(", max_new_tokens=64, sampling=llama_jax.Sample(temperature=0.8))
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llama_jax.generate.load import load as load
    from llama_jax.generate.sampler import Greedy as Greedy
    from llama_jax.generate.sampler import Sample as Sample

_MODULES = {"load": "generate.load", "Greedy": "generate.sampler", "Sample": "generate.sampler"}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'llama_jax' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"llama_jax.{_MODULES[name]}"), name)
    globals()[name] = value
    return value
