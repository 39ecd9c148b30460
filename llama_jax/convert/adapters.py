"""LoRA adapters: our adapter folders, and the weights of a base with an adapter merged into them.

An adapter folder looks like a run: ``model.json`` with the settings of the adapter, the arrays
``blocks.attention.q.a`` [L, in, r] and so on in ``steps/STEP/model``, tokenizer and chat template.
"""

import dataclasses
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from llama_jax.checkpoint import file_hashes
from llama_jax.checkpoint.arrays import check_item, open_array
from llama_jax.checkpoint.model_json import (
    adapter_settings,
    lora_of,
    make_metadata,
    read_metadata,
    write_metadata,
)
from llama_jax.config import ConfigError, LoraConfig, ModelConfig
from llama_jax.config.model_config import different_sizes
from llama_jax.convert import orbax, sources
from llama_jax.convert.formats import ConvertError, raise_if_any
from llama_jax.convert.sources import Report, SourceCheckpoint
from llama_jax.convert.tensors import TABLE, LayerTensor, TensorSpec, Weights
from llama_jax.data import tokenizer_files
from llama_jax.data.tokenizer_files import TokenizerFile

MATRICES = {s.path.rpartition("/")[2]: s for s in TABLE if s.stacked and s.letters != "D"}
"""Line of the table of each matrix that can have an adapter, by its name in ``lora.targets``."""
_BLOCK = 4 << 20
"""elements of a matrix that are merged at once"""


class Pair(NamedTuple):
    """The two matrices of one target in all layers, float32."""

    a_LIr: np.ndarray
    b_LrO: np.ndarray


@dataclasses.dataclass
class Adapter:
    """A LoRA adapter, and the small files of the chat model that it makes of its base.

    Example:
      >>> adapter = open_adapter(Path("checkpoints/alpaca-lora"))
      >>> adapter.pairs["q"].a_LIr.shape
      (32, 4096, 16)
    """

    path: Path
    cfg: ModelConfig
    """the base"""
    lora: LoraConfig
    base: dict[str, str]
    """path and sha256 of the base, and quantize where training quantized it"""
    sha256: str
    """of the files of the arrays"""
    lineage: dict[str, Any]
    """what it was trained from, as in model.json"""
    pairs: dict[str, Pair]
    files: list[Path]
    """the files of the arrays"""
    token_ids: dict[str, Any]
    tokenizers: list[TokenizerFile]
    extras: list[Path]
    warnings: list[str]
    generated: dict[str, bytes] = dataclasses.field(default_factory=dict)
    """as in :class:`SourceCheckpoint`"""

    @property
    def scale(self) -> float:
        """The factor of the product a b."""
        from llama_jax.model.lora import scale_of  # here, because it imports JAX

        return scale_of(self.lora)

    @property
    def settings(self) -> dict[str, Any]:
        """Its settings in model.json."""
        return adapter_settings(self.lora, self.base)

    @property
    def num_params(self) -> int:
        return sum(x.size for pair in self.pairs.values() for x in pair)

    def describe(self) -> str:
        """The adapter in some lines of text."""
        lora = self.lora
        lines = [
            f"found: {self.path}: LoRA adapter, {self.num_params:,} parameters",
            f"  rank {lora.rank}, alpha {lora.alpha:g}{', rsLoRA' * lora.rslora}, "
            f"targets {', '.join(lora.targets)}",
            f"  base: {self.base['path'] or 'not named'}",
        ]
        return "\n".join(lines + [f"  note: {warning}" for warning in self.warnings])


def is_adapter(path: Path) -> bool:
    """Whether a folder, or a step of one, is one of our adapters."""
    try:
        return "adapter" in read_metadata(orbax.root_of(path))[1]
    except ConfigError:  # none, or damaged: an error where it is read
        return False


def recorded_base(path: Path) -> dict[str, str]:
    """The base that one of our adapters was trained on."""
    return read_metadata(orbax.root_of(path))[1]["adapter"]["base"]


def pair_shapes(cfg: ModelConfig, spec: TensorSpec, rank: int) -> Pair:
    """Shapes of `a` and `b` of one matrix in all layers."""
    inputs, outputs = cfg.shape(spec.letters)
    return Pair((cfg.num_layers, inputs, rank), (cfg.num_layers, rank, outputs))  # type: ignore[arg-type]


def check_size(cfg: ModelConfig, lora: LoraConfig, max_memory: int, where: Path) -> None:
    """Raise :class:`ConvertError` if the arrays of an adapter need more memory than allowed.

    Args:
      cfg: the base.
      lora: rank and targets.
      max_memory: in bytes.
      where: the adapter, for the message.
    """
    shapes = [s for t in lora.targets for s in pair_shapes(cfg, MATRICES[t], lora.rank)]
    if (need := 4 * sum(map(math.prod, shapes))) > max_memory:
        raise ConvertError(
            f"{where}: an adapter of rank {lora.rank} takes {need / 1e9:.1f} GB in memory; give a "
            f"--max-memory above that (now {max_memory / 1e9:.1f} GB)"
        )


# Reader -------------------------------------------------------------------------------------------


def open_adapter(path: Path, max_memory: int = 2 << 30) -> Adapter:
    """Read one of our adapters.

    Args:
      path: its folder, or one step of it.
      max_memory: limit for its arrays, in bytes.

    Raises:
      ConvertError: it cannot be used; lists every reason.
      OSError: a file cannot be read.
    """
    root = orbax.root_of(path)
    cfg, metadata = read_metadata(root)
    lora = lora_of(metadata)
    check_size(cfg, lora, max_memory, path)
    step, steps = orbax.find_step(root, path)
    warnings = orbax.other_steps(root, step, steps)
    raise_if_any(file_hashes.find_problems(root, file_hashes.listed_files(root, step, "model")))
    report = Report(f"{root}/model.json")
    token_ids = sources.check_token_ids(metadata["token_ids"], cfg.vocab_size, report)
    item = root / "steps" / str(step) / "model"
    adapter = Adapter(
        path, cfg, lora, metadata["adapter"]["base"], file_hashes.weights_sha256(root, step),
        metadata.get("lineage") or {}, _read_pairs(item, cfg, lora), [item], token_ids,
        tokenizer_files.find(root), sources.extras(root), warnings + report.warnings,
    )  # fmt: skip
    sources.check_tokenizers(adapter)
    return adapter


def _read_pairs(item: Path, cfg: ModelConfig, lora: LoraConfig) -> dict[str, Pair]:
    """The arrays of a step, after a check of their names and shapes."""
    shapes = {t: pair_shapes(cfg, MATRICES[t], lora.rank) for t in lora.targets}
    names = {t: [f"{MATRICES[t].path}/{x}" for x in "ab"] for t in lora.targets}
    have = orbax.array_names(item)
    raise_if_any(sources.check_names(have, {n for pair in names.values() for n in pair}, item))
    expected = {
        name.replace("/", "."): tuple(shape)
        for t in lora.targets
        for name, shape in zip(names[t], shapes[t], strict=True)
    }
    check_item(item, expected)
    pairs: dict[str, Pair] = {}
    for t in lora.targets:
        arrays = [np.asarray(open_array(item, n).read().result(), np.float32) for n in names[t]]
        raise_if_any([
            f"{item}: {name} has shape {list(x.shape)}, model.json makes it {list(shape)}"
            for name, x, shape in zip(names[t], arrays, shapes[t], strict=True)
            if x.shape != tuple(shape)
        ])  # fmt: skip
        pairs[t] = Pair(*arrays)
    return pairs


def check_base(adapter: Adapter, base: SourceCheckpoint) -> None:
    """Raise :class:`ConvertError` if an adapter does not belong to these weights."""
    raise_if_other_sizes(adapter.path, base.path, different_sizes(adapter.cfg, base.cfg))
    recorded, found = adapter.base["sha256"], base_sha256(base)
    if recorded and found and recorded != found:
        raise ConvertError(
            f"{adapter.path} was trained on other weights than those of {base.path}: their SHA-256 "
            "differ; give --base BASE, the weights that it was trained on"
        )


def raise_if_other_sizes(adapter: Path, base: Path, sizes: Iterable[tuple[str, Any, Any]]) -> None:
    """Raise :class:`ConvertError` if there are sizes in which an adapter and a base differ.

    Args:
      adapter: the adapter.
      base: the base.
      sizes: name, value in the adapter and value in the base.
    """
    if different := [f"{n} is {a} in the adapter, {b} in the base" for n, a, b in sizes]:
        raise ConvertError(
            f"{adapter} is an adapter of another model than {base}: {'; '.join(different)}"
        )


def base_sha256(base: SourceCheckpoint) -> str:
    """SHA-256 that identifies the weights of one of our checkpoints; "" for other formats."""
    if base.format != "orbax":
        return ""
    step = base.files[0].parent
    return file_hashes.weights_sha256(step.parents[1], int(step.name))


# Writer -------------------------------------------------------------------------------------------


def write_adapter(adapter: Adapter, folder: Path) -> None:
    """Write an adapter folder with one step, 0, into an empty folder."""
    arrays, values = {}, {}
    for target, pair in adapter.pairs.items():
        for x, array in zip("ab", pair, strict=True):
            name = f"{MATRICES[target].path}/{x}"
            values[name] = array
            arrays[name] = orbax.Declared(array.shape, (1, *array.shape[1:]), array.dtype)
    orbax.create_arrays(folder / "steps", arrays)
    item = folder / "steps/0/model"
    for name, array in values.items():
        open_array(item, name).write(array).result()
    metadata = make_metadata(
        adapter.cfg, adapter.token_ids, adapter=adapter.settings, lineage=adapter.lineage or None
    )
    write_metadata(folder, metadata)
    sources.copy_small_files(adapter, folder)
    files = file_hashes.hash_files(folder, set(file_hashes.files_below(folder)))
    file_hashes.write_list(folder / file_hashes.MANIFEST, metadata | {"files": files})


# Merge --------------------------------------------------------------------------------------------


class MergedWeights:
    """The weights of a base with the update scale a b added to each targeted matrix: summed in
    float32 and rounded once, to the dtype that is written.

    Args:
      base: the weights of the base.
      adapter: the update.
      dtypes: dtype of each line of the table, as written; a line without one gets float32.

    Example:
      >>> weights = MergedWeights(source.weights, adapter, plan.dtypes)
      >>> block = weights.read(layer_tensors(adapter.cfg)[2], 0, 100)
    """

    def __init__(self, base: Weights, adapter: Adapter, dtypes: dict[str, np.dtype]):
        self.base, self.dtypes = base, dtypes
        self.scale = np.float32(adapter.scale)
        self.pairs = {MATRICES[t].path: pair for t, pair in adapter.pairs.items()}
        self._squares: dict[str, dict[int, tuple[float, float]]] = {}
        """by tensor and first row: sums of squares of the lost part and of the update"""

    def dtype(self, tensor: LayerTensor) -> np.dtype:
        if tensor.spec.path not in self.pairs:
            return self.base.dtype(tensor)
        return self.dtypes.get(tensor.spec.path, np.dtype(np.float32))

    def read(self, tensor: LayerTensor, start: int, stop: int) -> np.ndarray:
        """Rows start to stop of a tensor, merged."""
        block = self.base.read(tensor, start, stop)
        pair = self.pairs.get(tensor.spec.path)
        if pair is None or tensor.layer is None:
            return block
        a_Ir, b_rO = pair.a_LIr[tensor.layer, start:stop], pair.b_LrO[tensor.layer]
        out = np.empty(block.shape, self.dtype(tensor))
        step = max(1, _BLOCK // block.shape[1])
        for i in range(0, len(block), step):
            rows = slice(i, i + step)
            w, update = block[rows].astype(np.float32), self.scale * (a_Ir[rows] @ b_rO)
            total = w + update
            with np.errstate(over="ignore"):
                out[rows] = total
            rounded = out[rows].astype(np.float32)
            if (np.isfinite(total) & ~np.isfinite(rounded)).any():
                raise ConvertError(
                    f"{tensor.name} with the adapter overflows in {out.dtype.name}; choose another "
                    "--dtype"
                )
            lost = rounded - w - update
            sums = float(np.vdot(lost, lost)), float(np.vdot(update, update))
            self._squares.setdefault(tensor.name, {})[start + i] = sums
        return out

    def write(self, tensor: LayerTensor, start: int, row_block: np.ndarray) -> None:
        raise NotImplementedError("a source is only read")

    def rounding(self) -> str:
        """How much of the update the rounding lost: rms of the lost part over rms of the update,
        in all matrices and in the worst one."""
        sums = {n: np.sum([*s.values()], axis=0) for n, s in sorted(self._squares.items())}
        if not sums:
            return "rounding: not measured, because all matrices were written before"
        ratio = lambda lost, update: math.sqrt(lost / update) if update else 0.0
        worst = max(sums, key=lambda name: ratio(*sums[name]))
        return (
            f"rounding lost {ratio(*np.sum([*sums.values()], axis=0)):.2%} of the update (rms), at "
            f"most {ratio(*sums[worst]):.2%}, in {worst}"
        )


class DequantizedWeights:
    """Weights whose matrices went through int8 or int4, in float32: what an adapter was trained on
    if training quantized its base.

    Args:
      source: weights with integers and scales: of a quantized checkpoint, or
        :class:`~llama_jax.convert.quantize.QuantizedWeights`.
      cfg: the model.
      kind: "int8" or "int4".

    Example:
      >>> weights = DequantizedWeights(QuantizedWeights(source.weights, cfg), cfg, "int4")
    """

    def __init__(self, source: Weights, cfg: ModelConfig, kind: str):
        self.source, self.cfg, self.kind = source, cfg, kind

    def dtype(self, tensor: LayerTensor) -> np.dtype:
        if len(tensor.spec.stored(self.kind, self.cfg)) == 1:
            return self.source.dtype(tensor)
        return np.dtype(np.float32)

    def read(self, tensor: LayerTensor, start: int, stop: int) -> np.ndarray:
        """Rows start to stop of a tensor."""
        from llama_jax.model.quantize import unpack  # here, because it imports JAX

        parts = [
            LayerTensor(spec, tensor.layer) for spec in tensor.spec.stored(self.kind, self.cfg)
        ]
        if len(parts) == 1:
            return self.source.read(tensor, start, stop)
        scales, integers = parts
        group = integers.spec.group(self.cfg)
        first, last = start // group, -(-stop // group)
        scale = np.repeat(self.source.read(scales, first, last), group, axis=0)
        scale = scale[start - first * group :][: stop - start]
        if self.kind == "int8":
            return self.source.read(integers, start, stop) * scale
        packed = self.source.read(integers, start // 2, -(-stop // 2))
        return unpack(packed, 2 * len(packed))[start % 2 :][: stop - start] * scale

    def write(self, tensor: LayerTensor, start: int, row_block: np.ndarray) -> None:
        raise NotImplementedError("a source is only read")


def merge_source(adapter: Adapter, base: SourceCheckpoint) -> SourceCheckpoint:
    """The base with the small files of an adapter, for :class:`MergedWeights` of its weights."""
    check_base(adapter, base)
    kind = base.quantize or adapter.base.get("quantize")
    weights, warnings = base.weights, base.warnings + adapter.warnings
    if kind is not None:
        from llama_jax.convert.quantize import QuantizedWeights  # here, because it imports JAX

        stored = weights if base.quantize else QuantizedWeights(weights, base.cfg)
        weights = DequantizedWeights(stored, base.cfg, kind)
        warnings.append(
            f"merged with the base's matrices rounded to {kind}, as in training, not with its "
            "original weights"
        )
    origin = {"path": str(adapter.path.resolve()), "sha256": adapter.sha256}
    lineage = {"base": adapter.base} | adapter.lineage | {"adapter": adapter.settings | origin}
    changed = tuple(MATRICES[t].path + "/" for t in adapter.lora.targets)
    sha256 = {n: s for n, s in base.sha256.items() if not (kind or n.startswith(changed))}
    return dataclasses.replace(
        base, weights=weights, files=base.files + adapter.files,
        token_ids=adapter.token_ids, tokenizers=adapter.tokenizers, extras=adapter.extras,
        warnings=warnings, quantize=None, sha256=sha256, generated=adapter.generated,
        lineage=lineage,
    )  # fmt: skip
