"""LLaMA in JAX and Flax: train, convert, generate. Importing this package does not import jax.

Example::

    llm = llama_jax.load("checkpoints/tiny")
    llm.generate("def main(", max_new_tokens=64, sampling=llama_jax.Sample(temperature=0.8))
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llama_jax.config import MODELS
    from llama_jax.generate.llm import LLM
    from llama_jax.generate.load import load
    from llama_jax.generate.sampler import Greedy, Sample

    __version__: str

__all__ = ["LLM", "MODELS", "Greedy", "Sample", "__version__", "load"]

_MODULE_OF = {
    "LLM": "generate.llm",
    "MODELS": "config",
    "Greedy": "generate.sampler",
    "Sample": "generate.sampler",
    "load": "generate.load",
}


def __getattr__(name: str) -> Any:
    """Import public names when they are used for the first time."""
    if name == "__version__":
        value: Any = _version()
    elif name in _MODULE_OF:
        value = getattr(importlib.import_module(f"llama_jax.{_MODULE_OF[name]}"), name)
    else:
        raise AttributeError(f"module 'llama_jax' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__


def _version() -> str:
    """The installed version; in a source checkout that is not installed, that of pyproject.toml."""
    import importlib.metadata
    import tomllib
    from pathlib import Path

    try:
        return importlib.metadata.version("llama_jax")
    except importlib.metadata.PackageNotFoundError:
        pyproject = Path(__file__).parents[1] / "pyproject.toml"
        return tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]["version"]
