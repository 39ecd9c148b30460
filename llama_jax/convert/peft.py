"""LoRA adapters in PEFT's format: ``adapter_config.json`` and ``adapter_model.safetensors``.

Settings that change the computation in a way that our adapters do not have are refused by name.
Matrices that PEFT does not adapt, and smaller ranks, are filled with zeros.
"""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from llama_jax.config import LoraConfig, ModelConfig
from llama_jax.config.model_config import FIELD_OF_LETTER
from llama_jax.convert import adapters, formats, huggingface, sources
from llama_jax.convert.adapters import MATRICES, Adapter, Pair, pair_shapes
from llama_jax.convert.formats import FLOATS, ConvertError, TensorSlice, first_names, short
from llama_jax.convert.sources import Report, SourceCheckpoint
from llama_jax.convert.tensors import LayerTensor
from llama_jax.data import tokenizer_files
from llama_jax.io import atomic_write, sha256

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_MAX_RANK = 1 << 16
_REGEX_SECONDS = 10
_TRANSFORMERS_TARGETS = ["q_proj", "v_proj"]
"""what PEFT adapts of a Llama if ``target_modules`` is null"""
# Keys that do not affect a trained adapter. The settings of an initialization are among them: those
# that change the base are refused by the value of init_lora_weights.
_IRRELEVANT = {
    "base_model_name_or_path", "revision", "auto_mapping", "peft_version", "inference_mode",
    "lora_dropout", "megatron_core", "qalora_group_size", "loftq_config", "eva_config",
    "corda_config", "lora_ga_config", "runtime_config", "ensure_weight_tying",
}  # fmt: skip
# Keys that are read.
_READ = {
    "peft_type", "r", "lora_alpha", "target_modules", "exclude_modules", "layers_to_transform",
    "layers_pattern", "rank_pattern", "alpha_pattern", "use_rslora",
}  # fmt: skip
# Keys that change the computation or the base, and their values that do not. An absent value (null)
# and an empty list or table never do.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "task_type": ("CAUSAL_LM",), "bias": ("none",), "lora_bias": (False,), "use_dora": (False,),
    "fan_in_fan_out": (False,), "modules_to_save": (), "trainable_token_indices": (),
    "target_parameters": (), "layer_replication": (), "use_qalora": (False,),
    "use_bdlora": (False,), "arrow_config": (), "alora_invocation_tokens": (),
    "velora_config": (), "kasa_config": (), "monteclora_config": (), "megatron_config": (),
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),
}  # fmt: skip


class Module(NamedTuple):
    """A matrix of one layer that PEFT adapts."""

    target: str
    layer: int
    rank: int
    alpha: float


def is_peft(path: Path) -> bool:
    """Whether a folder holds an adapter in PEFT's format."""
    return any((path / name).exists() for name in (CONFIG, WEIGHTS, "adapter_model.bin"))


def named_base(path: Path) -> str:
    """The base that an adapter names, for a message."""
    return short(sources.read_settings(path / CONFIG).get("base_model_name_or_path"))


# Settings -----------------------------------------------------------------------------------------


def _parse_config(config: dict[str, Any], cfg: ModelConfig, report: Report) -> dict[str, Module]:
    """The adapted matrices, by their name in transformers.

    Args:
      config: the content of ``adapter_config.json``.
      cfg: the base.
      report: receives problems and warnings.

    Raises:
      ConvertError: lists every setting that is not supported.
    """
    if (kind := config.get("peft_type")) != "LORA":
        report.problem(f"peft_type={short(kind)} is not supported, only 'LORA'")
        report.raise_problems()
    for key, neutral in _NEUTRAL.items():
        value = config.get(key)
        usual = any(type(value) is type(n) and value == n for n in (None, [], {}, *neutral))
        if not usual:
            report.problem(f"{key}={short(value)} is not supported")
    report.flag(config, "use_rslora")
    ranks, alphas = (_table(config, key, report) for key in ("rank_pattern", "alpha_pattern"))
    for key, value in [("r", config.get("r")), *ranks.items()]:
        if type(value) is not int or not 1 <= value <= _MAX_RANK:
            report.problem(f"{short(key)}: rank {short(value)} is not 1 to {_MAX_RANK}")
    for key, value in [("lora_alpha", config.get("lora_alpha")), *alphas.items()]:
        if not sources.is_number(value):
            report.problem(f"{short(key)}: alpha {short(value)} is not a positive number")
    _check_layers(config, report)
    report.warn_unknown(set(config) - _IRRELEVANT - _READ - set(_NEUTRAL))
    report.raise_problems()
    return _find_modules(config, ranks, alphas, cfg, report)


def _table(config: dict[str, Any], key: str, report: Report) -> dict[str, Any]:
    table = config.get(key) or {}
    if isinstance(table, dict):
        return table
    report.problem(f"{key}={short(table)} is not a table")
    return {}


def _check_layers(config: dict[str, Any], report: Report) -> None:
    """Settings that select modules must have the types that PEFT accepts."""
    for key in ("target_modules", "exclude_modules"):
        value = config.get(key)
        names = value if isinstance(value, list) else []
        if not isinstance(value, str | list | None) or not all(isinstance(n, str) for n in names):
            report.problem(f"{key}={short(value)} is neither text nor a list of names")
    layers = config.get("layers_to_transform")
    if layers in (None, []):
        return
    given = layers if isinstance(layers, list) else [layers]
    if not all(type(i) is int and i >= 0 for i in given):
        report.problem(f"layers_to_transform={short(layers)} is not a list of layers")
    if isinstance(config.get("target_modules"), str):
        report.problem("layers_to_transform needs a list of names in target_modules")
    if config.get("layers_pattern") not in (None, "", [], "layers", ["layers"]):
        report.problem(f"layers_pattern={short(config['layers_pattern'])} is not 'layers'")


def _find_modules(
    config: dict[str, Any],
    ranks: dict[str, Any],
    alphas: dict[str, Any],
    cfg: ModelConfig,
    report: Report,
) -> dict[str, Module]:
    """The matrices that PEFT's rules select, with the rank and alpha of each."""
    matrices = {
        f"model.layers.{i}.{spec.hf}": (target, i)
        for i in range(cfg.num_layers)
        for target, spec in MATRICES.items()
    }
    names = [*matrices, "model.embed_tokens", "lm_head"]
    targets = config.get("target_modules")
    targets = _TRANSFORMERS_TARGETS if targets is None else targets
    if isinstance(targets, str) and targets.lower() == "all-linear":
        targets = [*matrices]
    exclude = config.get("exclude_modules") or []
    under = [rf"(.*\.)?({key})$" for key in [*ranks, *alphas]]  # as PEFT matches patterns
    full = [p for p in (targets, exclude) if isinstance(p, str)]
    found = _match_patterns(
        [["fullmatch", p] for p in full] + [["match", p] for p in under], names, report
    )
    matched = lambda rule: (
        dict(zip(names, found.pop(0), strict=True)) if isinstance(rule, str)
        else {n: any(n == r or n.endswith(f".{r}") for r in rule) for n in names}
    )  # fmt: skip
    selected, excluded = matched(targets), matched(exclude)
    layers = config.get("layers_to_transform")
    layers = [layers] if type(layers) is int else layers or range(cfg.num_layers)
    in_layers = lambda n: n not in matrices or matrices[n][1] in layers
    chosen = [n for n in names if selected[n] and not excluded[n] and in_layers(n)]
    if other := [n for n in chosen if n not in matrices]:
        report.problem(f"an adapter of {first_names(other)} is not supported")
    if not chosen:
        report.problem(f"target_modules={short(targets)} selects no matrix of the base")
    report.raise_problems()
    place = {name: i for i, name in enumerate(names)}
    first = lambda table, rows, name, default: next(
        (value for value, row in zip(table.values(), rows, strict=True) if row[place[name]]),
        default,
    )
    return {
        name: Module(
            *matrices[name],
            first(ranks, found[: len(ranks)], name, config["r"]),
            float(first(alphas, found[len(ranks) :], name, config["lora_alpha"])),
        )
        for name in chosen
    }


_MATCH = """
import json, re, sys
patterns, names = json.load(sys.stdin)
out = []
for how, pattern in patterns:
    try:
        match = getattr(re.compile(pattern), how)
    except (re.error, OverflowError, RecursionError) as e:
        sys.exit(f"{pattern[:80]!r} is not a regular expression: {e}")
    out.append([bool(match(name)) for name in names])
json.dump(out, sys.stdout)
"""


def _match_patterns(
    patterns: list[list[str]], names: list[str], report: Report
) -> list[list[bool]]:
    """Which names each regular expression matches. They are matched in another process, because
    one from an untrusted file can take forever."""
    if not patterns:
        return []
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", _MATCH], input=json.dumps([patterns, names]),
            capture_output=True, text=True, timeout=_REGEX_SECONDS, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        report.problem(f"matching its regular expressions takes over {_REGEX_SECONDS} s")
    else:
        if done.returncode == 0:
            return json.loads(done.stdout)
        report.problem((done.stderr.strip() or "its regular expressions cannot be read")[-300:])
    report.raise_problems()
    return []


# Reader -------------------------------------------------------------------------------------------


def open_peft(path: Path, base: SourceCheckpoint, max_memory: int = 2 << 30) -> Adapter:
    """Read an adapter in PEFT's format.

    Args:
      path: its folder.
      base: the model that it was trained on.
      max_memory: limit for its arrays, in bytes.

    Raises:
      ConvertError: it cannot be used; lists every reason.
      OSError: a file cannot be read.
    """
    if not (path / WEIGHTS).exists() and (path / "adapter_model.bin").exists():
        raise ConvertError(
            f"{path}/adapter_model.bin is a pickle, which is not read: load the adapter with PEFT "
            "and save it again (model.save_pretrained writes adapter_model.safetensors)"
        )
    config = sources.read_settings(path / CONFIG)
    report = Report(str(path / CONFIG))
    modules = _parse_config(config, base.cfg, report)
    if not (path / WEIGHTS).exists():
        raise ConvertError(f"{path / WEIGHTS} is missing")
    slices = formats.read_safetensors(path / WEIGHTS)
    _check_tensors(slices, modules, path, base)
    lora, factors = _common_settings(config, modules, path)
    adapters.check_size(base.cfg, lora, max_memory, path)
    if changed := [n for n, factor in factors.items() if not math.log2(factor).is_integer()]:
        report.warn(
            f"b of {first_names(changed, 3)} is multiplied by its scale over the common one, "
            "rounded to float32"
        )
    pairs: dict[str, Pair] = {
        t: Pair(*(np.zeros(s, np.float32) for s in pair_shapes(base.cfg, MATRICES[t], lora.rank)))
        for t in lora.targets
    }
    mapped = formats.map_file(path / WEIGHTS)
    for name, m in modules.items():
        a, b = (formats.view(slices[n], mapped) for n in _tensor_names(name))
        if not (np.isfinite(a).all() and np.isfinite(b).all()):
            raise ConvertError(f"{path / WEIGHTS}: {name} holds numbers that are not finite")
        pairs[m.target].a_LIr[m.layer, :, : m.rank] = a.T
        b_rO = pairs[m.target].b_LrO[m.layer, : m.rank]
        b_rO[...] = b.T
        b_rO *= np.float32(factors[name])
    recorded = {"path": str(base.path.resolve()), "sha256": adapters.base_sha256(base)}
    if base.quantize:
        recorded["quantize"] = base.quantize
    tokenizers, extras, token_ids = _small_files(path, base, report)
    adapter = Adapter(
        path, base.cfg, lora, recorded, sha256(path / WEIGHTS), {}, pairs,
        [path / CONFIG, path / WEIGHTS], token_ids, tokenizers, extras, report.warnings,
        base.generated,
    )  # fmt: skip
    sources.check_tokenizers(adapter)
    return adapter


def _common_settings(
    config: dict[str, Any], modules: dict[str, Module], path: Path
) -> tuple[LoraConfig, dict[str, float]]:
    """One rank and alpha for all matrices, and the factor of each `b` that keeps its scale.

    The rank is the largest one. The scale is that of `r` and `lora_alpha`, so that only matrices
    with a rank or alpha of their own have a factor other than 1.
    """
    from llama_jax.model.lora import scale_of  # here, because it imports JAX

    rank = max(m.rank for m in modules.values())
    kept = {m.target for m in modules.values()}
    targets: Any = tuple(t for t in MATRICES if t in kept)
    make = lambda rank, alpha: LoraConfig(
        rank=rank, alpha=float(alpha), rslora=bool(config.get("use_rslora")), targets=targets
    )
    given = make(config["r"], config["lora_alpha"])
    lora = given
    if rank != given.rank:
        lora = make(rank, given.alpha * scale_of(given) / scale_of(make(rank, given.alpha)))
    with np.errstate(over="ignore", under="ignore"):
        factors = {
            name: float(np.float32(scale_of(make(m.rank, m.alpha)) / scale_of(lora)))
            for name, m in modules.items()
        }
    if wrong := [n for n, factor in factors.items() if not 0 < factor < math.inf]:
        raise ConvertError(
            f"{path / CONFIG}: the scale of {first_names(wrong, 3)} is too far from that of "
            "lora_alpha for float32"
        )
    return lora, factors


def _tensor_names(module: str) -> tuple[str, str]:
    return f"{_PREFIX}{module}.lora_A.weight", f"{_PREFIX}{module}.lora_B.weight"


def _check_tensors(
    slices: dict[str, TensorSlice], modules: dict[str, Module], path: Path, base: SourceCheckpoint
) -> None:
    """Names, shapes and dtypes of the tensors; a difference in size is named as such."""
    cfg, where = base.cfg, path / WEIGHTS
    expected, sizes, problems = {}, {}, []
    layers = [int(n[len(_LAYERS) :].split(".")[0]) for n in slices if _is_layer(n)]
    if layers and max(layers) >= cfg.num_layers:
        sizes["num_layers"] = f"at least {max(layers) + 1}", str(cfg.num_layers)
    for module, m in modules.items():
        letters = MATRICES[m.target].letters
        inputs, outputs = cfg.shape(letters)
        names = _tensor_names(module)
        shapes = (m.rank, inputs), (outputs, m.rank)
        for name, shape, axis, letter in zip(names, shapes, (1, 0), letters, strict=True):
            expected[name] = shape
            if (found := slices.get(name)) is None:
                continue
            if found.dtype not in FLOATS:
                problems.append(f"{where}: {name} is {found.dtype}, not a float of 16 or 32 bits")
            if len(found.shape) == 2 and found.shape[axis] != shape[axis]:
                size = {"Q": "num_heads x head_dim", "E": "num_kv_heads x head_dim"}
                key = size.get(letter) or FIELD_OF_LETTER[letter]
                sizes[key] = str(found.shape[axis]), str(shape[axis])
            elif found.shape != shape:
                problems.append(
                    f"{where}: {name} has shape {list(found.shape)}, {CONFIG} and the base make it "
                    f"{list(shape)}"
                )
    adapters.raise_if_other_sizes(path, base.path, [(k, *v) for k, v in sizes.items()])
    formats.raise_if_any(sources.check_names(set(slices), set(expected), where) + problems)


_LAYERS = f"{_PREFIX}model.layers."


def _is_layer(name: str) -> bool:
    number = name[len(_LAYERS) :].partition(".")[0]
    return name.startswith(_LAYERS) and number.isascii() and number.isdigit() and len(number) < 9


def _small_files(
    path: Path, base: SourceCheckpoint, report: Report
) -> tuple[list[tokenizer_files.TokenizerFile], list[Path], dict[str, Any]]:
    """Tokenizers, other small files and token ids: those beside the adapter, otherwise the base's.

    The files of a tokenizer are not mixed: a chat template may be in one of several.
    """
    tokenizers = tokenizer_files.find(path) or base.tokenizers
    own = sources.extras(path)
    generation = "generation_config.json"
    kept = [p for p in base.extras if p.name not in {o.name for o in own}]
    if any(p.name != generation for p in own):
        kept = [p for p in kept if p.name == generation]
    token_ids = dict(base.token_ids)
    if (path / generation).exists():
        given = {"eos": sources.read_settings(path / generation).get("eos_token_id")}
        token_ids |= sources.check_token_ids(given, base.cfg.vocab_size, report)
    return tokenizers, own + kept, token_ids


# Writer -------------------------------------------------------------------------------------------


def write_peft(adapter: Adapter, folder: Path, base_name: str) -> list[str]:
    """Write an adapter in PEFT's format into an empty folder.

    Args:
      adapter: the adapter.
      folder: where to write.
      base_name: ``base_model_name_or_path``: what PEFT loads the base from if it is not given.

    Returns:
      Warnings.
    """
    lora = adapter.lora
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base_name,
        "r": lora.rank, "lora_alpha": int(lora.alpha) if lora.alpha.is_integer() else lora.alpha,
        "target_modules": [MATRICES[t].hf.rpartition(".")[2] for t in lora.targets],
        "use_rslora": lora.rslora, "lora_dropout": 0.0, "bias": "none", "fan_in_fan_out": False,
        "init_lora_weights": True, "inference_mode": True, "modules_to_save": None,
        "rank_pattern": {}, "alpha_pattern": {},
    }  # fmt: skip
    tensors: dict[str, np.ndarray] = {}
    for i in range(adapter.cfg.num_layers):
        for target, pair in adapter.pairs.items():
            module = LayerTensor(MATRICES[target], i).hf_name.removesuffix(".weight")
            tensors |= zip(_tensor_names(module), (pair.a_LIr[i].T, pair.b_LrO[i].T), strict=True)
    shapes = {name: (x.shape, x.dtype) for name, x in tensors.items()}
    header, _ = formats.plan_safetensors(folder / WEIGHTS, shapes)
    with (folder / WEIGHTS).open("xb") as f:
        f.write(header)
        for x in tensors.values():
            f.write(np.ascontiguousarray(x).data)
    trees, warnings = huggingface.small_files(adapter, "float32")
    del trees["config.json"]  # the base's; beside an adapter it would announce a whole model
    for name, tree in ({CONFIG: config} | trees).items():
        text = json.dumps(tree, indent=2, ensure_ascii=False) + "\n"
        atomic_write(folder / name, text.encode())
    sources.copy_small_files(adapter, folder)
    return warnings
