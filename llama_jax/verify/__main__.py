"""Check every byte of a run, a checkpoint, converted weights or prepared data.

Prints one line for each file that is missing, differs in size or content, or cannot be checked.

    python -m llama_jax.verify FOLDER
"""

import argparse
import sys
import time
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from llama_jax.checkpoint.file_hashes import (
    MANIFEST,
    Files,
    find_problems,
    read_checksums,
    read_list,
)
from llama_jax.checkpoint.steps import whole_steps
from llama_jax.data import manifest
from llama_jax.data.shard_cache import local_shards
from llama_jax.io import in_use, read_json
from llama_jax.storage.errors import StorageError
from llama_jax.storage.paths import as_path, check_access, path_argument


class _Listed(NamedTuple):
    """The recorded hashes of a folder."""

    lists: list[tuple[Path, Files]]
    problems: list[str]
    """problems of the lists themselves"""
    data: list[Path]
    """folders of prepared data"""


def verify(folder: str | Path) -> list[str]:
    """Compare all files with the hashes that were written with them.

    Args:
      folder: a run, one step of it, converted weights (Orbax, Hugging Face or Meta), or data made
        by `python -m llama_jax.prepare` (a mixture or one source).

    Returns:
      One line for each problem; empty if nothing has changed.

    Raises:
      ValueError: the folder is none of these.
      OSError: a file cannot be read.
    """
    return _check(_listed(as_path(folder)))


def _check(listed: _Listed) -> list[str]:
    problems = list(listed.problems)
    total = sum(size for _, files in listed.lists for size, _ in files.values())
    with tqdm(total=total, unit="B", unit_scale=True, desc="verifying", disable=None) as bar:
        for folder, files in listed.lists:
            try:
                found = find_problems(folder, files, report=lambda count: bar.update(count))
            except FileNotFoundError:
                if not _removed(folder):
                    raise
                continue
            if found and not _removed(folder):
                problems += found
    for folder in listed.data:
        problems += manifest.verify(folder)
    return problems


def _removed(folder: Path) -> bool:
    """Whether a running training job removes this old step while it is being read."""
    if folder.parent.name != "steps":
        return False
    for _ in range(100):
        if not folder.is_dir() or not in_use(folder.parents[1]):
            break
        time.sleep(0.1)
    return not folder.is_dir()


def _listed(folder: Path) -> _Listed:
    check_access(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder")
    absolute = folder.resolve()
    for step in (absolute, absolute.parent):  # a step, or an item of it
        if step.parent.name == "steps" and step.name.isdigit():
            return _checkpoint(step.parents[1], [step], f"steps/{step.name}/")
    if (folder / "steps").is_dir() or (folder / "model.json").exists():
        steps = [folder / "steps" / str(step) for step in whole_steps(folder)]
        listed = _checkpoint(folder, steps, "steps/")
        if (folder / "data").is_dir():
            listed.data.append(local_shards(folder / "data"))
        return listed
    if not (folder / MANIFEST).exists():
        raise ValueError(
            f"{folder} is not a run, checkpoint, converted weights or prepared data: it has "
            f"neither {MANIFEST} nor steps/"
        )
    try:
        tree = read_json(folder / MANIFEST, 1 << 30)
        if "sources" in tree or "splits" in tree:
            return _Listed([], [], [local_shards(folder)])
    except ValueError as e:
        return _Listed([], [str(e)], [])
    files, problems = _read_list(folder / MANIFEST)
    return _Listed([(folder, files)], problems, [])


def _read_list(path: Path) -> tuple[Files, list[str]]:
    """The files of a list, and why there are none."""
    try:
        files = read_list(path)
    except ValueError as e:
        return {}, [str(e)]
    return files, [] if files else [f"{path} lists no files: written by an older version"]


def _checkpoint(root: Path, steps: list[Path], prefix: str) -> _Listed:
    """The small files of a checkpoint folder, and these steps: all, or the one called prefix."""
    try:
        files, problems = _read_list(root / MANIFEST)
    except FileNotFoundError:
        begun = steps or (root / "model.json").exists()
        problem = f"{root / MANIFEST} is missing" if begun else f"{root} holds no checkpoint"
        files, problems = {}, [problem]
    kept = {n: e for n, e in files.items() if n.startswith(prefix) or not n.startswith("steps/")}
    lists = [(root, kept)]
    for step in steps:
        try:
            checksums = read_checksums(step)
        except (ValueError, FileNotFoundError) as e:
            if not _removed(step):
                problems.append(str(e))
            continue
        if checksums is not None:
            lists.append((step, checksums))
        elif not any(name.startswith(f"steps/{step.name}/") for name in files):
            problems += _without_checksums(root, step)
    return _Listed(lists, problems, [])


def _without_checksums(root: Path, step: Path) -> list[str]:
    """One line that says why a step cannot be checked; none if it is being removed."""
    if (step / "checksums.json").exists():
        return [f"{step} has no SHA-256: written by an older version, it cannot be checked"]
    if in_use(root):
        why = "the run in progress has not written them yet; try again in a moment"
        return [f"{step} has no checksums: {why}"] if step.is_dir() else []
    return [
        f"{step} has no checksums: the process ended before they were written; continue the run "
        "to have them written"
    ]


def main(argv: list[str] | None = None) -> int:
    """The command; returns 0 without problems, 1 with problems, 2 if the folder has no hashes."""
    parser = argparse.ArgumentParser(
        prog="python -m llama_jax.verify",
        description="Check every file against the hashes that were written with it.",
    )
    parser.add_argument(
        "folder", type=path_argument, help="run, checkpoint, converted weights or data"
    )
    folder = parser.parse_args(argv).folder
    try:
        listed = _listed(folder)
        problems = _check(listed)
    except ValueError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    except StorageError as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    except OSError as e:
        print(f"error: {e.filename or folder}: {e.strerror or e}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    if problems:
        print(*problems, sep="\n")
        print(f"{folder}: {len(problems)} problem(s)")
        return 1
    count = sum(len(files) for _, files in listed.lists)
    size = sum(entry[0] for _, files in listed.lists for entry in files.values())
    data = " and the prepared data" if listed.data and count else ""
    what = f"{count:,} files, {size / 1e9:,.3f} GB{data}" if count else "the prepared data"
    print(f"{folder}: OK: {what} are unchanged")
    return 0


if __name__ == "__main__":
    sys.exit(main())
