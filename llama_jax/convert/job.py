"""Convert weights between Meta, Hugging Face and our Orbax checkpoints, bit for bit.

In comes a folder in any of the three layouts, recognised by its content; out goes a new folder in
another, with the tokenizer and a manifest of SHA-256 sums. Memory is bounded whatever the size, and
torch is not needed. A killed run continues when it is started again; the folder has its name only
when it is whole.

    python -m llama_jax.convert SOURCE DESTINATION [--to orbax|hf|meta] [--dtype D] [--verify]
    python -m llama_jax.convert --inspect PATH
"""

import argparse
import contextlib
import errno
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
from typing import Any

import numpy as np

from llama_jax import config as cf
from llama_jax.checkpoint.file_hashes import (
    MANIFEST,
    files_below,
    find_problems,
    hash_files,
    listed_files,
    write_list,
)  # fmt: skip
from llama_jax.convert import foreign, layouts, targets, transfer
from llama_jax.convert import logits as verification
from llama_jax.convert.layouts import FLOATS, NAMES, Found, Kind, changed
from llama_jax.convert.quantised import dtype_of
from llama_jax.convert.tensors import rows_of
from llama_jax.convert.transfer import ConvertError, Plan, human
from llama_jax.data import tokenizer_files
from llama_jax.io import atomic_write, sync_folder
from llama_jax.model.quantize import KINDS


def convert(
    source: Path,
    destination: Path,
    to: Kind | None = None,
    dtype: str = "keep",
    shards: int | None = None,
    max_memory: int = 2 << 30,
    verify: bool = False,
    context: int | None = None,
    quantize: str | None = None,
) -> Path:
    """Convert a folder of weights; returns the destination. Arguments as the command line's, but
    `max_memory`: bytes that conversion may add to what this process holds when it is called.

    Raises:
      ValueError: the source cannot be used, or the destination not be written as asked.
      OSError: a file cannot be read or written.
    """
    start = time.perf_counter()
    _check_destination(Path(destination))
    found = layouts.open_folder(Path(source), context)
    if found.kind == "orbax":
        _check_hashes(found)
    max_memory += transfer.resident()
    plan = make_plan(found, Path(destination), to, dtype, shards, max_memory, quantize)
    before = transfer.stamps(found)
    print(describe(found))
    size = plan.num_bytes
    what = _kinds(plan.dtypes, quantize)
    print(f"writing: {plan.destination} ({NAMES[plan.to]}), {human(size)}, {what}")
    _check_space(plan)
    with transfer.open_progress(plan) as progress, _clear_errors(plan):
        sums = transfer.write_weights(plan, progress)
        _write_settings(plan, sums)
        if transfer.stamps(found) != before:
            raise ConvertError(f"{source} changed while it was being converted; start again")
        if verify:
            _verify(plan)
        _sync(plan.partial)
        (plan.partial / "progress.jsonl").unlink()
    if plan.destination.exists():
        plan.destination.rmdir()  # empty when the run started; otherwise this fails
    plan.partial.rename(plan.destination)
    sync_folder(plan.destination.absolute().parent)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(
        f"done: {plan.destination}, {human(size)} in {seconds:.1f} s ({human(size / seconds)}/s), "
        f"peak memory {human(peak)}, SHA-256 of every tensor in manifest.json"
    )
    return plan.destination


def _check_destination(destination: Path) -> None:
    """Refuse, before any work, what could not be given its name at the end."""
    if destination.name in ("", ".."):
        raise ConvertError(f"destination {destination}: give the name of a folder to make")
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
        raise ConvertError(f"{parent} does not exist; make it first")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise ConvertError(f"{parent} is not writable by this user; choose another place")


@contextlib.contextmanager
def _clear_errors(plan: Plan) -> Iterator[None]:
    """A full disk is reported with the folder that filled it; what was made of a damaged source is
    removed."""
    try:
        yield
    except transfer.DamagedSourceError:
        shutil.rmtree(plan.partial, ignore_errors=True)
        raise
    except (OSError, ValueError) as e:
        full = isinstance(e, OSError) and e.errno in (errno.ENOSPC, errno.EDQUOT)
        if not full and os.strerror(errno.ENOSPC) not in str(e):  # as tensorstore reports it
            raise
        reason = os.strerror(errno.ENOSPC)
        raise OSError(errno.ENOSPC, reason, str(plan.partial)) from e


def _verify(plan: Plan) -> None:
    result, count = transfer.verify(plan), len(plan.units)
    if plan.quantize is None:
        print(f"verified: {count} tensors equal the source bit for bit")
        said = verification.compare_logits(plan.found, result, plan.dtypes, plan.max_memory)
    else:
        print(f"verified: {count} tensors are the source's in {plan.quantize}, bit for bit")
        # The settings are the source's; before rounding, its logits are transformers' or not.
        dtypes = plan.found.dtypes()
        said = verification.compare_logits(plan.found, plan.found, dtypes, plan.max_memory)
        said = f"the source's {said}"
    print(f"verified: {said}")


def make_plan(
    found: Found,
    destination: Path,
    to: Kind | None,
    dtype: str,
    shards: int | None,
    max_memory: int,
    quantize: str | None = None,
) -> Plan:
    """Settle what will be written; raises ValueError for what cannot be, before any work."""
    if found.quantize is not None:
        raise ConvertError(
            f"{found.path} holds matrices in {found.quantize}, which cannot be turned back into "
            "what they were made of: convert that instead"
        )
    to = to or ("hf" if found.kind == "orbax" and quantize is None else "orbax")
    if quantize is not None and quantize not in KINDS:
        raise ConvertError(f"quantize={quantize!r}: there are 'int8' and 'int4'")
    if quantize is not None and to != "orbax":
        raise ConvertError(f"--quantize is for Orbax; {NAMES[to]} files hold whole weights")
    targets.check_shards(to, found.cfg, shards, targets.cuts_rows(found))
    dtypes = found.dtypes()
    if dtype != "keep":
        dtypes = dict.fromkeys(dtypes, next(d for d in FLOATS if d.name == dtype))
    rows = rows_of(found.cfg, quantize)
    dtypes = {r.path: dtypes[r.path] if r.quantized is None else dtype_of(r) for r in rows}
    plan = Plan(found, destination, to, dtypes, shards, max_memory, quantize)
    transfer.budget(plan)
    if to == "hf":
        foreign.hf_from_model(found.cfg, "float32", {})
    if to == "meta":
        foreign.meta_from_model(found.cfg)
    return plan


def _kinds(dtypes: dict[str, np.dtype], quantize: str | None) -> str:
    if quantize is not None:
        whole = {path: d for path, d in dtypes.items() if not path.endswith(("/q", "/scale"))}
        return f"the layers' matrices {quantize}, all else {_kinds(whole, None)}"
    return " and ".join(n for n, _ in Counter(d.name for d in dtypes.values()).most_common())


def describe(found: Found) -> str:
    """What a folder holds, in lines for a person."""
    cfg = found.cfg
    known = [n for n, m in cf.MODELS.items() if changed(m, context=cfg.context) == cfg]
    rope = {k: v for k, v in cf.to_dict(cfg.rope).items() if v is not None}
    lines = [
        f"found: {found.path}: {NAMES[found.kind]} layout, {len(found.files)} file(s)",
        f"  model: {cfg.num_params:,} parameters, {_kinds(found.dtypes(), found.quantize)}"
        + (f", as {known[0]}" if known else ""),
        f"  sizes: vocab {cfg.vocab_size}, dim {cfg.dim}, layers {cfg.num_layers}, "
        f"heads {cfg.num_heads} (kv {cfg.num_kv_heads}) of {cfg.head_dim}, "
        f"feed-forward {cfg.ffn_dim}, context {cfg.context}, norm_eps {cfg.norm_eps:g}, "
        f"embeddings {'tied' if cfg.tie_embeddings else 'not tied'}",
        f"  rope: {', '.join(f'{k} {v}' for k, v in rope.items())}",
    ]
    lines += [f"  tokenizer: {t.path} ({t.kind}, {t.size} tokens)" for t in found.tokenizers]
    if found.ids:
        lines.append("  token ids: " + ", ".join(f"{k} {v}" for k, v in found.ids.items()))
    return "\n".join(lines + [f"  note: {r}" for r in found.remarks])


def _check_space(plan: Plan) -> None:
    there = sum(p.stat().st_blocks * 512 for p in plan.partial.rglob("*") if p.is_file())
    need = max(0, plan.num_bytes + plan.num_bytes // 100 + (16 << 20) - there)
    parent = plan.destination.absolute().parent
    free = shutil.disk_usage(parent).free
    print(f"disk: {human(need)} needed, {human(free)} free")
    if need > free:
        raise ConvertError(
            f"{parent} has {human(free)} free, {human(need)} are needed; free some space"
        )


# --- the small files ---

_NOT_LISTED = (MANIFEST, "progress.jsonl")


def _write_settings(plan: Plan, sums: dict[str, str]) -> None:
    """Settings, tokenizer and manifest beside the weights; all anew, whatever an earlier run left
    of them."""
    found, folder = plan.found, plan.partial
    _remove_small_files(folder)
    for path in found.extras:
        atomic_write(folder / path.name, path.read_bytes())
    for tokenizer in found.tokenizers:
        name = "tokenizer.json" if tokenizer.kind == "tokenizer.json" else "tokenizer.model"
        atomic_write(folder / name, tokenizer.path.read_bytes())
    about = {"format": 1, "rotary_layout": "half", "model": cf.to_dict(found.cfg)}
    about["token_ids"] = found.ids
    if plan.quantize is not None:
        about["quantize"] = plan.quantize
    if plan.to == "orbax":
        _dump(folder / "model.json", about)
    elif plan.to == "meta":
        params, remarks = foreign.meta_from_model(found.cfg)
        _dump(folder / "params.json", params)
        print(*(f"note: {r}" for r in remarks), sep="\n")
    else:
        _write_hf_settings(plan)
    sums_of = (
        "SHA-256 of each tensor's little-endian bytes, laid out as `shape`; stacked tensors have "
        "one sum a layer"
    )
    files = hash_files(folder, (n for n in files_below(folder) if n not in _NOT_LISTED))
    tensors = {"sums": sums_of, "tensors": _manifest(plan, sums)}
    write_list(folder / MANIFEST, about | tensors | {"files": files})


def _check_hashes(found: Found) -> None:
    """Compare one of our checkpoints, before it is read, with what was written."""
    step = found.files[0].parent
    root = step.parents[1]
    problems = find_problems(root, listed_files(root, int(step.name), "model"))
    if problems:
        raise ConvertError("\n".join(problems))


def _remove_small_files(folder: Path) -> None:
    kept = (".pth", ".safetensors", ".safetensors.index.json", "progress.jsonl")
    for path in folder.iterdir():
        if path.is_file() and not path.name.endswith(kept):
            path.unlink()


def _manifest(plan: Plan, sums: dict[str, str]) -> dict[str, Any]:
    tensors: dict[str, Any] = {}
    cfg = plan.found.cfg
    for unit in plan.units:
        row = unit.row
        shape = [cfg.num_layers] * row.stacked + list(row.shape(cfg))
        fresh = {"shape": shape, "dtype": plan.dtypes[row.path].name, "sha256": []}
        tensors.setdefault(row.path, fresh)["sha256"].append(sums[unit.name])
    return tensors


def _write_hf_settings(plan: Plan) -> None:
    found, folder = plan.found, plan.partial
    given = {path.name for path in found.extras}
    config = foreign.hf_from_model(found.cfg, plan.dtypes["embed"].name, found.ids)
    _dump(folder / "config.json", config)
    if "generation_config.json" not in given:
        names = {f"{k}_token_id": v for k, v in found.ids.items()}
        _dump(folder / "generation_config.json", {"_from_model_config": True, **names})
    meta = next((t for t in found.tokenizers if t.kind != "tokenizer.json"), None)
    if meta is None:
        return
    exact = len(found.tokenizers) > 1 or _write_hf_tokenizer(plan, meta)
    if "tokenizer_config.json" not in given:
        settings = tokenizer_files.hf_settings(meta, found.cfg.context, exact)
        _dump(folder / "tokenizer_config.json", settings)


def _write_hf_tokenizer(plan: Plan, tokenizer: tokenizer_files.TokenizerFile) -> bool:
    """Write ``tokenizer.json`` for a tokenizer of Meta's; whether there is one."""
    try:
        tree = tokenizer_files.hf_json(tokenizer, plan.found.cfg.rope.type == "llama3")
    except ValueError as e:
        print(
            f"note: no tokenizer.json made of {tokenizer.path}: {e}; what transformers makes of it "
            "may give other ids"
        )
        return False
    _dump(plan.partial / "tokenizer.json", tree)
    return True


def _dump(path: Path, tree: dict[str, Any]) -> None:
    content = json.dumps(tree, indent=1, ensure_ascii=False) + "\n"
    atomic_write(path, content.encode())


def _sync(folder: Path) -> None:
    """Bring the folder to the disk before it gets its name."""
    for path in [*folder.rglob("*"), folder]:
        file = os.open(path, os.O_RDONLY)
        os.fsync(file)
        os.close(file)


# --- the command line ---


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = _parser()
    args = parser.parse_args(argv)
    if (args.inspect is None) == (args.destination is None):
        parser.error("give SOURCE and DESTINATION, or --inspect PATH")
    # No accelerator is needed, and starting one takes memory from a job that does.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    try:
        if args.inspect:
            print(describe(layouts.open_folder(args.inspect, args.context)))
        else:
            args.max_memory -= transfer.resident()  # given for the whole process
            convert(**{k: v for k, v in vars(args).items() if k != "inspect"})
    except OSError as e:
        hint = "; the same command continues here" if e.errno == errno.ENOSPC else ""
        place = f"{e.filename}: " if e.filename else ""
        print(f"error: {place}{e.strerror or e}{hint}", file=sys.stderr)
        return 1
    except ValueError as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    except MemoryError as e:
        print(f"error: out of memory: {e}; give a smaller --max-memory", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; the same command continues where this one was", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m llama_jax.convert",
        description="Convert LLaMA weights between Meta, Hugging Face and Orbax, bit for bit.",
    )
    arg = parser.add_argument
    arg("source", nargs="?", type=Path, help="folder of weights; its layout is recognised")
    arg("destination", nargs="?", type=Path, help="folder to make")
    arg("--to", choices=list(NAMES), help="what to write (default: orbax, or hf from orbax)")
    kinds = ["keep", *(d.name for d in FLOATS)]
    arg("--dtype", choices=kinds, default="keep", help="of the result (default: keep)")
    arg("--quantize", choices=KINDS, help="the layers' matrices in 8 or 4 bits (Orbax only)")
    arg("--shards", type=int, metavar="N", help="files (default: Meta 1, HF at most 5 GB each)")
    arg("--max-memory", type=_memory, default="2GiB", help="of this process (default: 2GiB)")
    arg("--verify", action="store_true", help="read the result back, compare it with the source")
    arg("--context", type=int, metavar="T", help="context, which Meta's params.json does not say")
    arg("--inspect", type=Path, metavar="PATH", help="say what a folder holds and what is odd")
    return parser


def _memory(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", text, re.IGNORECASE)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is not an amount of memory like 2GiB")
    number, prefix, binary = match.groups()
    return int(float(number) * (1024 if binary else 1000) ** "_KMGT".index(prefix.upper() or "_"))
