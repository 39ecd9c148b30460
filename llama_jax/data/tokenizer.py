"""Text to token ids and back.

Tokenizer.load("tokenizer.model").encode("Hello", bos=True)
"""

import functools
import itertools
import json
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llama_jax.data import sentencepiece_json, tiktoken_text, token_bytes, tokenizer_json
from llama_jax.data import tokenizer_files as files
from llama_jax.data.tokenizer_files import JSON_FILE, MODEL_FILE, load_sentencepiece, recognize
from llama_jax.storage.copies import local_files
from llama_jax.storage.paths import as_path

MAX_IDS = 2**22
"""The largest vocabulary read; Gemma's has 262,144 ids."""
PIECE_CHARS = 2**16
"""Longer texts are encoded in pieces of about this many characters where that is exact."""
# Names of the BOS and EOS tokens in the tokenizer.json of different model families.
_BOS_NAMES = ("<|begin_of_text|>", "<s>")
_EOS_NAMES = ("<|end_of_text|>", "</s>", "<|endoftext|>")
# Regular expressions of Llama 3 and Qwen: both end a word between a letter and white space.
_PATTERNS = {tiktoken_text.SPLIT, tiktoken_text.SPLIT.replace("{1,3}", "")}
# Letters of every version of Unicode; a text is not split after any other letter.
_LETTER_THEN_SPACE = re.compile("[A-Za-zÀ-ÖØ-öø-ɏΑ-ΡΣ-ωА-яא-ת一-龥ぁ-ゖァ-ヺ가-힣](?=[ \n])")
BREAK = "\udfff"
"""A lone surrogate, which no valid text contains; inside the name of a control token it turns the
name into plain text (see :meth:`Tokenizer.encode_marked`)."""


def check_text(name: str, text: Any) -> None:
    """Raise ValueError, which calls the text ``name``, unless it can be written as UTF-8."""
    if not isinstance(text, str):
        raise ValueError(f"{name} must be a string, not {type(text).__name__}: {text!r:.60}")
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise ValueError(
            f"{name} is not valid Unicode: it has the lone surrogate {text[e.start]!r} at {e.start}"
        ) from None


class Tokenizer:
    """Text to token ids and back. Several threads may encode at the same time.

    Example:
      >>> tokenizer = Tokenizer.load("checkpoints/tiny")
      >>> tokenizer.decode(tokenizer.encode("def main("))
      'def main('
    """

    path: Path
    prefix_after_controls = True
    """Whether text after a control token gets the space that is added before a text."""
    added: Collection[str] = ()
    """Names of tokens that are not pieces of a trained vocabulary."""
    strips_before: Collection[str] = ()
    """Names of control tokens that take the white space before them."""
    strips_after: Collection[str] = ()
    """Names of control tokens that take the white space after them."""

    @staticmethod
    def load(path: str | Path) -> "Tokenizer":
        """Read a tokenizer file, or the tokenizer of a folder.

        The content decides what a file is: a SentencePiece model (LLaMA, Llama 2), tiktoken text
        (Llama 3) or a ``tokenizer.json``. Of a folder, ``tokenizer.model`` is read, unless
        ``tokenizer.json`` has more ids or other names of control tokens.

        Raises:
          ValueError: missing or damaged, something else, or two files of a folder that contradict
            each other.
        """
        path = local_files(as_path(path))
        tokenizer = _load_folder(path) if path.is_dir() else _open(path)
        if not 0 < tokenizer.vocab_size <= MAX_IDS:
            raise ValueError(
                f"tokenizer {tokenizer.path} is damaged: its ids go up to "
                f"{tokenizer.vocab_size - 1:,}; from 1 to {MAX_IDS:,} ids are read"
            )
        return tokenizer

    @property
    def vocab_size(self) -> int:
        """Number of ids."""
        raise NotImplementedError

    @property
    def bos_id(self) -> int | None:
        """Id of the BOS token, which starts a document; None if there is none."""
        raise NotImplementedError

    @property
    def adds_bos(self) -> bool:
        """Whether each text begins with the BOS token, unless the caller asks for the opposite."""
        return self.bos_id is not None

    @property
    def eos_id(self) -> int | None:
        """Id of the EOS token, which ends a document; None if there is none."""
        raise NotImplementedError

    @property
    def controls(self) -> Mapping[str, int]:
        """Ids of control tokens by the names that chat templates write, such as ``<|eot_id|>``."""
        raise NotImplementedError

    @functools.cached_property
    def token_bytes(self) -> list[bytes]:
        """What each id adds to a text, in UTF-8; empty for control tokens and unused ids."""
        raise NotImplementedError

    @functools.cached_property
    def bytes_of_id_V(self) -> np.ndarray:
        """Lengths of :attr:`token_bytes`, int32 (V,).

        The lengths of a text's tokens sum to its bytes plus :attr:`prefix_bytes`.
        """
        return np.array([len(b) for b in self.token_bytes], np.int32)

    def _encode(self, text: str, start: bool = True) -> np.ndarray:
        """Ids of a text; without ``start`` it continues a text, and gets no space before it."""
        raise NotImplementedError

    def _cut(self, text: str, at: int) -> int:
        """The first index from ``at`` where splitting the text leaves its ids unchanged.

        The end of the text if there is none, or if none is known for this tokenizer.
        """
        return len(text)

    def piece(self, token: int) -> str | None:
        """The token of an id as the file spells it; None for an unknown id."""
        raise NotImplementedError

    def _decode(self, ids: list[int]) -> str:
        raise NotImplementedError

    def encode(self, text: str, bos: bool = False, eos: bool = False) -> list[int]:
        """Ids of a text, with the BOS and EOS token on request.

        Args:
          text: any text; names of control tokens in it are encoded as text.
          bos: begin with the BOS id.
          eos: end with the EOS id.
        """
        return self.encode_array(text, bos, eos).tolist()

    def encode_array(
        self, text: str, bos: bool = False, eos: bool = False, start: bool = True
    ) -> np.ndarray:
        """:meth:`encode` to int32 (T,). No Python object per token is made, so threads run in
        parallel.

        A long text is split and encoded piece by piece, which needs memory of a few times its size
        and gives exactly the ids of the whole. For SentencePiece BPE without a normalizer (LLaMA)
        it is split between characters that are adjacent in no token; for Llama 3's and other known
        ``tokenizer.json`` between a letter and white space. A text without such places, and a text
        of any other tokenizer, is encoded whole, which needs about 35 times its memory.

        Args:
          text: as for :meth:`encode`.
          bos: begin with the BOS id.
          eos: end with the EOS id.
          start: False if the text continues another, so that no space is added before it.
        """
        for wanted, name, token in ((bos, "bos", self.bos_id), (eos, "eos", self.eos_id)):
            if wanted and token is None:
                raise ValueError(f"{name}=True, but tokenizer {self.path} has no {name} id")
        whole = len(text) <= PIECE_CHARS
        ids = self._encode(text, start) if whole else self._encode_pieces(text, start)
        before, after = (np.array(x, np.int32) for x in ([self.bos_id] * bos, [self.eos_id] * eos))
        return np.concatenate([before, ids, after]) if bos or eos else ids

    def _encode_pieces(self, text: str, start: bool) -> np.ndarray:
        parts, at = [], 0
        while at < len(text):
            end = self._cut(text, at + PIECE_CHARS)
            parts.append(self._encode(text[at:end], start and at == 0))
            at = end
        return np.concatenate(parts)

    def encode_marked(self, text: str) -> list[int]:
        """Ids of the output of a chat template, with control tokens for names like ``<|eot_id|>``.

        :data:`BREAK` is removed after the names are found: a name with a BREAK inside is plain
        text. Text of users must have a BREAK in each name.
        """
        return self.encode_consecutive([text])[0]

    def encode_consecutive(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each of several consecutive texts, as :meth:`encode_marked` encodes them.

        A text gets no space before it unless it is the first, or follows a control token after
        which the tokenizer adds one. A control token may take the white space beside it.
        """
        all_ids, start, last = [], True, ""
        for text in texts:
            ids: list[int] = []
            parts = [*self.control_names.split(text), ""]
            for words, following in itertools.pairwise(parts):
                if words in self.controls:
                    ids.append(self.controls[words])
                    start, last = self.prefix_after_controls, words
                    continue
                words = words.replace(BREAK, "")
                words = words.lstrip() if last in self.strips_after else words
                words = words.rstrip() if following in self.strips_before else words
                if words:
                    ids += self.encode_array(words, start=start).tolist()
                    start, last = False, ""
            all_ids.append(ids)
        return all_ids

    @functools.cached_property
    def control_names(self) -> re.Pattern:
        """A pattern that matches the names of control tokens, the longest first."""
        longest_first = sorted(self.controls, key=len, reverse=True)
        return re.compile(f"({'|'.join(map(re.escape, longest_first)) or '(?!)'})")

    def mark(self, token: int | None) -> str:
        """The name of a control token; "" for None."""
        return next((name for name, i in self.controls.items() if i == token), "")

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Text of ids; bytes that are not valid UTF-8 give U+FFFD.

        Control tokens and ids beyond the vocabulary give no text. A model whose embedding has more
        rows than the tokenizer has ids can produce the latter.

        Raises:
          ValueError: a negative id.
        """
        ids = [int(i) for i in ids]
        if min(ids, default=0) < 0:
            raise ValueError(f"token id {min(ids)} is negative ({self.path})")
        ids = [i for i in ids if i < self.vocab_size]
        return self._decode(ids)

    @functools.cached_property
    def prefix_bytes(self) -> int:
        """Bytes of the tokens minus those of the text: 1 if a space is added before it, or 0."""
        return int(self.bytes_of_id_V[self.encode_array("a")].sum()) - 1


class SentencePiece(Tokenizer):
    """LLaMA's and Llama 2's; ValueError if the content is something else, or damaged."""

    def __init__(self, content: bytes, path: Path):
        self.path, self._content = path, content
        self._processor, self._proto = load_sentencepiece(content)

    @property
    def vocab_size(self) -> int:
        return self._processor.vocab_size()

    @property
    def bos_id(self) -> int | None:
        return _id_or_none(self._processor.bos_id())

    @property
    def eos_id(self) -> int | None:
        return _id_or_none(self._processor.eos_id())

    @functools.cached_property
    def controls(self) -> Mapping[str, int]:
        ids = {i for i in (self.bos_id, self.eos_id) if i is not None}
        ids |= {i for i, p in enumerate(self._proto.pieces) if p.type == sentencepiece_json.CONTROL}
        return {self._processor.id_to_piece(i): i for i in sorted(ids)}

    def _encode(self, text: str, start: bool = True) -> np.ndarray:
        return (self._processor if start else self._inside).encode_as_numpy(text)

    @functools.cached_property
    def _inside(self) -> Any:
        """The same model without the space before a text."""
        # Of a field that occurs twice the last wins: normalizer_spec.add_dummy_prefix = false.
        return load_sentencepiece(self._content + b"\x1a\x02\x18\x00")[0]

    def _cut(self, text: str, at: int) -> int:
        # BPE merges neighbors into tokens: where no token has these two characters side by side,
        # the ids on one side do not depend on the other side.
        pairs, single = self._adjacent
        if pairs is None:
            return len(text)
        for i in range(at, len(text)):
            left, right = (c.replace(" ", "▁") for c in text[i - 1 : i + 1])
            if left + right not in pairs and (not single or right in single):
                return i
        return len(text)

    @functools.cached_property
    def _adjacent(self) -> tuple[set[str] | None, set[str]]:
        return sentencepiece_json.adjacent(self._proto)

    def piece(self, token: int) -> str | None:
        return self._processor.id_to_piece(token) if 0 <= token < self.vocab_size else None

    def _decode(self, ids: list[int]) -> str:
        return self._processor.decode(ids)

    @functools.cached_property
    def token_bytes(self) -> list[bytes]:
        return token_bytes.of_sentencepiece(self._processor)


class JsonTokenizer(Tokenizer):
    """A ``tokenizer.json``, Llama 3's or any other, through Hugging Face's ``tokenizers``.

    The name of a control token in a text is encoded as text. ValueError if the content cannot be
    used.
    """

    def __init__(self, content: str, path: Path):
        import tokenizers

        self.path = path
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(tokenizer_json.with_controls(content))
            self._tokenizer.encode("a b\n")  # some errors occur only here
        except (KeyboardInterrupt, SystemExit, MemoryError):
            raise
        except BaseException as e:  # a panic of the Rust library is not an Exception
            raise ValueError(str(e)) from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        added = self._tokenizer.get_added_tokens_decoder()
        self.added = {t.content for t in added.values()}
        self._controls = {t.content: i for i, t in added.items() if t.special}
        self.strips_before = {t.content for t in added.values() if t.lstrip}
        self.strips_after = {t.content for t in added.values() if t.rstrip}
        prefix = tokenizer_json.prefix_after_controls(self._tokenizer.pre_tokenizer)
        self.prefix_after_controls = prefix
        # Byte-level vocabularies (GPT-2 and later) spell each byte as a character, a space as "Ġ".
        self._is_byte_level = self._tokenizer.token_to_id("Ġ") is not None

    @functools.cached_property
    def vocab_size(self) -> int:
        ids = self._tokenizer.get_vocab(with_added_tokens=True).values()
        return 1 + max(ids, default=-1)

    @functools.cached_property
    def bos_id(self) -> int | None:
        # The post-processor of a tokenizer.json adds it to every text.
        first = self._tokenizer.encode("").ids[:1]
        known = [i for i in first if i in self._controls.values() and i != self.eos_id]
        return known[0] if known else self._named(_BOS_NAMES)

    @functools.cached_property
    def adds_bos(self) -> bool:
        return self.bos_id is not None and self._tokenizer.encode("").ids[:1] == [self.bos_id]

    @functools.cached_property
    def eos_id(self) -> int | None:
        return self._named(_EOS_NAMES)

    def _named(self, names: Sequence[str]) -> int | None:
        return next((self._controls[n] for n in names if n in self._controls), None)

    @property
    def controls(self) -> Mapping[str, int]:
        return self._controls

    def _encode(self, text: str, start: bool = True) -> np.ndarray:
        tokenizer = self._tokenizer if start or not self.prefix_bytes else self._inside
        if len(text) < 2**14:
            return np.array(tokenizer.encode(text, add_special_tokens=False).ids, np.int32)
        # Unlike encode, this lets other threads run, and a long text takes seconds.
        (encoding,) = tokenizer.encode_batch_fast([text], add_special_tokens=False)
        return np.array(encoding.ids, np.int32)

    @functools.cached_property
    def _inside(self) -> Any:
        """The same tokenizer without the space before a text."""
        content = json.dumps(tokenizer_json.without_prefix(json.loads(self._tokenizer.to_str())))
        tokenizer = type(self._tokenizer).from_str(content)
        tokenizer.encode_special_tokens = True
        return tokenizer

    def _cut(self, text: str, at: int) -> int:
        found = _LETTER_THEN_SPACE.search(text, at - 1) if self._splits_words else None
        return found.end() if found else len(text)

    @functools.cached_property
    def _splits_words(self) -> bool:
        """Whether the text is split between each letter and white space before any merge."""
        return tokenizer_json.splits_words(json.loads(self._tokenizer.to_str()), _PATTERNS)

    def piece(self, token: int) -> str | None:
        return self._tokenizer.id_to_token(token) if token >= 0 else None

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True)

    @functools.cached_property
    def token_bytes(self) -> list[bytes]:
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        return token_bytes.of_json(vocabulary, self._controls, self._is_byte_level)


def _open(path: Path) -> Tokenizer:
    file = recognize(path)
    try:
        if file.kind == "sentencepiece":
            return SentencePiece(file.content, path)
        if file.kind == JSON_FILE:
            return JsonTokenizer(file.content.decode(errors="replace"), path)
        return JsonTokenizer(tiktoken_text.whole_json(file.content), path)
    except ValueError as e:
        raise file.damaged(e) from None


def _load_folder(folder: Path) -> Tokenizer:
    model, other = folder / MODEL_FILE, folder / JSON_FILE
    if other.exists() and not model.exists():
        return _open(other)
    of_model = _open(model)
    if not other.exists():
        if isinstance(of_model, SentencePiece):
            of_model.prefix_after_controls = files.prefix_after_controls(folder)
        return of_model
    of_json = _open(other)
    if isinstance(of_model, JsonTokenizer):  # Llama 3: tokenizer.json has its control tokens
        return of_json
    has_more = of_json.vocab_size > of_model.vocab_size
    for i in range(min(of_json.vocab_size, of_model.vocab_size)):
        if (ours := of_json.piece(i)) != (theirs := of_model.piece(i)):
            has_more = True  # a piece was renamed to an added token
            if ours not in of_json.added:
                raise ValueError(
                    f"{model} and {other} are different tokenizers: id {i} is {theirs!r} in one, "
                    f"{ours!r} in the other; remove the one that does not belong to the weights"
                )
    if has_more:
        return of_json
    of_model.prefix_after_controls = of_json.prefix_after_controls
    return of_model


def _id_or_none(token: int) -> int | None:
    return token if token >= 0 else None
