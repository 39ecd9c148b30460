"""Small random models for tests, ours and those of transformers with the same weights.

NumPy makes the weights from a name and a seed. The layout of transformers is stated here
independently of the converter's table.
"""

import functools
import zlib

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.config import ModelConfig, RopeConfig
from llama_jax.model.llama import ComputeConfig
from llama_jax.model.params import merge, structure

F32 = ComputeConfig(jnp.dtype("float32"))


def small(rope: dict | None = None, **changes) -> ModelConfig:
    """A model of a few thousand weights, with K < N and head_dim != D / N."""
    sizes = dict(vocab_size=40, dim=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=6)
    more = dict(ffn_dim=48, norm_eps=1e-5, context=64, tie_embeddings=False)
    return ModelConfig(**(sizes | more | changes), rope=RopeConfig(**(rope or {})))


LLAMA3 = dict(type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
YARN = dict(type="yarn", factor=4.0, original_context=256)

# name -> (model, batch, tokens)
GRID: dict[str, tuple[ModelConfig, int, int]] = {
    "heads": (small(num_heads=4, num_kv_heads=4, head_dim=8), 2, 24),
    "grouped": (small(dim=48, num_heads=6, num_kv_heads=2, head_dim=10), 2, 24),
    "one_kv_head": (small(dim=40, num_heads=5, num_kv_heads=1, head_dim=4, norm_eps=1e-6), 2, 24),
    "tied": (small(tie_embeddings=True, num_layers=3), 2, 24),
    "tied_grouped": (small(tie_embeddings=True, num_heads=8, head_dim=4, ffn_dim=20), 2, 24),
    "theta": (small({"theta": 5e5}, head_dim=16), 2, 60),
    "linear": (small({"type": "linear", "factor": 2.5}), 2, 60),
    "dynamic_short": (small({"type": "dynamic", "factor": 2.0}, context=64), 2, 60),
    "dynamic_long": (small({"type": "dynamic", "factor": 3.0}, context=64, head_dim=16), 2, 150),
    "llama3": (small(LLAMA3 | {"theta": 5e5, "original_context": 32}, head_dim=16), 2, 60),
    "yarn": (small(YARN, context=1024, head_dim=16), 2, 60),
    "yarn_betas": (small(YARN | {"beta_fast": 8.0, "beta_slow": 2.0}, context=1024), 2, 60),
    "yarn_mscale": (
        small(YARN | {"mscale": 1.3, "mscale_all_dim": 0.7}, context=1024, head_dim=16), 2, 60),
    "yarn_attention": (small(YARN | {"attention_factor": 1.25}, context=1024, head_dim=16), 2, 60),
    "yarn_exact": (small(YARN | {"truncate": False}, context=1024, head_dim=16), 2, 60),
    "far": (small(context=2304, head_dim=16), 1, 2200),
    "far_theta": (small({"theta": 5e5}, context=2304, head_dim=64), 1, 2200),
    "far_linear": (small({"type": "linear", "factor": 2.0}, context=2304, head_dim=16), 1, 2200),
    "far_dynamic": (small({"type": "dynamic", "factor": 2.0}, context=512, head_dim=16), 1, 2200),
    "far_llama3": (
        small(LLAMA3 | {"theta": 5e5, "original_context": 256}, context=2304, head_dim=32),
        1, 2200),
    "far_yarn": (
        small(YARN | {"original_context": 576}, context=2304, head_dim=16, tie_embeddings=True),
        1, 2200),
}  # fmt: skip

# Our name of each weight, its letters, and transformers' name.
WEIGHTS = {
    "embed": ("VD", "model.embed_tokens.weight"),
    "blocks.attention_norm": ("LD", "model.layers.{}.input_layernorm.weight"),
    "blocks.attention.q": ("LDQ", "model.layers.{}.self_attn.q_proj.weight"),
    "blocks.attention.k": ("LDE", "model.layers.{}.self_attn.k_proj.weight"),
    "blocks.attention.v": ("LDE", "model.layers.{}.self_attn.v_proj.weight"),
    "blocks.attention.o": ("LQD", "model.layers.{}.self_attn.o_proj.weight"),
    "blocks.mlp_norm": ("LD", "model.layers.{}.post_attention_layernorm.weight"),
    "blocks.mlp.gate": ("LDF", "model.layers.{}.mlp.gate_proj.weight"),
    "blocks.mlp.up": ("LDF", "model.layers.{}.mlp.up_proj.weight"),
    "blocks.mlp.down": ("LFD", "model.layers.{}.mlp.down_proj.weight"),
    "norm": ("D", "model.norm.weight"),
    "unembed": ("DV", "lm_head.weight"),
}


def random_weights(cfg: ModelConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """Every weight by our name: matrices that preserve the variance, norms near one."""
    out = {}
    for name, (letters, _) in WEIGHTS.items():
        if name == "unembed" and cfg.tie_embeddings:
            continue
        rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
        shape = cfg.shape(letters)
        value = rng.standard_normal(shape)
        if name.endswith("norm"):
            value = 1 + 0.2 * value
        elif name != "embed":
            inner = letters.strip("L")[:-1] if letters[-1] == "D" else "D"
            value = value / np.sqrt(np.prod(cfg.shape(inner)))
        out[name] = value.astype(np.float32)
    return out


def random_tokens(cfg: ModelConfig, batch: int, length: int, seed: int = 0) -> np.ndarray:
    """int32 ids [batch, length]."""
    rng = np.random.default_rng([seed, batch, length])
    return rng.integers(0, cfg.vocab_size, (batch, length), dtype=np.int32)


def tree_of(flat: dict) -> dict:
    """{"blocks.mlp.up": w} as the nested dict of the model's parameters."""
    tree: dict = {}
    for name, value in flat.items():
        *path, leaf = name.split(".")
        node = tree
        for key in path:
            node = node.setdefault(key, {})
        node[leaf] = value
    return tree


def flat_of(tree: dict, prefix: str = "") -> dict:
    """The inverse of :func:`tree_of`."""
    out = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        out |= flat_of(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return out


def model_of(cfg: ModelConfig, compute: ComputeConfig = F32):
    """A function from parameters (nested dict) to the model: `model_of(cfg)(params)(tokens_BT)`."""
    return functools.partial(merge, structure(cfg, compute))


def hf_model(cfg: ModelConfig, weights: dict[str, np.ndarray]):
    """transformers' LlamaForCausalLM, float32, eager attention, with these weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    rope = {"rope_type": cfg.rope.type, "rope_theta": cfg.rope.theta}
    for ours, theirs in _HF_ROPE.items():
        if (value := getattr(cfg.rope, ours)) is not None:
            rope[theirs] = value
    theirs = LlamaConfig(
        vocab_size=cfg.vocab_size,
        hidden_size=cfg.dim,
        intermediate_size=cfg.ffn_dim,
        num_hidden_layers=cfg.num_layers,
        num_attention_heads=cfg.num_heads,
        num_key_value_heads=cfg.num_kv_heads,
        head_dim=cfg.head_dim,
        rms_norm_eps=cfg.norm_eps,
        max_position_embeddings=cfg.context,
        tie_word_embeddings=cfg.tie_embeddings,
        rope_parameters=rope,
        attn_implementation="eager",
        bos_token_id=None,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(theirs).float().eval()
    state = {}
    for name, value in weights.items():
        for layer, whole in enumerate(value if name.startswith("blocks.") else value[None]):
            state[WEIGHTS[name][1].format(layer)] = torch.tensor(_to_hf(name, whole))
    problems = model.load_state_dict(state, strict=False)
    tied = {"lm_head.weight"} if cfg.tie_embeddings else set()
    assert set(problems.missing_keys) <= tied, problems
    assert not problems.unexpected_keys, problems
    return model


_HF_ROPE = dict(
    factor="factor", original_context="original_max_position_embeddings",
    low_freq_factor="low_freq_factor", high_freq_factor="high_freq_factor",
    beta_fast="beta_fast", beta_slow="beta_slow", attention_factor="attention_factor",
    mscale="mscale", mscale_all_dim="mscale_all_dim", truncate="truncate",
)  # fmt: skip


def _to_hf(name: str, w: np.ndarray) -> np.ndarray:
    """One layer's weight, transposed from ours (in, out) to theirs, except the embedding."""
    return w if w.ndim == 1 or name == "embed" else w.T.copy()


def from_hf(cfg: ModelConfig, name: str, layers: list[np.ndarray]) -> np.ndarray:
    """Their tensors of one weight (one per layer) in our layout; the inverse of hf_model."""
    shape = cfg.shape(WEIGHTS[name][0])
    per_layer = shape[1:] if name.startswith("blocks.") else shape
    turned = [w if w.ndim == 1 or name == "embed" else w.T for w in layers]
    return np.stack([w.reshape(per_layer) for w in turned]).reshape(shape)


def hf_run(cfg: ModelConfig, batch: int, length: int):
    """(logits, gradients by our name) of transformers' model; the loss: a random sum of logits."""
    import torch

    weights = random_weights(cfg)
    model = hf_model(cfg, weights)
    logits = model(torch.tensor(random_tokens(cfg, batch, length)).long(), use_cache=False).logits
    logits.backward(torch.tensor(cotangent(cfg, batch, length)))
    grads = {}
    named = dict(model.named_parameters())
    for name, value in weights.items():
        layers = range(len(value)) if name.startswith("blocks.") else [0]
        theirs = [named[WEIGHTS[name][1].format(i)].grad.numpy() for i in layers]
        grads[name] = from_hf(cfg, name, theirs)
    return logits.detach().numpy(), grads


def cotangent(cfg: ModelConfig, batch: int, length: int) -> np.ndarray:
    """Random gradient of the logits, float32 [B, T, V]."""
    rng = np.random.default_rng([1, batch, length])
    return rng.standard_normal((batch, length, cfg.vocab_size)).astype(np.float32)


def our_run(cfg: ModelConfig, batch: int, length: int, gradients: bool = True):
    """(logits, gradients by our name), as hf_run; no gradients if they are not wanted."""
    build = model_of(cfg)
    if not gradients:
        tokens, params = random_tokens(cfg, batch, length), tree_of(random_weights(cfg))
        return np.asarray(jax.jit(lambda p, t: build(p)(t))(params, tokens)), {}

    @jax.jit
    def run(params, tokens, d_logits):
        logits, pull = jax.vjp(lambda p: build(p)(tokens), params)
        return logits, pull(d_logits)[0]

    args = random_tokens(cfg, batch, length), cotangent(cfg, batch, length)
    logits, grads = run(tree_of(random_weights(cfg)), *args)
    return np.asarray(logits), {k: np.asarray(v) for k, v in flat_of(grads).items()}


def relative_l2(got: np.ndarray, want: np.ndarray) -> float:
    """|got - want| / |want|, in float64."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def logit_error(got: np.ndarray, want: np.ndarray) -> float:
    """Largest difference over the range of the logits."""
    return float(np.abs(got - want).max() / (want.max() - want.min()))
