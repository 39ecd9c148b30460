"""The table of tensors, and the weights of any layout as pieces of our own: read and written a few
rows at a time.

Our layout stacks the layers (L first) and stores a matrix (in, out), with half-split rotary pairs;
torch stores [out, in], a file a shard, and Meta rotates interleaved pairs. A *unit* is one tensor
of one layer; a *piece* is some rows of a unit in our layout, as a matrix. Whatever is converted
goes through pieces, so memory does not grow with the model. Used by ``python -m
llama_jax.convert``.
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
from llama_jax.convert.formats import Region
from llama_jax.model.quantize import GROUP


class Row(NamedTuple):
    """One line of the table: a tensor under its three names."""

    path: str
    """ours, in the nested parameters"""
    letters: str
    """axes of one layer, ours"""
    meta: str
    """Meta's, without `layers.N.` and `.weight`"""
    hf: str
    """Hugging Face's, without `model.layers.N.` and `.weight`"""
    concat: int
    """torch axis along which Meta's shards are laid side by side; -1: every shard holds all of
    it"""
    rotary: bool = False
    """rows are rotary pairs of heads, interleaved in Meta's files"""
    quantized: str | None = None
    """"int8" or "int4": the integers of a matrix, or its scales, in a quantised checkpoint"""
    scales: bool = False

    @property
    def stacked(self) -> bool:
        return self.path.startswith("blocks/")

    def shape(self, cfg: ModelConfig) -> tuple[int, ...]:
        """As one of our checkpoints holds it, without the layers."""
        shape = cfg.shape(self.letters)
        if self.quantized is None:
            return shape
        if self.scales:
            return shape[0] // self.group(cfg), shape[1]
        return shape if self.quantized == "int8" else (-(-shape[0] // 2), shape[1])

    def group(self, cfg: ModelConfig) -> int:
        """Inputs that share a scale."""
        inputs = cfg.shape(self.letters)[0]
        return inputs if self.quantized == "int8" else math.gcd(inputs, GROUP)

    def parts(self, quantize: str | None) -> list["Row"]:
        """What a checkpoint keeps of it: itself, or a matrix of a layer as scales and integers."""
        if quantize is None or not self.stacked or self.letters == "D":
            return [self]
        scales = self._replace(path=f"{self.path}/scale", quantized=quantize, scales=True)
        return [scales, self._replace(path=f"{self.path}/q", quantized=quantize)]


# fmt: off
TABLE = [
    Row("embed",                 "VD",  "tok_embeddings",  "model.embed_tokens",        1),
    Row("blocks/attention_norm", "D",   "attention_norm",  "input_layernorm",          -1),
    Row("blocks/attention/q",    "DQ",  "attention.wq",    "self_attn.q_proj",          0, True),
    Row("blocks/attention/k",    "DE",  "attention.wk",    "self_attn.k_proj",          0, True),
    Row("blocks/attention/v",    "DE",  "attention.wv",    "self_attn.v_proj",          0),
    Row("blocks/attention/o",    "QD",  "attention.wo",    "self_attn.o_proj",          1),
    Row("blocks/mlp_norm",       "D",   "ffn_norm",        "post_attention_layernorm", -1),
    Row("blocks/mlp/gate",       "DF",  "feed_forward.w1", "mlp.gate_proj",             0),
    Row("blocks/mlp/up",         "DF",  "feed_forward.w3", "mlp.up_proj",               0),
    Row("blocks/mlp/down",       "FD",  "feed_forward.w2", "mlp.down_proj",             1),
    Row("norm",                  "D",   "norm",            "model.norm",               -1),
    Row("unembed",               "DV",  "output",          "lm_head",                   0),
]
# fmt: on


class Unit(NamedTuple):
    """One tensor of one layer (layer is None for the three that have none)."""

    row: Row
    layer: int | None

    @property
    def name(self) -> str:
        return self.row.path if self.layer is None else f"{self.row.path}/{self.layer}"

    def torch_name(self, meta: bool) -> str:
        """Its name in Meta's or Hugging Face's files."""
        name = f"{self.row.meta if meta else self.row.hf}.weight"
        if self.layer is None:
            return name
        return f"{'' if meta else 'model.'}layers.{self.layer}.{name}"

    def shape(self, cfg: ModelConfig) -> tuple[int, int]:
        """(in, out) as the matrix that pieces are rows of; (V, D) for the embedding, (D, 1) for
        a norm."""
        rows, *columns = self.row.shape(cfg)
        return rows, math.prod(columns)

    def torch_shape(self, cfg: ModelConfig) -> tuple[int, ...]:
        """Shape in torch's files, whole."""
        rows, columns = self.shape(cfg)
        if self.row.letters == "D":
            return (rows,)
        return (rows, columns) if self.row.path == "embed" else (columns, rows)

    def whole(self) -> "Unit":
        """The matrix that this is the integers or the scales of."""
        path = self.row.path.rpartition("/")[0]
        return Unit(self.row._replace(path=path, quantized=None, scales=False), self.layer)


def rows_of(cfg: ModelConfig, quantize: str | None = None) -> list[Row]:
    """Lines of the table that a model has; of a checkpoint quantised to "int8" or "int4"."""
    kept = [r for r in TABLE if not (cfg.tie_embeddings and r.path == "unembed")]
    return [part for r in kept for part in r.parts(quantize)]


def units(cfg: ModelConfig, quantize: str | None = None) -> list[Unit]:
    """Every unit of a model, in the order of the files: embedding, layers, norm, output; of a
    checkpoint quantised to "int8" or "int4"."""
    rows = rows_of(cfg, quantize)
    whole = [Unit(r, None) for r in rows if not r.stacked]
    layers = [Unit(r, i) for i in range(cfg.num_layers) for r in rows if r.stacked]
    return whole[:1] + layers + whole[1:]


class Weights(Protocol):
    """The weights of one folder, as pieces of our layout."""

    def dtype(self, unit: Unit) -> np.dtype: ...
    def read(self, unit: Unit, start: int, stop: int) -> np.ndarray:
        """Rows start to stop of a unit, [stop - start, out]; a fresh array."""
        ...

    def write(self, unit: Unit, start: int, piece: np.ndarray) -> None: ...


CHUNK = 32 << 20
"""bytes of an Orbax chunk, at most: few enough files, and a host that needs a slice reads little
else"""


def rows_per_chunk(unit: Unit, cfg: ModelConfig, dtype: np.dtype) -> int:
    """Rows of a unit in one chunk: parts of about equal length."""
    rows, columns = unit.shape(cfg)
    pieces = math.ceil(rows * columns * dtype.itemsize / CHUNK)
    return math.ceil(rows / pieces)


# --- copying ---

BLOCK = 16 << 20
"""bytes of a mapped file touched before its pages are given back"""


def copy(target: np.ndarray, source: np.ndarray) -> None:
    """target[...] = source for matrices, transposing in blocks that fit the cache: 5 times
    numpy's own order."""
    if source.strides[1] > source.strides[0]:
        for i in range(0, source.shape[1], 16):
            target[:, i : i + 16] = source[:, i : i + 16]
    else:
        target[...] = source


def _half(width: int, head_dim: int, swap: bool) -> Iterator[tuple[slice, slice]]:
    """(our columns, Meta's columns): all at once, or for each head the even and the odd ones of
    interleaved pairs."""
    if not swap:
        yield slice(0, width), slice(0, width)
        return
    half = head_dim // 2
    for start in range(0, width, head_dim):
        for odd in (0, 1):
            ours = start + odd * half
            yield slice(ours, ours + half), slice(start + odd, start + head_dim, 2)


class Part(NamedTuple):
    """A rectangle of a torch matrix [out, in], and the file it lies in."""

    region: Region
    row: int
    column: int


# --- torch files ---


class TorchWeights:
    """Meta's or Hugging Face's files: each unit is one part, or a part a shard."""

    def __init__(self, cfg: ModelConfig, parts: dict[str, list[Part]], interleaved: bool):
        self.cfg = cfg
        self.parts = parts
        self.interleaved = interleaved
        self._mapped: dict[Path, mmap.mmap] = {}
        self._files: dict[Path, int] = {}
        self._lock = threading.Lock()

    def dtype(self, unit: Unit) -> np.dtype:
        return self.parts[unit.name][0].region.dtype

    def read(self, unit: Unit, start: int, stop: int) -> np.ndarray:
        """Rows start to stop of a unit in our layout."""
        out = np.empty((stop - start, unit.shape(self.cfg)[1]), self.dtype(unit))
        for part, rows, columns in self._meeting(unit, start, stop):
            self._read_part(unit, part, out[rows.start - start : rows.stop - start, columns], rows)
        return out

    def write(self, unit: Unit, start: int, piece: np.ndarray) -> None:
        """Put rows of our layout where they belong; a norm goes into every shard."""
        for part, rows, columns in self._meeting(unit, start, start + len(piece), every=True):
            ours = piece[rows.start - start : rows.stop - start, columns]
            file = self._file(part.region.path)
            itemsize = piece.dtype.itemsize
            if _kept(unit):  # rows of ours are rows of theirs
                row = rows.start - part.row
                data = np.ascontiguousarray(ours)
                _write(file, data, part.region.offset + row * part.region.strides[0] * itemsize)
                continue
            theirs = np.empty(ours.shape[::-1], piece.dtype)
            for mine, other in _half(ours.shape[1], self.cfg.head_dim, self._swaps(unit)):
                copy(theirs[other], ours[:, mine].T)
            first = part.region.offset + (rows.start - part.column) * itemsize
            if theirs.shape[1] == part.region.shape[1]:
                _write(file, theirs, first)
                continue
            for i, line in enumerate(theirs):
                _write(file, line, first + i * part.region.strides[0] * itemsize)

    def checksum(self, region: Region) -> int:
        """CRC-32 of a tensor's bytes in the file, for the zip's directory."""
        crc, file = 0, self._file(region.path)
        end = region.offset + math.prod(region.shape) * region.dtype.itemsize
        for at in range(region.offset, end, 4 << 20):
            crc = zlib.crc32(os.pread(file, min(4 << 20, end - at), at), crc)
        return crc

    def allocate(self, path: Path, size: int) -> None:
        """Give a file its final size: what was not written yet reads as zeros."""
        os.truncate(self._file(path), size)

    def put(self, path: Path, offset: int, data: bytes) -> None:
        """Write bytes that are no tensor: a head, a directory."""
        _write(self._file(path), np.frombuffer(data, np.uint8), offset)

    def close(self) -> None:
        """Bring what was written to the disk and close the files."""
        for file in self._files.values():
            os.fsync(file)
            os.close(file)
        self._files.clear()
        self._mapped.clear()

    def _swaps(self, unit: Unit) -> bool:
        return self.interleaved and unit.row.rotary

    def _meeting(self, unit: Unit, start: int, stop: int, every: bool = False):
        """(part, our rows, our columns) of the parts that hold some of rows start to stop."""
        parts = self.parts[unit.name]
        if unit.row.concat < 0 and not every:
            parts = parts[:1]  # equal in every shard: checked when the files were opened
        for part in parts:
            high, wide = (*part.region.shape, 1)[:2]
            rows, columns = (part.row, high), (part.column, wide)
            if not _kept(unit):
                rows, columns = columns, rows
            low, top = max(start, rows[0]), min(stop, sum(rows))
            if low < top:
                yield part, slice(low, top), slice(columns[0], sum(columns))

    def _read_part(self, unit: Unit, part: Part, out: np.ndarray, rows: slice) -> None:
        """Copy our rows of one part, letting go of the file's pages as they are done."""
        mapped = self._map(part.region.path)
        theirs = formats.view(part.region, mapped)
        if theirs.ndim == 1:
            theirs = theirs[:, None]
        if _kept(unit):
            theirs = theirs[rows.start - part.row : rows.stop - part.row]
        else:
            theirs = theirs[:, rows.start - part.column : rows.stop - part.column]
        pitch = max(1, abs(part.region.strides[0]) * theirs.itemsize)
        step = max(1, BLOCK // pitch)
        if not _kept(unit):
            step = max(1, step // self.cfg.head_dim) * self.cfg.head_dim  # whole heads
        for i in range(0, len(theirs), step):
            block = theirs[i : i + step]
            if _kept(unit):
                out[i : i + step] = block
            else:
                mine_of_block = out[:, i : i + step]
                for mine, other in _half(len(block), self.cfg.head_dim, self._swaps(unit)):
                    copy(mine_of_block[:, mine], block[other].T)
            low = block.__array_interface__["data"][0] - _address(mapped)
            formats.release(
                mapped, low, low + (len(block) - 1) * pitch + block.shape[1] * block.itemsize
            )

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


def _kept(unit: Unit) -> bool:
    """Not transposed between torch and us."""
    return unit.row.path == "embed" or unit.row.letters == "D"


def _address(mapped: mmap.mmap) -> int:
    return np.frombuffer(mapped, np.uint8).__array_interface__["data"][0]


def _write(file: int, data: np.ndarray, offset: int) -> None:
    rest = data.reshape(-1).view(np.uint8).data
    while rest:
        done = os.pwrite(file, rest, offset)
        rest, offset = rest[done:], offset + done
