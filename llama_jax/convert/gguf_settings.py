"""The settings of a model in the metadata of a GGUF file.

Settings that change the computation in a way that the model does not implement are refused by name;
unknown settings are named in a warning.
"""

import json
import math
from typing import Any

import numpy as np

from llama_jax.config import ModelConfig, RopeConfig, to_dict
from llama_jax.convert import sources
from llama_jax.convert.formats import ConvertError, short
from llama_jax.convert.gguf_file import GgufTensor, Metadata
from llama_jax.convert.sources import Report, normalized

ROPE_FREQS = "rope_freqs.weight"
"""tensor [H / 2] of factors that divide the rotary frequencies: scaling of type llama3"""
_SIZES = {
    "context": "llama.context_length", "dim": "llama.embedding_length",
    "num_layers": "llama.block_count", "num_heads": "llama.attention.head_count",
    "num_kv_heads": "llama.attention.head_count_kv", "ffn_dim": "llama.feed_forward_length",
}  # fmt: skip
_EPS = "llama.attention.layer_norm_rms_epsilon"
_THETA, _ROTARY = "llama.rope.freq_base", "llama.rope.dimension_count"
_KEY, _VALUE = "llama.attention.key_length", "llama.attention.value_length"
_SCALING = "llama.rope.scaling."
_OWN = "llama_jax.rope"
"""`rope` of our config as JSON, which GGUF cannot always express exactly; llama.cpp ignores it"""
# Settings of related models that change the computation, and their values that do not.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "llama.attention.scale": (0,), "llama.attention.clamp_kqv": (0,),
    "llama.attention.max_alibi_bias": (0,), "llama.attention.sliding_window": (0,),
    "llama.attention.causal": (True,), "llama.attn_logit_softcapping": (0,),
    "llama.final_logit_softcapping": (0,), "llama.logit_scale": (0, 1),
    "llama.embedding_scale": (0, 1), "llama.residual_scale": (0, 1), "llama.pooling_type": (0,),
    "llama.use_parallel_residual": (False,), "llama.expert_count": (0,),
    "llama.expert_used_count": (0,), f"{_SCALING}yarn_ext_factor": (1,),
    f"{_SCALING}yarn_log_multiplier": (0,), f"{_SCALING}yarn_attn_factor": (1,),
}  # fmt: skip
_KNOWN = {
    "llama.vocab_size", _EPS, _THETA, _ROTARY, _KEY, _VALUE, "llama.rope.scale_linear",
    "llama.tensor_data_layout", *_SIZES.values(),
    *(_SCALING + n for n in ("type", "factor", "original_context_length", "attn_factor",
      "finetuned", "yarn_beta_fast", "yarn_beta_slow")),
}  # fmt: skip


def parse(
    metadata: Metadata, tensors: dict[str, GgufTensor], where: str
) -> tuple[ModelConfig, list[str]]:
    """The model of a file, and warnings.

    Args:
      metadata: of the file.
      tensors: of the file, and of the other files of a split model.
      where: the file, for messages.

    Raises:
      ConvertError: lists every setting that is not supported.
    """
    report = Report(where)
    arch = metadata.get("general.architecture")
    if not (isinstance(arch, str) and arch == "llama"):
        report.problem(f"general.architecture={short(arch)} is not supported, only 'llama'")
        report.raise_problems()
    for key, neutral in _NEUTRAL.items():
        value = metadata.get(key, neutral[0])
        if isinstance(value, list | np.ndarray) or value not in neutral:
            report.problem(f"{key}={short(value)} is not supported")
    ours = {k for k in metadata if k.startswith("llama.")}
    report.warn_unknown(ours - _KNOWN - set(_NEUTRAL))
    get = _Getter(metadata, report)
    tree: dict[str, Any] = {name: get.size(key) for name, key in _SIZES.items()}
    heads, dim = tree["num_heads"], tree["dim"]
    shape = tensors["token_embd.weight"].shape if "token_embd.weight" in tensors else ()
    if len(shape) != 2:
        report.problem("token_embd.weight is missing or not a matrix: the file is incomplete")
    for name, value in tree.items():
        if value is None and name != "num_kv_heads":
            report.problem(f"{_SIZES[name]} is missing")
    eps = get.number(_EPS)
    if eps is None:
        report.problem(f"{_EPS} is missing")
    report.raise_problems()
    head_dim = get.size(_KEY) or dim // heads
    if (value_dim := get.size(_VALUE) or head_dim) != head_dim:
        report.problem(f"{_VALUE}={value_dim} differs from {_KEY}={head_dim}: not supported")
    if (rotary := get.size(_ROTARY) or head_dim) != head_dim:
        report.problem(f"{_ROTARY}={rotary} is not the head dimension {head_dim}: not supported")
    if (size := get.size("llama.vocab_size") or shape[0]) != shape[0]:
        report.problem(
            f"llama.vocab_size={size}, but token_embd.weight has {shape[0]} rows: one of "
            "them is damaged; copy or convert the file again"
        )
    tree |= dict(
        vocab_size=shape[0],
        num_kv_heads=tree["num_kv_heads"] or heads,
        head_dim=head_dim,
        norm_eps=eps,
        tie_embeddings="output.weight" not in tensors,
        rope={"theta": get.number(_THETA) or 10000.0} | _parse_scaling(get),
    )
    cfg = report.model(tree)
    own = _own_rope(metadata.get(_OWN))
    if ROPE_FREQS in tensors:
        cfg = _with_rope_freqs(cfg, tensors[ROPE_FREQS], own, report)
    elif own is not None and own.type == cfg.rope.type != "default":
        scaled = sources.replace(cfg, rope=own)
        if np.allclose(_frequencies(scaled), _frequencies(cfg), rtol=1e-5):
            cfg = scaled
    return cfg, report.warnings


def _own_rope(content: Any) -> RopeConfig | None:
    """The value of :data:`_OWN`, if it is one that we write."""
    try:
        return RopeConfig(**json.loads(content))
    except (ValueError, TypeError, RecursionError):
        return None


def _frequencies(cfg: ModelConfig) -> np.ndarray:
    """Rotary frequencies, and the factor on cos and sin."""
    from llama_jax.model.rope import rope_of  # here, because it imports JAX

    rope = rope_of(cfg)
    return np.append(np.asarray(rope.inv_freq_H2, np.float64), float(rope.scale))


class _Getter:
    """Metadata of the right type; a wrong type is a problem of the report."""

    def __init__(self, metadata: Metadata, report: Report):
        self.metadata, self.report = metadata, report

    def size(self, key: str) -> int | None:
        """A positive integer; an array with one value for all layers is accepted."""
        value = self.metadata.get(key)
        if isinstance(value, np.ndarray) and len(value) and (value == value[0]).all():
            value = value[0].item()
        if value is None or (type(value) is int and 0 < value < 1 << 31):
            return value
        if isinstance(value, np.ndarray):
            self.report.problem(f"{key} differs between layers, which is not supported")
        else:
            self.report.problem(f"{key}={short(value)} is not a positive number")
        return None

    def number(self, key: str) -> float | None:
        """A positive float32, from :func:`_decimal`."""
        value = self.metadata.get(key)
        if value is None:
            return None
        if not sources.is_number(value):
            self.report.problem(f"{key}={short(value)} is not a positive number")
            return None
        return _decimal(value)


def _parse_scaling(get: _Getter) -> dict[str, Any]:
    """Scaling of the rotary frequencies by metadata, as `rope` of our config."""
    factor = get.number(f"{_SCALING}factor") or get.number("llama.rope.scale_linear")
    kind = get.metadata.get(f"{_SCALING}type", "none" if factor in (None, 1.0) else "linear")
    if not isinstance(kind, str) or kind not in ("none", "linear", "yarn"):
        get.report.problem(f"{_SCALING}type={short(kind)} is not supported")
        return {}
    if kind == "none":
        return {"type": "default"}
    if kind == "linear":
        return {"type": "linear", "factor": factor or 1.0}
    fields: dict[str, Any] = {"type": "yarn", "factor": factor or 1.0}
    original = get.size(f"{_SCALING}original_context_length") or get.size(_SIZES["context"])
    fields["original_context"] = original
    for name in ("beta_fast", "beta_slow"):
        if (value := get.number(f"{_SCALING}yarn_{name}")) is not None:
            fields[name] = value
    if (scale := get.number(f"{_SCALING}attn_factor")) not in (None, 1.0):
        fields["attention_factor"] = scale * _yarn_scale(fields["factor"])
    return fields


def _yarn_scale(factor: float) -> float:
    """The factor on cos and sin that llama.cpp computes."""
    return 0.1 * math.log(factor) + 1.0


def rope_factors(cfg: ModelConfig) -> np.ndarray:
    """The content of :data:`ROPE_FREQS`: default frequencies divided by those of the model."""
    default = sources.replace(cfg, rope=RopeConfig(theta=cfg.rope.theta))
    return (_frequencies(default) / _frequencies(cfg))[:-1].astype(np.float32)


def _with_rope_freqs(
    cfg: ModelConfig, tensor: GgufTensor, own: RopeConfig | None, report: Report
) -> ModelConfig:
    """The model with scaling of type llama3 whose frequencies are those of the file."""
    if tensor.type.name != "F32" or tensor.shape != (cfg.head_dim // 2,):
        report.problem(
            f"{ROPE_FREQS} is {tensor.type.name} {list(tensor.shape)}, expected F32 "
            f"[{cfg.head_dim // 2}]"
        )
    if cfg.rope.type != "default":
        report.problem(f"it has {ROPE_FREQS} and scaling of type {cfg.rope.type!r}: not supported")
    report.raise_problems()
    factors = np.fromfile(tensor.path, "<f4", tensor.shape[0], offset=tensor.offset)
    if not (np.isfinite(factors).all() and (factors >= 1).all()):
        report.problem(f"{ROPE_FREQS} holds factors that are not at least 1: damaged")
        report.raise_problems()
    if (factors == 1).all():
        return cfg
    candidates = _llama3_candidates(cfg, factors)
    for rope in [own] * (own is not None and own.type == "llama3") + candidates:
        scaled = sources.replace(cfg, rope=rope)
        if np.allclose(rope_factors(scaled), factors, rtol=1e-5):
            return scaled
    report.problem(
        f"{ROPE_FREQS} holds factors that Llama 3's rule does not give for any factor and original "
        "context: not supported"
    )
    report.raise_problems()
    return cfg


def _llama3_candidates(cfg: ModelConfig, factors: np.ndarray) -> list[RopeConfig]:
    """Settings of llama3 that may give these factors, the likeliest first."""
    factor, theta = _decimal(factors.max()), cfg.rope.theta

    def rope(original: int, high: float) -> RopeConfig:
        return RopeConfig(
            type="llama3", theta=theta, factor=factor, original_context=original,
            low_freq_factor=1.0, high_freq_factor=high,
        )  # fmt: skip

    found = [rope(n, 4.0) for n in (8192, cfg.context, *(1 << i for i in range(4, 21)))]
    # Between the two limits, 1 / factors is linear in the frequency; with low = 1, the line gives
    # the other two settings.
    exponents = np.arange(0, cfg.head_dim, 2, dtype=np.float64) / cfg.head_dim
    smooth = (1 / factors.astype(np.float64) - 1 / factor) / (1 - 1 / factor)
    inside = (smooth > 1e-4) & (smooth < 1 - 1e-4)
    if inside.sum() >= 2:
        per_turn = theta ** -exponents[inside] / (2 * math.pi)
        slope, offset = np.polyfit(per_turn, smooth[inside], 1)
        if slope > 0 > offset:
            high = round(1 - 1 / offset, 3)
            found.append(rope(max(1, round(slope * (high - 1))), high))
    return found


def _decimal(value: Any) -> float:
    """The shortest decimal number that gives the bits of a float32."""
    return float(str(np.float32(value)))


# Writing ------------------------------------------------------------------------------------------


def check_writable(cfg: ModelConfig) -> None:
    """Raise :class:`ConvertError` if a model has no counterpart in GGUF."""
    rope = cfg.rope
    if rope.type == "dynamic":
        raise ConvertError("rope type 'dynamic' has no counterpart in GGUF")
    if rope.type == "yarn" and rope.truncate is False:
        raise ConvertError("rope.truncate=false has no counterpart in GGUF")


def make(cfg: ModelConfig) -> Metadata:
    """Metadata of a model, without its tokenizer."""
    sizes: Metadata = {key: getattr(cfg, name) for name, key in _SIZES.items()}
    out = {"general.architecture": "llama", "llama.vocab_size": cfg.vocab_size} | sizes
    out |= {_EPS: cfg.norm_eps, _THETA: cfg.rope.theta, _ROTARY: cfg.head_dim}
    if cfg.head_dim * cfg.num_heads != cfg.dim:
        out |= {_KEY: cfg.head_dim, _VALUE: cfg.head_dim}
    rope = normalized(cfg).rope
    fields = {k: v for k, v in to_dict(rope).items() if v is not None}
    if rope.type != "default":
        out[_OWN] = json.dumps(fields)
    if rope.type in ("linear", "yarn"):
        out |= {f"{_SCALING}type": rope.type, f"{_SCALING}factor": fields["factor"]}
    if rope.type == "yarn":
        out[f"{_SCALING}original_context_length"] = fields["original_context"]
        for name in ("beta_fast", "beta_slow"):
            if name in fields:
                out[f"{_SCALING}yarn_{name}"] = fields[name]
        if {"attention_factor", "mscale"} & fields.keys():
            scale = _frequencies(cfg)[-1].item() / _yarn_scale(fields["factor"])
            out[f"{_SCALING}attn_factor"] = scale
    return out
