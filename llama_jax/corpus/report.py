"""Table 1 of the LLaMA paper for one's own corpora: share, epochs, size, documents and tokens."""

import argparse
import itertools
import json
import sys
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from llama_jax.config import load_recipe, recipes_folder
from llama_jax.corpus.finished import corpora
from llama_jax.corpus.output import read_records
from llama_jax.corpus.report_chart import save_chart
from llama_jax.data.tokenizer import Tokenizer
from llama_jax.io import atomic_write, sha256

PAPER = "LLaMA (arXiv 2302.13971), table 1"
PUBLISHED_TOKENS = 1.4e12
PUBLISHED = {
    "commoncrawl": (1.10, 3.3e12),
    "c4": (1.06, 783e9),
    "github": (0.64, 328e9),
    "wikipedia": (2.45, 83e9),
    "books": (2.23, 85e9),
    "arxiv": (1.06, 92e9),
    "stackexchange": (1.03, 78e9),
}
"""Epochs at `PUBLISHED_TOKENS` and size in bytes; the shares are in ``configs/llama.toml``."""
BYTES_PER_TOKEN = 4.0
"""Of English text and LLaMA's tokenizer, about; for the estimate without a tokenizer."""


class Size(NamedTuple):
    """What a source has."""

    documents: int
    text_bytes: int
    """UTF-8"""
    file_bytes: int
    """compressed"""
    tokens: int


class Mixture(NamedTuple):
    """How often each source is drawn, and for how long."""

    weights: Mapping[str, float]
    origin: str
    tokens: float | None


def main(arguments: Sequence[str]) -> int:
    """The command line of ``llama-jax corpus report``; returns the exit status."""
    options = _parser().parse_args(arguments)
    try:
        mixture = _mixture(options.recipe, options.tokens)
        sizes = measure(options.corpora, options.tokenizer)
        result = report(sizes, mixture, options.tokenizer)
        output = options.output or options.corpora[0] / "report"
        output.mkdir(parents=True, exist_ok=True)
        print(write(result, output))
    except (ValueError, OSError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="llama-jax corpus report",
        description="Write table 1 of the LLaMA paper for your corpora: report.md, report.json and "
        "report.png.",
    )
    add = parser.add_argument
    what = "finished corpora, or a folder with several"
    add("corpora", metavar="DIR", type=Path, nargs="+", help=what)
    what = "count tokens with this tokenizer (default: an estimate from the bytes of the text)"
    add("--tokenizer", type=Path, metavar="FILE", help=what)
    what = "training recipe whose weights and tokens to use (default: the weights of the paper)"
    add("--recipe", metavar="FILE", help=what)
    what = "training tokens, such as 1.4e12 (default: those of the recipe, or of the corpora)"
    add("--tokens", type=float, metavar="N", help=what)
    add("--output", type=Path, metavar="DIR", help="folder to write (default: DIR/report)")
    return parser


def _mixture(recipe: str | None, tokens: float | None) -> Mixture:
    """Weights and tokens of a recipe; without one, the paper's weights.

    Raises:
        ValueError: The recipe cannot be read, or the tokens are not a positive number.
    """
    if tokens is not None and not 0 < tokens < float("inf"):
        raise ValueError(f"--tokens {tokens}: give a number above 0")
    if recipe is None:
        return Mixture(published_weights(), f"weights of {PAPER}", tokens)
    settings = load_recipe(recipe)
    if tokens is None and settings.train.steps is not None:
        tokens = settings.train.steps * settings.tokens_per_step
    weights = {name: source.weight for name, source in settings.data.sources.items()}
    return Mixture(weights, f"weights of {recipe}", tokens)


def published_weights() -> dict[str, float]:
    """The sampling proportions of the paper, in percent."""
    content = (recipes_folder() / "llama.toml").read_text(encoding="utf-8")
    return {name: s["weight"] for name, s in tomllib.loads(content)["data"]["sources"].items()}


# Measuring ---------------------------------------------------------------------------------------


def measure(folders: Iterable[Path], tokenizer: Path | None) -> dict[str, Size]:
    """Size of each source.

    Args:
        folders: Finished corpora, or folders with several.
        tokenizer: Counts tokens; None: they are estimated.

    Raises:
        ValueError: No finished corpus, or a damaged file.
    """
    files = [file for folder in folders for file in corpora(folder)]
    counter = Tokenizer.load(tokenizer) if tokenizer else None
    total = sum(file.text_bytes for file in files)
    bar = tqdm(desc="tokens", total=total, unit="B", unit_scale=True, leave=False, disable=None)
    sizes: dict[str, Size] = {}
    with bar, ThreadPoolExecutor() as pool:
        for file in files:
            old = sizes.get(file.source, Size(0, 0, 0, 0))
            tokens = count_tokens(file.path, counter, pool) if counter else 0
            bar.update(file.text_bytes)
            sizes[file.source] = Size(
                documents=old.documents + file.documents,
                text_bytes=old.text_bytes + file.text_bytes,
                file_bytes=old.file_bytes + file.path.stat().st_size,
                tokens=old.tokens + tokens,
            )
    if counter:
        return sizes
    return {
        name: size._replace(tokens=round(size.text_bytes / BYTES_PER_TOKEN))
        for name, size in sizes.items()
    }


def count_tokens(path: Path, tokenizer: Tokenizer, pool: ThreadPoolExecutor) -> int:
    """Tokens of all documents of a file, without BOS and EOS.

    Args:
        path: The file.
        tokenizer: Of the tokens.
        pool: Threads that encode.
    """

    def count(record: dict[str, Any]) -> int:
        return len(tokenizer.encode_array(record["text"]))

    return sum(sum(pool.map(count, records)) for records in _batches(read_records(path)))


def _batches(records: Iterable[Any]) -> Iterable[list[Any]]:
    """Groups of records: ``map`` of a pool reads all of its input at once."""
    iterator = iter(records)
    return iter(lambda: list(itertools.islice(iterator, 64)), [])


# The report --------------------------------------------------------------------------------------


def report(sizes: Mapping[str, Size], mixture: Mixture, tokenizer: Path | None) -> dict[str, Any]:
    """The table as values.

    Args:
        sizes: By source.
        mixture: Weights and tokens. Weights of sources that are absent count for nothing.
        tokenizer: What counted the tokens; None: they are estimates.

    Raises:
        ValueError: The mixture has none of the sources.
    """
    present = {name: mixture.weights[name] for name in sizes if name in mixture.weights}
    if not present:
        raise ValueError(
            f"{mixture.origin} are of {', '.join(mixture.weights)}; the corpora have "
            f"{', '.join(sizes)}"
        )
    training = mixture.tokens or sum(sizes[name].tokens for name in present)
    order = [*PUBLISHED, *sorted(set(sizes) - set(PUBLISHED))]
    rows = {}
    for name in (name for name in order if name in sizes):
        share = present.get(name, 0.0) / sum(present.values())
        drawn = training * share
        rows[name] = {
            "share": share,
            "epochs": drawn / sizes[name].tokens if sizes[name].tokens else None,
            **sizes[name]._asdict(),
        }
    weights = published_weights()
    return {
        "sources": rows,
        "training_tokens": training,
        "weights": mixture.origin,
        "absent": sorted(set(mixture.weights) - set(sizes)),
        "tokens_are_estimated": tokenizer is None,
        "tokenizer_sha256": sha256(Tokenizer.load(tokenizer).path) if tokenizer else None,
        "published": {
            name: {"share": weights[name] / 100, "epochs": epochs, "disk": disk}
            for name, (epochs, disk) in PUBLISHED.items()
        },
    }


def write(result: Mapping[str, Any], output: Path) -> str:
    """Writes ``report.md``, ``report.json`` and ``report.png``; returns the table as text."""
    lines = [*_notes(result), "", *_table(result)]
    save_chart(output / "report.png", result)
    atomic_write(output / "report.json", (json.dumps(result, indent=1) + "\n").encode())
    text = ["# Corpus", "", *lines, "", "![shares and epochs](report.png)", ""]
    atomic_write(output / "report.md", "\n".join(text).encode())
    return "\n".join(lines)


def _notes(result: Mapping[str, Any]) -> list[str]:
    counted = "counted with the tokenizer given, without BOS and EOS"
    if result["tokens_are_estimated"]:
        counted = f"an ESTIMATE: {BYTES_PER_TOKEN:g} bytes of text per token (--tokenizer counts)"
    absent = ", ".join(result["absent"])
    return [
        f"- Share: {result['weights']}, scaled to the sources present"
        + (f"; absent: {absent}." if absent else "."),
        f"- Epochs: for {result['training_tokens']:,.0f} training tokens.",
        f"- Tokens: {counted}.",
        "- Disk: size of the compressed files; text: size of the text in UTF-8.",
        "- The paper's disk size seems to be of uncompressed text: about 3.9 bytes per token of "
        "CommonCrawl.",
        f"- † {PAPER}, published, at 1.4T tokens; not measured here.",
    ]


def _table(result: Mapping[str, Any]) -> list[str]:
    rows, published = result["sources"], result["published"]
    total = {
        key: sum(row[key] for row in rows.values())
        for key in ("share", "documents", "text_bytes", "file_bytes", "tokens")
    }
    header = ["source", "share", "epochs", "disk", "text", "documents", "tokens"]
    cells = [[*header, "share †", "epochs †", "disk †"]]
    for name, row in [*rows.items(), ("total", total)]:
        paper = published.get(name)
        cells.append([
            name, f"{row['share']:.1%}", _epochs(row.get("epochs")), size_text(row["file_bytes"]),
            size_text(row["text_bytes"]), f"{row['documents']:,}", f"{row['tokens']:,}",
            f"{paper['share']:.1%}" if paper else "", _epochs(paper and paper["epochs"]),
            size_text(paper["disk"]) if paper else "",
        ])  # fmt: skip
    widths = [max(3, *map(len, column)) for column in zip(*cells, strict=True)]
    pad = lambda cell, i: cell.rjust(widths[i]) if i else cell.ljust(widths[i])
    lines = [[pad(cell, i) for i, cell in enumerate(row)] for row in cells]
    rule = ["-" * (w - 1) + ":" if i else "-" * w for i, w in enumerate(widths)]
    return ["| " + " | ".join(line) + " |" for line in [lines[0], rule, *lines[1:]]]


def _epochs(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}" if value < 100 else f"{value:,.0f}"


def size_text(count: float) -> str:
    """A number of bytes in decimal units, as in the paper's table."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
