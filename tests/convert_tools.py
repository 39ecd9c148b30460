"""Small random checkpoints in the formats of Meta and Hugging Face, and the same in ours.

The formats are implemented here a second time, with plain reshapes of whole arrays, so that the
tests do not use the table that they check.
"""

import json
import zlib
from pathlib import Path

import ml_dtypes
import numpy as np

from llama_jax.config import ModelConfig, RopeConfig
from llama_jax.convert import formats, torch_files

DTYPES = {d.name: d for d in map(np.dtype, (np.float16, ml_dtypes.bfloat16, np.float32))}
DATA = Path(__file__).parents[1] / "../shared/data"
STORIES = DATA / "stories260k"
# The command's bound counts the whole process, in which other tests ran before.
ANY = ["--max-memory", "64GiB"]


def small(**changes) -> ModelConfig:
    """A tiny model with fewer kv heads than heads."""
    sizes = dict(vocab_size=24, dim=32, num_layers=2, num_heads=8, num_kv_heads=4, head_dim=4)
    more = dict(ffn_dim=48, norm_eps=1e-5, rope=RopeConfig(), context=64, tie_embeddings=False)
    return ModelConfig(**(sizes | more | changes))


def random_bits(shape: tuple[int, ...], dtype: np.dtype, rng: np.random.Generator) -> np.ndarray:
    """Random bits: NaNs with payloads, infinities, subnormals, negative zeros."""
    size = int(np.prod(shape)) * dtype.itemsize
    return np.frombuffer(rng.bytes(size), dtype).reshape(shape)


def random_values(shape: tuple[int, ...], dtype: np.dtype, rng: np.random.Generator) -> np.ndarray:
    """Ordinary weights."""
    return (rng.standard_normal(shape) * 0.1).astype(dtype)


def meta_state(cfg: ModelConfig, dtype: np.dtype, seed: int = 0, make=random_bits) -> dict:
    """A whole state dict under Meta's names, in torch's [out, in]."""
    rng = np.random.default_rng(seed)
    V, D, N, K, H, F = cfg.shape("VDNKHF")
    shapes = {"tok_embeddings.weight": (V, D), "norm.weight": (D,)}
    if not cfg.tie_embeddings:
        shapes["output.weight"] = (V, D)
    for i in range(cfg.num_layers):
        layer = {
            "attention.wq": (N * H, D), "attention.wk": (K * H, D), "attention.wv": (K * H, D),
            "attention.wo": (D, N * H), "feed_forward.w1": (F, D), "feed_forward.w2": (D, F),
            "feed_forward.w3": (F, D), "attention_norm": (D,), "ffn_norm": (D,),
        }  # fmt: skip
        shapes |= {f"layers.{i}.{name}.weight": shape for name, shape in layer.items()}
    return {name: make(shape, dtype, rng) for name, shape in shapes.items()}


def half_split(w: np.ndarray, heads: int) -> np.ndarray:
    """Rows from interleaved rotary pairs to half-split ones, as Hugging Face's converter does."""
    rows, columns = w.shape
    return w.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


HF_NAMES = {
    "attention.wq": "self_attn.q_proj", "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj", "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj", "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj", "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}  # fmt: skip


def hf_state(state: dict, cfg: ModelConfig) -> dict:
    """The same weights under Hugging Face's names."""
    out = {"model.embed_tokens.weight": state["tok_embeddings.weight"]}
    out["model.norm.weight"] = state["norm.weight"]
    if "output.weight" in state:
        out["lm_head.weight"] = state["output.weight"]
    for name, w in state.items():
        if not name.startswith("layers."):
            continue
        _, layer, rest = name.removesuffix(".weight").split(".", 2)
        if rest.endswith("wq"):
            w = half_split(w, cfg.num_heads)
        if rest.endswith("wk"):
            w = half_split(w, cfg.num_kv_heads)
        out[f"model.layers.{layer}.{HF_NAMES[rest]}.weight"] = w
    return out


def our_tree(state: dict, cfg: ModelConfig) -> dict:
    """The same weights as our nested parameters."""
    hf = hf_state(state, cfg)

    def stack(name):
        layers = [hf[f"model.layers.{i}.{name}.weight"] for i in range(cfg.num_layers)]
        return np.stack([w.T for w in layers])

    tree = {
        "embed": hf["model.embed_tokens.weight"],
        "norm": hf["model.norm.weight"],
        "blocks": {
            "attention_norm": stack("input_layernorm"),
            "mlp_norm": stack("post_attention_layernorm"),
            "attention": {
                "q": stack("self_attn.q_proj"),
                "k": stack("self_attn.k_proj"),
                "v": stack("self_attn.v_proj"),
                "o": stack("self_attn.o_proj"),
            },
            "mlp": {
                "gate": stack("mlp.gate_proj"),
                "up": stack("mlp.up_proj"),
                "down": stack("mlp.down_proj"),
            },
        },
    }
    if "lm_head.weight" in hf:
        tree["unembed"] = hf["lm_head.weight"].T
    return tree


def meta_shards(state: dict, shards: int, by_rows: bool = False) -> list[dict]:
    """The tensors of each model-parallel rank."""
    out = []
    for i in range(shards):
        shard = {}
        for name, w in state.items():
            if w.ndim == 1:
                shard[name] = w
                continue
            along = 1 if name.endswith(("wo.weight", "w2.weight")) else 0
            if name == "tok_embeddings.weight":
                along = 0 if by_rows else 1
            shard[name] = np.split(w, shards, along)[i]
        out.append(shard)
    return out


def save_torch(path: Path, state: dict) -> None:
    """A .pth, without torch."""
    plan = torch_files.plan(path, {k: (w.shape, w.dtype) for k, w in state.items()})
    crc = {k: zlib.crc32(w.tobytes()) for k, w in state.items()}
    with path.open("wb") as f:
        for offset, data in torch_files.headers(plan, crc):
            f.seek(offset)
            f.write(data)
        for name, w in state.items():
            f.seek(plan.slices[name].offset)
            f.write(w.tobytes())


def save_safetensors(path: Path, state: dict) -> None:
    """A .safetensors, without the package."""
    head, _ = formats.plan_safetensors(path, {k: (w.shape, w.dtype) for k, w in state.items()})
    path.write_bytes(head + b"".join(w.tobytes() for w in state.values()))


def params_of(cfg: ModelConfig) -> dict:
    """params.json, with a multiplier that makes the feed-forward width exact."""
    base = int(8 * cfg.dim / 3)
    params = dict(dim=cfg.dim, n_layers=cfg.num_layers, n_heads=cfg.num_heads, vocab_size=-1)
    params |= dict(multiple_of=1, ffn_dim_multiplier=(cfg.ffn_dim + 0.5) / base)
    params |= dict(norm_eps=cfg.norm_eps, rope_theta=cfg.rope.theta)
    if cfg.num_kv_heads != cfg.num_heads:
        params["n_kv_heads"] = cfg.num_kv_heads
    return params


def make_meta(folder: Path, state: dict, cfg: ModelConfig, shards=1, by_rows=False) -> Path:
    """A Meta folder."""
    folder.mkdir()
    (folder / "params.json").write_text(json.dumps(params_of(cfg)))
    for i, shard in enumerate(meta_shards(state, shards, by_rows)):
        save_torch(folder / f"consolidated.{i:02d}.pth", shard)
    return folder


def config_of(cfg: ModelConfig) -> dict:
    """A plain config.json of transformers 4."""
    return dict(
        architectures=["LlamaForCausalLM"], model_type="llama", hidden_act="silu",
        hidden_size=cfg.dim, intermediate_size=cfg.ffn_dim, num_hidden_layers=cfg.num_layers,
        num_attention_heads=cfg.num_heads, num_key_value_heads=cfg.num_kv_heads,
        head_dim=cfg.head_dim, vocab_size=cfg.vocab_size, rms_norm_eps=cfg.norm_eps,
        max_position_embeddings=cfg.context, tie_word_embeddings=cfg.tie_embeddings,
        rope_theta=cfg.rope.theta, bos_token_id=1, eos_token_id=2, torch_dtype="float32",
    )  # fmt: skip


def make_hf(folder: Path, state: dict, cfg: ModelConfig, files=1, suffix="safetensors") -> Path:
    """A Hugging Face folder; several files are split anywhere, also inside a layer."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config_of(cfg)))
    hf = hf_state(state, cfg)
    save = save_safetensors if suffix == "safetensors" else save_torch
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    if files == 1:
        save(folder / f"{stem}.{suffix}", hf)
        return folder
    index = {}
    for i, names in enumerate(np.array_split(list(hf), files)):
        file = f"{stem}-{i + 1:05d}-of-{files:05d}.{suffix}"
        save(folder / file, {n: hf[n] for n in names.tolist()})
        index |= dict.fromkeys(names.tolist(), file)
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"weight_map": index}))
    return folder


def same(tree: dict, other: dict) -> bool:
    """Same nested names, shapes, dtypes and bits."""
    if isinstance(tree, dict):
        return set(tree) == set(other) and all(same(tree[k], other[k]) for k in tree)
    a, b = np.asarray(tree), np.asarray(other)
    return a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes()
