"""Checkpoints: weights, optimizer and data position of a run, through Orbax; and the weights alone
for everyone else.

A run folder (see checkpoints/README.md) holds ``model.json`` and the tokenizer beside
``steps/STEP/``: ``model`` (the weights), ``optimizer``, ``run`` (step and data position) and
``checksums.json``. Saving is asynchronous; a step has its name only when it is whole, and what was
half-written when a process died is removed at the next start.
"""

import json
import logging
import shutil
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from llama_jax.config import ConfigError, ModelConfig, check_model, to_dict
from llama_jax.conversion.orbax_weights import ORBAX, open_array
from llama_jax.io import atomic_write

CHECKSUMS = "checksums.json"
ITEMS = ("model", "optimizer", "run")


class CheckpointError(RuntimeError):
    """A checkpoint that could not be written or read; the message says which, and what to do."""


class Checkpoints:
    """The steps of one run folder.

    Args:
      folder: the run folder.
      keep: newest steps kept.
    """

    def __init__(self, folder: str | Path, keep: int):
        # Orbax logs each of its thirty steps; errors come as exceptions, which this file words.
        logging.getLogger("absl").setLevel(logging.ERROR)
        self._steps = Path(folder).resolve() / "steps"
        self._saving: int | None = None
        self._recorder = ThreadPoolExecutor(1)
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
        try:
            self._manager.save(step, args=args)
        except Exception as e:
            raise self._failed(e) from e

    def saving(self) -> bool:
        """Whether a save is under way."""
        return self._manager.is_saving_in_progress()

    def poll(self) -> None:
        """Raise :class:`CheckpointError` if the save under way has failed; one that is done gets
        its checksums, in a thread."""
        if self._saving is None or self.saving():
            return
        self._settle()

    def wait(self) -> None:
        """Wait for the save under way; raises as :meth:`poll`."""
        self._settle()
        self._recorder.submit(int).result()

    def _settle(self) -> None:
        try:
            self._manager.wait_until_finished()
        except Exception as e:
            raise self._failed(e) from e
        if self._saving is not None and jax.process_index() == 0:
            self._recorder.submit(_write_checksums, self._steps / str(self._saving))
        self._saving = None

    def restore(
        self, abstract_params: Any, abstract_optimizer: Any
    ) -> tuple[Any, Any, dict[str, Any]]:
        """Weights, optimizer state and run record of the newest step, in the shapes and shardings
        given.

        Raises:
          CheckpointError: damaged; names the file, and the step before it if there is one.
        """
        step = self.latest()
        args = {
            name: ocp.args.PyTreeRestore(tree, ocp.checkpoint_utils.construct_restore_args(tree))
            for name, tree in (("model", abstract_params), ("optimizer", abstract_optimizer))
        }
        try:
            if jax.process_index() == 0:
                check_files(self._steps / str(step))
            out = self._manager.restore(
                step, args=ocp.args.Composite(**args, run=ocp.args.JsonRestore())
            )
        except Exception as e:
            earlier = [s for s in self._manager.all_steps() if s < step]
            advice = (
                f"step {max(earlier)} is the one before it: to go on from there, remove "
                f"{self._steps / str(step)} and start again"
                if earlier
                else f"there is none before it: remove {self._steps} to start from the beginning"
            )
            raise CheckpointError(
                f"checkpoint {self._steps / str(step)} is damaged: {_first_line(e)}\n{advice}"
            ) from e
        return out["model"], out["optimizer"], out["run"]

    def close(self) -> None:
        """Finish what is under way."""
        try:
            self.wait()
        finally:
            self._recorder.shutdown()
            self._manager.close()

    def _failed(self, error: Exception) -> CheckpointError:
        for left in self._steps.glob(f"{self._saving}.*tmp*"):
            shutil.rmtree(left, ignore_errors=True)
        steps = [int(p.name) for p in self._steps.iterdir() if p.name.isdigit()]
        good = f"the last good one is step {max(steps)}" if steps else "there is no earlier one"
        return CheckpointError(
            f"saving step {self._saving} to {self._steps} failed: {_first_line(error)}\n"
            f"{good}; make room, then start again to go on from it"
        )


def write_about(folder: Path, cfg: ModelConfig, tokenizer: Path, token_ids: dict[str, int]) -> None:
    """``model.json`` and the tokenizer, beside the steps."""
    about = {"format": 1, "rotary_layout": "half", "model": to_dict(cfg), "token_ids": token_ids}
    atomic_write(folder / "model.json", json.dumps(about, indent=1).encode())
    atomic_write(folder / "tokenizer.model", tokenizer.read_bytes())


def read_about(folder: str | Path) -> tuple[ModelConfig, dict[str, Any]]:
    """The model of a checkpoint folder, and all of ``model.json``.

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
        about = json.loads(path.read_text(encoding="utf-8"))
        readable = about["format"] == 1 and about["rotary_layout"] == "half"
    except (ValueError, KeyError, TypeError) as e:
        raise ConfigError(f"{path} is damaged: {e!r}") from None
    if not readable:
        raise ConfigError(
            f"{path}: format {about['format']}, layout {about['rotary_layout']!r}; this version "
            "reads 1, 'half'"
        )
    return check_model(about["model"], str(path)), about


def load_weights(folder: str | Path, abstract_params: Any, partial: bool = False) -> Any:
    """The newest weights of a run or converted checkpoint, as ``abstract_params`` says (shape,
    dtype, sharding): all of them, or ``partial``.

    Raises:
      ConfigError: no whole step, or weights of other shapes.
    """
    item = _newest(folder)
    logging.getLogger("absl").setLevel(logging.ERROR)
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


def _newest(folder: str | Path) -> Path:
    steps = Path(folder).resolve() / "steps"
    there = [int(p.name) for p in steps.iterdir() if p.name.isdigit()] if steps.is_dir() else []
    if not there:
        raise ConfigError(f"{folder} holds no finished step")
    return steps / str(max(there)) / "model"


def _unreadable(item: Path, error: BaseException) -> ConfigError:
    return ConfigError(f"the weights in {item} cannot be read: {_first_line(error)}")


def check_files(step: Path) -> None:
    """Compare the files of a step with ``checksums.json`` (absent if the process died right after
    the save).

    Raises:
      CheckpointError: a file is missing, or has another size or content; names it.
    """
    try:
        want = json.loads((step / CHECKSUMS).read_text())
    except FileNotFoundError:
        return
    except ValueError as e:
        raise CheckpointError(f"{step / CHECKSUMS}: {e}") from None

    def check(entry):
        name, (size, crc) = entry
        path = step / name
        if not path.is_file():
            return f"{path} is missing"
        if path.stat().st_size != size:
            return f"{path} has {path.stat().st_size} bytes, not {size}"
        return None if _crc32(path) == crc else f"{path} has changed since it was written"

    with ThreadPoolExecutor() as pool:
        problem = next(filter(None, pool.map(check, want.items())), None)
    if problem:
        raise CheckpointError(problem)


def _write_checksums(step: Path) -> None:
    files = sorted(p for item in ITEMS for p in (step / item).rglob("*") if p.is_file())
    with ThreadPoolExecutor() as pool:
        sums = {
            str(p.relative_to(step)): [p.stat().st_size, crc]
            for p, crc in zip(files, pool.map(_crc32, files), strict=True)
        }
    atomic_write(step / CHECKSUMS, json.dumps(sums).encode())


def _crc32(path: Path) -> int:
    crc = 0
    with path.open("rb") as f:
        while block := f.read(1 << 22):
            crc = zlib.crc32(block, crc)
    return crc


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).strip().splitlines()[0][:300]
