"""Save and restore the training state of a run with Orbax: weights, optimizer, data position.

A run folder (see checkpoints/README.md) holds ``model.json`` and the tokenizer beside
``steps/STEP/``: ``model`` (the weights), ``optimizer``, ``run`` (step and data position) and the
SHA-256 of these files. Saving is asynchronous. A step is renamed to its number when all its arrays
are written (in a bucket: gets an object ``commit_success.txt``); partial steps of a process that
died are removed at the next start. If the process died before it wrote the SHA-256 of a step, they
are written at the next start.
"""

import functools
import shutil
import sys
import time
import zlib
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from llama_jax.checkpoint.arrays import (
    ORBAX,
    OtherModel,
    array_shapes,
    check_item,
    manager_options,
    named_arrays,
    orbax_path,
    read_array_metadata,
    set_up_orbax,
)  # fmt: skip
from llama_jax.checkpoint.file_hashes import (
    files_below,
    find_problems,
    hash_files,
    listed_files,
    read_checksums,
    write_list,
)  # fmt: skip
from llama_jax.checkpoint.steps import BEST_STEP, best_step, whole_steps
from llama_jax.checkpoint.weights import VERIFY_HINT, first_line
from llama_jax.storage.errors import StorageError, reason
from llama_jax.storage.paths import ObjectPath, as_path, check_access


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written or read; the message names it and says what to do."""


class Checkpoints:
    """The steps of one run folder.

    Args:
      folder: the run folder.
      keep: number of newest steps to keep.

    Example::

      checkpoints = Checkpoints("checkpoints/tiny", keep=2)
      checkpoints.save(100, params, optimizer, {"step": 100, "data": data.state()})
      params, optimizer, run = checkpoints.restore(abstract_params, abstract_optimizer)
      checkpoints.close()
    """

    def __init__(self, folder: str | Path, keep: int):
        # After a failed save, tensorstore reports to an event loop that Orbax has closed.
        self._hook_before, sys.unraisablehook = sys.unraisablehook, self._without_closed_loops
        self._steps = as_path(folder).resolve() / "steps"
        set_up_orbax(self._steps)
        self._saving: int | None = None
        self._recorder = ThreadPoolExecutor(1)
        self._recording: Future[None] | None = None
        self._best = best_step(self._steps.parent)
        tree = lambda: ocp.PyTreeCheckpointHandler(**ORBAX)
        self._manager = ocp.CheckpointManager(
            orbax_path(self._steps),
            item_handlers={
                "model": tree(),
                "optimizer": tree(),
                "run": ocp.JsonCheckpointHandler(),
            },
            options=ocp.CheckpointManagerOptions(
                preservation_policy=_NewestAndBest(keep, lambda: self._best),
                cleanup_tmp_directories=True,
                **manager_options(self._steps),
            ),
        )

    def latest(self) -> int | None:
        """Newest saved step, or None."""
        return self._manager.latest_step()

    def save(self, step: int, params: Any, optimizer: Any, run: dict[str, Any]) -> None:
        """Start saving; returns when the arrays are copied, and writes them during training.

        Args:
          step: number of updates so far.
          params: weights, a tree of arrays.
          optimizer: optimizer state, a tree of arrays.
          run: other state, plain JSON values. A "best_step" is kept beside the newest steps, and
            is the one that is loaded.

        Raises:
          CheckpointError: this save or the previous one failed.
        """
        self.wait()
        self._saving, self._best = step, run.get(BEST_STEP)
        args = ocp.args.Composite(
            model=ocp.args.PyTreeSave(params),
            optimizer=ocp.args.PyTreeSave(optimizer),
            run=ocp.args.JsonSave(run),
        )
        owner = _owners(self._steps / str(step), {"model": params, "optimizer": optimizer})
        try:
            # TensorStore 0.1.86 never gives up to write to an S3 bucket that has disappeared.
            check_access(self._steps)
            self._manager.save(step, args=args)
        except Exception as e:
            raise self._failed(e) from e
        self._recording = self._recorder.submit(self._record, step, owner)

    def _record(self, step: int, owner: Callable[[str], int]) -> None:
        """Write the checksums of a step when it is saved; runs in a thread of every process.

        The files are read again, because Orbax frees its copy of the arrays while writing, and
        hashing that copy first would delay training. Each file is read by a process that wrote it
        (or holds the same values), so it comes from the page cache of that host.
        """
        while self.saving():
            time.sleep(0.02)
        if step in whole_steps(self._steps.parent):  # otherwise `wait` reports that saving failed
            _write_checksums(self._steps / str(step), owner)

    def saving(self) -> bool:
        """Whether a save is in progress."""
        return self._manager.is_saving_in_progress()

    def poll(self) -> None:
        """Raise :class:`CheckpointError` if the last save or writing its checksums failed."""
        if self._recording is not None and self._recording.done():
            self.wait()

    def wait(self) -> None:
        """Wait for the save in progress and its checksums; raises like :meth:`poll`."""
        try:
            self._manager.wait_until_finished()
        except Exception as e:
            raise self._failed(e) from e
        recording, self._recording = self._recording, None
        step, self._saving = self._saving, None
        try:
            if recording is not None:
                recording.result()
        except (OSError, ValueError) as e:
            raise CheckpointError(
                f"step {step} was saved to {self._steps}, but its checksums could not be written: "
                f"{first_line(e)}\nstart the run again to write them and continue from this step"
            ) from e

    def restore(
        self, abstract_params: Any, abstract_optimizer: Any
    ) -> tuple[Any, Any, dict[str, Any]]:
        """Weights, optimizer state and run record of the newest step, in the given shapes and
        shardings.

        Every file is compared with its SHA-256; each process reads its share. Checksums are written
        for a step without them (the process died before it wrote them).

        Raises:
          CheckpointError: a file is damaged (names it, and the previous step if there is one), or
            the step is not readable, belongs to another model, or does not fit in memory.
        """
        step = self.latest()
        assert step is not None
        folder = self._steps / str(step)
        trees = {"model": abstract_params, "optimizer": abstract_optimizer}
        owner = _owners(folder, trees)
        if problem := _of_all_processes(self._problem_of(step, trees, owner)):
            raise CheckpointError(problem)
        args = {
            name: ocp.args.PyTreeRestore(tree, ocp.checkpoint_utils.construct_restore_args(tree))
            for name, tree in trees.items()
        }
        try:
            out = self._manager.restore(
                step, args=ocp.args.Composite(**args, run=ocp.args.JsonRestore())
            )
        except Exception as e:
            raise CheckpointError(self._unreadable(step, e)) from e
        try:
            if read_checksums(folder) is None:
                _write_checksums(folder, owner)
        except OSError as e:
            raise CheckpointError(f"the checksums of {folder} cannot be written: {e}") from e
        return out["model"], out["optimizer"], out["run"]

    def _problem_of(self, step: int, trees: dict[str, Any], owner: Callable[[str], int]) -> str:
        """Check a step before Orbax reads it; "" if no problem is found."""
        root, prefix = self._steps.parent, f"steps/{step}/"
        try:
            files = listed_files(root, step)
            mine = {
                name: entry
                for name, entry in files.items()
                if owner(name.removeprefix(prefix)) == jax.process_index()
            }
            if problems := find_problems(root, mine):
                return self._damaged(step, problems[0])
            for item, tree in trees.items():
                check_item(self._steps / str(step) / item, array_shapes(tree))
        except OtherModel as e:
            return f"{e}; use the recipe that the checkpoint was made with"
        except OSError as e:
            return self._unreadable(step, e)
        except ValueError as e:
            return self._damaged(step, str(e))
        return ""

    def _unreadable(self, step: int, error: BaseException) -> str:
        """The message of a failed restore; only the errors in :data:`_DAMAGE` mean damage."""
        text = f"{type(error).__name__}: {error} {error.__cause__ or ''}"
        folder = self._steps / str(step)
        if any(sign in text for sign in _DAMAGE):
            return self._damaged(step, first_line(error.__cause__ or error))
        if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in text:
            return (
                f"out of memory while reading checkpoint {folder}: {first_line(error)}\n"
                "the checkpoint is not damaged; use more devices, or a mesh with more shards"
            )
        return (
            f"checkpoint {folder} cannot be read: {first_line(error.__cause__ or error)}\n"
            "no damage was found in it"
        )

    def _damaged(self, step: int, what: str) -> str:
        folder = self._steps / str(step)
        earlier = [s for s in self._manager.all_steps() if s < step]
        advice = (
            f"to continue from the previous step, {max(earlier)}, remove {folder} and start again"
            if earlier
            else f"there is no earlier step: remove {self._steps} to start from the beginning"
        )
        if f"{folder}/" not in what:  # a file outside the steps
            advice = "restore the original file; " + VERIFY_HINT.format(self._steps.parent)
        return f"checkpoint {folder} is damaged: {what}\n{advice}"

    def close(self) -> None:
        """Wait for the save in progress and stop the threads."""
        try:
            self.wait()
        finally:
            self._recorder.shutdown()
            self._manager.close()
            sys.unraisablehook = self._hook_before

    def _without_closed_loops(self, unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            self._hook_before(unraisable)

    def _failed(self, error: Exception) -> CheckpointError:
        step, self._saving, self._recording = self._saving, None, None
        if isinstance(self._steps, ObjectPath):  # the next start removes what was written
            scheme, separator, action = self._steps.scheme, "; ", "start again"
            text = reason(error, scheme)
            if isinstance(error, StorageError):
                text = str(error).removeprefix(f"{self._steps}: ")
        else:
            separator, action = "\n", "free some disk space, then start again"
            text = first_line(error)
            self._remove_partial(step)
        try:
            steps = whole_steps(self._steps.parent)
        except OSError:  # what the bucket holds is not known
            advice = f"{action} to continue from the newest complete step"
        else:
            advice = f"there is no earlier step; {action}"
            if steps:
                advice = f"the newest good step is {max(steps)}; {action} to continue from it"
        return CheckpointError(
            f"saving step {step} to {self._steps} failed: {text}{separator}{advice}"
        )

    def _remove_partial(self, step: int | None) -> None:
        end = time.monotonic() + 2  # other threads of the save may still create files
        while (left := list(self._steps.glob(f"{step}.*tmp*"))) and time.monotonic() < end:
            for folder in left:
                shutil.rmtree(folder, ignore_errors=True)
            time.sleep(0.02)


class _NewestAndBest:
    """Which checkpoints Orbax keeps: the newest ones, and the best."""

    def __init__(self, keep: int, best: Callable[[], int | None]):
        self._keep, self._best = keep, best

    def should_preserve(self, checkpoints: Any, *, context: Any) -> list[bool]:
        newest = len(checkpoints) - self._keep
        return [i >= newest or c.step == self._best() for i, c in enumerate(checkpoints)]


_DAMAGE = ("NOT_FOUND", "DATA_LOSS", "FAILED_PRECONDITION", "FileNotFoundError", "JSONDecodeError")
"""in the errors of tensorstore and Orbax about missing, truncated or changed files"""


def _owners(step: Path, trees: dict[str, Any]) -> Callable[[str], int]:
    """A function from the name of a file of a step to the process that hashes it: one whose devices
    hold the values of the chunk; process 0 for small files. It is the same in every process."""
    if jax.process_count() == 1:
        return lambda name: 0
    holders: dict[str, tuple[tuple[int, ...], dict[tuple[int, ...], list[int]]]] = {}
    for item, tree in trees.items():
        for name, x in named_arrays(tree):
            if getattr(x, "sharding", None) is None:
                continue
            places: dict[tuple[int, ...], set[int]] = {}
            for device, index in x.sharding.devices_indices_map(x.shape).items():
                start = tuple(s.start or 0 for s in index)
                places.setdefault(start, set()).add(device.process_index)
            ordered = {start: sorted(processes) for start, processes in places.items()}
            holders[f"{item}/{name}"] = x.sharding.shard_shape(x.shape), ordered

    metadata = functools.cache(read_array_metadata)

    def owner(name: str) -> int:
        array, _, at = name.partition("/c/")  # ITEM/ARRAY/c/I/J: the chunk at I, J
        stored = metadata(step / array) if at and array in holders else None
        if stored is None:
            return 0
        shard, places = holders[array]
        first = [int(i) * n for i, n in zip(at.split("/"), stored[1], strict=True)]
        start = tuple(i // n * n for i, n in zip(first, shard, strict=True))
        processes = places[start]
        return processes[zlib.crc32(name.encode()) % len(processes)]

    return owner


def _write_checksums(step: Path, owner: Callable[[str], int]) -> None:
    """Write the checksums of the files that this process owns."""
    index, count = jax.process_index(), jax.process_count()
    names = [name for name in files_below(step) if not name.startswith("checksums.")]
    mine = [name for name in names if owner(name) == index]
    tree = {"format": 1, "files": hash_files(step, mine)}
    write_list(step / f"checksums.{index}-of-{count}.json", tree)


def _of_all_processes(problem: str) -> str:
    """The first problem of any process, sent to all processes, so that all stop."""
    if jax.process_count() == 1:
        return problem
    from jax.experimental import multihost_utils

    line = np.zeros(2000, np.uint8)
    content = problem.encode()[:2000]
    line[: len(content)] = np.frombuffer(content, np.uint8)
    for other in np.asarray(multihost_utils.process_allgather(line)):
        if other.any():
            return other.tobytes().rstrip(b"\0").decode(errors="replace")
    return ""
