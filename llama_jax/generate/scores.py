"""How likely a model finds a text: log-probability and entropy of each token, shown and plotted."""

import dataclasses
import functools
import html
import itertools
import math
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from llama_jax.data.tokenizer import Tokenizer
from llama_jax.generate.decode import (
    MAX_BATCH,
    Engine,
    next_power_of_two,
    top_logprobs,
)
from llama_jax.generate.detokenize import Detokenizer, top_dicts
from llama_jax.generate.sampler import MAX_TOP_LOGPROBS
from llama_jax.model.params import merge
from llama_jax.model.sharding import reshard

LOGITS_PER_CHUNK = 1 << 23
"""Largest number of logits in memory at once (32 MiB in float32)."""
TOKENS_PER_CALL = 4096
"""Short texts are scored together up to about this number of tokens."""


@dataclasses.dataclass(frozen=True)
class Scores:
    """Log-probability and entropy of each token of a text.

    Example::

        scores = llm.score("for i in range(10):")
        scores.perplexity
        scores.plot()
    """

    pieces: tuple[str, ...]
    """text of each token; joined, they are the whole text"""
    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    """log p of each token given those before it, nats"""
    entropies: tuple[float, ...]
    """entropy of the model's distribution at each token, nats"""
    top_logprobs: tuple[dict[int, float], ...] = ()
    """log p of the most likely tokens at each position, in order, if requested"""

    @property
    def perplexity(self) -> float:
        """exp of the mean of -log p."""
        return math.exp(-sum(self.logprobs) / max(len(self.logprobs), 1))

    def __repr__(self) -> str:
        return f"Scores({len(self.ids)} tokens, perplexity {self.perplexity:.2f})"

    def _repr_html_(self) -> str:
        spans = []
        for piece, logprob, entropy in zip(self.pieces, self.logprobs, self.entropies, strict=True):
            # From white (certain) to orange (p = 1/400 or less), all readable under dark text.
            doubt = min(-logprob / 6, 1)
            color = f"rgb(255,{255 - 90 * doubt:.0f},{255 - 200 * doubt:.0f})"
            title = f"p = {math.exp(logprob):.3g}, entropy = {entropy:.2f} nats"
            shown = html.escape(piece).replace("\n", "↵\n")
            spans.append(f'<span style="background:{color}" title="{title}">{shown or "·"}</span>')
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
        """Plot -log p of each token as bars and the entropy as a line.

        Args:
          axes: matplotlib axes to draw in; default: a new figure.

        Returns:
          The axes.
        """
        import matplotlib.pyplot as plt

        if axes is None:
            _, axes = plt.subplots(figsize=(max(6, min(0.22 * len(self.ids), 16)), 3.2))
        place = np.arange(len(self.ids))
        axes.bar(place, [-x for x in self.logprobs], color="#d98032", label="-log p of the token")
        axes.plot(place, self.entropies, color="#1f4e79", marker=".", label="entropy before it")
        if len(self.ids) <= 80:
            labels = [
                p.replace("\n", "↵").replace(" ", "␣").replace("$", r"\$") for p in self.pieces
            ]
            axes.set_xticks(place, labels, rotation=90, family="monospace", fontsize=8)
        axes.set(ylabel="nats", xlabel="token", xlim=(-0.7, len(place) - 0.3))
        axes.legend(frameon=False, ncols=2, loc="lower left", bbox_to_anchor=(0, 1))
        axes.spines[["top", "right"]].set_visible(False)
        with warnings.catch_warnings():
            # Scripts that the font lacks show as boxes.
            warnings.filterwarnings("ignore", "Glyph")
            axes.figure.tight_layout()
        return axes


class _Window(NamedTuple):
    """A part of a text that fits the context."""

    text: int
    """its index"""
    inputs: list[int]
    targets: list[int]
    """ids to score; they follow the last inputs"""


def score_all(
    engine: Engine, tokenizer: Tokenizer, texts: list[list[int]], num_top: int = 0
) -> list[Scores]:
    """Score each text from the start of a document.

    A text longer than the context is scored in windows of the context's length, each with at least
    one token that was not scored before; the last window is full, and only its new tokens count.

    Args:
      engine: the model.
      tokenizer: its tokenizer. Without a BOS id, the first id is not scored.
      texts: ids of each text.
      num_top: number of alternatives per token.
    """
    made = []
    scored = _score(engine, tokenizer, texts, num_top)
    for ids, (logprob_T, entropy_T, top) in zip(texts, scored, strict=True):
        first = len(ids) - len(logprob_T)  # the BOS id is not scored
        numbers = tuple(logprob_T.tolist()), tuple(entropy_T.tolist())
        text_of = pieces(tokenizer, ids)[first:]
        made.append(Scores(tuple(text_of), tuple(ids[first:]), *numbers, tuple(top)))
    return made


def perplexity(engine: Engine, tokenizer: Tokenizer, texts: list[list[int]]) -> float:
    """exp of the mean of -log p over all tokens of all texts, as :func:`score_all` scores them.

    Args:
      engine: the model.
      tokenizer: its tokenizer.
      texts: ids of each text.
    """
    logprobs = [logprob_T for logprob_T, *_ in _score(engine, tokenizer, texts, 0)]
    tokens = sum(map(len, logprobs))
    if not tokens:
        raise ValueError("perplexity needs a text of at least one token")
    return math.exp(-sum(float(x.sum(dtype=np.float64)) for x in logprobs) / tokens)


def _score(
    engine: Engine, tokenizer: Tokenizer, texts: list[list[int]], num_top: int
) -> list[tuple]:
    """Log p, entropy and alternatives of the ids of each text.

    Windows of similar length share a call of the model.
    """
    all_windows = [
        _Window(i, *window)
        for i, ids in enumerate(texts)
        for window in windows(ids, tokenizer.bos_id, engine.cfg.context)
    ]
    scored: list[list[tuple]] = [[] for _ in texts]
    size = lambda w: max(64, next_power_of_two(len(w.inputs)))
    for T, same_size in itertools.groupby(sorted(all_windows, key=size), size):
        group = list(same_size)
        # Dynamic rotary frequencies depend on the length of the text: one text per call.
        most = max(1, min(MAX_BATCH, TOKENS_PER_CALL // T))
        B = 1 if engine.cfg.rope.type == "dynamic" else min(most, next_power_of_two(len(group)))
        for first in range(0, len(group), B):
            part = group[first : first + B]
            for window, new in zip(part, _score_windows(engine, part, B, T, num_top), strict=True):
                scored[window.text].append(new)
    empty: tuple[Any, ...] = (np.zeros(0, np.float32), np.zeros(0, np.float32), [])
    return [
        (np.concatenate(logprobs), np.concatenate(entropies), [*itertools.chain(*tops)])
        for logprobs, entropies, tops in (zip(empty, *new, strict=True) for new in scored)
    ]


def windows(ids: list[int], bos_id: int | None, context: int) -> list[tuple[list[int], list[int]]]:
    """(inputs, targets) in which every id is a target once, following the last inputs.

    Args:
      ids: of a text.
      bos_id: the BOS id; None if the tokenizer has none.
      context: largest length of a window.
    """
    if bos_id is None or ids[:1] == [bos_id]:
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


def _score_windows(
    engine: Engine, part: list[_Window], B: int, T: int, num_top: int
) -> list[tuple]:
    """Log p, entropy (float32) and alternatives of the targets of each window, in one call."""
    tokens_BT, targets_BT = np.zeros((2, B, T), np.int32)
    lengths_B = np.ones(B, np.int32)
    for b, window in enumerate(part):
        lengths_B[b] = end = len(window.inputs)
        tokens_BT[b, :end] = window.inputs
        targets_BT[b, end - len(window.targets) : end] = window.targets
    name, computed = "score", 0
    if num_top:
        name, computed = "score with top_logprobs", min(MAX_TOP_LOGPROBS, engine.cfg.vocab_size)
    args = (engine.params, tokens_BT, targets_BT, lengths_B)
    program = functools.partial(_score_program, num_top=computed)
    logprob_BT, entropy_BT, ids_BTN, top_BTN = map(np.asarray, engine.run(name, program, args))
    scored = []
    for b, window in enumerate(part):
        at = slice(lengths_B[b] - len(window.targets), lengths_B[b])
        top = top_dicts(ids_BTN[b, at], top_BTN[b, at], num_top)
        scored.append((logprob_BT[b, at], entropy_BT[b, at], top))
    return scored


def _score_program(graphdef, params, tokens_BT, targets_BT, lengths_B, num_top):
    """Log p and entropy [B, T] of each target, and ids and log p [B, T, N] of alternatives."""
    llama = merge(graphdef, params)
    # Causal attention never sees the padding at the end; dynamic rotary frequencies would.
    hidden_BTD = reshard(llama.hidden(tokens_BT, rope_length=lengths_B[0]), P())
    B, T, D = hidden_BTD.shape
    chunk = min(B * T, 1 << max(0, (LOGITS_PER_CHUNK // llama.cfg.vocab_size).bit_length() - 1))

    def score_chunk(of):
        hidden_CD, target_C = of
        hidden_1CD = reshard(hidden_CD[None], llama.compute.rules.activation_without_tensor("BTD"))
        logprob_CV = jax.nn.log_softmax(reshard(llama.logits(hidden_1CD), P())[0], axis=-1)
        logprob_C = jnp.take_along_axis(logprob_CV, target_C[:, None], axis=-1)[:, 0]
        entropy_C = -jnp.sum(jnp.exp(logprob_CV) * logprob_CV, axis=-1)
        return logprob_C, entropy_C, *top_logprobs(logprob_CV, num_top)

    chunks = hidden_BTD.reshape(-1, chunk, D), targets_BT.reshape(-1, chunk)
    scored = jax.lax.map(score_chunk, chunks)
    return tuple(x.reshape(B, T, *x.shape[2:]) for x in scored)


def pieces(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """The text of each id; joined, they are exactly the text of all ids.

    A character of several ids belongs to the last of them.
    """
    text = tokenizer.decode(ids)
    detokenizer = Detokenizer(tokenizer)
    ends = list(itertools.accumulate(len(detokenizer.push(i)) for i in ids))
    ends = [0, *ends[:-1], len(text)] if ids else []
    return [text[a:b] for a, b in itertools.pairwise(ends)]
