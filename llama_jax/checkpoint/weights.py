"""Read the weights of a training run or of a converted model; training state is not needed."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp

from llama_jax.checkpoint.arrays import (
    ORBAX,
    OtherModel,
    array_shapes,
    check_item,
    open_array,
    orbax_path,
    set_up_orbax,
)  # fmt: skip
from llama_jax.checkpoint.file_hashes import find_problems, listed_files
from llama_jax.checkpoint.steps import loaded_step, step_folder, whole_steps
from llama_jax.config import ConfigError
from llama_jax.storage.errors import redacted
from llama_jax.storage.paths import as_path

CHECKED_BYTES = 1 << 30
"""Bytes whose SHA-256 is compared when weights are loaded, smallest files first; takes about a
second. Of the other files only the size is compared; `llama_jax.verify` compares all."""
VERIFY_HINT = "`python -m llama_jax.verify {}` lists all problems"


def check_weights(folder: str | Path, max_bytes: int | None = CHECKED_BYTES) -> None:
    """Compare the weights that are loaded, and the small files beside them, with their recorded
    hashes.

    Args:
      folder: a run, or converted weights.
      max_bytes: compare the contents of the smallest files, up to this many bytes in total; None:
        all contents. The sizes of all files are compared.

    Raises:
      ConfigError: names the files that are missing or have changed.
    """
    folder = as_path(folder)
    item = _loaded(folder)
    try:
        files = listed_files(folder, int(item.parent.name), "model")
        files |= listed_files(folder, whole_steps(folder)[-1], "run")  # names the best step
        problems = find_problems(folder, files, max_bytes)
    except (ValueError, OSError) as e:
        problems = [str(e)]
    if problems:
        more = f"\nand {len(problems) - 3} more" if len(problems) > 3 else ""
        hint = VERIFY_HINT.format(folder)
        raise ConfigError("\n".join(problems[:3]) + f"{more}\n{hint}")


def load_weights(folder: str | Path, abstract_params: Any, partial: bool = False) -> Any:
    """The weights of a run or converted model: of its best step, if it keeps one, else the newest.

    Args:
      folder: a run, or converted weights.
      abstract_params: tree of `jax.ShapeDtypeStruct`: shape, dtype and sharding of each array.
      partial: the tree has only some of the stored arrays.

    Raises:
      ConfigError: there is no saved step, or its arrays have other shapes.
    """
    item = _loaded(folder)
    set_up_orbax(item)
    try:
        check_item(item, array_shapes(abstract_params))
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
            return reader.restore(orbax_path(item), args=args)
        except Exception as e:  # Orbax has no narrower type for a missing or truncated file
            raise _unreadable(item, e.__cause__ or e) from e


def load_layers(folder: str | Path, name: str, shape: tuple[int, ...]) -> Iterator[np.ndarray]:
    """Yield the layers of a stacked weight as stored, while the next layer is being read; at most
    two layers (or two chunks of the file) are in memory.

    Args:
      folder: a run, or converted weights.
      name: the weight, for example "blocks/mlp/up".
      shape: its shape, [L, ...].

    Raises:
      ConfigError: there is no saved step, or the weight has another shape.
    """
    item = _loaded(folder)
    try:
        array = open_array(item, name)
        if array.shape != shape:
            raise ValueError(f"{name} is {array.shape}, not {shape}")
        chunk = array.chunk_layout.read_chunk.shape[0]
        read = lambda first: array[first : first + chunk].read()
        pending = read(0)
        for first in range(chunk, shape[0] + chunk, chunk):
            current, pending = pending, read(first) if first < shape[0] else None
            yield from current.result()
    except (ValueError, OSError) as e:
        raise _unreadable(item, e) from e


def _loaded(folder: str | Path) -> Path:
    """The item of the weights that are loaded."""
    return step_folder(as_path(folder), loaded_step(folder)) / "model"


def _unreadable(item: Path, error: BaseException) -> ConfigError:
    return ConfigError(f"the weights in {item} cannot be read: {first_line(error)}")


def first_line(error: BaseException) -> str:
    """The first line of an error's message, at most 300 characters, without credentials."""
    return redacted((str(error) or type(error).__name__).strip().splitlines()[0])[:300]
