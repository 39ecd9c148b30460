"""RMSNorm, alone and after adding partial sums to the residual stream."""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels import dispatch


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def rms_norm(x_BTD: jax.Array, scale_D: jax.Array, eps: float) -> jax.Array:
    """x / sqrt(mean(x^2) + eps) * scale over D, arXiv 1910.07467.

    Args:
      x_BTD: any floating dtype, which is also the result's.
      scale_D: the learned scale.
      eps: added to the mean square.
    """
    return _scaled(x_BTD, _reciprocal_rms(x_BTD, eps), scale_D)


def _reciprocal_rms(x_BTD, eps):
    # float32: in bfloat16 the mean square loses too many bits.
    x = x_BTD.astype(jnp.float32)
    return jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)


def _scaled(x_BTD, r_BT1, scale_D):
    x = x_BTD.astype(jnp.float32) * r_BT1
    # Rounded before the product with the scale, as in Meta's code that trained the models.
    return (x.astype(x_BTD.dtype) * scale_D).astype(x_BTD.dtype)


def _rms_norm_forward(x_BTD, scale_D, eps):
    x_BTD = dispatch.separate(x_BTD)
    r_BT1 = checkpoint_name(_reciprocal_rms(x_BTD, eps), "reciprocal_rms")
    return _scaled(x_BTD, r_BT1, scale_D), (x_BTD, r_BT1, scale_D)


def _rms_norm_backward(_, residuals, d_out_BTD):
    x_BTD, r_BT1, scale_D = residuals
    d_out = dispatch.separate(d_out_BTD).astype(jnp.float32)
    normed = x_BTD.astype(jnp.float32) * r_BT1
    d_normed = d_out * scale_D
    mean_BT1 = jnp.mean(d_normed * normed, axis=-1, keepdims=True)
    d_x = (r_BT1 * (d_normed - normed * mean_BT1)).astype(x_BTD.dtype)
    d_scale = jnp.sum(d_out * normed.astype(x_BTD.dtype), axis=tuple(range(x_BTD.ndim - 1)))
    return d_x, d_scale.astype(scale_D.dtype)


rms_norm.defvjp(_rms_norm_forward, _rms_norm_backward)


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
