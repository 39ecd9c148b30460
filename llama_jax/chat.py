"""A conversation with a model that has a chat template; the cache is kept from turn to turn.

chat = llm.chat()
chat.say("Who wrote Faust?")
"""

from typing import Any

from llama_jax.sampling import Greedy, Sample


class Chat:
    """Messages so far, and the model's cache of them.

    The template is that of the checkpoint (Jinja, as Hugging Face keeps it), run in a sandbox.

    Raises:
      ValueError: the model has no template.
    """

    def __init__(self, llm: Any, system: str | None = None):
        if llm.chat_template is None:
            raise ValueError(
                "this checkpoint has no chat template: it is a base model, which continues text; "
                "use llm.generate(...)"
            )
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals["raise_exception"] = _refuse
        self._template = environment.from_string(llm.chat_template)
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

        Raises:
          ValueError: the conversation no longer fits the context.
        """
        messages = [*self.messages, {"role": "user", "content": text}]
        ids = self._encode(messages)
        answer, self._ids, self._cache = self._llm.resume(
            ids, self._ids, self._cache,
            max_new_tokens=max_new_tokens, sampling=sampling, seed=seed,
        )  # fmt: skip
        self.messages = [*messages, {"role": "assistant", "content": answer.text.strip()}]
        return answer.text.strip()

    def _encode(self, messages: list[dict[str, Any]]) -> list[int]:
        tokenizer = self._llm.tokenizer
        text = self._template.render(
            messages=messages,
            add_generation_prompt=True,
            bos_token=tokenizer.mark(tokenizer.bos_id),
            eos_token=tokenizer.mark(tokenizer.eos_id),
        )
        return tokenizer.encode_marked(text)


def _refuse(message: str) -> None:
    raise ValueError(f"the chat template refuses these messages: {message}")
