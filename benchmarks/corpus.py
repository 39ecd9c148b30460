"""Speed of each source of `llama_jax.corpus` beside what people would use instead.

    python -m venv wiki && wiki/bin/pip install wikiextractor==3.1.0
    python -m benchmarks.corpus --wikiextractor wiki/bin/python     some minutes on a quiet core
    python -m benchmarks.corpus --quick                             only whether everything runs

Inputs are the raw samples of --data, repeated with new ids. Both sides run on one core, from the
published file to documents in JSON lines with zstd, and take turns; the first round is not counted.
WikiExtractor is a process of its own and writes its own format: its time for a dump without pages
is subtracted. Speed is megabytes of decompressed input per second of processor time. Printed: rows
for docs/results.md. Result: benchmarks/results/corpus.json.

Not comparable: the outputs differ (each row says how), and ours also counts every dropped document.
"""

import argparse
import bz2
import gzip
import io
import itertools
import json
import multiprocessing
import os
import random
import re
import resource
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from datatrove.data import Document
from loguru import logger

from benchmarks import corpus_peers as peers
from benchmarks.common import environment, spread, write
from llama_jax.corpus import recipe
from llama_jax.corpus.inputs import find_inputs
from llama_jax.corpus.output import JsonLines
from llama_jax.corpus.run import Run
from llama_jax.corpus.steps import Writer, is_dropped
from llama_jax.corpus.warc import WarcReader

PACKAGES = ("datatrove", "warcio", "trafilatura", "beautifulsoup4", "lxml", "spacy", "zstandard")
Side = Callable[[Path], Any]
"""Processes the input once; gets an empty folder."""


class Comparison(NamedTuple):
    """A row: what is measured, and what the sides do differently.

    Attributes:
        what: The input and what is done.
        megabytes: Size of the decompressed input.
        ours: Our side.
        peer: Name of the other side; empty if there is none.
        theirs: The other side.
        startup: The other side on an input without documents; its time is subtracted.
        differences: What is not comparable.
    """

    what: str
    megabytes: float
    ours: Side
    peer: str = ""
    theirs: Side | None = None
    startup: Side | None = None
    differences: str = ""


class Setup(NamedTuple):
    """Where inputs are, and where to put those that are made of them."""

    data: Path
    work: Path
    quick: bool
    wikiextractor: str

    def copies(self, number: int) -> int:
        return 1 if self.quick else number


# Sides -------------------------------------------------------------------------------------------


def run_source(source: str, inputs: list[Path], folder: Path) -> None:
    """All stages of a source in this process, with everything they write."""
    files, names = find_inputs(inputs)
    settings = recipe.load_corpus_recipe(source).settings
    run = Run(source, settings, files, names, (), folder, folder / "models")
    for stage in recipe.source_module(source).stages(run):
        kept = folder / ("documents" if stage.final else f"work/documents/{stage.name}")
        kept.mkdir(parents=True, exist_ok=True)
        logs = [folder / name / stage.name for name in ("dropped", "counts")]
        for rank in range(stage.tasks):
            data: Any = None
            for step in [*stage.steps, Writer(kept, *logs, stage.split)]:
                data = step.run(data, rank, stage.tasks)
            for _ in data:
                pass


def write_texts(folder: Path, texts: Iterable[tuple[str, str]]) -> None:
    """Writes documents as our writer does."""
    with JsonLines(folder / "documents.jsonl.zst") as file:
        for id_, text in texts:
            file.write({"id": id_, "text": text})


def write_documents(folder: Path, documents: Iterable[Document]) -> None:
    write_texts(folder, ((d.id, d.text) for d in documents if not is_dropped(d)))


# Comparisons -------------------------------------------------------------------------------------


def wikipedia(setup: Setup) -> Iterator[Comparison]:
    """Articles of two dumps."""
    version = run_quietly([setup.wikiextractor, "-m", "wikiextractor.WikiExtractor", "--version"])
    if not version:
        print("wikipedia: no WikiExtractor; see --wikiextractor", file=sys.stderr)
    name = f"WikiExtractor {version.split()[-1]} --no-templates" if version else ""
    samples = {
        "English": ("corpus/enwiki-shortened.xml.bz2", 2),
        "Italian": ("raw/wiki/itwiki-shortened.xml.bz2", 12),
    }
    for language, (sample, copies) in samples.items():
        xml = bz2.decompress((setup.data / sample).read_bytes())
        pages, empty = repeated_dump(xml, setup.copies(copies)), repeated_dump(xml, 0)
        path, without = (setup.work / f"{language}-{n}.xml.bz2" for n in ("wiki", "empty"))
        path.write_bytes(bz2.compress(pages))
        without.write_bytes(bz2.compress(empty))
        yield Comparison(
            f"Wikipedia, {language}",
            len(pages) / 1e6,
            lambda folder, path=path: run_source("wikipedia", [path], folder),
            name,
            lambda folder, path=path: wikiextractor(setup, path, folder),
            lambda folder, without=without: wikiextractor(setup, without, folder),
            "WikiExtractor leaves parts of templates, and loses list items of the Italian dump",
        )


def repeated_dump(xml: bytes, copies: int) -> bytes:
    """A dump whose pages are repeated with new ids."""
    start, end = xml.index(b"<page>"), xml.rindex(b"</page>") + len(b"</page>")
    pages = xml[start:end]
    new_id = lambda copy: lambda found: b"%s%d</id>" % (found[1], int(found[2]) + copy * 10**9)
    repeated = [
        re.sub(rb"(<page>.*?<id>)(\d+)</id>", new_id(copy), pages, flags=re.DOTALL)
        for copy in range(copies)
    ]
    return b"\n".join([xml[:start], *repeated, xml[end:]])


def wikiextractor(setup: Setup, path: Path, folder: Path) -> None:
    command = [setup.wikiextractor, "-m", "wikiextractor.WikiExtractor", str(path), "--quiet"]
    options = ["--no-templates", "--processes", "1", "--json", "--output", str(folder / "text")]
    subprocess.run([*command, *options], check=True, capture_output=True)


def run_quietly(command: list[str]) -> str:
    """Output of a command; empty if it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()


def commoncrawl(setup: Setup) -> Iterator[Comparison]:
    """Records of a WET file, and text of the HTML of WARC files."""
    from datatrove.pipeline.extractors import Trafilatura

    from llama_jax.corpus.commoncrawl import ExtractHtml

    folder = setup.data / "raw/commoncrawl"
    wet, path = (folder / "rebuilt.warc.wet.gz").read_bytes(), setup.work / "many.warc.wet.gz"
    copies = setup.copies(250)
    path.write_bytes(wet * copies)
    yield Comparison(
        "Common Crawl, records of WET files",
        len(gzip.decompress(wet)) * copies / 1e6,
        lambda folder: write_documents(folder, WarcReader([[path]], "commoncrawl").run(None)),
        "warcio",
        lambda folder: write_texts(folder, peers.warcio(path)),
        differences="warcio ends at a damaged record",
    )
    names = ["dolma-sample-0000.warc.gz", "html-multilang.warc.gz"]
    reader = WarcReader([[folder / name for name in names]], "commoncrawl")
    pages = [page.text for page in reader.run(None) if not is_dropped(page)][: setup.copies(99) * 3]

    def documents() -> Iterator[Document]:
        for number, text in enumerate(pages * setup.copies(3)):
            yield Document(text=text, id=str(number), metadata={"html": True, "scores": {}})

    yield Comparison(
        "Common Crawl, HTML of WARC files to text",
        sum(len(page.encode()) for page in pages) * setup.copies(3) / 1e6,
        lambda folder: write_documents(folder, ExtractHtml().run(documents())),
        "datatrove's Trafilatura",
        lambda folder: write_documents(folder, Trafilatura(timeout=20).run(documents())),
        differences="the same library; datatrove's step has a process for it",
    )


def c4(setup: Setup) -> Iterator[Comparison]:
    """The rules of C4."""
    from datatrove.pipeline.filters import C4QualityFilter

    from llama_jax.corpus.c4 import QualityRules

    texts = c4_texts(setup)
    rules = recipe.load_corpus_recipe("c4").settings.rules
    yield Comparison(
        "C4, rules for lines and pages",
        sum(len(text.encode()) for text in texts) / 1e6,
        lambda folder: write_documents(folder, QualityRules(rules).run(as_documents(texts))),
        "datatrove's C4QualityFilter",
        lambda folder: write_documents(folder, C4QualityFilter().run(as_documents(texts))),
        differences="the same filter; ours adds the log of dropped pages",
    )


def c4_texts(setup: Setup) -> list[str]:
    lines = (setup.data / "corpus/c4_demo.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["text"] for line in lines][: 20 if setup.quick else None]


def as_documents(texts: list[str]) -> Iterator[Document]:
    for number, text in enumerate(texts):
        metadata = {"source": "c4", "url": None, "language": "en", "scores": {}}
        yield Document(text=text, id=str(number), metadata=metadata)


def stackexchange(setup: Setup) -> Iterator[Comparison]:
    """Posts.xml of several sites."""
    sample = setup.data / "raw/stackexchange/coffee.stackexchange.com-Posts.xml"
    paths = [setup.work / f"site{i}.stackexchange.com-Posts.xml" for i in range(setup.copies(8))]
    for path in paths:
        path.write_bytes(sample.read_bytes())
    threads = lambda: itertools.chain.from_iterable(map(peers.stackexchange, paths))
    yield Comparison(
        "StackExchange",
        sum(path.stat().st_size for path in paths) / 1e6,
        lambda folder: run_source("stackexchange", paths, folder),
        "lxml and BeautifulSoup",
        lambda folder: write_texts(folder, threads()),
        differences="the cleaner loses numbers of lists and marks of quotations",
    )


def arxiv(setup: Setup) -> Iterator[Comparison]:
    """A bulk archive."""
    path, size = setup.work / "arXiv_src_2001_001.tar", 0
    with (
        tarfile.open(setup.data / "raw/arxiv/arXiv_src_shared_001.tar") as old,
        tarfile.open(path, "w") as new,
    ):
        papers = [(m.name, f.read()) for m in old if (f := old.extractfile(m))]
        papers = [data for name, data in papers if name.endswith(".gz")]
        for number, data in enumerate(papers * setup.copies(12)):
            info = tarfile.TarInfo(f"2001/2001.{number:05d}.gz")
            info.size, size = len(data), size + len(gzip.decompress(data))
            new.addfile(info, io.BytesIO(data))
    yield Comparison(
        "arXiv",
        size / 1e6,
        lambda folder: run_source("arxiv", [path], folder),
        "regular expressions as RedPajama describes",
        lambda folder: write_texts(folder, peers.arxiv(path)),
        differences="the cleaner joins files in the order of the archive, leaves macros with "
        "arguments, and drops appendices",
    )


def github(setup: Setup) -> Iterator[Comparison]:
    """Python's standard library as rows of BigQuery."""
    path, size = setup.work / "rows.jsonl", 0
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("[a-z]*/*.py"))
    with path.open("w") as rows:
        for file in files[: 50 if setup.quick else None]:
            content = file.read_text(encoding="utf-8", errors="replace")
            size += len(content.encode())
            row = {"path": file.name, "repo_name": f"a/{file.parent.name}", "license": "mit"}
            rows.write(json.dumps(row | {"content": content}) + "\n")
    yield Comparison("GitHub", size / 1e6, lambda folder: run_source("github", [path], folder))


def books(setup: Setup) -> Iterator[Comparison]:
    """Books, and others with the words of each line in another order, so that they are distinct."""
    folder, size = setup.work / "books", 0
    folder.mkdir()
    for sample in sorted((setup.data / "raw/gutenberg").glob("*.txt")):
        text = sample.read_text(encoding="utf-8-sig")
        for copy in range(setup.copies(5)):
            lines = text.splitlines()
            if copy:
                order = random.Random(copy)
                words = [line.split() for line in lines]
                lines = [" ".join(order.sample(line, len(line))) for line in words]
            path = folder / f"{copy}-{sample.name}"
            path.write_text("\n".join(lines), encoding="utf-8")
            size += path.stat().st_size
    yield Comparison("Books", size / 1e6, lambda out: run_source("books", [folder], out))


def deduplicate(setup: Setup) -> Iterator[Comparison]:
    """MinHash over the documents of one corpus."""
    from datatrove.pipeline.dedup.minhash import MinhashConfig
    from datatrove.utils.hashing import HashConfig

    texts, corpus = c4_texts(setup), setup.work / "c4"
    name, size = "documents/00000.jsonl.zst", sum(len(text.encode()) for text in texts)
    with JsonLines(corpus / name) as file:
        for document in as_documents(texts):
            metadata = document.metadata
            file.write({"id": document.id, "text": document.text, **metadata, "metadata": {}})
    entry = {"documents": len(texts), "text_bytes": size}
    manifest = {"corpus": 1, "source": "c4", "files": {name: entry}}
    (corpus / "manifest.json").write_text(json.dumps(manifest))
    config = MinhashConfig(hash_config=HashConfig(precision=64, hash_fc="xxhash"))
    yield Comparison(
        "near-duplicates by MinHash",
        size / 1e6,
        lambda folder: run_source("deduplicate", [corpus], folder),
        "datatrove's four steps",
        lambda folder: write_documents(folder, peers.minhash(as_documents(texts), folder, config)),
        differences="the same hashes and buckets; datatrove splits words with spaCy, we at blanks",
    )


SOURCES = {
    f.__name__: f
    for f in (wikipedia, commoncrawl, c4, stackexchange, arxiv, github, books, deduplicate)
}

# Measuring ---------------------------------------------------------------------------------------


def measure(side: Side) -> tuple[float, float]:
    """(wall, CPU) seconds of a side, with its child processes."""
    with tempfile.TemporaryDirectory() as folder:
        start, cpu = time.perf_counter(), cpu_seconds()
        side(Path(folder))
        return time.perf_counter() - start, cpu_seconds() - cpu


def cpu_seconds() -> float:
    multiprocessing.active_children()  # waits for those that have ended, so that they count
    usage = [resource.getrusage(w) for w in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in usage)


def compare(row: Comparison, rounds: int) -> dict[str, Any]:
    """The speeds of both sides of a row."""
    sides = [row.ours, row.theirs] if row.theirs and row.peer else [row.ours]
    startup = (0.0, 0.0)
    if row.startup and len(sides) > 1:
        startup = min((measure(row.startup) for _ in range(3)), key=lambda seconds: seconds[1])
    times: list[list[tuple[float, float]]] = [[] for _ in sides]
    for turn in range(rounds + 1):
        for i in (0, 1)[:: 1 if turn % 2 else -1]:
            if i < len(sides):
                wall, cpu = measure(sides[i])
                taken = (wall - startup[0], cpu - startup[1]) if i else (wall, cpu)
                times[i] += [taken] if turn or not rounds else []
    result: dict[str, Any] = {"what": row.what, "megabytes": round(row.megabytes, 2)}
    for name, values in zip(("llama_jax", "peer"), times, strict=False):
        for k, kind in enumerate(("wall", "cpu")):
            result[f"{name}_{kind}_MB_s"] = spread([row.megabytes / v[k] for v in values])
    if len(sides) > 1:
        result |= {"peer": row.peer, "differences": row.differences}
        for k, kind in enumerate(("wall", "cpu")):
            ratios = [b[k] / a[k] for a, b in zip(*times, strict=True)]
            result[f"{kind}_ratio"] = spread(ratios)
    return result


def table_row(result: dict[str, Any], first: bool) -> str:
    """A row for docs/results.md."""
    command = "corpus, MB/s of one core by processor time (`python -m benchmarks.corpus`): "
    what = (command if first else "the same, ") + result["what"]
    text = lambda s: f"{s['median']:.3g} ({s['min']:.3g}-{s['max']:.3g})"
    ours = f"{text(result['llama_jax_cpu_MB_s'])} MB/s"
    if "peer" not in result:
        return f"| {what} | {ours} | - | |"
    theirs = f"{result['peer']} {text(result['peer_cpu_MB_s'])} MB/s"
    return f"| {what} | {ours} | {theirs} | {text(result['cpu_ratio'])} |"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--sources", nargs="+", choices=SOURCES, default=list(SOURCES))
    data = Path(__file__).parents[2] / "shared/data"
    parser.add_argument("--data", type=Path, default=data, help="raw samples")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="tiny inputs, one round, no result")
    what = "Python with wikiextractor installed"
    parser.add_argument("--wikiextractor", default=sys.executable, metavar="PYTHON", help=what)
    args = parser.parse_args()
    if not args.data.is_dir():
        sys.exit(f"{args.data} does not exist; give the folder of raw samples with --data")
    logger.remove()  # datatrove's log
    os.environ["HF_HUB_OFFLINE"] = "1"
    results, start = [], time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        for source in args.sources:
            work = Path(folder, source)
            work.mkdir()
            setup = Setup(args.data, work, args.quick, args.wikiextractor)
            for row in SOURCES[source](setup):
                results.append(compare(row, 0 if args.quick else args.rounds))
                print(table_row(results[-1], len(results) == 1), flush=True)
    print(f"\n{time.perf_counter() - start:.0f} s in all. Not comparable:")
    for result in results:
        if result.get("differences"):
            wall = result["wall_ratio"]["median"]
            print(f"- {result['what']}: ratio by wall time {wall:.3g}; {result['differences']}")
    if not args.quick:
        write("corpus", {"rows": results, "machine": environment(PACKAGES)})


if __name__ == "__main__":
    main()
