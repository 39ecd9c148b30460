"""The tokenizer of a mixture: given, taken from a prepared source, or trained on the text.

Training uses the settings of LLaMA's tokenizer.
"""

import hashlib
import io
import json
import logging
import re
import unicodedata
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from llama_jax.config import DataConfig
from llama_jax.data.manifest import digest
from llama_jax.data.tokenizer import MAX_IDS, Tokenizer
from llama_jax.data.tokenizer_files import MODEL_FILE
from llama_jax.io import atomic_write, in_use, read_json_or_empty, sha256
from llama_jax.prepare.split import SplitRule
from llama_jax.prepare.text import Document, RawSource, read_documents

log = logging.getLogger(__name__)

SAMPLE_BYTES = 10_000_000
"""Text that a tokenizer is trained on."""
_CHECKED_BYTES = 2**20
"""Text of each source that encoding and decoding must not change."""
_TRAINED_ON = ".tokenizer.json"

# Settings of the trainer and normalizer that are stored in LLaMA's tokenizer.model.
TRAINER: dict[str, Any] = dict(
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


def first_change(tokenizer: Tokenizer, text: str) -> str:
    """The first part of a text that changes when it is encoded and decoded; "" if none does.

    Two changes are allowed: every SentencePiece tokenizer decodes the character "▁" to a space,
    and a tokenizer may normalize to NFC, which changes code points but not characters.
    """
    same = lambda t: unicodedata.normalize("NFC", t).replace("▁", " ")
    before, after = same(text), same(tokenizer.decode(tokenizer.encode_array(text)))
    if before == after:
        return ""
    pairs = enumerate(zip(before, after, strict=False))
    at = next((i for i, (a, b) in pairs if a != b), min(len(before), len(after)))
    return f"{before[max(0, at - 10) : at + 20]!r} becomes {after[max(0, at - 10) : at + 20]!r}"


# The tokenizer of a mixture ----------------------------------------------------------------------


def choose_tokenizer(
    data: DataConfig,
    vocab_size: int,
    out: Path,
    raw: dict[str, RawSource],
    rule: SplitRule,
    prepared: Path | None,
) -> tuple[Tokenizer, str]:
    """The tokenizer given, else that of a prepared source, else one trained on the text.

    Args:
      data: the tokenizer, and the weight of each source in the training sample.
      vocab_size: ids of a trained tokenizer.
      out: folder where a trained tokenizer is written, or found if it is up to date.
      raw: sources of text.
      rule: validation documents are not trained on.
      prepared: folder of a prepared source.

    Returns:
      The tokenizer and a hash of what it was trained on, "" if it was not trained here.
    """
    if data.tokenizer or prepared:
        return Tokenizer.load(data.tokenizer or str(prepared)), ""
    target = out / MODEL_FILE
    inputs = {n: [s.inputs, data.sources[n].weight] for n, s in raw.items()}
    trained_on = digest([inputs, rule.threshold, rule.exceptions(), vocab_size, SAMPLE_BYTES])
    known = read_json_or_empty(out / _TRAINED_ON)
    is_current = known.get("trained_on") == trained_on and target.is_file()
    if is_current and sha256(target) == known.get("sha256"):
        return Tokenizer.load(target), trained_on
    _check_not_in_use(out)
    log.info(f"training a tokenizer of {vocab_size} ids")
    tokenizer = train_tokenizer(_sample(data, raw, rule), vocab_size, target)
    known = {"trained_on": trained_on, "sha256": sha256(target)}
    atomic_write(out / _TRAINED_ON, json.dumps(known).encode())
    return tokenizer, trained_on


def check_tokenizer(tokenizer: Tokenizer, vocab_size: int, prepared: dict[str, Any]) -> None:
    """Raise ValueError unless a tokenizer fits the model and is that of all prepared sources.

    Args:
      tokenizer: the mixture's.
      vocab_size: V of the model.
      prepared: sources prepared before, by name.
    """
    if tokenizer.vocab_size > vocab_size:
        raise ValueError(
            f"tokenizer {tokenizer.path} has {tokenizer.vocab_size} ids, more than "
            f"model.vocab_size={vocab_size}; set model.vocab_size={tokenizer.vocab_size} "
            "(--vocab-size)"
        )
    used = sha256(tokenizer.path)
    for name, source in prepared.items():
        if (other := source.manifest["tokenizer_sha256"]) != used:
            raise ValueError(
                f"source {name}: {source.folder} was prepared with another tokenizer (sha256 "
                f"{other[:12]}, the mixture's is {used[:12]}); prepare all sources with one "
                "tokenizer, and set data.tokenizer to it or to nothing"
            )


def install_tokenizer(tokenizer: Tokenizer, out: Path) -> Tokenizer:
    """Copy a tokenizer to the folder of the mixture, unless it is there."""
    target, content = out / MODEL_FILE, tokenizer.path.read_bytes()
    if not target.is_file() or target.read_bytes() != content:
        _check_not_in_use(out)
        atomic_write(target, content)
    return Tokenizer.load(target)


def _check_not_in_use(out: Path) -> None:
    """Raise ValueError while another command encodes a source with the tokenizer of ``out``."""
    for unit in out.glob("*.partial/unit-*"):
        if in_use(unit):
            raise ValueError(
                f"another command prepares source {unit.parent.stem} in {out} with another "
                "tokenizer: wait until it has ended, or write to another folder"
            )


def check_unchanged(tokenizer: Tokenizer, expected_sha256: str) -> None:
    """Raise ValueError if a tokenizer's file was replaced after the tokenizer was loaded."""
    if sha256(tokenizer.path) != expected_sha256:
        raise ValueError(
            f"another command replaced {tokenizer.path} while this one was encoding with it; run "
            "this command again"
        )


def _sample(data: DataConfig, raw: dict[str, RawSource], rule: SplitRule) -> Iterator[str]:
    """Training documents: of each source a share of SAMPLE_BYTES by its weight, or all it has."""
    total = sum(data.sources[n].weight for n in raw)
    for name, source in raw.items():
        left = SAMPLE_BYTES * data.sources[name].weight / total
        for document in _mixed_documents(source):
            if left <= 0:
                break
            if not rule.is_val(document.key):
                left -= document.size
                yield document.text


def _mixed_documents(source: RawSource) -> Iterator[Document]:
    """All documents, with the files in pseudo-random order: the first represent the whole."""
    files = sorted(source.files, key=lambda f: hashlib.sha256(f.name.encode()).digest())
    return read_documents(source, files)


def check_lossless(tokenizer: Tokenizer, source: RawSource) -> None:
    """Raise ValueError if encoding and decoding changes text at the start of a source."""
    left, count, changed = _CHECKED_BYTES, 0, []
    for document in _mixed_documents(source):
        count += 1
        if found := first_change(tokenizer, document.text[:_CHECKED_BYTES]):
            changed.append(found)
        if (left := left - document.size) <= 0:
            break
    if changed:
        raise ValueError(
            f"tokenizer {tokenizer.path} loses text of source {source.name}: {len(changed)} of the "
            f"{count} documents tried change by encoding and decoding, for example {changed[0]}; "
            "give a tokenizer that keeps all text (byte fallback, no normalizer)"
        )
