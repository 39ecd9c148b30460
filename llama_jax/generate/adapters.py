"""LoRA adapters for generation: finds the base of an adapter, compares it with the weights in use,
and makes a model of both."""

import copy
import sys
from pathlib import Path
from typing import Any, NamedTuple

from llama_jax.checkpoint.file_hashes import weights_sha256
from llama_jax.checkpoint.model_json import lora_of, read_metadata
from llama_jax.checkpoint.steps import loaded_step
from llama_jax.checkpoint.weights import check_weights, load_weights
from llama_jax.config import ConfigError, LoraConfig, ModelConfig
from llama_jax.config.model_config import different_sizes
from llama_jax.data import tokenizer_files
from llama_jax.data.chat_template import folder_template
from llama_jax.generate.model_files import read_eos_ids, read_tokenizer
from llama_jax.generate.read_params import on_devices
from llama_jax.generate.user_cache import converted
from llama_jax.io import read_json
from llama_jax.model.lora import abstract_adapters, add_adapters
from llama_jax.model.sharding import use_mesh
from llama_jax.storage.copies import local_folder
from llama_jax.storage.paths import as_path

PEFT_CONFIG = "adapter_config.json"


class Adapter(NamedTuple):
    """An adapter on disk."""

    folder: Path
    """as the user gave it"""
    checkpoint: Path
    """the folder itself, or its conversion"""
    cfg: ModelConfig
    """sizes of the base"""
    metadata: dict[str, Any]
    """content of model.json"""

    @property
    def lora(self) -> LoraConfig:
        """Its rank, targets and scale."""
        return lora_of(self.metadata)

    @property
    def quantize(self) -> str | None:
        """The quantization of the base in training."""
        return self.metadata["adapter"]["base"].get("quantize")


def base_of(folder: Path) -> Path | None:
    """The weights that an adapter names as its base; None if the folder holds no adapter.

    Raises:
      ConfigError: they do not exist.
    """
    if (folder / "model.json").is_file():
        metadata = read_metadata(folder)[1]
        named = metadata["adapter"]["base"]["path"] if "adapter" in metadata else None
    elif (folder / PEFT_CONFIG).is_file():
        named = str(read_json(folder / PEFT_CONFIG).get("base_model_name_or_path") or "")
    else:
        return None
    if named is None or (named and as_path(named).exists()):
        return named and as_path(named)
    which = f"{named}, which does not exist here" if named else "weights that it does not name"
    raise ConfigError(
        f"{folder} is a LoRA adapter of {which}: give its base too, as in llama_jax.load(BASE, "
        f"adapter={str(folder)!r}) or llama-jax generate BASE --adapter {folder}"
    )


def open_adapter(folder: str | Path, base: Path | None) -> Adapter:
    """The adapter in a folder; one in PEFT's format is converted once, to the user's cache.

    Args:
      folder: of the adapter.
      base: checkpoint of the weights that it will be used with.

    Raises:
      ConfigError: the folder holds no adapter, or a damaged one.
    """
    folder = checkpoint = as_path(folder)
    if not folder.is_dir():
        raise ConfigError(f"the adapter {folder} is not a folder")
    if not (folder / "model.json").is_file() and (folder / PEFT_CONFIG).is_file():
        if base is None:
            raise ConfigError(f"{folder} is in PEFT's format, which needs a base in a folder")
        folder = local_folder(folder)
        try:
            checkpoint = converted(folder.resolve(), "PEFT", [], base=base)
        except ValueError as e:
            raise ConfigError(f"the adapter {folder} cannot be used: {e}") from None
    elif not (folder / "model.json").is_file():
        raise ConfigError(f"{folder} holds no adapter (neither model.json nor {PEFT_CONFIG})")
    cfg, metadata = read_metadata(checkpoint)
    if "adapter" not in metadata:
        raise ConfigError(f"{folder} holds a whole model and no LoRA adapter: load it alone")
    check_weights(checkpoint)
    return Adapter(folder, checkpoint, cfg, metadata)


def check_base(adapter: Adapter, cfg: ModelConfig, checkpoint: Path | None) -> None:
    """Compare an adapter with the weights that it is to be used with.

    Other weights of the same sizes get a warning.

    Args:
      adapter: the adapter.
      cfg: the model of these weights.
      checkpoint: their folder, if they were read from one.

    Raises:
      ConfigError: the sizes differ.
    """
    if sizes := different_sizes(adapter.cfg, cfg):
        raise ConfigError(
            f"the adapter {adapter.folder} is for another model than "
            f"{checkpoint or 'these weights'}: "
            + "; ".join(f"{name} is {a} in the adapter, {b} here" for name, a, b in sizes)
        )
    base = adapter.metadata["adapter"]["base"]
    if checkpoint is None or not base["sha256"]:
        return
    if weights_sha256(checkpoint, loaded_step(checkpoint)) != base["sha256"]:
        print(
            f"warning: the adapter {adapter.folder} was trained on other weights, those of "
            f"{base['path']}, than those of {checkpoint}",
            file=sys.stderr,
        )


def attach(llm: Any, adapter: Adapter) -> Any:
    """The :class:`LLM` with an adapter, which shares the arrays of the base.

    Raises:
      ConfigError: the adapter is for other sizes, or damaged.
    """
    cfg, engine, folder = llm.cfg, llm._base, adapter.checkpoint
    lora = adapter.lora
    with use_mesh(engine.mesh):
        abstract = abstract_adapters(cfg, engine.compute, lora)
        like = on_devices(abstract, engine.compute.dtype, engine.mesh, engine.devices()[0])
        arrays = load_weights(folder, like)
        params = add_adapters(cfg, engine.params, arrays, lora)
    new = copy.copy(llm)
    new._engine, new._adapter = engine.with_params(params), str(adapter.folder)
    if tokenizer_files.find(folder):
        new.tokenizer = read_tokenizer(folder, cfg)
    if eos_ids := read_eos_ids(folder, adapter.metadata, cfg):
        new.eos_ids = eos_ids
    template, no_template = folder_template(folder)
    if template is not None:
        new.chat_template, new.no_template = template, no_template
    return new
