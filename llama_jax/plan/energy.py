"""Energy and carbon of training, as in section 6 of the LLaMA paper (arXiv 2302.13971)."""

from typing import Any

PAPER_WATTS = 400.0
PAPER_PUE = 1.1
PAPER_CARBON = 0.385
"""kg CO2eq per kWh, the US average"""

PAPER_HOURS = {
    "OPT-175B": 809_472,
    "BLOOM-175B": 1_082_880,
    "LLaMA-7B": 82_432,
    "LLaMA-13B": 135_168,
    "LLaMA-33B": 530_432,
    "LLaMA-65B": 1_022_362,
}
"""GPU-hours of table 15"""


def energy(hours: float, watts: float | None, pue: float, carbon: float) -> dict[str, Any]:
    """MWh and tCO2eq of a run; None where the power of the chip is unknown.

    Args:
      hours: chip-hours.
      watts: power of a chip.
      pue: power usage effectiveness of the data center.
      carbon: kg CO2eq per kWh.
    """
    mwh = None if watts is None else hours * watts * pue / 1e6
    tco2eq = None if mwh is None else mwh * carbon
    return {"watts": watts, "pue": pue, "kg_per_kwh": carbon, "mwh": mwh, "tco2eq": tco2eq}


def chip_hours(tokens: float, tokens_per_second: float, chips: int) -> float:
    """Chip-hours of a run at ``tokens_per_second`` per chip.

    Args:
      tokens: tokens of the run.
      tokens_per_second: per chip.
      chips: number of chips.
    """
    return tokens / (tokens_per_second * chips) / 3600 * chips


def paper_table() -> list[dict[str, Any]]:
    """Table 15 of the paper, each row computed from its GPU-hours."""
    return [
        {"model": name, "gpu_hours": hours} | energy(hours, PAPER_WATTS, PAPER_PUE, PAPER_CARBON)
        for name, hours in PAPER_HOURS.items()
    ]


def paper_text() -> str:
    """Format :func:`paper_table` for the terminal."""
    lines = [
        "Carbon of training (table 15 of the LLaMA paper): GPU-hours x 400 W x PUE 1.1 x 0.385",
        "kg CO2eq per kWh, all models as if trained in the same data center.",
        "",
        f"{'model':<12}{'GPU-hours':>12}{'MWh':>8}{'tCO2eq':>8}",
    ]
    for r in paper_table():
        lines.append(f"{r['model']:<12}{r['gpu_hours']:>12,}{r['mwh']:>8.0f}{r['tco2eq']:>8.0f}")
    hours = chip_hours(1.4e12, 380, 2048)
    lines += [
        "",
        "65B on 1.4T tokens at 380 tokens/s per GPU with 2048 A100 (section 2.4): "
        f"{hours:,.0f} GPU-hours, {hours / 2048 / 24:.1f} days",
    ]
    return "\n".join(lines)
