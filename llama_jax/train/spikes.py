"""Which steps are skipped because of the norm of their gradient (``optim.skip_spikes``)."""

import math
import statistics
from typing import Any

import numpy as np

WINDOW = 128
"""Number of earlier steps whose gradient norms are compared with that of a step."""
MIN_STEPS = 16
"""Earlier steps without which no step is skipped."""


class Spikes:
    """The limit of the gradient norm, from the norms of earlier steps.

    The limit of a step depends on all earlier steps but the last, whether or not the last has been
    checked by now: so a continued run has the same limits. The norms of skipped steps count too, so
    that a lasting change of the norm is accepted after half a window.

    Args:
      multiple: of the median of the last :data:`WINDOW` norms; 0: no step is skipped.

    Example::

      spikes = Spikes(multiple=5.0)
      spikes.add(1, grad_norm=1.3, skipped=False)
      spikes.arguments(2)["limit"]  # inf: too few steps
    """

    def __init__(self, multiple: float):
        self.multiple = multiple
        self.count = 0
        """Steps skipped so far."""
        self._norms: list[float] = []
        self._step = 0

    def add(self, step: int, grad_norm: float, skipped: bool) -> None:
        """Take note of a step that was checked.

        Args:
          step: its number; steps are added in order.
          grad_norm: its gradient norm.
          skipped: whether it changed nothing.
        """
        self._norms = [*self._norms[-WINDOW:], grad_norm]
        self._step = step
        self.count += skipped

    def arguments(self, step: int) -> dict[str, np.float32]:
        """Arguments of the training step for step ``step``: "limit", if steps may be skipped."""
        if not self.multiple:
            return {}
        known = self._norms[: -1 if self._step == step - 1 else None][-WINDOW:]
        enough = len(known) >= MIN_STEPS
        return {
            "limit": np.float32(self.multiple * statistics.median(known) if enough else math.inf)
        }

    def state(self) -> dict[str, Any]:
        return {"norms": list(self._norms), "step": self._step, "count": self.count}

    def restore(self, state: dict[str, Any]) -> None:
        self._norms, self._step, self.count = state["norms"], state["step"], state["count"]
