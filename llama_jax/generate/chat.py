"""A conversation with a model that has a chat template; the cache is kept from turn to turn.

chat = llm.chat()
chat.say("Who wrote Faust?")
"""

from typing import Any

from llama_jax.data.chat_template import ChatTemplate
from llama_jax.data.tokenizer import check_text
from llama_jax.generate.sampler import Greedy, Sample


class Chat:
    """Messages so far, and the model's cache of them.

    The template is that of the checkpoint (Jinja, as Hugging Face keeps it). It alone writes
    control ids: in what is said, their names are text.

    Raises:
      ValueError: the model has no template, or a broken one.
    """

    def __init__(self, llm: Any, system: str | None = None):
        if llm.chat_template is None:
            raise ValueError(
                llm.no_template
                or "this checkpoint has no chat template: it is a base model, which continues "
                "text; use llm.generate(...)"
            )
        if system is not None:
            check_text("the system message", system)
        where = f"the chat template of {llm.tokenizer.path.parent}"
        self._template = ChatTemplate(llm.chat_template, where)
        self._llm = llm
        self._ids: list[int] = []
        self._cache: Any = None
        self.messages = [{"role": "system", "content": system}] if system is not None else []

    def say(
        self,
        text: str,
        *,
        max_new_tokens: int = 256,
        sampling: Greedy | Sample = Greedy(),  # noqa: B008 (frozen)
        seed: int = 0,
    ) -> str:
        """The model's answer to ``text``, after all that was said before.

        After an error, or Ctrl-C, the conversation is as it was before this turn, and can go on.

        Raises:
          ValueError: the conversation no longer fits the context, or the template refuses it.
        """
        check_text("the message", text)
        messages = [*self.messages, {"role": "user", "content": text}]
        ids = self._encode(messages)
        try:
            answer, self._ids, self._cache = self._llm.resume(
                ids, self._ids, self._cache,
                max_new_tokens=max_new_tokens, sampling=sampling, seed=seed,
            )  # fmt: skip
        except BaseException:
            # Its memory may hold half of this turn by now: the next one reads all again.
            if self._cache is not None and self._cache.k_LBKSH.is_deleted():
                self._ids, self._cache = [], None
            raise
        self.messages = [*messages, {"role": "assistant", "content": answer.text.strip()}]
        return answer.text.strip()

    def _encode(self, messages: list[dict[str, Any]]) -> list[int]:
        return self._template.encode(messages, self._llm.tokenizer)
