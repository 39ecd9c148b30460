"""The conversion of a LoRA adapter between our format and PEFT's."""

import contextlib
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from llama_jax.convert import adapters, copy, peft
from llama_jax.convert.adapters import Adapter
from llama_jax.convert.formats import ConvertError
from llama_jax.convert.sources import SourceCheckpoint


def is_adapter(path: Path) -> bool:
    """Whether a folder holds an adapter, in our format or in PEFT's."""
    return peft.is_peft(path) or adapters.is_adapter(path)


def check_options(source: Path, to: Any, merge: bool, options: dict[str, Any]) -> None:
    """Raise :class:`ConvertError` for options that do not fit together.

    Args:
      source: the adapter.
      to: format to write, or None.
      merge: whether it is merged into its base.
      options: those of the weights that are written, by name.
    """
    if not source.exists():
        raise ConvertError(f"{source} does not exist")
    if not is_adapter(source):
        raise ConvertError(
            f"{source} is not a LoRA adapter (adapter_config.json, or model.json that says so); "
            "--base, --merge and --to peft are for adapters"
        )
    if merge and to == "peft":
        raise ConvertError("--merge makes a whole model, which --to peft cannot hold")
    if not merge and to not in (None, "orbax", "peft"):
        raise ConvertError(
            f"--to {to} is for whole models, and {source} is an adapter: add --merge to write its "
            "base with the adapter added, or use --to peft"
        )
    given = [f"--{name}" for name, value in options.items() if value not in (None, "keep")]
    if given and not merge:
        raise ConvertError(f"{', '.join(given)}: an adapter stays float32; add --merge")


def base_folder(source: Path, base: str | Path | None, merge: bool) -> Path | None:
    """The base that the conversion reads: the given one, or the one that our adapter records; None
    if it needs none.

    Raises:
      ConvertError: none is given or it does not exist.
    """
    if peft.is_peft(source):
        if base is None:
            raise ConvertError(
                f"give --base BASE, the weights that {source} was trained on (its {peft.CONFIG} "
                f"names {peft.named_base(source)})"
            )
        return Path(base)
    place = Path(base if base is not None else adapters.recorded_base(source)["path"])
    if not merge:  # base_model_name_or_path may be a name on a hub
        return place if base is not None and place.is_dir() else None
    if not place.exists():
        raise ConvertError(
            f"the base of {source}, {place}, does not exist; give --base BASE, the weights that it "
            "was trained on"
        )
    return place


def open_adapter(source: Path, base: SourceCheckpoint | None, max_memory: int = 2 << 30) -> Adapter:
    """Read an adapter in either format.

    Args:
      source: its folder.
      base: what it was trained on; PEFT's format needs it.
      max_memory: limit for its arrays, in bytes.

    Raises:
      ConvertError: it cannot be used, or belongs to another base; lists every reason.
    """
    if peft.is_peft(source):
        assert base is not None
        return peft.open_peft(source, base, max_memory)
    adapter = adapters.open_adapter(source, max_memory)
    if base is not None:
        adapters.check_base(adapter, base)
    return adapter


def write(
    adapter: Adapter,
    destination: Path,
    to: Any,
    base_name: str | None,
    base: SourceCheckpoint | None,
    verify: bool,
    max_memory: int,
    log: Callable[[str], None] | None,
) -> None:
    """Write an adapter in the other format than its own.

    Args:
      adapter: the adapter.
      destination: folder to create.
      to: "orbax" or "peft"; default: the one that the source is not.
      base_name: name of the base in PEFT's settings; default: its recorded path.
      base: the base; to verify a folder of PEFT.
      verify: read the result back and compare it.
      max_memory: limit for the arrays of an adapter, in bytes.
      log: receives lines about the conversion, or None.
    """
    say = log or (lambda line: None)
    say(adapter.describe())
    with _new_folder(destination) as folder:
        if (to or ("orbax" if peft.is_peft(adapter.path) else "peft")) == "peft":
            name = adapter.base["path"] if base_name is None else base_name
            for warning in peft.write_peft(adapter, folder, name):
                say(f"note: {warning}")
            say(f"base_model_name_or_path: {name or 'empty'}")
        else:
            adapters.write_adapter(adapter, folder)
        if verify:
            if peft.is_peft(folder) and base is None:
                raise ConvertError("--verify of a PEFT folder needs --base BASE")
            _verify(adapter, open_adapter(folder, base, max_memory))
            say("verified: the arrays read back equal the source's bit for bit")
    say(f"done: {destination}")


@contextlib.contextmanager
def _new_folder(destination: Path) -> Iterator[Path]:
    """A folder that is renamed to the destination at the end, or removed after an error."""
    parent = destination.absolute().parent
    folder = Path(tempfile.mkdtemp(prefix=f"{destination.name}.", suffix=".partial", dir=parent))
    try:
        folder.chmod(0o755)
        yield folder
        copy.sync(folder)
        copy.rename(folder, destination)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _verify(adapter: Adapter, result: Adapter) -> None:
    """Raise :class:`ConvertError` if an adapter differs from the one that was written."""
    for target, pair in adapter.pairs.items():
        if not all(map(np.array_equal, pair, result.pairs[target])) or result.lora != adapter.lora:
            raise ConvertError(f"verify: the adapter of {target} read back differs")
