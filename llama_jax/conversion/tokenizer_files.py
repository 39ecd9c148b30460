"""Tokenizer files beside weights: recognised by content, whatever they are called, and carried
along.

In comes a folder; out come its tokenizers (SentencePiece, tiktoken text, ``tokenizer.json``) and
the small files that Hugging Face keeps beside them.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

from llama_jax import tiktoken_text


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
    """Tokenizers of a folder (or, as in Meta's LLaMA 1 download, beside it), recognised by
    content."""
    for place in (folder, folder.resolve().parent):
        paths = [place / name for name in ("tokenizer.model", "tokenizer.json")]
        found = [t for p in paths if p.is_file() and (t := recognise(p))]
        if found:
            return found
    return []


def extras(folder: Path) -> list[Path]:
    """Files that Hugging Face keeps beside a tokenizer."""
    return [folder / name for name in _EXTRAS if (folder / name).is_file()]


def recognise(path: Path) -> Tokenizer | None:
    """What a file holds, whatever it is called; None when it is no tokenizer that we know."""
    data = path.read_bytes()
    if data.lstrip()[:1] == b"{":
        try:
            tree = json.loads(data)
            vocab = tree["model"]["vocab"]
            size = 1 + max(
                [*_ids(vocab), *(t["id"] for t in tree.get("added_tokens", []))], default=-1
            )
            return Tokenizer(path, "tokenizer.json", size, {})
        except (ValueError, KeyError, TypeError):
            pass
    try:
        ranks = tiktoken_text.ranks_of(data)
        if ranks and sorted(ranks.values()) == list(range(len(ranks))):
            # Meta's 256 special tokens follow: 0 begins a text, 1 ends it, 8 and 9 end a message.
            n = len(ranks)
            return Tokenizer(path, "tiktoken", n + 256, {"bos": n, "eos": [n + 1, n + 8, n + 9]})
    except ValueError:
        pass
    import sentencepiece

    try:
        model = sentencepiece.SentencePieceProcessor(model_proto=data)
    except Exception:  # RuntimeError of what it cannot parse, others in older releases
        return None
    if not len(model):  # the start of a longer file parses as well
        return None
    ids = {"bos": model.bos_id(), "eos": model.eos_id(), "pad": model.pad_id()}
    return Tokenizer(path, "sentencepiece", len(model), {k: v for k, v in ids.items() if v >= 0})


def _ids(vocab: Any) -> list[int]:
    return list(vocab.values()) if isinstance(vocab, dict) else list(range(len(vocab)))


def hf_settings(tokenizer: Tokenizer, context: int) -> dict[str, Any]:
    """``tokenizer_config.json`` for LLaMA's SentencePiece and Llama 3's tiktoken."""
    shared = {"clean_up_tokenization_spaces": False, "model_max_length": context}
    if tokenizer.kind == "sentencepiece":
        llama = {"add_bos_token": True, "add_eos_token": False, "legacy": True}
        names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
        return {"tokenizer_class": "LlamaTokenizer", **llama, **names, **shared}
    names = {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}
    return {"tokenizer_class": "PreTrainedTokenizerFast", **names, **shared}
