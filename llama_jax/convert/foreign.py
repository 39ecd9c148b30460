"""Other people's settings: Meta's ``params.json``, Hugging Face's ``config.json`` (v4 and v5).

In comes a parsed file; out comes our :class:`~llama_jax.config.ModelConfig` with remarks for the
user, or the other way. What changes the computation in a way that we cannot reproduce is refused
by name; what we do not know is named.

    python -m llama_jax.convert --inspect PATH
"""

import math
from typing import Any

from llama_jax import config as cf
from llama_jax.config import MODELS, ModelConfig
from llama_jax.convert.formats import short, some


class SettingsError(ValueError):
    """Settings that we cannot reproduce; the message lists every reason."""


def _read(tree: dict[str, Any], problems: list[str], where: str) -> ModelConfig:
    """A checked config, with what pydantic finds added to what the caller found."""
    cfg = None
    try:
        cfg = cf.check_model(tree, where)
    except cf.ConfigError as e:
        problems += str(e).splitlines()
    except RecursionError:
        problems.append(f"{where} is damaged: nested too deeply")
    if cfg is None or problems:
        raise SettingsError("\n".join(problems))
    return cfg


def settled(cfg: ModelConfig) -> ModelConfig:
    """The same model with the context before scaling written out, to compare two of them."""
    if cfg.rope.type not in ("llama3", "yarn", "dynamic") or cfg.rope.original_context:
        return cfg
    rope = cf.to_dict(cfg.rope) | {"original_context": cfg.context}
    return cf.check_model(cf.to_dict(cfg) | {"rope": rope}, "model")


# --- Hugging Face ---

# ours -> theirs, inside rope_parameters (v5) and rope_scaling (v4)
_ROPE = {
    "factor": "factor",
    "original_context": "original_max_position_embeddings",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
    "attention_factor": "attention_factor",
    "mscale": "mscale",
    "mscale_all_dim": "mscale_all_dim",
    "truncate": "truncate",
}
_SIZES = {
    "vocab_size": "vocab_size",
    "dim": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "ffn_dim": "intermediate_size",
    "norm_eps": "rms_norm_eps",
}
# Keys that are read elsewhere, or say nothing about the weights or the forward pass.
_SILENT = {
    "architectures", "model_type", "torch_dtype", "dtype", "bos_token_id", "eos_token_id",
    "pad_token_id", "unk_token_id", "sep_token_id", "cls_token_id", "decoder_start_token_id",
    "use_cache", "initializer_range", "transformers_version", "_name_or_path", "pretraining_tp",
    "output_attentions", "output_hidden_states", "return_dict", "num_key_value_heads", "head_dim",
    "max_position_embeddings", "tie_word_embeddings", "rope_theta", "rope_scaling",
    "rope_parameters", "original_max_position_embeddings", "max_sequence_length", "auto_map",
    # dropout, in training alone
    "attention_dropout", "hidden_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop",
    # settings of generation and of other tasks, which old releases wrote into config.json
    "temperature", "top_k", "top_p", "do_sample", "max_length", "min_length", "num_beams",
    "repetition_penalty", "length_penalty", "id2label", "label2id", "problem_type",
    "is_encoder_decoder", "is_decoder", "tie_encoder_decoder", "chunk_size_feed_forward",
    "task_specific_params", "finetuning_task", "torchscript", "max_window_layers",
    "attn_implementation", "_attn_implementation", "unsloth_fixed", "unsloth_version",
}  # fmt: skip
# Keys of LLaMA's relatives that change the computation, and their values that do not. None, which
# is no value, never does. Lists: see _plain_list.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"), "attention_bias": (False,), "mlp_bias": (False,),
    "attention_out_bias": (False,), "qkv_bias": (False,), "bias": (False,), "use_bias": (False,),
    "lm_head_bias": (False,),
    "quantization_config": ({},), "compression_config": ({},), "quantization": ({},),
    "sliding_window": (), "use_sliding_window": (False,), "attention_chunk_size": (),
    "layer_types": (), "no_rope_layers": (), "no_rope_layer_interval": (0,),
    "partial_rotary_factor": (1,), "rotary_pct": (1,), "rope_interleaved": (False,),
    "attn_logit_softcapping": (), "final_logit_softcapping": (), "logit_softcapping": (),
    "attn_temperature_tuning": (False, 0), "attention_sinks": (False, 0),
    "embedding_multiplier": (1,), "residual_multiplier": (1,), "logits_scaling": (1,),
    "logit_scale": (1,), "scale_emb": (1,), "scale_depth": (), "embedding_scale": (1,),
    "attention_multiplier": (), "query_pre_attn_scalar": (), "dim_model_base": (),
    "use_qk_norm": (False,), "qk_norm": (False,), "qk_layernorm": (False,), "clip_qkv": (),
    "parallel_attn": (False,), "use_parallel_residual": (False,), "alibi": (False,),
    "num_experts": (0, 1), "num_local_experts": (0, 1), "n_routed_experts": (0, 1),
    "num_nextn_predict_layers": (0,), "kv_lora_rank": (), "q_lora_rank": (),
}  # fmt: skip


def _unlike_llama(config: dict[str, Any], where: str) -> list[str]:
    """Settings that make the model compute something else than LLaMA does."""
    heads, width = config.get("num_attention_heads"), config.get("hidden_size")
    head_dim = config.get("head_dim") or (width // heads if heads else 0)
    layers = config.get("num_hidden_layers") or 0
    # Values that say in other words what LLaMA does anyway.
    same = {
        "attention_multiplier": head_dim**-0.5 if head_dim else None,
        "query_pre_attn_scalar": head_dim,
        "scale_depth": math.sqrt(layers),
        "dim_model_base": width,
    }
    problems = []
    for key, plain in _NEUTRAL.items():
        value = config.get(key)
        if value is None or any(value is p or _equal(value, p) for p in plain):
            continue
        if _equal(value, same.get(key)) or _plain_list(key, value):
            continue
        problems.append(f"{where}: {key}={short(value)} is not supported")
    return problems


def _equal(value: Any, plain: Any) -> bool:
    if isinstance(value, bool) or isinstance(plain, bool):
        return value is plain
    if isinstance(value, int | float) and isinstance(plain, int | float):
        return math.isclose(value, plain, rel_tol=1e-6)
    return type(value) is type(plain) and value == plain


def _plain_list(key: str, value: Any) -> bool:
    """Whether a setting of each layer says the usual for all of them."""
    usual = {"layer_types": ("full_attention",), "no_rope_layers": (1, True)}.get(key)
    return usual is not None and isinstance(value, list) and all(v in usual for v in value)


def _flag(config: dict[str, Any], key: str, where: str, problems: list[str]) -> bool:
    """A setting that is true or false; absent is false."""
    if (value := config.get(key)) is not None and not isinstance(value, bool):
        problems.append(f"{where}: {key}={short(value)} is neither true nor false")
    return bool(value)


def model_from_hf(config: dict[str, Any], where: str) -> tuple[ModelConfig, list[str]]:
    """Our config and remarks; raises :class:`SettingsError` with every unsupported feature of
    ``config.json``."""
    problems, remarks = [], []
    if (kind := config.get("model_type")) != "llama":
        problems.append(f"{where}: model_type={short(kind)} is not supported, only 'llama'")
    if config.get("architectures") not in (None, ["LlamaForCausalLM"]):
        given = short(config["architectures"])
        problems.append(f"{where}: architectures={given} is not ['LlamaForCausalLM']")
    if unknown := set(config) - _SILENT - set(_SIZES.values()) - set(_NEUTRAL):
        remarks.append(f"{where}: ignored {some(sorted(unknown))}")
    tied = _flag(config, "tie_word_embeddings", where, problems)
    tree = {ours: config.get(theirs) for ours, theirs in _SIZES.items()}
    numbers = [*_SIZES.values(), "num_key_value_heads", "head_dim", "max_position_embeddings"]
    bad = _not_numbers(config, numbers, where)
    bad += [f"{where}: {_SIZES[k]} is missing" for k, v in tree.items() if v is None]
    problems += bad or _unlike_llama(config, where)
    if problems:
        raise SettingsError("\n".join(problems))
    heads = config["num_attention_heads"]
    context = config.get("max_position_embeddings")
    if context is None:
        context = 2048  # what transformers' LlamaConfig assumes
        remarks.append(
            f"{where}: max_position_embeddings is missing; took 2048, as transformers does"
        )
    tree |= dict(
        num_kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or config["hidden_size"] // heads,
        context=context,
        tie_embeddings=tied,
        rope=_rope_from_hf(config, context, where, problems, remarks),
    )
    return _read(tree, problems, where), list(dict.fromkeys(remarks))


def _rope_from_hf(
    config: dict[str, Any], context: int, where: str, problems: list[str], remarks: list[str]
) -> dict[str, Any]:
    """`rope` of our config from either schema; both may be present if they agree."""
    top = config.get("rope_theta")
    read = []
    for key in ("rope_parameters", "rope_scaling"):  # v5, v4
        if given := config.get(key):
            if not isinstance(given, dict) or any(isinstance(v, dict) for v in given.values()):
                problems.append(
                    f"{where}: {key}={short(given)} is not supported: one flat table expected"
                )
                return {}
            theta = given.get("rope_theta", top)
            read.append(
                _rope_fields(given, theta, config, context, f"{where}: {key}", problems, remarks)
            )
    if not read:
        read = [{"type": "default", "theta": top}]
    if top is not None and "rope_parameters" in config:  # transformers 4 reads theta here,
        read.append(read[0] | {"theta": top})
        if config.get("rope_scaling", True) is None:  # and no scaling
            read.append({"type": "default", "theta": top})
    if any(fields != read[0] for fields in read):
        problems.append(
            f"{where}: rope_parameters, which transformers 5 reads, and rope_theta with "
            "rope_scaling, "
            f"which 4 reads, disagree: {short(config.get('rope_parameters'))} against {short(top)} "
            f"with {short(config.get('rope_scaling'))}"
        )
    if read[0]["theta"] is None:
        read[0]["theta"] = 10000.0  # the default of transformers' LlamaConfig
        remarks.append(f"{where}: rope_theta is missing; took 10000, as transformers does")
    if not _number(read[0]["theta"]):
        problems.append(f"{where}: rope_theta={short(read[0]['theta'])} is not a number")
        return {}
    return read[0] | {"theta": float(read[0]["theta"])}


def _rope_fields(
    given: dict[str, Any], theta: Any, config: dict[str, Any], context: int, where: str,
    problems: list[str], remarks: list[str],
) -> dict[str, Any]:  # fmt: skip
    kind = given.get("rope_type", given.get("type", "default"))
    fields = {
        ours: given[theirs] for ours, theirs in _ROPE.items() if given.get(theirs) is not None
    }
    if kind not in ("default", "linear", "dynamic", "llama3", "yarn"):
        problems.append(f"{where}: rope type {short(kind)} is not supported")
        return {"type": kind, "theta": theta}
    unset = {k: v or None for k, v in given.items()}  # transformers takes 0 for unset as well
    if bad := _not_numbers(unset, [k for k in _ROPE.values() if k != "truncate"], where):
        problems += bad
        return {"type": kind, "theta": theta}
    plain = {"rope_type", "type", "rope_theta", "finetuned", *_ROPE.values()}
    if given.get("partial_rotary_factor", 1.0) == 1.0:
        plain.add("partial_rotary_factor")
    if unknown := set(given) - plain:
        problems.append(f"{where}: {some(sorted(unknown))} is not supported")
    if kind in ("llama3", "yarn"):
        # transformers 5: the key beside the table wins, then the one inside, then the context.
        beside = config.get("original_max_position_embeddings")
        if beside is not None and not _number(beside):
            problems.append(
                f"original_max_position_embeddings={short(beside)} is not a positive number"
            )
            return {"type": kind, "theta": theta}
        fields["original_context"] = beside or fields.get("original_context") or context
    elif fields.pop("original_context", None):
        remarks.append(
            f"{where}: {kind} does not use original_max_position_embeddings, as in transformers"
        )
    if kind == "yarn":
        original = fields["original_context"]
        fields.setdefault("factor", context / original)
        if fields["factor"] != context / original:
            remarks.append(
                f"{where}: factor={fields['factor']} is not max_position_embeddings / original, "
                f"{context / original}; "
                "took the factor, as transformers 5 (some releases of 4 take the ratio)"
            )
        for key in ("beta_fast", "beta_slow"):
            if not fields.get(key, 1):
                del fields[key]
        # The two are used together or not at all.
        if not (fields.get("mscale") and fields.get("mscale_all_dim")):
            fields.pop("mscale", None), fields.pop("mscale_all_dim", None)
    whole = ("original_context", "truncate")
    fields = {k: v if k in whole or type(v) is not int else float(v) for k, v in fields.items()}
    return {"type": kind, "theta": theta, **fields}


def hf_from_model(cfg: ModelConfig, dtype: str, ids: dict[str, Any]) -> dict[str, Any]:
    """``config.json`` that transformers 4 and 5 both read; raises :class:`SettingsError` for
    what neither can say."""
    rope = cfg.rope
    if rope.type == "dynamic" and rope.original_context not in (None, cfg.context):
        raise SettingsError(
            f"rope.original_context={rope.original_context} with type 'dynamic' has no counterpart "
            "in transformers, "
            f"which scales from max_position_embeddings (model.context={cfg.context})"
        )
    fields = {theirs: getattr(rope, ours) for ours, theirs in _ROPE.items()}
    if rope.type == "dynamic":
        fields["original_max_position_embeddings"] = None
    elif rope.type in ("llama3", "yarn"):
        fields["original_max_position_embeddings"] = rope.original_context or cfg.context
    scaling = {"rope_type": rope.type} | {k: v for k, v in fields.items() if v is not None}
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **{theirs: getattr(cfg, ours) for ours, theirs in _SIZES.items()},
        "num_key_value_heads": cfg.num_kv_heads,
        "head_dim": cfg.head_dim,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "max_position_embeddings": cfg.context,
        "tie_word_embeddings": cfg.tie_embeddings,
        "rope_theta": rope.theta,
        "rope_scaling": None if rope.type == "default" else scaling,
        "rope_parameters": {"rope_theta": rope.theta, **scaling},
        "bos_token_id": ids.get("bos"),
        "eos_token_id": ids.get("eos"),
        "pad_token_id": ids.get("pad"),
        "initializer_range": 0.02,
        "use_cache": True,
        "torch_dtype": dtype,
        "dtype": dtype,
    }


# --- Meta ---

_PARAMS = {
    "dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "multiple_of", "ffn_dim_multiplier",
    "norm_eps", "rope_theta", "use_scaled_rope", "rope_scaling_factor", "rope_high_freq_factor",
}  # fmt: skip
_NO_NUMBERS = {"use_scaled_rope", "vocab_size"}
_PARAMS_SILENT = {"max_seq_len", "max_batch_size", "model_parallel_size"}
_PARAMS_FALSE = {"use_qk_norm", "attn_temperature_tuning", "bias"}
"""settings of later models of Meta's, which change the computation unless they are false"""
_LLAMA_32 = [MODELS["llama3.2-1b"], MODELS["llama3.2-3b"]]


def ffn_width(dim: int, multiple_of: int, multiplier: float | None) -> int:
    """Meta's feed-forward width: 2/3 of 4 D, times the multiplier, rounded up to `multiple_of`."""
    width = int(2 * (4 * dim) / 3)
    if multiplier is not None:
        width = int(multiplier * width)
    return multiple_of * ((width + multiple_of - 1) // multiple_of)


def model_from_meta(
    params: dict[str, Any], rows: int, tied: bool, half: bool, where: str
) -> tuple[ModelConfig, list[str]]:
    """Our config and remarks from ``params.json``, the embedding's rows V, whether there is no
    output matrix, and whether the weights are float16; raises :class:`SettingsError`."""
    problems, remarks = [], []
    params = {k: v for k, v in params.items() if v is not None}
    for key in ("quantization_args", "lora_args"):
        if key in params:
            problems.append(
                f"{where}: {key} is not supported: the weights are quantised or incomplete"
            )
    other = [k for k in params if k.startswith(("vision_", "moe"))]
    problems += [f"{where}: {k[:100]} is not supported" for k in other]
    problems += [f"{where}: {k}=true is not supported" for k in _PARAMS_FALSE if params.get(k)]
    if unknown := set(params) - _PARAMS - _PARAMS_SILENT - _PARAMS_FALSE - set(other):
        remarks.append(f"{where}: ignored {some(sorted(unknown))}")
    scaled = _flag(params, "use_scaled_rope", where, problems)
    needs = ("dim", "n_layers", "n_heads", "norm_eps", "multiple_of")
    problems += [f"{where}: {k} is missing" for k in needs if k not in params]
    problems += _not_numbers(params, [k for k in _PARAMS if k not in _NO_NUMBERS], where)
    if problems:
        raise SettingsError("\n".join(problems))
    dim, heads = params["dim"], params["n_heads"]
    if dim % heads:
        raise SettingsError(f"{where}: dim={dim} is not a multiple of n_heads={heads}")
    vocab = params.get("vocab_size", -1)
    if vocab not in (-1, rows):
        problems.append(f"{where}: vocab_size={short(vocab)}, but the embedding has {rows} rows")
    tree = dict(
        vocab_size=rows,
        dim=dim,
        num_layers=params["n_layers"],
        num_heads=heads,
        num_kv_heads=params.get("n_kv_heads") or heads,
        head_dim=dim // heads,
        ffn_dim=ffn_width(dim, params["multiple_of"], params.get("ffn_dim_multiplier")),
        norm_eps=float(params["norm_eps"]),
        tie_embeddings=tied,
        rope={"type": "default", "theta": float(params.get("rope_theta", 10000.0))},
    )
    small = any(
        all(getattr(m, k) == tree[k] for k in ("dim", "num_layers", "num_heads")) for m in _LLAMA_32
    )
    if scaled:
        factor = params.get("rope_scaling_factor") or (32.0 if small else 8.0)
        if "rope_scaling_factor" not in params:
            why = "the size is that of Llama 3.2" if small else "as Llama 3.1 and 3.3"
            remarks.append(f"rope scaling factor {factor:g}: {why}; {where} does not say")
        tree["rope"] |= dict(
            type="llama3", factor=float(factor), low_freq_factor=1.0, original_context=8192,
            high_freq_factor=float(params.get("rope_high_freq_factor") or 4.0),
        )  # fmt: skip
    family, context = _family(tree, scaled, half)
    remarks.append(
        f"context {context}: taken for {family}; {where} does not say (--context overrides)"
    )
    if family == "Llama 2" and tree["norm_eps"] == 1e-6:
        remarks.append(
            f"{where}: norm_eps=1e-6 in a Llama 2; early Llama-2-7B-chat shipped it by mistake "
            "(later 1e-5); kept"
        )
    return _read(tree | {"context": context}, problems, where), remarks


def _not_numbers(tree: dict[str, Any], keys: list[str], where: str) -> list[str]:
    given = [k for k in keys if tree.get(k) is not None and not _number(tree[k])]
    return [f"{where}: {k}={short(tree[k])} is not a positive number" for k in given]


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1e12


def _family(tree: dict[str, Any], scaled: bool, half: bool) -> tuple[str, int]:
    """Whose weights these probably are and the context they were trained with; params.json does
    not say."""
    theta = tree["rope"]["theta"]
    if scaled:
        return "Llama 3.1 or later", 131072
    if theta == 5e5:
        return "Llama 3", 8192
    if theta == 1e6:
        return "Code Llama", 16384
    # float16 is LLaMA 1's, bfloat16 came with Llama 2; 33B and 65B are LLaMA 1, 70B Llama 2.
    first = {(4096, 32), (5120, 40), (6656, 60), (8192, 80)}
    shape = (tree["dim"], tree["num_layers"])
    if tree["num_kv_heads"] != tree["num_heads"] or (shape in first and not half):
        return "Llama 2", 4096
    if shape in first and (shape[0] > 5120 or tree["norm_eps"] < 1e-5):
        return "LLaMA 1", 2048
    return ("Llama 2", 4096) if shape in first else ("an unknown family, as LLaMA 1", 2048)


def meta_from_model(cfg: ModelConfig) -> tuple[dict[str, Any], list[str]]:
    """``params.json`` and remarks; raises :class:`SettingsError` for what Meta's code cannot
    say."""
    problems, remarks = [], []
    rope = settled(cfg).rope
    if rope.type not in ("default", "llama3"):
        problems.append(f"rope type {rope.type!r} has no counterpart in params.json")
    if rope.type == "llama3" and (rope.low_freq_factor != 1.0 or rope.original_context != 8192):
        problems.append(
            f"params.json cannot say low_freq_factor={rope.low_freq_factor}, "
            f"original_context={rope.original_context} "
            "(Meta's code has 1 and 8192)"
        )
    if cfg.head_dim * cfg.num_heads != cfg.dim:
        problems.append(
            f"Meta's code needs head_dim * num_heads = dim: {cfg.head_dim} * {cfg.num_heads} is "
            f"not {cfg.dim}"
        )
    if problems:
        raise SettingsError("\n".join(f"cannot write Meta's layout: {p}" for p in problems))
    multiple, multiplier = _ffn_settings(cfg.dim, cfg.ffn_dim)
    params: dict[str, Any] = {"dim": cfg.dim, "n_layers": cfg.num_layers, "n_heads": cfg.num_heads}
    if cfg.num_kv_heads != cfg.num_heads:
        params["n_kv_heads"] = cfg.num_kv_heads
    params |= {"vocab_size": cfg.vocab_size, "multiple_of": multiple}
    if multiplier is not None:
        params["ffn_dim_multiplier"] = multiplier
    params |= {"norm_eps": cfg.norm_eps, "rope_theta": rope.theta}
    if rope.type == "llama3":
        params["use_scaled_rope"] = True
        small = any(m.dim == cfg.dim and m.num_layers == cfg.num_layers for m in _LLAMA_32)
        if rope.factor != (32.0 if small else 8.0):
            params["rope_scaling_factor"] = rope.factor
        if rope.high_freq_factor != 4.0:
            params["rope_high_freq_factor"] = rope.high_freq_factor
    remarks.append(f"params.json cannot say the context ({cfg.context}); manifest.json does")
    return params, remarks


def _ffn_settings(dim: int, ffn_dim: int) -> tuple[int, float | None]:
    """`multiple_of` and `ffn_dim_multiplier` that make this width: the published ones, else an
    exact multiplier."""
    # 1.3 and 4096 (70B) before the exact fallback; a multiple of 1 with a multiplier always works.
    for multiple in (256, 1024, 4096, 64, 32, 16, 8, 4, 2, 1):
        for multiplier in (None, 1.3, 1.5, 1.0, 1.2):
            if ffn_width(dim, multiple, multiplier) == ffn_dim:
                return multiple, multiplier
    base = int(2 * (4 * dim) / 3)
    multiplier = (ffn_dim + 0.5) / base
    assert ffn_width(dim, 1, multiplier) == ffn_dim
    return 1, multiplier
