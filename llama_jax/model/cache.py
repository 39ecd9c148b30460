"""The cache of keys and values that decoding reads and extends."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from llama_jax.config import ModelConfig
from llama_jax.model.sharding import Rules, reshard
from pallas_kernels.rotary_decode_attention import SCALE_DTYPE


class KVCache(NamedTuple):
    """Rotated keys, and values, of all layers. Positions beyond a row's length hold arbitrary data.

    With ``pages_BM``, keys, values and scales are pools of pages, [L, P, K, page, H] and
    [L, P, K, page]; positions m * page to (m + 1) * page - 1 of row b are page ``pages_BM[b, m]``.
    Page 0 belongs to no row: rows with length 0 and a table of zeros write to it.

    Example:
      cache = KVCache.empty(cfg, batch=1, cache_len=256, dtype=jnp.dtype("float32"))
      logits_BTV, cache = llama(tokens_BT, cache=cache)
    """

    k_LBKSH: jax.Array
    v_LBKSH: jax.Array
    lengths_B: jax.Array
    """int32, number of valid positions of each row"""
    scales: tuple[jax.Array, jax.Array] | None = None
    """[L, B, K, S] of keys and of values, if those are int8"""
    pages_BM: jax.Array | None = None
    """int32, the pages of each row in order"""

    @classmethod
    def empty(cls, cfg: ModelConfig, batch: int, cache_len: int, dtype: jnp.dtype) -> "KVCache":
        """A cache without valid positions.

        Args:
          cfg: the model.
          batch: number of rows, B.
          cache_len: positions per row, S.
          dtype: of keys and values; int8 with a scale per head and position.
        """
        return cls(*_zeros(cfg, batch, cache_len, dtype, batch))

    @classmethod
    def paged(
        cls, cfg: ModelConfig, num_pages: int, page: int, batch: int, max_pages: int,
        dtype: jnp.dtype,
    ) -> "KVCache":  # fmt: skip
        """A cache in pages without valid positions, whose rows have no pages.

        Args:
          cfg: the model.
          num_pages: P, with page 0, which belongs to no row.
          page: positions per page; at most as many can be appended at once.
          batch: number of rows, B.
          max_pages: largest number of pages of a row, M.
          dtype: as in :meth:`empty`.
        """
        cache = cls(*_zeros(cfg, num_pages, page, dtype, batch))
        return cache._replace(pages_BM=jnp.zeros((batch, max_pages), jnp.int32))

    def specs(self, rules: Rules) -> Any:
        """The sharding of each array: heads, and rows except those of a paged cache.

        Both arrays of ``scales`` have the same.
        """
        rows, *rest = rules.activation("BKSH")
        if self.pages_BM is not None:
            rows = None
        stack = P(None, rows, *rest)
        specs: list[Any] = [stack, stack, P(rows), P(*stack[:4]), P()]
        return KVCache(*specs)

    def shard(self, rules: Rules) -> "KVCache":
        """Keys, values and scales sharded over the current mesh, if there is one."""
        specs = self.specs(rules)
        scales = jax.tree.map(lambda x: reshard(x, specs.scales), self.scales)
        k, v = (reshard(x, spec) for x, spec in zip(self[:2], specs[:2], strict=True))
        return self.with_arrays(k, v, scales)

    def with_arrays(self, k_LBKSH, v_LBKSH, scales=None) -> "KVCache":
        """The same lengths and pages with other keys, values and scales."""
        return self._replace(k_LBKSH=k_LBKSH, v_LBKSH=v_LBKSH, scales=scales)


def _zeros(cfg: ModelConfig, rows: int, cache_len: int, dtype: jnp.dtype, batch: int):
    """Keys, values, lengths and scales; ``rows`` is B or P."""
    L, K, H = cfg.shape("LKH")
    zeros = jnp.zeros((L, rows, K, cache_len, H), dtype)
    scales = None
    if dtype == jnp.int8:
        scales = (jnp.zeros(zeros.shape[:4], SCALE_DTYPE),) * 2
    return zeros, zeros, jnp.zeros(batch, jnp.int32), scales


def bytes_per_position(cfg: ModelConfig, dtype: jnp.dtype) -> int:
    """Bytes of the keys and values of one position in all layers, and of their scales."""
    L, K, H = cfg.shape("LKH")
    scale = jnp.dtype(SCALE_DTYPE).itemsize if dtype == jnp.int8 else 0
    return 2 * L * K * (H * jnp.dtype(dtype).itemsize + scale)
