"""The ``tokenizer.json`` that gives the same ids as a SentencePiece BPE model.

Hugging Face's BPE needs an ordered list of merges. A SentencePiece file has scores instead: the
adjacent pair whose merged piece has the highest score is merged first. transformers 5 derives its
merges from ``tokenizer.model`` in another order, which gives other ids.
"""

import json
import random
from collections.abc import Iterator
from typing import Any

from llama_jax.data import tokenizer_json

# Types of pieces, and of models, in SentencePiece's files.
NORMAL, CONTROL, USER_DEFINED = 1, 3, 4
BPE = 2
_MAX_PIECE_CHARS = 64
"""Limit on characters per piece, as every split into two is tried; trained models have under 20."""


def to_json(content: bytes) -> dict[str, Any]:
    """``tokenizer.json`` of a SentencePiece model, checked against SentencePiece itself.

    Raises:
      ValueError: not a BPE model, an unsupported text normalization, or ids that differ; says
        which.
    """
    proto = parse(content)
    if proto.trainer_spec.model_type != BPE:
        raise ValueError("it is not a BPE model")
    normal = proto.normalizer_spec
    if normal.precompiled_charsmap or normal.remove_extra_whitespaces:
        raise ValueError(f"it changes text before splitting it (rule {normal.name!r})")
    if proto.trainer_spec.treat_whitespace_as_suffix or not normal.escape_whitespaces:
        raise ValueError("it does not write a space as the start of a piece")
    longest = max((len(p.piece) for p in proto.pieces), default=0)
    if longest > _MAX_PIECE_CHARS:
        raise ValueError(f"it has a piece of {longest} characters")
    tree = _tree(proto)
    if (text := _differing(tree, content)) is not None:
        raise ValueError(f"no list of merges gives its ids (tried on {text[:40]!r})")
    return tree


def with_added(
    tree: dict[str, Any], tokens: list[dict[str, Any]], prefix_after_controls: bool
) -> dict[str, Any]:
    """A tree of :func:`to_json` with further tokens.

    Args:
      tree: of a model.
      tokens: from :func:`tokenizer_json.added_token`.
      prefix_after_controls: whether text after them gets a space before it, as text at the start.

    Raises:
      ValueError: a token is a piece of the model.
    """
    vocab = dict(tree["model"]["vocab"])
    for token in tokens:
        if vocab.setdefault(token["content"], token["id"]) != token["id"]:
            raise ValueError(f"{token['content']!r:.60} has two ids")
    changed = {
        "added_tokens": tree["added_tokens"] + tokens,
        "model": tree["model"] | {"vocab": vocab},
    }
    if not prefix_after_controls and len(tree["normalizer"]["normalizers"]) > 1:
        spaces = {
            "type": "Metaspace",
            "replacement": "▁",
            "prepend_scheme": "first",
            "split": False,
        }
        changed |= {"normalizer": None, "pre_tokenizer": spaces}
    return tree | changed


def special_names(content: bytes) -> dict[str, str]:
    """Special tokens of a SentencePiece model, as ``tokenizer_config.json`` names them."""
    proto = parse(content)
    ids = {name: getattr(proto.trainer_spec, f"{name}_id") for name in ("bos", "eos", "unk")}
    return {f"{name}_token": proto.pieces[i].piece for name, i in ids.items() if i >= 0}


def parse(content: bytes) -> Any:
    """The ``ModelProto`` of a SentencePiece model.

    Raises:
      ValueError: something else, or damaged.
    """
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2 as files

    proto = files.ModelProto()  # type: ignore[attr-defined]
    try:
        proto.ParseFromString(content)
    except DecodeError as e:
        raise ValueError(str(e)) from None
    if not all(isinstance(p.piece, str) for p in proto.pieces):
        raise ValueError("a piece is not UTF-8 text")
    # A file truncated between two pieces can be parsed as a smaller vocabulary. These settings
    # follow the pieces.
    if not (proto.HasField("trainer_spec") and proto.HasField("normalizer_spec")):
        raise ValueError("it is truncated: settings of the trainer or normalizer are missing")
    return proto


def adjacent(proto: Any) -> tuple[set[str] | None, set[str]]:
    """Pairs of characters adjacent in some token, None if splitting a text may change ids; and, if
    unknown characters side by side become one id (no byte fallback), the known characters."""
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    changes_text = normalizer.precompiled_charsmap or normalizer.remove_extra_whitespaces
    other_spaces = trainer.treat_whitespace_as_suffix or not normalizer.escape_whitespaces
    if trainer.model_type != BPE or changes_text or other_spaces:
        return None, set()
    pieces = [p.piece for p in proto.pieces]
    pairs = {piece[i : i + 2] for piece in pieces for i in range(len(piece) - 1)}
    return pairs, set() if trainer.byte_fallback else {p for p in pieces if len(p) == 1}


def _tree(proto: Any) -> dict[str, Any]:
    pieces = proto.pieces
    trainer, prefix = proto.trainer_spec, proto.normalizer_spec.add_dummy_prefix
    space = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    before = [{"type": "Prepend", "prepend": "▁"}] * prefix + [space]
    after: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if prefix:
        after.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    added = [
        tokenizer_json.added_token(i, p.piece, special=p.type != USER_DEFINED)
        for i, p in enumerate(pieces)
        if p.type in (CONTROL, USER_DEFINED) or i == trainer.unk_id
    ]
    bos = trainer.bos_id
    model = {
        "unk_token": pieces[trainer.unk_id].piece, "fuse_unk": True, "ignore_merges": False,
        "byte_fallback": trainer.byte_fallback,
        "vocab": {p.piece: i for i, p in enumerate(pieces)}, "merges": _merges(pieces),
    }  # fmt: skip
    return tokenizer_json.make(
        model, added, tokenizer_json.bos_template(bos, pieces[bos].piece) if bos >= 0 else None,
        normalizer={"type": "Sequence", "normalizers": before}, pre_tokenizer=None,
        decoder={"type": "Sequence", "decoders": after},
    )  # fmt: skip


def _merges(pieces: Any) -> list[list[str]]:
    """Every pair of pieces whose concatenation is a piece, highest score first."""
    ids = {p.piece: i for i, p in enumerate(pieces) if p.type == NORMAL}
    merges = []
    for piece in ids:
        score = -pieces[ids[piece]].score
        for i in range(1, len(piece)):
            left, right = piece[:i], piece[i:]
            if left in ids and right in ids:
                merges.append((score, ids[left], ids[right], left, right))
    return [[left, right] for *_, left, right in sorted(merges)]


def _differing(tree: dict[str, Any], content: bytes) -> str | None:
    """A text that ``tree`` and ``content`` encode or decode differently; None if none is found."""
    import sentencepiece
    import tokenizers

    try:
        theirs = sentencepiece.SentencePieceProcessor(model_proto=content)
    except RuntimeError as e:
        raise ValueError(f"sentencepiece refuses it: {e}") from None
    try:
        ours = tokenizers.Tokenizer.from_str(json.dumps(tree))
    except Exception as e:  # the library raises nothing narrower
        raise ValueError(f"tokenizers refuses it: {e}") from None
    ours.encode_special_tokens = True
    for text in _samples(theirs):
        ids = theirs.encode(text)
        if ours.encode(text, add_special_tokens=False).ids != ids:
            return text
        if theirs.unk_id() not in ids and ours.decode(ids) != theirs.decode(ids):
            return text
    return None


def _samples(processor: Any) -> Iterator[str]:
    """Random sequences of pieces, and runs of spaces."""
    rng = random.Random(0)
    ids = [i for i in range(len(processor)) if not processor.is_control(i)]
    words = [processor.decode([i]) for i in rng.choices(ids, k=4096)]
    yield from ("", " ", "a", " a", "\n a", "\u2581", "12 345", "\U0001f600 \0 \u6f22")
    yield from (f"{' ' * n}a{' ' * n}" for n in range(2, 40))
    for i in range(0, len(words), 8):
        yield "".join(words[i : i + 8])
        yield " ".join(words[i : i + 8])
