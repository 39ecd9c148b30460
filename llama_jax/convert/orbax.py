"""Our checkpoints as pieces: Orbax's arrays, filled and read a few rows at a time through
tensorstore.

Orbax saves what is in memory; a model that is not is declared to it, so that Orbax itself writes
every line of its metadata and a stock restore reads the result, and the values are filled in
afterwards.
"""

import logging
from pathlib import Path
from typing import Any

import numpy as np

from llama_jax.checkpoint.arrays import EVERY_CHUNK, ORBAX, check_item, open_array
from llama_jax.config import ModelConfig
from llama_jax.convert.tensors import Unit, rows_of, rows_per_chunk, units


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
