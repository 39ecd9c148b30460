"""How likely a model finds a text: log-probability and entropy of each token, shown and plotted.

In: a model and text. Out: :class:`Scores` (in a notebook: coloured text), or a perplexity.
"""

import dataclasses
import functools
import html
import itertools
import math
import warnings
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.rows import check_text
from llama_jax.sharding import on_mesh
from llama_jax.step import merge


@dataclasses.dataclass(frozen=True)
class Scores:
    """A text's tokens as the model saw them come."""

    pieces: tuple[str, ...]
    """text of each token; they join to the whole"""
    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    """log p of each token given those before it, nats"""
    entropies: tuple[float, ...]
    """entropy of the distribution it was drawn from, nats"""

    @property
    def perplexity(self) -> float:
        """exp of the mean of -log p."""
        return math.exp(-sum(self.logprobs) / max(len(self.logprobs), 1))

    def __repr__(self) -> str:
        return f"Scores({len(self.ids)} tokens, perplexity {self.perplexity:.2f})"

    def _repr_html_(self) -> str:
        spans = []
        for piece, logprob, entropy in zip(self.pieces, self.logprobs, self.entropies, strict=True):
            # From white (certain) to orange (p = 1/400 or less): dark text reads well on all of it.
            doubt = min(-logprob / 6, 1)
            colour = f"rgb(255,{255 - 90 * doubt:.0f},{255 - 200 * doubt:.0f})"
            title = f"p = {math.exp(logprob):.3g}, entropy = {entropy:.2f} nats"
            shown = html.escape(piece).replace("\n", "↵\n")
            spans.append(f'<span style="background:{colour}" title="{title}">{shown or "·"}</span>')
        style = (
            "white-space:pre-wrap;font-family:monospace;line-height:1.7;color:#111;"
            "background:#fff;padding:8px;border-radius:4px"
        )
        foot = f"{len(self.ids)} tokens, perplexity {self.perplexity:.2f}; orange: unlikely"
        return (
            f'<div style="{style}">{"".join(spans)}</div>'
            f'<div style="font-size:smaller;opacity:.7">{foot}</div>'
        )

    def plot(self, axes: Any = None) -> Any:
        """-log p of each token as bars, the entropy as a line; matplotlib axes."""
        import matplotlib.pyplot as plt

        if axes is None:
            _, axes = plt.subplots(figsize=(max(6, min(0.22 * len(self.ids), 16)), 3.2))
        at = np.arange(len(self.ids))
        axes.bar(at, [-x for x in self.logprobs], color="#d98032", label="-log p of the token")
        axes.plot(at, self.entropies, color="#1f4e79", marker=".", label="entropy before it")
        if len(self.ids) <= 80:
            labels = [
                p.replace("\n", "↵").replace(" ", "␣").replace("$", r"\$") for p in self.pieces
            ]
            axes.set_xticks(at, labels, rotation=90, family="monospace", fontsize=8)
        axes.set(ylabel="nats", xlabel="token", xlim=(-0.7, len(at) - 0.3))
        axes.legend(frameon=False, ncols=2, loc="lower left", bbox_to_anchor=(0, 1))
        axes.spines[["top", "right"]].set_visible(False)
        with warnings.catch_warnings():
            # A script that the font lacks shows as boxes; the text itself is above the plot.
            warnings.filterwarnings("ignore", "Glyph")
            axes.figure.tight_layout()
        return axes


def score(llm: Any, text: str) -> Scores:
    """Log p and entropy of every token of ``text``, from the start of a document.

    A text longer than the context goes through in windows of the context's length, each with one
    token of the last; the last window is full, and counts only what is new.
    """
    check_text("the text", text)
    ids = llm.tokenizer.encode(text)
    logprobs: list[float] = []
    entropies: list[float] = []
    for inputs, targets in windows(ids, llm.tokenizer.bos_id, llm.cfg.context):
        logprob_T, entropy_T = _score_window(llm, inputs)
        at = np.arange(len(inputs) - len(targets), len(inputs))
        logprobs += logprob_T[at, targets].tolist()
        entropies += entropy_T[at].tolist()
    return Scores(tuple(_pieces(llm, ids)), tuple(ids), tuple(logprobs), tuple(entropies))


def perplexity(llm: Any, texts: str | Sequence[str]) -> float:
    """exp of the mean of -log p over all tokens of all texts, each from the start of a document."""
    texts = [texts] if isinstance(texts, str) or not isinstance(texts, Sequence) else texts
    scores = [score(llm, text) for text in texts]
    tokens = sum(len(s.ids) for s in scores)
    if not tokens:
        raise ValueError("perplexity needs a text of at least one token")
    return math.exp(-sum(sum(s.logprobs) for s in scores) / tokens)


def windows(ids: list[int], bos_id: int | None, context: int) -> list[tuple[list[int], list[int]]]:
    """(inputs, targets) that give every id once as a target, for the last inputs of each window."""
    if bos_id is None:
        ids, first = ids[1:], ids[:1]
    else:
        first = [bos_id]
    whole = first + ids
    out = []
    done = 0
    while done < len(ids):
        new = min(len(ids) - done, context)
        end = done + new
        out.append((whole[max(0, end - context) : end], ids[done:end]))
        done = end
    return out


def _score_window(llm: Any, inputs: list[int]) -> tuple[np.ndarray, np.ndarray]:
    size = 64
    while size < len(inputs):
        size *= 2
    tokens_1T = np.zeros((1, size), np.int32)
    tokens_1T[0, : len(inputs)] = inputs
    with on_mesh(llm.mesh):
        logprob_TV, entropy_T = llm.run("score", _score, (llm.params, tokens_1T))
    return np.asarray(logprob_TV), np.asarray(entropy_T)


def _score(graphdef, params, tokens_1T):
    logprob_TV = jax.nn.log_softmax(merge(graphdef, params)(tokens_1T)[0], axis=-1)
    return logprob_TV, -jnp.sum(jnp.exp(logprob_TV) * logprob_TV, axis=-1)


def _pieces(llm: Any, ids: list[int]) -> list[str]:
    decode = functools.lru_cache(maxsize=None)(lambda n: llm.tokenizer.decode(ids[:n]))
    # A character of several bytes is whole, and in the text, with the last of them.
    ends = [len(decode(n).rstrip("\ufffd")) for n in range(len(ids) + 1)]
    text = decode(len(ids))
    ends[-1] = len(text)
    return [text[a:b] for a, b in itertools.pairwise(ends)]
