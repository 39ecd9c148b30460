"""Making of a corpus: checks, the stages of the source, and the manifest at the end."""

import itertools
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from llama_jax.corpus import inputs as files
from llama_jax.corpus.executors import Place, cancel_slurm_jobs
from llama_jax.corpus.manifest import (
    MANIFEST,
    STARTED,
    changes,
    check_output,
    made_from,
    read_manifest,
    write_manifest,
)
from llama_jax.corpus.recipe import CorpusRecipe, source_module
from llama_jax.corpus.run import Run, run_stages
from llama_jax.io import atomic_write, folder_lock

HASHES = "work/inputs.json"


class Corpus(NamedTuple):
    """Result of `make_corpus`."""

    manifest: dict[str, Any]
    was_complete: bool


def make_corpus(
    source: str,
    given: Sequence[Path],
    output: Path,
    place: Place,
    recipe: CorpusRecipe,
    languages: Sequence[str] = (),
    models: Path = Path(),
) -> Corpus:
    """Makes the corpus of a source, or continues it; a complete one is left as it is.

    Args:
        source: Name of the source.
        given: Files and folders of the dump.
        output: Folder to write.
        place: Where the tasks run.
        recipe: Its settings.
        languages: Languages to keep, for sources that have several.
        models: Folder of the models.

    Raises:
        ValueError: Input or settings that cannot be used, or a failed task.
        OSError: Reading or writing failed.
    """
    module = source_module(source)
    inputs, names = files.find_inputs(given)
    _check_separate(given, output)
    files.check_kind(source, inputs)
    check_output(output)
    settings, common = recipe
    run = Run(
        source, settings, [path.resolve() for path in inputs], names, tuple(languages),
        output.resolve(), models.resolve(), common.format,
    )  # fmt: skip
    used = module.models(run) if hasattr(module, "models") else []
    output.mkdir(parents=True, exist_ok=True)
    with folder_lock(output, f"making the corpus {source}"):
        check_output(output)
        hashes = files.hash_inputs(inputs, names, output / HASHES)
        origin = made_from(run, hashes, used)
        was_complete = (output / MANIFEST).is_file()
        if differences := changes(output, origin):
            if was_complete or any(output.glob("counts/*/*.json")):
                raise ValueError(_changed(output, differences))
            _start_anew(output)
        if not was_complete:
            stages = iter(module.stages(run))
            first = next(stages)  # raises what is wrong with the settings
            atomic_write(output / STARTED, json.dumps(origin).encode())
            done = run_stages(run, itertools.chain([first], stages), place)
            _remove_incomplete_files(output)
            write_manifest(run, done, origin)
        for name in ("documents", "products"):
            shutil.rmtree(output / "work" / name, ignore_errors=True)
        return Corpus(read_manifest(output), was_complete)


def _changed(output: Path, differences: list[str]) -> str:
    more = f" and {len(differences) - 5} more" if len(differences) > 5 else ""
    return (
        f"{output} was made with other settings or input: {'; '.join(differences[:5])}{more}. "
        "Give the former ones, or a new folder for --output"
    )


def _check_separate(given: Sequence[Path], output: Path) -> None:
    out = output.resolve()
    for path in given:
        whole = path.resolve()
        if out == whole or whole in out.parents or out in whole.parents:
            raise ValueError(f"one of --output {output} and the input {path} contains the other")


def _start_anew(output: Path) -> None:
    """Removes what a run without a complete task has left, so that its settings may change."""
    cancel_slurm_jobs(output / "work/logs")
    for name in ("documents", "dropped", "counts", "work"):
        folder = output / name
        for path in folder.iterdir() if folder.is_dir() else ():
            if path != output / HASHES:
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def _remove_incomplete_files(output: Path) -> None:
    """Removes what killed processes have left; no task runs any more."""
    for path in output.rglob("*"):
        if path.suffix in (".part", ".partial"):
            path.unlink()
