"""Products of activations and a matrix of 4-bit or 8-bit integers with scales per group of inputs.

The kernels load integers and scale them in registers or on-chip memory, so that 4 or 8 bits per
weight are read from main memory.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch


def quantized_matmul(
    x: jax.Array,
    q: jax.Array,
    scale: jax.Array,
    *,
    out_dtype: jnp.dtype | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """x times the matrix ``q * scale``, accumulated in float32 and rounded once.

    Differentiable in x only; the gradients of ``q`` and ``scale`` are zero.

    Args:
      x: activations [rows, in], float32 or bfloat16.
      q: int8 [in, out]; or uint8 [in / 2, out] with two 4-bit integers, from -8 to 7, per byte. The
        even inputs are in the low four bits.
      scale: float32 [groups, out]; each group is in / groups consecutive inputs.
      out_dtype: of the result; default: that of x.
      implementation: "tpu", "gpu" or "xla"; default: the first that supports the arguments on the
        platform. The TPU kernel rounds the scaled weights to x's dtype, as "xla" does.

    Returns:
      [rows, out].

    Raises:
      ValueError: shapes or dtypes do not match, or the implementation is unknown.
      NotImplementedError: the named implementation does not support the arguments.
    """
    _check(x, q, scale)
    return _product(jnp.dtype(out_dtype or x.dtype), implementation, x, q, scale)


def dequantize(q: jax.Array, scale: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """The matrix [in, out] of :func:`quantized_matmul`.

    Args:
      q: integers.
      scale: float32 [groups, out].
      dtype: of the result, and of the product of integers and scales.
    """
    if q.dtype == jnp.uint8:
        q = jax.lax.bitcast_convert_type(q, jnp.int8)
        q = jnp.stack([q << 4, q], axis=1) >> 4  # signed: copies the fourth bit into those above
    w = q.reshape(len(scale), -1, scale.shape[1]).astype(dtype) * scale[:, None].astype(dtype)
    return w.reshape(-1, scale.shape[1])


def num_inputs(q: jax.Array) -> int:
    """Inputs of a matrix: two per row of packed 4-bit integers."""
    return len(q) * (2 if q.dtype == jnp.uint8 else 1)


def _check(x, q, scale) -> None:
    if x.ndim != 2 or q.ndim != 2 or scale.ndim != 2 or q.dtype not in (jnp.int8, jnp.uint8):
        raise ValueError(
            "expected x [rows, in], q int8 [in, out] or uint8 [in / 2, out] and scale [groups, "
            f"out]; got x {x.shape}, q {q.dtype} {q.shape}, scale {scale.shape}"
        )
    groups, out = scale.shape
    inputs = num_inputs(q)
    if x.shape[1] != inputs or q.shape[1] != out or not groups or inputs % groups:
        raise ValueError(
            f"q {q.dtype} {q.shape} has {inputs} inputs; got x {x.shape} and scale {scale.shape}, "
            f"whose groups must divide the inputs"
        )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _product(out_dtype, implementation, x, q, scale):
    return dispatch.call(
        "quantized_matmul", _IMPLEMENTATIONS, implementation, x, q, scale, out_dtype
    )


def _forward(out_dtype, implementation, x, q, scale):
    # An empty array carries x's dtype.
    return _product(out_dtype, implementation, x, q, scale), (x[:0], q, scale)


def _backward(out_dtype, implementation, residuals, gradient):
    x, q, scale = residuals
    w = dequantize(q, scale, x.dtype)
    d_x = jnp.einsum("xo,io->xi", gradient.astype(x.dtype), w, preferred_element_type=jnp.float32)
    return d_x.astype(x.dtype), None, None


_product.defvjp(_forward, _backward)


def _xla(x, q, scale, out_dtype):
    return jnp.matmul(x, dequantize(q, scale, x.dtype), preferred_element_type=out_dtype)


# Pallas takes a second to import, so it is imported only where it is used.


def _tpu(*args):
    from pallas_kernels.quantized_matmul_tpu import tpu

    return tpu(*args)


def _gpu(*args):
    from pallas_kernels.quantized_matmul_gpu import gpu

    return gpu(*args)


_IMPLEMENTATIONS = {
    "tpu": (("tpu",), _tpu),
    "gpu": (("gpu", "cuda"), _gpu),
    "xla": (("cpu", "gpu", "cuda", "rocm", "tpu"), _xla),
}
