"""Types of values of a recipe: numbers in a range, paths, times and ranges of steps."""

import difflib
import re
from collections.abc import Sequence
from typing import Annotated

from pydantic import AfterValidator, Field

from llama_jax.storage.paths import check_path

NonNegative = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Beta = Annotated[float, Field(ge=0, lt=1)]
# JAX truncates seeds to 32 bits, so a larger seed would silently become another one.
Seed = Annotated[int, Field(ge=0, lt=2**32)]


def _local_path(path: str) -> str:
    if "://" in path:
        raise ValueError(
            "URLs are not supported here; give a path of this machine, or of a file system that is "
            "mounted on every host"
        )
    return check_path(path)


def _required_path(path: str) -> str:
    if not path.strip():
        raise ValueError("it is empty; give a path")
    return check_path(path)


LocalPath = Annotated[str, AfterValidator(_local_path)]
StoredPath = Annotated[str, AfterValidator(check_path)]
"""a local path, or a URL of a bucket"""
RequiredPath = Annotated[str, AfterValidator(_required_path)]


def _step_range(bounds: tuple[int, int]) -> tuple[int, int]:
    first, last = bounds
    if not 1 <= first <= last:
        raise ValueError("give [first, last], counted from 1, with first <= last")
    return bounds


def _save_every(value: int | str) -> int | str:
    if isinstance(value, str):
        seconds_of(value)
    elif value < 1:
        raise ValueError("give a number of steps, at least 1, or a time such as 10min")
    return value


def seconds_of(time: str) -> float:
    """Seconds of a time such as 90s, 10min or 2h."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?(s|min|h)", time.strip())
    if not found or float(found[1]) == 0:
        raise ValueError(f"{time!r} is not a time; write 90s, 10min or 2h")
    return float(found[1]) * {"s": 1, "min": 60, "h": 3600}[found[2]]


SaveEvery = Annotated[int | str, AfterValidator(_save_every)]

StepRange = Annotated[tuple[int, int], AfterValidator(_step_range)]


def did_you_mean(name: str, known: Sequence[str]) -> str:
    """The end of a message that names the most similar known name; "" if none is similar."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""
