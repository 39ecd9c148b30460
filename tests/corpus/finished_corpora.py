"""Small finished corpora."""

import json
from pathlib import Path
from typing import Any

from corpus_tools import lines

from llama_jax.corpus.output import FORMATS


def write_corpus(
    folder: Path, files: dict[str, list[dict[str, Any]]], format: str = "jsonl"
) -> None:
    """A finished corpus: the documents of each file, such as "en/00000"."""
    file, suffix = FORMATS[format]
    entries = {}
    for name, documents in files.items():
        path = folder / f"documents/{name}{suffix}"
        default = {"source": folder.name, "url": None, "language": "en", "scores": {"length": 1.0}}
        with file(path) as writer:
            for document in documents:
                writer.write({**default, "metadata": {"title": "A"}, **document})
        size = sum(len(d["text"].encode()) for d in documents)
        entry = {"documents": len(documents), "text_bytes": size}
        entries[path.relative_to(folder).as_posix()] = entry
    manifest = {"corpus": 1, "source": folder.name, "files": entries}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def all_lines(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """By path below a folder, without suffix."""
    return {
        path.relative_to(folder).as_posix().removesuffix(".jsonl.zst"): lines(path)
        for path in sorted(folder.rglob("*.jsonl.zst"))
    }
