"""Meta folders: ``params.json`` and ``consolidated.NN.pth``, one file per model-parallel rank.

Settings that change the computation in a way that the model does not implement are refused by name;
unknown settings are named in a warning.
"""

import functools
import re
from pathlib import Path
from typing import Any

import numpy as np

from llama_jax.config import MODELS, ModelConfig, check_model
from llama_jax.convert import formats, sources, torch_files
from llama_jax.convert.formats import ConvertError, TensorSlice, raise_if_any, short
from llama_jax.convert.sources import CheckpointWriter, Report, SourceCheckpoint, normalized
from llama_jax.convert.tensors import (
    TABLE,
    LayerTensor,
    Shard,
    TorchWeights,
    layer_tensors,
    shard_shape,
    split_shards,
)
from llama_jax.data import tokenizer_files

# Settings -----------------------------------------------------------------------------------------

_NUMBERS = {
    "dim", "n_layers", "n_heads", "n_kv_heads", "multiple_of", "ffn_dim_multiplier", "norm_eps",
    "rope_theta", "rope_scaling_factor", "rope_high_freq_factor",
}  # fmt: skip
_IRRELEVANT = {"max_seq_len", "max_batch_size", "model_parallel_size"}
_FALSE_ONLY = {"use_qk_norm", "attn_temperature_tuning", "bias"}
"""settings of later models of Meta that change the computation unless they are false"""


def _is_llama_32(dim: int, num_layers: int) -> bool:
    """Whether the sizes are those of Llama 3.2, whose embeddings are tied and RoPE factor is 32."""
    models = MODELS["llama3.2-1b"], MODELS["llama3.2-3b"]
    return (dim, num_layers) in [(m.dim, m.num_layers) for m in models]


def ffn_width(dim: int, multiple_of: int, multiplier: float | None) -> int:
    """Meta's feed-forward width: 2/3 of 4 D, times the multiplier, rounded up to `multiple_of`.

    Args:
      dim: D.
      multiple_of: the width is a multiple of it.
      multiplier: ffn_dim_multiplier; None: 1.
    """
    width = int(2 * (4 * dim) / 3)
    if multiplier is not None:
        width = int(multiplier * width)
    return multiple_of * ((width + multiple_of - 1) // multiple_of)


def parse_params(
    params: dict[str, Any], rows: int, tied: bool, float16: bool, where: str
) -> tuple[ModelConfig, list[str]]:
    """The model of a ``params.json``, and warnings.

    Args:
      params: the settings.
      rows: rows V of the embedding.
      tied: there is no output matrix.
      float16: dtype of the weights is float16, which only LLaMA 1 used.
      where: the file, for messages.

    Raises:
      ConvertError: lists every setting that is not supported.
    """
    report = Report(where)
    params = {k: v for k, v in params.items() if v is not None}
    scaled = _check_params(params, rows, report)
    dim, heads = params["dim"], params["n_heads"]
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
    if scaled:
        tree["rope"] |= _parse_scaled_rope(params, tree, report)
    family, context = _guess_family(tree, scaled, float16)
    report.warnings.append(
        f"context {context}: assumed for {family}, because {where} has none (--context overrides)"
    )
    if family == "Llama 2" and tree["norm_eps"] == 1e-6:
        report.warn(
            "norm_eps=1e-6 in a Llama 2; early Llama-2-7B-chat had this value by mistake (later "
            "1e-5); kept"
        )
    return report.model(tree | {"context": context}), report.warnings


def _check_params(params: dict[str, Any], rows: int, report: Report) -> bool:
    """Raise :class:`ConvertError` for settings that are not supported; returns
    `use_scaled_rope`."""
    for key in ("quantization_args", "lora_args"):
        if key in params:
            report.problem(f"{key} is not supported: the weights are quantized or incomplete")
    other = [k for k in params if k.startswith(("vision_", "moe"))]
    for key in other:
        report.problem(f"{key[:100]} is not supported")
    for key in sorted(_FALSE_ONLY):
        if params.get(key):
            report.problem(f"{key}=true is not supported")
    known = _NUMBERS | _IRRELEVANT | _FALSE_ONLY | {"use_scaled_rope", "vocab_size"}
    report.warn_unknown(set(params) - known - set(other))
    scaled = report.flag(params, "use_scaled_rope")
    for key in ("dim", "n_layers", "n_heads", "norm_eps", "multiple_of"):
        if key not in params:
            report.problem(f"{key} is missing")
    report.check_numbers(params, sorted(_NUMBERS))
    report.raise_problems()
    dim, heads = params["dim"], params["n_heads"]
    if dim % heads:
        report.problem(f"dim={dim} is not a multiple of n_heads={heads}")
    if (vocab := params.get("vocab_size", -1)) not in (-1, rows):
        report.problem(f"vocab_size={short(vocab)}, but the embedding has {rows} rows")
    report.raise_problems()
    return scaled


def _parse_scaled_rope(
    params: dict[str, Any], tree: dict[str, Any], report: Report
) -> dict[str, Any]:
    small = _is_llama_32(tree["dim"], tree["num_layers"])
    factor = params.get("rope_scaling_factor") or (32.0 if small else 8.0)
    if "rope_scaling_factor" not in params:
        why = "the size is that of Llama 3.2" if small else "as in Llama 3.1 and 3.3"
        report.warn(f"no rope_scaling_factor; used {factor:g}: {why}")
    return dict(
        type="llama3", factor=float(factor), low_freq_factor=1.0, original_context=8192,
        high_freq_factor=float(params.get("rope_high_freq_factor") or 4.0),
    )  # fmt: skip


def _guess_family(tree: dict[str, Any], scaled: bool, float16: bool) -> tuple[str, int]:
    """The probable family of the weights and its training context, which params.json lacks."""
    theta = tree["rope"]["theta"]
    if scaled:
        return "Llama 3.1 or later", 131072
    if theta == 5e5:
        return "Llama 3", 8192
    if theta == 1e6:
        return "Code Llama", 16384
    # LLaMA 1 is float16, Llama 2 bfloat16; 33B and 65B are LLaMA 1, 70B is Llama 2.
    first = {(4096, 32), (5120, 40), (6656, 60), (8192, 80)}
    shape = (tree["dim"], tree["num_layers"])
    if tree["num_kv_heads"] != tree["num_heads"] or (shape in first and not float16):
        return "Llama 2", 4096
    if shape in first and (shape[0] > 5120 or tree["norm_eps"] < 1e-5):
        return "LLaMA 1", 2048
    return ("Llama 2", 4096) if shape in first else ("an unknown family, like LLaMA 1", 2048)


def make_params(cfg: ModelConfig) -> dict[str, Any]:
    """``params.json`` of a model.

    Raises:
      ConvertError: Meta's code does not support the model.
    """
    problems = []
    rope = normalized(cfg).rope
    if rope.type not in ("default", "llama3"):
        problems.append(f"rope type {rope.type!r} has no counterpart in params.json")
    if rope.type == "llama3" and (rope.low_freq_factor != 1.0 or rope.original_context != 8192):
        problems.append(
            f"params.json cannot express low_freq_factor={rope.low_freq_factor}, "
            f"original_context={rope.original_context} (Meta's code has 1 and 8192)"
        )
    if cfg.head_dim * cfg.num_heads != cfg.dim:
        problems.append(
            f"Meta's code needs head_dim * num_heads = dim: {cfg.head_dim} * {cfg.num_heads} is "
            f"not {cfg.dim}"
        )
    raise_if_any([f"cannot write Meta's layout: {p}" for p in problems])
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
        if rope.factor != (32.0 if _is_llama_32(cfg.dim, cfg.num_layers) else 8.0):
            params["rope_scaling_factor"] = rope.factor
        if rope.high_freq_factor != 4.0:
            params["rope_high_freq_factor"] = rope.high_freq_factor
    return params


def _ffn_settings(dim: int, ffn_dim: int) -> tuple[int, float | None]:
    """`multiple_of` and `ffn_dim_multiplier` that give this width: published ones if possible."""
    for multiple in (256, 1024, 4096, 64, 32, 16, 8, 4, 2, 1):
        for multiplier in (None, 1.3, 1.5, 1.0, 1.2):
            if ffn_width(dim, multiple, multiplier) == ffn_dim:
                return multiple, multiplier
    multiplier = (ffn_dim + 0.5) / int(2 * (4 * dim) / 3)
    assert ffn_width(dim, 1, multiplier) == ffn_dim
    return 1, multiplier


# Reader -------------------------------------------------------------------------------------------


def open_meta(path: Path, names: list[str], context: int | None) -> SourceCheckpoint:
    """Open a Meta folder.

    Args:
      path: the folder.
      names: its consolidated.*.pth files.
      context: replaces the context length, which a Meta folder lacks.

    Raises:
      ConvertError: the folder cannot be used; lists every reason.
    """
    params = sources.read_settings(path / "params.json")
    files = _check_files(path, names)
    tensors = {f: torch_files.read(f) for f in files}
    embed = tensors[files[0]].get("tok_embeddings.weight")
    if embed is None or len(embed.shape) != 2:
        raise ConvertError(f"{files[0]}: tok_embeddings.weight is missing or not a matrix")
    by_vocab = embed.shape[1] == params.get("dim")  # Llama 3; LLaMA 1 and 2 split the width
    rows = embed.shape[0] * (len(files) if by_vocab else 1)
    has_output = "output.weight" in tensors[files[0]]
    float16 = embed.dtype == np.float16
    where = str(path / "params.json")
    cfg, warnings = parse_params(params, rows, not has_output, float16, where)
    hint = _model_of_manifest(path, cfg)
    if hint is not None or context is not None:
        warnings = [w for w in warnings if not w.startswith("context")]
    if hint is not None:
        cfg = hint
        if context is None:
            warnings.append(
                f"context {cfg.context}: from {path}/manifest.json, which fits params.json"
            )
    if context is not None:
        cfg = sources.replace(cfg, context=context)
    untied = sources.replace(cfg, tie_embeddings=not has_output)
    need = {t.meta_name: t for t in layer_tensors(untied)}
    axis_of = functools.partial(_shard_axis, by_vocab=by_vocab)
    shards = sources.find_shards(untied, need, tensors, axis_of, "params.json")
    _check_norms(shards, need)
    if has_output and (hint.tie_embeddings if hint else _is_llama_32(cfg.dim, cfg.num_layers)):
        if sources.same_matrix(untied, shards["embed"], shards["unembed"]):
            cfg = sources.replace(cfg, tie_embeddings=True)
            del shards["unembed"]
            warnings.append("output.weight equals tok_embeddings.weight: tied")
        else:
            cfg = untied
            warnings.append("output.weight differs from tok_embeddings.weight: not tied")
    tokenizers = tokenizer_files.find(path)
    if not tokenizers:
        tokenizers, notes = tokenizer_files.find_in_parent(path, cfg.vocab_size)
        warnings += notes
    weights = TorchWeights(cfg, shards, interleaved=True)
    return SourceCheckpoint(
        "meta", path, cfg, weights, files, {}, tokenizers, sources.extras(path), warnings,
        sources.manifest_sha256(path, cfg),
    )  # fmt: skip


def _check_files(path: Path, names: list[str]) -> list[Path]:
    """The files of all ranks, in order; none may be missing."""
    numbers = [n.removeprefix("consolidated.").removesuffix(".pth") for n in names]
    valid = [int(n) for n in numbers if re.fullmatch("[0-9]{2,3}", n)]
    expected = [f"{i:02d}" for i in range(max(valid, default=0) + 1)]
    absent = [n for n in expected if n not in numbers]
    raise_if_any([f"{path}/consolidated.{n}.pth is missing" for n in absent])
    odd = [f"{path}/consolidated.{n}.pth" for n in numbers if n not in expected]
    raise_if_any([f"{f} is not a shard: their names are consolidated.NN.pth" for f in odd])
    return [path / n for n in names]


def _model_of_manifest(path: Path, cfg: ModelConfig) -> ModelConfig | None:
    """The model of our manifest.json, if it agrees with params.json."""
    try:
        tree = sources.read_settings(path / "manifest.json", sources.MAX_INDEX_BYTES)
        given = check_model(tree["model"], "manifest.json")
    except (ValueError, KeyError, TypeError):
        return None
    same = dict(context=cfg.context, tie_embeddings=cfg.tie_embeddings)
    return given if sources.replace(normalized(given), **same) == cfg else None


def _check_norms(shards: dict[str, list[Shard]], tensors: dict[str, LayerTensor]) -> None:
    """Every shard must hold the same norms."""
    problems = []
    for name, tensor in tensors.items():
        if tensor.spec.shard_axis < 0:
            mapped = [(s.slice, formats.map_file(s.slice.path)) for s in shards[tensor.name]]
            first, *others = [formats.view(*m).tobytes() for m in mapped]
            problems += [
                f"{mapped[0][0].path.parent}: {name} differs between shards 00 and {i:02d}; the "
                "files are not of one model"
                for i, other in enumerate(others, 1)
                if other != first
            ]
    raise_if_any(problems)


def _shard_axis(tensor: LayerTensor, by_vocab: bool) -> int:
    return 0 if tensor.spec.path == "embed" and by_vocab else tensor.spec.shard_axis


# Writer -------------------------------------------------------------------------------------------


def splits_vocab(source: SourceCheckpoint) -> bool:
    """Whether Meta's own files of this family (Llama 3) split the embedding along the vocabulary,
    not along the width."""
    tiktoken = any(t.kind == "tiktoken" for t in source.tokenizers)
    return source.cfg.vocab_size >= 100_000 or tiktoken


def check_writable(cfg: ModelConfig, shards: int | None, by_vocab: bool) -> None:
    """Raise :class:`ConvertError` if a model cannot be written to this number of files.

    Args:
      cfg: the model.
      shards: number of files; None: one.
      by_vocab: split the embedding along the vocabulary (Llama 3).
    """
    if shards is not None:
        sizes = dict(n_heads=cfg.num_heads, n_kv_heads=cfg.num_kv_heads, ffn_dim=cfg.ffn_dim)
        sizes |= dict(vocab_size=cfg.vocab_size) | ({} if by_vocab else dict(dim=cfg.dim))
        if bad := [f"{name}={size}" for name, size in sizes.items() if size % shards]:
            fits = [
                str(n)
                for n in range(1, cfg.num_kv_heads + 1)
                if all(size % n == 0 for size in sizes.values())
            ]
            raise ConvertError(
                f"--shards {shards} does not divide {', '.join(bad)}; this model can be split into "
                f"{', '.join(fits)}"
            )
    make_params(cfg)


def create_writer(
    folder: Path, cfg: ModelConfig, dtypes: dict[str, np.dtype], shards: int, by_vocab: bool
) -> CheckpointWriter:
    """Create the files of a Meta folder.

    Args:
      folder: where the files are made.
      cfg: the model.
      dtypes: dtype of each line of the table.
      shards: number of files.
      by_vocab: split the embedding along the vocabulary (Llama 3), not along the width.
    """
    tensors = {t.meta_name: t for t in layer_tensors(cfg)}
    if cfg.tie_embeddings:
        # Meta's loader accepts a file without output.weight and then uses random weights.
        tensors["output.weight"] = LayerTensor(TABLE[-1], None)
    shapes = {}
    for name, tensor in tensors.items():
        shape = shard_shape(tensor.torch_shape(cfg), _shard_axis(tensor, by_vocab), shards)
        assert shape is not None
        shapes[name] = (shape, dtypes.get(tensor.spec.path, dtypes["embed"]))
    paths = [folder / f"consolidated.{i:02d}.pth" for i in range(shards)]
    layouts = {path: torch_files.plan(path, shapes) for path in paths}
    placed: dict[str, list[Shard]] = {}
    for name, tensor in tensors.items():
        slices = [layout.slices[name] for layout in layouts.values()]
        key = "embed" if cfg.tie_embeddings and name == "output.weight" else tensor.name
        placed.setdefault(key, []).extend(split_shards(slices, _shard_axis(tensor, by_vocab)))
    weights = TorchWeights(cfg, placed, interleaved=True)
    for path, layout in layouts.items():
        weights.allocate(path, layout.end)
    crc: dict[TensorSlice, int] = {}

    def finish_tensor(tensor: LayerTensor) -> None:
        crc.update({s.slice: weights.checksum(s.slice) for s in placed[tensor.name]})

    def finish() -> None:
        for path, layout in layouts.items():
            sums = {name: crc[location] for name, location in layout.slices.items()}
            for offset, data in torch_files.headers(layout, sums):
                weights.write_bytes(path, offset, data)
        weights.close()

    return CheckpointWriter(weights, finish_tensor, finish)
