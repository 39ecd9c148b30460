"""The content of a folder of weights (:class:`SourceCheckpoint`), the writer of a new one
(:class:`CheckpointWriter`), and the checks that the readers of all formats share."""

import dataclasses
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from llama_jax.config import ConfigError, ModelConfig, check_model, to_dict
from llama_jax.convert.formats import (
    FLOATS,
    ConvertError,
    TensorSlice,
    first_names,
    raise_if_any,
    short,
)
from llama_jax.convert.tensors import (
    LayerTensor,
    Shard,
    TorchWeights,
    Weights,
    layer_tensors,
    rows_per_chunk,
    shard_shape,
    split_shards,
    tensor_specs,
)
from llama_jax.data import tokenizer_files
from llama_jax.data.tokenizer_files import TokenizerFile
from llama_jax.io import atomic_write, read_json

Format = Literal["meta", "hf", "orbax", "gguf"]
NAMES: dict[Format, str] = {
    "meta": "Meta", "hf": "Hugging Face", "orbax": "Orbax", "gguf": "GGUF",
}  # fmt: skip
MAX_STOP_IDS = 8
"""largest number of EOS ids; generation compares each token with all of them"""
_MAX_SETTINGS_BYTES = 1 << 20
MAX_INDEX_BYTES = 12 << 20
"""size limit of JSON files that list tensors: an index, _METADATA, manifest.json"""


class ModelFolder(Protocol):
    """What the sources of whole models and of adapters have in common."""

    path: Path
    cfg: ModelConfig
    token_ids: dict[str, Any]
    tokenizers: list[TokenizerFile]
    extras: list[Path]
    warnings: list[str]
    generated: dict[str, bytes]


@dataclasses.dataclass
class SourceCheckpoint:
    """The content of a folder of weights, which is open for reading.

    Example:
      >>> source = open_folder(Path("Llama-3.2-1B"))
      >>> source.format, source.cfg.num_layers
      ('hf', 16)
    """

    format: Format
    path: Path
    cfg: ModelConfig
    weights: Weights
    files: list[Path]
    """files of weights; of an Orbax checkpoint, the folder of its arrays"""
    token_ids: dict[str, Any]
    """bos, eos (an id or a list of ids), pad"""
    tokenizers: list[TokenizerFile]
    extras: list[Path]
    """small files to copy: tokenizer settings, chat template, generation settings"""
    warnings: list[str]
    sha256: dict[str, str] = dataclasses.field(default_factory=dict)
    """SHA-256 of each tensor according to manifest.json; empty without one"""
    quantize: str | None = None
    """"int8" or "int4" if the matrices of the layers are quantized"""
    lineage: dict[str, Any] | None = None
    """what the weights were trained from, where model.json says so"""
    generated: dict[str, bytes] = dataclasses.field(default_factory=dict)
    """small files by name that are made from the content of a GGUF file, like `extras`"""

    def dtypes(self) -> dict[str, np.dtype]:
        """dtype of each line of the table."""
        specs = tensor_specs(self.cfg, self.quantize)
        first = (LayerTensor(s, 0 if s.stacked else None) for s in specs)
        return {t.spec.path: self.weights.dtype(t) for t in first}


@dataclasses.dataclass
class CheckpointWriter:
    """A new folder of weights whose files have their final size and are still empty."""

    weights: Weights
    finish_tensor: Callable[[LayerTensor], None] = lambda tensor: None
    """must be called when a tensor is complete"""
    finish: Callable[[], None] = lambda: None
    """writes the headers of files, without which they are not readable"""


def replace(cfg: ModelConfig, **fields: Any) -> ModelConfig:
    """`dataclasses.replace`, with types that mypy accepts for a pydantic dataclass."""
    return dataclasses.replace(cfg, **fields)  # type: ignore[type-var]


def normalized(cfg: ModelConfig) -> ModelConfig:
    """The same model with an explicit original_context, so that two models can be compared."""
    if cfg.rope.type not in ("llama3", "yarn", "dynamic") or cfg.rope.original_context:
        return cfg
    rope = to_dict(cfg.rope) | {"original_context": cfg.context}
    return check_model(to_dict(cfg) | {"rope": rope}, "model")


class Report:
    """Problems and warnings found in one settings file, each prefixed with its name.

    Example:
      >>> report = Report("config.json")
      >>> report.problem("hidden_size is missing")
      >>> report.raise_problems()
    """

    def __init__(self, where: str):
        self.where = where
        self.problems: list[str] = []
        self.warnings: list[str] = []

    def problem(self, text: str) -> None:
        self.problems.append(f"{self.where}: {text}")

    def warn(self, text: str) -> None:
        self.warnings.append(f"{self.where}: {text}")

    def raise_problems(self) -> None:
        """Raise one :class:`ConvertError` for all problems."""
        raise_if_any(self.problems)

    def warn_unknown(self, unknown: Iterable[str]) -> None:
        """Name the settings that are ignored."""
        if names := sorted(unknown):
            self.warn(f"ignored {first_names(names)}")

    def flag(self, tree: dict[str, Any], key: str) -> bool:
        """A setting that is true or false; absent is false."""
        if (value := tree.get(key)) is not None and not isinstance(value, bool):
            self.problem(f"{key}={short(value)} is neither true nor false")
        return bool(value)

    def check_numbers(self, tree: dict[str, Any], keys: Iterable[str]) -> bool:
        """Whether each of these settings is a positive number or absent."""
        wrong = [k for k in keys if tree.get(k) is not None and not is_number(tree[k])]
        for key in wrong:
            self.problem(f"{key}={short(tree[key])} is not a positive number")
        return not wrong

    def model(self, tree: dict[str, Any]) -> ModelConfig:
        """The checked model; raises :class:`ConvertError` for its problems and the earlier ones."""
        try:
            cfg = check_model(tree, self.where)
        except ConfigError as e:
            self.problems += str(e).splitlines()
        except RecursionError:
            self.problem("damaged: nested too deeply")
        self.raise_problems()
        return cfg


def is_number(value: Any) -> bool:
    """Whether a value is a positive number within a plausible range."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1e12


def read_settings(path: Path, max_bytes: int = _MAX_SETTINGS_BYTES) -> dict[str, Any]:
    """A JSON object that must be present."""
    if not path.exists():
        raise ConvertError(f"{path} is missing")
    return read_json(path, max_bytes)


def extras(folder: Path) -> list[Path]:
    """Small files to copy with the weights, after a check that each is readable."""
    generation = folder / "generation_config.json"
    if generation.exists():
        read_settings(generation)
    return tokenizer_files.extras(folder) + [generation] * generation.exists()


def manifest_sha256(folder: Path, cfg: ModelConfig, quantize: str | None = None) -> dict[str, str]:
    """SHA-256 of each tensor according to our manifest.json; empty without one.

    Args:
      folder: the weights.
      cfg: the model.
      quantize: "int8" or "int4" if the matrices of the layers are quantized.
    """
    path = folder / "manifest.json"
    tree = read_settings(path, MAX_INDEX_BYTES) if path.exists() else {}
    if tree.get("rotary_layout") != "half":  # absent, or written by another program
        return {}
    digests = {}
    for tensor in layer_tensors(cfg, quantize):
        try:
            entry = tree["tensors"][tensor.spec.path]["sha256"]
            digests[tensor.name] = str(entry[tensor.layer or 0])
        except (KeyError, IndexError, TypeError):
            raise ConvertError(f"{path} is damaged: it has no SHA-256 of {tensor.name}") from None
    return digests


def check_token_ids(given: dict[str, Any], rows: int, report: Report) -> dict[str, Any]:
    """Checked bos, eos and pad for an embedding with this number of rows; -1 and null mean absent.

    Args:
      given: values of bos, eos and pad.
      rows: rows of the embedding.
      report: receives problems and warnings.

    Raises:
      ConvertError: an id that is not possible.
    """
    ids: dict[str, Any] = {}
    for key, value in given.items():
        several = value if key == "eos" and isinstance(value, list) else [value]
        kept = [i for i in several if i is not None and i != -1]
        if not all(type(i) is int and i >= 0 for i in kept) or len(set(kept)) > MAX_STOP_IDS:
            expected = f"an id or at most {MAX_STOP_IDS}" if key == "eos" else "an id"
            report.problem(f"the {key} token id is {short(value)}, expected {expected}")
            continue
        outside = [i for i in kept if i >= rows]
        if outside and key == "pad":
            report.warn(f"ignored pad token id {outside[0]}: there are {rows} rows")
        elif outside:
            report.problem(f"the {key} token id is {outside[0]}, but the embedding has {rows} rows")
        elif kept:
            ids[key] = value if several is value else kept[0]
    report.raise_problems()
    return ids


def copy_small_files(source: ModelFolder, folder: Path) -> None:
    """Copy tokenizers, chat template and generation settings."""
    for name, content in source.generated.items():
        atomic_write(folder / name, content)
    for path in source.extras:
        atomic_write(folder / path.name, path.read_bytes())
    for tokenizer in source.tokenizers:
        name = "tokenizer.json" if tokenizer.kind == "tokenizer.json" else "tokenizer.model"
        atomic_write(folder / name, tokenizer.content)


def check_tokenizers(source: ModelFolder) -> None:
    """Compare the sizes of tokenizers with the embedding, and take missing token ids from them.

    A tokenizer.json with too many tokens is left out if tokenizer.model fits: a padding token was
    added to it, and no row to the embedding.
    """
    rows = source.cfg.vocab_size
    model_fits = any(t.kind == "sentencepiece" and t.size <= rows for t in source.tokenizers)
    for tokenizer in list(source.tokenizers):
        problem = f"{tokenizer.path} has {tokenizer.size} tokens, the embedding only {rows} rows"
        if tokenizer.size > rows and model_fits:
            source.warnings.append(f"{problem}: not used")
            source.tokenizers = [t for t in source.tokenizers if t is not tokenizer]
            continue
        source.token_ids = tokenizer.ids | source.token_ids
        if tokenizer.size > rows:
            raise ConvertError(problem)
        if tokenizer.size < rows:
            source.warnings.append(
                f"the embedding has {rows} rows, {tokenizer.path.name} {tokenizer.size} tokens"
            )
    if not source.tokenizers:
        where = source.path
        source.warnings.append(f"no tokenizer (tokenizer.model or tokenizer.json) in {where}")


def check_names(have: set[str], need: set[str], where: Path) -> list[str]:
    """Problems: tensors that are missing, and tensors that do not belong to the model.

    Args:
      have: names in a file.
      need: names of the model's tensors.
      where: the file, for messages.
    """
    ignored = ("rope.freqs", "rotary_emb.inv_freq")
    extra = [n for n in sorted(have - need) if not n.endswith(ignored)]
    return [f"{where}: {n} is missing" for n in sorted(need - have)] + [
        f"{where}: {n[:200]} is not a tensor of this model" for n in extra
    ]


def find_shards(
    cfg: ModelConfig,
    tensors: dict[str, LayerTensor],
    files: dict[Path, dict[str, TensorSlice]],
    axis_of: Callable[[LayerTensor], int] = lambda tensor: -1,
    settings: str = "config.json",
) -> dict[str, list[Shard]]:
    """Find the tensors of a model in torch files, and check their names, shapes and dtypes.

    Args:
      cfg: the model.
      tensors: its tensors, by their name in the files.
      files: the tensors of each file.
      axis_of: torch axis along which a tensor is split over the files; -1: not split.
      settings: the file that states the sizes, for messages.

    Returns:
      The shards of each tensor, by our name.

    Raises:
      ConvertError: lists every problem.
    """
    problems, shards = [], {}
    dtypes: dict[str, dict[np.dtype, str]] = {}
    for path, slices in files.items():
        problems += check_names(set(slices), set(tensors), path)
    for name, tensor in tensors.items():
        whole, axis = tensor.torch_shape(cfg), axis_of(tensor)
        shape = shard_shape(whole, axis, len(files))
        found = [slices[name] for slices in files.values() if name in slices]
        hint = f" over {len(files)} shards (is a shard missing?)" if axis >= 0 else ""
        for location in found:
            dtypes.setdefault(tensor.spec.path, {}).setdefault(location.dtype, tensor.name)
            if location.shape != shape:
                problems.append(
                    f"{location.path}: {name} has shape {list(location.shape)}, {settings} makes "
                    f"it {list(shape or whole)}{hint}"
                )
        if found and not problems:
            shards[tensor.name] = split_shards(found, axis)
    raise_if_any(problems)
    for kinds in dtypes.values():
        problems += [
            f"{name} is {dtype}: only float16, bfloat16 and float32 weights are supported"
            for dtype, name in kinds.items()
            if dtype not in FLOATS
        ]
        if len(kinds) > 1:
            which = ", ".join(f"{name} is {dtype}" for dtype, name in kinds.items())
            problems.append(f"layers or shards differ in dtype: {which}")
    raise_if_any(problems)
    return shards


def same_matrix(cfg: ModelConfig, embed: list[Shard], output: list[Shard]) -> bool:
    """Whether two [V, D] matrices have the same bits.

    Args:
      cfg: the model.
      embed: shards of the embedding.
      output: shards of the output matrix.
    """
    tensor = layer_tensors(cfg)[0]
    one, other = (TorchWeights(cfg, {"embed": shards}, False) for shards in (embed, output))
    step = rows_per_chunk(tensor, cfg, one.dtype(tensor))
    blocks = [(i, min(i + step, cfg.vocab_size)) for i in range(0, cfg.vocab_size, step)]
    return one.dtype(tensor) == other.dtype(tensor) and all(
        one.read(tensor, *b).tobytes() == other.read(tensor, *b).tobytes() for b in blocks
    )
