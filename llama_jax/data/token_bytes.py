"""What each token of a vocabulary adds to a text, in UTF-8."""

import re
from collections.abc import Collection, Mapping
from typing import Any

from llama_jax.data import tiktoken_text


def of_sentencepiece(processor: Any) -> list[bytes]:
    """Bytes of each id of a SentencePiece model; empty for control and unused ids."""
    sp = processor
    no_text = lambda i: sp.is_control(i) or sp.is_unknown(i) or sp.is_unused(i)
    ids = range(sp.vocab_size())
    return [b"" if no_text(i) else _piece_bytes(sp.id_to_piece(i)) for i in ids]


def of_json(
    vocabulary: Mapping[str, int], controls: Collection[str], is_byte_level: bool
) -> list[bytes]:
    """Bytes of each id of a ``tokenizer.json``; empty for control tokens and unused ids.

    Args:
      vocabulary: id of each token.
      controls: names of control tokens.
      is_byte_level: tokens spell each byte as a character, as in GPT-2.
    """
    of_id = [b""] * (1 + max(vocabulary.values(), default=-1))
    byte_of = {c: b for b, c in enumerate(tiktoken_text.byte_characters())}
    for piece, i in vocabulary.items():
        if piece in controls:
            continue
        if not is_byte_level:
            of_id[i] = _piece_bytes(piece)
        elif all(c in byte_of for c in piece):
            of_id[i] = bytes(byte_of[c] for c in piece)
        else:  # an added token, in plain text
            of_id[i] = piece.encode()
    return of_id


def _piece_bytes(piece: str) -> bytes:
    """Bytes of a piece with "▁" for spaces, or of the name of a byte, such as <0x0A>."""
    if re.fullmatch("<0x[0-9A-F]{2}>", piece):
        return bytes([int(piece[3:5], 16)])
    return piece.replace("▁", " ").encode()
