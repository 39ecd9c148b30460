"""What people would use instead of a source of ``llama_jax.corpus``, for benchmarks/corpus.py.

Each function yields (id, text) of the documents of its input. The cleaners of arXiv and
StackExchange do what RedPajama describes, without its faults in the order of answers.
"""

import gzip
import io
import re
import tarfile
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from datatrove.data import Document

_SECTION = re.compile(r"\\(?:part|chapter|(?:sub)*section|(?:sub)?paragraph)\*?\s*[\[{]")
_BACK = re.compile(r"\\appendix|\\begin\{(?:references|thebibliography)\}|\\bibliography\{", re.I)
_MACRO = re.compile(
    r"^\s*\\(?:newcommand\*?\s*\{?|def\s*)(\\[A-Za-z]+)\}?\s*\{(.*)\}\s*$", re.MULTILINE
)


def arxiv(archive: Path) -> Iterator[tuple[str, str]]:
    """From the first section to the appendix, without comments; macros without arguments."""
    with tarfile.open(archive) as papers:
        for member in papers:
            file = papers.extractfile(member)
            if file is None or not member.name.endswith(".gz"):
                continue
            try:
                files = list(_tex_files(gzip.decompress(file.read())))
            except UnicodeDecodeError:
                continue
            macros = {m[1]: m[2] for text in files for m in _MACRO.finditer(text)}
            re.purge()  # real papers have macros of their own, so no compiled pattern is known
            yield member.name, "\n".join(_clean_tex(text, macros) for text in files)


def _tex_files(data: bytes) -> Iterator[str]:
    if not tarfile.is_tarfile(io.BytesIO(data)):
        yield data.decode()
        return
    with tarfile.open(fileobj=io.BytesIO(data)) as files:
        for member in files:
            file = files.extractfile(member)
            if file is not None and member.name.endswith(".tex"):
                yield file.read().decode()


def _clean_tex(text: str, macros: dict[str, str]) -> str:
    section = _SECTION.search(text)
    if section is None:
        return ""
    back = _BACK.search(text, section.start())
    text = text[section.start() : back.start() if back else len(text)]
    text = re.sub(r"^%.*\n?", "", text, flags=re.MULTILINE)
    text = re.sub(r"([^\\])%.+$", r"\1", text, flags=re.MULTILINE)
    for name, body in macros.items():
        text = re.sub(rf"{re.escape(name)}(?![A-Za-z])", lambda _, body=body: body, text)
    return text


def stackexchange(posts: Path) -> Iterator[tuple[str, str]]:
    """Threads of a Posts.xml: lxml's iterparse, text by BeautifulSoup with lxml."""
    from lxml import etree

    questions: dict[str, Any] = {}
    answers: dict[str, list[tuple[int, str]]] = defaultdict(list)
    for _, row in etree.iterparse(str(posts), tag="row"):
        kind, number = row.get("PostTypeId"), row.get("Id")
        if kind == "1":
            questions[number] = row.get("Title"), _html_text(row.get("Body"))
        elif kind == "2":
            score = int(row.get("Score"))
            answers[row.get("ParentId")].append((score, _html_text(row.get("Body"))))
        row.clear()
        while row.getprevious() is not None:
            del row.getparent()[0]
    for number, (title, body) in questions.items():
        given = sorted(answers[number], key=lambda answer: -answer[0])
        parts = [f"Q: {title}\n\n{body}", *(f"A: {text}" for _, text in given)]
        yield number, "\n\n".join(parts)


def _html_text(html: str) -> str:
    from bs4 import BeautifulSoup

    html = re.sub(r"<li>|<ol>|<ul>", r"\n*", html)
    return BeautifulSoup(html, "lxml").get_text()


def warcio(path: Path) -> Iterator[tuple[str, str]]:
    """The text of the conversions of a WET file."""
    from warcio.archiveiterator import ArchiveIterator

    with path.open("rb") as file:
        for record in ArchiveIterator(file):
            if record.rec_type == "conversion":
                headers = record.rec_headers
                text = record.content_stream().read().decode("utf-8", "replace")
                yield headers.get_header("WARC-Record-ID"), text


def minhash(documents: Iterable[Document], folder: Path, config: Any) -> Iterator[Document]:
    """datatrove's four steps, with its English word splitter."""
    from datatrove.pipeline.dedup.minhash import (
        MinhashDedupBuckets,
        MinhashDedupCluster,
        MinhashDedupFilter,
        MinhashDedupSignature,
    )

    documents = list(documents)
    signatures, buckets, removed = (str(folder / name) for name in ("sig", "buckets", "removed"))
    MinhashDedupSignature(signatures, config).run(documents)
    for bucket in range(config.num_buckets):
        step = MinhashDedupBuckets(signatures, buckets, config=config)
        step.run(None, bucket, config.num_buckets)
    MinhashDedupCluster(buckets, removed, config).run(None)
    yield from MinhashDedupFilter(removed).run(documents)
