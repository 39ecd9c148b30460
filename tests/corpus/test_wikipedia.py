"""Wikipedia dumps: pages, languages, damage. The conversion of a page is in test_wikitext.py."""

import bz2
import re
import tarfile
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("datatrove", reason="needs the extra corpus")

from corpus import inline

from llama_jax.corpus import files, wikipedia_dump, xml_stream

RAW = Path(__file__).parents[3] / "shared/data"

HEAD = """<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.10/" xml:lang="{language}">
  <siteinfo>
    <sitename>Wikipedia</sitename>
    <base>https://{language}.wikipedia.org/wiki/X</base>
    <namespaces>
      <namespace key="0" case="first-letter" />
      <namespace key="6" case="first-letter">Dosiero</namespace>
      <namespace key="10" case="first-letter">Predloga</namespace>
    </namespaces>
  </siteinfo>
"""


def page(number, text, title=None, ns=0, more=""):
    return f"""  <page>
    <title>{title or f"Page {number}"}</title>
    <ns>{ns}</ns>
    <id>{number}</id>{more}
    <revision>
      <id>9{number}</id>
      <contributor><username>A</username><id>7</id></contributor>
      <model>wikitext</model>
      <text xml:space="preserve">{text}</text>
    </revision>
  </page>
"""


PAGES = [
    page(1, "'''A &amp;amp; B''' &lt;ref&gt;c&lt;/ref&gt; [[Dosiero:x]] Ž", title="A &amp; Č/d"),
    page(2, "#REDIRECT [[A]]", more='<redirect title="A" />'),
    page(3, "#preusmeritev [[A]]"),
    page(4, "talk", title="Predloga:X", ns=10),
    page(5, "&bomb;"),
    page(6, "text"),
    page(7, "{{only}}"),
    page(8, "bad \x01 character"),
    page(9, '{"json": 1}').replace("<model>wikitext", "<model>json"),
    page(10, "last\n\nSee also"),
]


def dump(language="sl", pages=PAGES):
    return HEAD.format(language=language) + "".join(pages) + "</mediawiki>\n"


def write(folder, content, name="dump.xml"):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def run(tmp_path, content, name="dump.xml", **options):
    path = write(tmp_path, content, name)
    return inline.run("wikipedia", [path], tmp_path / "out", **options)


def test_articles_of_a_dump(tmp_path):
    documents, dropped, counts = run(tmp_path, dump())
    assert [(d["id"], d["text"]) for d in documents] == [
        ("wikipedia/sl/1", "A & B Ž"),
        ("wikipedia/sl/10", "last\n\nSee also"),
        ("wikipedia/sl/6", "text"),
    ]
    assert documents[0]["url"] == "https://sl.wikipedia.org/wiki/A_%26_%C4%8C/d"
    assert documents[0]["language"] == "sl"
    assert documents[0]["metadata"]["title"] == "A & Č/d"
    assert documents[0]["scores"] == {}
    assert {d["id"]: d["reason"] for d in dropped if d["url"]} == {
        "wikipedia/sl/2": "redirect",
        "wikipedia/sl/3": "redirect",
        "wikipedia/sl/4": "not in the namespace of articles",
        "wikipedia/sl/7": "no text",
        "wikipedia/sl/9": "not wikitext",
    }
    damaged = [d["place"] for d in dropped if not d["url"]]
    offsets = [dump().encode().index(p.strip().encode()) for p in (PAGES[4], PAGES[7])]
    assert sorted(damaged) == sorted(f"dump.xml: byte {n} of the XML" for n in offsets)
    assert counts["pages"][0]["read"] == len(PAGES)


def test_entities_are_neither_expanded_nor_fetched(tmp_path):
    secret = write(tmp_path, "secret", "secret.txt")
    doctype = (
        f'<!DOCTYPE x [<!ENTITY bomb "{"b" * 99}"><!ENTITY f SYSTEM "{secret.as_uri()}">'
        '<!ENTITY c "&bomb;&bomb;">]>\n'
    )
    content = doctype + dump(pages=[page(1, "a"), page(2, "&f;"), page(3, "&c;"), page(4, "b")])
    documents, dropped, _ = run(tmp_path, content)
    assert [d["text"] for d in documents] == ["a", "b"]
    assert len(dropped) == 2


@pytest.mark.parametrize("where", ["XML", "bzip2"])
def test_a_dump_that_is_cut_off(tmp_path, where):
    content = dump().encode()
    if where == "XML":
        content, name = content[: content.index(b"last")], "dump.xml"
    else:
        streams = [dump(pages=PAGES[:6]).encode()[: -len("</mediawiki>\n")]]
        streams.append("".join(PAGES[6:]).encode())
        content = bz2.compress(streams[0]) + bz2.compress(streams[1])[:-20]
        name = "dump.xml.bz2"
    documents, dropped, _ = run(tmp_path, content, name)
    assert [d["text"] for d in documents] == ["A & B Ž", "text"]
    assert len([d for d in dropped if not d["url"]]) >= 2


def test_a_prefix_of_elements_and_dumps_without_namespace_numbers(tmp_path):
    content = dump().replace("    <ns>10</ns>\n", "").replace("    <ns>0</ns>\n", "")
    content = content.replace("</", "</ns0:").replace("xmlns=", "xmlns:ns0=")
    content = re.sub(r"<(?=[a-z])", "<ns0:", content)
    documents, dropped, _ = run(tmp_path, content)
    assert [d["text"] for d in documents] == ["A & B Ž", "last\n\nSee also", "text"]
    assert "not in the namespace of articles" in {d["reason"] for d in dropped}


@pytest.mark.parametrize(
    ("content", "languages", "message"),
    [
        (dump("ltg"), [], "Wikipedia in the language ltg, which is not one of .* --language ltg"),
        (dump("de"), ["en", "fr"], "language de, which is not one of en fr"),
        (dump("en").replace("wikipedia.org", "wiktionary.org"), [], "dump of en.wiktionary.org"),
        (dump("").replace("https://.wikipedia.org/wiki/X", ""), [], "does not say its language"),
        ("<posts>\n</posts>", [], "is not a dump of Wikipedia: it has no <mediawiki>"),
        (b"\x1f\x8b\x08\x00abc", [], "is not a dump of Wikipedia"),
        (
            bz2.compress(dump().encode())[:-60],
            [],
            "is not a dump .* byte 0: a truncated bzip2 member",
        ),
        (b"PK\x05\x06" + bytes(18), [], "is not a dump of Wikipedia: .* an archive without files"),
    ],
)
def test_other_languages_and_other_files_are_refused(tmp_path, content, languages, message):
    with pytest.raises(ValueError, match=message):
        run(tmp_path, content, languages=languages)


def test_a_language_that_is_asked_for_is_kept(tmp_path):
    documents, _, _ = run(tmp_path, dump("ltg"), languages=["ltg"])
    assert {d["language"] for d in documents} == {"ltg"}
    assert documents[0]["url"].startswith("https://ltg.wikipedia.org/wiki/")


def test_of_several_dumps_those_in_wanted_languages_are_read(tmp_path):
    paths = [write(tmp_path, dump(code), f"{code}wiki.xml") for code in ("ltg", "sl", "uk")]
    documents, dropped, _ = inline.run("wikipedia", paths, tmp_path / "out")
    assert {d["language"] for d in documents} == {"sl", "uk"}
    assert ("ltgwiki.xml", "dump in the language ltg") in {(d["id"], d["reason"]) for d in dropped}


def test_a_dump_with_a_damaged_head_does_not_end_the_run(tmp_path):
    contents = {
        "a.xml.bz2": bz2.compress(dump().encode())[:-60],
        "b.xml": dump(pages=[page(1, "b")]),
    }
    paths = [write(tmp_path, content, name) for name, content in contents.items()]
    documents, dropped, _ = inline.run("wikipedia", paths, tmp_path / "out")
    assert [d["text"] for d in documents] == ["b"]
    assert [(d["id"], d["reason"]) for d in dropped] == [
        ("a.xml.bz2", "not a dump of Wikipedia, or its head is damaged")
    ]


def test_of_several_revisions_of_an_article_the_newest_is_kept(tmp_path):
    """9{number} is the revision of each page; the same revision is taken from the first file."""
    new = page(1, "new").replace("<id>91</id>", "<id>99</id>")
    dumps = {
        "a.xml": [page(1, "old"), page(2, "a"), page(3, "b"), page(3, "twice")],
        "b.xml": [page(9, "#REDIRECT [[A]]"), new, page(2, "a again"), page(4, "c")],
    }
    paths = [write(tmp_path, dump(pages=pages), name) for name, pages in dumps.items()]
    paths.append(write(tmp_path, dump("uk", [page(1, "of another language")]), "c.xml"))
    overrides = ["part_bytes=500"]
    documents, dropped, _ = inline.run("wikipedia", paths, tmp_path / "out", overrides=overrides)
    assert {d["id"].removeprefix("wikipedia/"): d["text"] for d in documents} == {
        "sl/1": "new",
        "sl/2": "a",
        "sl/3": "b",
        "sl/4": "c",
        "uk/1": "of another language",
    }
    assert len(documents) == 5
    reason = "a newer revision, or the same one, is in the input"
    found = [(d["id"], d["place"][:5]) for d in dropped if d["reason"] == reason]
    assert found == [
        ("wikipedia/sl/1", "a.xml"),
        ("wikipedia/sl/2", "b.xml"),
        ("wikipedia/sl/3", "a.xml"),
    ]
    assert set(documents[0]["metadata"]) == {"title", "place"}


@pytest.mark.parametrize("kind", ["7z", "zip", "tar"])
def test_dumps_in_archives(tmp_path, kind):
    py7zr = pytest.importorskip("py7zr")
    path = tmp_path / f"slwiki.{kind}"
    file = write(tmp_path, dump(pages=[page(1, "a"), page(2, "b")]))
    if kind == "7z":
        with py7zr.SevenZipFile(path, "w") as archive:
            archive.write(file, file.name)
    elif kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.write(file, file.name)
    else:
        with tarfile.open(path, "w") as archive:
            archive.add(file, file.name)
    documents, _, _ = inline.run("wikipedia", [path], tmp_path / "out")
    assert [d["text"] for d in documents] == ["a", "b"]


def test_other_files_in_an_archive_do_not_end_it(tmp_path):
    with zipfile.ZipFile(tmp_path / "dumps.zip", "w") as archive:
        archive.writestr("readme", "text")
        archive.writestr("a.xml", dump(pages=[page(1, "a")]))
        archive.writestr("b.txt", "text")
        archive.writestr("c.xml", dump(pages=[page(2, "b")]).replace("</siteinfo>", ""))
    documents, dropped, _ = inline.run("wikipedia", [tmp_path / "dumps.zip"], tmp_path / "out")
    assert [d["text"] for d in documents] == ["a", "b"]
    places = {f"dumps.zip: {name}" for name in ("readme", "b.txt", "c.xml")}
    assert {d["place"] for d in dropped} == places
    assert {d["reason"] for d in dropped} == {"not a dump of MediaWiki, or its head is damaged"}


def test_revisions_in_an_archive_of_several_files(tmp_path):
    with zipfile.ZipFile(tmp_path / "dumps.zip", "w") as archive:
        archive.writestr("a.xml", dump(pages=[page(1, "old"), page(2, "a"), page(3, "b")]))
        new = page(1, "new").replace("<id>91</id>", "<id>99</id>")
        archive.writestr("b.xml", dump(pages=[new, page(4, "c")]))
    documents, _, _ = inline.run("wikipedia", [tmp_path / "dumps.zip"], tmp_path / "out")
    assert [d["text"] for d in documents] == ["new", "a", "b", "c"]


def test_language_of_a_dump():
    def language(text):
        stream = files.Stream(iter([text.encode()]), "x")
        return wikipedia_dump.read_head(stream).language

    head = HEAD.format(language="simple") + "<page>"
    assert language(head.replace('xml:lang="simple"', 'xml:lang="en"')) == "simple"
    head = HEAD.format(language="x").replace("<base>https://x.wikipedia.org/wiki/X</base>", "")
    assert language(head) == "x"
    assert (
        language(head.replace("<siteinfo>", "<siteinfo><dbname>be_x_oldwiki</dbname>"))
        == "be-x-old"
    )


def test_parts_do_not_change_the_documents(tmp_path):
    one, _, _ = run(tmp_path, dump())
    (tmp_path / "b").mkdir()
    many, _, counts = run(tmp_path / "b", dump(), overrides=["part_bytes=500"])
    assert len(counts["text"]) > 3
    assert [d["text"] for d in many] == [d["text"] for d in one]


def test_long_pages_are_dropped(tmp_path):
    documents, dropped, _ = run(tmp_path, dump(), overrides=["max_characters=10"])
    assert [d["text"] for d in documents] == ["text"]
    assert "more than 10 characters" in {d["reason"] for d in dropped}


def test_a_record_larger_than_memory_allows(monkeypatch):
    monkeypatch.setattr(xml_stream, "_MAX_RECORD_BYTES", 1000)
    parts = [b"<r>", b"<row a='1'/>", b"<row a='" + b"x" * 5000, b"'/>\n<row a='2'/>", b"</r>"]
    content = b"".join(parts)
    for size in (7, 100, 3000):
        chunks = (content[i : i + size] for i in range(0, len(content), size))
        records = list(xml_stream.split_records(files.Stream(chunks, "x"), "row"))
        assert records[0] == (0, b"<r>")
        assert records[1] == (3, b"<row a='1'/>")
        assert isinstance(records[2][1], files.Unreadable)
        assert records[3] == (content.index(b"<row a='2'"), b"<row a='2'/></r>")
        assert len(records) == 4


@pytest.mark.parametrize("size", [1, 3, 64, 65, 1000])
def test_records_are_the_same_for_every_size_of_reads(size):
    content = b"".join(b"<page><title>%d</title></page>\n" % i for i in range(20)) + b"</x>"
    chunks = (content[i : i + size] for i in range(0, len(content), size))
    records = list(xml_stream.split_records(files.Stream(chunks, "x"), "page"))
    assert b"".join(piece for _, piece in records) == content
    assert [offset for offset, piece in records if piece] == [
        content.index(b"<page><title>%d<" % i) for i in range(20)
    ]


@pytest.mark.skipif(not RAW.exists(), reason="needs the raw samples")
@pytest.mark.parametrize(
    ("path", "pages", "redirects", "other"),
    [
        ("raw/wiki/itwiki-shortened.xml.bz2", 110, 1, 4),
        ("corpus/enwiki-shortened.xml.bz2", 206, 100, 0),
    ],
)
def test_real_dumps(tmp_path, monkeypatch, path, pages, redirects, other):
    from llama_jax.corpus import wikipedia

    monkeypatch.setattr(wikipedia, "to_text", lambda text, site: text[:9])  # to save time
    _, _, counts = inline.run("wikipedia", [RAW / path], tmp_path)
    assert counts["pages"][0]["read"] == pages
    reasons = counts["pages"][0]["dropped"]["read"]
    assert reasons["redirect"] == redirects
    assert reasons.get("not in the namespace of articles", 0) == other
    assert counts["text"][0]["written"] == pages - redirects - other


def test_damaged_gzip_members_do_not_end_the_dump():
    stream = files.Stream(
        iter(
            [b"<page>a</page><page>b", files.Unreadable("x", "damaged"), b"c</page><page>d</page>"]
        ),
        "x",
    )
    records = [piece for _, piece in xml_stream.split_records(stream, "page")]
    assert records[:3] == [b"", b"<page>a</page>", b"<page>b"]
    assert isinstance(records[3], files.Unreadable)
    assert records[4:] == [b"<page>d</page>"]


def test_files_are_recognized():
    from llama_jax.corpus import books, stackexchange, wikipedia

    seven_zip = b"7z\xbc\xaf\x27\x1c"
    files_ = {
        ("enwiki-latest-pages-articles.xml.bz2", b"<mediawiki xmlns="): wikipedia,
        ("enwiki-latest-pages-articles.xml.7z", seven_zip): wikipedia,
        ("coffee.stackexchange.com-Posts.xml", b"\xef\xbb\xbf<?xml ?>\n<posts>"): stackexchange,
        ("coffee.stackexchange.com.7z", seven_zip): stackexchange,
        ("pg11.txt", b"Alice"): books,
        ("11-0.zip", b"PK"): books,
        ("train.jsonl.gz", b'{"text": "a"}'): books,
    }
    for (name, content), source in files_.items():
        for module in (books, stackexchange, wikipedia):
            assert module.looks_like(content, name) == (module is source), (name, module)
