"""Reads the pages of a MediaWiki XML dump, and what the head of the dump says about the site."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from xml.etree import ElementTree

from llama_jax.corpus.files import Stream, Unreadable
from llama_jax.corpus.xml_stream import parse_record, split_records

# Words that start a redirect, in the languages of LLaMA; all wikis know the English one.
_REDIRECT = re.compile(
    r"\s*#\s*(?:redirect|redirección|redireccion|redirecció|redirection|rinvia|weiterleitung|"
    r"redirecionamento|redireccionamento|doorverwijzing|patrz|przekieruj|tam|omdirigering|"
    r"přesměruj|átirányítás|redirecteaza|redirecționare|перенаправление|перенапр|"
    r"перенаправлення|пренасочване|виж|преусмери|преусмјери|preusmjeri|preusmeritev|preusmeri)"
    r"\s*:?\s*\[\[",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class DumpHead:
    """What a dump says about its site.

    Attributes:
        language: Code of the edition of Wikipedia, or None if the dump does not say it.
        host: Such as ``it.wikipedia.org``, or an empty string.
        namespaces: Name of each namespace, by number.
    """

    language: str | None
    host: str
    namespaces: Mapping[int, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Page:
    """A page of a dump; ``revision`` is the number of the one that its text is from.

    ``problem`` says why it is not an article, or is empty.
    """

    id: int
    revision: int
    title: str
    text: str
    problem: str


def read_head(stream: Stream) -> DumpHead:
    """Reads what precedes the first page.

    Raises:
        ValueError: The file is not a dump of MediaWiki.
    """
    records = split_records(stream, "page")
    _, head = next(records)
    try:
        return _parse_head(head)
    except ValueError:
        _, following = next(records, (0, b""))
        if isinstance(following, Unreadable):
            raise following from None
        raise


def _parse_head(head: bytes | Unreadable) -> DumpHead:
    if isinstance(head, Unreadable):
        raise head
    root = re.search(rb"<(?:[\w.-]+:)?mediawiki(\s[^>]*)?>", head)
    if root is None:
        raise ValueError("it has no <mediawiki> element")
    siteinfo: ElementTree.Element | None = None
    start = re.search(rb"<(?:[\w.-]+:)?siteinfo[\s>]", head)
    if start is not None:
        try:
            siteinfo = parse_record(head[start.start() :])
        except ValueError:
            raise ValueError("its <siteinfo> is damaged") from None
    language = re.search(rb"""xml:lang=["']([\w-]+)["']""", root[0])
    if siteinfo is None:
        return DumpHead(language[1].decode() if language else None, "")
    base = siteinfo.findtext("base") or ""
    host = re.sub(r"^\w+://", "", base).partition("/")[0].lower()
    edition = re.fullmatch(r"([\w-]+)\.wikipedia\.org", host)
    database = re.fullmatch(r"(\w+)wiki", siteinfo.findtext("dbname") or "")
    if edition:
        code = edition[1]
    elif database and not host:
        code = database[1].replace("_", "-")
    else:
        code = language[1].decode() if language and not host else None
    namespaces = {}
    for element in siteinfo.iter("namespace"):
        namespaces[int(element.get("key", "0"))] = element.text or ""
    return DumpHead(code, host, namespaces)


def read_pages(stream: Stream) -> Iterator[tuple[str, Page | str]]:
    """Yields for each page its place, and the page or why it cannot be read."""
    records = split_records(stream, "page")
    namespaces: Mapping[int, str] = {}
    try:
        namespaces = _parse_head(next(records)[1]).namespaces
    except Unreadable as e:
        yield e.place, e.reason
    except ValueError:
        yield stream.place, "not a dump of MediaWiki, or its head is damaged"
    for offset, content in records:
        place = f"{stream.place}: byte {offset} of the XML"
        if isinstance(content, Unreadable):
            yield content.place, content.reason
            continue
        try:
            yield place, _page(parse_record(content), namespaces)
        except ValueError:
            yield place, "a damaged page, or one that is cut off"


def _page(element: ElementTree.Element, namespaces: Mapping[int, str]) -> Page:
    title, id_ = element.findtext("title"), _number(element)
    if not title or id_ is None:
        raise ValueError("a page needs a title and an id")
    revisions = element.findall("revision")
    revision = revisions[-1] if revisions else element
    text = revision.findtext("text") or ""
    model = revision.findtext("model") or "wikitext"
    problem = ""
    if element.find("redirect") is not None or _REDIRECT.match(text):
        problem = "redirect"
    elif _namespace(element, title, namespaces) != 0:
        problem = "not in the namespace of articles"
    elif model != "wikitext":
        problem = "not wikitext"
    return Page(id_, _number(revision) or 0, title, text, problem)


def _number(element: ElementTree.Element) -> int | None:
    """The id of a page or revision."""
    text = (element.findtext("id") or "").strip()
    return int(text) if re.fullmatch(r"[0-9]{1,18}", text) else None


def _namespace(
    element: ElementTree.Element, title: str, namespaces: Mapping[int, str]
) -> int | None:
    """Number of the namespace; dumps before 2012 have it only in the title."""
    if (number := element.findtext("ns")) is not None:
        return int(number)
    prefix = title.partition(":")[0] if ":" in title else ""
    return next((key for key, name in namespaces.items() if key and name == prefix), 0)
