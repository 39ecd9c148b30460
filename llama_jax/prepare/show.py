"""Samples of prepared data as text, with the tokens that count in the loss marked."""

import itertools
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from llama_jax.data.manifest import SourceManifest, read_manifest
from llama_jax.data.token_stream import TokenStream
from llama_jax.data.tokenizer import Tokenizer

LENGTHS = (512, 1024, 2048, 4096)
"""Values of T for which the longer documents are counted."""
_MAX_CHARS = 10_000
"""Longer samples are shortened."""


def show(folder: Path, count: int) -> None:
    """Print the first training documents of a source, and a line of counts.

    Tokens that count in the loss are bold and green in a terminal, and else in double brackets.

    Args:
      folder: of the source.
      count: number of documents, or of preference pairs.
    """
    manifest = read_manifest(folder, SourceManifest)
    stream = TokenStream(folder, manifest, "train")
    tokenizer = Tokenizer.load(folder / "tokenizer.model")
    names = {i: name for name, i in tokenizer.controls.items()}
    starts = stream.doc_starts()
    ends = np.append(starts[1:], len(stream))
    color = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    conversations = stream.conversations or {}
    sides = (", chosen", ", rejected") if conversations.get("format") == "preference" else ("",)
    count *= len(sides)
    before, after = ("\033[1;32m", "\033[0m") if color else ("[[", "]]")
    for i, (start, end) in enumerate(zip(starts[:count].tolist(), ends.tolist(), strict=False)):
        ids, _ = stream.read(start, end - start)
        mask = stream.read_mask(start, end - start)
        number, side = divmod(i, len(sides))
        print(
            f"--- {manifest['name']}, training document {number + 1}{sides[side]}: "
            f"{end - start:,} tokens, {int(mask.sum()):,} count in the loss"
        )
        text = "".join(
            f"{before}{part}{after}" if counts else part
            for counts, part in _parts(tokenizer, names, ids.tolist(), mask.tolist())
        )
        print(text if len(text) <= _MAX_CHARS else f"{text[:_MAX_CHARS]}{after * color} ...")
    print(_counts(manifest["name"], stream, ends - starts))


def _parts(
    tokenizer: Tokenizer, names: dict[int, str], ids: list[int], mask: list[int]
) -> Iterator[tuple[bool, str]]:
    """Consecutive texts, each with whether its tokens count."""
    at, before = 0, 0
    for counts, group in itertools.groupby(mask):
        end = at + len(list(group))
        text = ""
        for is_control, run in itertools.groupby(range(at, end), lambda i: ids[i] in names):
            positions = list(run)
            if is_control:
                text += "".join(names[ids[i]] for i in positions)
            else:
                # The text of a token depends on the tokens before it.
                decoded = tokenizer.decode(ids[: positions[-1] + 1])
                text += decoded[before:]
                before = len(decoded)
        yield bool(counts), _printable(text)
        at = end


def _printable(text: str) -> str:
    """The text with escape sequences in place of characters that would control the terminal."""
    return "".join(
        c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text
    )


def _counts(name: str, stream: TokenStream, lengths: np.ndarray) -> str:
    total = len(stream)
    blocks = range(0, total, 2**24)
    counted = sum(int(stream.read_mask(i, min(2**24, total - i)).sum()) for i in blocks)
    # The last token of a document takes no position of a sequence.
    longer = ", ".join(f"than {T}: {int((lengths - 1 > T).sum()):,}" for T in LENGTHS)
    return (
        f"{name}: {len(lengths):,} training documents, {total:,} tokens, {counted:,} count in the "
        f"loss ({counted / total:.0%}); the longest has {int(lengths.max()):,}; longer {longer}"
    )
