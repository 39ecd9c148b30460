"""Hugging Face folders: ``config.json`` of transformers 4 and 5, and ``model*.safetensors`` or
``pytorch_model*.bin``.

Settings that change the computation in a way that the model does not implement are refused by name;
unknown settings are named in a warning.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from llama_jax.config import ModelConfig, RopeConfig
from llama_jax.convert import formats, sources, torch_files
from llama_jax.convert.formats import ConvertError, TensorSlice, first_names, raise_if_any, short
from llama_jax.convert.sources import CheckpointWriter, ModelFolder, Report, SourceCheckpoint
from llama_jax.convert.tensors import Shard, TorchWeights, layer_tensors
from llama_jax.data import tokenizer_files
from llama_jax.io import atomic_write

# Settings -----------------------------------------------------------------------------------------

# our names -> theirs, inside rope_parameters (v5) and rope_scaling (v4)
_ROPE = {
    name: "original_max_position_embeddings" if name == "original_context" else name
    for name in RopeConfig.__dataclass_fields__
    if name not in ("theta", "type")
}
_SIZES = {
    "vocab_size": "vocab_size", "dim": "hidden_size", "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads", "ffn_dim": "intermediate_size", "norm_eps": "rms_norm_eps",
}  # fmt: skip
# Keys that are read elsewhere, or do not affect the weights or the forward pass.
_IRRELEVANT = {
    "architectures", "model_type", "torch_dtype", "dtype", "bos_token_id", "eos_token_id",
    "pad_token_id", "unk_token_id", "sep_token_id", "cls_token_id", "decoder_start_token_id",
    "use_cache", "initializer_range", "transformers_version", "_name_or_path", "pretraining_tp",
    "output_attentions", "output_hidden_states", "return_dict", "num_key_value_heads", "head_dim",
    "max_position_embeddings", "tie_word_embeddings", "rope_theta", "rope_scaling",
    "rope_parameters", "original_max_position_embeddings", "max_sequence_length", "auto_map",
    # dropout, which only training uses
    "attention_dropout", "hidden_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop",
    # settings of generation and of other tasks, which old releases wrote into config.json
    "temperature", "top_k", "top_p", "do_sample", "max_length", "min_length", "num_beams",
    "repetition_penalty", "length_penalty", "id2label", "label2id", "problem_type",
    "is_encoder_decoder", "is_decoder", "tie_encoder_decoder", "chunk_size_feed_forward",
    "task_specific_params", "finetuning_task", "torchscript", "max_window_layers",
    "attn_implementation", "_attn_implementation", "unsloth_fixed", "unsloth_version",
}  # fmt: skip
# Keys of models related to LLaMA that change the computation, and their values that do not. An
# absent value (None) never does. For lists, see _is_usual_list.
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


def _refuse_other_models(config: dict[str, Any], report: Report) -> None:
    """Settings with which the model computes something other than LLaMA."""
    heads, width = config["num_attention_heads"], config["hidden_size"]
    head_dim = config.get("head_dim") or width // heads
    # Values that LLaMA uses implicitly.
    implicit = {
        "attention_multiplier": head_dim**-0.5 if head_dim else None,
        "query_pre_attn_scalar": head_dim,
        "scale_depth": math.sqrt(config["num_hidden_layers"]),
        "dim_model_base": width,
    }
    for key, neutral in _NEUTRAL.items():
        value = config.get(key)
        allowed = (None, *neutral, implicit.get(key))
        if not any(_equal(value, a) for a in allowed) and not _is_usual_list(key, value):
            report.problem(f"{key}={short(value)} is not supported")


def _equal(value: Any, other: Any) -> bool:
    if all(type(v) in (int, float) for v in (value, other)):
        return math.isclose(value, other, rel_tol=1e-6)
    return type(value) is type(other) and value == other


def _is_usual_list(key: str, value: Any) -> bool:
    """Whether a list of settings per layer has LLaMA's value for every layer."""
    usual = {"layer_types": ("full_attention",), "no_rope_layers": (1, True)}.get(key)
    return usual is not None and isinstance(value, list) and all(v in usual for v in value)


def parse_config(config: dict[str, Any], where: str) -> tuple[ModelConfig, list[str]]:
    """The model of a ``config.json``, and warnings.

    Raises:
      ConvertError: lists every setting that is not supported.
    """
    report = Report(where)
    if (kind := config.get("model_type")) != "llama":
        report.problem(f"model_type={short(kind)} is not supported, only 'llama'")
    if (given := config.get("architectures")) not in (None, ["LlamaForCausalLM"]):
        report.problem(f"architectures={short(given)} is not ['LlamaForCausalLM']")
    report.warn_unknown(set(config) - _IRRELEVANT - set(_SIZES.values()) - set(_NEUTRAL))
    tied = report.flag(config, "tie_word_embeddings")
    tree = {ours: config.get(theirs) for ours, theirs in _SIZES.items()}
    numbers = [*_SIZES.values(), "num_key_value_heads", "head_dim", "max_position_embeddings"]
    complete = report.check_numbers(config, numbers)
    for ours, value in tree.items():
        if value is None:
            report.problem(f"{_SIZES[ours]} is missing")
            complete = False
    if complete:
        _refuse_other_models(config, report)
    report.raise_problems()
    heads = config["num_attention_heads"]
    context = config.get("max_position_embeddings")
    if context is None:
        context = 2048  # the default of transformers' LlamaConfig
        report.warn("max_position_embeddings is missing; used 2048, as transformers does")
    tree |= dict(
        num_kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or config["hidden_size"] // heads,
        context=context,
        tie_embeddings=tied,
        rope=_parse_rope(config, context, report),
    )
    return report.model(tree), list(dict.fromkeys(report.warnings))


def _parse_rope(config: dict[str, Any], context: int, report: Report) -> dict[str, Any]:
    """`rope` of our config, from either schema; both may be present if they agree."""
    top = config.get("rope_theta")
    read = []
    for key in ("rope_parameters", "rope_scaling"):  # v5, v4
        if given := config.get(key):
            if not isinstance(given, dict) or any(isinstance(v, dict) for v in given.values()):
                report.problem(f"{key}={short(given)} is not supported: one flat table expected")
                return {}
            read.append(_parse_rope_table(given, key, top, config, context, report))
    if not read:
        read = [{"type": "default", "theta": top}]
    if top is not None and "rope_parameters" in config:  # transformers 4 reads theta here,
        read.append(read[0] | {"theta": top})
        if config.get("rope_scaling", True) is None:  # and no scaling
            read.append({"type": "default", "theta": top})
    if any(fields != read[0] for fields in read):
        report.problem(
            "rope_parameters, which transformers 5 reads, and rope_theta with rope_scaling, which "
            f"4 reads, disagree: {short(config.get('rope_parameters'))} against {short(top)} with "
            f"{short(config.get('rope_scaling'))}"
        )
    theta = read[0]["theta"]
    if theta is None:
        theta = 10000.0  # the default of transformers' LlamaConfig
        report.warn("rope_theta is missing; used 10000, as transformers does")
    if not sources.is_number(theta):
        report.problem(f"rope_theta={short(theta)} is not a number")
        return {}
    return read[0] | {"theta": float(theta)}


def _parse_rope_table(
    given: dict[str, Any], key: str, top: Any, config: dict[str, Any], context: int, report: Report
) -> dict[str, Any]:
    """`rope` of our config from the table `key`; `top` is the rope_theta beside it."""
    kind = given.get("rope_type", given.get("type", "default"))
    plain = {"type": kind, "theta": given.get("rope_theta", top)}
    fields = {o: given[theirs] for o, theirs in _ROPE.items() if given.get(theirs) is not None}
    if kind not in ("default", "linear", "dynamic", "llama3", "yarn"):
        report.problem(f"{key}: rope type {short(kind)} is not supported")
        return plain
    unset = {k: v or None for k, v in given.items()}  # transformers treats 0 as unset as well
    if not report.check_numbers(unset, [k for k in _ROPE.values() if k != "truncate"]):
        return plain
    known = {"rope_type", "type", "rope_theta", "finetuned", *_ROPE.values()}
    if given.get("partial_rotary_factor", 1.0) == 1.0:
        known.add("partial_rotary_factor")
    if unknown := set(given) - known:
        report.problem(f"{key}: {first_names(sorted(unknown))} is not supported")
    if kind in ("llama3", "yarn"):
        # transformers 5 prefers the key beside the table, then the one inside, then the context.
        beside = config.get("original_max_position_embeddings")
        if not report.check_numbers(config, ["original_max_position_embeddings"]):
            return plain
        fields["original_context"] = beside or fields.get("original_context") or context
    elif fields.pop("original_context", None):
        report.warn(f"{key}: {kind} does not use original_max_position_embeddings")
    if kind == "yarn":
        ratio = context / fields["original_context"]
        fields.setdefault("factor", ratio)
        if fields["factor"] != ratio:
            report.warn(
                f"{key}: factor={fields['factor']} is not max_position_embeddings / original, "
                f"{ratio}; used the factor, as transformers 5 (some releases of 4 use the ratio)"
            )
        for name in ("beta_fast", "beta_slow"):
            if not fields.get(name, 1):
                del fields[name]
        # transformers uses the two together or not at all.
        if not (fields.get("mscale") and fields.get("mscale_all_dim")):
            fields.pop("mscale", None), fields.pop("mscale_all_dim", None)
    for name, value in fields.items():
        if type(value) is int and name not in ("original_context", "truncate"):
            fields[name] = float(value)
    return plain | fields


def make_config(cfg: ModelConfig, dtype: str, token_ids: dict[str, Any]) -> dict[str, Any]:
    """``config.json`` that both transformers 4 and 5 read.

    Args:
      cfg: the model.
      dtype: name of the dtype of the weights.
      token_ids: bos, eos and pad, where known.

    Raises:
      ConvertError: the model has no counterpart in transformers.
    """
    rope = cfg.rope
    if rope.type == "dynamic" and rope.original_context not in (None, cfg.context):
        raise ConvertError(
            f"rope.original_context={rope.original_context} with type 'dynamic' has no counterpart "
            "in transformers, which scales from max_position_embeddings "
            f"(model.context={cfg.context})"
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
        **{f"{name}_token_id": token_ids.get(name) for name in ("bos", "eos", "pad")},
        "initializer_range": 0.02,
        "use_cache": True,
        "torch_dtype": dtype,
        "dtype": dtype,
    }


# Reader -------------------------------------------------------------------------------------------


def open_hf(path: Path, names: list[str]) -> SourceCheckpoint:
    """Open a Hugging Face folder that holds files of these names.

    Raises:
      ConvertError: the folder cannot be used; lists every reason.
    """
    where = path / "config.json"
    config = sources.read_settings(where)
    cfg, warnings = parse_config(config, str(where))
    slices, files = _find_tensors(path, names, warnings)
    untied = sources.replace(
        cfg, tie_embeddings=cfg.tie_embeddings and "lm_head.weight" not in slices
    )
    tensors = {t.hf_name: t for t in layer_tensors(untied)}
    shards = sources.find_shards(untied, tensors, {path: slices})
    if cfg != untied:
        if not sources.same_matrix(untied, shards["embed"], shards["unembed"]):
            raise ConvertError(
                f"{path}: config.json ties the embeddings, but lm_head.weight differs from "
                "model.embed_tokens.weight; set tie_word_embeddings to false if both are meant"
            )
        del shards["unembed"]
        warnings.append("lm_head.weight equals the embedding: tied")
    given = {name: config.get(f"{name}_token_id") for name in ("bos", "eos", "pad")}
    report = Report(str(where))
    token_ids = sources.check_token_ids(given, cfg.vocab_size, report)
    if (generation := path / "generation_config.json").exists():
        report.where = str(generation)
        given = {"eos": sources.read_settings(generation).get("eos_token_id")}
        token_ids |= sources.check_token_ids(given, cfg.vocab_size, report)
    warnings += report.warnings
    weights = TorchWeights(cfg, shards, interleaved=False)
    return SourceCheckpoint(
        "hf", path, cfg, weights, files, token_ids, tokenizer_files.find(path),
        sources.extras(path), warnings, sources.manifest_sha256(path, cfg),
    )  # fmt: skip


def _find_tensors(
    path: Path, names: list[str], warnings: list[str]
) -> tuple[dict[str, TensorSlice], list[Path]]:
    """Tensors of a folder by name, and its files. Every file of an index must exist and hold
    exactly the tensors that the index lists."""
    sets: list[tuple[str, Callable[[Path], dict[str, TensorSlice]]]] = [
        ("model.safetensors", formats.read_safetensors),
        ("pytorch_model.bin", torch_files.read),
    ]
    present = [(s, read) for s, read in sets if s in names or f"{s}.index.json" in names]
    if not present:
        raise ConvertError(
            f"{path} holds no model.safetensors, pytorch_model.bin, or index of one; found "
            f"{first_names(names)}"
        )
    stem, read = present[0]
    if len(present) > 1:
        warnings.append(f"used {stem}; ignored {present[1][0]}")
    if stem in names:
        return read(path / stem), [path / stem]
    index_path = path / f"{stem}.index.json"
    index = sources.read_settings(index_path, sources.MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(index, dict) or not all(isinstance(v, str) for v in index.values()):
        raise ConvertError(f"{index_path} has no weight_map")
    listed: dict[str, set[str]] = {file: set() for file in sorted(set(index.values()))}
    for name, file in index.items():
        listed[file].add(name)
    raise_if_any([
        f"{index_path} names {f[:200]!r}, which is outside the folder" for f in listed
        if f in ("", ".", "..") or "/" in f or "\\" in f
    ])  # fmt: skip
    absent = sorted(set(listed) - set(names))
    raise_if_any([f"{path}/{f} is missing, named by {stem}.index.json" for f in absent])
    tensors: dict[str, TensorSlice] = {}
    problems: list[str] = []
    for file, expected in listed.items():
        inside = read(path / file)
        for name in sorted(expected - set(inside)):
            problems.append(f"{path}/{file}: {name} is missing, listed by the index")
        for name in sorted(set(inside) - expected):
            problems.append(f"{path}/{file}: {name} is not listed by the index")
        tensors |= inside
    raise_if_any(problems)
    return tensors, [path / f for f in listed]


# Writer -------------------------------------------------------------------------------------------


def check_writable(cfg: ModelConfig, shards: int | None) -> None:
    """Raise :class:`ConvertError` if a model cannot be written to this number of files."""
    if shards is not None and shards > (count := len(layer_tensors(cfg))):
        raise ConvertError(f"--shards {shards}: the model has only {count} tensors")
    make_config(cfg, "float32", {})


def create_writer(
    folder: Path, cfg: ModelConfig, dtypes: dict[str, np.dtype], shards: int | None
) -> CheckpointWriter:
    """Create the files of a Hugging Face folder.

    Args:
      folder: where the files are made.
      cfg: the model.
      dtypes: dtype of each line of the table.
      shards: number of files; None: as many as keep each below 5 GB.
    """
    tensors = {t.hf_name: (t.torch_shape(cfg), dtypes[t.spec.path]) for t in layer_tensors(cfg)}
    sizes = {n: math.prod(shape) * d.itemsize for n, (shape, d) in tensors.items()}
    total = sum(sizes.values())
    count = shards or math.ceil(total / 5e9)
    headers: dict[Path, bytes] = {}
    slices: dict[str, TensorSlice] = {}
    for i, names in enumerate(_split_evenly(sizes, count), 1):
        file = "model.safetensors" if count == 1 else f"model-{i:05d}-of-{count:05d}.safetensors"
        planned = {n: tensors[n] for n in names}
        headers[folder / file], locations = formats.plan_safetensors(folder / file, planned)
        slices |= locations
    placed = {t.name: [Shard(slices[t.hf_name], 0, 0)] for t in layer_tensors(cfg)}
    weights = TorchWeights(cfg, placed, interleaved=False)
    for path, header in headers.items():
        data = sum(sizes[n] for n, location in slices.items() if location.path == path)
        weights.allocate(path, len(header) + data)

    def finish() -> None:
        for path, header in headers.items():
            weights.write_bytes(path, 0, header)
        weights.close()
        if count > 1:
            index = {
                "metadata": {"total_size": total, "total_parameters": cfg.num_params},
                "weight_map": {n: location.path.name for n, location in slices.items()},
            }
            content = json.dumps(index, indent=2) + "\n"
            atomic_write(folder / "model.safetensors.index.json", content.encode())

    return CheckpointWriter(weights, finish=finish)


def _split_evenly(sizes: dict[str, int], count: int) -> list[list[str]]:
    """Split names into groups of consecutive names with about equal total size, none empty."""
    total = sum(sizes.values())
    groups: list[list[str]] = [[] for _ in range(count)]
    before, k = 0, 0
    for i, (name, size) in enumerate(sizes.items()):
        ideal = int((before + size / 2) * count / total)
        least = count - (len(sizes) - i)  # no group may stay empty
        if groups[k] and k < max(ideal, least):
            k += 1
        groups[k].append(name)
        before += size
    return groups


def small_files(source: ModelFolder, dtype: str) -> tuple[dict[str, Any], list[str]]:
    """Settings and tokenizer files of a Hugging Face folder by name, without those that are copied
    from the source, and warnings; `dtype` names the dtype of the weights."""
    warnings = []
    ids = {f"{name}_token_id": value for name, value in source.token_ids.items()}
    files = {
        "config.json": make_config(source.cfg, dtype, source.token_ids),
        "generation_config.json": {"_from_model_config": True, **ids},
    }
    meta = next((t for t in source.tokenizers if t.kind != "tokenizer.json"), None)
    if meta is not None:
        exact = len(source.tokenizers) > 1  # the source has a tokenizer.json as well
        try:
            if not exact:
                newer = source.cfg.rope.type == "llama3"
                files["tokenizer.json"] = tokenizer_files.hf_json(meta, newer)
                exact = True
        except ValueError as e:
            warnings.append(
                f"wrote no tokenizer.json for {meta.path}: {e}; transformers may convert it to "
                "one that gives other ids"
            )
        settings = tokenizer_files.hf_settings(meta, source.cfg.context, exact)
        files["tokenizer_config.json"] = settings
    copied = {path.name for path in source.extras} | source.generated.keys()
    return {name: tree for name, tree in files.items() if name not in copied}, warnings
