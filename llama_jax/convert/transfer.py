"""Move weights piece by piece, a few units at once, inside a bound on memory, and survive a kill.

In comes a :class:`Plan`; units of the source go to the target as rows of our layout, and a record
of the finished ones (``progress.jsonl``) lets a later run continue. Nothing that a killed run left
is trusted: its units are read back and their SHA-256 compared.
"""

import concurrent.futures
import dataclasses
import fcntl
import functools
import hashlib
import json
import math
import os
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
from tqdm import tqdm

from llama_jax import config as cf
from llama_jax.convert import foreign, layouts, targets
from llama_jax.convert.layouts import Found, Kind
from llama_jax.convert.quantised import Quantizing
from llama_jax.convert.tensors import Unit, Weights, rows_per_chunk, units

_WORKERS = min(4, os.cpu_count() or 1)
_COPIES = 4
"""arrays of a piece's size that one worker holds at most: read, cast, turned around, being
written"""
_SMALLEST = 32 << 20
"""bytes of a piece, at least: a chunk of an Orbax array"""
_LONGEST_HEAD = 1 << 20
"""bytes of a record's first line"""
_LARGEST = 128 << 20
"""bytes of a piece, at most: larger ones are no faster"""


class ConvertError(ValueError):
    """A conversion that cannot be done; the message says why and what to do."""


class DamagedSourceError(ConvertError):
    """Weights that are not what their manifest.json says."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """A conversion about to start."""

    found: Found
    destination: Path
    to: Kind
    dtypes: dict[str, np.dtype]
    """of each row of the table, as written"""
    shards: int | None
    max_memory: int
    quantize: str | None = None

    @functools.cached_property
    def source(self) -> Weights:
        """The weights as they will be written, but for their dtype."""
        weights = self.found.weights
        return Quantizing(weights, self.found.cfg) if self.quantize else weights

    @property
    def units(self) -> list[Unit]:
        """What will be written."""
        return units(self.found.cfg, self.quantize)

    @property
    def partial(self) -> Path:
        """Where the result grows until it is whole."""
        return self.destination.with_name(self.destination.name + ".partial")

    def unit_bytes(self, unit: Unit) -> int:
        """Bytes of one unit as written."""
        return math.prod(unit.shape(self.found.cfg)) * self.dtypes[unit.row.path].itemsize

    @property
    def num_bytes(self) -> int:
        """Bytes of the weights to be written."""
        every = self.units
        twice = every[:1] if self.to == "meta" and self.found.cfg.tie_embeddings else []
        return sum(map(self.unit_bytes, every + twice))  # Meta's files repeat a tied embedding


def human(count: float) -> str:
    """Bytes for people: 13.5 GB."""
    power = max(0, min(4, int(math.log10(max(count, 1)) // 3)))
    return f"{count / 1000**power:.{min(power, 1)}f} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"


def budget(plan: Plan) -> tuple[int, int]:
    """(workers, bytes of a piece) that keep this process inside --max-memory."""
    if "orbax" in (plan.to, plan.found.kind):
        import orbax.checkpoint  # noqa: F401  (its 0.2 GB count too)
    used = resident() + (64 << 20)
    workers = min(_WORKERS, (plan.max_memory - used) // (_COPIES * _SMALLEST))
    if workers < 1:
        raise ConvertError(
            f"--max-memory {human(plan.max_memory)} is too little: "
            f"{human(used + _COPIES * _SMALLEST)} are needed"
        )
    return workers, min((plan.max_memory - used) // (workers * _COPIES), _LARGEST)


def resident() -> int:
    """Bytes of memory that this process has now."""
    try:
        with open("/proc/self/statm") as f:
            return int(f.read().split()[1]) * resource.getpagesize()
    except OSError:  # not Linux: the most it ever had, in bytes on macOS
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _pieces(plan: Plan, unit: Unit, limit: int) -> list[tuple[int, int]]:
    """Row ranges of a unit: whole Orbax chunks, as many as fit the limit."""
    given = plan.source.dtype(unit)
    dtype = plan.dtypes.get(unit.row.path, given)
    rows, columns = unit.shape(plan.found.cfg)
    chunk = rows_per_chunk(unit, plan.found.cfg, dtype)
    step = chunk * max(1, limit // (chunk * columns * max(dtype.itemsize, given.itemsize)))
    return [(i, min(i + step, rows)) for i in range(0, rows, step)]


def _read(plan: Plan, unit: Unit, start: int, stop: int) -> np.ndarray:
    """Rows of the source, as they will be written."""
    piece, dtype = plan.source.read(unit, start, stop), plan.dtypes[unit.row.path]
    if piece.dtype == dtype:
        return piece
    with np.errstate(over="ignore"):
        cast = piece.astype(dtype)
    if (lost := np.isfinite(piece) & ~np.isfinite(cast)).any():
        raise ConvertError(
            f"{unit.name} holds {piece[lost][0]}, which {dtype.name} cannot say; choose another "
            "--dtype"
        )
    return cast


def _sha256(pieces: Iterator[np.ndarray]) -> str:
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _check_source(plan: Plan, unit: Unit, written: str, limit: int) -> None:
    """Compare a tensor of the source with its manifest.json; ``written``: SHA-256 of the result."""
    found, whole = plan.found, unit
    if unit.row.quantized is not None:
        whole = unit.whole()
    if whole.name not in found.sums or unit.row.scales:  # scales: checked with their integers
        return
    if whole is not unit or found.weights.dtype(unit) != plan.dtypes[unit.row.path]:
        written = _sha256(found.weights.read(whole, *p) for p in _pieces(plan, whole, limit))
    if written != found.sums[whole.name]:
        advice = "" if found.kind == "orbax" else ", or remove manifest.json if they were replaced"
        raise DamagedSourceError(
            f"{found.path}: {whole.name} is not what manifest.json says: the weights were damaged "
            f"or changed after they were written; copy them again{advice}"
        )


def write_weights(plan: Plan, progress: IO[str]) -> dict[str, str]:
    """Write every unit that a killed run has not written; SHA-256 of each, by name.

    Raises:
      DamagedSourceError: a tensor is not what the source's manifest.json says; names it.
    """
    found, sums = plan.found, _finished(progress)
    by_rows = targets.cuts_rows(found)
    target = targets.create(
        plan.to, plan.partial, found.cfg, plan.dtypes, plan.shards, by_rows, plan.quantize
    )
    workers, limit = budget(plan)

    def pieces(unit: Unit) -> Iterator[np.ndarray]:
        for start, stop in _pieces(plan, unit, limit):
            piece = _read(plan, unit, start, stop)
            target.weights.write(unit, start, piece)
            yield piece

    def write(unit: Unit) -> tuple[Unit, str]:
        known = sums.get(unit.name)
        written = (target.weights.read(unit, *p) for p in _pieces(plan, unit, limit))
        if known is None or _sha256(written) != known:
            known = _sha256(pieces(unit))
        _check_source(plan, unit, known, limit)
        target.done(unit)
        return unit, known

    for unit, done in _in_parallel(write, plan, workers, "converting"):
        if sums.get(unit.name) != done:
            sums[unit.name] = done
            progress.write(json.dumps({"unit": unit.name, "sha256": done}) + "\n")
            progress.flush()
    target.finish()
    return sums


def verify(plan: Plan) -> Found:
    """Open the result as anybody would and compare every bit with the source."""
    result = layouts.open_folder(plan.partial)
    if foreign.settled(result.cfg) != foreign.settled(plan.found.cfg):
        given, now = cf.to_dict(plan.found.cfg), cf.to_dict(result.cfg)
        diff = [f"{k} is {now[k]}, was {given[k]}" for k in given if given[k] != now[k]]
        raise ConvertError(f"verify: the settings read back differ: {'; '.join(diff)}")
    workers, limit = budget(plan)

    def compare(unit: Unit) -> str | None:
        same = all(
            _read(plan, unit, *p).tobytes() == result.weights.read(unit, *p).tobytes()
            for p in _pieces(plan, unit, limit)
        )
        return None if same else unit.name

    wrong = [name for name in _in_parallel(compare, plan, workers, "verifying") if name]
    if wrong:
        raise ConvertError(f"verify: tensors differ from the source: {', '.join(sorted(wrong))}")
    return result


def _in_parallel(
    work: Callable[[Unit], Any], plan: Plan, workers: int, title: str
) -> Iterator[Any]:
    """Results of `work(unit)` as they come, with a bar in bytes; the first error stops the rest."""
    every = plan.units
    total = sum(map(plan.unit_bytes, every))
    bar = tqdm(total=total, unit="B", unit_scale=True, desc=title, leave=False, disable=None)
    with bar, concurrent.futures.ThreadPoolExecutor(workers) as pool:
        jobs = {pool.submit(work, unit): unit for unit in every}
        try:
            for job in concurrent.futures.as_completed(jobs):
                yield job.result()
                bar.update(plan.unit_bytes(jobs[job]))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


# --- the record of a run ---


def stamps(found: Found) -> list[list[Any]]:
    """Size and time of the source's files: a conversion is continued only from the same ones."""
    files = [found.files[0] / "_METADATA"] if found.kind == "orbax" else found.files
    return [[str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns] for f in files]


def open_progress(plan: Plan) -> IO[str]:
    """The partial folder's record, locked; what another conversion left there is cleared away.

    Raises:
      ConvertError: the folder is not a conversion's, or another one is writing it.
    """
    dtypes = {path: d.name for path, d in plan.dtypes.items()}
    model = cf.to_dict(plan.found.cfg)
    this = {"from": stamps(plan.found), "model": model, "to": plan.to, "shards": plan.shards}
    head = json.dumps(this | {"dtypes": dtypes, "format": 1})
    record = plan.partial / "progress.jsonl"
    if not _is_ours(plan.partial, record):
        raise ConvertError(
            f"{plan.partial} exists and is no unfinished conversion; rename or remove it"
        )
    plan.partial.mkdir(exist_ok=True)
    progress = record.open("a+", encoding="utf-8")
    try:
        fcntl.flock(progress, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        progress.close()
        raise ConvertError(f"another conversion is writing {plan.partial}") from None
    progress.seek(0)
    first = progress.readline()
    if first.strip() == head:
        print(f"continuing: {plan.partial}")
        return progress
    if first:
        print(f"{plan.partial} is of another source, other settings or files: starting over")
    for path in plan.partial.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path != record:
            path.unlink()
    progress.truncate(0)
    progress.write(head + "\n")
    progress.flush()
    return progress


_HEAD = {"from", "model", "to", "shards", "dtypes", "format"}
"""keys of a record's first line"""


def _is_ours(partial: Path, record: Path) -> bool:
    """Whether a partial folder may be taken: absent, empty, or with a conversion's record."""
    if not os.path.lexists(partial):
        return True
    if partial.is_symlink() or not partial.is_dir():
        return False
    names = {p.name for p in partial.iterdir()}
    if names <= {record.name} and (not names or record.stat().st_size == 0):
        return True  # empty, or killed before the first line was written
    if record.is_symlink() or not record.is_file():
        return False
    with record.open("rb") as f:
        first = f.readline(_LONGEST_HEAD)
    try:
        head = json.loads(first)
    except (ValueError, RecursionError):
        return False
    return isinstance(head, dict) and set(head) == _HEAD


def _finished(progress: IO[str]) -> dict[str, str]:
    """SHA-256 of the units that an earlier run finished, as its record says."""
    sums = {}
    progress.seek(0)
    for line in progress.readlines()[1:]:
        try:
            entry = json.loads(line)
            sums[entry["unit"]] = entry["sha256"]
        except (ValueError, KeyError, TypeError, RecursionError):
            continue  # cut off when the run was killed
    progress.seek(0, os.SEEK_END)
    return sums
