"""C4: its published files as they are, or its rules applied to WET and WARC files."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pydantic
from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.dedup.sentence_dedup import (
    SentDedupConfig,
    SentenceDedupFilter,
    SentenceDedupSignature,
    SentenceFindDedups,
)
from datatrove.pipeline.filters import C4QualityFilter

from llama_jax.corpus.commoncrawl import ExtractHtml, LanguageId
from llama_jax.corpus.files import Unreadable, lines, open_stream
from llama_jax.corpus.language import Language
from llama_jax.corpus.model_files import LANGUAGE_ID, check_models
from llama_jax.corpus.run import Run
from llama_jax.corpus.steps import Documents, Reader, Stage, Step, drop
from llama_jax.corpus.warc import WarcReader, is_warc

MAX_LINE_BYTES = 64 << 20
MAX_SENTENCES = 1 << 16
"""datatrove numbers the sentences of a page with 16 bits."""
TASKS_PER_COMPARISON = 16
"""Files whose spans one task of the comparison reads, on average."""


class _Section(pydantic.BaseModel, extra="forbid", frozen=True):
    pass


class Rules(_Section):
    min_sentences: int
    min_words_per_line: int
    max_word_characters: int
    bad_words: dict[str, Path]


class Spans(_Section):
    sentences: pydantic.PositiveInt
    min_words: int
    min_sentences: int


class Settings(_Section):
    """Settings; see ``configs/corpus/c4.toml``."""

    language: LanguageId
    rules: Rules
    spans: Spans


def looks_like(content: bytes, name: str) -> bool:
    """Whether a file with this (decompressed) beginning is a WARC file, or has rows of C4."""
    rows = re.match(rb"\s*\{.*\"text\"\s*:", content, re.DOTALL)
    return rows is not None or is_warc(content, name)


def models(run: Run) -> list[Path]:
    """Files of the models and of bad words that the pipeline reads.

    Raises:
        ValueError: One is missing; names the command that makes it.
    """
    words = [path for path in run.settings.rules.bad_words.values() if path.is_file()]
    return [*check_models(run.models, [LANGUAGE_ID]), *words]


def stages(run: Run) -> Iterator[Stage]:
    """The pipeline.

    Raises:
        ValueError: WARC files and published files are mixed, or a file of bad words is missing.
    """
    models(run)
    crawl = [_is_warc(path) for path in run.inputs]
    groups, tasks = [[path] for path in run.inputs], len(run.inputs)
    if not any(crawl):
        reader = C4Reader(groups, run.names)
        language = Language(run.models / LANGUAGE_ID, 0.0, run.languages)
        yield Stage("documents", [reader, language], tasks, final=True)
        return
    if not all(crawl):
        raise ValueError(
            f"{run.names[crawl.index(True)]} is a WARC file and {run.names[crawl.index(False)]} "
            "is not; give files of the crawl or published files of C4"
        )
    yield Stage("pages", [WarcReader(groups, "c4"), *_rules(run)], tasks)
    spans = run.settings.spans
    config = SentDedupConfig(
        n_sentences=spans.sentences,
        min_doc_words=spans.min_words,
        min_num_sentences=spans.min_sentences,
    )
    groups = [[path] for path in run.documents("pages")]
    parts = -(-tasks // TASKS_PER_COMPARISON)
    hashes, repeated = str(run.folder("span-hashes")), str(run.folder("repeated-spans"))
    signature = SentenceDedupSignature(hashes, parts, config)
    yield Stage("span-hashes", [Documents(groups), NoDocuments(signature)], tasks)
    find = SentenceFindDedups(hashes, repeated, config=config)
    yield Stage("repeated-spans", [NoDocuments(find)], parts)
    steps = [Documents(groups), DropRepeatedSpans(repeated, config)]
    yield Stage("documents", steps, tasks, final=True)


def _is_warc(path: Path) -> bool:
    with open_stream(path) as stream:
        return is_warc(stream.peek(64), path.name)


def _rules(run: Run) -> list[Step]:
    settings = run.settings
    languages = list(run.languages or settings.language.keep)
    steps: list[Step] = [
        ExtractHtml(),
        Language(run.models / LANGUAGE_ID, settings.language.min_score, languages),
        QualityRules(settings.rules),
    ]
    if settings.rules.bad_words:
        steps.append(BadWords(settings.rules.bad_words))
    return steps


class C4Reader(Reader):
    """Yields the rows of published files of C4: JSON with ``text`` and ``url``.

    Args:
        groups: See ``Reader``.
        names: Name of each file, for the ids.
    """

    name = "c4"

    def __init__(self, groups: Sequence[Sequence[Path]], names: Sequence[str]):
        super().__init__(groups)
        self.names = dict(zip((path for group in groups for path in group), names, strict=True))

    def read(self, path: Path) -> Iterator[Document]:
        name = self.names[path]
        with open_stream(path) as stream:
            for number, line in enumerate(lines(stream, MAX_LINE_BYTES), 1):
                if isinstance(line, Unreadable):
                    yield self.skipped(line.place, line.reason)
                elif line.strip():
                    yield self._document(line, f"{name}: line {number}", f"c4/{name}/{number}")

    def _document(self, line: bytes, place: str, id_: str) -> Document:
        try:
            row = json.loads(line)
            text, url = row["text"], row.get("url")
        except (ValueError, KeyError, TypeError, RecursionError):
            return self.skipped(place, "not a row of C4")
        if not isinstance(text, str):
            return self.skipped(place, "not a row of C4")
        url = url if isinstance(url, str) else None
        metadata: dict[str, Any] = {
            "source": "c4",
            "url": url,
            "language": None,
            "scores": {},
            "place": place,
        }
        if "timestamp" in row:
            metadata["timestamp"] = row["timestamp"]
        return Document(text=text, id=id_, metadata=metadata)


class QualityRules(Step):
    """C4's rules for lines and pages, as datatrove applies them."""

    name = "rules"

    def __init__(self, rules: Rules):
        super().__init__()
        self.filter = C4QualityFilter(
            min_num_sentences=rules.min_sentences,
            min_words_per_line=rules.min_words_per_line,
            max_word_length=rules.max_word_characters,
        )

    def process(self, document: Document) -> str | None:
        result = self.filter.filter(document)
        if result is not True:
            return str(result[1]).replace("_", " ")
        ends = sum(document.text.count(end) for end in ".!?\n")
        return "more than 65,535 sentences" if ends >= MAX_SENTENCES else None


class BadWords(Step):
    """Drops pages with a word of a list.

    Args:
        files: For each language, a file with a word or phrase per line.

    Raises:
        ValueError: A file is missing or empty.
    """

    name = "bad words"

    def __init__(self, files: Mapping[str, Path]):
        super().__init__()
        self.patterns = {language: _pattern(path) for language, path in files.items()}

    def process(self, document: Document) -> str | None:
        pattern = self.patterns.get(document.metadata["language"])
        found = pattern is not None and pattern.search(document.text.lower())
        return "a bad word" if found else None


def _pattern(path: Path) -> re.Pattern[str]:
    try:
        words = path.read_text(encoding="utf-8").lower().split("\n")
    except (OSError, UnicodeDecodeError) as e:
        raise ValueError(f"rules.bad_words: {path} cannot be read: {e}") from None
    words = [re.escape(word.strip()) for word in words if word.strip()]
    if not words:
        raise ValueError(f"rules.bad_words: {path} has no words")
    return re.compile(rf"(?:\W|^)(?:{'|'.join(words)})(?:\W|$)")


class NoDocuments(PipelineStep):
    """Runs a step of datatrove that writes files and yields nothing."""

    type = "step"
    name = "hashes"

    def __init__(self, step: PipelineStep):
        super().__init__()
        self.step = step

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        self.step.run(data, rank, world_size)
        yield from ()


class DropRepeatedSpans(Step):
    """Removes spans of sentences that an earlier page has, and drops pages that become short."""

    name = "repeated spans"

    def __init__(self, folder: str, config: SentDedupConfig):
        super().__init__()
        self.filter = SentenceDedupFilter(folder, config)

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        waiting: list[Document] = []  # read by the filter and not yet kept or dropped

        def documents() -> Iterator[Document]:
            for document in data:
                waiting.append(document)
                yield document

        reason = "too short without repeated spans"
        for kept in self.filter.run(documents(), rank, world_size):
            while waiting[0] is not kept:
                yield drop(waiting.pop(0), self.name, reason)
            yield waiting.pop(0)
        for document in waiting:
            yield drop(document, self.name, reason)
