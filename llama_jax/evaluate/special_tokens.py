"""The BOS and EOS tokens of a model as transformers knows them."""

from typing import TYPE_CHECKING, Any, NamedTuple

from llama_jax.checkpoint.model_json import read_metadata
from llama_jax.data.tokenizer import Tokenizer
from llama_jax.io import read_json

if TYPE_CHECKING:
    from llama_jax.generate.llm import LLM


class SpecialTokens(NamedTuple):
    """Ids; None if the model has no such token."""

    bos: int | None
    eos: int | None
    adds_bos: bool
    """whether the tokenizer begins each text with BOS"""


def special_tokens(tokenizer: Tokenizer, llm: "LLM | None" = None) -> SpecialTokens:
    """The tokens named in ``tokenizer_config.json`` beside the tokenizer, or else its own.

    A tokenizer may have a BOS token and not add it to texts, such as SmolLM2's.

    Args:
      tokenizer: of the model.
      llm: the model, whose ids are used where the tokenizer has none.
    """
    path = tokenizer.path.parent / "tokenizer_config.json"
    settings = read_json(path) if path.is_file() else {}
    bos, eos = (_named(tokenizer, settings.get(f"{name}_token")) for name in ("bos", "eos"))
    if bos is None:
        bos = tokenizer.bos_id
    if bos is None and not settings and llm is not None and llm._checkpoint is not None:
        bos = (read_metadata(llm._checkpoint)[1].get("token_ids") or {}).get("bos")
    if eos is None:
        eos = next(iter(llm.eos_ids if llm is not None else ()), tokenizer.eos_id)
    adds_bos = settings.get("add_bos_token")
    return SpecialTokens(bos, eos, tokenizer.adds_bos if adds_bos is None else bool(adds_bos))


def _named(tokenizer: Tokenizer, name: Any) -> int | None:
    """The id of a control token by its name, which may be a dict with the name."""
    text = name.get("content") if isinstance(name, dict) else name
    return tokenizer.controls.get(text) if isinstance(text, str) else None
