"""CommonCrawl as CCNet (arXiv 1911.00359) processed it for LLaMA.

Short pages are dropped, then lines that other pages have, then pages without a clear language. A
language model of Wikipedia splits the rest into head, middle and tail. A classifier of pages that
Wikipedia cites and exact deduplication of pages across dumps are options.
"""

import html
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pydantic
from datatrove.data import Document

from llama_jax.corpus.language import Language
from llama_jax.corpus.line_dedup import (
    Comparison,
    DropRepeatedLines,
    DropRepeatedPages,
    FindRepeated,
    LineHashes,
    PageHashes,
)
from llama_jax.corpus.model_files import LANGUAGE_ID, REFERENCES, check_models, lm_languages
from llama_jax.corpus.perplexity import Bucket, Perplexity, cutoffs, model_paths
from llama_jax.corpus.references import References
from llama_jax.corpus.run import Run
from llama_jax.corpus.steps import Documents, Stage, Step
from llama_jax.corpus.warc import WarcReader, is_warc

MAX_ELEMENTS = 200_000
"""Elements of a page of HTML. The text of 120,000 paragraphs takes 25 seconds, of 500,000 six
minutes, in C functions that a limit of processor time does not interrupt."""
_ELEMENT = re.compile("<[A-Za-z!?]")
# With possessive quantifiers: a title without an end takes linear time.
_TITLE = re.compile(
    r"<title\b[^<>]*+>((?:(?!</?title\b).)*+)</title\s*>", re.IGNORECASE | re.DOTALL
)


class _Section(pydantic.BaseModel, extra="forbid", frozen=True):
    pass


class Lines(_Section):
    group_files: pydantic.PositiveInt


class LanguageId(_Section):
    min_score: float
    keep: list[str]


class Quality(_Section):
    percentiles: tuple[float, float]
    cutoffs: dict[str, tuple[float, float]]
    keep: list[Literal["head", "middle", "tail"]]


class ReferenceClassifier(_Section):
    use: bool
    min_probability: float


class Settings(_Section):
    """Settings; see ``configs/corpus/commoncrawl.toml``."""

    min_characters: int
    drop_repeated_pages: bool
    lines: Lines
    language: LanguageId
    perplexity: Quality
    references: ReferenceClassifier


def looks_like(content: bytes, name: str) -> bool:
    """Whether a file with this (decompressed) beginning is a WARC or WET file."""
    return is_warc(content, name)


def models(run: Run) -> list[Path]:
    """Files of the models that the pipeline reads.

    Raises:
        ValueError: One is missing; names the command that makes it.
    """
    names = [LANGUAGE_ID]
    for language in _model_languages(run):
        names += [path.name for path in model_paths(run.models, language)]
    if run.settings.references.use:
        names.append(REFERENCES)
    return check_models(run.models, names)


def _languages(run: Run) -> list[str]:
    return list(run.languages or run.settings.language.keep)


def _model_languages(run: Run) -> list[str]:
    """Languages with a language model; if all languages are kept, those whose model exists."""
    return _languages(run) or lm_languages(run.models)


def stages(run: Run) -> Iterator[Stage]:
    """The pipeline."""
    settings, tasks = run.settings, len(run.inputs)
    models(run)
    reader = WarcReader([[path] for path in run.inputs], "commoncrawl")
    hashes = run.folder("line-hashes")
    steps = [ExtractHtml(), Title(settings.min_characters), LineHashes(hashes)]
    yield Stage("pages", [reader, *steps], tasks)

    lines = Comparison.plan(hashes, tasks, settings.lines.group_files)
    run.note("line_deduplication", lines.memory())
    yield Stage("repeated-lines", [FindRepeated(lines)], lines.tasks)

    language = Language(run.models / LANGUAGE_ID, settings.language.min_score, _languages(run))
    scores = run.folder("perplexities")
    perplexity = Perplexity(run.models, _model_languages(run), scores)
    steps = [DropRepeatedLines(lines), language, perplexity]
    pages = run.folder("page-hashes")
    if settings.drop_repeated_pages:
        steps.append(PageHashes(pages))
    yield Stage("scores", [_documents(run, "pages"), *steps], tasks)

    steps = []
    if settings.drop_repeated_pages:
        digests = Comparison.plan(pages, tasks, group_size=tasks)
        yield Stage("repeated-pages", [FindRepeated(digests, keep_first=True)], digests.tasks)
        steps.append(DropRepeatedPages(digests))
    cuts = cutoffs(scores, settings.perplexity.percentiles) | settings.perplexity.cutoffs
    run.note("perplexity_cutoffs", {k: [round(cut, 1) for cut in v] for k, v in cuts.items()})
    steps.append(Bucket(cuts, settings.perplexity.keep))
    if settings.references.use:
        steps.append(References(run.models / REFERENCES, settings.references.min_probability))
    yield Stage(
        "documents", [_documents(run, "scores"), *steps, Part()], tasks, final=True, split="part"
    )


def _documents(run: Run, stage: str) -> Documents:
    return Documents([[path] for path in run.documents(stage)])


class ExtractHtml(Step):
    """Replaces the HTML of a page from a WARC file by its text; keeps the title."""

    name = "extract text"

    def prepare(self, rank: int) -> None:
        from datatrove.pipeline.extractors import Trafilatura

        # Trafilatura's deduplication remembers earlier pages of the process, so that the text of
        # a page would depend on the number of workers.
        self.trafilatura = Trafilatura(deduplicate=False)

    def process(self, document: Document) -> str | None:
        if not document.metadata.pop("html", False):
            return None
        starts = document.text.count("<")
        if starts > MAX_ELEMENTS and len(_ELEMENT.findall(document.text)) > MAX_ELEMENTS:
            return f"more than {MAX_ELEMENTS:,} elements of HTML"
        title = _TITLE.search(document.text)
        document.metadata["title"] = " ".join(html.unescape(title[1]).split()) if title else ""
        document.text = self.trafilatura.extract(document.text) or ""
        return None if document.text else "no text in the page"


class Title(Step):
    """Strips lines, drops empty ones, and makes the first line of a WET record the title.

    Args:
        min_characters: Documents with fewer characters after that are dropped.
    """

    name = "length"

    def __init__(self, min_characters: int):
        super().__init__()
        self.min_characters = min_characters

    def process(self, document: Document) -> str | None:
        lines = [line for line in map(str.strip, document.text.split("\n")) if line]
        if "title" not in document.metadata:
            document.metadata["title"] = lines.pop(0) if lines else ""
        document.text = "\n".join(lines)
        if len(document.text) < self.min_characters:
            return f"fewer than {self.min_characters} characters"
        return None


class Part(Step):
    """Sets ``part``, the folder of a document in the output: language and bucket."""

    name = "part"

    def process(self, document: Document) -> str | None:
        metadata = document.metadata
        metadata["part"] = f"{metadata['language']}_{metadata['bucket']}"
        return None
