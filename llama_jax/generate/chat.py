"""A conversation with a model that has a chat template; the cache is kept from turn to turn."""

import contextlib
import copy
from collections.abc import Iterator, Sequence
from typing import Any

from llama_jax.data.chat_template import ChatTemplate
from llama_jax.data.tokenizer import check_text
from llama_jax.generate.decode import DECODE_STEPS_PER_CALL
from llama_jax.generate.detokenize import OutputSequence, stream_text
from llama_jax.generate.sampler import Greedy, Options, Sample, check_options


class Chat:
    """The messages of a conversation, and the model's cache of them.

    The chat template is that of the checkpoint (Jinja, in the format of Hugging Face). Only the
    template writes control ids: in a message, their names are ordinary text. An answer ends at the
    EOS ids of the model, and at the token that the template writes after answers.

    After an error, Ctrl-C, or a stream that is not read to its end, the conversation is as it was
    before this turn, and can continue.

    Example::

        chat = llm.chat(system="Answer in one sentence.")
        chat.say("Who wrote Faust?")
        for piece in chat.stream("When?", stop=["\\n\\n"]):
            print(piece, end="")
        chat.retry(sampling=llama_jax.Sample(temperature=0.8))
        chat.undo()

    Raises:
      ValueError: the model has no chat template, or an invalid one.
    """

    def __init__(self, llm: Any, system: str | None = None):
        if llm.chat_template is None:
            raise ValueError(
                llm.no_template
                or "this checkpoint has no chat template: it is a base model, which continues "
                "text; use llm.generate(...), in a terminal without --chat"
            )
        if system is not None:
            check_text("the system message", system)
        where = f"the chat template of {llm.tokenizer.path.parent}"
        self._template = ChatTemplate(llm.chat_template, where)
        self._llm = copy.copy(llm)
        with contextlib.suppress(ValueError):  # a template that does not say how an answer ends
            ends = self._template.stop_ids(llm.tokenizer)
            self._llm.eos_ids = tuple(dict.fromkeys((*llm.eos_ids, *ends)))
        self._ids: list[int] = []  # held by the cache
        self._cache: Any = None
        self._running: Any = None
        self._turns: list[dict[str, Any]] = []  # arguments of each turn
        self.messages = [{"role": "system", "content": system}] if system is not None else []

    def say(
        self,
        text: str,
        *,
        max_new_tokens: int = 256,
        sampling: Greedy | Sample = Greedy(),  # noqa: B008 (frozen)
        seed: int = 0,
        stop: str | Sequence[str] = (),
    ) -> str:
        """The model's answer to ``text`` after all earlier messages.

        Args:
          text: the message.
          max_new_tokens: largest number of tokens of the answer.
          sampling: :class:`Greedy` or :class:`Sample`.
          seed: equal seeds give equal answers.
          stop: strings that end the answer; they are not part of it.

        Raises:
          ValueError: an invalid argument, a conversation that does not fit the context, or one that
            the template refuses.
        """
        arguments = dict(max_new_tokens=max_new_tokens, sampling=sampling, seed=seed, stop=stop)
        return "".join(self._turn(text, arguments, DECODE_STEPS_PER_CALL))

    def stream(
        self,
        text: str,
        *,
        max_new_tokens: int = 256,
        sampling: Greedy | Sample = Greedy(),  # noqa: B008 (frozen)
        seed: int = 0,
        stop: str | Sequence[str] = (),
    ) -> Iterator[str]:
        """Yield the answer of :meth:`say` in pieces while it is generated.

        The turn is added to ``messages`` at the end of the iterator; the next turn, :meth:`undo`
        and :meth:`retry` abandon an iterator that has not ended.

        Arguments and errors are those of :meth:`say`.
        """
        arguments = dict(max_new_tokens=max_new_tokens, sampling=sampling, seed=seed, stop=stop)
        return self._turn(text, arguments, 1)

    def undo(self) -> str:
        """Remove the last turn, a message and its answer; returns the message.

        Raises:
          ValueError: there is no turn.
        """
        if not self._turns:
            raise ValueError("there is no turn to undo")
        self._abandon_stream()
        *self.messages, message, _ = self.messages
        self._turns = self._turns[:-1]
        return message["content"]

    def retry(self, **arguments: Any) -> str:
        """Answer the last message again, in place of the last answer.

        To stream the new answer: ``chat.stream(chat.undo(), seed=1)``.

        Args:
          **arguments: of :meth:`say`. The default is those of the last turn, with the next seed; a
            greedy answer is the same again.

        Raises:
          ValueError: there is no turn, or as for :meth:`say`.
        """
        if not self._turns:
            raise ValueError("there is no turn to retry")
        before = self.messages, self._turns
        last = self._turns[-1]
        try:
            return self.say(self.undo(), **(last | {"seed": last["seed"] + 1} | arguments))
        except BaseException:
            self.messages, self._turns = before
            raise

    def _turn(self, text: str, arguments: dict[str, Any], steps_per_call: int) -> Iterator[str]:
        """Check the arguments and the messages; returns the iterator that generates the answer."""
        check_text("the message", text)
        options = check_options(**arguments)
        self._abandon_stream()
        messages = [*self.messages, {"role": "user", "content": text}]
        ids = self._template.encode(messages, self._llm.tokenizer)
        self._llm._check_fits(ids)
        self._running = self._answer(messages, ids, arguments, options, steps_per_call)
        return self._running

    def _abandon_stream(self) -> None:
        """End an iterator of :meth:`stream` that is not at its end."""
        if self._running is not None:
            self._running.close()

    def _answer(
        self,
        messages: list[dict[str, Any]],
        ids: list[int],
        arguments: dict[str, Any],
        options: Options,
        steps_per_call: int,
    ) -> Iterator[str]:
        known, cache = self._ids, self._cache
        sequence = OutputSequence(self._llm.tokenizer, ids, options.stops)
        steps = self._llm._resume(ids, known, cache, sequence, options, steps_per_call)
        try:
            state = yield from stream_text(sequence, steps, strip=True)
        except BaseException:
            # The cache may hold half of this turn, so the next turn reads all messages again.
            if cache is not None and cache.k_LBKSH.is_deleted():
                self._ids, self._cache = [], None
            raise
        answer = sequence.result()
        # The EOS token is never written to the cache.
        self._ids, self._cache = [*ids, *answer.ids], state.cache
        self.messages = [*messages, {"role": "assistant", "content": answer.text.strip()}]
        self._turns = [*self._turns, arguments]
