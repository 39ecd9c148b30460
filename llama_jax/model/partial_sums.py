"""Decode steps with few kernel launches on a GPU: products as partial sums.

A product of few rows keeps a GPU busy only if its inputs are split over several programs, whose
partial sums must be added. Here the kernel that uses the product adds them.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from llama_jax.model.projection import LoraWeight
from llama_jax.model.quantize import QuantizedWeight, is_quantized, matmul
from llama_jax.model.sharding import no_mesh
from pallas_kernels import add_rms_norm, dispatch, rms_norm

Residual = jax.Array | tuple[jax.Array, jax.Array]
"""x [B, T, D], or x and the partial sums [P, B, T, D] of what is to be added to it."""


def use_partial_sums(tokens: int) -> bool:
    """Whether a call with a cache and this many new tokens per row takes this path."""
    return tokens == 1 and no_mesh() and dispatch.platform() in ("gpu", "cuda")


def num_parts(inputs: int, outputs: int, multiprocessors: int, rows: int = 1) -> int:
    """Number of partial sums of a product with few rows.

    A power of two that gives about 1.5 tiles of 128 outputs per multiprocessor, as XLA chooses
    where it splits a product, and that leaves at least 512 inputs to each part, and 32 per row: the
    sums are at most an eighth of the bytes of the matrix, in bfloat16, to write and to read.

    Args:
      inputs: of the product.
      outputs: of the product.
      multiprocessors: of the GPU.
      rows: of the product.
    """
    wanted = 1.5 * multiprocessors * 128 / outputs
    max_parts = math.gcd(inputs, 1 << (inputs // 512).bit_length() - 1) if inputs >= 512 else 1
    max_parts = min(max_parts, 1 << max(1, inputs // (32 * rows)).bit_length() - 1)
    return min(max_parts, 2 ** max(0, round(math.log2(wanted))))


def partial_products(x_BTI: jax.Array, w: jax.Array | QuantizedWeight | nnx.Variable) -> jax.Array:
    """The product with a matrix [in, out] as P partial sums in float32, [P, B, T, out], T = 1.

    If P > 1 and B = 1, the result has a second row, which the caller ignores: for a single row, XLA
    would replace the product by sums that read a float32 copy of the matrix.

    Args:
      x_BTI: activations.
      w: an array, a quantized matrix, a matrix with an adapter, or a variable with one of them.
    """
    w_IO: Any = w.get_value() if isinstance(w, nnx.Variable) else w
    if isinstance(w_IO, LoraWeight):
        parts_PBTO = partial_products(x_BTI, w_IO.base)
        h_BTr = w_IO.scale * matmul(x_BTI, w_IO.a.astype(x_BTI.dtype), jnp.float32)
        update_BTO = matmul(h_BTr.astype(x_BTI.dtype), w_IO.b.astype(x_BTI.dtype), jnp.float32)
        return parts_PBTO.at[0, : len(x_BTI)].add(update_BTO)
    B, _, inputs = x_BTI.shape
    quantized = is_quantized(w_IO)
    outputs = (w_IO.q if quantized else w_IO).shape[-1]
    P = num_parts(inputs, outputs, dispatch.num_cores() or 132, B)
    if quantized and w_IO.needs_kernel:
        P = 1
    elif not quantized:
        w_IO = w_IO.astype(x_BTI.dtype)
    if P == 1:
        return matmul(x_BTI, w_IO, jnp.float32)[None]
    x = jnp.broadcast_to(x_BTI, (max(B, 2), 1, inputs)).reshape(-1, P, inputs // P)
    parts = (w_IO.q if quantized else w_IO).reshape(P, inputs // P, -1)

    def product(x, part):
        part = QuantizedWeight(part, w_IO.scale) if quantized else part
        return matmul(x, part, jnp.float32)

    return jax.vmap(product, in_axes=(1, 0))(x, parts)[:, :, None]


def add_and_norm(x: Residual, scale_D: jax.Array, eps: float) -> tuple[jax.Array, jax.Array]:
    """The residual stream with everything added, and its RMSNorm.

    Args:
      x: the residual stream, with or without partial sums.
      scale_D: the learned scale.
      eps: added to the mean square.
    """
    if isinstance(x, tuple):
        return add_rms_norm(*x, scale_D, eps)
    return x, rms_norm(x, scale_D, eps)
