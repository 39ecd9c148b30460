"""StackExchange: dumps of posts to documents of a question and its answers, highest score first.

The rows of a site are first split into parts by their question, so that a part can be joined in
memory.
"""

import json
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import pydantic
from datatrove.data import Document

from llama_jax.corpus.archives import Member, members
from llama_jax.corpus.files import Unreadable
from llama_jax.corpus.run import Run, number_of_parts
from llama_jax.corpus.stackexchange_html import html_to_text
from llama_jax.corpus.steps import Documents, Reader, Stage, Step, drop
from llama_jax.corpus.xml_stream import parse_record, split_records

_SUFFIXES = re.compile(r"(?i)(?:\.xml)?(?:\.(?:gz|bz2|xz|zst|7z|zip|tar))*$")
# Files of a dump without posts: other tables, and the texts beside them, such as readme.txt.
_OTHER_TABLE = re.compile(
    r"(?i)(?:^|-)(?:badges|comments|posthistory|postlinks|tags|users|votes)$|\.(?:txt|md|html?)$"
)
_LANGUAGES = {
    "es.stackoverflow.com": "es",
    "ja.stackoverflow.com": "ja",
    "pt.stackoverflow.com": "pt",
    "ru.stackoverflow.com": "ru",
    "rus.stackexchange.com": "ru",
}
"""Languages of the sites that are not in English."""


class Settings(pydantic.BaseModel, extra="forbid", frozen=True):
    """See ``configs/corpus/stackexchange.toml``."""

    largest: int = pydantic.Field(gt=0)
    question: str
    answer: str
    separator: str
    part_bytes: int = pydantic.Field(gt=0)
    max_characters: int = pydantic.Field(gt=0)

    @pydantic.field_validator("question", "answer")
    @classmethod
    def _has_known_fields(cls, form: str) -> str:
        try:
            form.format(title="", body="")
        except (KeyError, IndexError, ValueError):
            raise ValueError("may contain {title} and {body} and no other braces") from None
        return form


def looks_like(first_bytes: bytes, name: str) -> bool:
    return b"<posts" in first_bytes or (
        first_bytes.startswith(b"7z") and "wiki" not in name.lower()
    )


def stages(run: Run) -> Iterator[Stage]:
    """Splits the rows of each site into parts, then joins the questions and answers of each."""
    sites = _sites(run)
    groups = [[path] for path in sites.values()]
    parts = [number_of_parts(path, run.settings.part_bytes) for path in sites.values()]
    yield Stage("rows", [Rows(groups, list(sites), parts)], len(groups), split="part")

    left_out = _left_out(run, list(sites))
    paths = run.documents("rows")
    groups = [[path] for path in paths] or [[]]
    reasons = {path: left_out[task] for path in paths if (task := _task(path)) in left_out}
    form = Form(run.settings.question, run.settings.answer, run.settings.separator)
    steps = [Threads(groups, reasons), PlainText(form, run.settings.max_characters)]
    yield Stage("threads", steps, len(groups), final=True)


def _sites(run: Run) -> dict[str, Path]:
    """The file with the posts of each site.

    Raises:
        ValueError: No file has posts, or two files have those of one site.
    """
    sites: dict[str, Path] = {}
    for path in run.inputs:
        stem = _SUFFIXES.sub("", path.name)
        if _OTHER_TABLE.search(stem):
            continue
        site = re.sub(r"(?i)[-_.]?posts$", "", stem) or path.resolve().parent.name
        if site in sites:
            raise ValueError(f"{sites[site]} and {path} are both of the site {site}; give one")
        sites[site] = path
    if not sites:
        raise ValueError(
            f"none of the {len(run.inputs)} files has posts; "
            "give Posts.xml, SITE-Posts.7z or SITE.7z"
        )
    return sites


def _task(path: Path) -> int:
    return int(path.name.partition(".")[0])


def _left_out(run: Run, sites: Sequence[str]) -> dict[int, str]:
    """Why sites are left out, by their tasks in the first stage."""
    counts = [run.output / f"counts/rows/{task:05d}.json" for task in range(len(sites))]
    posts = [json.loads(path.read_bytes())["written"] for path in counts]
    by_size = sorted(range(len(sites)), key=lambda task: (-posts[task], sites[task]))
    largest = run.settings.largest
    reasons = dict.fromkeys(by_size[largest:], f"not one of the {largest} largest sites")
    for task, site in enumerate(sites):
        if run.languages and _language(site) not in run.languages:
            reasons[task] = "site in a language that is not wanted"
    return reasons


def _language(site: str) -> str:
    return _LANGUAGES.get(site, "en")


class Rows(Reader):
    """Reads questions and answers. The metadata key ``part`` is the same within a thread.

    Args:
        groups: See `Reader`.
        sites: Host name of each task's site.
        parts: Number of parts of each task's site.
    """

    def __init__(
        self, groups: Sequence[Sequence[Path]], sites: Sequence[str], parts: Sequence[int]
    ):
        super().__init__(groups)
        self.sites, self.parts = sites, parts

    def read(self, path: Path) -> Iterator[Document]:
        task = next(i for i, group in enumerate(self.groups) if path in group)
        found = False
        for member in members(path):
            if isinstance(member, Unreadable):
                yield self.skipped(member.place, member.reason)
            elif not _OTHER_TABLE.search(_SUFFIXES.sub("", PurePosixPath(member.name).name)):
                found = True
                yield from self._rows(member, self.sites[task], self.parts[task])
        if not found:
            yield self.skipped(path.name, "no Posts.xml in the archive")

    def _rows(self, member: Member, site: str, parts: int) -> Iterator[Document]:
        records = split_records(member.stream, "row")
        _, head = next(records)
        if isinstance(head, Unreadable):
            yield self.skipped(head.place, head.reason)
        elif b"<posts" not in head:
            yield self.skipped(member.place, "not a Posts.xml: no <posts> element")
            return
        for offset, content in records:
            place = f"{member.place}: byte {offset} of the XML"
            if isinstance(content, Unreadable):
                yield self.skipped(content.place, content.reason)
                continue
            try:
                row = parse_record(content).attrib
                document = _post(row, site)
            except (KeyError, ValueError, OverflowError):
                yield self.skipped(place, "a damaged row, or one that is cut off")
                continue
            document.metadata["place"] = place
            document.metadata["part"] = f"{document.metadata['thread'] % parts:03d}"
            if row["PostTypeId"] not in ("1", "2"):
                drop(document, "read", "not a question or an answer")
            yield document


def _post(row: Mapping[str, str], site: str) -> Document:
    number, is_answer = int(row["Id"]), row["PostTypeId"] == "2"
    thread = int(row["ParentId"]) if is_answer else number
    if is_answer and thread == number:
        raise ValueError("an answer to itself")
    name = site.removesuffix(".stackexchange.com").removesuffix(".com")
    metadata = {
        "source": "stackexchange",
        "url": f"https://{site}/{'a' if is_answer else 'questions'}/{number}",
        "language": _language(site),
        "scores": {"score": float(int(row["Score"]))},
        "site": site,
        "title": row.get("Title", ""),
        "tags": re.findall(r"[^<>|]+", row.get("Tags", "")),
        "license": row.get("ContentLicense"),
        "number": number,
        "thread": thread,
    }
    return Document(
        text=row.get("Body", ""), id=f"stackexchange/{name}/{number}", metadata=metadata
    )


class Threads(Documents):
    """Joins the questions of a part with their answers, which become the key ``answers``.

    Args:
        groups: See `Reader`.
        left_out: For files that are not read, the reason.
    """

    def __init__(self, groups: Sequence[Sequence[Path]], left_out: Mapping[Path, str]):
        super().__init__(groups)
        self.left_out = left_out

    def read(self, path: Path) -> Iterator[Document]:
        if path in self.left_out:
            posts = sum(1 for _ in super().read(path))
            for number in range(posts):
                yield self.skipped(f"{path.parent.name}/{path.name}: {number}", self.left_out[path])
            return
        questions: dict[int, Document] = {}
        answers: dict[int, dict[int, Document]] = defaultdict(dict)
        for post in super().read(path):
            number, thread = post.metadata.pop("number"), post.metadata.pop("thread")
            posts_of_kind = questions if number == thread else answers[thread]
            if number in posts_of_kind:
                yield drop(post, "join", "an Id that an earlier post has")
            else:
                posts_of_kind[number] = post
        for thread in sorted(answers.keys() - questions.keys()):
            for _, answer in sorted(answers[thread].items()):
                yield drop(answer, "join", "answer without its question")
        for thread, question in sorted(questions.items()):
            given = sorted(answers[thread].items(), key=lambda item: (-_score(item[1]), item[0]))
            question.metadata["answers"] = [answer.text for _, answer in given]
            question.metadata["answer_scores"] = [_score(answer) for _, answer in given]
            yield question


def _score(post: Document) -> int:
    return int(post.metadata["scores"]["score"])


@dataclass(frozen=True)
class Form:
    """How a document is written; see ``configs/corpus/stackexchange.toml``."""

    question: str
    answer: str
    separator: str


class PlainText(Step):
    """Writes a question and its answers as one text.

    Args:
        form: How they are written.
        max_characters: A thread with a longer post is dropped.
    """

    name = "text"

    def __init__(self, form: Form, max_characters: int):
        super().__init__()
        self.form, self.max_characters = form, max_characters

    def process(self, document: Document) -> str | None:
        posts = [document.text, *document.metadata.pop("answers")]
        if any(len(post) > self.max_characters for post in posts):
            return f"a post of more than {self.max_characters} characters"
        title = document.metadata["title"]
        forms = [self.form.question] + [self.form.answer] * (len(posts) - 1)
        texts = [
            form.format(title=title, body=html_to_text(post))
            for form, post in zip(forms, posts, strict=True)
        ]
        document.text = self.form.separator.join(texts)
        return None
