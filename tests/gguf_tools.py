"""GGUF files made here a second time, without our writer and without the package gguf."""

import struct
from pathlib import Path

import convert_tools as tools
import numpy as np

from llama_jax.config import ModelConfig

BOOL, U32, I32, F32, STRING, ARRAY = 7, 4, 5, 6, 8, 9
FORMATS = {2: "<H", U32: "<I", I32: "<i", F32: "<f", BOOL: "<?", 0: "<B", 10: "<Q"}
TYPES = {"float32": 0, "float16": 1, "bfloat16": 30}
NAMES = {
    "attention.wq": "attn_q", "attention.wk": "attn_k", "attention.wv": "attn_v",
    "attention.wo": "attn_output", "feed_forward.w1": "ffn_gate", "feed_forward.w2": "ffn_down",
    "feed_forward.w3": "ffn_up", "attention_norm": "attn_norm", "ffn_norm": "ffn_norm",
    "tok_embeddings": "token_embd", "norm": "output_norm", "output": "output",
}  # fmt: skip


def text(s: str | bytes) -> bytes:
    content = s.encode() if isinstance(s, str) else s
    return struct.pack("<Q", len(content)) + content


def value(kind: int, content) -> bytes:
    """The bytes of metadata; an array is (kind of items, list)."""
    if kind == STRING:
        return text(content)
    if kind == ARRAY:
        item, items = content
        head = struct.pack("<IQ", item, len(items))
        return head + b"".join(value(item, i) for i in items)
    return struct.pack(FORMATS[kind], content)


def write(path: Path, metadata: dict, tensors: dict, version: int = 3, align: int = 32) -> Path:
    """A file.

    Args:
      path: the file.
      metadata: key -> (kind, value).
      tensors: name -> (shape, number of the type, bytes), or an array.
      version: of the format.
      align: of the data.
    """
    entries = {
        n: t if isinstance(t, tuple) else (t.shape, TYPES[t.dtype.name], t.tobytes())
        for n, t in tensors.items()
    }
    out = b"GGUF" + struct.pack("<IQQ", version, len(entries), len(metadata))
    for key, (kind, content) in metadata.items():
        out += text(key) + struct.pack("<I", kind) + value(kind, content)
    data = b""
    for name, (shape, kind, content) in entries.items():
        out += text(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *shape[::-1])
        out += struct.pack("<IQ", kind, len(data))
        data += content + bytes(-len(content) % align)
    path.write_bytes(out + bytes(-len(out) % align) + data)
    return path


def metadata(cfg: ModelConfig, **changes) -> dict:
    """What llama.cpp's converters write for a model, with a tokenizer of single letters."""
    tokens = ["<unk>", "<s>", "</s>", "▁", *map(chr, range(97, 97 + cfg.vocab_size - 4))]
    types = [2, 3, 3, *[1] * (cfg.vocab_size - 3)]
    out = {
        "general.architecture": (STRING, "llama"),
        "llama.context_length": (U32, cfg.context),
        "llama.embedding_length": (U32, cfg.dim),
        "llama.block_count": (U32, cfg.num_layers),
        "llama.feed_forward_length": (U32, cfg.ffn_dim),
        "llama.attention.head_count": (U32, cfg.num_heads),
        "llama.attention.head_count_kv": (U32, cfg.num_kv_heads),
        "llama.attention.layer_norm_rms_epsilon": (F32, cfg.norm_eps),
        "llama.rope.freq_base": (F32, cfg.rope.theta),
        "llama.rope.dimension_count": (U32, cfg.head_dim),
        "llama.vocab_size": (U32, cfg.vocab_size),
        "tokenizer.ggml.model": (STRING, "llama"),
        "tokenizer.ggml.tokens": (ARRAY, (STRING, tokens)),
        "tokenizer.ggml.scores": (ARRAY, (F32, [-float(i) for i in range(len(tokens))])),
        "tokenizer.ggml.token_type": (ARRAY, (I32, types)),
        "tokenizer.ggml.bos_token_id": (U32, 1),
        "tokenizer.ggml.eos_token_id": (U32, 2),
    }
    return {k: v for k, v in (out | changes).items() if v is not None}


def tensors(state: dict) -> dict:
    """Meta's tensors under GGUF's names; norms in float32. Both interleave rotary pairs."""
    out = {}
    for name, w in state.items():
        prefix, rest = "", name.removesuffix(".weight")
        if name.startswith("layers."):
            _, number, rest = rest.split(".", 2)
            prefix = f"blk.{number}."
        out[f"{prefix}{NAMES[rest]}.weight"] = w if w.ndim == 2 else w.astype(np.float32)
    return out


def model(path: Path, cfg: ModelConfig, dtype="float32", make=tools.random_values, **changes):
    """A file with random weights, and these weights under Meta's names."""
    state = tools.meta_state(cfg, tools.DTYPES[dtype], make=make)
    return write(path, metadata(cfg, **changes), tensors(state)), state
