"""The table of tensors, and the weights of any layout as pieces of our own: read and written a few rows at a time.

Our layout stacks the layers (L first) and stores a matrix (in, out), with half-split rotary pairs; torch stores
[out, in], a file a shard, and Meta rotates interleaved pairs. A *unit* is one tensor of one layer; a *piece* is some
rows of a unit in our layout, as a matrix. Whatever is converted goes through pieces, so memory does not grow with the
model. Used by ``python -m llama_jax.convert``.
"""

import math
import mmap
import os
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from llama_jax import formats
from llama_jax.config import ModelConfig
from llama_jax.formats import Region


class Row(NamedTuple):
    """One line of the table: a tensor under its three names."""

    path: str
    """ours, in the nested parameters"""
    letters: str
    """axes of one layer, ours"""
    meta: str
    hf: str
    concat: int
    """torch axis along which Meta's shards are laid side by side; -1: every shard holds all of it"""
    rotary: bool = False
    """rows are rotary pairs of heads, interleaved in Meta's files"""

    @property
    def stacked(self) -> bool:
        return self.path.startswith("blocks/")


# fmt: off
TABLE = [
    Row("embed",                 "VD",  "tok_embeddings.weight",              "model.embed_tokens.weight",                       1),
    Row("blocks/attention_norm", "D",   "layers.{}.attention_norm.weight",    "model.layers.{}.input_layernorm.weight",         -1),
    Row("blocks/attention/q",    "DNH", "layers.{}.attention.wq.weight",      "model.layers.{}.self_attn.q_proj.weight",         0, rotary=True),
    Row("blocks/attention/k",    "DKH", "layers.{}.attention.wk.weight",      "model.layers.{}.self_attn.k_proj.weight",         0, rotary=True),
    Row("blocks/attention/v",    "DKH", "layers.{}.attention.wv.weight",      "model.layers.{}.self_attn.v_proj.weight",         0),
    Row("blocks/attention/o",    "NHD", "layers.{}.attention.wo.weight",      "model.layers.{}.self_attn.o_proj.weight",         1),
    Row("blocks/mlp_norm",       "D",   "layers.{}.ffn_norm.weight",          "model.layers.{}.post_attention_layernorm.weight", -1),
    Row("blocks/mlp/gate",       "DF",  "layers.{}.feed_forward.w1.weight",   "model.layers.{}.mlp.gate_proj.weight",            0),
    Row("blocks/mlp/up",         "DF",  "layers.{}.feed_forward.w3.weight",   "model.layers.{}.mlp.up_proj.weight",              0),
    Row("blocks/mlp/down",       "FD",  "layers.{}.feed_forward.w2.weight",   "model.layers.{}.mlp.down_proj.weight",            1),
    Row("norm",                  "D",   "norm.weight",                        "model.norm.weight",                              -1),
    Row("unembed",               "DV",  "output.weight",                      "lm_head.weight",                                  0),
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
        return (self.row.meta if meta else self.row.hf).format(self.layer)

    def shape(self, cfg: ModelConfig) -> tuple[int, int]:
        """(in, out) as the matrix that pieces are rows of; (V, D) for the embedding, (D, 1) for a norm."""
        letters = self.row.letters
        split = 2 if letters == "NHD" else 1
        return math.prod(cfg.shape(letters[:split])), math.prod(cfg.shape(letters[split:]))

    def torch_shape(self, cfg: ModelConfig) -> tuple[int, ...]:
        """Shape in torch's files, whole."""
        rows, columns = self.shape(cfg)
        if self.row.letters == "D":
            return (rows,)
        return (rows, columns) if self.row.path == "embed" else (columns, rows)

    def step(self, cfg: ModelConfig) -> int:
        """Pieces begin at multiples of this row: whole heads of the attention output."""
        return cfg.head_dim if self.row.letters == "NHD" else 1


def units(cfg: ModelConfig) -> list[Unit]:
    """Every unit of a model, in the order of the files: embedding, layers, norm, output."""
    rows = [r for r in TABLE if not (cfg.tie_embeddings and r.path == "unembed")]
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


# --- copying ---------------------------------------------------------------------------------------------------------

_BLOCK = 16 << 20
"""bytes of a mapped file touched before its pages are given back"""


def copy(target: np.ndarray, source: np.ndarray) -> None:
    """target[...] = source for matrices, transposing in blocks that fit the cache: 5 times numpy's own order."""
    if source.strides[1] > source.strides[0]:
        for i in range(0, source.shape[1], 16):
            target[:, i : i + 16] = source[:, i : i + 16]
    else:
        target[...] = source


def _half(width: int, head_dim: int, swap: bool) -> Iterator[tuple[slice, slice]]:
    """(our columns, Meta's columns): all at once, or for each head the even and the odd ones of interleaved pairs."""
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


# --- torch files -----------------------------------------------------------------------------------------------------


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
        step = max(1, _BLOCK // pitch)
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
    rest = memoryview(data.reshape(-1).view(np.uint8))
    while rest:
        done = os.pwrite(file, rest, offset)
        rest, offset = rest[done:], offset + done


# --- Orbax -----------------------------------------------------------------------------------------------------------

# One tensor a folder of plain chunks: written and read in any order, at the disk's speed. Measured on float32 weights
# of 0.5 GB, 2 cores, two rounds: 1.5-1.8 GB/s to write and 0.5-0.6 to read, against 0.2-0.4 and 0.2-0.3 for Orbax's own defaults
# (OCDBT and zstd, which saves 8 % of the space).
ORBAX = dict(use_ocdbt=False, use_zarr3=True, use_compression=False)
_CHUNK = 32 << 20
"""bytes of a chunk, at most: few enough files, and a host that needs a slice reads little else"""


class OrbaxWeights:
    """One of our checkpoints: a tensorstore array a row of the table."""

    def __init__(self, folder: Path, cfg: ModelConfig):
        self.cfg = cfg
        self.folder = folder
        self.arrays = {r.path: open_array(folder, r.path) for r in {u.row: 0 for u in units(cfg)}}

    def dtype(self, unit: Unit) -> np.dtype:
        return self.arrays[unit.row.path].dtype.numpy_dtype

    def read(self, unit: Unit, start: int, stop: int) -> np.ndarray:
        """Rows start to stop of a unit."""
        step = unit.step(self.cfg)
        array = self._of(unit)[start // step : stop // step]
        return np.asarray(array.read().result()).reshape(stop - start, unit.shape(self.cfg)[1])

    def write(self, unit: Unit, start: int, piece: np.ndarray) -> None:
        """Write rows of a unit; whole chunks, so that nothing has to be read first."""
        step = unit.step(self.cfg)
        array = self._of(unit)[start // step : (start + len(piece)) // step]
        array.write(
            piece.reshape(array.shape), can_reference_source_data_indefinitely=True
        ).result()

    def close(self) -> None:
        """Nothing is open."""

    def _of(self, unit: Unit) -> Any:
        array = self.arrays[unit.row.path]
        return array if unit.layer is None else array[unit.layer]


def rows_per_chunk(unit: Unit, cfg: ModelConfig, dtype: np.dtype, limit: int = _CHUNK) -> int:
    """Rows of a unit in one piece of at most `limit` bytes: parts of about equal length."""
    rows, columns = unit.shape(cfg)
    step = unit.step(cfg)
    pieces = math.ceil(rows * columns * dtype.itemsize / limit)
    return math.ceil(rows / step / pieces) * step


def open_array(folder: Path, path: str) -> Any:
    """The tensorstore array of one parameter, however Orbax stored it; ValueError when it is not there."""
    import tensorstore as ts

    name = path.replace("/", ".")
    place = {"driver": "file", "path": str(folder.resolve())}
    if (folder / "manifest.ocdbt").exists():
        spec = {"driver": "ocdbt", "base": place, "path": name + "/"}
        drivers = ["zarr3", "zarr"]
    else:
        spec = place | {"path": f"{folder.resolve()}/{name}/", "file_io_sync": False}
        drivers = ["zarr3"] if (folder / name / "zarr.json").exists() else ["zarr"]
    error = None
    for driver in drivers:
        try:
            return ts.open({"driver": driver, "kvstore": spec}, open=True).result()
        except ValueError as e:
            error = e
    raise ValueError(f"{folder} holds no readable array {name}: {error}")


class _Declared:
    """An array that will be: shape, dtype and chunks (one layer, a part of its rows), and no value."""

    def __init__(self, unit: Unit, cfg: ModelConfig, dtype: np.dtype):
        shape = cfg.shape(unit.row.letters)
        rows = rows_per_chunk(unit, cfg, dtype) // unit.step(cfg)
        stack = unit.layer is not None
        self.shape = (cfg.num_layers,) * stack + shape
        self.chunk = (1,) * stack + (rows, *shape[1:])
        self.dtype = dtype

    def create(self, path: Any) -> None:
        """Make the empty array."""
        import tensorstore as ts

        metadata = {
            "shape": self.shape,
            "data_type": self.dtype.name,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": self.chunk}},
            "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}],
        }
        spec = {
            "driver": "zarr3",
            "kvstore": {"driver": "file", "path": f"{path}/"},
            "metadata": metadata,
        }
        ts.open(spec, create=True).result()


def create_orbax(steps: Path, cfg: ModelConfig, dtypes: dict[str, np.dtype]) -> OrbaxWeights:
    """A checkpoint of step 0 whose arrays are all there and empty, made by Orbax itself so that a stock restore reads it.

    Orbax writes the metadata; its arrays would have to be in memory, so ours are only declared here and are filled by
    :meth:`OrbaxWeights.write`.
    """
    import orbax.checkpoint as ocp

    class Declare(ocp.type_handlers.TypeHandler):
        def typestr(self):
            return "jax.Array"  # what a stock restore looks for

        async def metadata(self, infos):
            raise NotImplementedError

        async def deserialize(self, infos, args=None):
            raise NotImplementedError

        async def serialize(self, values, infos, args=None):
            for value, info in zip(values, infos, strict=True):
                await info.await_path_creation()
                value.create(info.path)
            return []

    tree: dict[str, Any] = {}
    for unit in units(cfg):
        if unit.layer in (None, 0):
            *parents, name = unit.row.path.split("/")
            node = tree
            for parent in parents:
                node = node.setdefault(parent, {})
            node[name] = _Declared(unit, cfg, dtypes[unit.row.path])
    registry = ocp.type_handlers.create_type_handler_registry((_Declared, Declare()))
    handler = ocp.PyTreeCheckpointHandler(type_handler_registry=registry, **ORBAX)
    with ocp.CheckpointManager(
        steps,
        item_handlers={"model": handler},
        options=ocp.CheckpointManagerOptions(enable_async_checkpointing=False),
    ) as manager:
        manager.save(0, args=ocp.args.Composite(model=ocp.args.PyTreeSave(tree)))
    return OrbaxWeights(steps / "0" / "model", cfg)
