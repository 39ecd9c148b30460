"""The picture of a corpus report: shares and epochs of each source, beside the paper's."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llama_jax.io import save_figure

GRAY = "0.65"


def save_chart(path: Path, result: Mapping[str, Any]) -> None:
    """Writes the picture.

    Args:
        path: The file; its suffix is the format.
        result: Of `report.report`.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows, published = result["sources"], result["published"]
    total = sum(row["tokens"] for row in rows.values()) or 1
    figure, (shares, epochs) = plt.subplots(
        1, 2, figsize=(9, 1.6 + 0.5 * len(rows)), layout="constrained", sharey=True
    )
    estimated = " (estimated)" if result["tokens_are_estimated"] else ""
    bars = {
        f"tokens of the corpus{estimated}": (
            [100 * r["tokens"] / total for r in rows.values()],
            "C1",
        ),
        "training mixture": ([100 * row["share"] for row in rows.values()], "C0"),
        "LLaMA (published)": ([100 * _paper(published, name, "share") for name in rows], GRAY),
    }
    _draw(shares, bars, 0.0)
    shares.set(xlabel="share of the tokens, %", yticks=range(len(rows)))
    shares.set_yticklabels([name.replace("$", r"\$") for name in rows])
    shares.invert_yaxis()
    own = [row["epochs"] or 0 for row in rows.values()]
    paper = [_paper(published, name, "epochs") for name in rows]
    positive = [value for value in own + paper if value > 0]
    logarithmic = max(positive, default=1) > 20 * min(positive, default=1)
    one = 1.0 if logarithmic else 0.0
    _draw(epochs, {"": (own, "C0"), " ": (paper, GRAY)}, one)
    if logarithmic:
        epochs.set_xscale("log")
        epochs.xaxis.set_major_formatter("{x:g}")
    epochs.axvline(1, color="black", lw=0.8)
    epochs.set(xlabel=f"epochs in {result['training_tokens']:,.0f} training tokens")
    epochs.tick_params(left=False)
    figure.legend(*shares.get_legend_handles_labels(), loc="outside upper center", ncols=3)
    save_figure(figure, path)
    plt.close(figure)


def _paper(published: Mapping[str, Any], name: str, key: str) -> float:
    return published[name][key] if name in published else 0.0


def _draw(axes: Any, bars: Mapping[str, tuple[list[float], str]], start: float) -> None:
    """Horizontal bars in groups, from ``start`` to each value; a value of 0 has no bar."""
    height = 0.8 / len(bars)
    for i, (label, (values, color)) in enumerate(bars.items()):
        places = [row + (i - (len(bars) - 1) / 2) * height for row in range(len(values))]
        widths = [value - start if value > 0 else 0 for value in values]
        axes.barh(places, widths, height, left=start, label=label, color=color)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
