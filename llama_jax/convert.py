"""Convert weights between Meta, Hugging Face and our Orbax checkpoints, bit for bit, in bounded memory.

In comes a folder in any of the three layouts (recognised by content), out goes a new folder in another, with the
tokenizer and a manifest of SHA-256 sums. Torch is not needed. A killed run continues when started again; the folder has
its name only when it is whole.

    python -m llama_jax.convert SOURCE DESTINATION [--to orbax|hf|meta] [--dtype bfloat16] [--shards N] [--verify]
    python -m llama_jax.convert --inspect PATH
"""

import argparse
import concurrent.futures
import dataclasses
import errno
import fcntl
import hashlib
import json
import os
import re
import resource
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
from tqdm import tqdm

from llama_jax import config as cf
from llama_jax import foreign, layouts
from llama_jax.foreign import human
from llama_jax.layouts import FLOATS, NAMES, Found, Kind
from llama_jax.weights import Unit, rows_per_chunk, units

_WORKERS = min(4, os.cpu_count() or 1)
_COPIES = 4
"""arrays of a piece's size that one worker holds at most: read, cast, turned around, being written"""
_SMALLEST = 32 << 20
"""bytes of a piece, at least: a chunk of an Orbax array"""


class ConvertError(ValueError):
    """A conversion that cannot be done; the message says why and what to do."""


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

    @property
    def partial(self) -> Path:
        """Where the result grows until it is whole."""
        return self.destination.with_name(self.destination.name + ".partial")

    @property
    def num_bytes(self) -> int:
        """Bytes of the weights to be written."""
        sizes = [(u, self.dtypes[u.row.path].itemsize) for u in units(self.found.cfg)]
        count = sum(np.prod(u.shape(self.found.cfg), dtype=int) * size for u, size in sizes)
        if self.to == "meta" and self.found.cfg.tie_embeddings:  # output.weight is written out
            count += np.prod(self.found.cfg.shape("VD"), dtype=int) * self.dtypes["embed"].itemsize
        return int(count)


def convert(
    source: Path,
    destination: Path,
    to: Kind | None = None,
    dtype: str = "keep",
    shards: int | None = None,
    max_memory: int = 2 << 30,
    verify: bool = False,
    context: int | None = None,
) -> Path:
    """Convert a folder of weights; returns the destination. Arguments as the command line's.

    Raises:
      ValueError: the source cannot be used or the destination cannot be written as asked; says why and what to do.
      OSError: a file cannot be read or written.
    """
    start = time.perf_counter()
    plan = make_plan(
        layouts.open_folder(Path(source), context), Path(destination), to, dtype, shards, max_memory
    )
    before = _stamps(plan.found)
    print(describe(plan.found))
    print(
        f"writing: {plan.destination} ({NAMES[plan.to]}), {human(plan.num_bytes)}, {_kinds(plan.dtypes)}"
    )
    with _open_progress(plan) as progress:
        _check_space(plan)
        sums = _write_weights(plan, progress)
        _write_settings(plan, sums)
        if _stamps(plan.found) != before:
            raise ConvertError(f"{source} changed while it was being converted; start again")
        if verify:
            _verify(plan)
        _sync(plan.partial)
        (plan.partial / "progress.jsonl").unlink()
    if plan.destination.exists():
        plan.destination.rmdir()  # it was empty when the run started, or this fails
    plan.partial.rename(plan.destination)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(
        f"done: {plan.destination}, {human(plan.num_bytes)} in {seconds:.1f} s ({human(plan.num_bytes / seconds)}/s), "
        f"peak memory {human(peak)}, SHA-256 of every tensor in manifest.json"
    )
    return plan.destination


def make_plan(
    found: Found,
    destination: Path,
    to: Kind | None,
    dtype: str,
    shards: int | None,
    max_memory: int,
) -> Plan:
    """Settle what will be written; raises ValueError for what cannot be."""
    to = to or ("hf" if found.kind == "orbax" else "orbax")
    if destination.exists() and not (destination.is_dir() and not any(destination.iterdir())):
        raise ConvertError(f"{destination} exists; remove it or choose another name")
    if not destination.absolute().parent.is_dir():
        raise ConvertError(f"{destination.absolute().parent} does not exist; make it first")
    layouts.check_shards(to, found.cfg, shards, layouts.cuts_rows(found))
    have = found.dtypes()
    dtypes = have if dtype == "keep" else {path: _dtype(dtype) for path in have}
    plan = Plan(found, destination, to, dtypes, shards, max_memory)
    _budget(plan)
    if to == "hf":  # refusals before the work
        foreign.hf_from_model(found.cfg, "float32", {})
    if to == "meta":
        foreign.meta_from_model(found.cfg)
    return plan


def _dtype(name: str) -> np.dtype:
    return next(d for d in FLOATS if d.name == name)


def _kinds(dtypes: dict[str, np.dtype]) -> str:
    return " and ".join(name for name, _ in Counter(d.name for d in dtypes.values()).most_common())


def describe(found: Found) -> str:
    """What a folder holds, in lines for a person."""
    cfg = found.cfg
    known = [n for n, m in cf.MODELS.items() if dataclasses.replace(m, context=cfg.context) == cfg]
    rope = {k: v for k, v in cf.to_dict(cfg.rope).items() if v is not None}
    lines = [
        f"found: {found.path}: {NAMES[found.kind]} layout, {len(found.files)} file{'s' * (len(found.files) > 1)}",
        f"  model: {cfg.num_params:,} parameters, {_kinds(found.dtypes())}"
        + (f", as {known[0]}" if known else ""),
        f"  sizes: vocab {cfg.vocab_size}, dim {cfg.dim}, layers {cfg.num_layers}, heads {cfg.num_heads} "
        f"(kv {cfg.num_kv_heads}) of {cfg.head_dim}, feed-forward {cfg.ffn_dim}, context {cfg.context}, "
        f"norm_eps {cfg.norm_eps:g}, embeddings {'tied' if cfg.tie_embeddings else 'not tied'}",
        f"  rope: {', '.join(f'{k} {v}' for k, v in rope.items())}",
    ]
    lines += [f"  tokenizer: {t.path} ({t.kind}, {t.size} tokens)" for t in found.tokenizers]
    if found.ids:
        lines.append("  token ids: " + ", ".join(f"{k} {v}" for k, v in found.ids.items()))
    return "\n".join(lines + [f"  note: {r}" for r in found.remarks])


# --- the weights -----------------------------------------------------------------------------------------------------


def _budget(plan: Plan) -> tuple[int, int]:
    """(workers, bytes of a piece) that keep this process inside --max-memory."""
    if "orbax" in (plan.to, plan.found.kind):
        import orbax.checkpoint  # noqa: F401  (its 0.3 GB count too)
    with open("/proc/self/statm") as f:
        used = int(f.read().split()[1]) * resource.getpagesize()
    free = plan.max_memory - used - (64 << 20)
    workers = min(_WORKERS, free // (_COPIES * _SMALLEST))
    if workers < 1:
        least = used + (64 << 20) + _COPIES * _SMALLEST
        raise ConvertError(
            f"--max-memory {human(plan.max_memory)} is too little: {human(least)} are needed"
        )
    # More than 128 MB a piece gains no speed.
    return workers, min(free // (workers * _COPIES), 128 << 20)


def _pieces(plan: Plan, unit: Unit, limit: int) -> list[tuple[int, int]]:
    """Row ranges of a unit: whole Orbax chunks, as many as fit the limit."""
    cfg, dtype = plan.found.cfg, plan.dtypes[unit.row.path]
    rows, columns = unit.shape(cfg)
    chunk = rows_per_chunk(unit, cfg, dtype)
    widest = max(dtype.itemsize, plan.found.weights.dtype(unit).itemsize)
    step = chunk * max(1, limit // (chunk * columns * widest))
    return [(i, min(i + step, rows)) for i in range(0, rows, step)]


def _read(plan: Plan, unit: Unit, start: int, stop: int) -> np.ndarray:
    """Rows of the source, as they will be written."""
    piece, dtype = plan.found.weights.read(unit, start, stop), plan.dtypes[unit.row.path]
    if piece.dtype == dtype:
        return piece
    with np.errstate(over="ignore"):
        cast = piece.astype(dtype)
    if (lost := np.isfinite(piece) & ~np.isfinite(cast)).any():
        raise ConvertError(
            f"{unit.name} holds {piece[lost][0]}, which {dtype.name} cannot say; choose another --dtype"
        )
    return cast


def _sum(pieces: Iterator[np.ndarray]) -> str:
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece.reshape(-1).view(np.uint8))
    return digest.hexdigest()


def _write_weights(plan: Plan, progress: IO[str]) -> dict[str, str]:
    """Write every unit that a killed run has not written; SHA-256 of each, by name."""
    sums = _written(progress)
    found, by_rows = plan.found, layouts.cuts_rows(plan.found)
    target = layouts.create(plan.to, plan.partial, found.cfg, plan.dtypes, plan.shards, by_rows)
    workers, limit = _budget(plan)

    def pieces(unit: Unit) -> Iterator[np.ndarray]:
        for start, stop in _pieces(plan, unit, limit):
            piece = _read(plan, unit, start, stop)
            target.weights.write(unit, start, piece)
            yield piece

    def write(unit: Unit) -> tuple[Unit, str]:
        if (known := sums.get(unit.name)) is not None:  # trust nothing that a killed run left
            if _sum(target.weights.read(unit, *p) for p in _pieces(plan, unit, limit)) == known:
                target.done(unit)
                return unit, known
        done = _sum(pieces(unit))
        target.done(unit)
        return unit, done

    for unit, done in _in_parallel(write, plan, workers, "converting"):
        if sums.get(unit.name) != done:
            sums[unit.name] = done
            progress.write(json.dumps({"unit": unit.name, "sha256": done}) + "\n")
            progress.flush()
    target.finish()
    return sums


def _in_parallel(work: Any, plan: Plan, workers: int, title: str) -> Iterator[Any]:
    """Results of `work(unit)` as they come, with a bar in bytes; the first error stops the rest."""
    cfg = plan.found.cfg
    size = lambda unit: (
        int(np.prod(unit.shape(cfg), dtype=int)) * plan.dtypes[unit.row.path].itemsize
    )
    bar = tqdm(total=sum(map(size, units(cfg))), unit="B", unit_scale=True, desc=title, leave=False)
    with bar, concurrent.futures.ThreadPoolExecutor(workers) as pool:
        jobs = {pool.submit(work, unit): unit for unit in units(cfg)}
        try:
            for job in concurrent.futures.as_completed(jobs):
                yield job.result()
                bar.update(size(jobs[job]))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


# --- the folder ------------------------------------------------------------------------------------------------------


def _stamps(found: Found) -> list[list[Any]]:
    """Size and time of the source's files: a conversion is continued only from the same ones."""
    files = [found.files[0] / "_METADATA"] if found.kind == "orbax" else found.files
    return [[str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns] for f in files]


def _open_progress(plan: Plan) -> IO[str]:
    """The partial folder's record of finished units, locked; an older one of the same conversion is continued."""
    dtypes = {path: d.name for path, d in plan.dtypes.items()}
    this = {
        "from": _stamps(plan.found),
        "model": cf.to_dict(plan.found.cfg),
        "to": plan.to,
        "shards": plan.shards,
    }
    head = json.dumps(this | {"dtypes": dtypes, "format": 1})
    record = plan.partial / "progress.jsonl"
    if plan.partial.exists() and any(plan.partial.iterdir()) and not record.exists():
        raise ConvertError(f"{plan.partial} exists and is no unfinished conversion; remove it")
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
        print(
            f"{plan.partial} is of another conversion (source, settings or files differ): starting over"
        )
    for path in plan.partial.iterdir():
        if path != record:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    progress.truncate(0)
    progress.write(head + "\n")
    progress.flush()
    return progress


def _written(progress: IO[str]) -> dict[str, str]:
    """SHA-256 of the units that an earlier run finished, as it says."""
    sums = {}
    progress.seek(0)
    for line in progress.readlines()[1:]:
        try:
            entry = json.loads(line)
            sums[entry["unit"]] = entry["sha256"]
        except (ValueError, KeyError, TypeError):
            continue  # cut off when the run was killed
    progress.seek(0, os.SEEK_END)
    return sums


def _check_space(plan: Plan) -> None:
    there = sum(p.stat().st_blocks * 512 for p in plan.partial.rglob("*") if p.is_file())
    need = plan.num_bytes + plan.num_bytes // 100 + (16 << 20) - there
    free = shutil.disk_usage(plan.partial).free
    print(f"disk: {human(max(need, 0))} needed, {human(free)} free")
    if need > free:
        raise ConvertError(
            f"{plan.destination.absolute().parent} has {human(free)} free, {human(need)} are needed; free some space"
        )


def _write_settings(plan: Plan, sums: dict[str, str]) -> None:
    """The small files beside the weights."""
    found, folder = plan.found, plan.partial
    for path in found.extras:
        shutil.copyfile(path, folder / path.name)
    for tokenizer in found.tokenizers:
        name = "tokenizer.json" if tokenizer.kind == "tokenizer.json" else "tokenizer.model"
        shutil.copyfile(tokenizer.path, folder / name)
    model = cf.to_dict(found.cfg)
    if plan.to == "orbax":
        _dump(
            folder / "model.json",
            {"format": 1, "rotary_layout": "half", "model": model, "token_ids": found.ids},
        )
    elif plan.to == "meta":
        params, remarks = foreign.meta_from_model(found.cfg)
        _dump(folder / "params.json", params)
        print(*(f"note: {r}" for r in remarks), sep="\n")
    else:
        _write_hf_settings(plan)
    tensors: dict[str, Any] = {}
    for unit in units(found.cfg):
        row = unit.row
        shape = [found.cfg.num_layers] * row.stacked + list(found.cfg.shape(row.letters))
        entry = {
            "shape": shape,
            "dtype": plan.dtypes[row.path].name,
            "sha256": [] if row.stacked else "",
        }
        entry = tensors.setdefault(row.path, entry)
        entry["sha256"] += [sums[unit.name]] if row.stacked else sums[unit.name]
    about = "SHA-256 of each tensor's bytes, little-endian, in the layout of shape (stacked ones: one sum a layer)"
    _dump(
        folder / "manifest.json",
        {
            "format": 1,
            "about": about,
            "rotary_layout": "half",
            "model": model,
            "token_ids": found.ids,
            "tensors": tensors,
        },
    )


def _write_hf_settings(plan: Plan) -> None:
    found, folder = plan.found, plan.partial
    ids = dict(found.ids)
    config = foreign.hf_from_model(found.cfg, plan.dtypes["embed"].name, ids)
    _dump(folder / "config.json", config)
    if not (folder / "generation_config.json").exists():
        names = {f"{k}_token_id": v for k, v in ids.items()}
        _dump(folder / "generation_config.json", {"_from_model_config": True, **names})
    if not (folder / "tokenizer_config.json").exists():
        for tokenizer in found.tokenizers:
            if settings := foreign.hf_tokenizer_config(tokenizer, found.cfg.context):
                _dump(folder / "tokenizer_config.json", settings)
    if [t.kind for t in found.tokenizers] == ["tiktoken"]:
        print(
            "note: transformers needs a tokenizer.json for this tokenizer; tokenizer.model is carried along"
        )


def _dump(path: Path, tree: dict[str, Any]) -> None:
    path.write_text(json.dumps(tree, indent=1) + "\n", encoding="utf-8")


def _sync(folder: Path) -> None:
    """Bring the folder to the disk before it gets its name."""
    for path in [*folder.rglob("*"), folder]:
        file = os.open(path, os.O_RDONLY)
        os.fsync(file)
        os.close(file)


# --- checks ----------------------------------------------------------------------------------------------------------


def _verify(plan: Plan) -> None:
    """Open the result as anybody would and compare every bit with the source."""
    result = layouts.open_folder(plan.partial)
    if result.cfg != plan.found.cfg:
        given, now = cf.to_dict(plan.found.cfg), cf.to_dict(result.cfg)
        diff = [f"{k} is {now[k]}, was {given[k]}" for k in given if given[k] != now[k]]
        raise ConvertError(f"verify: the settings read back differ: {'; '.join(diff)}")
    workers, limit = _budget(plan)

    def compare(unit: Unit) -> str | None:
        same = all(
            _read(plan, unit, *p).tobytes() == result.weights.read(unit, *p).tobytes()
            for p in _pieces(plan, unit, limit)
        )
        return None if same else unit.name

    wrong = [name for name in _in_parallel(compare, plan, workers, "verifying") if name]
    if wrong:
        raise ConvertError(
            f"verify: these tensors differ from the source: {', '.join(sorted(wrong))}"
        )
    print(f"verified: {len(units(plan.found.cfg))} tensors equal the source bit for bit")


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m llama_jax.convert",
        description="Convert LLaMA weights between Meta, Hugging Face and Orbax, bit for bit, in bounded memory.",
    )
    parser.add_argument(
        "source", nargs="?", type=Path, help="folder of weights; its layout is recognised"
    )
    parser.add_argument("destination", nargs="?", type=Path, help="folder to make")
    parser.add_argument(
        "--to", choices=list(NAMES), help="layout to write (default: orbax, or hf from orbax)"
    )
    parser.add_argument(
        "--dtype", choices=["keep", *(d.name for d in FLOATS)], default="keep", help="of the result"
    )
    parser.add_argument(
        "--shards", type=int, metavar="N", help="files (default: Meta 1, Hugging Face 5 GB each)"
    )
    parser.add_argument(
        "--max-memory", type=_memory, default="2GiB", help="of this process (default: 2GiB)"
    )
    parser.add_argument(
        "--verify", action="store_true", help="read the result back and compare it with the source"
    )
    parser.add_argument(
        "--context",
        type=int,
        metavar="T",
        help="context length, which Meta's params.json does not say",
    )
    parser.add_argument(
        "--inspect", type=Path, metavar="PATH", help="say what a folder holds and what is odd"
    )
    args = parser.parse_args(argv)
    if (args.inspect is None) == (args.source is None) or (args.source is None) != (
        args.destination is None
    ):
        parser.error("give SOURCE and DESTINATION, or --inspect PATH")
    # No accelerator is needed, and starting one takes memory from a job that does.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    try:
        if args.inspect:
            print(describe(layouts.open_folder(args.inspect, args.context)))
        else:
            names = (
                "source",
                "destination",
                "to",
                "dtype",
                "shards",
                "max_memory",
                "verify",
                "context",
            )
            convert(**{n: getattr(args, n) for n in names})
    except OSError as e:
        hint = (
            "; the unfinished result continues when you start again"
            if e.errno == errno.ENOSPC
            else ""
        )
        print(f"error: {e.filename or ''}: {e.strerror or e}{hint}", file=sys.stderr)
        return 1
    except ValueError as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; the same command continues where this one was", file=sys.stderr)
        return 130
    return 0


def _memory(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", text, re.IGNORECASE)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is not an amount of memory like 2GiB")
    number, unit, binary = match.groups()
    return int(float(number) * (1024 if binary else 1000) ** "_KMGT".index(unit.upper() or "_"))


if __name__ == "__main__":
    sys.exit(main())
