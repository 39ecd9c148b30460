"""The batch: fields, shapes, dtypes, and how a host's rows become arrays on the mesh."""

from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from llama_jax.config import Recipe


class Batch(NamedTuple):
    """Token sequences and which of their targets count.

    The data pipeline yields numpy arrays [B, T]. :class:`ShardBatch` turns them into arrays
    [microbatches, B, T] on the mesh, where B is the size of one microbatch; the loss of one
    microbatch again sees [B, T]. A field that is None is absent from the compiled program.

    Example::

      batch = Batch(ids_BT[:, :-1], ids_BT[:, 1:])
    """

    inputs_BT: Any
    """token ids, int32"""
    targets_BT: Any
    """the token after each input, int32"""
    mask_BT: Any = None
    """float32: 1 where the target counts; 0 for padding and for the first token of the next
    document. None: every target counts"""
    segment_ids_BT: Any = None
    """document of each input, int32 from 1. None: the sequence is one document"""
    positions_BT: Any = None
    """position of each input in its document, int32 from 0. None: position in the sequence"""

    def microbatch(self, index: int) -> "Batch":
        """One microbatch, [B, T], of arrays [microbatches, B, T]."""
        return jax.tree.map(lambda x: x[index], self)


DTYPES = Batch(np.int32, np.int32, np.float32, np.int32, np.int32)


def abstract_batch(recipe: Recipe, mesh: Mesh, spec: P) -> Batch:
    """Shapes, dtypes and shardings of a training batch of :class:`ShardBatch`; no memory is used.

    Args:
      recipe: sets the number of microbatches, their size, T, and which fields are present.
      mesh: devices of the run.
      spec: sharding of an array [B, T].
    """
    microbatches = recipe.train.gradient_accumulation
    shape = microbatches, recipe.train.batch_size // microbatches, recipe.data.seq_len
    sharding = NamedSharding(mesh, P(None, *spec))
    fields = [jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for dtype in DTYPES]
    return Batch(*fields) if recipe.data.has_segments else Batch(*fields[:2])


class ShardBatch:
    """Places batches on the mesh. Each host reads only the rows that its own devices need.

    Row r of microbatch m is row ``m * microbatch_size + r`` of the batch, for any number of hosts
    and any order of devices.

    Args:
      recipe: sets batch size and number of microbatches.
      mesh: devices of the run.
      spec: sharding of an array [B, T].

    Example::

      shard_batch = ShardBatch(recipe, mesh, P("fsdp"))
      data = TrainData(mixture, recipe.data, recipe.train.batch_size, shard_batch.batch_rows)
      batch = shard_batch(next(data))
    """

    def __init__(self, recipe: Recipe, mesh: Mesh, spec: P):
        microbatches = recipe.train.gradient_accumulation
        self.microbatch_size = recipe.train.batch_size // microbatches
        """rows of a microbatch over all hosts"""
        self._sharding = NamedSharding(mesh, P(None, *spec))
        self.microbatch_rows = host_rows(mesh, spec, self.microbatch_size)
        """rows of a microbatch that this host reads, ascending"""
        starts = self.microbatch_size * np.arange(microbatches)
        self.batch_rows = (starts[:, None] + self.microbatch_rows).reshape(-1)
        """rows of a training batch that this host reads, ascending"""

    def __call__(self, batch: Batch) -> Batch:
        """Arrays [microbatches, B, T] on the mesh, of numpy arrays with this host's rows: those of
        ``batch_rows``, or those of ``microbatch_rows`` for one microbatch."""
        return jax.tree.map(self._place, batch)

    def _place(self, rows: np.ndarray) -> jax.Array:
        local = rows.reshape(-1, len(self.microbatch_rows), rows.shape[-1])
        shape = local.shape[0], self.microbatch_size, local.shape[2]

        def shard(index: Any) -> np.ndarray:
            rows = local_slice(self.microbatch_rows, index[1], self.microbatch_size)
            return local[index[0], rows, index[2]]

        return jax.make_array_from_callback(shape, self._sharding, shard)


def host_rows(mesh: Mesh, spec: P, rows: int, process: int | None = None) -> np.ndarray:
    """Indices of the rows that the devices of a process need, ascending and without duplicates.

    Args:
      mesh: its devices may be in any order; those of one process may be anywhere in it.
      spec: sharding of an array [rows, ...].
      rows: number of rows over all processes.
      process: index of the process; None: this one.

    Returns:
      Integers [number of rows of the process].
    """
    process = jax.process_index() if process is None else process
    places: Any = NamedSharding(mesh, P(spec[0])).devices_indices_map((rows,))
    mine = {index[0].indices(rows)[:2] for d, index in places.items() if d.process_index == process}
    return np.array(sorted({row for start, end in mine for row in range(start, end)}))


def local_slice(local_rows: np.ndarray, wanted: slice, rows: int) -> slice:
    """Position of the consecutive rows ``wanted`` of all ``rows`` in ``local_rows`` (ascending).

    Args:
      local_rows: indices of the rows that this host holds, ascending.
      wanted: consecutive rows.
      rows: number of rows over all hosts.
    """
    start, end, _ = wanted.indices(rows)
    first = int(np.searchsorted(local_rows, start))
    return slice(first, first + end - start)
