"""Batches of numpy arrays to arrays on the mesh; a host reads the rows that its devices need."""

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from llama_jax.config import Recipe
from llama_jax.sharding import AXES


class Feed:
    """Host batches to arrays on the mesh: this host reads the rows that its own devices need."""

    def __init__(self, recipe: Recipe, mesh: Mesh, spec: P):
        self.parts = recipe.train.accumulate
        self.rows = recipe.train.batch_size // self.parts
        self._mesh, self._spec = mesh, spec
        sharding = NamedSharding(mesh, spec)
        shape = (self.rows, recipe.data.seq_len)
        mine = [
            index[0].indices(self.rows)[:2]
            for index in sharding.addressable_devices_indices_map(shape).values()
            if index is not None
        ]
        self._first, last = min(a for a, _ in mine), max(b for _, b in mine)
        self.share = self._first // (last - self._first), self.rows // (last - self._first)
        """(index, count) of this host among those that read different rows"""

    def __call__(
        self, batch: dict[str, np.ndarray], stop: bool, parts: int | None = None
    ) -> dict[str, jax.Array]:
        parts = parts or self.parts
        arrays = {
            key: self._array(value.reshape(parts, -1, value.shape[-1]))
            for key, value in batch.items()
        }
        # One flag a device, so that any process can ask all of them to stop after this step.
        mine = np.full(self._mesh.local_mesh.size, stop, np.int32)
        flags = NamedSharding(self._mesh, P(AXES))
        arrays["stop"] = jax.make_array_from_process_local_data(flags, mine, (self._mesh.size,))
        return arrays

    def _array(self, local: np.ndarray) -> jax.Array:
        shape = (local.shape[0], self.rows, local.shape[2])

        def piece(index: Any) -> np.ndarray:
            start, end, _ = index[1].indices(self.rows)
            return local[index[0], start - self._first : end - self._first, index[2]]

        return jax.make_array_from_callback(
            shape, NamedSharding(self._mesh, P(None, *self._spec)), piece
        )
