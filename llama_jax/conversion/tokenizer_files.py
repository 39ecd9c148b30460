"""Tokenizer files beside weights: recognised by content, whatever they are called, and carried
along.

In comes a folder; out come its tokenizers (SentencePiece, tiktoken text, ``tokenizer.json``) and
the small files that Hugging Face keeps beside them.
"""

import base64
import json
from pathlib import Path
from typing import Any, NamedTuple


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
        ranks = _ranks(data.decode("ascii"))
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


# --- from Meta's tiktoken text to Hugging Face's tokenizer.json ---

# How Llama 3 splits text before merging, from Meta's tokenizer.py.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def special_tokens(newer: bool) -> list[str]:
    """Llama 3's 256 special tokens in order; `newer`: as Llama 3.1 and later named them."""
    named = {0: "begin_of_text", 1: "end_of_text", 6: "start_header_id", 7: "end_header_id"}
    named[9] = "eot_id"
    if newer:
        named |= {4: "finetune_right_pad_id", 8: "eom_id", 10: "python_tag"}
    spare = iter(range(256))
    names = [named.get(i) or f"reserved_special_token_{next(spare)}" for i in range(256)]
    return [f"<|{name}|>" for name in names]


def hf_tokenizer(tokenizer: Tokenizer, newer: bool) -> dict[str, Any]:
    """``tokenizer.json`` that makes the same ids of the same text as Meta's tiktoken file."""
    ranks = _ranks(tokenizer.path.read_bytes().decode("ascii"))
    merges = []
    for word, rank in ranks.items():
        cuts = [(word[:i], word[i:]) for i in range(1, len(word))]
        known = [(a, b) for a, b in cuts if a in ranks and b in ranks]
        merges += [
            (rank, a, b) for a, b in sorted(known, key=lambda ab: (ranks[ab[0]], ranks[ab[1]]))
        ]
    merges.sort(key=lambda merge: merge[0])
    text = _byte_characters()
    spell = lambda word: "".join(text[b] for b in word)
    special = special_tokens(newer)
    added = [
        {"id": len(ranks) + i, "content": name, "special": True, "normalized": False}
        | {"single_word": False, "lstrip": False, "rstrip": False}
        for i, name in enumerate(special)
    ]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    split = {"type": "Split", "pattern": {"Regex": _SPLIT}, "behavior": "Isolated", "invert": False}
    before = [split, level | {"use_regex": False}]
    start = {"SpecialToken": {"id": special[0], "type_id": 0}}
    first, second = ({"Sequence": {"id": name, "type_id": i}} for i, name in enumerate("AB"))
    begin = {special[0]: {"id": special[0], "ids": [len(ranks)], "tokens": [special[0]]}}
    template = {"type": "TemplateProcessing", "single": [start, first], "special_tokens": begin}
    template["pair"] = [start, first, {"SpecialToken": {"id": special[0], "type_id": 1}}, second]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": before},
        "post_processor": template,
        "decoder": level | {"use_regex": True},
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
            "ignore_merges": True,  # a whole word of the vocabulary is one token, as in tiktoken
            "vocab": {spell(word): rank for word, rank in ranks.items()},
            "merges": [[spell(a), spell(b)] for _, a, b in merges],
        },
    }  # fmt: skip


def _byte_characters() -> list[str]:
    """The printable character that stands for each byte in GPT-2's vocabularies."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spare = iter(range(256, 512))
    return [chr(b) if b in printable else chr(next(spare)) for b in range(256)]


def _ranks(text: str) -> dict[bytes, int]:
    lines = (line.split() for line in text.split("\n") if line)
    return {base64.b64decode(word, validate=True): int(rank) for word, rank in lines}
