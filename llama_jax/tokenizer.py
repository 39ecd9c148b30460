"""Text to token ids and back, with SentencePiece; and how LLaMA's tokenizer was trained.

In comes a ``tokenizer.model`` (or text to train one on); out come ids, text, and how many bytes
each id stands for.

    from llama_jax.tokenizer import Tokenizer
    Tokenizer.load("tokenizer.model").encode("Hello", bos=True)
"""

import functools
import io
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

FILE_NAME = "tokenizer.model"

# The trainer and normaliser settings stored in LLaMA's own tokenizer.model.
TRAINER = dict(
    model_type="bpe",
    character_coverage=0.99995,
    split_digits=True,
    byte_fallback=True,
    allow_whitespace_only_pieces=True,
    max_sentencepiece_length=16,
    normalization_rule_name="identity",
    add_dummy_prefix=True,
    remove_extra_whitespaces=False,
    unk_id=0,
    bos_id=1,
    eos_id=2,
    pad_id=-1,
    num_threads=8,  # stored in the model: a constant keeps the file the same on every machine
)
# SentencePiece drops lines of more than 4192 bytes from training; a character has at most 4.
LONGEST_LINE = 1000


class Tokenizer:
    """A SentencePiece model. Several threads may encode at once, and do so in parallel."""

    def __init__(self, processor: Any, path: Path):
        self._processor = processor
        self.path = path

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """Read a SentencePiece model: a file, or the ``tokenizer.model`` in a folder.

        Raises:
          ValueError: missing, or by its content something else; says what it is and what to do.
        """
        path = Path(path)
        if path.is_dir():
            path = path / FILE_NAME
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            raise ValueError(f"tokenizer {path} does not exist{_other_tokenizers(path)}") from None
        except OSError as e:
            raise ValueError(f"tokenizer {path} cannot be read: {e.strerror}") from None
        if what := _not_sentencepiece(content):
            raise ValueError(f"tokenizer {path} {what}")
        try:
            processor = _sentencepiece().SentencePieceProcessor(model_proto=content)
        except RuntimeError:
            processor = None
        if processor is None or processor.vocab_size() == 0:
            raise ValueError(
                f"tokenizer {path} is not a SentencePiece model (other binary data, or damaged); "
                "give a SentencePiece .model file, or none to train one on the data"
            )
        return cls(processor, path)

    @property
    def vocab_size(self) -> int:
        """Number of ids."""
        return self._processor.vocab_size()

    @property
    def bos_id(self) -> int | None:
        """Id that starts a document, None if the model has none."""
        return _id_or_none(self._processor.bos_id())

    @property
    def eos_id(self) -> int | None:
        """Id that ends a document, None if the model has none."""
        return _id_or_none(self._processor.eos_id())

    def encode(self, text: str, bos: bool = False, eos: bool = False) -> list[int]:
        """Ids of a text, on request with the id that starts and the one that ends a document."""
        return self.encode_array(text, bos, eos).tolist()

    def encode_array(self, text: str, bos: bool = False, eos: bool = False) -> np.ndarray:
        """As :meth:`encode`, in int32: no Python object a token, so threads need not wait."""
        for wanted, name, token in ((bos, "bos", self.bos_id), (eos, "eos", self.eos_id)):
            if wanted and token is None:
                raise ValueError(f"{name}=True, but tokenizer {self.path} has no {name} id")
        return self._processor.encode_as_numpy(text, add_bos=bos, add_eos=eos)

    def encode_marked(self, text: str) -> list[int]:
        """Ids of a text in which the ids that start and end a document are written out (<s>, </s>),
        as chat templates write them; text of users must not come this way."""
        marks = {self.mark(i): i for i in (self.bos_id, self.eos_id) if i is not None}
        ids: list[int] = []
        for part in re.split("(" + "|".join(map(re.escape, marks)) + ")", text):
            ids += [marks[part]] if part in marks else self.encode(part)
        return ids

    def mark(self, token: int | None) -> str:
        """How a template writes a control id; nothing for None."""
        return "" if token is None else self._processor.id_to_piece(token)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Text of ids; control ids (bos, eos) give none, bytes that are no UTF-8 give U+FFFD.

        Raises:
          ValueError: an id outside the vocabulary.
        """
        ids = [int(i) for i in ids]
        if bad := [i for i in ids if not 0 <= i < self.vocab_size]:
            raise ValueError(
                f"token id {bad[0]} is outside the vocabulary of {self.vocab_size} ({self.path})"
            )
        return self._processor.decode(ids)

    @functools.cached_property
    def bytes_of_id_V(self) -> np.ndarray:
        """UTF-8 bytes of text that each id stands for, int32 (V,); control ids 0.

        The ids of a text sum to its bytes plus :attr:`prefix_bytes`.
        """
        sp = self._processor
        lengths = np.zeros(self.vocab_size, np.int32)
        for i in range(self.vocab_size):
            if sp.is_byte(i):
                lengths[i] = 1
            elif not (sp.is_control(i) or sp.is_unknown(i) or sp.is_unused(i)):
                lengths[i] = len(sp.id_to_piece(i).replace("▁", " ").encode())
        return lengths

    @functools.cached_property
    def prefix_bytes(self) -> int:
        """Bytes that ids stand for beyond their text: 1 if a space goes before it (LLaMA), or 0."""
        return int(self.bytes_of_id_V[self.encode_array("a")].sum()) - 1


def train_tokenizer(texts: Iterable[str], vocab_size: int, path: str | Path) -> Tokenizer:
    """Train a tokenizer of ``vocab_size`` pieces as LLaMA's was, and write it to ``path``.

    BPE over lines, numbers split into digits, bytes for rare characters. The same texts give the
    same file, bit for bit. Nothing is written when it fails.

    Raises:
      ValueError: no text, or too little or too varied for so many pieces; names the limit.
    """
    path, out = Path(path), io.BytesIO()
    try:
        _sentencepiece().SentencePieceTrainer.train(
            sentence_iterator=_lines(texts),
            model_writer=out,
            vocab_size=vocab_size,
            minloglevel=3,
            **TRAINER,
        )
    except RuntimeError as e:
        raise ValueError(_training_problem(str(e), vocab_size)) from None
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_bytes(out.getvalue())
        os.replace(partial, path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
    return Tokenizer.load(path)


def _lines(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        for line in text.split("\n"):
            for i in range(0, len(line), LONGEST_LINE):
                yield line[i : i + LONGEST_LINE]


def _training_problem(message: str, vocab_size: int) -> str:
    if largest := re.search(r"value <= (\d+)", message):
        return (
            f"vocab_size={vocab_size} is more than the text supports, the largest possible is "
            f"{largest[1]}; set model.vocab_size (--vocab-size) to at most that, or give more text"
        )
    if smallest := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        return (
            f"vocab_size={vocab_size} is too small for the characters of the text, it takes at "
            f"least {smallest[1]}: 256 bytes, 3 control ids, one a character"
        )
    if "sentences_.empty()" in message:
        return "there is no text to train a tokenizer on"
    return f"training a tokenizer of vocab_size={vocab_size} failed: {message}"


def _not_sentencepiece(content: bytes) -> str | None:
    """What a file is, by its content, if it is something people give instead of a .model."""
    if not content:
        return "is empty; copy it again"
    if content.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not the file itself; run `git lfs pull` where it came from"
    if content.lstrip()[:1] in (b"{", b"["):
        return (
            "is JSON (a Hugging Face tokenizer.json?), not a SentencePiece model; "
            "give the tokenizer.model published with LLaMA and Llama 2 weights"
        )
    if re.match(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n", content):
        return (
            "is a list of base64 pieces with ranks (tiktoken, as published with Llama 3), "
            "not a SentencePiece model; give a SentencePiece .model file"
        )
    return None


def _other_tokenizers(path: Path) -> str:
    folder = path.parent
    found = sorted(p.name for p in folder.glob("*token*")) if folder.is_dir() else []
    listed = f" (the folder has {', '.join(found)})" if found else ""
    return f"{listed}; give a SentencePiece .model file or a folder with a {FILE_NAME}"


def _id_or_none(token: int) -> int | None:
    return token if token >= 0 else None


def _sentencepiece() -> Any:
    import sentencepiece

    sentencepiece.set_min_log_level(3)  # its errors come back as exceptions; its notes are noise
    return sentencepiece
