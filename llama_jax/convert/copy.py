"""Copy weights by row blocks, several tensors at once, in bounded memory, and resume after a kill.

A record of finished tensors (``progress.jsonl``) lets a later run continue. Tensors of a killed run
are read again and compared with their recorded SHA-256 before they are accepted.
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

from llama_jax.config import to_dict
from llama_jax.convert.formats import ConvertError
from llama_jax.convert.gguf import Q8Weights
from llama_jax.convert.sources import CheckpointWriter, Format, SourceCheckpoint, normalized
from llama_jax.convert.tensors import LayerTensor, Weights, layer_tensors, rows_per_chunk
from llama_jax.io import sync_folder

_WORKERS = min(4, os.cpu_count() or 1)
_COPIES = 4
"""largest number of row blocks that one worker holds: read, cast, transposed, being written"""
_MIN_BLOCK = 32 << 20
"""smallest limit on the bytes of a row block: a chunk of an Orbax array"""
_MAX_BLOCK = 128 << 20
"""largest limit on the bytes of a row block: larger ones are not faster"""
_MAX_HEAD_BYTES = 1 << 20
"""size limit of a record's first line"""


class DamagedSourceError(ConvertError):
    """Weights that differ from their manifest.json."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """A conversion that was checked and can start.

    Example:
      >>> plan = make_plan(open_folder(Path("Llama-3.2-1B")), Path("out"))
      >>> plan.num_bytes
      2471645184
    """

    source: SourceCheckpoint
    destination: Path
    to: Format
    dtypes: dict[str, np.dtype]
    """dtype of each line of the table, as written"""
    shards: int | None
    max_memory: int
    quantize: str | None = None
    log: Callable[[str], None] = print
    progress_bar: bool = True

    @functools.cached_property
    def weights(self) -> Weights:
        """The weights to be written, before a cast to their dtype."""
        weights = self.source.weights
        if self.quantize is None:
            return weights
        if self.to == "gguf":
            return Q8Weights(weights, self.source.cfg)
        from llama_jax.convert.quantize import QuantizedWeights  # here, because it imports JAX

        return QuantizedWeights(weights, self.source.cfg)

    @property
    def tensors(self) -> list[LayerTensor]:
        """The tensors to be written."""
        return layer_tensors(self.source.cfg, self.quantize)

    @property
    def partial(self) -> Path:
        """The folder of the result until it is complete."""
        return self.destination.with_name(self.destination.name + ".partial")

    def tensor_bytes(self, tensor: LayerTensor) -> int:
        """Size of one tensor as written."""
        itemsize = self.dtypes[tensor.spec.path].itemsize
        return math.prod(tensor.shape(self.source.cfg)) * itemsize

    @property
    def num_bytes(self) -> int:
        """Size of the weights to be written."""
        tensors = self.tensors
        if self.to == "meta" and self.source.cfg.tie_embeddings:
            tensors = tensors[:1] + tensors  # Meta's files repeat a tied embedding
        return sum(map(self.tensor_bytes, tensors))


def format_bytes(count: float) -> str:
    """A number of bytes for a message: 13.5 GB."""
    power = max(0, min(4, int(math.log10(max(count, 1)) // 3)))
    return f"{count / 1000**power:.{min(power, 1)}f} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"


def memory_budget(plan: Plan) -> tuple[int, int]:
    """(workers, largest bytes of a row block) that keep this process within plan.max_memory.

    Raises:
      ConvertError: not even one worker fits.
    """
    if "orbax" in (plan.to, plan.source.format):
        import orbax.checkpoint  # noqa: F401  (its 0.2 GB count too)
    used = resident_bytes() + (64 << 20)
    workers = min(_WORKERS, (plan.max_memory - used) // (_COPIES * _MIN_BLOCK))
    if workers < 1:
        raise ConvertError(
            f"--max-memory {format_bytes(plan.max_memory)} is too little: "
            f"{format_bytes(used + _COPIES * _MIN_BLOCK)} are needed"
        )
    return workers, min((plan.max_memory - used) // (workers * _COPIES), _MAX_BLOCK)


def resident_bytes() -> int:
    """Memory that this process uses now."""
    try:
        with open("/proc/self/statm") as f:
            return int(f.read().split()[1]) * resource.getpagesize()
    except OSError:  # not Linux: the peak so far, in bytes on macOS
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _row_blocks(plan: Plan, tensor: LayerTensor, limit: int) -> list[tuple[int, int]]:
    """Row ranges of a tensor: whole Orbax chunks, as many as fit the limit."""
    stored = plan.weights.dtype(tensor)
    dtype = plan.dtypes.get(tensor.spec.path, stored)
    rows, columns = tensor.shape(plan.source.cfg)
    chunk = rows_per_chunk(tensor, plan.source.cfg, dtype)
    step = chunk * max(1, limit // (chunk * columns * max(dtype.itemsize, stored.itemsize)))
    return [(i, min(i + step, rows)) for i in range(0, rows, step)]


def _read(plan: Plan, tensor: LayerTensor, start: int, stop: int) -> np.ndarray:
    """Rows of the source in the dtype to be written."""
    block, dtype = plan.weights.read(tensor, start, stop), plan.dtypes[tensor.spec.path]
    if block.dtype == dtype:
        return block
    with np.errstate(over="ignore"):
        cast = block.astype(dtype)
    if (lost := np.isfinite(block) & ~np.isfinite(cast)).any():
        raise ConvertError(
            f"{tensor.name} holds {block[lost][0]}, which overflows in {dtype.name}; choose "
            "another --dtype (--type for GGUF)"
        )
    return cast


def _sha256(blocks: Iterator[np.ndarray]) -> str:
    digest = hashlib.sha256()
    for block in blocks:
        digest.update(block.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _check_source(plan: Plan, tensor: LayerTensor, written: str, limit: int) -> None:
    """Compare a tensor of the source with its manifest.json; `written` is the result's SHA-256."""
    source, stored = plan.source, tensor
    if tensor.spec.quantized is not None:
        stored = tensor.unquantized()
    if stored.name not in source.sha256 or tensor.spec.scales:  # checked with the integers
        return
    if stored is not tensor or source.weights.dtype(tensor) != plan.dtypes[tensor.spec.path]:
        blocks = _row_blocks(plan, stored, limit)
        written = _sha256(source.weights.read(stored, *block) for block in blocks)
    if written != source.sha256[stored.name]:
        advice = ", or remove manifest.json if they were replaced"
        raise DamagedSourceError(
            f"{source.path}: {stored.name} differs from manifest.json: the weights were damaged or "
            f"changed after they were written; copy them again{advice * (source.format != 'orbax')}"
        )


def write_weights(plan: Plan, writer: CheckpointWriter, progress: IO[str]) -> dict[str, str]:
    """Write every tensor that a killed run has not written.

    Args:
      plan: the conversion.
      writer: the folder to fill.
      progress: the record, from :func:`open_progress`.

    Returns:
      SHA-256 of each tensor by name.

    Raises:
      DamagedSourceError: a tensor differs from the source's manifest.json.
    """
    digests = _finished(progress)
    workers, limit = memory_budget(plan)

    def copied(tensor: LayerTensor) -> Iterator[np.ndarray]:
        for start, stop in _row_blocks(plan, tensor, limit):
            block = _read(plan, tensor, start, stop)
            writer.weights.write(tensor, start, block)
            yield block

    def write(tensor: LayerTensor) -> tuple[LayerTensor, str]:
        known = digests.get(tensor.name)
        blocks = _row_blocks(plan, tensor, limit)
        written = (writer.weights.read(tensor, *block) for block in blocks)
        if known is None or _sha256(written) != known:
            known = _sha256(copied(tensor))
        _check_source(plan, tensor, known, limit)
        writer.finish_tensor(tensor)
        return tensor, known

    for tensor, digest in _in_parallel(write, plan, workers, "converting"):
        if digests.get(tensor.name) != digest:
            digests[tensor.name] = digest
            progress.write(json.dumps({"tensor": tensor.name, "sha256": digest}) + "\n")
            progress.flush()
    writer.finish()
    return digests


def verify(plan: Plan, result: SourceCheckpoint) -> None:
    """Compare the settings and every bit of the result with the source.

    Raises:
      ConvertError: they differ; names the settings or tensors.
    """
    if normalized(result.cfg) != normalized(plan.source.cfg):
        given, now = to_dict(plan.source.cfg), to_dict(result.cfg)
        diff = [f"{k} is {now[k]}, was {given[k]}" for k in given if given[k] != now[k]]
        raise ConvertError(f"verify: the settings read back differ: {'; '.join(diff)}")
    workers, limit = memory_budget(plan)

    def compare(tensor: LayerTensor) -> str | None:
        same = all(
            _read(plan, tensor, *block).tobytes() == result.weights.read(tensor, *block).tobytes()
            for block in _row_blocks(plan, tensor, limit)
        )
        return None if same else tensor.name

    wrong = [name for name in _in_parallel(compare, plan, workers, "verifying") if name]
    if wrong:
        raise ConvertError(f"verify: tensors differ from the source: {', '.join(sorted(wrong))}")


def _in_parallel(
    work: Callable[[LayerTensor], Any], plan: Plan, workers: int, title: str
) -> Iterator[Any]:
    """Results of `work(tensor)` as they complete; the first error stops the others."""
    tensors = plan.tensors
    bar = tqdm(
        total=sum(map(plan.tensor_bytes, tensors)), unit="B", unit_scale=True, desc=title,
        leave=False, disable=None if plan.progress_bar else True,
    )  # fmt: skip
    with bar, concurrent.futures.ThreadPoolExecutor(workers) as pool:
        jobs = {pool.submit(work, tensor): tensor for tensor in tensors}
        try:
            for job in concurrent.futures.as_completed(jobs):
                yield job.result()
                bar.update(plan.tensor_bytes(jobs[job]))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


# The record of a run ------------------------------------------------------------------------------


def file_stamps(source: SourceCheckpoint) -> list[list[Any]]:
    """Path, size and time of the source's files; only an unchanged source can be resumed."""
    files = [f / "_METADATA" if f.is_dir() else f for f in source.files]
    return [[str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns] for f in files]


def open_progress(plan: Plan) -> IO[str]:
    """Open and lock the record in the partial folder; files of another conversion are removed.

    Raises:
      ConvertError: the folder does not belong to a conversion, or another one is writing it.
    """
    head = json.dumps({
        "from": file_stamps(plan.source), "model": to_dict(plan.source.cfg), "to": plan.to,
        "shards": plan.shards, "dtypes": {path: d.name for path, d in plan.dtypes.items()},
        "format": 2,
    })  # fmt: skip
    record = plan.partial / "progress.jsonl"
    if not _is_ours(plan.partial, record):
        raise ConvertError(
            f"{plan.partial} exists and is not an unfinished conversion; rename or remove it"
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
        plan.log(f"continuing: {plan.partial}")
        return progress
    if first:
        plan.log(f"{plan.partial} has another source or other settings: starting over")
    for path in plan.partial.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path != record:
            path.unlink()
    progress.truncate(0)
    progress.write(head + "\n")
    progress.flush()
    return progress


_HEAD_KEYS = {"from", "model", "to", "shards", "dtypes", "format"}


def _is_ours(partial: Path, record: Path) -> bool:
    """Whether a partial folder may be used: absent, empty, or with the record of a conversion."""
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
        first = f.readline(_MAX_HEAD_BYTES)
    try:
        head = json.loads(first)
    except (ValueError, RecursionError):
        return False
    return isinstance(head, dict) and set(head) == _HEAD_KEYS


def _finished(progress: IO[str]) -> dict[str, str]:
    """SHA-256 of the tensors that an earlier run finished, according to its record."""
    digests = {}
    progress.seek(0)
    for line in progress.readlines()[1:]:
        try:
            entry = json.loads(line)
            digests[entry["tensor"]] = entry["sha256"]
        except (ValueError, KeyError, TypeError, RecursionError):
            continue  # incomplete because the run was killed
    progress.seek(0, os.SEEK_END)
    return digests


# The result ---------------------------------------------------------------------------------------


def rename(partial: Path, destination: Path) -> None:
    """Rename the complete result to its destination."""
    if destination.exists():
        destination.rmdir()  # empty when the run started; otherwise this fails
    partial.rename(destination)
    sync_folder(destination.absolute().parent)


def sync(folder: Path) -> None:
    """Sync every file and folder to the disk."""
    for path in [*folder.rglob("*"), folder]:
        file = os.open(path, os.O_RDONLY)
        os.fsync(file)
        os.close(file)
