"""Records of WARC and WET files: damaged ones are skipped with their place, no other is lost."""

import base64
import gzip
import hashlib
import io
import itertools
import tracemalloc
import zlib
from pathlib import Path

import pytest

pytest.importorskip("datatrove", reason="needs the extra corpus")
pytest.importorskip("warcio", reason="needs the extra corpus")
import brotli
import zstandard

from llama_jax.corpus import warc, warc_http
from llama_jax.corpus.steps import is_dropped

SAMPLES = Path(__file__).parents[3] / "shared/data/raw/commoncrawl"


def record(name, body, kind="conversion", length=None, eol=b"\r\n", uri="http://a.org/"):
    body = body if isinstance(body, bytes) else body.encode()
    head = [
        b"WARC/1.0",
        b"WARC-Type: " + kind.encode(),
        b"WARC-Target-URI: " + uri.encode(),
        b"WARC-Date: 2020-01-02T03:04:05Z",
        b"WARC-Record-ID: <" + name.encode() + b">",
        b"WARC-Block-Digest: sha1:" + name.upper().encode(),
        b"Content-Length: " + str(len(body) if length is None else length).encode(),
    ]
    return eol.join([*head, b"", b""]) + body + eol * 2


def response(name, body, head=b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n", **more):
    return record(name, head + b"\r\n" + body, kind="response", **more)


def read(tmp_path, content):
    path = tmp_path / "crawl"
    path.write_bytes(content)
    documents = list(warc.WarcReader([[path]], "commoncrawl").run(None))
    kept = [d for d in documents if not is_dropped(d)]
    lost = [
        (d.metadata["place"], d.metadata["dropped"]["reason"]) for d in documents if is_dropped(d)
    ]
    return kept, lost


RECORDS = [
    record("info", "Software-Info: by hand", kind="warcinfo"),
    record("a", "Title\nfirst"),
    record("short", "one two three", length=4),
    record("b", "second"),
    record("long", "one two three", length=30),
    record("c", "third, with WARC/1.0\r\nin the text"),
    record("latin", "caf\xe9".encode("latin-1")),
    record("d", "fourth"),
    record("none", "length", length="twelve"),
    record("e", "fifth »…«"),
]


@pytest.mark.parametrize("compressed", [False, True])
def test_a_damaged_record_is_skipped_with_its_place(tmp_path, compressed):
    parts = [gzip.compress(r) if compressed else r for r in RECORDS]
    kept, lost = read(tmp_path, b"".join(parts))
    assert [(d.id, d.text) for d in kept] == [
        ("<a>", "Title\nfirst"),
        ("<b>", "second"),
        ("<c>", "third, with WARC/1.0\r\nin the text"),
        ("<d>", "fourth"),
        ("<e>", "fifth »…«"),
    ]
    assert lost == [
        ("crawl: record 3", "wrong Content-Length"),
        ("crawl: record 5", "wrong Content-Length"),
        ("crawl: record 7", "invalid UTF-8"),
        ("crawl: record 9", "wrong Content-Length"),
    ]
    assert kept[0].metadata == {
        "source": "commoncrawl",
        "url": "http://a.org/",
        "language": None,
        "scores": {},
        "date": "2020-01-02T03:04:05Z",
        "digest": "sha1:A",
        "place": "crawl: record 2",
        "html": False,
    }


def test_the_records_after_a_truncated_gzip_member_are_read(tmp_path):
    members = [gzip.compress(record(n, "text of " + n * 300)) for n in "abcd"]
    members[1] = members[1][: len(members[1]) // 2]
    kept, lost = read(tmp_path, b"".join(members))
    assert [d.id for d in kept] == ["<a>", "<c>", "<d>"]
    assert [place for place, _ in lost] == ["crawl: record 2"]


def test_a_file_whose_first_record_is_damaged_is_recognized():
    assert warc.is_warc(b"WARC/1.0\r\n", "a")
    assert warc.is_warc(b"", "CC-MAIN-00000.warc.wet.gz")
    assert not warc.is_warc(b'{"text": ""}', "warc.json")


def test_a_file_that_ends_inside_a_record(tmp_path):
    kept, lost = read(tmp_path, record("a", "first") + record("b", "second")[:-8])
    assert [d.id for d in kept] == ["<a>"]
    assert lost == [("crawl: record 2", "wrong Content-Length")]
    assert read(tmp_path, b"no WARC file")[1] == [("crawl", "no WARC record in the file")]


def test_a_length_that_includes_the_next_records_is_wrong():
    swallowed, last = RECORDS[3], RECORDS[9]
    for inner in (swallowed, swallowed + RECORDS[5]):
        for end in (b"", b"\r\n\r\n"):
            length = len(b"first\r\n\r\n") + len(inner) - 4 + len(end)
            content = record("long", "first", length=length) + inner + last
            ids = [r.headers["warc-record-id"] for r in warc.records(io.BytesIO(content))]
            found = [r.problem for r in warc.records(io.BytesIO(content))]
            assert found == ["wrong Content-Length", *[""] * (len(found) - 1)]
            assert ids[1] == "<b>"
            assert ids[-1] == "<e>"


@pytest.mark.parametrize(
    ("damaged", "problem"),
    [
        (RECORDS[3].replace(b"WARC/1.0", b"WAR\xff/1.0"), "data that is no record"),
        (RECORDS[3][:-6], "wrong Content-Length"),  # the next record does not start a line
        (RECORDS[3][:20], "headers without an end"),
        (b"zeros or anything else", "data that is no record"),
    ],
)
def test_damage_costs_neither_the_record_before_nor_the_one_after(tmp_path, damaged, problem):
    kept, lost = read(tmp_path, RECORDS[1] + damaged + RECORDS[9])
    assert [d.id for d in kept] == ["<a>", "<e>"]
    assert lost == [("crawl: record 2", problem)]


def test_a_page_that_shows_a_record_is_one_record(tmp_path):
    shown = b"A record:\r\n\r\n" + RECORDS[3].rstrip()
    digest = base64.b32encode(hashlib.sha1(shown).digest())
    whole = record("page", shown).replace(b"sha1:PAGE", b"sha1:" + digest)
    kept, lost = read(tmp_path, whole + RECORDS[9])
    assert [d.id for d in kept] == ["<page>", "<e>"]
    assert lost == []


def test_headers_without_an_end_are_skipped_once():
    endless = b"WARC/1.0\r\nX: " + b"x" * (1 << 20)
    content = b"".join([RECORDS[1], endless, b"\r\n", RECORDS[3], b"WARC/1.0\r\nX: cut"])
    found = itertools.islice(warc.records(io.BytesIO(content)), 10)  # it was endless
    found = [(record.number, record.problem) for record in found]
    problem = "headers without an end"
    assert found == [(1, ""), (2, problem), (3, ""), (4, problem)]


def test_records_with_converted_line_ends_end_at_the_next_one(tmp_path):
    parts = [record(n, f"{n}\n\ntext", length=999, eol=b"\n") for n in "abc"]
    kept, lost = read(tmp_path, b"".join(parts))
    assert [(d.id, d.text) for d in kept] == [(f"<{n}>", f"{n}\n\ntext") for n in "abc"]
    assert lost == []


class Slow(io.BytesIO):
    """Returns few bytes at a time, so that every boundary is cut in every place."""

    def read(self, size=-1):
        return super().read(1 + self.tell() % 3)


def test_records_do_not_depend_on_the_size_of_reads(monkeypatch):
    content = b"".join([*RECORDS, record("lf", "text", eol=b"\n"), record("z", "last")])
    whole = list(warc.records(io.BytesIO(content)))
    assert list(warc.records(Slow(content))) == whole
    assert [r.number for r in whole] == list(range(1, 13))
    assert whole[10].body == b"text"


class Zeros:
    """A record with a large body, then a small record."""

    def __init__(self, body_bytes, length):
        head, _, self.end = record("big", b"0", length=length).rpartition(b"0")
        self.parts = [head, *[b"0" * (1 << 16)] * (body_bytes >> 16), self.end + record("b", "x")]

    def read(self, size=-1):
        return self.parts.pop(0) if self.parts else b""


@pytest.mark.parametrize("length", [8 << 20, "9" * 30, 10])
def test_a_large_record_is_not_held_in_memory(length):
    stream = Zeros(8 << 20, length)
    tracemalloc.start()
    found = list(warc.records(stream, max_bytes=1 << 20))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [(r.number, r.body, bool(r.problem)) for r in found] == [
        (1, b"", True),
        (2, b"x", False),
    ]
    assert peak < 4 << 20


def test_only_successful_html_responses_are_pages(tmp_path):
    page = b"<html><body>text</body></html>"
    not_found = b"HTTP/1.1 404 Not Found\r\nContent-Type: text/html\r\n"
    image = b"HTTP/1.1 200 OK\r\nContent-Type: image/png\r\n"
    encoded = (
        b"HTTP/1.1 200 OK\r\nContent-Type: text/html; charset=utf-8\r\n"
        b"Content-Encoding: gzip\r\nTransfer-Encoding: chunked\r\n"
    )
    zipped = gzip.compress("<p>é</p>".encode())
    chunked = b"%x\r\n%s\r\n0\r\n\r\n" % (len(zipped), zipped)
    latin = b"HTTP/1.1 200 OK\r\nContent-Type: text/html; charset=ISO-8859-1\r\n"
    kept, lost = read(
        tmp_path,
        record("req", "GET / HTTP/1.1\r\n\r\n", kind="request")
        + response("page", page)
        + response("missing", page, not_found)
        + response("image", b"\x89PNG", image)
        + response("robots", page, uri="http://a.org/robots.txt")
        + response("encoded", chunked, encoded)
        + response("latin", b"<p>caf\xe9</p>", latin)
        + record("dns", "20200102 a.org", kind="response")
        + record("visit", "", kind="revisit"),
    )
    assert [(d.id, d.text) for d in kept] == [
        ("<page>", page.decode()),
        ("<encoded>", "<p>é</p>"),
        ("<latin>", "<p>café</p>"),
    ]
    assert [reason for _, reason in lost] == [
        "HTTP status 404",
        "not text/html",
        "robots.txt",
        "not an HTTP response",
    ]


PAGE = "<p>naïve “quotes” café</p>" * 30


@pytest.mark.parametrize(
    ("encoding", "body"),
    [
        ("gzip", gzip.compress(PAGE.encode())),
        ("br", brotli.compress(PAGE.encode())),
        ("zstd", zstandard.compress(PAGE.encode())),
        ("deflate", zlib.compress(PAGE.encode())),
        ("deflate", zlib.compress(PAGE.encode())[2:-4]),
        ("br", PAGE.encode()),  # headers that are wrong
        ("unknown", PAGE.encode()),
    ],
    ids=["gzip", "br", "zstd", "zlib", "deflate", "not br", "unknown"],
)
def test_compressed_pages(tmp_path, encoding, body):
    head = f"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Encoding: {encoding}\r\n"
    kept, lost = read(tmp_path, response("a", body, head.encode()) + response("b", b"<p>b"))
    assert [d.text for d in kept] == [PAGE, "<p>b"]
    assert lost == []


@pytest.mark.parametrize("compress", [gzip.compress, brotli.compress, zstandard.compress])
def test_a_page_that_expands_without_end_is_not_held_in_memory(compress):
    name = {"gzip": b"gzip", "brotli": b"br"}.get(compress.__module__, b"zstd")
    bomb = compress(b"a" * (64 << 20))
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nTransfer-Encoding: chunked\r\n"
    body = b"%sContent-Encoding: %s\r\n\r\n%x\r\n%s\r\n0\r\n\r\n" % (
        head, name, len(bomb), bomb
    )  # fmt: skip
    tracemalloc.start()
    text, problem = warc_http.html_of_response(body, None, 1 << 20)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (text, problem) == (None, "page larger than 1,048,576 bytes")
    assert peak < 16 << 20


@pytest.mark.parametrize(
    ("charset", "encoding", "text"),
    [
        ("utf-8", "cp1251", "<p>привет, это страница на русском языке"),
        ("iso-8859-1", "cp1252", "<p>“It’s” – €"),
        ("us-ascii", "cp1252", "<p>It’s"),
        ("gb2312", "gbk", "<p>朱镕基"),
        ("Shift_JIS", "cp932", "<p>①日本語"),
        ("x-sjis", "cp932", "<p>日本語"),
        ("iso-2022-jp", "iso2022_jp", "<p>日本語"),
        ("windows-1251", "cp1251", "<p>привет"),
        ("", "utf-16", "<p>é"),
        ("", "utf-8-sig", "<p>é"),
    ],
)
def test_character_encodings(charset, encoding, text):
    header = f"text/html; charset={charset}".encode()
    assert warc_http.decode_html(text.encode(encoding), header) == text


def test_a_script_in_another_encoding_than_the_page():
    page = '<script charset="utf-8" src="a"></script><meta charset="windows-1251"><p>привет'
    assert warc_http.decode_html(page.encode("cp1251")) == page


@pytest.mark.parametrize("header", [b"text/html; charset=utf-8", b"text/html"])
def test_a_damaged_character_does_not_change_the_others(header):
    damaged = PAGE.encode() + b"\xff<p>" + PAGE.encode()
    assert warc_http.decode_html(damaged, header) == PAGE + "\ufffd<p>" + PAGE
    cut = PAGE.encode()[:6]
    assert cut.endswith(b"\xc3")
    assert warc_http.decode_html(cut, header) == "<p>na"


@pytest.mark.parametrize("charset", ["undefined", "idna", "punycode", "unicode_escape", "rot13"])
def test_what_is_no_encoding_of_the_web_does_not_end_the_file(tmp_path, charset):
    head = f"HTTP/1.1 200 OK\r\nContent-Type: text/html; charset={charset}\r\n".encode()
    page = "<p>привет, это страница на русском языке</p>" * 3
    content = response("a", page.encode("cp1251"), head) + response("b", b"<p>b")
    kept, lost = read(tmp_path, content)
    assert [d.text for d in kept] == [page, "<p>b"]
    assert lost == []


def test_an_error_in_a_record_does_not_end_the_file(tmp_path, monkeypatch):
    def fail_once(record):
        monkeypatch.undo()
        raise AttributeError

    monkeypatch.setattr(warc, "_html", fail_once)
    kept, lost = read(tmp_path, response("a", b"<p>a") + response("b", b"<p>b"))
    assert [d.text for d in kept] == ["<p>b"]
    assert lost == [("crawl: record 1", "error: AttributeError")]


def test_a_file_that_ends_in_the_first_lines_of_a_record(tmp_path):
    whole, next_one = record("a", "first"), record("b", "second")
    for size in range(1, 40):
        kept, _ = read(tmp_path, whole + next_one[:size])
        assert [d.id for d in kept] == ["<a>"]


@pytest.mark.skipif(not SAMPLES.exists(), reason="no samples")
@pytest.mark.parametrize(
    ("name", "pages"),
    [
        ("IAH-urls-wget.warc.gz", 2),
        ("ccnet-sample.wet.txt", 3),
        ("dolma-sample-0000.warc.gz", 22),
        ("html-multilang.warc.gz", 9),
        ("rebuilt.warc.wet.gz", 20),
        ("warcio-example.warc.gz", 1),
    ],
)
def test_pages_of_real_files(name, pages):
    documents = list(warc.WarcReader([[SAMPLES / name]], "commoncrawl").run(None))
    assert sum(not is_dropped(d) for d in documents) == pages
