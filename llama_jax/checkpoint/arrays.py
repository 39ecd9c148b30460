"""The stored arrays of an Orbax item: options for writing, checks before reading, opening."""

import logging
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llama_jax.io import read_json
from llama_jax.storage.kvstore import kvstore
from llama_jax.storage.paths import ObjectPath, filesystem

# One folder of uncompressed chunks per array, written and read in any order. Orbax saving 0.5 GB of
# float32 on 2 cores, two rounds: 1.5-1.7 GB/s to write, 0.5-0.6 to read, against 0.2-0.4 and
# 0.2-0.3 with OCDBT and zstd, which save 8 % of the space.
ORBAX = dict(use_ocdbt=False, use_zarr3=True, use_compression=False)

# By default tensorstore reads a missing chunk as zeros and does not write a chunk of zeros. Orbax
# itself writes and expects every chunk.
EVERY_CHUNK = dict(fill_missing_data_reads=False, store_data_equal_to_fill_value=True)

_METADATA_BYTES = 1 << 20


class OtherModel(ValueError):
    """Stored arrays whose shapes differ from those of the model."""


def set_up_orbax(path: Path) -> None:
    """Silence the log of Orbax, which prints thirty lines per save and a traceback per thread for
    each error; its errors are also exceptions, which this package reports in one line. For a path
    in a bucket, prepare its file system."""
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    if isinstance(path, ObjectPath):
        filesystem(path.scheme)
        if path.scheme == "s3":
            _teach_orbax_s3()


def orbax_path(path: Path) -> Any:
    """The path as Orbax takes it."""
    return str(path) if isinstance(path, ObjectPath) else path


def manager_options(path: Path) -> dict[str, Any]:
    """Options of Orbax's manager for steps at ``path``. Orbax itself knows that a gs:// folder
    cannot be renamed at once, but not an s3:// folder."""
    if not isinstance(path, ObjectPath) or path.scheme != "s3":
        return {}
    from orbax.checkpoint._src.path.atomicity import CommitFileTemporaryPath

    return {"temporary_path_class": CommitFileTemporaryPath}


def _teach_orbax_s3() -> None:
    """Let Orbax's arrays use TensorStore's driver for S3: Orbax 0.12.8 chooses it for no path, and
    would write to a local folder named "s3:"."""
    from orbax.checkpoint._src.serialization import tensorstore_utils

    original: Any = tensorstore_utils._build_non_ocdbt_kvstore_tspec
    if original.__module__ == __name__:  # already done
        return

    def build(directory: str, name: str | None = None) -> Any:
        if not directory.startswith("s3://"):
            return original(directory, name)
        parts = tuple(f"{directory.removeprefix('s3://')}/{name or ''}".rstrip("/").split("/"))
        return kvstore(ObjectPath("s3", parts))  # type: ignore[arg-type]

    tensorstore_utils._build_non_ocdbt_kvstore_tspec = build


def named_arrays(tree: Any) -> Iterator[tuple[str, Any]]:
    """Leaves of a tree with the names of their arrays in Orbax, for example "blocks.mlp.up"."""
    import jax  # here, because conversion between torch formats does not need it

    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        yield jax.tree_util.keystr(path, simple=True, separator="."), leaf


def array_shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    """Shape of each array of a tree, by its name in Orbax."""
    return {name: tuple(x.shape) for name, x in named_arrays(tree)}


def open_array(item: Path, path: str) -> Any:
    """The tensorstore array of one parameter, in any format that Orbax writes.

    Args:
      item: folder of the Orbax item, for example ``steps/100/model``.
      path: the parameter, for example ``blocks/mlp/up``.

    Raises:
      ValueError: the array is missing or damaged. Reading a missing chunk later raises too.
    """
    import tensorstore as ts

    name = path.replace("/", ".")
    read_array_metadata(item / name)
    base = kvstore(item)
    if (item / "manifest.ocdbt").exists():
        spec: dict[str, Any] = {"driver": "ocdbt", "base": base, "path": name + "/"}
        drivers = ["zarr3", "zarr"]
    else:
        spec = base | {"path": f"{base['path']}/{name}/"}
        if spec["driver"] == "file":
            spec["file_io_sync"] = False
        drivers = ["zarr3"] if (item / name / "zarr.json").exists() else ["zarr"]
    error = None
    for driver in drivers:
        try:
            return ts.open({"driver": driver, "kvstore": spec} | EVERY_CHUNK, open=True).result()
        except ValueError as e:
            error = e
    raise ValueError(f"{item} holds no readable array {name}: {error}")


def read_array_metadata(array: Path) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """Shape and chunk shape of a stored array, from its metadata file; None without such a file
    (OCDBT, or no array).

    The sizes are checked because tensorstore allocates a chunk of any size that the file states.

    Raises:
      ValueError: the metadata file is damaged.
    """
    path = next((p for n in ("zarr.json", ".zarray") if (p := array / n).exists()), None)
    if path is None:
        return None
    tree = read_json(path, _METADATA_BYTES)
    try:
        shape = tree["shape"]
        new = path.name == "zarr.json"
        chunk = tree["chunk_grid"]["configuration"]["chunk_shape"] if new else tree["chunks"]
        ok = len(shape) == len(chunk) and all(
            type(n) is type(c) is int and n >= 0 and 1 <= c <= max(n, 1)
            for n, c in zip(shape, chunk, strict=True)
        )
    except (KeyError, TypeError):
        ok = False
    if not ok:
        raise ValueError(f"{path} is damaged: its shape and chunks do not describe an array")
    return tuple(shape), tuple(chunk)


def check_item(item: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """Check an Orbax item before tensorstore opens it: regular files inside the folder, metadata of
    plausible sizes, and the shape of each array.

    Args:
      item: folder of the Orbax item, for example ``steps/100/model``.
      shapes: expected shape of each array, by its name in Orbax ("blocks.mlp.up").

    Raises:
      OtherModel: an array has another shape.
      ValueError: a file is damaged; names it and the reason.
    """
    if not isinstance(item, ObjectPath):
        _check_regular_files(item)
    if (item / "_METADATA").exists():
        read_json(item / "_METADATA")
    for name, shape in shapes.items():
        stored = read_array_metadata(item / name)
        if stored is not None and stored[0] != tuple(shape):
            raise OtherModel(
                f"{item} holds another model: {name} is {list(stored[0])}, not {list(shape)}"
            )


def _check_regular_files(item: Path) -> None:
    """Raise a ValueError for a device, a pipe, or a link out of the folder."""
    root = os.path.realpath(item)
    for folder, folders, files in os.walk(item):
        for name in folders + files:
            path = os.path.join(folder, name)
            mode = os.lstat(path).st_mode
            if stat.S_ISLNK(mode):
                if not os.path.realpath(path).startswith(root + os.sep):
                    raise ValueError(f"{path} is a link out of {item}")
                mode = os.stat(path).st_mode
            if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                raise ValueError(f"{path} is not a regular file")
