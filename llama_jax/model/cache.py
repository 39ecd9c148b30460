"""The cache of keys and values that decoding reads and extends."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from llama_jax.config import ModelConfig


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

    @classmethod
    def empty(cls, cfg: ModelConfig, batch: int, cache_len: int, dtype: jnp.dtype) -> "KVCache":
        """A cache without valid positions.

        Args:
          cfg: the model.
          batch: number of rows, B.
          cache_len: positions per row, S.
          dtype: of keys and values.
        """
        L, K, H = cfg.shape("LKH")
        zeros = jnp.zeros((L, batch, K, cache_len, H), dtype)
        return cls(zeros, zeros, jnp.zeros(batch, jnp.int32))
