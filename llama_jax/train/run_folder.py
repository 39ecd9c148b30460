"""The run folder: its lock, which settings a continued run may change, and a record of changes.

``recipe.toml`` holds the current settings. It is written when training starts, so that a recipe
that failed before can be corrected, and again when a continued run changes a setting of
:data:`RECORDED_SETTINGS`; each such change is a line of ``changes.jsonl``.
"""

import contextlib
import datetime
import fnmatch
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.experimental.multihost_utils import sync_global_devices

from llama_jax.checkpoint.file_hashes import record_files
from llama_jax.checkpoint.steps import whole_steps
from llama_jax.config import ConfigError, Recipe, load_saved_recipe, to_dict, to_toml
from llama_jax.io import atomic_write, folder_lock
from llama_jax.storage.paths import check_access, is_remote
from llama_jax.train.frozen import has_frozen

RESUMABLE_SETTINGS = (
    "mesh.*", "checkpoint.*", "data.workers", "data.prepared", "data.tokenizer",
    "data.skip_bad_lines", "data.sources.*.path", "train.gradient_accumulation", "train.remat",
    "train.offload", "train.unroll", "train.loss_chunk",
    "train.attention", "train.log_every", "train.eval_every", "train.eval_batches",
    "train.early_stopping", "train.evaluate", "train.evaluate.*",
    "train.profile_steps", "train.hang_factor", "train.trackers", "train.sample_prompts",
    "train.restart_from", "train.allow_other_tokenizer",
)  # fmt: skip
"""Settings that may change when a run continues: they do not change what is computed (beyond
rounding), or a hash of their content is checked."""

RECORDED_SETTINGS = ("optim.*", "train.steps", "train.epochs", "data.skip_batches")
"""Settings that may change from a checkpoint on; each change is recorded."""
_STATE_SETTINGS = ("optim.algorithm", "optim.moment_dtype")
"""Settings that may not: they decide what the state of the optimizer is."""

Changes = dict[str, tuple[Any, Any]]
"""Name of a setting to its values (before, now)."""


class SavedRun(NamedTuple):
    """The saved run that is continued."""

    recipe: Recipe
    """Its recipe before this start."""
    changes: Changes
    """Recorded settings that change now."""
    restart_from: int
    """The checkpoint to go back to; 0 for the newest."""
    set_aside: Path | None = None
    """Folder to which newer checkpoints were moved."""


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock the run folder for this job; process 0 holds the lock.

    The other processes wait until process 0 has the lock. A folder that is still empty at the end
    is removed.

    Raises:
      ConfigError: another job uses the folder, or it cannot be made.
    """
    check_access(folder)
    if jax.process_index() != 0:
        sync_global_devices("locked")
        yield
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError, PermissionError) as e:
        problem = "it is a file" if isinstance(e, FileExistsError) else e.strerror
        raise ConfigError(f"checkpoint.dir={folder}: {problem}; choose another folder") from None
    try:
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(folder_lock(folder, "training"))
            except ValueError as e:
                raise ConfigError(str(e)) from None
            sync_global_devices("locked")
            try:
                yield
            finally:
                local = not is_remote(folder)
                if local and [p.name for p in folder.iterdir()] == [".lock"]:
                    shutil.rmtree(folder, ignore_errors=True)
    except OSError as e:
        if e.errno is not None and e.filename is None:
            e.filename = str(folder)
        raise


def open_saved(folder: Path, recipe: Recipe) -> SavedRun | None:
    """The run in ``folder`` that ``recipe`` continues; None for a new run.

    With ``train.restart_from``, newer checkpoints are moved to ``set-aside-N`` first.

    Raises:
      ConfigError: the folder holds something else, or a run with other settings.
    """
    saved = _read_saved(folder, recipe)
    sync_global_devices("folder read")
    if saved is None or not saved.restart_from:
        return saved
    moved = _set_aside(folder, saved.restart_from) if jax.process_index() == 0 else None
    sync_global_devices("set aside")
    return saved._replace(set_aside=moved)


def _read_saved(folder: Path, recipe: Recipe) -> SavedRun | None:
    steps = whole_steps(folder)
    if not steps:
        return None
    path = folder / "recipe.toml"
    if not path.exists():
        raise ConfigError(
            f"{folder} holds a checkpoint without a training run (no recipe.toml); use another "
            "checkpoint.dir"
        )
    before = load_saved_recipe(path)
    changed = differences(to_dict(before), to_dict(recipe))
    changed = {k: v for k, v in changed.items() if not _matches(k, RESUMABLE_SETTINGS)}
    if has_frozen(recipe):  # the loop compares the hash of these weights
        changed.pop("train.init_from", None)
    recorded = lambda name: _matches(name, RECORDED_SETTINGS) and name not in _STATE_SETTINGS
    if refused := {k: v for k, v in changed.items() if not recorded(k)}:
        raise ConfigError(
            f"{folder} holds a run of another recipe:\n  " + "\n  ".join(lines(refused))
            + "\nuse the old settings to continue it, or another checkpoint.dir for a new run"
        )  # fmt: skip
    return SavedRun(before, changed, _restart_step(folder, recipe, before, changed, steps))


def _restart_step(
    folder: Path, recipe: Recipe, before: Recipe, changed: Changes, steps: list[int]
) -> int:
    """The step to go back to; 0 if none is requested, or if an earlier start went back to it."""
    wanted = recipe.train.restart_from
    if wanted == 0:
        return 0
    if wanted == before.train.restart_from:
        if changed:
            raise ConfigError(
                f"{folder} has already gone back to step {wanted} once (train.restart_from), and "
                f"now {', '.join(changed)} changes: remove train.restart_from to continue from "
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


def _set_aside(folder: Path, step: int) -> Path | None:
    """Move checkpoints newer than ``step``, and a copy of the metrics, to a new folder
    ``set-aside-N``; None if there are none."""
    newer = [s for s in whole_steps(folder) if s > step]
    if not newer:
        return None
    number = 1
    while (target := folder / f"set-aside-{number}").exists():
        number += 1
    target.mkdir()
    if (folder / "metrics.jsonl").exists():
        (target / "metrics.jsonl").write_bytes((folder / "metrics.jsonl").read_bytes())
    # Newest first, so that an interruption leaves consecutive checkpoints; the next start moves the
    # rest.
    for s in reversed(newer):
        (folder / "steps" / str(s)).rename(target / str(s))
    return target


def record(folder: Path, recipe: Recipe, saved: SavedRun | None, step: int) -> None:
    """Write ``recipe.toml`` of a new run, or the changes of a continued run.

    Args:
      folder: the run folder.
      recipe: the current settings.
      saved: the run that is continued; None for a new run.
      step: the step from which the changes apply.
    """
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


def not_finite(folder: Path, recipe: Recipe, found: str, batch_number: int) -> str:
    """What happened, and which settings help when the same command is run again.

    Args:
      folder: the run folder.
      recipe: the run.
      found: step, loss and gradient.
      batch_number: number of the batch in the data, from 1.
    """
    text = f"{found} (batch {batch_number} of the data); stopped, nothing saved after it; "
    kept = whole_steps(folder)
    if not kept:
        text += f"{folder} has no checkpoint yet.\nStart again with"
    else:
        text += f"checkpoints in {folder}: {', '.join(map(str, kept))}.\n"
        text += f"The same command continues from step {kept[-1]}; add to it"
    rate = recipe.optim.peak_lr / 2
    text += f"\n  optim.peak_lr={rate:.1e} for a lower learning rate (or a longer warm-up)"
    # Together with the batches already skipped, which the new setting replaces.
    skip = [list(r) for r in (*recipe.data.skip_batches, (batch_number, batch_number))]
    skipped = str(skip).replace(" ", "")
    text += f"\n  data.skip_batches={skipped} to leave out batches, first to last"
    if kept[:-1]:
        text += f"\n  train.restart_from={kept[-2]} to go back to an older checkpoint"
    return text


def differences(before: dict[str, Any], now: dict[str, Any], prefix: str = "") -> Changes:
    """Settings that differ between two configs (as plain values).

    Args:
      before: nested settings.
      now: nested settings.
      prefix: of the names in the result.
    """
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
