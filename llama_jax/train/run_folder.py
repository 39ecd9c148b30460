"""The run folder: what a run that continues may change, and the record of what was changed.

``recipe.toml`` holds the settings in use. It is written when training starts, so that a recipe that
failed before can be corrected, and again when a continued run changes a setting of
:data:`RECORDED`; each such change is a line of ``changes.jsonl``.
"""

import datetime
import fnmatch
import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

from llama_jax.checkpoint.file_hashes import record_files
from llama_jax.checkpoint.weights import whole_steps
from llama_jax.config import ConfigError, Recipe, load_saved_recipe, to_dict, to_toml
from llama_jax.io import atomic_write

FREE = (
    "mesh.*", "checkpoint.*", "data.workers", "data.prepared", "data.tokenizer",
    "data.skip_bad_lines", "data.sources.*.path", "train.gradient_accumulation", "train.remat",
    "train.unroll", "train.loss_chunk",
    "train.attention", "train.log_every", "train.eval_every", "train.eval_batches",
    "train.profile_steps", "train.sample_prompts", "train.restart_from",
    "train.allow_other_tokenizer",
)  # fmt: skip
"""Settings that do not change what a run computes (beyond rounding), or whose content is checked
by hash: free to change when it is continued."""

RECORDED = ("optim.*", "train.steps", "data.skip_batches")
"""Settings that a continued run may change from its checkpoint on; each change is recorded."""

Changes = dict[str, tuple[Any, Any]]


class Saved(NamedTuple):
    """A run with a checkpoint that is continued."""

    recipe: Recipe
    """as it was"""
    changes: Changes
    """recorded settings that change now: name to (was, now)"""
    restart_from: int
    """checkpoint to go back to; 0: the newest"""


def read_saved(folder: Path, recipe: Recipe) -> Saved | None:
    """The run in ``folder`` that ``recipe`` continues; None: no checkpoint, so a new run.

    Raises:
      ConfigError: a checkpoint of something else, or of a run with other settings.
    """
    steps = whole_steps(folder)
    if not steps:
        return None
    path = folder / "recipe.toml"
    if not path.exists():
        raise ConfigError(
            f"{folder} holds a checkpoint that is no training run; take another checkpoint.dir"
        )
    before = load_saved_recipe(path)
    changed = differences(to_dict(before), to_dict(recipe))
    changed = {k: v for k, v in changed.items() if not _matches(k, FREE)}
    if refused := {k: v for k, v in changed.items() if not _matches(k, RECORDED)}:
        raise ConfigError(
            f"{folder} holds a run of another recipe:\n  " + "\n  ".join(lines(refused))
            + "\ntake the old settings to continue it, or another checkpoint.dir to start a new run"
        )  # fmt: skip
    return Saved(before, changed, _restart(folder, recipe, before, changed, steps))


def _restart(
    folder: Path, recipe: Recipe, before: Recipe, changed: Changes, steps: list[int]
) -> int:
    """The step to go back to; 0 when it was done before, or is not asked for."""
    wanted = recipe.train.restart_from
    if wanted == 0:
        return 0
    if wanted == before.train.restart_from:
        if changed:
            raise ConfigError(
                f"{folder} has already gone back to step {wanted} once (train.restart_from), and "
                f"now {', '.join(changed)} changes: leave train.restart_from out to go on from "
                f"step {steps[-1]}, or move the newer steps out of {folder / 'steps'} yourself to "
                "go back again"
            )
        return 0
    if wanted not in steps:
        raise ConfigError(
            f"train.restart_from={wanted}: {folder} has no such checkpoint, only "
            f"{', '.join(map(str, steps))}"
        )
    return wanted


def set_aside(folder: Path, step: int) -> Path | None:
    """Move checkpoints newer than ``step`` to a new folder ``set-aside-N``, with a copy of the
    metrics; None when there are none."""
    newer = [s for s in whole_steps(folder) if s > step]
    if not newer:
        return None
    number = 1
    while (target := folder / f"set-aside-{number}").exists():
        number += 1
    target.mkdir()
    if (folder / "metrics.jsonl").exists():
        shutil.copyfile(folder / "metrics.jsonl", target / "metrics.jsonl")
    # The newest first: killed in between, the folder still has a newest step that is one of these.
    for s in reversed(newer):
        (folder / "steps" / str(s)).rename(target / str(s))
    return target


def record(folder: Path, recipe: Recipe, saved: Saved | None, step: int) -> None:
    """Write ``recipe.toml`` of a run that starts, or the changes of one that continues; nothing
    where nothing changed."""
    if saved is not None:
        if not saved.changes and not saved.restart_from:
            return
        change: dict[str, Any] = {
            "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "step": step,
            "changed": {k: {"was": was, "now": now} for k, (was, now) in saved.changes.items()},
        }
        if saved.restart_from:
            change["restart_from"] = saved.restart_from
        path = folder / "changes.jsonl"
        old = path.read_bytes() if path.exists() else b""
        atomic_write(path, old + json.dumps(change).encode() + b"\n")
    atomic_write(folder / "recipe.toml", to_toml(recipe).encode())
    record_files(folder, "recipe.toml")


def differences(before: dict[str, Any], now: dict[str, Any], prefix: str = "") -> Changes:
    """Settings of two configs (as plain values) that differ: name to (was, now)."""
    out: Changes = {}
    for key in sorted(before.keys() | now.keys()):
        name, a, b = prefix + key, before.get(key), now.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            out |= differences(a, b, name + ".")
        elif a != b:
            out[name] = a, b
    return out


def lines(changes: Changes) -> list[str]:
    """Each difference as "name: was X, now Y"."""
    return [f"{name}: was {was!r}, now {now!r}" for name, (was, now) in changes.items()]


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
