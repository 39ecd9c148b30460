"""Which model size to train with a budget of FLOPs, by a scaling law.

The loss of a model with N parameters trained on D tokens as fitted by Hoffmann et al. (arXiv
2203.15556, approach 3), with the constants of Besiroglu et al. (arXiv 2404.10102), who repeated
that fit on the same runs. Training takes 6 FLOPs per parameter and token, inference 2 (Kaplan et
al., arXiv 2001.08361).
"""

import math
from pathlib import Path
from typing import NamedTuple

from llama_jax.io import save_figure


class Law(NamedTuple):
    """loss = E + A / N^alpha + B / D^beta, in nats/token of the authors' validation text.

    Example:
      >>> N, D = LAW.optimum(1e22)
    """

    source: str
    E: float
    A: float
    B: float
    alpha: float
    beta: float

    def loss(self, N: float, D: float) -> float:
        return self.E + self.A / N**self.alpha + self.B / D**self.beta

    def optimum(self, budget: float) -> tuple[float, float]:
        """(N, D) of minimum loss with 6 N D = ``budget``, in closed form (Hoffmann, equation 4)."""
        G = (self.alpha * self.A / (self.beta * self.B)) ** (1 / (self.alpha + self.beta))
        N = G * (budget / 6) ** (self.beta / (self.alpha + self.beta))
        return N, budget / 6 / N

    def tokens(self, N: float, loss: float) -> float:
        """D with which a model of N parameters reaches a loss; infinite if N is too small."""
        left = loss - self.E - self.A / N**self.alpha
        return (self.B / left) ** (1 / self.beta) if left > 0 else math.inf


LAW = Law("Besiroglu et al. 2024, arXiv 2404.10102", 1.8172, 482.01, 2085.43, 0.3478, 0.3658)
ORIGINAL_LAW = Law("Hoffmann et al. 2022, arXiv 2203.15556", 1.69, 406.4, 410.7, 0.34, 0.28)


class Choice(NamedTuple):
    """N parameters, D tokens, their loss, and the FLOPs of training and inference."""

    N: float
    D: float
    loss: float
    training: float
    inference: float


def choices(budget: float, inference_tokens: float, law: Law = LAW) -> tuple[Choice, Choice]:
    """(minimum loss for the budget, the same loss with the fewest FLOPs in total).

    Args:
      budget: FLOPs of training.
      inference_tokens: tokens that the trained model will process.
      law: a scaling law.
    """
    N, D = law.optimum(budget)
    loss = law.loss(N, D)
    training = lambda n: 6 * n * law.tokens(n, loss)
    inference = lambda n: 2 * n * inference_tokens
    total = lambda n: training(n) + inference(n)
    # The total falls, then rises with size: golden-section search over log N.
    low, high, ratio = math.log(N / 1000), math.log(N * 10), (math.sqrt(5) - 1) / 2
    while high - low > 1e-9:
        a, b = high - ratio * (high - low), low + ratio * (high - low)
        low, high = (low, b) if total(math.exp(a)) < total(math.exp(b)) else (a, high)
    n = math.exp((low + high) / 2)
    return (
        Choice(N, D, loss, 6 * N * D, inference(N)),
        Choice(n, law.tokens(n, loss), loss, training(n), inference(n)),
    )


KNOWN = {
    "LLaMA 7B": (6.738e9, 1.0e12),
    "LLaMA 13B": (13.016e9, 1.0e12),
    "LLaMA 33B": (32.529e9, 1.4e12),
    "LLaMA 65B": (65.286e9, 1.4e12),
    "Chinchilla 70B": (70e9, 1.4e12),
}
"""(parameters, tokens) of published models; Chinchilla: Hoffmann et al., section 4"""


def to_text(budget: float, inference_tokens: float) -> str:
    """Format :func:`choices` and the original law's optimum for the terminal."""
    optimal, cheapest = choices(budget, inference_tokens)
    N, D = ORIGINAL_LAW.optimum(budget)
    lines = [
        f"Training with {budget:.3g} FLOPs; loss = E + A / N^a + B / D^b ({LAW.source}):",
        f"  minimum loss: {_size(optimal.N)} parameters, {_size(optimal.D)} tokens "
        f"({optimal.D / optimal.N:.0f} per parameter), loss {optimal.loss:.3f} nats/token",
        f"  with the original constants ({ORIGINAL_LAW.source}): {_size(N)}, {_size(D)} tokens",
    ]
    if inference_tokens:
        total = lambda c: c.training + c.inference
        lines += [
            f"With {_size(inference_tokens)} tokens of inference, the same loss at minimum total "
            "FLOPs:",
            f"  {_size(cheapest.N)} parameters, {_size(cheapest.D)} tokens "
            f"({cheapest.D / cheapest.N:.0f} per parameter): {cheapest.training:.3g} FLOPs of "
            f"training, {cheapest.inference:.3g} of inference",
            f"  {1 - total(cheapest) / total(optimal):.1%} less than the first size, which takes "
            f"{optimal.training:.3g} of training, {optimal.inference:.3g} of inference",
        ]
    return "\n".join(lines)


def _size(n: float) -> str:
    for unit, power in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if n >= power:
            return f"{n / power:.3g}{unit}"
    return f"{n:.3g}"


def draw(budget: float, inference_tokens: float, path: Path) -> None:
    """Plot loss against size for the budget, the choices on that curve, and published models.

    Args:
      budget: FLOPs of training.
      inference_tokens: tokens that the trained model will process.
      path: file to write; its suffix is the format.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np

    optimal, cheapest = choices(budget, inference_tokens)
    figure, axes = plt.subplots(figsize=(7.5, 5), layout="constrained")
    sizes = np.geomspace(min(optimal.N / 30, 2e9), max(optimal.N * 30, 2e11), 300)
    losses = [LAW.loss(n, budget / 6 / n) for n in sizes]
    axes.plot(sizes, losses, label=f"trained with {budget:.3g} FLOPs")
    axes.plot(optimal.N, optimal.loss, "o", c="C0", label=f"minimum loss: {_size(optimal.N)}")
    if inference_tokens:
        label = f"same loss, cheapest with {_size(inference_tokens)} tokens of inference: "
        axes.plot(cheapest.N, cheapest.loss, "D", c="C1", label=label + _size(cheapest.N))
    label_offsets = {"LLaMA 65B": (2, 7), "Chinchilla 70B": (4, -13)}
    for name, (N, D) in KNOWN.items():
        at = (N, LAW.loss(N, D))
        axes.plot(*at, "s", c="0.35", ms=4)
        offset = label_offsets.get(name, (6, 4))
        axes.annotate(name, at, offset, textcoords="offset points", fontsize=8)
    top = max(LAW.loss(*nd) for nd in KNOWN.values())
    axes.set_ylim(min(1.85, optimal.loss - 0.05), max(top, optimal.loss) + 0.35)
    axes.set(xscale="log", xlabel="parameters N", ylabel="predicted loss, nats/token")
    axes.set_title("Loss for a training budget (squares: published models at their own budgets)")
    axes.title.set_fontsize(9)
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8)
    save_figure(figure, path)
    plt.close(figure)
