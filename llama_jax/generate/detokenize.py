"""A continuation on its way from tokens to text: where it ends, and what of it is settled.

In: token ids as they are drawn. Out: :class:`Generation`.
"""

import dataclasses
from collections.abc import Sequence

from llama_jax.data.tokenizer import Tokenizer

_UNKNOWN = "\ufffd"
"""What bytes that are no UTF-8 become: at the end of a text, perhaps half of a character."""


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


class Detokenizer:
    """Ids to text, one after the other, in time linear in their number.

    The text of an id depends on those before it (a leading space, the bytes of a character), so a
    new one is decoded with the few before it. These begin where a character does: decoders of
    bytes may replace a whole run of them for one that is no UTF-8.

    Args:
      before: ids of a text that the new ones continue; their own text does not come out.
    """

    def __init__(self, tokenizer: Tokenizer, before: Sequence[int] = ()):
        self._tokenizer = tokenizer
        known = [i for i in map(int, before) if 0 <= i < tokenizer.vocab_size]
        size = 1
        while size < len(known) and not self._is_whole(known[-size:]):
            size *= 2
        # Ids decoded together; of those before `_read`, the text (`_text`) has come out.
        self._ids = known[-size:]
        self._read, self._text = len(self._ids), self._decode(self._ids)
        self._next_try = 1

    def push(self, token: int) -> str:
        """The text that this id completes; empty inside a character."""
        if not 0 <= token < self._tokenizer.vocab_size:
            return ""  # an embedding may have more rows than the tokenizer has ids
        self._ids.append(token)
        waiting = len(self._ids) - self._read
        if waiting < self._next_try:
            return ""
        new = self._decode(self._ids)[len(self._text) :]
        if not new or new.endswith(_UNKNOWN):
            # A long run of ids without text, or of bytes that are no UTF-8, is decoded less and
            # less often: decoding it for each of its ids would cost the square of its length.
            self._next_try = waiting + max(1, waiting // 4)
            return ""
        del self._ids[: self._read]
        self._read, self._text, self._next_try = len(self._ids), self._decode(self._ids), 1
        return new

    def rest(self) -> str:
        """The text of ids that wait for others, as it is if none come."""
        return self._decode(self._ids)[len(self._text) :]

    def _is_whole(self, ids: list[int]) -> bool:
        text = self._decode(ids)
        return bool(text) and not text.startswith(_UNKNOWN)

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids)


class Row:
    """A text on its way: ids so far, and where they end."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stops: Sequence[str]):
        self.finish: str | None = None
        self._stops = stops
        self._ids: list[int] = []
        self._logprobs: list[float] = []
        self._detokenizer = Detokenizer(tokenizer, prompt)
        self._read = 0  # ids given to the detokenizer
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

    def _advance(self) -> None:
        """Take the text of new tokens over, unless they end inside a character."""
        for token in self._ids[self._read :]:
            self._text += self._detokenizer.push(token)
        self._read = len(self._ids)

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
        self._advance()
        # Bytes that became no character are part of a text that has ended.
        text = self._text if self.finish == "stop" else self._text + self._detokenizer.rest()
        return Generation(text, tuple(self._ids), tuple(self._logprobs), self.finish or "length")
