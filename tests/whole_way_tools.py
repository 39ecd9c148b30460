"""Small dumps of four sources with English text that every Python has."""

import gzip
import io
import tarfile
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics
from xml.sax.saxutils import escape, quoteattr

TEXTS = [text for _, text in sorted(topics.items()) if len(text) > 1000]


def write_dumps(folder: Path) -> None:
    """Write a folder for each source: wikipedia, stackexchange, books and arxiv."""
    for name in ("wikipedia", "stackexchange", "books", "arxiv"):
        (folder / name).mkdir(parents=True)
    (folder / "wikipedia/enwiki-pages-articles1.xml").write_text(_wikipedia(TEXTS[0::4]))
    posts = folder / "stackexchange/python.stackexchange.com-Posts.xml"
    posts.write_text(_stackexchange(TEXTS[1::4]))
    (folder / "books/pg1.txt").write_text(_book(TEXTS[2::8]))
    (folder / "books/pg2.txt").write_text(_book(TEXTS[6::8]))
    with tarfile.open(folder / "arxiv/arXiv_src_1308_001.tar", "w") as archive:
        for number, text in enumerate(TEXTS[3::4], 1):
            content = gzip.compress(_paper(text).encode(), mtime=0)
            member = tarfile.TarInfo(f"1308/1308.{number:04d}.gz")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def _wikipedia(texts: list[str]) -> str:
    pages = "".join(
        f"<page><title>Topic {i}</title><ns>0</ns><id>{i}</id><revision><id>{i}</id>"
        f'<text xml:space="preserve">{escape(text)}</text></revision></page>\n'
        for i, text in enumerate(texts, 1)
    )
    return (
        '<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.11/" version="0.11" '
        'xml:lang="en"><siteinfo><sitename>Wikipedia</sitename><dbname>enwiki</dbname>'
        "<base>https://en.wikipedia.org/wiki/Main_Page</base><namespaces>"
        '<namespace key="0" case="first-letter" /></namespaces></siteinfo>\n'
        f"{pages}</mediawiki>\n"
    )


def _stackexchange(texts: list[str]) -> str:
    rows = "\n".join(_posts(texts))
    return f'<?xml version="1.0" encoding="utf-8"?>\n<posts>\n{rows}\n</posts>\n'


def _posts(texts: list[str]) -> Iterator[str]:
    for i, text in enumerate(texts):
        question, answer = 2 * i + 1, 2 * i + 2
        body = quoteattr(f"<p>{escape(text[:300])}</p>")
        yield (
            f'<row Id="{question}" PostTypeId="1" Score="2" Title="Topic {i}" Body={body} '
            f'Tags="&lt;python&gt;" />'
        )
        body = quoteattr(f"<p>{escape(text[300:])}</p>")
        yield f'<row Id="{answer}" PostTypeId="2" ParentId="{question}" Score="1" Body={body} />'


def _book(texts: list[str]) -> str:
    text = "\n\n".join(texts)
    mark = lambda word: f"*** {word} OF THE PROJECT GUTENBERG EBOOK TOPICS ***"
    return f"Title: Topics\n\n{mark('START')}\n\n{text}\n\n{mark('END')}\n\nLicense\n"


def _paper(text: str) -> str:
    return (
        "\\documentclass{article}\n\\begin{document}\n\\section{Topic}\n"
        f"{text.replace('%', '').replace(chr(92), '')}\n\\end{{document}}\n"
    )
