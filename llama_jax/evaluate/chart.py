"""The bar chart of an evaluation."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from llama_jax.io import save_figure

MAX_INCHES = 300
"""Largest height; the library that draws the chart refuses more than 65,535 pixels."""


class Bar(NamedTuple):
    """One measured value, and published ones beside it, in percent."""

    label: str
    value: float
    standard_error: float
    published: Mapping[str, float]
    """by model"""


def save_chart(path: Path, bars: Sequence[Bar], model: str) -> bool:
    """Write the chart; without bars, remove an old one.

    Args:
      path: file to write; its suffix is the format.
      bars: from top to bottom.
      model: name of the measured model.

    Returns:
      Whether there is a chart.
    """
    if not bars:
        path.unlink(missing_ok=True)
        return False
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    published = list(dict.fromkeys(name for bar in bars for name in bar.published))
    inches = min(1.2 + 0.4 * len(bars), MAX_INCHES)
    figure, axes = plt.subplots(figsize=(8, inches), layout="constrained")
    height = 0.8 / (1 + len(published))
    axes.barh(
        range(len(bars)), [bar.value for bar in bars], height, label=_plain(model),
        xerr=[bar.standard_error for bar in bars], error_kw={"lw": 1},
    )  # fmt: skip
    for i, name in enumerate(published, 1):
        rows = [row for row, bar in enumerate(bars) if name in bar.published]
        values = [bars[row].published[name] for row in rows]
        axes.barh(
            [row + i * height for row in rows], values, height,
            label=f"{name} (published)", color=str(0.55 + 0.2 * (i - 1)),
        )  # fmt: skip
    middle = height * len(published) / 2
    axes.set_yticks([row + middle for row in range(len(bars))], [_plain(bar.label) for bar in bars])
    axes.set(xlim=(0, 100), ylim=(len(bars) - 0.5 + middle, -0.5 + middle - 0.1), xlabel="%")
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    figure.legend(loc="outside upper center", ncols=1 + len(published))
    save_figure(figure, path)
    plt.close(figure)
    return True


def _plain(name: str) -> str:
    r"""Show "$" as itself, and a name in the legend that begins with "_".

    Matplotlib reads mathematics between two "$", and hides names with "_".
    """
    return " " * name.startswith("_") + name.replace("$", r"\$")
