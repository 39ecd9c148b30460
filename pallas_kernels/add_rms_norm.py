"""RMSNorm, alone and after adding partial sums to the residual stream."""

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch


def rms_norm(x_BTD: jax.Array, scale_D: jax.Array, eps: float) -> jax.Array:
    """x / sqrt(mean(x^2) + eps) * scale over D, arXiv 1910.07467.

    Args:
      x_BTD: any floating dtype, which is also the result's.
      scale_D: the learned scale.
      eps: added to the mean square.
    """
    # float32: in bfloat16 the mean square loses too many bits.
    x = x_BTD.astype(jnp.float32)
    x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)
    # Rounded before the product with the scale, as in Meta's code that trained the models.
    return (x.astype(x_BTD.dtype) * scale_D).astype(x_BTD.dtype)


def add_rms_norm(
    x_BTD: jax.Array,
    parts_PBTD: jax.Array,
    scale_D: jax.Array,
    eps: float,
    *,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Adds the sum of P arrays to x, and normalizes the result; on a GPU one kernel.

    Args:
      x_BTD: the residual stream.
      parts_PBTD: added in float32 and rounded to x's dtype before they are added to x. Rows beyond
        the B of x are ignored.
      scale_D: the learned scale.
      eps: added to the mean square.
      implementation: "gpu" or "xla", chosen as in :func:`rotary_attention`.

    Returns:
      The new x, and its :func:`rms_norm`.
    """
    return dispatch.call(
        "add_rms_norm", _IMPLEMENTATIONS, implementation, x_BTD, parts_PBTD, scale_D, eps
    )


def _xla(x, parts, scale, eps):
    total = jnp.sum(parts[:, : x.shape[0]], axis=0, dtype=jnp.float32)
    x = x + total.astype(x.dtype)
    return x, rms_norm(x, scale, eps)


def _gpu(*args):
    from pallas_kernels.add_rms_norm_gpu import gpu  # Pallas takes a second to import

    return gpu(*args)


_IMPLEMENTATIONS = {
    "gpu": (("gpu", "cuda"), _gpu),
    "xla": (("cpu", "gpu", "cuda", "rocm", "tpu"), _xla),
}
