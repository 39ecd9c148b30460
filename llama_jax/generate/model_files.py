"""The tokenizer and the EOS ids of a checkpoint folder, checked against the sizes of the model."""

from pathlib import Path
from typing import Any

from llama_jax.config import ConfigError, ModelConfig
from llama_jax.data.tokenizer import Tokenizer
from llama_jax.generate.prompts import check_eos


def read_tokenizer(folder: Path, cfg: ModelConfig) -> Tokenizer:
    """The tokenizer of a folder.

    Raises:
      ValueError: missing, damaged, or with more tokens than the embedding has rows.
    """
    tokenizer = Tokenizer.load(folder)
    if tokenizer.vocab_size > cfg.vocab_size:
        raise ConfigError(
            f"tokenizer {tokenizer.path} has {tokenizer.vocab_size} tokens, the embedding of "
            f"{folder} only {cfg.vocab_size} rows: it is another model's tokenizer"
        )
    return tokenizer


def read_eos_ids(
    folder: Path, metadata: dict[str, Any], cfg: ModelConfig
) -> tuple[int, ...] | None:
    """The EOS ids, if ``model.json`` has them."""
    ids = metadata.get("token_ids") or {}
    try:
        if not isinstance(ids, dict):
            raise ValueError(f"token_ids must be an object, not {ids!r:.60}")
        return None if ids.get("eos") is None else check_eos(ids["eos"], cfg)
    except ValueError as e:
        raise ConfigError(f"{folder / 'model.json'}: {e}") from None
