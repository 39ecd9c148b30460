"""Text to token ids and back; and how LLaMA's tokenizer was trained.

In comes a tokenizer's file (or text to train one on); out come ids, text, and how many bytes each
id stands for: SentencePiece (LLaMA, Llama 2), ``tokenizer.json`` and tiktoken (Llama 3).

    from llama_jax.tokenizer import Tokenizer
    Tokenizer.load("tokenizer.model").encode("Hello", bos=True)
"""

import contextlib
import functools
import io
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llama_jax import tiktoken_text
from llama_jax.io import atomic_write

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
# Control ids that start and end a document, by the names that model families use.
_STARTS = ("<|begin_of_text|>", "<s>")
_ENDS = ("<|end_of_text|>", "</s>")
_TIKTOKEN = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n")


class Tokenizer:
    """Text to ids and back. Several threads may encode at once, and do so in parallel."""

    path: Path

    @staticmethod
    def load(path: str | Path) -> "Tokenizer":
        """Read a tokenizer: a file, or ``tokenizer.model`` or ``tokenizer.json`` in a folder.

        SentencePiece (LLaMA, Llama 2), ``tokenizer.json`` or tiktoken (Llama 3), by its content.

        Raises:
          ValueError: missing, or by its content something else; says what it is and what to do.
        """
        path = _file_of(Path(path))
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            raise ValueError(f"tokenizer {path} does not exist{_other_tokenizers(path)}") from None
        except OSError as e:
            raise ValueError(f"tokenizer {path} cannot be read: {e.strerror}") from None
        if not content:
            raise ValueError(f"tokenizer {path} is empty; copy it again")
        if content.startswith(b"version https://git-lfs"):
            raise ValueError(
                f"tokenizer {path} is a Git LFS pointer, not the file itself; run `git lfs pull` "
                "where it came from"
            )
        if content.lstrip()[:1] in (b"{", b"["):
            return JsonTokenizer(content.decode(errors="replace"), path)
        if _TIKTOKEN.match(content):
            return JsonTokenizer(_json_of(content, path), path)
        try:
            processor = _sentencepiece().SentencePieceProcessor(model_proto=content)
        except RuntimeError:
            processor = None
        if processor is None or processor.vocab_size() == 0:
            raise ValueError(
                f"tokenizer {path} is not a SentencePiece model, a tokenizer.json or tiktoken text "
                "(other data, or damaged); give the file published with the weights, or none to "
                "train one on the data"
            )
        return SentencePiece(processor, path)

    @property
    def vocab_size(self) -> int:
        """Number of ids."""
        raise NotImplementedError

    @property
    def bos_id(self) -> int | None:
        """Id that starts a document, None if there is none."""
        raise NotImplementedError

    @property
    def eos_id(self) -> int | None:
        """Id that ends a document, None if there is none."""
        raise NotImplementedError

    @property
    def controls(self) -> Mapping[str, int]:
        """Ids that stand for no text, by the names that chat templates write."""
        raise NotImplementedError

    @property
    def bytes_of_id_V(self) -> np.ndarray:
        """UTF-8 bytes of text that each id stands for, int32 (V,); control ids 0.

        The ids of a text sum to its bytes plus :attr:`prefix_bytes`.
        """
        raise NotImplementedError

    def _encode(self, text: str) -> np.ndarray:
        raise NotImplementedError

    def _decode(self, ids: list[int]) -> str:
        raise NotImplementedError

    def encode(self, text: str, bos: bool = False, eos: bool = False) -> list[int]:
        """Ids of a text, on request with the id that starts and the one that ends a document."""
        return self.encode_array(text, bos, eos).tolist()

    def encode_array(self, text: str, bos: bool = False, eos: bool = False) -> np.ndarray:
        """As :meth:`encode`, in int32: no Python object a token, so threads need not wait."""
        for wanted, name, token in ((bos, "bos", self.bos_id), (eos, "eos", self.eos_id)):
            if wanted and token is None:
                raise ValueError(f"{name}=True, but tokenizer {self.path} has no {name} id")
        ids = self._encode(text)
        if not bos and not eos:
            return ids
        before, after = [self.bos_id] * bos, [self.eos_id] * eos
        return np.concatenate([np.array(before, np.int32), ids, np.array(after, np.int32)])

    def encode_marked(self, text: str) -> list[int]:
        """Ids of a text in which control ids are written out (<s>, <|eot_id|>), as chat templates
        write them; text of users must not come this way."""
        if not self.controls:
            return self.encode(text)
        names = sorted(self.controls, key=len, reverse=True)
        ids: list[int] = []
        for part in re.split("(" + "|".join(map(re.escape, names)) + ")", text):
            ids += [self.controls[part]] if part in self.controls else self.encode(part)
        return ids

    def mark(self, token: int | None) -> str:
        """How a template writes a control id; nothing for None."""
        return next((name for name, i in self.controls.items() if i == token), "")

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
        return self._decode(ids)

    @functools.cached_property
    def prefix_bytes(self) -> int:
        """Bytes that ids stand for beyond their text: 1 if a space goes before it (LLaMA), or 0."""
        return int(self.bytes_of_id_V[self.encode_array("a")].sum()) - 1


class SentencePiece(Tokenizer):
    """LLaMA's and Llama 2's."""

    def __init__(self, processor: Any, path: Path):
        self._processor = processor
        self.path = path

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
        ids = [i for i in (self.bos_id, self.eos_id) if i is not None]
        return {self._processor.id_to_piece(i): i for i in ids}

    def _encode(self, text: str) -> np.ndarray:
        return self._processor.encode_as_numpy(text)

    def _decode(self, ids: list[int]) -> str:
        return self._processor.decode(ids)

    @functools.cached_property
    def bytes_of_id_V(self) -> np.ndarray:
        sp = self._processor
        lengths = np.zeros(self.vocab_size, np.int32)
        for i in range(self.vocab_size):
            if sp.is_byte(i):
                lengths[i] = 1
            elif not (sp.is_control(i) or sp.is_unknown(i) or sp.is_unused(i)):
                lengths[i] = len(sp.id_to_piece(i).replace("▁", " ").encode())
        return lengths


class JsonTokenizer(Tokenizer):
    """Llama 3's, and any other ``tokenizer.json``, through Hugging Face's ``tokenizers``.

    What looks like a control id in a text is text.

    Raises:
      ValueError: the content is something else, or damaged.
    """

    def __init__(self, content: str, path: Path):
        import tokenizers

        self.path = path
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(content)
        except Exception as e:  # the library raises nothing narrower
            raise ValueError(
                f"tokenizer {path} is JSON, but no tokenizer.json that can be used: {e}"
            ) from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        added = self._tokenizer.get_added_tokens_decoder()
        self._controls = {t.content: i for i, t in added.items() if t.special}
        # How GPT-2's vocabularies, and all since, spell the byte of a space.
        self._spells_bytes = self._tokenizer.token_to_id("Ġ") is not None

    @functools.cached_property
    def vocab_size(self) -> int:
        ids = self._tokenizer.get_vocab(with_added_tokens=True).values()
        return 1 + max(ids, default=-1)

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
    atomic_write(path, out.getvalue())
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


def _file_of(path: Path) -> Path:
    """The tokenizer of a folder: SentencePiece, else the fuller of Llama 3's two files."""
    if not path.is_dir():
        return path
    model, other = path / FILE_NAME, path / "tokenizer.json"
    if not other.is_file():
        return model
    with contextlib.suppress(OSError), model.open("rb") as f:
        return other if _TIKTOKEN.match(f.read(100)) else model
    return other


def _json_of(content: bytes, path: Path) -> str:
    """The ``tokenizer.json`` of tiktoken text, with Llama 3's control ids behind its pieces."""
    try:
        ranks = tiktoken_text.ranks_of(content)
    except ValueError:
        ranks = {}
    # Of a list without each byte, text would vanish.
    whole = sorted(ranks.values()) == list(range(len(ranks)))
    if not whole or not all(bytes([b]) in ranks for b in range(256)):
        raise ValueError(
            f"tokenizer {path} is a list of base64 pieces with ranks (tiktoken), and damaged; "
            "copy it again"
        )
    return json.dumps(tiktoken_text.to_json(ranks, newer=True))


def _other_tokenizers(path: Path) -> str:
    folder = path.parent
    found = sorted(p.name for p in folder.glob("*token*")) if folder.is_dir() else []
    listed = f" (the folder has {', '.join(found)})" if found else ""
    return f"{listed}; give a tokenizer's file, or a folder with a {FILE_NAME} or tokenizer.json"


def _id_or_none(token: int) -> int | None:
    return token if token >= 0 else None


def _sentencepiece() -> Any:
    import sentencepiece

    sentencepiece.set_min_log_level(3)  # its errors come back as exceptions; its notes are noise
    return sentencepiece
