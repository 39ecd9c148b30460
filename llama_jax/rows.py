"""A continuation on its way from tokens to text: where it ends, and what of it is settled.

In: token ids as they are drawn. Out: :class:`Generation`.
"""

import dataclasses
from collections.abc import Sequence

from llama_jax.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Generation:
    """A continuation, with what it was made of."""

    text: str
    ids: tuple[int, ...]
    """new tokens; neither the prompt's nor the one that ends a document"""
    logprobs: tuple[float, ...]
    """log p of each id under the model itself, nats: before temperature and the rest"""
    finish: str
    """"end" (the model ended the document), "stop" (a stop string) or "length" """


class Row:
    """A text on its way: ids so far, and where they end."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stops: Sequence[str]):
        self.prompt = list(prompt)
        self.finish: str | None = None
        self._tokenizer, self._stops = tokenizer, stops
        self._ids: list[int] = []
        self._logprobs: list[float] = []
        self._prompt_text = tokenizer.decode(prompt)
        self._text = ""

    def take(self, ids, logprobs, ends, limit: int) -> None:
        """New tokens, until one ends the text."""
        for token, logprob in zip(ids, logprobs, strict=True):
            if self.finish:
                return
            if int(token) in ends:
                self.finish = "end"
                return
            self._ids.append(int(token))
            self._logprobs.append(float(logprob))
            if self._stops:
                self._find_stop()
            if not self.finish and len(self._ids) >= limit:
                self.finish = "length"
        if not self._stops:
            self._text = self._decoded()

    def _decoded(self) -> str:
        # With the prompt: a piece's leading space is part of it only after other pieces.
        return self._tokenizer.decode([*self.prompt, *self._ids])[len(self._prompt_text) :]

    def _find_stop(self) -> None:
        self._text = self._decoded()
        found = [i for i in (self._text.find(s) for s in self._stops) if i >= 0]
        if found:
            self._text, self.finish = self._text[: min(found)], "stop"

    def settled(self) -> str:
        """The text that later tokens cannot change."""
        if self.finish:
            return self.result().text
        text = self._text.rstrip("\ufffd")
        held = max(
            (k for s in self._stops for k in range(1, len(s)) if text.endswith(s[:k])), default=0
        )
        return text[: len(text) - held]

    def result(self) -> Generation:
        """What has been made."""
        if self.finish != "stop":
            self._text = self._decoded()
        return Generation(
            self._text, tuple(self._ids), tuple(self._logprobs), self.finish or "length"
        )
