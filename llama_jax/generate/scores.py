"""How likely a model finds a text: log-probability and entropy of each token, shown and plotted.

In: a model and text. Out: :class:`Scores` (in a notebook: coloured text), or a perplexity.
"""

import dataclasses
import html
import itertools
import math
import warnings
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from llama_jax.data.tokenizer import check_text
from llama_jax.generate.detokenize import Detokenizer
from llama_jax.model.params import merge
from llama_jax.model.sharding import reshard, use_mesh

LOGITS = 1 << 23
"""Most logits computed at once; a text of any length needs no more memory for them."""


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

    Raises:
      ValueError: no string, not UTF-8, or with ids that the model's embedding does not have.
    """
    ids, logprob_T, entropy_T = _score_ids(llm, text)
    numbers = tuple(logprob_T.tolist()), tuple(entropy_T.tolist())
    return Scores(tuple(pieces(llm.tokenizer, ids)), tuple(ids), *numbers)


def perplexity(llm: Any, texts: str | Sequence[str]) -> float:
    """exp of the mean of -log p over all tokens of all texts, each from the start of a document."""
    texts = [texts] if isinstance(texts, str) or not isinstance(texts, Sequence) else texts
    logprobs = [_score_ids(llm, text)[1] for text in texts]
    tokens = sum(map(len, logprobs))
    if not tokens:
        raise ValueError("perplexity needs a text of at least one token")
    return math.exp(-sum(float(x.sum(dtype=np.float64)) for x in logprobs) / tokens)


def _score_ids(llm: Any, text: str) -> tuple[list[int], np.ndarray, np.ndarray]:
    """Ids of a text; log p and entropy of each (of the first one too, if there is a bos id)."""
    check_text("the text", text)
    ids = llm.tokenizer.encode(text)
    llm.check_ids(ids, "the text")
    scored = [
        _score_window(llm, inputs, targets)
        for inputs, targets in windows(ids, llm.tokenizer.bos_id, llm.cfg.context)
    ]
    logprobs, entropies = zip(*scored, strict=True) if scored else ((), ())
    empty = np.zeros(0, np.float32)
    return ids, np.concatenate([empty, *logprobs]), np.concatenate([empty, *entropies])


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


def _score_window(llm: Any, inputs: list[int], targets: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Log p and entropy, float32, of each target; they follow the last of the inputs."""
    size = 64
    while size < len(inputs):
        size *= 2
    first, end = len(inputs) - len(targets), len(inputs)
    tokens_1T, targets_T = np.zeros((1, size), np.int32), np.zeros(size, np.int32)
    tokens_1T[0, :end] = inputs
    targets_T[first:end] = targets
    with use_mesh(llm.mesh):
        args = (llm.params, tokens_1T, targets_T, np.int32(end))
        logprob_T, entropy_T = llm.run("score", _score, args)
    return np.asarray(logprob_T)[first:end], np.asarray(entropy_T)[first:end]


def _score(graphdef, params, tokens_1T, targets_T, count):
    """Log p of each target and the entropy at its place, [T]; only ``count`` inputs are real."""
    llama = merge(graphdef, params)
    # Causal attention never sees the padding behind; only dynamic rotary frequencies would.
    hidden_TD = reshard(llama.hidden(tokens_1T, rope_length=count), P())[0]
    T, D = hidden_TD.shape
    # The logits of a few positions at a time: 32 MiB in float32.
    chunk = min(T, 1 << max(0, (LOGITS // llama.cfg.vocab_size).bit_length() - 1))

    def part(of):
        hidden_CD, target_C = of
        hidden_1CD = reshard(hidden_CD[None], llama.compute.rules.activation_without_tensor("BTD"))
        logprob_CV = jax.nn.log_softmax(reshard(llama.logits(hidden_1CD), P())[0], axis=-1)
        logprob_C = jnp.take_along_axis(logprob_CV, target_C[:, None], axis=-1)[:, 0]
        return logprob_C, -jnp.sum(jnp.exp(logprob_CV) * logprob_CV, axis=-1)

    parts = hidden_TD.reshape(-1, chunk, D), targets_T.reshape(-1, chunk)
    logprob_nC, entropy_nC = jax.lax.map(part, parts)
    return logprob_nC.reshape(T), entropy_nC.reshape(T)


def pieces(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """The text of each id; together exactly the text of all.

    A character of several ids is whole, and goes with the last of them.
    """
    text = tokenizer.decode(ids)
    detokenizer = Detokenizer(tokenizer)
    ends = list(itertools.accumulate(len(detokenizer.push(i)) for i in ids))
    ends = [0, *ends[:-1], len(text)] if ids else []
    return [text[a:b] for a, b in itertools.pairwise(ends)]
