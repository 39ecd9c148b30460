"""Chooses the implementation of an operation for the platform that is compiled for."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp


def platform() -> str:
    """The platform that is compiled for: that of the mesh if one is set, else JAX's default.

    In a program compiled on a laptop for a TPU, the mesh has TPU devices, while
    `jax.default_backend()` is "cpu".
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.platform if device is not None else jax.default_backend()


def device_kind() -> str:
    """The kind of chip that is compiled for, found as in :func:`platform`."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.device_kind if device is not None else jax.devices()[0].device_kind


def num_cores() -> int | None:
    """Multiprocessors of the GPU that is compiled for, found as in :func:`platform`, if known."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is not None:
        return device.num_cores
    return getattr(jax.devices()[0], "core_count", None)


def separate(x: Any) -> Any:
    """Arrays that XLA for TPU stores before they are used.

    It would fuse the operations after a matrix product with the product, or those before it, where
    they run several times: reductions over rows and SwiGLU make a product up to twice as long.
    """
    return jax.lax.optimization_barrier(x) if platform() == "tpu" else x


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def copies(x: jax.Array, n: int) -> tuple[jax.Array, ...]:
    """``n`` times x, for products whose gradients are :func:`separate` and added in float32."""
    return (x,) * n


def _sum_separate(n, _, grads):
    grads = separate(grads)
    return (sum(x.astype(jnp.float32) for x in grads).astype(grads[0].dtype),)


copies.defvjp(lambda x, n: ((x,) * n, None), _sum_separate)


def call(
    op: str,
    table: Mapping[str, tuple[tuple[str, ...], Callable[..., Any]]],
    implementation: str | None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Runs the named implementation, or else the first in the table that supports the arguments.

    Args:
      op: name of the operation, for messages.
      table: name -> (platforms, function), best first. A function raises NotImplementedError for
        arguments that it does not support; then the next one is tried.
      implementation: a name, which is never replaced by another implementation; None: any. A CPU
        runs every implementation, kernels in Pallas' interpreter.
      *args: passed to the function.
      **kwargs: passed to the function.

    Raises:
      ValueError: no implementation has this name.
      NotImplementedError: the named implementation, or every one of the platform, does not support
        the arguments; the message says why.
    """
    if implementation is not None:
        if implementation not in table:
            known = ", ".join(table)
            raise ValueError(f"{op}: no implementation {implementation!r}; there are {known}")
        platforms, function = table[implementation]
        if platform() not in (*platforms, "cpu"):
            raise NotImplementedError(
                f"{op}: {implementation!r} runs on {', '.join(platforms)}, not on {platform()}"
            )
        return function(*args, **kwargs)
    reasons = []
    for name, (platforms, function) in table.items():
        if platform() in platforms:
            try:
                return function(*args, **kwargs)
            except NotImplementedError as e:
                reasons.append(f"{name}: {e}")
    why = "; ".join(reasons)
    raise NotImplementedError(
        f"{op}: no implementation for platform {platform()!r} supports this; {why}"
    )
