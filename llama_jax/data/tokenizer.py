"""Text to token ids and back; and how LLaMA's tokenizer was trained.

In comes a tokenizer's file (or text to train one on); out come ids, text, and how many bytes each
id stands for: SentencePiece (LLaMA, Llama 2), ``tokenizer.json`` and tiktoken (Llama 3).

    from llama_jax.data.tokenizer import Tokenizer
    Tokenizer.load("tokenizer.model").encode("Hello", bos=True)
"""

import functools
import io
import json
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llama_jax.data import tiktoken_text
from llama_jax.io import MAX_JSON_BYTES, atomic_write, read_limited

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
MAX_IDS = 2**22
"""The largest vocabulary read; Gemma's has 262,144 ids."""
PIECE_CHARS = 2**16
"""Longer texts are encoded in pieces of about this many characters where that is exact."""
# Control ids that start and end a document, by the names that model families use.
_STARTS = ("<|begin_of_text|>", "<s>")
_ENDS = ("<|end_of_text|>", "</s>")
# Regular expressions that end a word at white space after a letter: Llama 3's and Qwen's.
_PATTERNS = {tiktoken_text.SPLIT, tiktoken_text.SPLIT.replace("{1,3}", "")}
# Letters that every version of Unicode has; any others are only passed over.
_LETTER_THEN_SPACE = re.compile("[A-Za-zÀ-ÖØ-öø-ɏΑ-ΡΣ-ωА-яא-ת一-龥ぁ-ゖァ-ヺ가-힣](?=[ \n])")
BREAK = "\udfff"
"""Half of a character: no text holds it that can be written as UTF-8."""
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
        tokenizer = _parse(_content(path), path)
        if not 0 < tokenizer.vocab_size <= MAX_IDS:
            raise ValueError(
                f"tokenizer {path} is damaged: its ids go up to {tokenizer.vocab_size - 1:,}; "
                f"from 1 to {MAX_IDS:,} ids are read"
            )
        return tokenizer

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

    def _encode(self, text: str, start: bool = True) -> np.ndarray:
        """Ids of a text; ``start``: of the start of a text, which LLaMA puts a space before."""
        raise NotImplementedError

    def _cut(self, text: str, at: int) -> int:
        """The first place from ``at`` on where the text's two parts have the ids of the whole.

        The end of the text where there is none, or where none is known for this tokenizer.
        """
        return len(text)

    def piece(self, token: int) -> str | None:
        """How the file writes an id; None for an id that it does not have."""
        raise NotImplementedError

    def _decode(self, ids: list[int]) -> str:
        raise NotImplementedError

    def encode(self, text: str, bos: bool = False, eos: bool = False) -> list[int]:
        """Ids of a text, on request with the id that starts and the one that ends a document."""
        return self.encode_array(text, bos, eos).tolist()

    def encode_array(self, text: str, bos: bool = False, eos: bool = False) -> np.ndarray:
        """As :meth:`encode`, in int32: no Python object a token, so threads need not wait.

        A long text is encoded piece by piece, in memory of a few times its size, with exactly the
        ids of the whole: SentencePiece BPE without a normaliser (LLaMA) is cut between characters
        that no piece of the vocabulary joins, Llama 3's and other known ``tokenizer.json`` between
        a letter and white space. A text without such places, and any other tokenizer, is encoded
        whole, which takes some 35 times the memory of the text.
        """
        for wanted, name, token in ((bos, "bos", self.bos_id), (eos, "eos", self.eos_id)):
            if wanted and token is None:
                raise ValueError(f"{name}=True, but tokenizer {self.path} has no {name} id")
        ids = self._encode(text) if len(text) <= PIECE_CHARS else self._encode_pieces(text)
        if not bos and not eos:
            return ids
        before, after = [self.bos_id] * bos, [self.eos_id] * eos
        return np.concatenate([np.array(before, np.int32), ids, np.array(after, np.int32)])

    def _encode_pieces(self, text: str) -> np.ndarray:
        parts, start = [], 0
        while start < len(text):
            end = self._cut(text, start + PIECE_CHARS)
            parts.append(self._encode(text[start:end], start == 0))
            start = end
        return np.concatenate(parts)

    def encode_marked(self, text: str) -> list[int]:
        """Ids of a text in which control ids are written out (<s>, <|eot_id|>), as chat templates
        write them. Text of users must not come this way, unless a BREAK is inside each name.

        Nothing joins to a name across a BREAK, which is itself not part of the text.
        """
        ids: list[int] = []
        for words in self._control_names.split(text):
            if words in self.controls:
                ids.append(self.controls[words])
            elif words := words.replace(BREAK, ""):
                ids += self.encode(words)
        return ids

    @functools.cached_property
    def _control_names(self) -> re.Pattern:
        longest_first = sorted(self.controls, key=len, reverse=True)
        return re.compile(f"({'|'.join(map(re.escape, longest_first)) or '(?!)'})")

    def mark(self, token: int | None) -> str:
        """How a template writes a control id; nothing for None."""
        return next((name for name, i in self.controls.items() if i == token), "")

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Text of ids; bytes that are no UTF-8 give U+FFFD.

        Control ids (bos, eos) give no text, nor do ids beyond the vocabulary: a model whose
        embedding is larger than its tokenizer's vocabulary can draw those.

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
        """Bytes that ids stand for beyond their text: 1 if a space goes before it (LLaMA), or 0."""
        return int(self.bytes_of_id_V[self.encode_array("a")].sum()) - 1


class SentencePiece(Tokenizer):
    """LLaMA's and Llama 2's.

    Raises:
      ValueError: the content is something else, or damaged.
    """

    def __init__(self, content: bytes, path: Path):
        self.path = path
        try:
            # After the pieces come the trainer's and the normaliser's settings; a file cut short at
            # a piece would otherwise load as a smaller tokenizer.
            sections = {number: value for number, value in _fields(content) if number in (2, 3)}
            self._trainer, self._normalizer = (dict(_fields(sections[n])) for n in (2, 3))
            self._processor = _sentencepiece().SentencePieceProcessor(model_proto=content)
            if not 0 < self._processor.vocab_size() <= MAX_IDS:
                raise ValueError
        except (ValueError, KeyError, TypeError, RuntimeError):
            raise ValueError(
                f"tokenizer {path} is not a SentencePiece model, a tokenizer.json or tiktoken text "
                "(other data, or damaged: cut short, for example); give the file published with "
                "the weights, or none to train one on the data"
            ) from None
        self._content = content

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

    def _encode(self, text: str, start: bool = True) -> np.ndarray:
        return (self._processor if start else self._inside).encode_as_numpy(text)

    @functools.cached_property
    def _inside(self) -> Any:
        """The same model for text that continues a text: no space is put before it."""
        # Settings that come later in the file win: normalizer_spec.add_dummy_prefix = false.
        content = self._content + b"\x1a\x02\x18\x00"
        return _sentencepiece().SentencePieceProcessor(model_proto=content)

    def _cut(self, text: str, at: int) -> int:
        # BPE merges neighbours into pieces of the vocabulary: where no piece has these two
        # characters side by side, nothing on one side depends on the other.
        pairs, single = self._joined
        if pairs is None:
            return len(text)
        for i in range(at, len(text)):
            left, right = (c.replace(" ", "▁") for c in text[i - 1 : i + 1])
            if left + right not in pairs and (not single or right in single):
                return i
        return len(text)

    @functools.cached_property
    def _joined(self) -> tuple[set[str] | None, set[str]]:
        """Pairs of characters inside pieces, None where a cut may be inexact; and, where unknown
        characters side by side become one id (no byte fallback), the known characters."""
        trainer, normalizer = self._trainer, self._normalizer
        is_bpe = trainer.get(3, 1) == 2
        suffix = trainer.get(24, 0)  # treat_whitespace_as_suffix
        # precompiled_charsmap, remove_extra_whitespaces, escape_whitespaces
        changes = normalizer.get(2) or normalizer.get(4, 1) or not normalizer.get(5, 1)
        if not is_bpe or suffix or changes:
            return None, set()
        pieces = [self._processor.id_to_piece(i) for i in range(self.vocab_size)]
        pairs = {piece[i : i + 2] for piece in pieces for i in range(len(piece) - 1)}
        byte_fallback = trainer.get(35, 0)
        return pairs, set() if byte_fallback else {p for p in pieces if len(p) == 1}

    def piece(self, token: int) -> str | None:
        return self._processor.id_to_piece(token) if 0 <= token < self.vocab_size else None

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
            self._tokenizer.encode("a b\n")  # some errors show only here
        except (KeyboardInterrupt, SystemExit, MemoryError):
            raise
        except BaseException as e:  # a panic of the library's Rust is no Exception
            raise ValueError(
                f"tokenizer {path} is JSON, but no tokenizer.json that can be used: {e!s:.500}"
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

    def _encode(self, text: str, start: bool = True) -> np.ndarray:
        return np.array(self._tokenizer.encode(text, add_special_tokens=False).ids, np.int32)

    def _cut(self, text: str, at: int) -> int:
        found = _LETTER_THEN_SPACE.search(text, at - 1) if self._splits_words else None
        return found.end() if found else len(text)

    @functools.cached_property
    def _splits_words(self) -> bool:
        """Whether the text is always split between a letter and white space, before any merge."""
        tree = json.loads(self._tokenizer.to_str())
        if not all(t["special"] for t in tree["added_tokens"]):  # these match across words
            return False
        if tree["normalizer"] not in (None, {"type": "NFC"}):
            return False
        before = tree["pre_tokenizer"] or {}
        steps = before.get("pretokenizers", [before])
        level = steps[-1]
        if level.get("type") != "ByteLevel" or level["add_prefix_space"]:
            return False
        splits = [s for s in steps[:-1] if s["type"] != "Digits"]
        known = [s["type"] == "Split" and s["pattern"].get("Regex") in _PATTERNS for s in splits]
        isolated = all(s.get("behavior") == "Isolated" and not s.get("invert") for s in splits)
        return all(known) and isolated and (bool(known) or level["use_regex"])

    def piece(self, token: int) -> str | None:
        return self._tokenizer.id_to_token(token) if token >= 0 else None

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
    if not 0 < vocab_size <= MAX_IDS:
        raise ValueError(
            f"vocab_size={vocab_size} is out of range: a tokenizer has 1 to {MAX_IDS:,} ids"
        )
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


def lost_in(tokenizer: Tokenizer, text: str) -> str:
    """What of a text does not come back from its ids: "" if nothing.

    SentencePiece writes a space as "▁", so that character itself comes back as a space from every
    tokenizer of LLaMA's; that is no loss here. Nor are other code points for the same characters
    (a tokenizer that normalises to NFC).
    """
    same = lambda t: unicodedata.normalize("NFC", t).replace("▁", " ")
    before, after = same(text), same(tokenizer.decode(tokenizer.encode_array(text)))
    if before == after:
        return ""
    pairs = enumerate(zip(before, after, strict=False))
    at = next((i for i, (a, b) in pairs if a != b), min(len(before), len(after)))
    return (
        f"{before[max(0, at - 10) : at + 20]!r} comes back as {after[max(0, at - 10) : at + 20]!r}"
    )


def _content(path: Path) -> bytes:
    """A tokenizer's file, read within limits; ValueError says what is wrong with it."""
    try:
        content = read_limited(path, MAX_JSON_BYTES)
    except FileNotFoundError:
        raise ValueError(f"tokenizer {path} does not exist{_other_tokenizers(path)}") from None
    except ValueError as e:
        raise ValueError(f"tokenizer {e}") from None
    except OSError as e:
        raise ValueError(f"tokenizer {path} cannot be read: {e.strerror}") from None
    if not content:
        raise ValueError(f"tokenizer {path} is empty; copy it again")
    if content.startswith(b"version https://git-lfs"):
        raise ValueError(
            f"tokenizer {path} is a Git LFS pointer, not the file itself; run `git lfs pull` "
            "where it came from"
        )
    return content


def _parse(content: bytes, path: Path) -> Tokenizer:
    if content.lstrip()[:1] in (b"{", b"["):
        return JsonTokenizer(content.decode(errors="replace"), path)
    if _TIKTOKEN.match(content):
        return JsonTokenizer(_json_of(content, path), path)
    return SentencePiece(content, path)


def _fields(message: Any) -> Iterator[tuple[int, Any]]:
    """Number and value (int or bytes) of each field of a Protocol Buffers message.

    Raises:
      ValueError: not such a message, or cut short.
    """
    at, end = 0, len(message)

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while at < end and shift < 64:
            byte = message[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value
        raise ValueError("cut short")

    while at < end:
        number, kind = divmod(varint(), 8)
        if kind == 0:
            yield number, varint()
            continue
        if kind not in (1, 2, 5):
            raise ValueError(f"field {number} has the unknown type {kind}")
        size = varint() if kind == 2 else 8 if kind == 1 else 4
        if size > end - at:
            raise ValueError("cut short")
        yield number, message[at : at + size]
        at += size


def _file_of(path: Path) -> Path:
    """The tokenizer of a folder: its tokenizer.json if that has more ids (tokens were added to the
    model's), else its tokenizer.model.

    Raises:
      ValueError: one of the two cannot be read, or the larger has other pieces under shared ids.
    """
    if not path.is_dir():
        return path
    model, other = path / FILE_NAME, path / "tokenizer.json"
    if not (model.exists() and other.exists()):
        return other if other.exists() else model
    of_model, of_json = (_parse(_content(p), p) for p in (model, other))
    if isinstance(of_model, JsonTokenizer):  # Llama 3's: its .json names the control tokens
        return other
    if of_json.vocab_size <= of_model.vocab_size:
        return model
    for i in range(of_model.vocab_size):
        if of_json.piece(i) != of_model.piece(i):
            raise ValueError(
                f"{model} and {other} are different tokenizers: id {i} is {of_model.piece(i)!r} "
                f"in one, {of_json.piece(i)!r} in the other; remove the one that is not the "
                "weights'"
            )
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
