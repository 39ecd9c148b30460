"""The parts of a BPE ``tokenizer.json`` that LLaMA's and Llama 3's have in common."""

import json
import re
from collections.abc import Collection
from typing import Any

CONTROL_NAME = re.compile(r"<[|｜][^\s|｜<>'\"]+[|｜]>|</?s>|<(?:start|end)_of_turn>")
"""Names in the text of a chat template that stand for control tokens."""


def make(
    model: dict[str, Any],
    added_tokens: list[dict[str, Any]],
    post_processor: dict[str, Any] | None,
    **text: Any,
) -> dict[str, Any]:
    """A ``tokenizer.json``.

    Args:
      model: vocabulary, merges and settings of BPE.
      added_tokens: control tokens, from :func:`added_token`.
      post_processor: from :func:`bos_template`, or None.
      **text: normalizer, pre_tokenizer and decoder.
    """
    bpe = {"type": "BPE", "dropout": None, "continuing_subword_prefix": None}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added_tokens,
        "post_processor": post_processor,
        **text,
        "model": bpe | {"end_of_word_suffix": None} | model,
    }


def with_controls(content: str) -> str:
    """The text of a ``tokenizer.json`` in which each added token with a name such as
    ``<|im_start|>`` is a control token.

    Programs that train chat models add such tokens without ``"special": true``. As those of
    llama.cpp do, so their chat templates can be used, and a message cannot write the token.
    """
    if not re.search(r'"special"\s*:\s*false', content):
        return content
    try:
        tree = json.loads(content)
        for token in tree["added_tokens"]:
            token["special"] |= CONTROL_NAME.fullmatch(token["content"]) is not None
    except (ValueError, TypeError, KeyError, RecursionError):
        return content  # its reader names the problem
    return json.dumps(tree)


def added_token(token: int, name: str, special: bool = True) -> dict[str, Any]:
    """A token that is not the result of merges."""
    no = dict.fromkeys(("normalized", "single_word", "lstrip", "rstrip"), False)
    return {"id": token, "content": name, "special": special, **no}


def bos_template(bos: int, name: str) -> dict[str, Any]:
    """The post-processor that puts the BOS token before each text."""
    token = lambda i: {"SpecialToken": {"id": name, "type_id": i}}
    text = lambda i: {"Sequence": {"id": "AB"[i], "type_id": i}}
    return {
        "type": "TemplateProcessing",
        "single": [token(0), text(0)],
        "pair": [token(0), text(0), token(1), text(1)],
        "special_tokens": {name: {"id": name, "ids": [bos], "tokens": [name]}},
    }


def without_prefix(tree: dict[str, Any]) -> dict[str, Any]:
    """The same ``tokenizer.json``, which adds no space before a text."""
    changed = dict(tree)
    for part, plural in (("normalizer", "normalizers"), ("pre_tokenizer", "pretokenizers")):
        first = tree[part] or {"type": "Sequence", plural: []}
        steps = first[plural] if first["type"] == "Sequence" else [first]
        no_prefix = {"prepend_scheme": "never", "add_prefix_space": False}
        steps = [
            step | {k: v for k, v in no_prefix.items() if k in step}
            for step in steps
            if step["type"] != "Prepend"
        ]
        changed[part] = {"type": "Sequence", plural: steps} if steps else None
    return changed


def prefix_after_controls(pre_tokenizer: Any) -> bool:
    """Whether text after a control token gets the space that is added before a text.

    Args:
      pre_tokenizer: of the package ``tokenizers``, or None.
    """
    first = json.loads(pre_tokenizer.__getstate__()) if pre_tokenizer else {}
    steps = first.get("pretokenizers", [first])
    return not any(step.get("prepend_scheme") == "first" for step in steps)


def splits_words(tree: dict[str, Any], patterns: Collection[str]) -> bool:
    """Whether a text is split between each letter and white space before any merge.

    Args:
      tree: a ``tokenizer.json``.
      patterns: regular expressions that end a word there.
    """
    if not all(t["special"] for t in tree["added_tokens"]):  # others may contain spaces
        return False
    if tree["normalizer"] not in (None, {"type": "NFC"}):
        return False
    pre_tokenizer = tree["pre_tokenizer"] or {}
    *steps, byte_level = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    if byte_level.get("type") != "ByteLevel" or byte_level["add_prefix_space"]:
        return False
    splits = [s for s in steps if s["type"] != "Digits"]
    known = [s["type"] == "Split" and s["pattern"].get("Regex") in patterns for s in splits]
    isolated = all(s.get("behavior") == "Isolated" and not s.get("invert") for s in splits)
    return all(known) and isolated and (bool(known) or byte_level["use_regex"])
