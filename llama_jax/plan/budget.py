"""Which size for a budget, and what runs cost: arithmetic, with its sources.

The paper's carbon table (arXiv 2302.13971, section 6), and the loss of a model of N weights trained
on D tokens as fitted by Hoffmann et al. (arXiv 2203.15556, approach 3), with the constants of
Besiroglu et al. (arXiv 2404.10102), who repeated that fit on the same runs.
"""

import math
from pathlib import Path
from typing import Any, NamedTuple

PAPER_WATTS = 400.0
PAPER_PUE = 1.1
PAPER_CARBON = 0.385
"""kg CO2eq a kWh, the US average of the paper"""


def energy(hours: float, watts: float | None, pue: float, carbon: float) -> dict[str, Any]:
    """MWh and tCO2eq of chip-hours; None where the chip's watts are not known."""
    mwh = None if watts is None else hours * watts * pue / 1e6
    return {
        "watts": watts,
        "pue": pue,
        "kg_a_kwh": carbon,
        "mwh": mwh,
        "tco2eq": None if mwh is None else mwh * carbon,
    }


PAPER_HOURS = {
    "OPT-175B": 809_472,
    "BLOOM-175B": 1_082_880,
    "LLaMA-7B": 82_432,
    "LLaMA-13B": 135_168,
    "LLaMA-33B": 530_432,
    "LLaMA-65B": 1_022_362,
}
"""GPU-hours of the paper's table 15"""


def paper_table() -> list[dict[str, Any]]:
    """Table 15 of the paper, each row computed from its GPU-hours."""
    return [
        {"model": name, "gpu_hours": hours} | energy(hours, PAPER_WATTS, PAPER_PUE, PAPER_CARBON)
        for name, hours in PAPER_HOURS.items()
    ]


def paper_text() -> str:
    """:func:`paper_table` for a person."""
    lines = [
        "Carbon of training (table 15 of the LLaMA paper): GPU-hours x 400 W x PUE 1.1, and 0.385",
        "kg CO2eq a kWh, for every model as if trained in the same place.",
        "",
        f"{'model':<12}{'GPU-hours':>12}{'MWh':>8}{'tCO2eq':>8}",
    ]
    for r in paper_table():
        lines.append(f"{r['model']:<12}{r['gpu_hours']:>12,}{r['mwh']:>8.0f}{r['tco2eq']:>8.0f}")
    hours = chip_hours(1.4e12, 380, 2048)
    lines += [
        "",
        "65B, 1.4T tokens at 380 tokens/s a GPU on 2048 A100 (section 2.4): "
        f"{hours:,.0f} GPU-hours, {hours / 2048 / 24:.1f} days",
    ]
    return "\n".join(lines)


def chip_hours(tokens: float, tokens_per_second: float, chips: int) -> float:
    """Chip-hours of a run; ``tokens_per_second`` of one chip."""
    return tokens / (tokens_per_second * chips) / 3600 * chips


class Law(NamedTuple):
    """loss = E + A / N^alpha + B / D^beta, nats a token of the authors' text."""

    source: str
    E: float
    A: float
    B: float
    alpha: float
    beta: float

    def loss(self, N: float, D: float) -> float:
        return self.E + self.A / N**self.alpha + self.B / D**self.beta

    def best(self, budget: float) -> tuple[float, float]:
        """(N, D) of least loss with 6 N D = ``budget``, in closed form (Hoffmann, equation 4)."""
        G = (self.alpha * self.A / (self.beta * self.B)) ** (1 / (self.alpha + self.beta))
        N = G * (budget / 6) ** (self.beta / (self.alpha + self.beta))
        return N, budget / 6 / N

    def tokens(self, N: float, loss: float) -> float:
        """D at which a model of N weights has that loss; infinite for one too small."""
        left = loss - self.E - self.A / N**self.alpha
        return (self.B / left) ** (1 / self.beta) if left > 0 else math.inf


LAW = Law("Besiroglu et al. 2024, arXiv 2404.10102", 1.8172, 482.01, 2085.43, 0.3478, 0.3658)
FIRST_LAW = Law("Hoffmann et al. 2022, arXiv 2203.15556", 1.69, 406.4, 410.7, 0.34, 0.28)


class Choice(NamedTuple):
    """A size and its tokens, with what it costs in operations."""

    N: float
    D: float
    loss: float
    training: float
    serving: float


def choices(budget: float, served: float, law: Law = LAW) -> tuple[Choice, Choice]:
    """(least loss for the budget; the same loss at the least cost of training and serving).

    Training takes 6 operations a weight and token, serving 2 (Kaplan et al., arXiv 2001.08361).

    Args:
      budget: operations for training.
      served: tokens that will be read and written in use.
    """
    N, D = law.best(budget)
    loss = law.loss(N, D)
    optimal = Choice(N, D, loss, 6 * N * D, 2 * N * served)
    cost = lambda n: 6 * n * law.tokens(n, loss) + 2 * n * served
    # The cost falls, then rises: golden section over the logarithm of the size.
    low, high, ratio = math.log(N / 1000), math.log(N * 10), (math.sqrt(5) - 1) / 2
    while high - low > 1e-9:
        a, b = high - ratio * (high - low), low + ratio * (high - low)
        low, high = (low, b) if cost(math.exp(a)) < cost(math.exp(b)) else (a, high)
    n = math.exp((low + high) / 2)
    d = law.tokens(n, loss)
    return optimal, Choice(n, d, loss, 6 * n * d, 2 * n * served)


KNOWN = {
    "LLaMA 7B": (6.738e9, 1.0e12),
    "LLaMA 13B": (13.016e9, 1.0e12),
    "LLaMA 33B": (32.529e9, 1.4e12),
    "LLaMA 65B": (65.286e9, 1.4e12),
    "Chinchilla 70B": (70e9, 1.4e12),
}
"""(weights, tokens) of models to compare with; Chinchilla: Hoffmann et al., section 4"""


def budget_text(budget: float, served: float) -> str:
    """The two choices for a person, and what the first fit says."""
    optimal, cheapest = choices(budget, served)
    lines = [
        f"Training with {budget:.3g} operations, by the law loss = E + A / N^a + B / D^b "
        f"({LAW.source}):",
        f"  least loss: {_size(optimal.N)} weights, {_size(optimal.D)} tokens "
        f"({optimal.D / optimal.N:.0f} a weight), loss {optimal.loss:.3f} nats a token",
    ]
    N, D = FIRST_LAW.best(budget)
    lines.append(
        f"  the constants first published ({FIRST_LAW.source}) say {_size(N)}, {_size(D)} tokens"
    )
    if served:
        whole = lambda c: c.training + c.serving
        lines += [
            f"With {_size(served)} tokens served, the same loss at the least total cost:",
            f"  {_size(cheapest.N)} weights, {_size(cheapest.D)} tokens "
            f"({cheapest.D / cheapest.N:.0f} a weight): {cheapest.training:.3g} operations to "
            f"train, {cheapest.serving:.3g} to serve",
            f"  that is {1 - whole(cheapest) / whole(optimal):.1%} less than the first size, which "
            f"takes {optimal.training:.3g} to train, {optimal.serving:.3g} to serve",
        ]
    return "\n".join(lines)


def _size(n: float) -> str:
    for unit, power in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if n >= power:
            return f"{n / power:.3g}{unit}"
    return f"{n:.3g}"


def draw_budget(budget: float, served: float, path: Path) -> None:
    """Loss against size for the budget, the choices on it, and models that exist."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np

    optimal, cheapest = choices(budget, served)
    figure, axes = plt.subplots(figsize=(7.5, 5), layout="constrained")
    sizes = np.geomspace(min(optimal.N / 30, 2e9), max(optimal.N * 30, 2e11), 300)
    losses = [LAW.loss(n, budget / 6 / n) for n in sizes]
    axes.plot(sizes, losses, label=f"trained with {budget:.3g} operations")
    axes.plot(optimal.N, optimal.loss, "o", c="C0", label=f"least loss: {_size(optimal.N)}")
    if served:
        label = f"same loss, cheapest with {_size(served)} tokens served: {_size(cheapest.N)}"
        axes.plot(cheapest.N, cheapest.loss, "D", c="C1", label=label)
    for name, (N, D) in KNOWN.items():
        axes.plot(N, LAW.loss(N, D), "s", c="0.35", ms=4)
        below = {"LLaMA 65B": (2, 7, "left"), "Chinchilla 70B": (4, -13, "left")}
        x, y, side = below.get(name, (6, 4, "left"))
        at = (N, LAW.loss(N, D))
        axes.annotate(name, at, (x, y), textcoords="offset points", fontsize=8, ha=side)
    top = max(LAW.loss(*nd) for nd in KNOWN.values())
    axes.set_ylim(min(1.85, optimal.loss - 0.05), max(top, optimal.loss) + 0.35)
    axes.set(xscale="log", xlabel="weights N", ylabel="predicted loss, nats a token")
    axes.set_title("Loss for a training budget; squares: models that exist, with their own budgets")
    axes.title.set_fontsize(9)
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=130)
    plt.close(figure)
