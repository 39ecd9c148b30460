"""A run of a source: its settings and input, and the loop over the stages of its pipeline."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from llama_jax.corpus.executors import Job, Place, execute
from llama_jax.corpus.output import FORMATS
from llama_jax.corpus.steps import Stage, Writer
from llama_jax.io import atomic_write

MAX_PARTS = 256  # a compressor takes 2.7 MB
SUFFIXES = [suffix for _, suffix in FORMATS.values()]


@dataclass(frozen=True)
class Run:
    """What the pipeline of a source knows about its run.

    Attributes:
        source: Name of the source.
        settings: ``Settings`` of the source.
        inputs: Files, sorted. A folder that was given is replaced by the files in it.
        names: For each of the inputs, its path relative to the folder that contains what was
            given. Use it in ids and messages: it does not depend on where the files are.
        languages: Those given with ``--language``; empty if none were given.
        output: Folder of the corpus.
        models: Folder of the models that ``llama-jax corpus models`` made.
        format: Format of the result, "jsonl" or "parquet".

    Example::

        def stages(run: Run) -> Iterator[Stage]:
            groups = [[path] for path in run.inputs]
            yield Stage("pages", [Pages(groups), Clean(run.settings)], len(groups))
            groups = [[path] for path in run.documents("pages")]
            yield Stage("documents", [Documents(groups)], len(groups), final=True)
    """

    source: str
    settings: Any
    inputs: Sequence[Path]
    names: Sequence[str]
    languages: Sequence[str]
    output: Path
    models: Path
    format: str = "jsonl"

    def documents(self, stage: str) -> list[Path]:
        """The files that a complete stage wrote, in the order of its tasks."""
        folder = self.output / "work/documents" / stage
        if not folder.is_dir():
            folder = self.output / "documents"
        paths = [path for suffix in SUFFIXES for path in folder.rglob(f"*{suffix}")]
        return sorted(paths, key=lambda path: (int(path.name.partition(".")[0]), path.parent))

    def folder(self, name: str) -> Path:
        """A folder for products other than documents; it is removed when the run is complete."""
        folder = self.output / "work/products" / name
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def note(self, name: str, value: Any) -> None:
        """Adds a fact to the manifest, such as a threshold that was computed from the documents.

        Call it in ``stages``, with values that depend on input and settings only.
        """
        atomic_write(self.folder("notes") / f"{name}.json", json.dumps(value).encode())


def group_files(paths: Iterable[Path], max_bytes: int, max_files: int) -> list[list[Path]]:
    """Groups of consecutive files, one for each task.

    Args:
        paths: The files, in order.
        max_bytes: Size of a group, unless it has a single file.
        max_files: Number of files of a group.
    """
    groups: list[list[Path]] = []
    total = 0
    for path in paths:
        size = path.stat().st_size
        if not groups or total + size > max_bytes or len(groups[-1]) >= max_files:
            groups.append([])
            total = 0
        groups[-1].append(path)
        total += size
    return groups


def number_of_parts(path: Path, part_bytes: int) -> int:
    """Into how many parts a large file is split; each part has an open file and a compressor."""
    return min(MAX_PARTS, 1 + path.stat().st_size // part_bytes)


def run_stages(run: Run, stages: Iterable[Stage], place: Place) -> list[Stage]:
    """Executes the stages of a source one after the other; complete tasks are not repeated.

    Args:
        run: The run.
        stages: Iterated lazily: each stage is complete before the next one is asked for.
        place: Where the tasks run.

    Returns:
        The stages.

    Raises:
        TaskError: A task failed; the same call continues the run.
    """
    done: list[Stage] = []
    for stage in stages:
        if stage.name in {other.name for other in done}:
            raise ValueError(f"source {run.source} has two stages with the name {stage.name}")
        _run_stage(run, stage, place)
        done.append(stage)
    return done


def _run_stage(run: Run, stage: Stage, place: Place) -> None:
    if not stage.tasks >= 1:
        raise ValueError(f"source {run.source}: stage {stage.name} has no tasks")
    final = run.output / "documents"
    documents = final if stage.final else run.output / "work/documents" / stage.name
    documents.mkdir(parents=True, exist_ok=True)
    dropped, counts = (run.output / name / stage.name for name in ("dropped", "counts"))
    format = run.format if stage.final else "jsonl"
    writer = Writer(documents, dropped, counts, stage.split, format)
    logs = run.output / "work/logs" / stage.name
    job = Job(stage.name, [*stage.steps, writer], stage.tasks, counts, logs)
    with _Bar(job) as bar:
        execute(job, place, bar.update)


class _Bar:
    """Progress of a stage: tasks, documents, and text per second."""

    def __init__(self, job: Job):
        self.job = job
        self.seen: set[str] = set()
        self.documents = self.text_bytes = 0

    def __enter__(self) -> "_Bar":
        self.bar = tqdm(
            total=self.job.tasks, desc=self.job.name, unit=" tasks", leave=False, disable=None
        )
        if not self.bar.disable:
            self._read()
            self.bar.update(len(self.seen))
            self.bar.initial, self.text_bytes = len(self.seen), 0
        return self

    def __exit__(self, *_: Any) -> None:
        self.bar.close()

    def update(self) -> None:
        if self.bar.disable:
            return
        new = self._read()
        seconds = max(self.bar.format_dict["elapsed"], 1e-3)
        speed = self.text_bytes / seconds / 1e6
        self.bar.set_postfix_str(f"{self.documents:,} documents, {speed:.1f} MB/s of text")
        self.bar.update(new)

    def _read(self) -> int:
        new = [path for path in self.job.counts.glob("*.json") if path.name not in self.seen]
        for path in new:
            counts = json.loads(path.read_bytes())
            self.documents += counts["written"]
            self.text_bytes += counts["text_bytes"]
            self.seen.add(path.name)
        return len(new)
