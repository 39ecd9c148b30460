"""Wikipedia: pages-articles dumps to the text of articles.

A dump is first split into parts, which are then converted independently. Disambiguation pages are
kept, as in the paper and in Hugging Face's dataset.
"""

import contextlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from urllib.parse import quote

import pydantic
from datatrove.data import Document

from llama_jax.corpus.archives import members
from llama_jax.corpus.files import Unreadable
from llama_jax.corpus.run import Run, number_of_parts
from llama_jax.corpus.steps import Documents, Reader, Stage, Step, drop
from llama_jax.corpus.wikipedia_dump import DumpHead, Page, read_head, read_pages
from llama_jax.corpus.wikipedia_revisions import DropOlder, WriteRevisions, find_older
from llama_jax.corpus.wikitext import Site, site, to_text


class Settings(pydantic.BaseModel, extra="forbid", frozen=True):
    """See ``configs/corpus/wikipedia.toml``."""

    languages: tuple[str, ...]
    part_bytes: int = pydantic.Field(gt=0)
    max_characters: int = pydantic.Field(gt=0)
    removed_sections: dict[str, tuple[str, ...]]


def looks_like(first_bytes: bytes, name: str) -> bool:
    is_archive = first_bytes.startswith(b"7z") and "wiki" in name.lower()
    return b"<mediawiki" in first_bytes or is_archive


def stages(run: Run) -> Iterator[Stage]:
    """Splits the dumps into parts, then converts the newest revision of each article."""
    heads = _heads(run)
    languages = [str(head.language) for head in heads]
    wanted = run.languages or run.settings.languages
    if not set(languages) & set(wanted):
        path, found = next(pair for pair in zip(run.inputs, languages, strict=True) if pair[1])
        raise ValueError(
            f"{path} is Wikipedia in the language {found}, which is not one of "
            f"{' '.join(wanted)}; add --language {found} to keep it"
        )
    groups = [[path] for path in run.inputs]
    parts = [number_of_parts(path, run.settings.part_bytes) for path in run.inputs]
    reader = Pages(groups, languages, parts, wanted)
    folder = run.folder("revisions")
    yield Stage("pages", [reader, WriteRevisions(folder)], len(groups), split="part")
    find_older(folder, languages)
    sites = {}
    for head, language in zip(heads, languages, strict=True):
        removed = run.settings.removed_sections.get(language, ())
        sites[language] = site(dict(head.namespaces), removed, language)
    paths = run.documents("pages")
    groups = [[path] for path in paths] or [[]]
    older = DropOlder(folder, [int(path.name.partition(".")[0]) for path in paths] or [0])
    steps = [Documents(groups), older, PlainText(sites, run.settings.max_characters)]
    yield Stage("text", steps, len(groups), final=True)


def _heads(run: Run) -> list[DumpHead]:
    """The heads of the dumps. One that cannot be read has no language; its file is skipped.

    Raises:
        ValueError: No head can be read, or see `_head`.
    """
    heads, problems = [], []
    for path in run.inputs:
        try:
            heads.append(_head(path, run))
        except Unreadable as e:
            heads.append(DumpHead("", ""))
            problems.append(e.with_traceback(None))
    if len(problems) == len(heads):
        raise problems[0]
    return heads


def _head(path: Path, run: Run) -> DumpHead:
    """The head of a dump; its language is known.

    Raises:
        Unreadable: A damaged or another file.
        ValueError: Another wiki, or no language.
    """
    head = None
    problem: ValueError = Unreadable(path.name, "an archive without files")
    with contextlib.closing(members(path)) as found:  # open until a head is read
        while head is None and (member := next(found, None)):
            try:
                if isinstance(member, Unreadable):
                    raise member
                head = read_head(member.stream)
            except ValueError as e:
                problem = e.with_traceback(None)  # which would keep the file open
    if head is None:
        raise Unreadable(str(path), f"it is not a dump of Wikipedia: {problem}")
    if head.host and head.language is None:
        raise ValueError(f"{path} is a dump of {head.host}, not of Wikipedia")
    if head.language is None:
        if len(run.languages) != 1:
            raise ValueError(f"{path} does not say its language; give it: --language en")
        return DumpHead(run.languages[0], head.host, head.namespaces)
    return head


class Pages(Reader):
    """Reads dumps. The metadata key ``part`` distributes the pages of a dump over its parts.

    Args:
        groups: See `Reader`.
        languages: Language of each task's dump.
        parts: Number of parts of each task's dump.
        wanted: Languages of dumps that are read.
    """

    def __init__(
        self,
        groups: Sequence[Sequence[Path]],
        languages: Sequence[str],
        parts: Sequence[int],
        wanted: Sequence[str],
    ):
        super().__init__(groups)
        self.languages, self.parts, self.wanted = languages, parts, tuple(wanted)

    def read(self, path: Path) -> Iterator[Document]:
        task = next(i for i, group in enumerate(self.groups) if path in group)
        language, parts = self.languages[task], self.parts[task]
        if not language:
            yield self.skipped(path.name, "not a dump of Wikipedia, or its head is damaged")
            return
        if language not in self.wanted:
            yield self.skipped(path.name, f"dump in the language {language}")
            return
        numbers = itertools.count()  # of all members of an archive
        for member in members(path):
            if isinstance(member, Unreadable):
                yield self.skipped(member.place, member.reason)
                continue
            for number, (place, page) in zip(numbers, read_pages(member.stream), strict=False):
                if isinstance(page, str):
                    yield self.skipped(place, page)
                    continue
                document = _document(page, language, place)
                document.metadata |= {"part": f"{number % parts:03d}", "number": number}
                document.metadata["revision"] = page.id, page.revision
                yield drop(document, "read", page.problem) if page.problem else document


def _document(page: Page, language: str, place: str) -> Document:
    metadata = {
        "source": "wikipedia",
        "url": _url(language, page.title),
        "language": language,
        "scores": {},
        "title": page.title,
        "place": place,
    }
    return Document(text=page.text, id=f"wikipedia/{language}/{page.id}", metadata=metadata)


def _url(language: str, title: str) -> str:
    path = quote(title.replace(" ", "_"), safe=";@$!*(),/~:")
    return f"https://{language}.wikipedia.org/wiki/{path}"


class PlainText(Step):
    """Converts the wikitext of a page.

    Args:
        sites: For each language, what the conversion depends on.
        max_characters: Longer pages are dropped: no page of Wikipedia has more than 2 MiB.
    """

    name = "text"

    def __init__(self, sites: Mapping[str, Site], max_characters: int):
        super().__init__()
        self.sites, self.max_characters = sites, max_characters

    def process(self, document: Document) -> str | None:
        if len(document.text) > self.max_characters:
            return f"more than {self.max_characters} characters"
        document.text = to_text(document.text, self.sites[document.metadata["language"]])
        return None if document.text else "no text"
