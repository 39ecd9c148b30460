"""The models of a server: the base and its adapters, by the names that clients use."""

import contextlib
import dataclasses
import functools
from typing import Any

from llama_jax.data.chat_template import ChatTemplate
from llama_jax.data.tokenizer import Tokenizer
from llama_jax.serve.grammar import GrammarFactory


@dataclasses.dataclass(frozen=True)
class ServedModel:
    """What the HTTP side knows of a model."""

    name: str
    """that clients use"""
    adapter: str
    """that the engine uses: "" for the base"""
    tokenizer: Tokenizer
    vocab_size: int
    """ids of the embedding"""
    eos_ids: tuple[int, ...] = ()
    template: ChatTemplate | None = None
    no_template: str = ""
    """why there is no template"""

    @functools.cached_property
    def chat_eos_ids(self) -> tuple[int, ...]:
        """EOS ids, and the token that the template writes after answers."""
        ends: tuple[int, ...] = ()
        if self.template is not None:
            with contextlib.suppress(ValueError):  # the template does not say how an answer ends
                ends = self.template.stop_ids(self.tokenizer)
        return tuple(dict.fromkeys((*self.eos_ids, *ends)))

    @functools.cached_property
    def chat_grammars(self) -> GrammarFactory:
        """Compiles grammars of answers in a chat."""
        return GrammarFactory(self.tokenizer, self.chat_eos_ids, self.vocab_size)

    @functools.cached_property
    def text_grammars(self) -> GrammarFactory:
        """Compiles grammars of continuations."""
        return GrammarFactory(self.tokenizer, self.eos_ids, self.vocab_size)


def served_model(llm: Any, name: str, adapter: str = "") -> ServedModel:
    """The model of a :class:`llama_jax.LLM`.

    Args:
      llm: the base, or the base with an adapter.
      name: for clients.
      adapter: name of the adapter, "" for the base.

    Raises:
      ValueError: the chat template is invalid.
    """
    template, why = None, llm.no_template or "this model has no chat template: it is a base model"
    if llm.chat_template is not None:
        template = ChatTemplate(llm.chat_template, f"the chat template of {name}")
    model = ServedModel(
        name, adapter, llm.tokenizer, llm.cfg.vocab_size, tuple(llm.eos_ids), template, why
    )
    model.chat_eos_ids  # noqa: B018 (rendered before the first request)
    return model
