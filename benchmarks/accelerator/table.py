"""The printed table, with the targets for one H100 beside the results."""

from collections.abc import Callable
from typing import Any, NamedTuple

Found = dict[str, dict[str, Any]]
"""Rows by name"""


class Target(NamedTuple):
    """A goal, printed below the row that shows it."""

    row: str
    text: str
    least: float
    value: Callable[[Found], float | None]
    """None: not measured"""


def _time(found: Found, name: str) -> float | None:
    return found.get(name, {}).get("seconds", {}).get("median")


def _number(found: Found, name: str, label: str) -> float | None:
    return found.get(name, {}).get("numbers", {}).get(label)


def _ratio(a: float | None, b: float | None) -> float | None:
    return a / b if a and b else None


def _of_cudnn(T: int) -> Callable[[Found], float | None]:
    """Rate of our fastest kernel divided by that of cuDNN with XLA's rotation."""
    start = f"attention T {T}, forward + backward: "

    def value(found: Found) -> float | None:
        ours = [
            time for name in found
            if name.startswith(start) and name != start + "cudnn" and "torch" not in name
            and (time := _time(found, name))
        ]  # fmt: skip
        return _ratio(_time(found, start + "cudnn"), min(ours, default=None))

    return value


TARGETS = [
    *(
        Target(
            f"attention T {T}, forward + backward: cudnn",
            f"our fastest kernel, T {T}, forward + backward, x cuDNN + rotary", 0.9, _of_cudnn(T),
        )
        for T in (4096, 16384)
    ),
    Target(
        "generate llama3.1-8b, bfloat16, batch 1", "8B, bfloat16, 1 row: share of copy bandwidth",
        0.8, lambda f: _number(f, "generate llama3.1-8b, bfloat16, batch 1", "of copy"),
    ),
    Target(
        "generate llama3.1-8b, int8, batch 1", "8B, int8, 1 row, x bfloat16", 1.7,
        lambda f: _ratio(
            _time(f, "generate llama3.1-8b, bfloat16, batch 1"),
            _time(f, "generate llama3.1-8b, int8, batch 1"),
        ),
    ),
    *(
        Target(
            f"generate {model}, torch, batch 1", f"{model}, 1 row, x transformers' static cache",
            1.3, lambda f, model=model: _ratio(
                _time(f, f"generate {model}, torch, batch 1"),
                _time(f, f"generate {model}, bfloat16, batch 1"),
            ),
        )
        for model in ("llama3.2-1b", "llama3.1-8b")
    ),
    Target("train llama3.2-1b", "1B training: MFU", 0.5, lambda f: _best_training(f, "MFU")),
    Target(
        "train llama3.2-1b, torch", "1B training, x compiled torch", 1.05,
        lambda f: _ratio(
            _best_training(f, "tokens/s"), _number(f, "train llama3.2-1b, torch", "tokens/s")
        ),
    ),
]  # fmt: skip


def _best_training(found: Found, label: str) -> float | None:
    ours = [
        number for name in found
        if name.startswith("train llama3.2-1b, remat") and (number := _number(found, name, label))
    ]  # fmt: skip
    return max(ours, default=None)


def verdicts(found: Found) -> list[tuple[Target, str]]:
    """Each target with "met", "NOT MET" (and the value) or "not measured"."""
    measured = found.get("card", {}).get("platform") not in (None, "cpu")
    out = []
    for target in TARGETS:
        value = target.value(found) if measured else None
        said = "not measured"
        if value is not None:
            said = f"{value:.2f}: {'met' if value >= target.least else 'NOT MET'}"
        out.append((target, said))
    return out


def table(results: dict[str, Any]) -> str:
    """One line per row, each target below its row, and all targets at the end."""
    found = {row["name"]: row for row in results["rows"]}
    card = found.get("card", {})
    versions = ", ".join(f"{name} {v}" for name, v in card.get("versions", {}).items())
    lines = [
        f"{results['command']}, {results['date']}, commit {card.get('commit') or 'unknown'}",
        f"{card.get('device', 'no device')} {card.get('driver', '')}, {versions}",
    ]
    if card.get("platform") == "cpu":
        lines.append("CPU: tiny sizes, which test this command; the times mean nothing")
    step, said = None, verdicts(found)
    for row in results["rows"]:
        if row["step"] != step:
            step = row["step"]
            lines += ["", f"{step}"]
        lines.append(_line(row))
        lines += [_target(t, v) for t, v in said if t.row == row["name"]]
    return (
        "\n".join([*lines, "", "targets (for one H100)", *(_target(t, v) for t, v in said)]) + "\n"
    )


def _target(target: Target, said: str) -> str:
    return f"  target: {target.text}, at least {target.least}: {said}"


def _line(row: dict[str, Any]) -> str:
    head = f"  {row['name']:<58}"
    for why in ("skipped", "cannot", "error", "not measured"):
        if why in row:
            return f"{head} {why}: {row[why]}"
    parts = []
    if time := row.get("seconds"):
        parts.append(_duration(time))
    parts += [f"{label} {_short(x)}" for label, x in row.get("numbers", {}).items()]
    if "repeat" in row:
        parts.append(f"repeat {row['repeat']}")
    if row.get("wrong"):
        parts.append(f"WRONG: {row['wrong']}")
    elif "wrong" in row:
        parts.append("right")
    return f"{head} {', '.join(parts)}"


def _duration(time: dict[str, float]) -> str:
    scale, unit = next(
        ((k, u) for k, u in ((1, "s"), (1e3, "ms"), (1e6, "us")) if time["median"] * k >= 1),
        (1e6, "us"),
    )
    low, high = time["min"] * scale, time["max"] * scale
    return f"{_short(time['median'] * scale)} {unit} ({_short(low)}-{_short(high)})"


def _short(x: float) -> str:
    return f"{x:,.0f}" if abs(x) >= 100 else f"{x:.3g}"
