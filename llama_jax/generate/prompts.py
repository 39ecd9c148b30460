"""Checks of prompts, texts and token ids."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from llama_jax.config import ModelConfig
from llama_jax.data.tokenizer import Tokenizer, check_text
from llama_jax.generate.sampler import is_integer

Prompt = str | Sequence[int]
"""Text, or token ids, to which no BOS id is added."""

_NOT_IDS = (str, bytes, bytearray, memoryview)
"""Sequences of integers or text that are not token ids."""


def split_prompts(prompts: Any) -> tuple[bool, list[Any]]:
    """Whether there is a single prompt, and the list of prompts."""
    if isinstance(prompts, np.ndarray):
        prompts = prompts.tolist()
    listed = isinstance(prompts, Sequence) and not isinstance(prompts, _NOT_IDS)
    single = not listed or (len(prompts) > 0 and _is_ids(prompts))
    return single, [prompts] if single else list(prompts)


def named(items: list[Any], kind: str = "prompt") -> Iterator[tuple[str, Any]]:
    """Each prompt with its name in errors."""
    for i, item in enumerate(items):
        yield f"{kind}s[{i}]" if len(items) > 1 else f"the {kind}", item


def check_ids(prompt: Any, where: str, tokenizer: Tokenizer, vocab_size: int) -> list[int]:
    """Token ids of text, without BOS, or given ids.

    Args:
      prompt: text or ids.
      where: what errors call it.
      tokenizer: of the model.
      vocab_size: number of ids of the model.

    Raises:
      ValueError: neither text nor ids, or ids that the model does not have.
    """
    if not isinstance(prompt, str):
        if not _is_ids(prompt):
            kind = type(prompt).__name__
            raise ValueError(f"{where} must be text or token ids, not {kind}: {prompt!r:.60}")
        ids = list(map(int, prompt))
        if wrong := [i for i in ids if not 0 <= i < vocab_size]:
            raise ValueError(
                f"{where} has token id {wrong[0]}; those of the model are 0 to {vocab_size - 1}"
            )
        return ids
    check_text(where, prompt)
    ids = tokenizer.encode(prompt)
    if ids and max(ids) >= vocab_size:
        raise ValueError(
            f"{where} has token id {max(ids)}, and the model only {vocab_size} ids: its tokenizer "
            f"{tokenizer.path} ({tokenizer.vocab_size} ids) belongs to another model"
        )
    return ids


def check_eos(eos_ids: Any, cfg: ModelConfig) -> tuple[int, ...]:
    """The EOS ids, without duplicates.

    Raises:
      ValueError: not an id of the model, or a list of them.
    """
    several = isinstance(eos_ids, Sequence) and not isinstance(eos_ids, str)
    ids: list[Any] = list(eos_ids) if several else [eos_ids]
    for i in ids:
        if not is_integer(i) or not 0 <= i < cfg.vocab_size:
            raise ValueError(
                f"the end-of-text id {i!r:.60} must be a whole number from 0 to "
                f"{cfg.vocab_size - 1}, an id of the model"
            )
    return tuple(dict.fromkeys(map(int, ids)))


def _is_ids(prompt: Any) -> bool:
    sequence = isinstance(prompt, Sequence | np.ndarray) and not isinstance(prompt, _NOT_IDS)
    return sequence and all(map(is_integer, prompt))
