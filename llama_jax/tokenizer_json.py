"""Llama 3's tokenizers: byte-level BPE, as Hugging Face keeps it (``tokenizer.json``) or Meta does
(tiktoken's list of pieces and ranks).

In comes a file's content; out comes a :class:`llama_jax.tokenizer.Tokenizer`. The encoding itself
is Hugging Face's ``tokenizers``; nothing is fetched.
"""

import functools
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from llama_jax.conversion import tokenizer_files
from llama_jax.tokenizer import Tokenizer

_STARTS = ("<|begin_of_text|>", "<s>")
_ENDS = ("<|end_of_text|>", "</s>")


class JsonTokenizer(Tokenizer):
    """A ``tokenizer.json``. What looks like a control id in a text is text."""

    def __init__(self, content: str, path: Path):
        import tokenizers

        self.path = path
        self._tokenizer = tokenizers.Tokenizer.from_str(content)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        added = self._tokenizer.get_added_tokens_decoder()
        self._controls = {t.content: i for i, t in added.items() if t.special}
        # How GPT-2's vocabularies, and all since, spell the byte of a space.
        self._spells_bytes = self._tokenizer.token_to_id("Ġ") is not None

    @functools.cached_property
    def vocab_size(self) -> int:
        return 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values())

    @functools.cached_property
    def bos_id(self) -> int | None:
        # The template of a tokenizer.json says what goes before a text.
        first = self._tokenizer.encode("").ids[:1]
        known = [i for i in first if i in self._controls.values() and i != self.eos_id]
        return known[0] if known else self._named(_STARTS)

    @functools.cached_property
    def eos_id(self) -> int | None:
        return self._named(_ENDS)

    def _named(self, names: Sequence[str]) -> int | None:
        return next((self._controls[n] for n in names if n in self._controls), None)

    @property
    def controls(self) -> Mapping[str, int]:
        return self._controls

    def _encode(self, text: str) -> np.ndarray:
        return np.array(self._tokenizer.encode(text, add_special_tokens=False).ids, np.int32)

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True)

    @functools.cached_property
    def bytes_of_id_V(self) -> np.ndarray:
        lengths = np.zeros(self.vocab_size, np.int32)
        for piece, i in self._tokenizer.get_vocab(with_added_tokens=True).items():
            if piece in self._controls:
                continue
            if self._spells_bytes:  # each by a character
                lengths[i] = len(piece)
            elif re.fullmatch("<0x[0-9A-F]{2}>", piece):
                lengths[i] = 1
            else:
                lengths[i] = len(piece.replace("▁", " ").encode())
        return lengths


def from_json(content: bytes, path: Path) -> JsonTokenizer:
    """The tokenizer of a ``tokenizer.json``.

    Raises:
      ValueError: it is something else, or damaged.
    """
    try:
        return JsonTokenizer(content.decode(), path)
    except Exception as e:  # the library raises nothing narrower
        raise ValueError(
            f"tokenizer {path} is JSON, but no tokenizer.json that can be used: {e}"
        ) from None


def from_tiktoken(path: Path) -> JsonTokenizer:
    """The tokenizer of Meta's list of pieces and ranks, with Llama 3's 256 control ids behind.

    Raises:
      ValueError: the list is damaged.
    """
    found = tokenizer_files.recognise(path)
    # 256 bytes, and 256 control ids: of a list with less, text would vanish.
    if found is None or found.kind != "tiktoken" or found.size < 512:
        raise ValueError(
            f"tokenizer {path} is a list of base64 pieces with ranks (tiktoken), and damaged; "
            "copy it again"
        )
    return JsonTokenizer(json.dumps(tokenizer_files.hf_tokenizer(found, newer=True)), path)
