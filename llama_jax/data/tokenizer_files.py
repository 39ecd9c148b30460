"""Tokenizer files beside weights: recognised by content, whatever they are called, and carried
along.

In comes a folder; out come its tokenizers (SentencePiece, tiktoken text, ``tokenizer.json``) and
the small files that Hugging Face keeps beside them. A file that is damaged is refused by name.
"""

import json
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

from llama_jax.convert.formats import LFS_POINTER
from llama_jax.data import sentencepiece_json, tiktoken_text
from llama_jax.io import read_json, read_limited

_LARGEST = 48 << 20
"""bytes of a tokenizer; Llama 3's tokenizer.json has 17 MB, Gemma's 33"""
_LARGEST_MODEL = 8 << 20
"""bytes of a tokenizer.model; LLaMA's has 0.5 MB, Llama 3's 2.2, Gemma's 4.7"""
_LARGEST_EXTRA = 4 << 20
_MOST_VALUES = 3_000_000
"""values in a tokenizer.json; Llama 3's has 1.1 million"""


class Tokenizer(NamedTuple):
    """A tokenizer file, known by its content."""

    path: Path
    kind: str
    """sentencepiece, tiktoken or tokenizer.json"""
    size: int
    """tokens, special ones included"""
    ids: dict[str, Any]
    """bos, eos (an id or a list of stop ids), pad"""


_EXTRAS = (
    "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "chat_template.jinja", "chat_template.json",
)  # fmt: skip


def find(folder: Path) -> list[Tokenizer]:
    """Tokenizers of a folder, recognised by content.

    Raises:
      ValueError: a file that is called like a tokenizer and is none, or damaged.
    """
    paths = [folder / name for name in ("tokenizer.model", "tokenizer.json")]
    return [recognise(p) for p in paths if os.path.lexists(p)]


def find_beside(folder: Path, size: int) -> tuple[list[Tokenizer], list[str]]:
    """The tokenizer in the parent of a folder called 7B, 13B and so on, as Meta published LLaMA 1,
    if it has ``size`` tokens; and a remark about what was taken or left."""
    folder = folder.resolve()
    path = folder.parent / "tokenizer.model"
    if not re.search(r"(?i)\b\d+b\b", folder.name) or not path.is_file():
        return [], []
    try:
        found = recognise(path)
    except ValueError as e:
        return [], [f"the tokenizer of the parent folder is not used: {e}"]
    if found.size != size:
        return [], [
            f"{path} is not used: it has {found.size} tokens, the embedding {size} rows; copy it "
            f"into {folder} if it belongs to these weights"
        ]
    return [found], [f"tokenizer: {path}, from the parent folder, as Meta published LLaMA 1"]


def extras(folder: Path) -> list[Path]:
    """Files that Hugging Face keeps beside a tokenizer.

    Raises:
      ValueError: one of them is damaged; names it.
    """
    found = [folder / name for name in _EXTRAS if os.path.lexists(folder / name)]
    for path in found:
        if path.suffix == ".json":
            read_json(path, _LARGEST_EXTRA)
            continue
        content = read_limited(path, _LARGEST_EXTRA)
        _refuse_pointer(path, content)
        try:
            content.decode("utf-8")
        except UnicodeDecodeError as e:
            raise ValueError(f"{path} is damaged: not UTF-8 text ({e})") from None
    return found


def recognise(path: Path) -> Tokenizer:
    """What a file holds, whatever it is called.

    Raises:
      ValueError: no tokenizer that we know, or a damaged one; says what to do.
      OSError: the file cannot be read.
    """
    data = read_limited(path, _LARGEST)
    _refuse_pointer(path, data)
    start = data[:64].lstrip()[:1]
    read = _read_json if start in (b"{", b"[") else _read_tiktoken
    found = read(path, data) or _read_sentencepiece(path, data)
    if found is None:
        raise ValueError(
            f"{path} is no SentencePiece model, tiktoken text or tokenizer.json, or is damaged; "
            "copy it again, or move it elsewhere to convert the weights alone"
        )
    return found


def _refuse_pointer(path: Path, data: bytes) -> None:
    if data.startswith(LFS_POINTER):
        raise ValueError(
            f"{path} is a Git LFS pointer, not the file itself; run `git lfs pull` where it came "
            "from"
        )


def _read_json(path: Path, data: bytes) -> Tokenizer | None:
    # Parsed, each value takes 60 bytes or more.
    if sum(map(data.count, (b",", b"[", b"{"))) > _MOST_VALUES:
        raise ValueError(f"{path} holds over {_MOST_VALUES:,} values, too many for a tokenizer")
    try:
        tree = json.loads(data)
        ids = _ids(tree["model"]["vocab"]) + [t["id"] for t in tree.get("added_tokens") or []]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    if not ids or not all(type(i) is int and i >= 0 for i in ids):
        return None
    return Tokenizer(path, "tokenizer.json", 1 + max(ids), {})


def _ids(vocab: Any) -> list[int]:
    return list(vocab.values()) if isinstance(vocab, dict) else list(range(len(vocab)))


def _read_tiktoken(path: Path, data: bytes) -> Tokenizer | None:
    lines = data.count(b"\n")
    if len(data) > _LARGEST_MODEL or lines > 1_000_000 or data.count(b" ") > lines + 1:
        return None
    try:
        ranks = tiktoken_text.ranks_of(data)
    except ValueError:
        return None
    n = len(ranks)
    if not ranks or sorted(ranks.values()) != list(range(n)):
        return None
    # Meta's 256 special tokens follow: 0 begins a text, 1 ends it, 8 and 9 end a message.
    return Tokenizer(path, "tiktoken", n + 256, {"bos": n, "eos": [n + 1, n + 8, n + 9]})


def _read_sentencepiece(path: Path, data: bytes) -> Tokenizer | None:
    import sentencepiece

    if not data or len(data) > _LARGEST_MODEL or not sentencepiece_json.is_whole(data):
        return None
    try:
        model = sentencepiece.SentencePieceProcessor(model_proto=data)
    except Exception:  # RuntimeError of what it cannot parse, others in older releases
        return None
    ids = {"bos": model.bos_id(), "eos": model.eos_id(), "pad": model.pad_id()}
    return Tokenizer(path, "sentencepiece", len(model), {k: v for k, v in ids.items() if v >= 0})


def hf_json(tokenizer: Tokenizer, newer: bool) -> dict[str, Any]:
    """``tokenizer.json`` that makes the same ids as Meta's file.

    Args:
      newer: Llama 3's special tokens as Llama 3.1 and later named them.

    Raises:
      ValueError: there is none; says why.
    """
    content = read_limited(tokenizer.path, _LARGEST)
    if tokenizer.kind == "sentencepiece":
        return sentencepiece_json.to_json(content)
    return tiktoken_text.to_json(tiktoken_text.ranks_of(content), newer)


def hf_settings(tokenizer: Tokenizer, context: int, exact: bool) -> dict[str, Any]:
    """``tokenizer_config.json`` for LLaMA's SentencePiece and Llama 3's tiktoken.

    Args:
      context: the longest text that it is meant for.
      exact: a ``tokenizer.json`` of :func:`hf_json` is beside it.
    """
    shared = {"clean_up_tokenization_spaces": False, "model_max_length": context}
    if tokenizer.kind == "sentencepiece":
        # transformers 5's LlamaTokenizer drops the first space of a text that starts with one.
        name = "PreTrainedTokenizerFast" if exact else "LlamaTokenizer"
        llama = {"add_bos_token": True, "add_eos_token": False, "legacy": True}
        names = sentencepiece_json.special_names(read_limited(tokenizer.path, _LARGEST_MODEL))
        return {"tokenizer_class": name, **llama, **names, **shared}
    names = {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}
    return {"tokenizer_class": "PreTrainedTokenizerFast", **names, **shared}
