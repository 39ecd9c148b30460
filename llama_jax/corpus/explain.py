"""What happened to a document: where it is kept, or which step dropped it and why."""

import difflib
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import zstandard

from llama_jax.corpus.manifest import MANIFEST, STARTED

KEYS = ("id", "url", "place")
LOGGED = (*KEYS, "step", "reason")
MAX_CANDIDATES = 1000


def explain(output: Path, wanted: str) -> str:
    """Says where a document is, or which step dropped it.

    Args:
        output: Folder of a corpus, complete or not.
        wanted: Its id, URL, or place in the input.

    Raises:
        ValueError: No such document; names similar ones.
    """
    if not any((output / name).is_file() for name in (STARTED, MANIFEST)):
        raise ValueError(f"{output} is not the folder of a corpus; give one for --output")
    found: list[str] = []
    similar: dict[str, None] = {}
    for path, record in _records(output):
        keys = [str(record[key]) for key in KEYS if record.get(key)]
        if wanted in keys:
            found.append(_sentence(path.relative_to(output), record))
        elif not found and len(similar) < MAX_CANDIDATES:
            similar |= {key: None for key in keys if _is_similar(key, wanted)}
    if found:
        return "\n".join(found)
    nearest = difflib.get_close_matches(wanted, list(similar), 3, cutoff=0)
    hint = f"; similar: {', '.join(nearest)}" if nearest else ""
    raise ValueError(f"{output} has no document with the id, URL or place {wanted!r}{hint}")


def _is_similar(key: str, wanted: str) -> bool:
    """A cheap test, since a corpus has many documents."""
    a, b = key.lower(), wanted.lower()
    return b in a or a in b or a.rpartition("/")[2] == b.rpartition("/")[2] or a[:-2] == b[:-2]


def _sentence(path: Path, record: dict[str, Any]) -> str:
    name = record["id"]
    if "reason" in record:
        stage, place = path.parts[1], record.get("place")
        where = f" ({place})" if place and place != name else ""
        details = "".join(f"; {key}: {record[key]}" for key in record if key not in LOGGED)
        step, reason = record["step"], record["reason"]
        return f"{name}{where}: dropped by step {step} of stage {stage}: {reason}{details}"
    return f"{name}: kept, {path}, document {record['number']}"


def _records(output: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The dropped and the kept documents of a corpus, without their text."""
    for path in sorted(output.glob("dropped/*/*.jsonl.zst")):
        for line in _lines(path):
            yield path, json.loads(line)
    for path in sorted(output.glob("documents/**/*.jsonl.zst")):
        for number, line in enumerate(_lines(path), 1):
            record = json.loads(line)
            place = record["metadata"].get("place")
            yield path, {"id": record["id"], "url": record["url"], "place": place, "number": number}
    for path in sorted(output.glob("documents/**/*.parquet")):
        from pyarrow import parquet

        rows = parquet.read_table(path, columns=["id", "url", "metadata"]).to_pylist()
        for number, row in enumerate(rows, 1):
            place = json.loads(row["metadata"]).get("place")
            yield path, {"id": row["id"], "url": row["url"], "place": place, "number": number}


def _lines(path: Path) -> Iterator[bytes]:
    with zstandard.open(path, "rb") as file:
        yield from io.BufferedReader(file)
