"""Training of a tokenizer with the settings of LLaMA's."""

import io
import re
import unicodedata
from collections.abc import Iterable, Iterator
from pathlib import Path

from llama_jax.data.tokenizer import MAX_IDS, Tokenizer
from llama_jax.io import atomic_write

# Settings of the trainer and normaliser that are stored in LLaMA's tokenizer.model.
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
    num_threads=8,  # stored in the file, so a constant: the file is the same on every machine
)
# SentencePiece ignores lines of more than 4192 bytes; a character has at most 4.
_MAX_LINE_CHARS = 1000


def train_tokenizer(texts: Iterable[str], vocab_size: int, path: str | Path) -> Tokenizer:
    """Train a SentencePiece tokenizer as LLaMA's was trained, and write it to a file.

    BPE over lines, with numbers split into digits and rare characters into bytes. Equal texts give
    equal files. Nothing is written if training fails.

    Args:
      texts: documents to train on.
      vocab_size: number of ids.
      path: file to write.

    Raises:
      ValueError: no text, or a vocabulary size that the text does not allow; names the limit.
    """
    import sentencepiece

    path, out = Path(path), io.BytesIO()
    if not 0 < vocab_size <= MAX_IDS:
        raise ValueError(
            f"vocab_size={vocab_size} is out of range: a tokenizer has 1 to {MAX_IDS:,} ids"
        )
    try:
        sentencepiece.SentencePieceTrainer.train(
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
            for i in range(0, len(line), _MAX_LINE_CHARS):
                yield line[i : i + _MAX_LINE_CHARS]


def _training_problem(message: str, vocab_size: int) -> str:
    if largest := re.search(r"value <= (\d+)", message):
        return (
            f"vocab_size={vocab_size} is more than the text supports, the largest possible is "
            f"{largest[1]}; set model.vocab_size (--vocab-size) to at most that, or give more text"
        )
    if smallest := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        return (
            f"vocab_size={vocab_size} is too small for the characters of the text, which need at "
            f"least {smallest[1]}: 256 bytes, 3 control tokens, one per character"
        )
    if "sentences_.empty()" in message:
        return "there is no text to train a tokenizer on"
    return f"training a tokenizer of vocab_size={vocab_size} failed: {message}"


def lost_in(tokenizer: Tokenizer, text: str) -> str:
    """The first part of a text that encoding and decoding changes; "" if nothing changes.

    Two changes are allowed: every SentencePiece tokenizer decodes the character "▁" to a space,
    and a tokenizer may normalise to NFC, which changes code points but not characters.
    """
    same = lambda t: unicodedata.normalize("NFC", t).replace("▁", " ")
    before, after = same(text), same(tokenizer.decode(tokenizer.encode_array(text)))
    if before == after:
        return ""
    pairs = enumerate(zip(before, after, strict=False))
    at = next((i for i, (a, b) in pairs if a != b), min(len(before), len(after)))
    return f"{before[max(0, at - 10) : at + 20]!r} becomes {after[max(0, at - 10) : at + 20]!r}"
