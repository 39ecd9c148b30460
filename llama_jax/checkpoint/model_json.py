"""``model.json``: the model config of a checkpoint and the ids of its special tokens.

No other module reads or writes this file.
"""

import json
from pathlib import Path
from typing import Any

from llama_jax.checkpoint.file_hashes import record_files
from llama_jax.config import ConfigError, LoraConfig, ModelConfig, check_model, to_dict
from llama_jax.config.recipe import LORA_TARGETS
from llama_jax.io import atomic_write, read_json
from llama_jax.storage.paths import as_path

FORMAT = {"format": 1, "rotary_layout": "half"}
QUANTIZED = ("int8", "int4")
_MAX_BYTES = 1 << 20


def make_metadata(
    cfg: ModelConfig,
    token_ids: dict[str, Any],
    quantize: str | None = None,
    adapter: dict[str, Any] | None = None,
    lineage: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The content of ``model.json``.

    Args:
      cfg: the model.
      token_ids: ids of "bos", "eos" (one or a list) and "pad"; those that exist.
      quantize: "int8" or "int4" if the matrices of the layers are stored so.
      adapter: if the arrays are those of a LoRA adapter: its "rank", "alpha", "targets", "rslora"
        and "base", the "path" and "sha256" ("": unknown) of the weights that it was trained on,
        with "quantize" ("int8" or "int4") if training quantized them.
      lineage: what the weights were trained from: "data", the "path" and "sha256" of each source,
        and "base", as that of an adapter, if training did not start from random weights.
    """
    tree = FORMAT | {"model": to_dict(cfg), "token_ids": token_ids}
    optional = {"quantize": quantize, "adapter": adapter, "lineage": lineage}
    return tree | {key: value for key, value in optional.items() if value is not None}


def write_metadata(folder: Path, metadata: dict[str, Any]) -> None:
    """Write ``model.json``."""
    content = json.dumps(metadata, indent=1, ensure_ascii=False) + "\n"
    atomic_write(folder / "model.json", content.encode())


def write_model_files(
    folder: Path,
    cfg: ModelConfig,
    tokenizer: Path,
    token_ids: dict[str, Any],
    **others: Any,
) -> None:
    """Write ``model.json`` and the tokenizer of a run, and their hashes to ``manifest.json``.

    Args:
      folder: the run folder.
      cfg: the model.
      tokenizer: file to copy to ``tokenizer.model``.
      token_ids: as for :func:`make_metadata`.
      others: more arguments of :func:`make_metadata`.
    """
    write_metadata(folder, make_metadata(cfg, token_ids, **others))
    atomic_write(folder / "tokenizer.model", tokenizer.read_bytes())
    record_files(folder, "model.json", "tokenizer.model")


def read_metadata(folder: str | Path) -> tuple[ModelConfig, dict[str, Any]]:
    """The model of a checkpoint folder, and the whole of ``model.json``; `token_ids` is a dict.

    Raises:
      ConfigError: the folder or file is missing, damaged, or of another format.
    """
    path = as_path(folder) / "model.json"
    try:
        tree = read_json(path, _MAX_BYTES)
    except (FileNotFoundError, NotADirectoryError):
        raise ConfigError(
            f"{folder} is not a checkpoint of llama_jax (no model.json); make one with "
            "`python -m llama_jax.train` or `python -m llama_jax.convert SOURCE DESTINATION`"
        ) from None
    except ValueError as e:
        raise ConfigError(str(e)) from None
    for key, wanted in FORMAT.items():
        if tree.get(key) != wanted:
            raise ConfigError(
                f"{path}: {key}={tree.get(key)!r:.60}, but this version reads {key}={wanted!r}"
            )
    if not isinstance(model := tree.get("model"), dict):
        raise ConfigError(f"{path} is damaged: it has no model")
    cfg = check_model(model, str(path))
    if (quantize := tree.get("quantize")) not in (None, *QUANTIZED):
        raise ConfigError(f"{path}: quantize={quantize!r:.60}: must be 'int8' or 'int4'")
    if "adapter" in tree:
        _check_adapter(tree["adapter"], path)
    if not isinstance(lineage := tree.get("lineage", {}), dict):
        raise ConfigError(f"{path}: lineage must be an object, not {lineage!r:.60}")
    ids = tree.setdefault("token_ids", {})
    if not isinstance(ids, dict):
        raise ConfigError(f"{path}: token_ids must be an object, not {ids!r:.60}")
    return cfg, tree


def adapter_settings(lora: LoraConfig, base: dict[str, str]) -> dict[str, Any]:
    """The "adapter" of ``model.json``; ``base`` as in :func:`make_metadata`."""
    return {
        "rank": lora.rank, "alpha": lora.alpha, "targets": list(lora.targets),
        "rslora": lora.rslora, "base": base,
    }  # fmt: skip


def lora_of(metadata: dict[str, Any]) -> LoraConfig:
    """Rank, alpha, targets and scale of the adapter that a ``model.json`` describes."""
    adapter = metadata["adapter"]
    return LoraConfig(
        rank=adapter["rank"], alpha=float(adapter["alpha"]), targets=tuple(adapter["targets"]),
        rslora=adapter["rslora"],
    )  # fmt: skip


_MAX_ADAPTER_RANK = 2**16


def _check_adapter(adapter: Any, path: Path) -> None:
    """Check the settings of a LoRA adapter that :func:`make_metadata` has written."""
    try:
        rank, alpha, targets = adapter["rank"], adapter["alpha"], adapter["targets"]
        base = adapter["base"]["path"], adapter["base"]["sha256"]
        quantize = adapter["base"].get("quantize")
        ok = (
            type(rank) is int and 1 <= rank <= _MAX_ADAPTER_RANK
            and type(alpha) in (int, float) and 0 < alpha < 1e12
            and isinstance(targets, list) and 0 < len(targets) == len(set(targets))
            and set(targets) <= set(LORA_TARGETS)
            and type(adapter["rslora"]) is bool and all(isinstance(text, str) for text in base)
            and quantize in (None, *QUANTIZED)
        )  # fmt: skip
    except (KeyError, TypeError, AttributeError):
        ok = False
    if not ok:
        raise ConfigError(
            f"{path} is damaged: its adapter needs rank, alpha, targets of "
            f"{', '.join(LORA_TARGETS)}, rslora, and base with path and sha256, "
            f"not {adapter!r:.200}"
        )
