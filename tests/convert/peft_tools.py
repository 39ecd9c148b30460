"""Small random adapters in PEFT's format, and what they add to a matrix, written a second time."""

import json
import re
from pathlib import Path

import convert_tools as tools
import numpy as np

from llama_jax.config import ModelConfig

NAMES = {
    "q_proj": "self_attn", "k_proj": "self_attn", "v_proj": "self_attn", "o_proj": "self_attn",
    "gate_proj": "mlp", "up_proj": "mlp", "down_proj": "mlp",
}  # fmt: skip
CONFIG = {
    "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 6, "bias": "none",
    "target_modules": list(NAMES), "base_model_name_or_path": "org/base", "lora_dropout": 0.1,
}  # fmt: skip


def torch_shapes(cfg: ModelConfig) -> dict[str, tuple[int, int]]:
    """Shape [out, in] of each matrix in transformers."""
    D, F, Q, E = cfg.dim, cfg.ffn_dim, cfg.shape("Q")[0], cfg.shape("E")[0]
    out_in = dict(q_proj=(Q, D), k_proj=(E, D), v_proj=(E, D), o_proj=(D, Q))
    return out_in | dict(gate_proj=(F, D), up_proj=(F, D), down_proj=(D, F))


def modules_of(cfg: ModelConfig, names=tuple(NAMES)) -> list[str]:
    """Names of the matrices in transformers."""
    layers = range(cfg.num_layers)
    return [f"model.layers.{i}.{NAMES[name]}.{name}" for i in layers for name in names]


def adapter_tensors(
    cfg: ModelConfig, ranks: dict[str, int], dtype="float32", seed=0
) -> dict[str, np.ndarray]:
    """A random lora_A and lora_B of each module, with this rank."""
    rng, shapes, out = np.random.default_rng(seed), torch_shapes(cfg), {}
    for module, r in ranks.items():
        outputs, inputs = shapes[module.rpartition(".")[2]]
        for part, shape in (("lora_A", (r, inputs)), ("lora_B", (outputs, r))):
            x = tools.random_values(shape, tools.DTYPES[dtype], rng)
            out[f"base_model.model.{module}.{part}.weight"] = x
    return out


def make_peft(folder: Path, cfg: ModelConfig, tensors=None, **config) -> Path:
    """An adapter in PEFT's format."""
    folder.mkdir()
    settings = CONFIG | config
    if tensors is None:
        targets = settings["target_modules"]
        tensors = adapter_tensors(cfg, dict.fromkeys(modules_of(cfg, targets), settings["r"]))
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    tools.save_safetensors(folder / "adapter_model.safetensors", tensors)
    return folder


def updates(folder: Path) -> dict[str, np.ndarray]:
    """What an adapter adds to each matrix [out, in], by PEFT's rules, in float64."""
    from safetensors.numpy import load_file

    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")

    def first(table, module, default):
        keys = [k for k in table or {} if re.match(rf"(.*\.)?({k})$", module)]
        return table[keys[0]] if keys else default

    out = {}
    for name, a in tensors.items():
        if "lora_A" not in name:
            continue
        module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        b = tensors[name.replace("lora_A", "lora_B")]
        r = first(config.get("rank_pattern"), module, config["r"])
        alpha = first(config.get("alpha_pattern"), module, config["lora_alpha"])
        scale = alpha / (np.sqrt(r) if config.get("use_rslora") else r)
        out[module] = scale * (b.astype(np.float64) @ a.astype(np.float64))
    return out
