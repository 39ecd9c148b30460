"""A small tokenizer of Llama 3's kind, and the ids of a text by tiktoken's rule."""

import base64
import collections
import functools
import itertools
import re

_TRAINED_ON = "the theatre then thawed there, others breathe; l'été 漢字 12 3456 they're"
TEXT = "others breathe the théatre: 12345 漢字\n\n  they're 'Thawed'\t!"
# Meta's split of TEXT, written out.
WORDS = ["others", " breathe", " the", " théatre", ":", " ", "123", "45", " 漢字", "\n\n", " ",
         " they", "'re", " '", "Thawed", "'", "\t", "!"]  # fmt: skip
assert "".join(WORDS) == TEXT


@functools.cache
def ranks() -> dict[bytes, int]:
    """A byte-pair encoding: at each step the most frequent pair becomes a piece."""
    made = {bytes([i]): i for i in range(256)}
    found = re.findall(rb" ?[^ ]+", _TRAINED_ON.encode())
    words = [[bytes([b]) for b in word] for word in found]
    for _ in range(40):
        pairs = collections.Counter(p for w in words for p in itertools.pairwise(w))
        (a, b), _ = max(pairs.items(), key=lambda item: (item[1], item[0]))
        made[a + b] = len(made)
        words = [_merge(word, a, b) for word in words]
    return made


def _merge(word: list[bytes], a: bytes, b: bytes) -> list[bytes]:
    out: list[bytes] = []
    for piece in word:
        if out and (out[-1], piece) == (a, b):
            out[-1] += piece
        else:
            out.append(piece)
    return out


def content() -> bytes:
    """The content of Meta's tokenizer.model."""
    lines = (base64.b64encode(word) + b" %d\n" % rank for word, rank in ranks().items())
    return b"".join(lines)


def ids() -> list[int]:
    """Ids of TEXT: a known word's id; otherwise, pairs are merged in the order of rank."""
    made = [i for word in WORDS for i in _ids(word.encode())]
    assert len({i for i in made if i > 255}) > 4
    return made


def _ids(word: bytes) -> list[int]:
    known = ranks()
    pieces = [word] if word in known else [bytes([b]) for b in word]
    while True:
        joined = [a + b for a, b in itertools.pairwise(pieces)]
        best = min(((known[j], i) for i, j in enumerate(joined) if j in known), default=None)
        if best is None:
            return [known[p] for p in pieces]
        pieces[best[1] : best[1] + 2] = [joined[best[1]]]
