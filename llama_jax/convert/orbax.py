"""Our checkpoints as pieces: Orbax's arrays, filled and read a few rows at a time through
tensorstore.

Orbax saves what is in memory; a model that is not is declared to it, so that Orbax itself writes
every line of its metadata and a stock restore reads the result, and the values are filled in
afterwards.
"""

import logging
import os
import stat
from pathlib import Path
from typing import Any

import numpy as np

from llama_jax.config import ModelConfig
from llama_jax.convert.tensors import Unit, rows_of, rows_per_chunk, units
from llama_jax.io import read_json

# One folder of plain chunks a tensor, written and read in any order. Orbax saving 0.5 GB of float32
# on 2 cores, two rounds: 1.5-1.7 GB/s to write, 0.5-0.6 to read, against 0.2-0.4 and 0.2-0.3 with
# OCDBT and zstd, which save 8 % of the space.
ORBAX = dict(use_ocdbt=False, use_zarr3=True, use_compression=False)

# By default tensorstore reads a missing chunk as zeros and does not write one that is all zeros.
# Orbax itself writes and expects every chunk.
EVERY_CHUNK = dict(fill_missing_data_reads=False, store_data_equal_to_fill_value=True)

_METADATA_BYTES = 1 << 20


class OrbaxWeights:
    """One of our checkpoints: a tensorstore array a row of the table."""

    def __init__(self, folder: Path, cfg: ModelConfig, quantize: str | None = None):
        self.cfg = cfg
        self.folder = folder
        check_item(folder, {})
        self.arrays = {r.path: open_array(folder, r.path) for r in rows_of(cfg, quantize)}

    def dtype(self, unit: Unit) -> np.dtype:
        return self.arrays[unit.row.path].dtype.numpy_dtype

    def read(self, unit: Unit, start: int, stop: int) -> np.ndarray:
        """Rows start to stop of a unit."""
        array = self._of(unit)[start:stop]
        return np.asarray(array.read().result()).reshape(stop - start, unit.shape(self.cfg)[1])

    def write(self, unit: Unit, start: int, piece: np.ndarray) -> None:
        """Write rows of a unit; whole chunks, so that nothing has to be read first."""
        array = self._of(unit)[start : start + len(piece)]
        array.write(
            piece.reshape(array.shape), can_reference_source_data_indefinitely=True
        ).result()

    def close(self) -> None:
        """Nothing is open."""

    def _of(self, unit: Unit) -> Any:
        array = self.arrays[unit.row.path]
        return array if unit.layer is None else array[unit.layer]


def open_array(folder: Path, path: str) -> Any:
    """The tensorstore array of one parameter, however Orbax stored it; ValueError when it is not
    there. Reading a chunk whose file is missing is an error too."""
    import tensorstore as ts

    name = path.replace("/", ".")
    read_array_metadata(folder / name)
    place: dict[str, Any] = {"driver": "file", "path": str(folder.resolve())}
    if (folder / "manifest.ocdbt").exists():
        spec = {"driver": "ocdbt", "base": place, "path": name + "/"}
        drivers = ["zarr3", "zarr"]
    else:
        spec = place | {"path": f"{folder.resolve()}/{name}/", "file_io_sync": False}
        drivers = ["zarr3"] if (folder / name / "zarr.json").exists() else ["zarr"]
    error = None
    for driver in drivers:
        try:
            return ts.open({"driver": driver, "kvstore": spec} | EVERY_CHUNK, open=True).result()
        except ValueError as e:
            error = e
    raise ValueError(f"{folder} holds no readable array {name}: {error}")


class OtherModel(ValueError):
    """Stored weights that have other shapes than asked for."""


def read_array_metadata(array: Path) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """Shape and chunk of a stored array, by its own metadata file; None where there is no such file
    (OCDBT, or no array).

    tensorstore would allocate a chunk of whatever size the file claims, so the sizes are checked
    first.

    Raises:
      ValueError: damaged; names the file.
    """
    path = next((p for n in ("zarr.json", ".zarray") if (p := array / n).exists()), None)
    if path is None:
        return None
    tree = read_json(path, _METADATA_BYTES)
    try:
        shape = tree["shape"]
        new = path.name == "zarr.json"
        chunk = tree["chunk_grid"]["configuration"]["chunk_shape"] if new else tree["chunks"]
        ok = len(shape) == len(chunk) and all(
            type(n) is type(c) is int and n >= 0 and 1 <= c <= max(n, 1)
            for n, c in zip(shape, chunk, strict=True)
        )
    except (KeyError, TypeError):
        ok = False
    if not ok:
        raise ValueError(f"{path} is damaged: no array has such a shape and chunks")
    return tuple(shape), tuple(chunk)


def check_item(item: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """Check a stored tree before tensorstore opens it: regular files inside the folder, metadata of
    sensible sizes, and each array with the shape that the model has.

    Args:
      item: its folder, say ``steps/100/model``.
      shapes: of each array, by its name in Orbax ("blocks.mlp.up").

    Raises:
      OtherModel: an array has another shape.
      ValueError: a damaged file; says which, and why.
    """
    root = os.path.realpath(item)
    for folder, folders, files in os.walk(item):
        for name in folders + files:
            path = os.path.join(folder, name)
            mode = os.lstat(path).st_mode
            if stat.S_ISLNK(mode):
                if not os.path.realpath(path).startswith(root + os.sep):
                    raise ValueError(f"{path} is a link out of {item}")
                mode = os.stat(path).st_mode
            if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                raise ValueError(f"{path} is not a regular file")
    if (item / "_METADATA").exists():
        read_json(item / "_METADATA")
    for name, shape in shapes.items():
        stored = read_array_metadata(item / name)
        if stored is not None and stored[0] != tuple(shape):
            raise OtherModel(
                f"{item} holds another model: {name} is {list(stored[0])}, not {list(shape)}"
            )


class _Declared:
    """An array that will be: shape, dtype and chunks (one layer, a part of its rows), and no
    value."""

    def __init__(self, unit: Unit, cfg: ModelConfig, dtype: np.dtype):
        shape = unit.row.shape(cfg)
        rows = rows_per_chunk(unit, cfg, dtype)
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
        } | EVERY_CHUNK
        ts.open(spec, create=True).result()


def create(
    steps: Path, cfg: ModelConfig, dtypes: dict[str, np.dtype], quantize: str | None = None
) -> OrbaxWeights:
    """A checkpoint of step 0 whose arrays are all there and empty, made by Orbax itself so that a
    stock restore reads it.

    Orbax writes the metadata; its arrays would have to be in memory, so ours are only declared here
    and are filled by :meth:`OrbaxWeights.write`.
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
    for unit in units(cfg, quantize):
        if unit.layer in (None, 0):
            *parents, name = unit.row.path.split("/")
            node = tree
            for parent in parents:
                node = node.setdefault(parent, {})
            node[name] = _Declared(unit, cfg, dtypes[unit.row.path])
    options = ocp.CheckpointManagerOptions(enable_async_checkpointing=False)
    log = logging.getLogger("absl")
    level = log.level
    log.setLevel(logging.ERROR)  # Orbax warns of what is missing on purpose: values, OCDBT files
    try:
        registry = ocp.type_handlers.create_type_handler_registry((_Declared, Declare()))
        handler = ocp.PyTreeCheckpointHandler(type_handler_registry=registry, **ORBAX)
        with ocp.CheckpointManager(
            steps, item_handlers={"model": handler}, options=options
        ) as manager:
            manager.save(0, args=ocp.args.Composite(model=ocp.args.PyTreeSave(tree)))
    finally:
        log.setLevel(level)
    return OrbaxWeights(steps / "0" / "model", cfg, quantize)
