"""Checkpoints: weights, optimizer and data position of a run, through Orbax; and the weights alone
for everyone else.

A run folder (see checkpoints/README.md) holds ``model.json`` and the tokenizer beside
``steps/STEP/``: ``model`` (the weights), ``optimizer``, ``run`` (step and data position) and the
list of these files with their SHA-256. Saving is asynchronous; a step has its name only when it is
whole, and what was half-written when a process died is removed at the next start. A step whose list
was not finished when the process died is whole; it gets its list at the next start.
"""

import functools
import json
import logging
import shutil
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from llama_jax.checkpoint.file_hashes import (
    files_below,
    find_problems,
    hash_files,
    listed_files,
    read_checksums,
    record_files,
    write_list,
)  # fmt: skip
from llama_jax.config import ConfigError, ModelConfig, check_model, to_dict
from llama_jax.convert.orbax import (
    ORBAX,
    OtherModel,
    check_item,
    open_array,
    read_array_metadata,
)  # fmt: skip
from llama_jax.io import atomic_write, read_json

CHECKED_BYTES = 1 << 30
"""Contents compared when weights are loaded: the smallest files, this many bytes in all. SHA-256
takes about a second for it; larger files are compared by size, and by `llama_jax.verify`."""
_ADVICE = "`python -m llama_jax.verify {}` lists everything that is wrong"


class CheckpointError(RuntimeError):
    """A checkpoint that could not be written or read; the message says which, and what to do."""


class Checkpoints:
    """The steps of one run folder.

    Args:
      folder: the run folder.
      keep: newest steps kept.
    """

    def __init__(self, folder: str | Path, keep: int):
        _quiet_orbax()
        # After a failed save, tensorstore reports to an event loop that Orbax has closed.
        self._hook_before, sys.unraisablehook = sys.unraisablehook, self._without_closed_loops
        self._steps = Path(folder).resolve() / "steps"
        self._saving: int | None = None
        self._recorder = ThreadPoolExecutor(1)
        self._recording: Future[None] | None = None
        tree = lambda: ocp.PyTreeCheckpointHandler(**ORBAX)
        self._manager = ocp.CheckpointManager(
            self._steps,
            item_handlers={
                "model": tree(),
                "optimizer": tree(),
                "run": ocp.JsonCheckpointHandler(),
            },
            options=ocp.CheckpointManagerOptions(
                max_to_keep=keep,
                cleanup_tmp_directories=True,
            ),
        )

    def latest(self) -> int | None:
        """Newest whole step, or None."""
        return self._manager.latest_step()

    def save(self, step: int, params: Any, optimizer: Any, run: dict[str, Any]) -> None:
        """Start saving; returns when the arrays are copied, and writes on while training goes on.

        Raises:
          CheckpointError: this or the save before it failed.
        """
        self.wait()
        self._saving = step
        args = ocp.args.Composite(
            model=ocp.args.PyTreeSave(params),
            optimizer=ocp.args.PyTreeSave(optimizer),
            run=ocp.args.JsonSave(run),
        )
        owner = _owners(self._steps / str(step), {"model": params, "optimizer": optimizer})
        try:
            self._manager.save(step, args=args)
        except Exception as e:
            raise self._failed(e) from e
        self._recording = self._recorder.submit(self._record, step, owner)

    def _record(self, step: int, owner: Callable[[str], int]) -> None:
        """As soon as a save is whole, write its list; in a thread of every process.

        The files are read again: Orbax gives its copy of the arrays away as it writes them, and
        hashing that copy first would hold up training. They are read by a process that wrote them
        (or holds the same values), so that they come from its page cache.
        """
        while self.saving():
            time.sleep(0.02)
        if (self._steps / str(step)).is_dir():  # otherwise the save failed, which `wait` reports
            _write_checksums(self._steps / str(step), owner)

    def saving(self) -> bool:
        """Whether a save is under way."""
        return self._manager.is_saving_in_progress()

    def poll(self) -> None:
        """Raise :class:`CheckpointError` if the last save, or writing its checksums, has failed."""
        if self._recording is not None and self._recording.done():
            self.wait()

    def wait(self) -> None:
        """Wait for the save under way and its checksums; raises as :meth:`poll`."""
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
                f"{_first_line(e)}\nstart again to go on from it; they are written then"
            ) from e

    def restore(
        self, abstract_params: Any, abstract_optimizer: Any
    ) -> tuple[Any, Any, dict[str, Any]]:
        """Weights, optimizer state and run record of the newest step, in the shapes and shardings
        given.

        Every file is compared with its SHA-256, each process reading its share. A step that has no
        checksums, because the process ended before they were written, gets them here.

        Raises:
          CheckpointError: damaged: names the file, and the step before it if there is one; or not
            readable, of another model, or too large for the memory.
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
        """What is wrong with a step, before Orbax reads it; "" if nothing is found."""
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
                check_item(self._steps / str(step) / item, _shapes(tree))
        except OtherModel as e:
            return f"{e}; give the recipe that it was made with"
        except OSError as e:
            return self._unreadable(step, e)
        except ValueError as e:
            return self._damaged(step, str(e))
        return ""

    def _unreadable(self, step: int, error: BaseException) -> str:
        """Only what says that the files are wrong is called damage."""
        text = f"{type(error).__name__}: {error} {error.__cause__ or ''}"
        folder = self._steps / str(step)
        if any(sign in text for sign in _DAMAGE):
            return self._damaged(step, _first_line(error.__cause__ or error))
        if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in text:
            return (
                f"out of memory while reading checkpoint {folder}: {_first_line(error)}\n"
                "the checkpoint is not damaged; take more devices, or a mesh that splits more"
            )
        return (
            f"checkpoint {folder} cannot be read: {_first_line(error.__cause__ or error)}\n"
            "no damage was found in it"
        )

    def _damaged(self, step: int, what: str) -> str:
        folder = self._steps / str(step)
        earlier = [s for s in self._manager.all_steps() if s < step]
        advice = (
            f"step {max(earlier)} is the one before it: to go on from there, remove {folder} and "
            "start again"
            if earlier
            else f"there is none before it: remove {self._steps} to start from the beginning"
        )
        if f"{folder}/" not in what:  # a file beside the steps
            advice = "put the file back as it was; " + _ADVICE.format(self._steps.parent)
        return f"checkpoint {folder} is damaged: {what}\n{advice}"

    def close(self) -> None:
        """Finish what is under way."""
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
        end = time.monotonic() + 2  # other threads of the save may still be making files
        while (left := list(self._steps.glob(f"{step}.*tmp*"))) and time.monotonic() < end:
            for folder in left:
                shutil.rmtree(folder, ignore_errors=True)
            time.sleep(0.02)
        steps = whole_steps(self._steps.parent)
        good = f"the last good one is step {max(steps)}" if steps else "there is no earlier one"
        return CheckpointError(
            f"saving step {step} to {self._steps} failed: {_first_line(error)}\n"
            f"{good}; make room, then start again to go on from it"
        )


_DAMAGE = ("NOT_FOUND", "DATA_LOSS", "FAILED_PRECONDITION", "FileNotFoundError", "JSONDecodeError")
"""what tensorstore and Orbax say of files that are missing, cut off or changed"""


def _quiet_orbax() -> None:
    # Orbax logs each of its thirty steps, and each error with a traceback in every thread that sees
    # it. Errors also come as exceptions, which this file words.
    logging.getLogger("absl").setLevel(logging.CRITICAL)


def _named(tree: Any) -> Iterator[tuple[str, Any]]:
    """Leaves of a tree by the names that Orbax gives their arrays: "blocks.mlp.up"."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        yield jax.tree_util.keystr(path, simple=True, separator="."), leaf


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    return {name: tuple(x.shape) for name, x in _named(tree)}


def _owners(step: Path, trees: dict[str, Any]) -> Callable[[str], int]:
    """The process that hashes a file of a step: one whose devices hold the values of the chunk;
    process 0 for small files. Every process computes the same answer."""
    if jax.process_count() == 1:
        return lambda name: 0
    holders: dict[str, tuple[tuple[int, ...], dict[tuple[int, ...], list[int]]]] = {}
    for item, tree in trees.items():
        for name, x in _named(tree):
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
        array, _, at = name.partition("/c/")  # MODEL/ARRAY/c/I/J: the chunk at I, J
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
    """This process's part of the list of a step; the parts of all processes make the list."""
    index, count = jax.process_index(), jax.process_count()
    names = [name for name in files_below(step) if not name.startswith("checksums.")]
    mine = [name for name in names if owner(name) == index]
    tree = {"format": 1, "files": hash_files(step, mine)}
    write_list(step / f"checksums.{index}-of-{count}.json", tree)


def _of_all_processes(problem: str) -> str:
    """The first problem that any process has, known to all, so that all stop."""
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


def write_about(folder: Path, cfg: ModelConfig, tokenizer: Path, token_ids: dict[str, int]) -> None:
    """``model.json`` and the tokenizer, beside the steps, and their hashes in ``manifest.json``."""
    about = {"format": 1, "rotary_layout": "half", "model": to_dict(cfg), "token_ids": token_ids}
    atomic_write(folder / "model.json", json.dumps(about, indent=1).encode())
    atomic_write(folder / "tokenizer.model", tokenizer.read_bytes())
    record_files(folder, "model.json", "tokenizer.model")


def read_about(folder: str | Path) -> tuple[ModelConfig, dict[str, Any]]:
    """The model of a checkpoint folder, and all of ``model.json``; `token_ids` is an object.

    Raises:
      ConfigError: no such folder or file, or one that this version does not read.
    """
    path = Path(folder) / "model.json"
    if not path.is_file():
        raise ConfigError(
            f"{folder} is not a checkpoint of llama_jax (no model.json); "
            "make one with `python -m llama_jax.train` or `python -m llama_jax.convert SOURCE "
            "DESTINATION`"
        )
    try:
        about = read_json(path)
        if about["format"] != 1 or about["rotary_layout"] != "half":
            raise ConfigError(
                f"{path}: format {about['format']!r}, layout {about['rotary_layout']!r}; this "
                "version reads 1, 'half'"
            )
        cfg = check_model(about["model"], str(path))
    except KeyError as e:
        raise ConfigError(f"{path} is damaged: it has no {e}") from None
    except ConfigError:
        raise
    except ValueError as e:
        raise ConfigError(str(e)) from None
    if about.get("quantize") not in (None, "int8", "int4"):
        raise ConfigError(f"{path}: quantize={about['quantize']!r}: there are 'int8' and 'int4'")
    ids = about.setdefault("token_ids", {})
    if not isinstance(ids, dict):
        raise ConfigError(f"{path}: token_ids must be an object, not {ids!r:.60}")
    return cfg, about


def check_weights(folder: str | Path, max_bytes: int | None = CHECKED_BYTES) -> None:
    """Compare what is read of a run or of converted weights with its list: the newest weights and
    the small files; every file by its size, contents up to ``max_bytes`` (None: all).

    Raises:
      ConfigError: names the files that are missing or have changed.
    """
    folder = Path(folder)
    item = _newest(folder)
    try:
        files = listed_files(folder, int(item.parent.name), "model")
        problems = find_problems(folder, files, max_bytes)
    except (ValueError, OSError) as e:
        problems = [str(e)]
    if problems:
        more = f"\nand {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ConfigError("\n".join(problems[:3]) + f"{more}\n" + _ADVICE.format(folder))


def load_weights(folder: str | Path, abstract_params: Any, partial: bool = False) -> Any:
    """The newest weights of a run or converted checkpoint, as ``abstract_params`` says (shape,
    dtype, sharding): all of them, or ``partial``.

    Raises:
      ConfigError: no whole step, or weights of other shapes.
    """
    item = _newest(folder)
    _quiet_orbax()
    try:
        check_item(item, _shapes(abstract_params))
    except OtherModel as e:
        raise ConfigError(str(e)) from None
    except (ValueError, OSError) as e:
        raise _unreadable(item, e) from None
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(**ORBAX)) as reader:
        args = ocp.args.PyTreeRestore(
            abstract_params,
            ocp.checkpoint_utils.construct_restore_args(abstract_params),
            partial_restore=partial,
        )
        try:
            return reader.restore(item, args=args)
        except Exception as e:  # Orbax raises no other for a file that is missing or cut off
            raise _unreadable(item, e.__cause__ or e) from e


def load_layers(folder: str | Path, name: str, shape: tuple[int, ...]) -> Iterator[np.ndarray]:
    """One layer after the other of a stacked weight, say "blocks/mlp/up" of ``shape`` [L, ...], as
    it is stored; the next is read meanwhile, and no more is held (or two chunks of the file).

    Raises:
      ConfigError: no whole step, or a weight of another shape.
    """
    item = _newest(folder)
    try:
        array = open_array(item, name)
        if array.shape != shape:
            raise ValueError(f"{name} is {array.shape}, not {shape}")
        at_once = array.chunk_layout.read_chunk.shape[0]
        read = lambda first: array[first : first + at_once].read()
        coming = read(0)
        for first in range(at_once, shape[0] + at_once, at_once):
            here, coming = coming, read(first) if first < shape[0] else None
            yield from here.result()
    except (ValueError, OSError) as e:
        raise _unreadable(item, e) from e


def whole_steps(folder: Path) -> list[int]:
    """Steps of the checkpoints in a run folder, ascending."""
    steps = folder / "steps"
    return (
        sorted(int(p.name) for p in steps.iterdir() if p.name.isdigit()) if steps.is_dir() else []
    )


def _newest(folder: str | Path) -> Path:
    steps = whole_steps(Path(folder))
    if not steps:
        raise ConfigError(f"{folder} holds no finished step")
    return Path(folder).resolve() / "steps" / str(steps[-1]) / "model"


def _unreadable(item: Path, error: BaseException) -> ConfigError:
    return ConfigError(f"the weights in {item} cannot be read: {_first_line(error)}")


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).strip().splitlines()[0][:300]
