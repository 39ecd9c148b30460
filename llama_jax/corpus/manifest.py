"""The record of a corpus: what it was made from (``work/run.json``), and ``manifest.json``.

The manifest is written last, so a corpus without it is not complete. It has no dates and no paths
of the machine: two runs give the same bytes.
"""

import importlib.metadata
import json
import platform
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pydantic

from llama_jax.corpus.executors import counts_of
from llama_jax.corpus.run import Run
from llama_jax.corpus.steps import Stage, Step
from llama_jax.io import atomic_write, read_json, read_json_or_empty, sha256
from llama_jax.versions import source_version

MANIFEST = "manifest.json"
STARTED = "work/run.json"
VERSION = 1
MAX_BYTES = 1 << 30  # of JSON; a corpus from a million files has a manifest of 150 MB
# Packages of the extra whose versions can change the output.
PACKAGES = (
    "datatrove", "fasttext-numpy2-wheel", "lxml", "nltk", "py7zr", "pyarrow",
    "spacy", "tokenizers", "trafilatura", "ufal-kenlm", "warcio", "zstandard",
)  # fmt: skip


def made_from(run: Run, inputs: list[dict[str, Any]], models: Iterable[Path]) -> dict[str, Any]:
    """Everything that determines the output of a run.

    Args:
        run: The run.
        inputs: Result of `inputs.hash_inputs`.
        models: Model files that the source reads.
    """
    settings = pydantic.TypeAdapter(type(run.settings)).dump_python(run.settings, mode="json")
    return {
        "source": run.source,
        "settings": {**settings, "format": run.format},
        "languages": list(run.languages),
        "inputs": inputs,
        "models": {_name(path, run.models): sha256(path) for path in models},
        "versions": versions(),
    }


def _name(path: Path, folder: Path) -> str:
    path = path.resolve()
    return path.relative_to(folder).as_posix() if path.is_relative_to(folder) else path.name


def versions() -> dict[str, str]:
    """Versions of what can change the output."""
    python = ".".join(platform.python_version_tuple()[:2])
    found = {"llama_jax": source_version(), "python": python}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def check_output(output: Path) -> None:
    """Checks that a folder is new, empty, or has a corpus.

    Raises:
        ValueError: It is something else.
    """
    if output.exists() and not output.is_dir():
        raise ValueError(f"{output} is a file; give a folder for --output")
    if not output.is_dir() or (output / STARTED).is_file() or (output / MANIFEST).is_file():
        return
    others = sorted({path.name for path in output.iterdir()} - {".lock", "work"})
    if others:
        raise ValueError(
            f"{output} has other files ({', '.join(others[:3])}) and is not a corpus of this "
            "command; give another folder for --output"
        )


def changes(output: Path, new: dict[str, Any]) -> list[str]:
    """What differs between ``new`` and what the corpus in a folder was made, or started, from."""
    if (output / MANIFEST).is_file():
        old = read_manifest(output)["made_from"]
    else:
        old = read_json_or_empty(output / STARTED, MAX_BYTES)
    return list(_changes(old, new)) if old else []


def _changes(old: Any, new: Any, name: str = "") -> Iterable[str]:
    if old == new:
        return
    if isinstance(old, list) and name == "inputs":
        by_name = [{entry.pop("name"): entry for entry in map(dict, side)} for side in (old, new)]
        for file in sorted({*by_name[0], *by_name[1]}):
            before, after = (side.get(file) for side in by_name)
            if before != after:
                what = "is new" if not before else "is missing" if not after else "has changed"
                yield f"input {file} {what}"
    elif isinstance(old, dict) and isinstance(new, dict):
        for key in [*old, *(key for key in new if key not in old)]:
            inner = key if name in ("", "settings") else f"{name}.{key}"
            if key in old and key in new:
                yield from _changes(old[key], new[key], inner)
            else:
                yield f"{inner} {'is new' if key in new else 'is missing'}"
    else:
        yield f"{name} was {_short(old)} and is now {_short(new)}"


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


def write_manifest(run: Run, stages: Sequence[Stage], origin: dict[str, Any]) -> dict[str, Any]:
    """Writes the manifest of a complete run, and returns it.

    Args:
        run: The run.
        stages: Its stages, all complete.
        origin: What `made_from` returned.
    """
    described = [_describe(run, stage) for stage in stages]
    final = next(stage for stage, of in zip(described, stages, strict=True) if of.final)
    manifest = {
        "corpus": VERSION,
        "source": run.source,
        **{key: final[key] for key in ("documents", "characters", "text_bytes")},
        "made_from": origin,
        "stages": [{k: v for k, v in stage.items() if k != "files"} for stage in described],
        "notes": {
            path.stem: json.loads(path.read_bytes())
            for path in sorted(run.folder("notes").iterdir())
        },
        "files": final["files"],
    }
    content = json.dumps(manifest, indent=1, ensure_ascii=False) + "\n"
    atomic_write(run.output / MANIFEST, content.encode())
    return manifest


def _describe(run: Run, stage: Stage) -> dict[str, Any]:
    """Counts of a stage in and out of each step, and its files."""
    total: Counter[str] = Counter()
    dropped: dict[str, Counter[str]] = {}
    files: dict[str, Any] = {}
    for rank in range(stage.tasks):
        counts = read_json(counts_of(run.output / "counts" / stage.name, rank))
        total.update({key: counts[key] for key in ("read", "written", "characters", "text_bytes")})
        files |= {f"documents/{name}": entry for name, entry in counts["files"].items()}
        for step, reasons in counts["dropped"].items():
            dropped.setdefault(step, Counter()).update(reasons)
    steps, now = [], total["read"]
    names = [step.name for step in stage.steps if isinstance(step, Step)]
    of_reader = sorted(dropped.keys() - {"read", *names})  # such as the joining of posts
    for name in ["read", *of_reader, *names]:
        reasons = dropped.pop(name, Counter())
        steps.append({"step": name, "in": now, "out": now - reasons.total()})
        if reasons:
            steps[-1]["dropped"] = dict(sorted(reasons.items(), key=lambda r: (-r[1], r[0])))
        now -= reasons.total()
    return {
        "stage": stage.name,
        "tasks": stage.tasks,
        "documents": total["written"],
        "characters": total["characters"],
        "text_bytes": total["text_bytes"],
        "steps": steps,
        "files": files,
    }


def read_manifest(output: Path) -> dict[str, Any]:
    """The manifest of a complete corpus.

    Raises:
        ValueError: There is none, or it is damaged.
    """
    path = output / MANIFEST
    if not path.is_file():
        started = (output / STARTED).is_file()
        hint = "the corpus is not complete: continue its command" if started else "not a corpus"
        raise ValueError(f"{output} has no {MANIFEST}; {hint}")
    manifest = read_json(path, MAX_BYTES)
    if manifest.get("corpus") != VERSION:
        raise ValueError(f"{path} is not the manifest of a corpus of this version ({VERSION})")
    return manifest


def table(manifest: dict[str, Any]) -> str:
    """The counts of a manifest as text for a terminal."""
    rows = [("stage", "step", "in", "out", "dropped", "most frequent reasons")]
    for stage in manifest["stages"]:
        for step in stage["steps"]:
            reasons = step.get("dropped", {})
            why = ", ".join(f"{reason} ({n:,})" for reason, n in list(reasons.items())[:3])
            why += ", ..." if len(reasons) > 3 else ""
            numbers = (f"{n:,}" for n in (step["in"], step["out"], step["in"] - step["out"]))
            rows.append((stage["stage"], step["step"], *numbers, why))
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    pad = lambda cell, i: cell.ljust(widths[i]) if i < 2 else cell.rjust(widths[i])
    lines = ["  ".join([*(pad(row[i], i) for i in range(5)), row[5]]).rstrip() for row in rows]
    return "\n".join(lines)
