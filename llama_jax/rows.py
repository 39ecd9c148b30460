"""A continuation on its way from tokens to text: where it ends, and what of it is settled.

In: token ids as they are drawn. Out: :class:`Generation`.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from llama_jax.tokenizer import Tokenizer

_BEHIND = 4
"""Tokens decoded again before new ones: a character has at most 4 bytes, of a token each."""


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


def check_text(where: str, text: Any) -> None:
    """Raise ValueError for what is no text, or cannot be written as UTF-8."""
    if not isinstance(text, str):
        raise ValueError(f"{where} must be a string, not {type(text).__name__}: {text!r:.60}")
    try:
        text.encode()
    except UnicodeEncodeError as e:
        odd = f"{text[e.start]!r} at {e.start}"
        raise ValueError(f"{where} holds half a character, {odd}: is it UTF-8?") from None


class Row:
    """A text on its way: ids so far, and where they end."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stops: Sequence[str]):
        self.finish: str | None = None
        self._tokenizer, self._stops = tokenizer, stops
        self._all = list(prompt)
        self._logprobs: list[float] = []
        self._prompt_length = len(self._all)
        # Text up to token `_read` is made. The next is decoded behind the tokens from `_since` on:
        # a piece's leading space shows only after another piece.
        self._since, self._read = max(0, len(self._all) - _BEHIND), len(self._all)
        self._text = ""

    def take(self, ids, logprobs, ends, limit: int) -> None:
        """New tokens, until one ends the text."""
        for token, logprob in zip(ids, logprobs, strict=True):
            if self.finish:
                return
            if int(token) in ends:
                self.finish = "end"
                return
            self._all.append(int(token))
            self._logprobs.append(float(logprob))
            if self._stops:
                self._find_stop()
            if not self.finish and len(self._logprobs) >= limit:
                self.finish = "length"

    def _advance(self) -> None:
        """Take the text of new tokens over, unless they end inside a character."""
        before = self._tokenizer.decode(self._all[self._since : self._read])
        after = self._tokenizer.decode(self._all[self._since :])
        if not after.endswith("\ufffd"):
            self._text += after[len(before) :]
            self._since, self._read = max(0, self._read - _BEHIND), len(self._all)

    def _find_stop(self) -> None:
        # A stop that this token completes begins at most its own length before.
        start = max(0, len(self._text) - max(map(len, self._stops)))
        self._advance()
        found = [i for i in (self._text.find(s, start) for s in self._stops) if i >= 0]
        if found:
            self._text, self.finish = self._text[: min(found)], "stop"

    def settled(self) -> str:
        """The text that later tokens cannot change."""
        if self.finish:
            return self.result().text
        if not self._stops:
            self._advance()
        held = max(
            (k for s in self._stops for k in range(1, len(s)) if self._text.endswith(s[:k])),
            default=0,
        )
        return self._text[: len(self._text) - held]

    def result(self) -> Generation:
        """What has been made."""
        ids, text = tuple(self._all[self._prompt_length :]), self._text
        if self.finish != "stop":  # bytes that became no character included
            prompt = self._tokenizer.decode(self._all[: self._prompt_length])
            text = self._tokenizer.decode(self._all)[len(prompt) :]
        return Generation(text, ids, tuple(self._logprobs), self.finish or "length")
