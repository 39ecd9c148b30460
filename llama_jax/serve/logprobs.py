"""Log-probabilities of tokens in the formats of chats and of completions."""

import codecs
from collections.abc import Iterable
from typing import Any

from llama_jax.data.tokenizer import Tokenizer
from llama_jax.serve.request import Token
from llama_jax.serve.token_text import token_bytes, token_string


def chat_logprobs(tokenizer: Tokenizer, tokens: Iterable[Token], num_top: int) -> dict[str, Any]:
    """``choices[].logprobs`` of a chat.

    Args:
      tokenizer: of the model.
      tokens: new tokens.
      num_top: alternatives per token.
    """
    entry = lambda token, logprob: {
        "token": token_string(data := token_bytes(tokenizer, token)),
        "logprob": logprob,
        "bytes": list(data),
    }
    content = [
        entry(t.id, t.logprob) | {"top_logprobs": [entry(*pair) for pair in top_of(t, num_top)]}
        for t in tokens
    ]
    return {"content": content, "refusal": None}


def top_of(token: Token, num_top: int) -> list[tuple[int, float]]:
    """The most likely ids in place of a token."""
    return list(token.top.items())[:num_top]


class CompletionLogprobs:
    """``choices[].logprobs`` of a completion, part by part.

    Args:
      tokenizer: of the model.
      num_top: alternatives per token.
      offset: of the first token in the text, characters.
    """

    def __init__(self, tokenizer: Tokenizer, num_top: int, offset: int = 0):
        self._tokenizer, self._num_top, self._offset = tokenizer, num_top, offset
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def of(self, tokens: Iterable[Token]) -> dict[str, Any]:
        """The format of the next tokens."""
        strings, values, tops, offsets = [], [], [], []
        for token in tokens:
            data = token_bytes(self._tokenizer, token.id)
            string = token_string(data)
            strings.append(string)
            values.append(token.logprob)
            tops.append(self._top(token, string))
            offsets.append(self._offset)
            if token.id not in self._tokenizer.controls.values():
                self._offset += len(self._decoder.decode(data))
        return dict(tokens=strings, token_logprobs=values, top_logprobs=tops, text_offset=offsets)

    def _top(self, token: Token, string: str) -> dict[str, float] | None:
        """By text, the token itself included; of two ids with equal text, the more likely."""
        if token.logprob is None:
            return None
        made: dict[str, float] = {}
        for other, logprob in top_of(token, self._num_top):
            made.setdefault(token_string(token_bytes(self._tokenizer, other)), logprob)
        made.setdefault(string, token.logprob)
        return made
