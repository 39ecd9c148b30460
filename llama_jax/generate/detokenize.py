"""From token ids to text, one token at a time: where a sequence ends, and which text is final."""

import dataclasses
from collections.abc import Collection, Generator, Iterable, Sequence
from typing import Any

from llama_jax.data.tokenizer import Tokenizer

_REPLACEMENT = "\ufffd"
"""The character for invalid UTF-8; at the end of a text, it may be an incomplete character."""


@dataclasses.dataclass(frozen=True)
class Generation:
    """A continuation and its tokens.

    Example::

      generation = llm.generate("def main(", logprobs=True)
      generation.text, generation.finish
    """

    text: str
    ids: tuple[int, ...]
    """new tokens, without the prompt and without the token that ends a document"""
    logprobs: tuple[float, ...]
    """log p of each id under the unmodified model (before temperature and other settings), nats"""
    finish: str
    """"end" (the model ended the document), "stop" (a stop string) or "length" """
    top_logprobs: tuple[dict[int, float], ...] = ()
    """log p of the most likely tokens at each position, in order, if requested"""


class Detokenizer:
    """Converts ids to text one after the other, in time linear in their number.

    The text of an id depends on those before it (a leading space, the bytes of a character), so a
    new id is decoded together with a few before it. These begin at a character: decoders of bytes
    may replace a whole run of bytes if one of them is not UTF-8.

    Args:
      tokenizer: of the model.
      before: ids of the prompt, whose own text is not returned.

    Example::

      detokenizer = Detokenizer(tokenizer, before=prompt_ids)
      text = "".join(detokenizer.push(i) for i in ids) + detokenizer.rest()
    """

    def __init__(self, tokenizer: Tokenizer, before: Sequence[int] = ()):
        self._tokenizer = tokenizer
        known = [i for i in map(int, before) if 0 <= i < tokenizer.vocab_size]
        size = 1
        while size < len(known) and not self._starts_a_character(known[-size:]):
            size *= 2
        # `_ids` are decoded together; `_text` is the text of the first `_num_returned` of them.
        self._ids = known[-size:]
        self._num_returned, self._text = len(self._ids), self._decode(self._ids)
        self._next_try = 1

    def push(self, token: int) -> str:
        """The text that this id completes; empty inside a character."""
        if not 0 <= token < self._tokenizer.vocab_size:
            return ""  # an embedding may have more rows than the tokenizer has ids
        self._ids.append(token)
        pending = len(self._ids) - self._num_returned
        if pending < self._next_try:
            return ""
        new = self._decode(self._ids)[len(self._text) :]
        if not new or new.endswith(_REPLACEMENT):
            # A long run of ids without text, or of invalid UTF-8, is decoded less and less often;
            # decoding it for each of its ids would take quadratic time.
            self._next_try = pending + max(1, pending // 4)
            return ""
        del self._ids[: self._num_returned]
        self._num_returned, self._text = len(self._ids), self._decode(self._ids)
        self._next_try = 1
        return new

    def rest(self) -> str:
        """The text of ids that are still inside a character, if no more ids follow."""
        return self._decode(self._ids)[len(self._text) :]

    def _starts_a_character(self, ids: list[int]) -> bool:
        text = self._decode(ids)
        return bool(text) and not text.startswith(_REPLACEMENT)

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids)


class ShowControls(Tokenizer):
    """A decoder that writes the names of some control tokens as text.

    Args:
      tokenizer: of the model.
      ids: control tokens.
    """

    def __init__(self, tokenizer: Tokenizer, ids: Collection[int]):
        self.path, self._tokenizer = tokenizer.path, tokenizer
        self._names = {i: tokenizer.mark(i) for i in ids}

    @property
    def vocab_size(self) -> int:
        return self._tokenizer.vocab_size

    def _decode(self, ids: list[int]) -> str:
        text = ""
        part: list[int] = []
        for i in ids:
            if i in self._names:
                text += self._tokenizer.decode(part) + self._names[i]
                part = []
            else:
                part.append(i)
        return text + self._tokenizer.decode(part)


class _StopMatch:
    """How much of a stop string stands at the end of a growing text, in time linear in the text
    (the algorithm of Knuth, Morris and Pratt).

    Args:
      stop: the string.
    """

    def __init__(self, stop: str):
        self._stop = stop
        # Of each beginning of the string that occurred, from one character on: the length of the
        # longest shorter beginning that is its end.
        self._borders = [0]
        self.length = 0
        """characters; all of them once the text contained the string"""

    def push(self, text: str) -> None:
        """Add the next part of the text."""
        if not self.length and self._stop[0] not in text:
            return
        for character in text:
            if self.length == len(self._stop):
                return
            self.length = self._extended(self.length, character)
            if self.length > len(self._borders):
                self._borders.append(self._extended(self._borders[-1], character))

    def _extended(self, length: int, character: str) -> int:
        """The length after a character, if it was ``length`` before."""
        while length and self._stop[length] != character:
            length = self._borders[length - 1]
        return length + (self._stop[length] == character)


class OutputSequence:
    """A sequence being generated: its ids so far, and where it ends.

    Args:
      tokenizer: of the model.
      prompt: ids that the new ones continue.
      stops: strings that end the text.

    Example::

      sequence = OutputSequence(tokenizer, prompt_ids, stops=["\\n\\n"])
      sequence.append(ids, logprobs, eos_ids, max_tokens=64)
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stops: Sequence[str]):
        self.finish: str | None = None
        self._stops, self._matches = stops, [_StopMatch(stop) for stop in stops]
        self._ids: list[int] = []
        self._logprobs: list[float] = []
        self._top_logprobs: list[dict[int, float]] = []
        self._detokenizer = Detokenizer(tokenizer, prompt)
        self._num_decoded = 0  # ids given to the detokenizer
        self._text = ""

    def append(
        self,
        ids: Sequence[int],
        logprobs: Sequence[float],
        stop_ids: Collection[int],
        max_tokens: int,
        top_logprobs: Sequence[dict[int, float]] = (),
    ) -> None:
        """Add new tokens up to the one that ends the sequence.

        Args:
          ids: in order.
          logprobs: log p of each.
          stop_ids: ids that end a sequence.
          max_tokens: end at this number of tokens.
          top_logprobs: alternatives to each id, if requested.
        """
        for i, (token, logprob) in enumerate(zip(ids, logprobs, strict=True)):
            if self.finish:
                return
            if int(token) in stop_ids:
                self.finish = "end"
                return
            self._ids.append(int(token))
            self._logprobs.append(float(logprob))
            self._top_logprobs += top_logprobs[i : i + 1]
            if self._stops:
                self._find_stop()
            if not self.finish and len(self._ids) >= max_tokens:
                self.finish = "length"

    def _decode_new(self) -> None:
        """Append the text of new ids, except those inside a character."""
        for token in self._ids[self._num_decoded :]:
            new = self._detokenizer.push(token)
            self._text += new
            for match in self._matches:
                match.push(new)
        self._num_decoded = len(self._ids)

    def _find_stop(self) -> None:
        # A stop string completed by this token begins at most its own length before.
        start = max(0, len(self._text) - max(map(len, self._stops)))
        self._decode_new()
        found = [i for i in (self._text.find(s, start) for s in self._stops) if i >= 0]
        if found:
            self._text, self.finish = self._text[: min(found)], "stop"

    def stable_text(self) -> str:
        """The text that later tokens cannot change."""
        if self.finish:
            return self.result().text
        if not self._stops:
            self._decode_new()
        unsure = max((match.length for match in self._matches), default=0)
        return self._text[: len(self._text) - unsure]

    def result(self) -> Generation:
        """The sequence so far."""
        self._decode_new()
        # Bytes that did not become a character are part of the text once it has ended.
        text = self._text if self.finish == "stop" else self._text + self._detokenizer.rest()
        ids, logprobs = tuple(self._ids), tuple(self._logprobs)
        return Generation(text, ids, logprobs, self.finish or "length", tuple(self._top_logprobs))


def stream_text(
    sequence: OutputSequence, steps: Iterable[Any], strip: bool = False
) -> Generator[str, None, Any]:
    """Yield the stable text of ``sequence`` in pieces while ``steps`` add tokens to it.

    Args:
      sequence: the sequence.
      steps: each item is taken after new tokens were added.
      strip: omit white space at both ends of the text.

    Returns:
      The last item of ``steps``.
    """
    shape = str.strip if strip else str
    yielded, last = 0, None
    for step in steps:
        last = step
        text = shape(sequence.stable_text())
        if len(text) > yielded:
            yield text[yielded:]
            yielded = len(text)
    if rest := shape(sequence.result().text)[yielded:]:
        yield rest
    return last


def top_dicts(ids_TN: Any, logprobs_TN: Any, num_top: int) -> list[dict[int, float]]:
    """The ``num_top`` most likely ids and their log p, one dict per token; empty for 0.

    Args:
      ids_TN: ids, most likely first.
      logprobs_TN: their log p, nats.
      num_top: number of ids to keep.
    """
    if not num_top:
        return []
    rows = zip(ids_TN[:, :num_top].tolist(), logprobs_TN[:, :num_top].tolist(), strict=True)
    return [dict(zip(ids, logprobs, strict=True)) for ids, logprobs in rows]
