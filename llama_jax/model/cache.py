"""The cache of keys and values that decoding reads and extends."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from llama_jax.config import ModelConfig
from pallas_kernels.rotary_decode_attention import SCALE_DTYPE


class KVCache(NamedTuple):
    """Rotated keys, and values, of all layers. Positions beyond a row's length hold arbitrary data.

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

    @classmethod
    def empty(cls, cfg: ModelConfig, batch: int, cache_len: int, dtype: jnp.dtype) -> "KVCache":
        """A cache without valid positions.

        Args:
          cfg: the model.
          batch: number of rows, B.
          cache_len: positions per row, S.
          dtype: of keys and values; int8 with a scale per head and position.
        """
        L, K, H = cfg.shape("LKH")
        zeros = jnp.zeros((L, batch, K, cache_len, H), dtype)
        scales = None
        if dtype == jnp.int8:
            scales = (jnp.zeros(zeros.shape[:4], SCALE_DTYPE),) * 2
        return cls(zeros, zeros, jnp.zeros(batch, jnp.int32), scales)

    def with_arrays(self, k_LBKSH, v_LBKSH, scales=None) -> "KVCache":
        """The same lengths with other keys, values and scales."""
        return KVCache(k_LBKSH, v_LBKSH, self.lengths_B, scales)


def bytes_per_position(cfg: ModelConfig, dtype: jnp.dtype) -> int:
    """Bytes of the keys and values of one position in all layers, and of their scales."""
    L, K, H = cfg.shape("LKH")
    scale = jnp.dtype(SCALE_DTYPE).itemsize if dtype == jnp.int8 else 0
    return 2 * L * K * (H * jnp.dtype(dtype).itemsize + scale)
