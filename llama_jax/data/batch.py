"""Batches of numpy arrays to arrays on the mesh; a host reads the rows that its devices need."""

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from llama_jax.config import Recipe
from llama_jax.model.sharding import AXES


class Feed:
    """Host batches to arrays on the mesh: this host reads the rows that its own devices need.

    A batch of ``batch_size`` rows is ``accumulate`` parts, one after the other; row r of part p is
    row ``p * rows + r`` of the batch, whatever the number of hosts and the order of the devices.
    """

    def __init__(self, recipe: Recipe, mesh: Mesh, spec: P):
        self.parts = recipe.train.gradient_accumulation
        self.rows = recipe.train.batch_size // self.parts
        """rows of a part, over all hosts"""
        self._mesh, self._spec = mesh, spec
        self.part_rows = host_rows(mesh, spec, self.rows)
        """rows of a part that this host reads, ascending"""
        starts = self.rows * np.arange(self.parts)
        self.batch_rows = (starts[:, None] + self.part_rows).reshape(-1)
        """rows of a whole batch that this host reads, ascending"""

    def __call__(
        self, batch: dict[str, np.ndarray], stop: bool, parts: int | None = None
    ) -> dict[str, jax.Array]:
        """Place a batch on the mesh.

        Args:
          batch: arrays [B, T] of the rows ``batch_rows``; of ``part_rows`` where ``parts`` is 1.
          stop: this process asks to stop after this step.
          parts: of the batch; None: those of the recipe.

        Returns:
          Arrays [parts, rows, T], and ``stop``: a flag for each device, so that any process can
          ask all of them to stop.
        """
        parts = parts or self.parts
        arrays = {
            key: self._array(value.reshape(parts, len(self.part_rows), value.shape[-1]))
            for key, value in batch.items()
        }
        flags = NamedSharding(self._mesh, P(AXES))
        arrays["stop"] = jax.make_array_from_callback(
            (self._mesh.size,), flags, lambda _: np.full(1, stop, np.int32)
        )
        return arrays

    def _array(self, local: np.ndarray) -> jax.Array:
        shape = (local.shape[0], self.rows, local.shape[2])

        def piece(index: Any) -> np.ndarray:
            return local[index[0], local_slice(self.part_rows, index[1], self.rows), index[2]]

        return jax.make_array_from_callback(
            shape, NamedSharding(self._mesh, P(None, *self._spec)), piece
        )


def host_rows(mesh: Mesh, spec: P, rows: int, process: int | None = None) -> np.ndarray:
    """Which of ``rows`` rows the devices of a process need, ascending, each once.

    Args:
      mesh: its devices may be in any order, those of a process anywhere in it.
      spec: sharding of an array [rows, ...].
      rows: rows over all processes.
      process: index of the process; None: this one.
    """
    process = jax.process_index() if process is None else process
    places: Any = NamedSharding(mesh, P(spec[0])).devices_indices_map((rows,))
    mine = {index[0].indices(rows)[:2] for d, index in places.items() if d.process_index == process}
    return np.array(sorted({row for start, end in mine for row in range(start, end)}))


def local_slice(held: np.ndarray, wanted: slice, rows: int) -> slice:
    """Where the consecutive rows ``wanted`` lie among the rows ``held`` (ascending)."""
    start, end, _ = wanted.indices(rows)
    first = int(np.searchsorted(held, start))
    return slice(first, first + end - start)
