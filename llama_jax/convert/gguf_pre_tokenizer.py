"""The pre-tokenizers of GGUF files: rules, known by name, that split text before BPE merges."""

from typing import Any

from llama_jax.data import tiktoken_text

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_QWEN2 = tiktoken_text.SPLIT.replace("{1,3}", "")
ALIASES = {
    "llama-bpe": ("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0"),
    "smaug-bpe": ("smaug-bpe", "dbrx"),
    "gpt-2": ("gpt-2", "phi-2", "mpt", "olmo", "jais", "gigachat", "roberta-bpe"),
    "smollm": ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"),
    "qwen2": ("qwen2", "deepseek-r1-qwen", "stablelm2", "megrez"),
    "default": ("default",),
}
"""names in metadata, by the first of those that mean the same"""
_SPLITS = {
    "llama-bpe": [tiktoken_text.SPLIT],
    "smaug-bpe": [tiktoken_text.SPLIT],
    "gpt-2": [_GPT2],
    "smollm": [r"\p{N}", _GPT2],
    "qwen2": [_QWEN2],
    "default": [r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]"],
}
"""regular expressions applied one after the other: each match is a piece, and so is each gap"""
IGNORES_MERGES = ADDS_BOS = ("llama-bpe",)


def pre_tokenizer(name: str) -> dict[str, Any]:
    """A pre-tokenizer as in a ``tokenizer.json``."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    splits = [
        {"type": "Split", "pattern": {"Regex": r}, "behavior": "Isolated", "invert": False}
        for r in _SPLITS[name]
    ]
    return {"type": "Sequence", "pretokenizers": [*splits, byte_level | {"use_regex": False}]}


def name_of(given: dict[str, Any] | None, ignore_merges: bool) -> str | None:
    """The name of a pre-tokenizer of a ``tokenizer.json``; None if it has none.

    Of two that split text in the same way, one also says whether a piece that is a token is used
    without merges.
    """
    if given is None:
        return None
    *steps, last = given.get("pretokenizers", [given])
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space"):
        return None
    rules = []
    for step in steps:
        isolated = step.get("behavior") == "Isolated" and not step.get("invert")
        if step["type"] == "Digits" and step.get("individual_digits"):
            rules.append(r"\p{N}")
        elif step["type"] == "Split" and isolated:
            rules.append(step["pattern"].get("Regex"))
        else:
            return None
    if last.get("use_regex", True):
        rules.append(_GPT2)
    names = [name for name, splits in _SPLITS.items() if splits == rules]
    exact = [name for name in names if (name in IGNORES_MERGES) == ignore_merges]
    return next(iter(exact + names), None)
