"""One request in the engine: what it holds, and the updates that it sends."""

import contextlib
import time

import numpy as np

from llama_jax.data.tokenizer import Tokenizer
from llama_jax.generate.detokenize import OutputSequence, ShowControls
from llama_jax.serve.pages import prefix_keys
from llama_jax.serve.request import GenerationRequest, Metrics, Token, Update
from llama_jax.serve.sampling import row_of
from llama_jax.serve.sizes import LOGPROB, TOP_LOGPROBS, Sizes


class Running:
    """A request from its submission to its last update.

    Args:
      number: of the request.
      request: what to answer.
      sizes: the constants of the server.
      metrics: told when the request gets tokens and ends.

    Raises:
      ValueError: invalid settings.
    """

    def __init__(self, number: int, request: GenerationRequest, sizes: Sizes, metrics: Metrics):
        self.number, self.request, self.sizes = number, request, sizes
        self.ids = np.asarray(request.ids, np.int32)
        self.keys = prefix_keys(self.ids, sizes.page, request.model)
        """of the full pages of the prompt"""
        self.slot = -1
        self.pages: list[int] = []
        self.computed = 0
        """tokens of the prompt that are in the cache once the started programs have ended"""
        self.cached = 0
        """those of them that another request computed"""
        self.drawn = 0
        """new tokens once the started programs have ended"""
        self.received = 0
        """new tokens that the host knows"""
        self.finish: str | None = None
        self._metrics = metrics
        self._submitted = self._started = self._last_token = time.monotonic()
        self._prompt: tuple[Token, ...] = ()
        self._sequence: OutputSequence | None = None
        self._sent = 0  # characters
        self._is_first = True  # update
        self._num_tokens = 0
        self._chunk = self._first_chunk()

    @property
    def num_pages(self) -> int:
        """Pages for the prompt and the longest answer."""
        return -(-(len(self.ids) + self.request.max_new_tokens) // self.sizes.page)

    @property
    def shareable(self) -> list[bytes]:
        """Keys of the pages that need not be computed; at least one token is."""
        if self.request.prompt_logprobs:
            return []
        return self.keys[: (len(self.ids) - 1) // self.sizes.page]

    @property
    def prefilled(self) -> bool:
        """Whether the whole prompt was read."""
        return self.computed >= len(self.ids)

    @property
    def steppable(self) -> bool:
        """Whether the next decoding step draws a token for it."""
        return self.prefilled and self.drawn < self.request.max_new_tokens

    @property
    def logprobs(self) -> int:
        """What to compute beside a drawn token."""
        if self.request.top_logprobs:
            return TOP_LOGPROBS
        return LOGPROB if self.request.logprobs else 0

    @property
    def waits_for_mask(self) -> bool:
        """Whether a token must be read before the next one can be drawn."""
        return self.request.grammar is not None and self.steppable and self.received < self.drawn

    @property
    def seconds(self) -> float:
        """Since it got a slot."""
        return time.monotonic() - self._started

    def start(self, tokenizer: Tokenizer, known: int) -> None:
        """Begin, with a slot and pages.

        Args:
          tokenizer: of its model.
          known: how many of the pages hold tokens of the prompt already.
        """
        self.computed = self.cached = known * self.sizes.page
        if self.request.show_ids:
            tokenizer = ShowControls(tokenizer, self.request.show_ids)
        self._sequence = OutputSequence(tokenizer, self.request.ids, self.request.stops)
        self._started = time.monotonic()
        self._metrics.admitted(self._started - self._submitted)

    def reuse(self, page: int) -> None:
        """Use a page that another request has computed instead of the next chunk."""
        self.pages[self.computed // self.sizes.page] = page
        self.computed += self.sizes.page
        self.cached += self.sizes.page

    def next_chunk(self) -> np.ndarray:
        """The argument of the next call of the program that reads the prompt."""
        chunk = self._chunk.copy()
        start, length = self.computed, len(self.ids)
        end = min(start + self.sizes.page, length)
        chunk["slot"] = self.slot
        chunk["tokens"][: end - start] = self.ids[start:end]
        targets = self.ids[start + 1 : end + 1]
        chunk["targets"][: len(targets)] = targets
        chunk["start"], chunk["count"], chunk["last"] = start, end - start, end == length
        chunk["pages"][: len(self.pages)] = self.pages
        if end == length and self.request.grammar is not None:
            self.fill_mask(chunk["mask"])
        self.computed = end
        self.drawn = int(end == length)
        return chunk

    def fill_mask(self, mask_W: np.ndarray) -> None:
        """Write which ids the grammar allows next; raises ValueError if there is none."""
        assert self.request.grammar is not None
        mask_W[:] = 0
        self.request.grammar.fill(mask_W)
        if not mask_W.any():
            raise ValueError("the grammar allows no token here")

    def receive_scores(self, scores_C: np.ndarray, start: int) -> None:
        """Take log p of the prompt's tokens after those of a chunk.

        Args:
          scores_C: of the format :attr:`Sizes.drawn`.
          start: position of the chunk's first token.
        """
        if start == 0:
            self._prompt = (Token(int(self.ids[0]), None, {}),)
        count = min(len(scores_C), len(self.ids) - 1 - start)
        self._prompt += tuple(self._token(x, True) for x in scores_C[:count])

    def receive(self, drawn: np.void) -> None:
        """Take a drawn token of the format :attr:`Sizes.drawn`, and send an update.

        Raises:
          ValueError: the model's logits are not numbers.
        """
        request, sequence = self.request, self._sequence
        token = self._token(drawn, bool(self.logprobs))
        if token.id < 0:
            raise ValueError("the model computed numbers that are not finite (NaN or infinity)")
        if request.max_new_tokens == 0:
            self._send("", (), "length")
            return
        now = time.monotonic()
        if self.received:
            self._metrics.next_token(now - self._last_token)
        else:
            self._metrics.first_token(now - self._submitted)
        self.received, self._last_token = self.received + 1, now
        ends = token.id in request.eos_ids
        if request.grammar is not None and not ends:
            request.grammar.accept(token.id)
        assert sequence is not None
        sequence.append([token.id], [0.0], request.eos_ids, request.max_new_tokens)
        if request.grammar is not None and request.grammar.complete and not sequence.finish:
            sequence.finish = "end"
        self._num_tokens += not ends
        self._send(sequence.stable_text(), () if ends else (token,), sequence.finish)

    def end(self, reason: str, error: str | None = None) -> None:
        """Send the last update of a request that its tokens did not end."""
        if self.finish is None:
            text = ""
            if self._sequence is not None:
                with contextlib.suppress(Exception):  # it may be what failed
                    text = self._sequence.result().text
            self._send(text, (), reason, error)

    def _send(
        self, text: str, tokens: tuple[Token, ...], finish: str | None, error: str | None = None
    ) -> None:
        """Send an update with what is new of the text."""
        self.finish = finish
        prompt, self._prompt = self._prompt, ()
        cached, self._is_first = self.cached if self._is_first else 0, False
        new, self._sent = text[self._sent :], max(self._sent, len(text))
        if finish is not None:
            self._metrics.finished(
                finish, len(self.ids), self.cached, self._num_tokens,
                time.monotonic() - self._submitted,
            )  # fmt: skip
        self.request.send(Update(new, tokens, prompt, cached, finish, error))

    def _token(self, drawn: np.void, with_logprob: bool) -> Token:
        num_top = self.request.top_logprobs
        ids, logprobs = (drawn[name][:num_top].tolist() for name in ("top_ids", "top_logprobs"))
        top = dict(zip(ids, logprobs, strict=True))
        return Token(int(drawn["token"]), float(drawn["logprob"]) if with_logprob else None, top)

    def _first_chunk(self) -> np.ndarray:
        """What all chunks have in common."""
        chunk = np.zeros((), self.sizes.chunk)
        sampling = self.request.sampling
        for fields in row_of(sampling, self.sizes.vocab_size):
            for name, value in fields._asdict().items():
                chunk[name] = value
        chunk["seed"], chunk["index"], chunk["length"] = (
            sampling.seed,
            sampling.index,
            len(self.ids),
        )
        chunk["logprobs"] = self.logprobs
        if self.request.prompt_logprobs:
            chunk["scores"] = TOP_LOGPROBS if self.request.top_logprobs else LOGPROB
        in_context = np.zeros(self.sizes.mask_words * 32, bool)
        in_context[self.ids] = True
        chunk["context"] = np.packbits(in_context, bitorder="little").view(np.int32)
        chunk["mask"] = -1
        return chunk
