"""The conversion of a folder of weights: checks, copy, settings, manifest.

A killed conversion continues when it is started again. The result is renamed to its destination
only when it is complete.
"""

import contextlib
import errno
import json
import os
import resource
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

from llama_jax.checkpoint import file_hashes
from llama_jax.checkpoint.model_json import QUANTIZED, make_metadata, write_metadata
from llama_jax.convert import adapter_job, adapters, copy, gguf, huggingface, logits, meta, orbax
from llama_jax.convert.bucket import local_source, uploaded
from llama_jax.convert.copy import DamagedSourceError, Plan, format_bytes
from llama_jax.convert.describe import describe, describe_dtypes
from llama_jax.convert.detect import open_folder
from llama_jax.convert.formats import FLOATS, ConvertError, raise_if_any
from llama_jax.convert.sources import (
    NAMES,
    CheckpointWriter,
    Format,
    SourceCheckpoint,
    copy_small_files,
)
from llama_jax.convert.tensors import tensor_specs
from llama_jax.io import atomic_write, sync_folder
from llama_jax.storage.paths import ObjectPath, as_path, is_remote


def convert(
    source: str | Path,
    destination: str | Path,
    to: Format | Literal["peft"] | None = None,
    dtype: str = "keep",
    shards: int | None = None,
    max_memory: int = 2 << 30,
    verify: bool = False,
    context: int | None = None,
    quantize: str | None = None,
    base: str | Path | None = None,
    merge: bool = False,
    type: gguf.Kind | None = None,
    log: Callable[[str], None] | None = print,
) -> Path:
    """Convert weights between Meta, Hugging Face, Orbax and GGUF, bit for bit; or a LoRA adapter
    between our format and PEFT's, or merged into its base.

    Args:
      source: folder of weights in any of the formats, or of an adapter; or a GGUF file. From a
        bucket, it is copied to the user's cache folder.
      destination: folder to create; for GGUF, the file. In a bucket: it is written to the user's
        cache folder and uploaded.
      to: "meta", "hf", "orbax" or "gguf"; default: "orbax", or "hf" from "orbax". For an adapter
        "orbax" or "peft", default: the one that the source is not; merged, default: "orbax".
      dtype: "keep", "float16", "bfloat16" or "float32"; for "keep", quantized tensors of a GGUF
        file are float32.
      shards: number of files of a Meta or Hugging Face folder.
      max_memory: bytes that the conversion may use in addition to what this process uses now.
      verify: read the result back and compare it with the source.
      context: context length of a Meta folder, which has none.
      quantize: "int8" or "int4" for the matrices of the layers, in Orbax only.
      base: the weights that an adapter was trained on; default: the folder that it names.
      merge: write the base's weights with the adapter added.
      type: of the matrices in GGUF, "f32", "f16" (default), "bf16" or "q8_0".
      log: receives lines about the conversion; None: no output and no progress bar.

    Returns:
      The destination.

    Raises:
      ValueError: the source cannot be used, or the destination cannot be written as requested.
      OSError: a file cannot be read or written.
    """
    source, destination = local_source(as_path(source)), as_path(destination)
    if base is not None and is_remote(base):
        base = local_source(as_path(base))
    if isinstance(destination, ObjectPath):
        with uploaded(destination, log) as local:
            convert(source, local, to, dtype, shards, max_memory, verify, context, quantize, base,
                merge, type, log)  # fmt: skip
        return destination
    _check_destination(destination)
    max_memory += copy.resident_bytes()
    if to != "peft" and not (merge or base is not None or adapter_job.is_adapter(source)):
        opened = open_folder(source, context)
        plan = make_plan(opened, destination, to, dtype, shards, max_memory, quantize, type, log)
        return _run(plan, verify)
    options = {"dtype": dtype, "shards": shards, "quantize": quantize, "type": type}
    adapter_job.check_options(source, to, merge, options)
    place = adapter_job.base_folder(source, base, merge)
    opened_base = None if place is None else open_folder(place)
    adapter = adapter_job.open_adapter(source, opened_base, max_memory)
    if opened_base is None or not merge or to == "peft":
        name = None if base is None else str(base)
        adapter_job.write(adapter, destination, to, name, opened_base, verify, max_memory, log)
        return destination
    merged = adapters.merge_source(adapter, opened_base)
    plan = make_plan(
        merged, destination, to or "orbax", dtype, shards, max_memory, quantize, type, log
    )
    plan.log(adapter.describe())
    # What is quantized afterwards is merged in float32.
    dtypes = plan.dtypes if plan.quantize is None else {}
    weights = merged.weights = adapters.MergedWeights(merged.weights, adapter, dtypes)
    _run(plan, verify)
    if plan.quantize is None:
        plan.log(weights.rounding())
    return destination


def inspect(path: Path, context: int | None = None, base: str | Path | None = None) -> str:
    """The content of weights or of an adapter in lines of text; arguments as :func:`convert`."""
    path = local_source(as_path(path))
    if not adapter_job.is_adapter(path):
        return describe(open_folder(path, context))
    place = adapter_job.base_folder(path, base, merge=False)
    opened = None if place is None else open_folder(place)
    return adapter_job.open_adapter(path, opened).describe()


def _run(plan: Plan, verify: bool) -> Path:
    """Write what was planned, and read it back and compare it if `verify` is set."""
    start, opened = time.perf_counter(), plan.source
    if opened.format == "orbax":
        _check_hashes(opened)
    before = copy.file_stamps(opened)
    plan.log(describe(opened))
    size, what = format_bytes(plan.num_bytes), describe_dtypes(plan.dtypes, plan.quantize)
    plan.log(f"writing: {plan.destination} ({NAMES[plan.to]}), {size}, {what}")
    _check_disk(plan)
    with copy.open_progress(plan) as progress, _handle_errors(plan):
        digests = copy.write_weights(plan, create_writer(plan), progress)
        if plan.to != "gguf":  # its header has the settings and the tokenizer
            _write_small_files(plan, digests)
        if copy.file_stamps(opened) != before:
            raise ConvertError(f"{opened.path} changed during the conversion; start again")
        if verify:
            _verify(plan)
        copy.sync(plan.partial)
        (plan.partial / "progress.jsonl").unlink()
    if plan.to == "gguf":
        (plan.partial / plan.destination.name).rename(plan.destination)
        plan.partial.rmdir()
        sync_folder(plan.destination.absolute().parent)
    else:
        copy.rename(plan.partial, plan.destination)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    sums = "" if plan.to == "gguf" else ", SHA-256 of every tensor in manifest.json"
    plan.log(
        f"done: {plan.destination}, {size} in {seconds:.1f} s "
        f"({format_bytes(plan.num_bytes / seconds)}/s), peak memory {format_bytes(peak)}{sums}"
    )
    return plan.destination


def make_plan(
    source: SourceCheckpoint,
    destination: Path,
    to: Format | None = None,
    dtype: str = "keep",
    shards: int | None = None,
    max_memory: int = 2 << 30,
    quantize: str | None = None,
    type: gguf.Kind | None = None,
    log: Callable[[str], None] | None = print,
) -> Plan:
    """Decide what is written. Arguments as in :func:`convert`, but `max_memory` limits the whole
    process.

    Raises:
      ConvertError: the source cannot be written as requested.
    """
    cfg = source.cfg
    if source.quantize is not None:
        raise ConvertError(
            f"{source.path} holds matrices in {source.quantize}, which cannot be turned back into "
            "the original weights: convert those instead"
        )
    to = to or ("hf" if source.format == "orbax" and quantize is None else "orbax")
    if to not in NAMES:
        raise ConvertError(f"to={to!r} must be 'meta', 'hf', 'orbax' or 'gguf'")
    if to == "gguf":
        return _gguf_plan(source, destination, type or "f16", dtype, shards, max_memory, quantize,
            log)  # fmt: skip
    if type is not None or destination.suffix == ".gguf":
        raise ConvertError("a GGUF file, or --type, needs --to gguf")
    floats = {d.name: d for d in FLOATS}
    if dtype not in ("keep", *floats):
        raise ConvertError(f"dtype={dtype!r} must be one of 'keep', {', '.join(map(repr, floats))}")
    if quantize is not None and quantize not in QUANTIZED:
        raise ConvertError(f"quantize={quantize!r} must be 'int8' or 'int4'")
    if quantize is not None and to != "orbax":
        raise ConvertError(f"--quantize is for Orbax; {NAMES[to]} files cannot hold it")
    if shards is not None and to == "orbax":
        raise ConvertError(
            "--shards is for Meta and Hugging Face; Orbax fits any number of devices"
        )
    if shards is not None and shards < 1:
        raise ConvertError(f"--shards {shards} must be at least 1")
    if to == "hf":
        huggingface.check_writable(cfg, shards)
    if to == "meta":
        meta.check_writable(cfg, shards, meta.splits_vocab(source))
    dtypes = source.dtypes()
    if dtype != "keep":
        dtypes = dict.fromkeys(dtypes, floats[dtype])
    dtypes = {s.path: s.quantized_dtype or dtypes[s.path] for s in tensor_specs(cfg, quantize)}
    plan = Plan(
        source, destination, to, dtypes, shards, max_memory, quantize, log or _no_log,
        progress_bar=log is not None,
    )  # fmt: skip
    copy.memory_budget(plan)
    return plan


def _gguf_plan(
    source: SourceCheckpoint, destination: Path, kind: gguf.Kind, dtype: str, shards: int | None,
    max_memory: int, quantize: str | None, log: Callable[[str], None] | None,
) -> Plan:  # fmt: skip
    """As :func:`make_plan`, for a file with matrices of this kind."""
    if kind not in gguf.KINDS:
        raise ConvertError(f"type={kind!r} must be one of {', '.join(map(repr, gguf.KINDS))}")
    if (dtype, shards, quantize) != ("keep", None, None):
        raise ConvertError("--dtype, --shards and --quantize are not for GGUF; it has --type")
    if destination.is_dir():
        raise ConvertError(f"{destination} is a folder; give the name of a file to create")
    gguf.check_writable(source, kind)
    quantized = "Q8_0" if kind == "q8_0" else None
    specs = tensor_specs(source.cfg, quantized)
    dtypes = {spec.path: gguf.written_dtype(spec, kind) for spec in specs}
    plan = Plan(
        source, destination, "gguf", dtypes, None, max_memory, quantized, log or _no_log,
        progress_bar=log is not None,
    )  # fmt: skip
    copy.memory_budget(plan)
    return plan


def _no_log(line: str) -> None:
    pass


def create_writer(plan: Plan) -> CheckpointWriter:
    """Create the files of the result in the partial folder; those of a killed run are kept."""
    cfg, folder = plan.source.cfg, plan.partial
    if plan.to == "meta":
        by_vocab = meta.splits_vocab(plan.source)
        return meta.create_writer(folder, cfg, plan.dtypes, plan.shards or 1, by_vocab)
    if plan.to == "hf":
        return huggingface.create_writer(folder, cfg, plan.dtypes, plan.shards)
    if plan.to == "gguf":
        return gguf.create_writer(folder / plan.destination.name, plan.source, plan.dtypes)
    return orbax.create_writer(folder, cfg, plan.dtypes, plan.quantize)


# Checks -------------------------------------------------------------------------------------------


def _check_destination(destination: Path) -> None:
    """Refuse destinations to which the result could not be renamed at the end."""
    if destination.name in ("", ".."):
        raise ConvertError(f"destination {destination}: give the name of a folder to create")
    if destination.is_symlink():
        raise ConvertError(
            f"{destination} is a link to {destination.readlink()}; give the folder itself, or "
            "another name"
        )
    if os.path.ismount(destination):
        raise ConvertError(f"{destination} is a mount point; give the name of a folder in it")
    if destination.exists() and not (destination.is_dir() and not any(destination.iterdir())):
        raise ConvertError(f"{destination} exists; remove it or choose another name")
    parent = destination.absolute().parent
    if not parent.is_dir():
        raise ConvertError(f"{parent} does not exist; create it first")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise ConvertError(f"{parent} is not writable by this user; choose another place")


def _check_hashes(source: SourceCheckpoint) -> None:
    """Compare the files of one of our checkpoints with their SHA-256 before they are read."""
    step = source.files[0].parent
    root = step.parents[1]
    files = file_hashes.listed_files(root, int(step.name), "model")
    raise_if_any(file_hashes.find_problems(root, files))


def _check_disk(plan: Plan) -> None:
    written = sum(p.stat().st_blocks * 512 for p in plan.partial.rglob("*") if p.is_file())
    need = max(0, plan.num_bytes + plan.num_bytes // 100 + (16 << 20) - written)
    parent = plan.destination.absolute().parent
    free = shutil.disk_usage(parent).free
    plan.log(f"disk: {format_bytes(need)} needed, {format_bytes(free)} free")
    if need > free:
        raise ConvertError(
            f"{parent} has {format_bytes(free)} free, {format_bytes(need)} are needed; free some "
            "space"
        )


@contextlib.contextmanager
def _handle_errors(plan: Plan) -> Iterator[None]:
    """Name the folder when the disk is full; remove the result of a damaged source."""
    try:
        yield
    except DamagedSourceError:
        shutil.rmtree(plan.partial, ignore_errors=True)
        raise
    except (OSError, ValueError) as e:
        full = isinstance(e, OSError) and e.errno in (errno.ENOSPC, errno.EDQUOT)
        reason = os.strerror(errno.ENOSPC)
        if not full and reason not in str(e):  # tensorstore raises ValueError
            raise
        raise OSError(errno.ENOSPC, reason, str(plan.partial)) from e


def _verify(plan: Plan) -> None:
    place = plan.partial / plan.destination.name if plan.to == "gguf" else plan.partial
    result, count = open_folder(place), len(plan.tensors)
    copy.verify(plan, result)
    if plan.quantize is None:
        plan.log(f"verified: {count} tensors equal the source bit for bit")
        compared = logits.compare_logits(plan.source, result, plan.dtypes, plan.max_memory)
    else:
        plan.log(f"verified: {count} tensors equal the source's in {plan.quantize}, bit for bit")
        # The settings are the source's, so the logits of its unquantized weights are compared.
        dtypes = plan.source.dtypes()
        compared = logits.compare_logits(plan.source, plan.source, dtypes, plan.max_memory)
        compared = f"the source's {compared}"
    plan.log(f"{'note' if 'not compared' in compared else 'verified'}: {compared}")


# Small files --------------------------------------------------------------------------------------

_WEIGHT_FILES = (".pth", ".safetensors", ".safetensors.index.json", "progress.jsonl")


def _write_small_files(plan: Plan, digests: dict[str, str]) -> None:
    """Write settings, tokenizer and manifest; those of an earlier run are removed first."""
    source, folder = plan.source, plan.partial
    for path in folder.iterdir():
        if path.is_file() and not path.name.endswith(_WEIGHT_FILES):
            path.unlink()
    copy_small_files(source, folder)
    metadata = make_metadata(source.cfg, source.token_ids, plan.quantize, lineage=source.lineage)
    trees = {}
    if plan.to == "orbax":
        write_metadata(folder, metadata)
    elif plan.to == "meta":
        trees = {"params.json": meta.make_params(source.cfg)}
        plan.log(
            f"note: params.json cannot hold the context ({source.cfg.context}); manifest.json does"
        )
    else:
        trees, warnings = huggingface.small_files(source, plan.dtypes["embed"].name)
        for warning in warnings:
            plan.log(f"note: {warning}")
    for name, tree in trees.items():
        content = json.dumps(tree, indent=1, ensure_ascii=False) + "\n"
        atomic_write(folder / name, content.encode())
    tensors = {
        "sums": "SHA-256 of each tensor's little-endian bytes, laid out as `shape`; stacked "
        "tensors have one sum per layer",
        "tensors": _tensor_entries(plan, digests),
    }
    names = set(file_hashes.files_below(folder)) - {file_hashes.MANIFEST, "progress.jsonl"}
    files = file_hashes.hash_files(folder, names)
    file_hashes.write_list(folder / file_hashes.MANIFEST, metadata | tensors | {"files": files})


def _tensor_entries(plan: Plan, digests: dict[str, str]) -> dict[str, Any]:
    entries: dict[str, Any] = {}
    cfg = plan.source.cfg
    for tensor in plan.tensors:
        spec = tensor.spec
        shape = [cfg.num_layers] * spec.stacked + list(spec.shape(cfg))
        new = {"shape": shape, "dtype": plan.dtypes[spec.path].name, "sha256": []}
        entries.setdefault(spec.path, new)["sha256"].append(digests[tensor.name])
    return entries
