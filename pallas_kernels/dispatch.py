"""Which implementation runs: the platform being compiled for, an ordered choice, its errors."""

from collections.abc import Callable, Mapping
from typing import Any

import jax


def platform() -> str:
    """The platform being compiled for: the mesh's where one is set, else this process's default.

    A step compiled on a laptop for a TPU has a TPU mesh, while `jax.default_backend()` says cpu.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.platform if device is not None else jax.default_backend()


def device_kind() -> str:
    """The kind of chip being compiled for, as :func:`platform` finds it."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.device_kind if device is not None else jax.devices()[0].device_kind


def call(
    op: str,
    table: Mapping[str, tuple[tuple[str, ...], Callable[..., Any]]],
    implementation: str | None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Run the implementation asked for by name, or the first of the table that can do it here.

    The table maps a name to (platforms, function), best first. A function that cannot do what is
    asked raises NotImplementedError: the next one is tried, but never in place of one asked for by
    name.

    Raises:
      ValueError: no implementation of that name.
      NotImplementedError: the named one cannot do this, or not here; the message says why. (On a
        CPU kernels run in Pallas' interpreter; those that cannot say so themselves.)
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
    raise NotImplementedError(f"{op}: nothing for platform {platform()!r} can do this; {why}")
