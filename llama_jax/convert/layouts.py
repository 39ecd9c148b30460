"""Folders of weights in the three layouts: Meta, Hugging Face, and our Orbax checkpoints.

In comes a folder, recognised by its content; out comes what it holds (:class:`Found`), with every
problem listed at once. Or in comes a model, and out comes an empty folder of a layout, ready for
pieces (:class:`Target`).

    python -m llama_jax.convert --inspect PATH
"""

import dataclasses
import re
from pathlib import Path
from typing import Any, Literal

import ml_dtypes
import numpy as np

from llama_jax import config as cf
from llama_jax.config import ModelConfig
from llama_jax.convert import foreign, formats, torch_files
from llama_jax.convert import tensors as weights
from llama_jax.convert.formats import Region, short
from llama_jax.convert.orbax import OrbaxWeights
from llama_jax.convert.tensors import Part, TorchWeights, Unit, Weights, rows_of, units
from llama_jax.data import tokenizer_files
from llama_jax.data.tokenizer_files import TokenizerFile
from llama_jax.io import read_json
from llama_jax.model.quantize import KINDS

Kind = Literal["meta", "hf", "orbax"]
NAMES = {"meta": "Meta", "hf": "Hugging Face", "orbax": "Orbax"}
MAX_STOP_IDS = 8
"""ids that may end a text; sampling looks for this many"""
_LARGEST_SETTINGS = 1 << 20
_LARGEST_LIST = 12 << 20
"""bytes of JSON that lists tensors: an index, _METADATA, manifest.json"""
_MOST_PROBLEMS = 20
FLOATS = [np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16), np.dtype(np.float32)]


def changed(cfg: ModelConfig, **fields: Any) -> ModelConfig:
    """`dataclasses.replace`, for a type checker that does not know pydantic's."""
    return dataclasses.replace(cfg, **fields)  # type: ignore[type-var]


class LayoutError(ValueError):
    """A folder that cannot be used; the message lists every reason."""


@dataclasses.dataclass
class Found:
    """What a folder holds."""

    kind: Kind
    path: Path
    cfg: ModelConfig
    weights: Weights
    files: list[Path]
    """weight files (an Orbax checkpoint: its array folders)"""
    ids: dict[str, Any]
    """bos, eos (an id or a list of stop ids), pad"""
    tokenizers: list[TokenizerFile]
    extras: list[Path]
    """small files that go along: tokenizer settings, chat template, generation settings"""
    remarks: list[str]
    sums: dict[str, str] = dataclasses.field(default_factory=dict)
    """SHA-256 of each unit, as the manifest.json of the folder says; empty: it has none"""
    quantize: str | None = None
    """"int8" or "int4", if that is what the layers' matrices are in"""

    def dtypes(self) -> dict[str, np.dtype]:
        """dtype of each row of the table."""
        first = (Unit(r, 0 if r.stacked else None) for r in rows_of(self.cfg, self.quantize))
        return {u.row.path: self.weights.dtype(u) for u in first}


def open_folder(path: Path, context: int | None = None) -> Found:
    """Recognise a folder by its content and check it; raises :class:`LayoutError` or OSError.

    Args:
      path: a Meta or Hugging Face folder, one of our checkpoints, or one step of it.
      context: replaces the context length that a Meta folder does not state.
    """
    if context is not None and not 1 <= context < 1 << 31:
        raise LayoutError(f"--context {context} must be at least 1, and a number of tokens")
    if not path.exists():
        raise LayoutError(f"{path} does not exist")
    if not path.is_dir():
        raise LayoutError(
            f"{path} is a file; give the folder that holds the weights and their settings"
        )
    names = sorted(p.name for p in path.iterdir())
    meta = [n for n in names if n.startswith("consolidated.") and n.endswith(".pth")]
    hf = [n for n in names if n.endswith((".safetensors", ".safetensors.index.json"))] or [
        n
        for n in names
        if n.startswith("pytorch_model") and n.endswith((".bin", ".bin.index.json"))
    ]
    inside = [path, *path.resolve().parents]  # a step, or the model in it, will do as well
    root = next(
        (p for p, at in zip(inside[2:4], inside[1:], strict=False) if at.name == "steps"), path
    )
    if meta and hf and "config.json" in names:
        raise LayoutError(
            f"{path} holds both {meta[0]} and {hf[0]}; move one of the two layouts elsewhere"
        )
    if meta or "params.json" in names:
        found = _open_meta(path, [path / n for n in meta], context)
    elif hf or "config.json" in names:
        found = _open_hf(path, names)
    elif (root / "model.json").exists():
        found = _open_orbax(root, path)
    else:
        raise LayoutError(
            f"{path} is no folder of weights: expected consolidated.*.pth with params.json, "
            "config.json with "
            "model*.safetensors or pytorch_model*.bin, or model.json with steps/; found "
            f"{formats.some(names) or 'nothing'}"
        )
    if context is not None and found.kind != "meta":
        raise LayoutError(f"--context is for Meta folders, which do not say it; {path} does")
    _check_tokenizers(found)
    return found


def _check_tokenizers(found: Found) -> None:
    rows = found.cfg.vocab_size
    for tokenizer in found.tokenizers:
        for key, value in tokenizer.ids.items():
            found.ids.setdefault(key, value)
        if tokenizer.size > rows:
            raise LayoutError(
                f"{tokenizer.path} has {tokenizer.size} tokens, the embedding {rows} rows only"
            )
        if tokenizer.size < rows:
            found.remarks.append(
                f"the embedding has {rows} rows, {tokenizer.path.name} {tokenizer.size} tokens"
            )
    if not found.tokenizers:
        found.remarks.append(f"no tokenizer (tokenizer.model or tokenizer.json) in {found.path}")


def _token_ids(given: Any, rows: int, where: str, remarks: list[str]) -> dict[str, Any]:
    """bos, eos and pad of somebody's settings, checked; -1 and null are none."""
    if not isinstance(given, dict):
        raise LayoutError(f"{where}: token_ids={short(given)} is not an object")
    ids: dict[str, Any] = {}
    for key, value in given.items():
        several = value if key == "eos" and isinstance(value, list) else [value]
        kept = [i for i in several if i is not None and i != -1]
        if not all(type(i) is int and i >= 0 for i in kept) or len(set(kept)) > MAX_STOP_IDS:
            kinds = f"an id or at most {MAX_STOP_IDS}" if key == "eos" else "an id"
            raise LayoutError(f"{where}: the {key} token id is {short(value)}, expected {kinds}")
        outside = [i for i in kept if i >= rows]
        if outside and key != "pad":
            raise LayoutError(
                f"{where}: the {key} token id {outside[0]} is none of the embedding's {rows} rows"
            )
        if outside:
            remarks.append(f"{where}: pad token id {outside[0]} left out: there are {rows} rows")
        elif kept:
            ids[key] = value if several is value else kept[0]
    return ids


def _json(path: Path, max_bytes: int = _LARGEST_SETTINGS) -> dict[str, Any]:
    if not path.exists():
        raise LayoutError(f"{path} is missing")
    return read_json(path, max_bytes)


def _stop_at(problems: list[str]) -> None:
    """Raise for all of the problems at once; of very many, the first."""
    if not problems:
        return
    more = len(problems) - _MOST_PROBLEMS
    lines = [p if len(p) < 400 else f"{p[:400]}..." for p in problems[:_MOST_PROBLEMS]]
    raise LayoutError("\n".join(lines + [f"and {more:,} more problems"] * (more > 0)))


def _check_names(have: set[str], need: set[str], where: Path) -> list[str]:
    drop = ("rope.freqs", "rotary_emb.inv_freq")
    return [f"{where}: {n} is missing" for n in sorted(need - have)] + [
        f"{where}: {n[:200]} is not a tensor of this model"
        for n in sorted(have - need)
        if not n.endswith(drop)
    ]


def _check_dtypes(cfg: ModelConfig, parts: dict[str, list[Part]]) -> list[str]:
    seen: dict[str, dict[np.dtype, str]] = {}
    for unit in units(cfg):
        for part in parts[unit.name]:
            seen.setdefault(unit.row.path, {}).setdefault(part.region.dtype, unit.name)
    bad = [
        f"{name} is {dtype}: only float16, bfloat16 and float32 weights are supported"
        for kinds in seen.values()
        for dtype, name in kinds.items()
        if dtype not in FLOATS
    ]
    mixed = [kinds for kinds in seen.values() if len(kinds) > 1]
    return bad + [
        "layers or shards differ in dtype: "
        + ", ".join(f"{name} is {d}" for d, name in kinds.items())
        for kinds in mixed
    ]


# --- Meta ---


def _open_meta(path: Path, files: list[Path], context: int | None) -> Found:
    params = _json(path / "params.json")
    numbers = [f.name.removeprefix("consolidated.").removesuffix(".pth") for f in files]
    valid = [int(n) for n in numbers if re.fullmatch("[0-9]{2,3}", n)]
    expected = [f"{i:02d}" for i in range(max(valid, default=0) + 1)]
    _stop_at([f"{path}/consolidated.{n}.pth is missing" for n in expected if n not in numbers])
    odd = [f for f, n in zip(files, numbers, strict=True) if n not in expected]
    _stop_at([f"{f} is not a shard: their names are consolidated.NN.pth" for f in odd])
    shards = [torch_files.read(f) for f in files]
    embed = shards[0].get("tok_embeddings.weight")
    if embed is None or len(embed.shape) != 2:
        raise LayoutError(f"{files[0]}: tok_embeddings.weight is missing or no matrix")
    by_rows = embed.shape[1] == params.get("dim")  # Llama 3; LLaMA 1 and 2 cut the width
    rows = embed.shape[0] * (len(files) if by_rows else 1)
    half = embed.dtype == np.float16
    has_output = "output.weight" in shards[0]
    cfg, remarks = foreign.model_from_meta(
        params, rows, not has_output, half, str(path / "params.json")
    )
    hint = _hint(path, cfg)
    if hint is not None:
        cfg = hint
        remarks = [r for r in remarks if not r.startswith("context")]
        remarks.append(f"context {cfg.context}: from {path}/manifest.json, which fits params.json")
    if context is not None:
        cfg = changed(cfg, context=context)
        remarks = [r for r in remarks if not r.startswith("context")]
    untied = changed(cfg, tie_embeddings=not has_output)
    parts = _meta_parts(untied, shards, by_rows, path)
    if has_output and (hint.tie_embeddings if hint else _is_llama_32(cfg)):
        if _same_matrix(untied, parts["embed"], parts["unembed"]):
            cfg = changed(cfg, tie_embeddings=True)
            del parts["unembed"]
            remarks.append("output.weight equals tok_embeddings.weight: tied")
        else:
            cfg = untied
            remarks.append("output.weight differs from tok_embeddings.weight: not tied")
    tokenizers = tokenizer_files.find(path)
    if not tokenizers:
        tokenizers, notes = tokenizer_files.find_beside(path, cfg.vocab_size)
        remarks += notes
    return Found(
        "meta", path, cfg, TorchWeights(cfg, parts, interleaved=True), files, {},
        tokenizers, _extras(path), remarks, _sums(path, cfg),
    )  # fmt: skip


def _sums(folder: Path, cfg: ModelConfig, quantize: str | None = None) -> dict[str, str]:
    """SHA-256 of each unit, from a manifest.json of ours; nothing if there is none."""
    path = folder / "manifest.json"
    tree = _json(path, _LARGEST_LIST) if path.exists() else {}
    if tree.get("rotary_layout") != "half":  # none, or of another program
        return {}
    sums = {}
    for unit in units(cfg, quantize):
        try:
            sums[unit.name] = str(tree["tensors"][unit.row.path]["sha256"][unit.layer or 0])
        except (KeyError, IndexError, TypeError):
            raise LayoutError(f"{path} is damaged: it has no SHA-256 of {unit.name}") from None
    return sums


def _hint(path: Path, cfg: ModelConfig) -> ModelConfig | None:
    """The model of a manifest.json of ours, if it says nothing else than params.json does."""
    try:
        tree = _json(path / "manifest.json", _LARGEST_LIST)
        given = cf.check_model(tree["model"], "manifest.json")
    except (ValueError, KeyError, TypeError):
        return None
    same = dict(context=cfg.context, tie_embeddings=cfg.tie_embeddings)
    return given if changed(foreign.settled(given), **same) == cfg else None


def _is_llama_32(cfg: ModelConfig) -> bool:
    known = [cf.MODELS[n].shape("LDV") for n in ("llama3.2-1b", "llama3.2-3b")]
    return cfg.shape("LDV") in known


def _meta_parts(
    cfg: ModelConfig, shards: list[dict[str, Region]], by_rows: bool, path: Path
) -> dict[str, list[Part]]:
    need = {u.torch_name(meta=True): u for u in units(cfg)}
    problems, parts = [], {}
    for i, shard in enumerate(shards):
        problems += _check_names(set(shard), set(need), path / f"consolidated.{i:02d}.pth")
    _stop_at(problems)
    for name, unit in need.items():
        whole = unit.torch_shape(cfg)
        axis = meta_axis(unit, by_rows)
        shape = shard_shape(whole, axis, len(shards))
        placed = []
        for i, shard in enumerate(shards):
            region = shard[name]
            if region.shape != shape:
                problems.append(
                    f"{region.path}: {name} has shape {list(region.shape)}, expected "
                    f"{list(shape) if shape else f'a part of {list(whole)}'}: a shard of "
                    f"{len(shards)} of the model in params.json (is a shard missing?)"
                )
                continue
            start = [0, 0]
            if axis >= 0:
                start[axis] = i * region.shape[axis]
            placed.append(Part(region, *start))
        parts[unit.name] = placed
    _stop_at(problems)
    for unit in need.values():
        if unit.row.concat < 0:
            first, *others = [_bytes(p.region) for p in parts[unit.name]]
            problems += [
                f"{path}: {unit.torch_name(True)} differs between shards 00 and {i:02d}; the files "
                "are not of one model"
                for i, other in enumerate(others, 1)
                if other != first
            ]
    _stop_at(problems + _check_dtypes(cfg, parts))
    return parts


def meta_axis(unit: Unit, by_rows: bool) -> int:
    return 0 if unit.row.path == "embed" and by_rows else unit.row.concat


def shard_shape(whole: tuple[int, ...], axis: int, shards: int) -> tuple[int, ...] | None:
    if axis < 0:
        return whole
    if whole[axis] % shards:
        return None
    return tuple(n // shards if i == axis else n for i, n in enumerate(whole))


def _bytes(region: Region) -> bytes:
    mapped = formats.map_file(region.path)
    data = formats.view(region, mapped).tobytes()
    return data


def _same_matrix(cfg: ModelConfig, embed: list[Part], output: list[Part]) -> bool:
    """Whether two [V, D] matrices have the same bits."""
    unit = units(cfg)[0]
    one, other = (TorchWeights(cfg, {"embed": parts}, False) for parts in (embed, output))
    rows = weights.rows_per_chunk(unit, cfg, one.dtype(unit))
    pieces = [(i, min(i + rows, cfg.vocab_size)) for i in range(0, cfg.vocab_size, rows)]
    return one.dtype(unit) == other.dtype(unit) and all(
        one.read(unit, *p).tobytes() == other.read(unit, *p).tobytes() for p in pieces
    )


# --- Hugging Face ---


def _open_hf(path: Path, names: list[str]) -> Found:
    config = _json(path / "config.json")
    cfg, remarks = foreign.model_from_hf(config, str(path / "config.json"))
    regions, files = _hf_regions(path, names, remarks)
    untied = changed(cfg, tie_embeddings=cfg.tie_embeddings and "lm_head.weight" not in regions)
    problems = _check_names(set(regions), {u.torch_name(False) for u in units(untied)}, path)
    parts = {}
    for unit in units(untied):
        name, shape = unit.torch_name(False), unit.torch_shape(cfg)
        region = regions.get(name)
        if region is not None and region.shape != shape:
            problems.append(
                f"{region.path}: {name} has shape {list(region.shape)}, config.json makes it "
                f"{list(shape)}"
            )
        elif region is not None:
            parts[unit.name] = [Part(region, 0, 0)]
    _stop_at(problems)
    _stop_at(_check_dtypes(untied, parts))
    if cfg != untied:
        if not _same_matrix(untied, parts["embed"], parts["unembed"]):
            raise LayoutError(
                f"{path}: config.json ties the embeddings, but lm_head.weight differs from "
                "model.embed_tokens.weight; "
                "set tie_word_embeddings to false if both are meant"
            )
        del parts["unembed"]
        remarks.append("lm_head.weight equals the embedding: tied")
    given = {k: config.get(f"{k}_token_id") for k in ("bos", "eos", "pad")}
    ids = _token_ids(given, cfg.vocab_size, f"{path}/config.json", remarks)
    if (generation := path / "generation_config.json").exists():
        given = {"eos": _json(generation).get("eos_token_id")}
        ids |= _token_ids(given, cfg.vocab_size, str(generation), remarks)
    return Found(
        "hf", path, cfg, TorchWeights(cfg, parts, interleaved=False), files, ids,
        tokenizer_files.find(path), _extras(path), remarks, _sums(path, cfg),
    )  # fmt: skip


def _hf_regions(
    path: Path, names: list[str], remarks: list[str]
) -> tuple[dict[str, Region], list[Path]]:
    """Tensors of a folder by name; every file of an index must be there, with exactly the
    tensors it lists."""
    sets = [
        ("model.safetensors", formats.read_safetensors),
        ("pytorch_model.bin", torch_files.read),
    ]
    present = [(s, read) for s, read in sets if s in names or f"{s}.index.json" in names]
    if not present:
        raise LayoutError(
            f"{path} holds no model.safetensors, pytorch_model.bin, or index of one; found "
            f"{formats.some(names)}"
        )
    stem, read = present[0]
    if len(present) > 1:
        remarks.append(f"took {stem}; {present[1][0]} is there as well")
    if stem in names:
        return read(path / stem), [path / stem]
    index = _json(path / f"{stem}.index.json", _LARGEST_LIST).get("weight_map")
    if not isinstance(index, dict) or not all(isinstance(v, str) for v in index.values()):
        raise LayoutError(f"{path}/{stem}.index.json has no weight_map")
    files = sorted(set(index.values()))
    _stop_at([
        f"{path}/{stem}.index.json names {f[:200]!r}, which is outside the folder" for f in files
        if f in ("", ".", "..") or Path(f).name != f or "\\" in f
    ])  # fmt: skip
    there = set(names)
    _stop_at(
        [f"{path}/{f} is missing, named by {stem}.index.json" for f in files if f not in there]
    )
    listed_in: dict[str, set[str]] = {f: set() for f in files}
    for name, file in index.items():
        listed_in[file].add(name)
    regions: dict[str, Region] = {}
    problems: list[str] = []
    for file in files:
        inside, listed = read(path / file), listed_in[file]
        problems += [
            f"{path}/{file}: {n} is missing, listed by the index"
            for n in sorted(listed - set(inside))
        ]
        problems += [
            f"{path}/{file}: {n} is not listed by the index" for n in sorted(set(inside) - listed)
        ]
        regions |= inside
    _stop_at(problems)
    return regions, [path / f for f in files]


def _extras(path: Path) -> list[Path]:
    """Small files that go along with the weights, each of them readable."""
    generation = path / "generation_config.json"
    if generation.exists():
        _json(generation)
    return tokenizer_files.extras(path) + [generation] * generation.exists()


# --- Orbax ---


def _open_orbax(root: Path, path: Path) -> Found:
    settings = _json(root / "model.json")
    if settings.get("format") != 1 or settings.get("rotary_layout") != "half":
        raise LayoutError(
            f"{root}/model.json: format={short(settings.get('format'))}, "
            f"rotary_layout={short(settings.get('rotary_layout'))}; "
            "this program reads format 1 with 'half'"
        )
    if not isinstance(model := settings.get("model"), dict):
        raise LayoutError(f"{root}/model.json has no model")
    cfg = cf.check_model(model, f"{root}/model.json")
    quantize = settings.get("quantize")
    if quantize not in (None, *KINDS):
        raise LayoutError(
            f"{root}/model.json: quantize={short(quantize)}: there are 'int8' and 'int4'"
        )
    step, there = _step(root, path)
    folder = root / "steps" / str(step) / "model"
    opened = _orbax_arrays(folder, cfg, quantize)
    remarks = [f"step {step} of {', '.join(map(str, there))}"] if len(there) > 1 else []
    given = settings.get("token_ids", {})
    ids = _token_ids(given, cfg.vocab_size, f"{root}/model.json", remarks)
    # The manifest is of the converted step 0, not of what was trained on from it.
    sums = _sums(root, cfg, quantize) if step == 0 else {}
    return Found(
        "orbax", path, cfg, opened, [folder], ids, tokenizer_files.find(root), _extras(root),
        remarks, sums, quantize,
    )  # fmt: skip


def _step(root: Path, path: Path) -> tuple[int, list[int]]:
    """The step that ``path`` names, or the newest, and all that are there."""
    steps = root / "steps"
    names = [p.name for p in steps.iterdir()] if steps.is_dir() else []
    there = sorted(int(n) for n in names if n.isascii() and n.isdigit())
    given = next(iter(path.resolve().relative_to(root.resolve()).parts[1:]), None)
    if given is not None and given not in map(str, there):
        raise LayoutError(f"{path} is not a finished step of {root}")
    if not there:
        raise LayoutError(f"{steps} holds no finished step")
    return int(given) if given is not None else there[-1], there


def _orbax_arrays(folder: Path, cfg: ModelConfig, quantize: str | None) -> OrbaxWeights:
    """The arrays of one step, whose names, shapes and dtypes are those of the model."""
    metadata = _json(folder / "_METADATA", _LARGEST_LIST)
    try:
        keys = [v["key_metadata"] for v in metadata["tree_metadata"].values()]
        have = {"/".join(str(k["key"])[:200] for k in key) for key in keys}
    except (KeyError, TypeError, AttributeError):
        raise LayoutError(f"{folder}/_METADATA is damaged: it lists no arrays") from None
    shapes = {r.path: (cfg.num_layers,) * r.stacked + r.shape(cfg) for r in rows_of(cfg, quantize)}
    _stop_at(_check_names(have, set(shapes), folder))
    opened = OrbaxWeights(folder, cfg, quantize)
    problems = [
        f"{folder}: {name} has shape {list(opened.arrays[name].shape)}, model.json makes it "
        f"{list(shape)}"
        for name, shape in shapes.items()
        if opened.arrays[name].shape != shape
    ]
    problems += [
        f"{folder}: {name} is {a.dtype.name}: only float16, bfloat16 and float32 weights are "
        "supported"
        for name, a in opened.arrays.items()
        if a.dtype.numpy_dtype not in FLOATS and not name.endswith("/q")
    ]
    _stop_at(problems)
    return opened
