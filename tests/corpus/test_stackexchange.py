"""StackExchange: threads of questions and answers, HTML to text, damage, choice of sites."""

import bz2
import gzip
import time
from pathlib import Path
from types import SimpleNamespace
from xml.sax.saxutils import quoteattr

import pytest

pytest.importorskip("datatrove", reason="needs the extra corpus")

from corpus import inline

from llama_jax.corpus import manifest, stackexchange
from llama_jax.corpus.stackexchange_html import html_to_text
from llama_jax.corpus.steps import Stage

RAW = Path(__file__).parents[3] / "shared/data/raw/stackexchange"


@pytest.mark.parametrize(
    ("html", "text"),
    [
        (
            "<p>a <b>b</b>\nc &amp; &lt;d&gt;</p>\n\n<p>e<br>f<br/><br>g</p>",
            "a b c & <d>\n\ne\nf\n\ng",
        ),
        (
            "<p>x</p>\n<pre><code>def f():\n    return &lt;1&gt;\n\n\n\tx\n</code></pre>\n<p>y</p>",
            "x\n\ndef f():\n    return <1>\n\n\n\tx\n\ny",
        ),
        ("<p>use <code>a  b</code>  here</p>", "use a  b here"),
        (
            "<ul>\n<li>a</li>\n<li><p>b</p>\n\n<p>c</p><ol>\n<li>d</li><li>e</li></ol></li></ul><p>f</p>",
            "- a\n- b\n\n  c\n\n  1. d\n  2. e\n\nf",
        ),
        ("<p>x</p><ul><li>a<ul><li>b</li></ul></li><li>c</li></ul>", "x\n\n- a\n  - b\n- c"),
        ('<ol start="9"><li><pre><code>a\n  b</code></pre></li></ol>', "9. a\n     b"),
        (
            "<blockquote>\n  <p>a\nb</p>\n\n<p>c</p><pre><code>d\n\ne</code></pre></blockquote>f",
            "> a b\n>\n> c\n>\n> d\n>\n> e\n\nf",
        ),
        (
            "<a href='http://x'>link</a><img src='y' alt='z'>.<hr/>a<!-- b --><script>c</script>",
            "link.\n\na",
        ),
        (
            "<table><tr><th>a</th><th>b</th></tr><tr><td>1</td><td>2</td></tr></table>",
            "a | b\n1 | 2",
        ),
        ("<h1>a</h1>x<sup>2</sup> $a_1 < b$ &nbsp;", "a\n\nx2 $a_1 < b$"),
        # Damaged HTML.
        (
            "<li>a<li>b</blockquote>c</p>d <![if x]> e </pre></code>",
            "- a\n- b\n  c\n\n  d <![if x]> e",
        ),
        ("<pre>a\n <code>b</pre>c", "a\n b\n\nc"),
        ("<p>a <b", "a <b"),
        ("<p>a</p><pre><code>b\n  c\n", "a\n\nb\n  c"),
        ("", ""),
    ],
)
def test_html(html, text):
    assert html_to_text(html) == text


def test_damaged_html_takes_linear_time():
    start = time.process_time()
    for unit in ["<a ", "<!", "<![", "<!--", '<a href="', "<pre>", "<li>", "&#", "<blockquote>"]:
        html_to_text(unit * (20_000 // len(unit)))
    assert time.process_time() - start < 3


def test_deep_nesting_takes_linear_memory():
    for unit in ("<blockquote>a", "<ul><li>a"):
        assert len(html_to_text(unit * 2000)) < 2000 * 200
    assert html_to_text(f'<ol start="{"9" * 5000}"><li>a</li></ol>') == "1. a"


def row(number, kind=1, score=0, body="", parent=None, **more):
    values = {"Id": number, "PostTypeId": kind, "ParentId": parent, "Score": score, "Body": body}
    values = {key: value for key, value in {**values, **more}.items() if value is not None}
    attributes = " ".join(f"{key}={quoteattr(str(value))}" for key, value in values.items())
    return f"  <row {attributes} />\n".replace("\n ", "&#xA; ")


ROWS = [
    row(3, 2, 9, "<p>nine</p>", 1),
    row(
        1, 1, -2, "<p>body</p>", Title="What's {x}?", Tags="<a><b-c>", ContentLicense="CC BY-SA 4.0"
    ),
    row(4, 2, 10, "<pre><code>if a:\n    b</code></pre>", 1),
    row(5, 2, 9, "<p>later nine</p>", 1),
    row(6, 2, -1, "orphan", 99),
    row(7, 4, 0, "wiki of a tag"),
    row(8, 1, "x", "score is not a number"),
    row(9, 1, 1, "bad \x01 character"),
    row(10, 1, 3, "unanswered", Title="T", Tags="|d|"),
    row(3, 2, 50, "the same Id again", 1),
    row(11, 1, 3, "&entity;").replace("&amp;entity;", "&entity;"),
    row(12, 2, "9" * 400, "a score that no float has", 1),
    row(13, 2, 1, "an answer to itself", 13),
    row(14, 4, 0, "the row after the damaged ones"),
]


def posts(rows=ROWS):
    return (
        '\ufeff<?xml version="1.0" encoding="utf-8"?>\n<posts>\n' + "".join(rows) + "</posts>"
    ).encode()


def run(tmp_path, contents, **options):
    paths = []
    for name, content in contents.items():
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        paths.append(path)
    return inline.run("stackexchange", paths, tmp_path / "out", **options)


def test_a_site(tmp_path):
    documents, dropped, counts = run(tmp_path, {"cs.stackexchange.com-Posts.xml": posts()})
    first, second = documents
    assert first["text"] == (
        "Q: What's {x}?\n\nbody\n\nA: if a:\n    b\n\nA: nine\n\nA: later nine"
    )
    assert second["text"] == "Q: T\n\nunanswered"
    assert (first["id"], second["id"]) == ("stackexchange/cs/1", "stackexchange/cs/10")
    assert first["url"] == "https://cs.stackexchange.com/questions/1"
    assert first["scores"] == {"score": -2.0}
    metadata = first["metadata"]
    assert metadata["answer_scores"] == [10, 9, 9]
    assert (metadata["tags"], second["metadata"]["tags"]) == (["a", "b-c"], ["d"])
    assert (metadata["license"], metadata["title"]) == ("CC BY-SA 4.0", "What's {x}?")
    reasons = [(d["id"].partition("com-")[2] or d["id"], d["reason"]) for d in dropped]
    assert sorted(reasons) == sorted(
        [
            ("stackexchange/cs/6", "answer without its question"),
            ("stackexchange/cs/7", "not a question or an answer"),
            ("stackexchange/cs/14", "not a question or an answer"),
            ("stackexchange/cs/3", "an Id that an earlier post has"),
            *(
                (f"Posts.xml: byte {posts().index(ROWS[i].strip().encode())} of the XML",
                 "a damaged row, or one that is cut off")
                for i in (6, 7, 10, 11, 12)
            ),
        ]
    )  # fmt: skip
    assert counts["rows"][0]["read"] == len(ROWS)


def test_the_manifest_counts_answers_without_their_question(tmp_path):
    run(tmp_path, {"cs.stackexchange.com-Posts.xml": posts()})
    steps = [stackexchange.Threads([], {}), stackexchange.PlainText(None, 1)]
    output = SimpleNamespace(output=tmp_path / "out")
    described = manifest._describe(output, Stage("threads", steps, 1))
    assert described["steps"] == [
        {"step": "read", "in": 4, "out": 4},
        {
            "step": "join",
            "in": 4,
            "out": 2,
            "dropped": {"an Id that an earlier post has": 1, "answer without its question": 1},
        },
        {"step": "text", "in": 2, "out": 2},
    ]
    assert described["documents"] == 2


def test_the_form_is_a_setting(tmp_path):
    overrides = ['question="{title}: {body}"', 'answer="* {body}"', 'separator="\\n"']
    documents, _, _ = run(tmp_path, {"x.com/Posts.xml": posts()}, overrides=overrides)
    assert documents[0]["text"].startswith("What's {x}?: body\n* if a:")
    assert documents[0]["id"] == "stackexchange/x/1"
    with pytest.raises(ValueError, match=r"may contain \{title\} and \{body\}"):
        run(tmp_path / "b", {"Posts.xml": posts()}, overrides=['question="{titel}"'])


def test_parts_do_not_change_the_documents(tmp_path):
    one, _, _ = run(tmp_path / "a", {"x.com/Posts.xml": posts()})
    two, _, counts = run(tmp_path / "b", {"x.com/Posts.xml": posts()}, overrides=["part_bytes=300"])
    assert len(counts["threads"]) > 2
    assert [d["text"] for d in one] == [d["text"] for d in two]


def test_files_that_are_compressed_or_cut_off(tmp_path):
    py7zr = pytest.importorskip("py7zr")
    archive = tmp_path / "in/e.com.7z"
    archive.parent.mkdir()
    with py7zr.SevenZipFile(archive, "w") as file:
        file.writestr(b"<users><row Id='1' /></users>", "Users.xml")
        file.writestr(posts(), "Posts.xml")
    contents = {
        "a.com-Posts.xml.gz": gzip.compress(posts()),
        "b.com/Posts.xml.bz2": bz2.compress(posts()),
        "b.com/Users.xml": b"<users></users>",
        "c.com/Posts.xml": posts()[: posts().index(b"the same Id")],
        "d.com-Posts.xml.gz": gzip.compress(posts(), mtime=0)[:-60],
        "e.com.7z": archive.read_bytes(),
        "f.com-Posts.xml": b"<html>",
    }
    documents, dropped, _ = run(tmp_path, contents)
    by_site = {}
    for document in documents:
        by_site.setdefault(document["metadata"]["site"], []).append(document["text"])
    whole = by_site["a.com"]
    assert len(whole) == 2
    assert by_site["b.com"] == by_site["c.com"] == by_site["e.com"] == whole
    assert "f.com" not in by_site
    reasons = {d["reason"] for d in dropped}
    assert "not a Posts.xml: no <posts> element" in reasons
    assert "a truncated gzip member" in reasons


def test_an_archive_without_a_readable_post(tmp_path):
    documents, dropped, _ = run(tmp_path, {"e.com.7z": b"7z\xbc\xaf\x27\x1c" + bytes(40)})
    assert documents == []
    assert "no Posts.xml in the archive" in {d["reason"] for d in dropped}


def test_texts_beside_the_posts_are_no_sites(tmp_path):
    for site in ("a.com", "b.com"):
        (tmp_path / "in" / site).mkdir(parents=True)
        (tmp_path / "in" / site / "Posts.xml").write_bytes(posts())
        (tmp_path / "in" / site / "readme.txt").write_text("x")
    documents, _, counts = inline.run("stackexchange", [tmp_path / "in"], tmp_path / "out")
    assert [d["metadata"]["site"] for d in documents] == ["a.com", "a.com", "b.com", "b.com"]
    assert len(counts["rows"]) == 2


def test_the_largest_sites_are_kept_and_the_others_counted(tmp_path):
    small, large = posts(ROWS[1:2]), posts()
    contents = {"a.com-Posts.xml": small, "b.com-Posts.xml": large, "c.com-Posts.xml": small}
    documents, dropped, _ = run(tmp_path, contents, overrides=["largest=2"])
    assert {d["metadata"]["site"] for d in documents} == {"a.com", "b.com"}
    assert [d["reason"] for d in dropped].count("not one of the 2 largest sites") == 1


def test_languages_of_sites(tmp_path):
    contents = {"ru.stackoverflow.com-Posts.xml": posts(), "x.com-Posts.xml": posts()}
    documents, _, _ = run(tmp_path, contents, languages=["ru"])
    assert {d["language"] for d in documents} == {"ru"}
    assert documents[0]["id"] == "stackexchange/ru.stackoverflow/1"


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        ({"a.com/Users.xml": b""}, "none of the 1 files has posts"),
        ({"a.com/Posts.xml": b"", "a.com-Posts.xml": b""}, "both of the site a.com"),
    ],
)
def test_inputs_without_posts_are_refused(tmp_path, contents, message):
    with pytest.raises(ValueError, match=message):
        run(tmp_path, contents)


@pytest.mark.skipif(not RAW.exists(), reason="needs the raw samples")
def test_coffee_has_225_questions_with_answers_in_the_order_of_their_scores(tmp_path):
    documents, _, counts = inline.run("stackexchange", [RAW], tmp_path)
    assert len(documents) == 225
    scores = [document["metadata"]["answer_scores"] for document in documents]
    assert all(s == sorted(s, reverse=True) for s in scores)
    assert sum(map(len, scores)) == 327
    assert all(d["text"].count("A: ") >= len(s) for d, s in zip(documents, scores, strict=True))
    assert counts["rows"][0]["dropped"]["read"] == {"not a question or an answer": 40}
