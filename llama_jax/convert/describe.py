"""The content of a folder or file of weights as text for people."""

from collections import Counter

import numpy as np

from llama_jax.config import MODELS, to_dict
from llama_jax.convert import sources
from llama_jax.convert.sources import NAMES, SourceCheckpoint


def describe(source: SourceCheckpoint) -> str:
    """The content of a folder in some lines of text."""
    cfg = source.cfg
    known = [n for n, m in MODELS.items() if sources.replace(m, context=cfg.context) == cfg]
    rope = {k: v for k, v in to_dict(cfg.rope).items() if v is not None}
    lines = [
        f"found: {source.path}: {NAMES[source.format]} format, {len(source.files)} file(s)",
        f"  model: {cfg.num_params:,} parameters, "
        + describe_dtypes(source.dtypes(), source.quantize)
        + (f", as {known[0]}" if known else ""),
        f"  sizes: vocab {cfg.vocab_size}, dim {cfg.dim}, layers {cfg.num_layers}, "
        f"heads {cfg.num_heads} (kv {cfg.num_kv_heads}) of {cfg.head_dim}, "
        f"feed-forward {cfg.ffn_dim}, context {cfg.context}",
        f"  norm_eps {cfg.norm_eps:g}, embeddings {'tied' if cfg.tie_embeddings else 'not tied'}",
        f"  rope: {', '.join(f'{k} {v}' for k, v in rope.items())}",
    ]
    lines += [f"  tokenizer: {t.path} ({t.kind}, {t.size} tokens)" for t in source.tokenizers]
    if source.token_ids:
        lines.append("  token ids: " + ", ".join(f"{k} {v}" for k, v in source.token_ids.items()))
    return "\n".join(lines + [f"  note: {warning}" for warning in source.warnings])


def describe_dtypes(dtypes: dict[str, np.dtype], quantize: str | None) -> str:
    """Names of the dtypes of weights, the most frequent first."""
    if quantize == "Q8_0":
        other = {path: d for path, d in dtypes.items() if d != np.uint8}
        return f"Q8_0 and {describe_dtypes(other, None)}"
    if quantize is not None:
        other = {path: d for path, d in dtypes.items() if not path.endswith(("/q", "/scale"))}
        return f"matrices of the layers {quantize}, others {describe_dtypes(other, None)}"
    return " and ".join(n for n, _ in Counter(d.name for d in dtypes.values()).most_common())
