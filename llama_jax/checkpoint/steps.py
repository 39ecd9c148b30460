"""The saved steps of a run folder, and which of them is loaded."""

from pathlib import Path

from llama_jax.config import ConfigError
from llama_jax.io import read_json_or_empty
from llama_jax.storage.paths import COMMIT_FILE, as_path, in_parallel, is_remote

BEST_STEP = "best_step"
"""key of a run's record: the step with the best validation loss, if the run keeps it"""


def whole_steps(folder: Path) -> list[int]:
    """Steps saved in a run folder, ascending.

    Orbax renames a step to its number when it is complete; in a bucket, where nothing can be
    renamed at once, it writes a last object.
    """
    steps = folder / "steps"
    found = [p for p in steps.iterdir() if p.name.isdigit()] if steps.is_dir() else []
    if is_remote(steps):
        complete = in_parallel(lambda p: (p / COMMIT_FILE).exists(), found)
        found = [p for p, is_complete in zip(found, complete, strict=True) if is_complete]
    return sorted(int(p.name) for p in found)


def best_step(folder: Path) -> int | None:
    """The step that a run keeps because it has the best validation loss; None if there is none.

    The record of the newest step names it.
    """
    steps = whole_steps(folder)
    record = read_json_or_empty(step_folder(folder, steps[-1]) / "run/metadata") if steps else {}
    best = record.get(BEST_STEP)
    return best if best in steps else None


def loaded_step(folder: str | Path) -> int:
    """The step whose weights are loaded: the best of a run that keeps it, else the newest.

    Raises:
      ConfigError: there is no saved step.
    """
    folder = as_path(folder)
    steps = whole_steps(folder)
    if not steps:
        raise ConfigError(f"{folder} holds no finished step")
    best = best_step(folder)
    return steps[-1] if best is None else best


def loaded_step_note(folder: str | Path) -> str:
    """A line that says which step is loaded, if it is not the newest; else ""."""
    step, newest = loaded_step(folder), whole_steps(as_path(folder))[-1]
    if step == newest:
        return ""
    return f"{folder}: step {step}, which has the best validation loss; the newest is {newest}"


def step_folder(folder: Path, step: int) -> Path:
    """The folder of a step."""
    return folder.resolve() / "steps" / str(step)
