"""Meta's tiktoken text (one token per line: base64 and rank) and the same as ``tokenizer.json``."""

import base64
import json
from typing import Any

from llama_jax.data import tokenizer_json

MAX_BYTES, MAX_TOKENS = 8 << 20, 1_000_000
"""Of a file; Llama 3's has 2.2 MB and 128,000 tokens."""
MAX_TOKEN_BYTES = 1024
"""Longest token; Llama 3's longest has 128 bytes."""
# The regular expression by which Llama 3 splits text before merging, from Meta's tokenizer.py.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def ranks_of(content: bytes) -> dict[bytes, int]:
    """Each token's bytes and its rank, which is its id.

    Raises:
      ValueError: the content is not tiktoken text, or damaged.
    """
    count = content.count(b"\n")
    if len(content) > MAX_BYTES or count > MAX_TOKENS or content.count(b" ") > count + 1:
        raise ValueError("it is too large, or a line has more than two words")
    lines = (line.split() for line in content.decode("ascii").split("\n") if line)
    ranks = {base64.b64decode(word, validate=True): int(rank) for word, rank in lines}
    if max(map(len, ranks), default=0) > MAX_TOKEN_BYTES:
        raise ValueError(f"a token has more than {MAX_TOKEN_BYTES} bytes")
    if not ranks or sorted(ranks.values()) != list(range(len(ranks))):
        raise ValueError("its ranks are not 0, 1, 2, ...")
    return ranks


def special_tokens(newer: bool) -> list[str]:
    """Names of Llama 3's 256 special tokens in order; ``newer``: of Llama 3.1 and later."""
    named = {0: "begin_of_text", 1: "end_of_text", 6: "start_header_id", 7: "end_header_id"}
    named[9] = "eot_id"
    if newer:
        named |= {4: "finetune_right_pad_id", 8: "eom_id", 10: "python_tag"}
    spare = iter(range(256))
    names = [named.get(i) or f"reserved_special_token_{next(spare)}" for i in range(256)]
    return [f"<|{name}|>" for name in names]


def to_json(ranks: dict[bytes, int], newer: bool) -> dict[str, Any]:
    """The ``tokenizer.json`` that gives the same ids; ``newer`` as in :func:`special_tokens`."""
    merges = []
    for word, rank in ranks.items():
        cuts = [(word[:i], word[i:]) for i in range(1, len(word))]
        known = [(a, b) for a, b in cuts if a in ranks and b in ranks]
        merges += [
            (rank, a, b) for a, b in sorted(known, key=lambda ab: (ranks[ab[0]], ranks[ab[1]]))
        ]
    merges.sort(key=lambda merge: merge[0])
    text = byte_characters()
    spell = lambda word: "".join(text[b] for b in word)
    special = special_tokens(newer)
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    split = {"type": "Split", "pattern": {"Regex": SPLIT}, "behavior": "Isolated", "invert": False}
    before = [split, level | {"use_regex": False}]
    model = {
        "unk_token": None, "fuse_unk": False, "byte_fallback": False,
        "ignore_merges": True,  # a word that is a token is not merged, as in tiktoken
        "vocab": {spell(word): rank for word, rank in ranks.items()},
        "merges": [[spell(a), spell(b)] for _, a, b in merges],
    }  # fmt: skip
    return tokenizer_json.make(
        model, [tokenizer_json.added_token(len(ranks) + i, name) for i, name in enumerate(special)],
        tokenizer_json.bos_template(len(ranks), special[0]), normalizer=None,
        pre_tokenizer={"type": "Sequence", "pretokenizers": before},
        decoder=level | {"use_regex": True},
    )  # fmt: skip


def byte_characters() -> list[str]:
    """The printable character that stands for each byte in GPT-2's vocabularies."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spare = iter(range(256, 512))
    return [chr(b) if b in printable else chr(next(spare)) for b in range(256)]


def whole_json(content: bytes) -> str:
    """The text of ``tokenizer.json`` of a file.

    Raises:
      ValueError: the content is not tiktoken text, or lacks a byte.
    """
    ranks = ranks_of(content)
    if not all(bytes([b]) in ranks for b in range(256)):
        raise ValueError("not every byte is a token, so text would be lost")
    return json.dumps(to_json(ranks, newer=True))
