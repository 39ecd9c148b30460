"""The table of tensors with their names in each format, and access to torch files in our layout.

Our layout stacks the layers (L first) and stores a matrix as (in, out) with half-split rotary
pairs. Torch stores [out, in], one file per shard, and Meta interleaves the rotary pairs. Conversion
reads and writes a :class:`LayerTensor` a few rows at a time (a row block), so its memory does not
grow with the model.
"""

import math
import mmap
import os
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from llama_jax.config import ModelConfig
from llama_jax.convert import formats
from llama_jax.convert.formats import TensorSlice

Q8_0_BLOCK = (32, 34)
"""weights and bytes of a block of GGUF's Q8_0"""


class TensorSpec(NamedTuple):
    """One line of the table: a tensor with its name in each format."""

    path: str
    """our name, in the nested parameters"""
    letters: str
    """our axes of one layer"""
    meta: str
    """Meta's name, without `layers.N.` and `.weight`"""
    hf: str
    """Hugging Face's name, without `model.layers.N.` and `.weight`"""
    shard_axis: int
    """torch axis that Meta splits over shards; -1: every shard holds the whole tensor"""
    rotary: bool = False
    """the rows are rotary pairs of heads, which Meta interleaves"""
    quantized: str | None = None
    """"int8" or "int4": integers or scales of a matrix in a quantized checkpoint; a type of GGUF,
    such as "Q8_0": the bytes of the blocks of a matrix in a GGUF file"""
    scales: bool = False
    block: tuple[int, int] = (1, 1)
    """weights and bytes of a block in a GGUF file"""

    @property
    def stacked(self) -> bool:
        return self.path.startswith("blocks/")

    def shape(self, cfg: ModelConfig) -> tuple[int, ...]:
        """Shape of one layer in our checkpoints."""
        shape = cfg.shape(self.letters)
        if self.quantized is None:
            return shape
        if self.block != (1, 1):  # blocks are along the inputs, and along rows of the embedding
            axis = self.block_axis
            count = shape[axis] // self.block[0] * self.block[1]
            return tuple(count if i == axis else n for i, n in enumerate(shape))
        if self.scales:
            return shape[0] // self.group(cfg), shape[1]
        return shape if self.quantized == "int8" else (-(-shape[0] // 2), shape[1])

    def group(self, cfg: ModelConfig) -> int:
        """Number of inputs that share a scale."""
        from llama_jax.model.quantize import GROUP  # here, because it imports JAX

        inputs = cfg.shape(self.letters)[0]
        return inputs if self.quantized == "int8" else math.gcd(inputs, GROUP)

    @property
    def quantized_dtype(self) -> np.dtype | None:
        """dtype of the scales or integers; None for other tensors."""
        if self.quantized is None:
            return None
        packed = np.int8 if self.quantized == "int8" else np.uint8  # uint8 for blocks too
        return np.dtype(np.float32 if self.scales else packed)

    @property
    def block_axis(self) -> int:
        """Our axis along which a GGUF file has blocks: the contiguous one of its matrices."""
        return 1 if self.letters == "VD" else 0

    def in_blocks(self, kind: str, block: tuple[int, int]) -> "TensorSpec":
        """The bytes of this matrix in a GGUF file.

        Args:
          kind: name of the type, such as "Q8_0".
          block: weights and bytes of a block.
        """
        return self._replace(path=f"{self.path}/{kind}", quantized=kind, block=block)

    def stored(self, quantize: str | None, cfg: ModelConfig) -> list["TensorSpec"]:
        """The arrays of a checkpoint: the tensor itself, or scales and integers of a matrix.

        Args:
          quantize: "int8" or "int4" for the matrices of the layers; "Q8_0": all matrices whose rows
            in a GGUF file are whole blocks.
          cfg: the model.
        """
        if quantize is None or self.letters == "D":
            return [self]
        if quantize == "Q8_0":
            whole = self.shape(cfg)[self.block_axis] % Q8_0_BLOCK[0] == 0
            return [self.in_blocks("Q8_0", Q8_0_BLOCK)] if whole else [self]
        if not self.stacked:
            return [self]
        scales = self._replace(path=f"{self.path}/scale", quantized=quantize, scales=True)
        return [scales, self._replace(path=f"{self.path}/q", quantized=quantize)]


# fmt: off
TABLE = [
    TensorSpec("embed",                 "VD", "tok_embeddings",  "model.embed_tokens", 1),
    TensorSpec("blocks/attention_norm", "D",  "attention_norm",  "input_layernorm", -1),
    TensorSpec("blocks/attention/q",    "DQ", "attention.wq",    "self_attn.q_proj", 0, True),
    TensorSpec("blocks/attention/k",    "DE", "attention.wk",    "self_attn.k_proj", 0, True),
    TensorSpec("blocks/attention/v",    "DE", "attention.wv",    "self_attn.v_proj", 0),
    TensorSpec("blocks/attention/o",    "QD", "attention.wo",    "self_attn.o_proj", 1),
    TensorSpec("blocks/mlp_norm",       "D",  "ffn_norm",        "post_attention_layernorm", -1),
    TensorSpec("blocks/mlp/gate",       "DF", "feed_forward.w1", "mlp.gate_proj", 0),
    TensorSpec("blocks/mlp/up",         "DF", "feed_forward.w3", "mlp.up_proj", 0),
    TensorSpec("blocks/mlp/down",       "FD", "feed_forward.w2", "mlp.down_proj", 1),
    TensorSpec("norm",                  "D",  "norm",            "model.norm", -1),
    TensorSpec("unembed",               "DV", "output",          "lm_head", 0),
]
# fmt: on
_GGUF_NAMES = {
    "tok_embeddings": "token_embd",
    "norm": "output_norm",
    "output": "output",
    "attention_norm": "attn_norm",
    "attention.wq": "attn_q",
    "attention.wk": "attn_k",
    "attention.wv": "attn_v",
    "attention.wo": "attn_output",
    "ffn_norm": "ffn_norm",
    "feed_forward.w1": "ffn_gate",
    "feed_forward.w3": "ffn_up",
    "feed_forward.w2": "ffn_down",
}  # fmt: skip
"""GGUF's names, without `blk.N.` and `.weight`, by Meta's"""


class LayerTensor(NamedTuple):
    """One tensor of one layer; `layer` is None for the three tensors outside the layers."""

    spec: TensorSpec
    layer: int | None

    @property
    def name(self) -> str:
        return self.spec.path if self.layer is None else f"{self.spec.path}/{self.layer}"

    @property
    def transposed(self) -> bool:
        """Whether torch's orientation differs from ours: for matrices, but not the embedding."""
        return self.spec.letters not in ("VD", "D")

    @property
    def meta_name(self) -> str:
        prefix = "" if self.layer is None else f"layers.{self.layer}."
        return f"{prefix}{self.spec.meta}.weight"

    @property
    def hf_name(self) -> str:
        prefix = "" if self.layer is None else f"model.layers.{self.layer}."
        return f"{prefix}{self.spec.hf}.weight"

    @property
    def gguf_name(self) -> str:
        prefix = "" if self.layer is None else f"blk.{self.layer}."
        return f"{prefix}{_GGUF_NAMES[self.spec.meta]}.weight"

    def shape(self, cfg: ModelConfig) -> tuple[int, int]:
        """Our shape as a matrix: (in, out); (V, D) for the embedding, (D, 1) for a norm."""
        rows, *columns = self.spec.shape(cfg)
        return rows, math.prod(columns)

    def torch_shape(self, cfg: ModelConfig) -> tuple[int, ...]:
        """Shape of the unsplit tensor in torch files."""
        shape = self.spec.shape(cfg)
        return shape[::-1] if self.transposed else shape

    def unquantized(self) -> "LayerTensor":
        """The matrix whose integers, scales or blocks these are."""
        path = self.spec.path.rpartition("/")[0]
        spec = self.spec._replace(path=path, quantized=None, scales=False, block=(1, 1))
        return LayerTensor(spec, self.layer)


def tensor_specs(cfg: ModelConfig, quantize: str | None = None) -> list[TensorSpec]:
    """Lines of the table that a model has, quantized to "int8", "int4" or "Q8_0" if given."""
    kept = [s for s in TABLE if not (cfg.tie_embeddings and s.path == "unembed")]
    return [stored for s in kept for stored in s.stored(quantize, cfg)]


def layer_tensors(cfg: ModelConfig, quantize: str | None = None) -> list[LayerTensor]:
    """Every tensor of a model in file order: embedding, layers, norm, output."""
    specs = tensor_specs(cfg, quantize)
    outside = [LayerTensor(s, None) for s in specs if not s.stacked]
    layers = [LayerTensor(s, i) for i in range(cfg.num_layers) for s in specs if s.stacked]
    return outside[:1] + layers + outside[1:]


class Weights(Protocol):
    """The weights of one folder, accessed by row blocks of our layout."""

    def dtype(self, tensor: LayerTensor) -> np.dtype: ...
    def read(self, tensor: LayerTensor, start: int, stop: int) -> np.ndarray:
        """Rows start to stop of a tensor, [stop - start, out], in a new array.

        Args:
          tensor: what to read.
          start: first row.
          stop: row after the last one.
        """
        ...

    def write(self, tensor: LayerTensor, start: int, row_block: np.ndarray) -> None: ...


CHUNK = 32 << 20
"""largest size of an Orbax chunk in bytes: few enough files, and a host that needs a slice reads
little else"""


def rows_per_chunk(tensor: LayerTensor, cfg: ModelConfig, dtype: np.dtype) -> int:
    """Rows of a tensor in one chunk; all chunks have about equal length.

    Args:
      tensor: the tensor.
      cfg: the model.
      dtype: of the stored array.
    """
    rows, columns = tensor.shape(cfg)
    chunks = math.ceil(rows * columns * dtype.itemsize / CHUNK)
    return math.ceil(rows / chunks)


# Torch files --------------------------------------------------------------------------------------

BLOCK = 16 << 20
"""bytes of a mapped file that are read before their pages are released"""


class Shard(NamedTuple):
    """A rectangle of a torch matrix [out, in], from `row` and `column` on, and its location."""

    slice: TensorSlice
    row: int
    column: int


def shard_shape(whole: tuple[int, ...], axis: int, count: int) -> tuple[int, ...] | None:
    """Shape of one of `count` shards; -1: not split. None: `count` does not divide the axis.

    Args:
      whole: shape of the unsplit tensor.
      axis: axis that is split; -1: none.
      count: number of shards.
    """
    if axis < 0:
        return whole
    shape = tuple(n // count if i == axis else n for i, n in enumerate(whole))
    return None if whole[axis] % count else shape


def split_shards(slices: list[TensorSlice], axis: int) -> list[Shard]:
    """Shards of a tensor that is split along an axis; -1: each shard holds the whole tensor."""
    size = slices[0].shape[axis]
    start = lambda i, a: i * size if a == axis else 0
    return [Shard(s, start(i, 0), start(i, 1)) for i, s in enumerate(slices)]


class TorchWeights:
    """The weights in Meta or Hugging Face files; each tensor has one shard or several.

    Args:
      cfg: the model.
      shards: shards of each tensor, by its name.
      interleaved: rotary pairs are interleaved, as in Meta's files.

    Example:
      >>> weights = TorchWeights(cfg, {"embed": [Shard(location, 0, 0)]}, interleaved=False)
      >>> rows = weights.read(layer_tensors(cfg)[0], 0, 100)
    """

    def __init__(self, cfg: ModelConfig, shards: dict[str, list[Shard]], interleaved: bool):
        self.cfg = cfg
        self.shards = shards
        self.interleaved = interleaved
        self._mapped: dict[Path, mmap.mmap] = {}
        self._files: dict[Path, int] = {}
        self._lock = threading.Lock()

    def dtype(self, tensor: LayerTensor) -> np.dtype:
        return self.shards[tensor.name][0].slice.dtype

    def read(self, tensor: LayerTensor, start: int, stop: int) -> np.ndarray:
        """Rows start to stop of a tensor in our layout."""
        out = np.empty((stop - start, tensor.shape(self.cfg)[1]), self.dtype(tensor))
        shards = self.shards[tensor.name]
        if tensor.spec.shard_axis < 0:
            shards = shards[:1]  # all shards are equal, which was checked when they were opened
        for shard, rows, columns in _overlaps(tensor, shards, start, stop):
            block = out[rows.start - start : rows.stop - start, columns]
            self._read_shard(tensor, shard, block, rows)
        return out

    def write(self, tensor: LayerTensor, start: int, row_block: np.ndarray) -> None:
        """Write rows of our layout; a norm is written into every shard."""
        itemsize = row_block.dtype.itemsize
        stop = start + len(row_block)
        for shard, rows, columns in _overlaps(tensor, self.shards[tensor.name], start, stop):
            ours = row_block[rows.start - start : rows.stop - start, columns]
            file, location = self._file(shard.slice.path), shard.slice
            row_bytes = location.strides[0] * itemsize
            if not tensor.transposed:
                offset = location.offset + (rows.start - shard.row) * row_bytes
                _write(file, np.ascontiguousarray(ours), offset)
                continue
            theirs = np.empty(ours.shape[::-1], row_block.dtype)
            for mine, other in self._columns(tensor, ours.shape[1]):
                _copy(theirs[other], ours[:, mine].T)
            offset = location.offset + (rows.start - shard.column) * itemsize
            if theirs.shape[1] == location.shape[1]:
                _write(file, theirs, offset)
                continue
            for i, line in enumerate(theirs):
                _write(file, line, offset + i * row_bytes)

    def checksum(self, location: TensorSlice) -> int:
        """CRC-32 of a tensor's bytes in the file, for the directory of a zip."""
        crc, file = 0, self._file(location.path)
        end = location.offset + math.prod(location.shape) * location.dtype.itemsize
        for at in range(location.offset, end, 4 << 20):
            crc = zlib.crc32(os.pread(file, min(4 << 20, end - at), at), crc)
        return crc

    def allocate(self, path: Path, size: int) -> None:
        """Give a file its final size; unwritten bytes read as zeros."""
        os.truncate(self._file(path), size)

    def write_bytes(self, path: Path, offset: int, data: bytes) -> None:
        """Write bytes outside the tensors, such as a header."""
        _write(self._file(path), np.frombuffer(data, np.uint8), offset)

    def close(self) -> None:
        """Sync the written files to the disk and close them."""
        for file in self._files.values():
            os.fsync(file)
            os.close(file)
        self._files.clear()
        self._mapped.clear()

    def _read_shard(self, tensor: LayerTensor, shard: Shard, out: np.ndarray, rows: slice) -> None:
        """Copy our rows of one shard, releasing the pages of the file after each block."""
        mapped = self._map(shard.slice.path)
        theirs = formats.view(shard.slice, mapped)
        if theirs.ndim == 1:
            theirs = theirs[:, None]
        if tensor.transposed:
            theirs = theirs[:, rows.start - shard.column : rows.stop - shard.column]
        else:
            theirs = theirs[rows.start - shard.row : rows.stop - shard.row]
        row_bytes = max(1, abs(shard.slice.strides[0]) * theirs.itemsize)
        step = max(1, BLOCK // row_bytes)
        if tensor.transposed:
            step = max(1, step // self.cfg.head_dim) * self.cfg.head_dim  # whole heads
        for i in range(0, len(theirs), step):
            block = theirs[i : i + step]
            if tensor.transposed:
                ours = out[:, i : i + step]
                for mine, other in self._columns(tensor, len(block)):
                    _copy(ours[:, mine], block[other].T)
            else:
                out[i : i + step] = block
            start = _address(block) - _address(np.frombuffer(mapped, np.uint8))
            size = (len(block) - 1) * row_bytes + block.shape[1] * block.itemsize
            formats.release(mapped, start, start + size)

    def _columns(self, tensor: LayerTensor, width: int) -> Iterator[tuple[slice, slice]]:
        """(our columns, rows of the file) that correspond: all at once, or the even and the odd
        ones of each head where the file interleaves rotary pairs."""
        if not (self.interleaved and tensor.spec.rotary):
            yield slice(0, width), slice(0, width)
            return
        head_dim = self.cfg.head_dim
        half = head_dim // 2
        for start in range(0, width, head_dim):
            for odd in (0, 1):
                ours = start + odd * half
                yield slice(ours, ours + half), slice(start + odd, start + head_dim, 2)

    def _map(self, path: Path) -> mmap.mmap:
        with self._lock:
            if path not in self._mapped:
                self._mapped[path] = formats.map_file(path)
            return self._mapped[path]

    def _file(self, path: Path) -> int:
        with self._lock:
            if path not in self._files:
                self._files[path] = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            return self._files[path]


def _overlaps(tensor: LayerTensor, shards: list[Shard], start: int, stop: int):
    """(shard, our rows, our columns) of the shards that hold some of rows start to stop."""
    for shard in shards:
        height, width = (*shard.slice.shape, 1)[:2]
        rows, columns = (shard.row, height), (shard.column, width)
        if tensor.transposed:
            rows, columns = columns, rows
        first, last = max(start, rows[0]), min(stop, sum(rows))
        if first < last:
            yield shard, slice(first, last), slice(columns[0], sum(columns))


def _copy(target: np.ndarray, source: np.ndarray) -> None:
    """target[...] = source for matrices; a transpose in blocks that fit the cache is 5 times as
    fast as numpy's own."""
    if source.strides[1] > source.strides[0]:
        for i in range(0, source.shape[1], 16):
            target[:, i : i + 16] = source[:, i : i + 16]
    else:
        target[...] = source


def _address(array: np.ndarray) -> int:
    return array.__array_interface__["data"][0]


def _write(file: int, data: np.ndarray, offset: int) -> None:
    rest = data.reshape(-1).view(np.uint8).data
    while rest:
        done = os.pwrite(file, rest, offset)
        rest, offset = rest[done:], offset + done
