"""Books: headers of Project Gutenberg of all generations, kinds of files, near-duplicates."""

import io
import json
import random
import tarfile
import time
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("datatrove", reason="needs the extra corpus")

from corpus import inline
from datatrove.data import Document

from llama_jax.corpus import books, containment, decontaminate
from llama_jax.corpus.books_gutenberg import remove_gutenberg

RAW = Path(__file__).parents[3] / "shared/data/raw/gutenberg"

BODY = "CHAPTER I\n\nIt was the start of the story.\n\nThe end of the story."

MODERN = f"""The Project Gutenberg eBook of A Story

This ebook is for the use of anyone anywhere.

Title: A Story
        of Two Lines

Author: Ann Author

Release date: June 27, 2008 [eBook #123]
                Most recently updated: November 10, 2024

Language: French

Credits: Someone


*** START OF THE PROJECT GUTENBERG EBOOK A STORY OF TWO
LINES ***

Produced by Some One and the Online Distributed
Proofreading Team

{BODY}

*** END OF THE PROJECT GUTENBERG EBOOK A STORY ***

Updated editions will replace the previous one.
"""

OF_2005 = f"""Project Gutenberg's A Story, by Ann Author

Title: A Story

Language: English

*** START OF THIS PROJECT GUTENBERG EBOOK A STORY ***




E-text prepared by Some One

Note: Project Gutenberg also has an HTML version of this
      file which includes the original illustrations.

{BODY}




End of Project Gutenberg's A Story, by Ann Author

*** END OF THIS PROJECT GUTENBERG EBOOK A STORY ***

***** This file should be named 123.txt or 123.zip *****

*** START: FULL LICENSE ***
"""

OF_1995 = f"""***The Project Gutenberg Etext of A Story, by Ann Author***
#2 in our series

Please take a look at the important information in this header.

***START**THE SMALL PRINT!**FOR PUBLIC DOMAIN ETEXTS**START***
Why is this "Small Print!" statement here?
*END*THE SMALL PRINT! FOR PUBLIC DOMAIN ETEXTS*Ver.04.29.93*END*




This etext was prepared by Some One, a town.

{BODY}

End of The Project Gutenberg Etext of A Story
"""


@pytest.mark.parametrize(
    ("text", "about"),
    [
        (MODERN, ("A Story of Two Lines", "Ann Author", "fr", "123")),
        (OF_2005, ("A Story", "Ann Author", "en", None)),
        (OF_1995, ("A Story", "Ann Author", None, None)),
        (OF_1995.replace("*END*THE", "*END THE"), ("A Story", "Ann Author", None, None)),
        (OF_1995.replace("\nEnd of", "\nThis is the end of"), None),
        (MODERN.replace("*** ", "***").replace(" ***", "***"), None),
        (
            MODERN.replace("THE PROJECT", "THE COPYRIGHTED PROJECT"),
            ("A Story of Two Lines", "Ann Author", "fr", "123"),
        ),
        (
            OF_1995.replace("End of The Project", "Ende dieses Projekt"),
            ("A Story", "Ann Author", None, None),
        ),
        (
            OF_1995.replace("End of The Project", "Fin du Projet"),
            ("A Story", "Ann Author", None, None),
        ),
        (BODY, (None, None, None, None)),
        (BODY + "\n\n*** END OF THE PROJECT GUTENBERG EBOOK A ***\nmore", None),
        ("*** START OF THE PROJECT GUTENBERG EBOOK A ***\n" + BODY, None),
    ],
)
def test_headers_and_footers(text, about):
    book = remove_gutenberg(text)
    assert book.text == BODY
    if about:
        assert (book.title, book.author, book.language, book.number) == about


def test_blanks_in_a_line_take_linear_time():
    text = "a" + " " * 50_000 + "b  \nc"
    document = Document(
        text=text, id="a", metadata=dict.fromkeys(["title", "author", "language", "url"])
    )
    start = time.process_time()
    assert books.Gutenberg([]).process(document) is None
    assert time.process_time() - start < 0.5
    assert document.text == text.replace("  \n", "\n")


def test_archives_look_like_books():
    for name in ("1-h.tar", "a.b.tar.gz", "books.tgz", "pg.1.7z", "pg.1.zip"):
        assert books.looks_like(b"", name)
    assert not books.looks_like(b"", "a.pdf")


def test_a_book_twice_in_an_archive_is_kept_once(tmp_path):
    data = b"the only book of this archive of two members"
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for _ in range(2):
            info = tarfile.TarInfo("b.txt")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    documents, dropped, _ = inline.run("books", [tmp_path / "a.tar"], tmp_path / "out")
    assert [d["id"] for d in documents] == ["books/a.tar/b.txt"]
    assert [(d["id"], d["kept"]) for d in dropped] == [("books/a.tar/b.txt#2", "books/a.tar/b.txt")]


def test_what_looks_like_credits_in_the_book_is_kept():
    body = "\n\n".join(f"Paragraph {i}." for i in range(12)) + "\n\nProduced by nobody.\n\nEnd."
    marker = "*** START OF THE PROJECT GUTENBERG EBOOK A ***\n"
    assert remove_gutenberg(marker + "Produced by A\n\n\n\n" + body).text == body
    assert remove_gutenberg(body[-30:]).text == body[-30:]


def words(seed, n):
    rng = random.Random(seed)
    return [f"w{rng.randrange(5000)}" for _ in range(n)]


def run(tmp_path, contents, **options):
    folder = tmp_path / "in"
    for name, content in contents.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return inline.run("books", [folder], tmp_path / "out", **options)


def test_kinds_of_files(tmp_path):
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("story.txt", "zip " + " ".join(words(1, 50)))
        file.writestr("picture.jpg", b"\xff\xd8")
    record = {"text": "json " + " ".join(words(2, 50)), "short_book_title": "T", "language": "de"}
    contents = {
        "a.txt": b"\xef\xbb\xbfutf \xc5\xbd  \r\nline\r\n\r\n\r\n\r\n\r\nend",
        "a2.txt": "damaged “é” “è” ".encode() + b"\xff end",
        "b.txt": "latin caf\xe9 \x93quoted\x94".encode("latin-1"),
        "c.zip": archive.getvalue(),
        "d.jsonl": json.dumps(record) + '\nnot json\n{"text": 1}\n',
        "train/10.txt": "PG-19 " + " ".join(words(3, 50)),
        "train/metadata.csv": "10,T",
        "e.txt": b"\0\1\2",
        "f.txt": MODERN.replace(BODY, ""),
        "g.txt": "\ufeffutf 16".encode("utf-16-le"),
    }
    documents, dropped, _ = run(tmp_path, contents)
    by_id = {d["id"].removeprefix("books/in/"): d for d in documents}
    assert sorted(by_id) == [
        "a.txt",
        "a2.txt",
        "b.txt",
        "c.zip/story.txt",
        "d.jsonl/1",
        "g.txt",
        "train/10.txt",
    ]
    assert by_id["a.txt"]["text"] == "utf Ž\nline\n\n\nend"
    assert by_id["a2.txt"]["text"] == "damaged “é” “è” \ufffd end"
    assert by_id["b.txt"]["text"] == "latin café “quoted”"
    assert by_id["g.txt"]["text"] == "utf 16"
    assert by_id["train/10.txt"]["url"] == "https://www.gutenberg.org/ebooks/10"
    assert (by_id["d.jsonl/1"]["language"], by_id["a.txt"]["language"]) == ("de", None)
    assert by_id["d.jsonl/1"]["metadata"]["title"] == "T"
    assert {(d["place"], d["reason"]) for d in dropped} == {
        ("c.zip: picture.jpg", "not a text file"),
        ("d.jsonl: line 2", "not a JSON object with a text"),
        ("d.jsonl: line 3", "not a JSON object with a text"),
        ("metadata.csv", "not a text file"),
        ("e.txt", "not a text file"),
        ("f.txt", "no text"),
    }


@pytest.mark.parametrize("task_bytes", [1, 10**9])
def test_near_duplicates(tmp_path, task_bytes):
    book, other = words(1, 1000), words(2, 1000)
    contents = {
        "a/same.txt": " ".join(book),
        "b/longer.txt": " ".join([*words(3, 20), *book]),
        "c/other.txt": " ".join(other),
        "d/collection.txt": " ".join([*words(4, 3000), *other]),
        # 1 of 100 words changed: about 95% of the 5-grams are the same; 1 of 40: about 88%.
        "e/edited.txt": " ".join(w if i % 100 else "edit" for i, w in enumerate(book)),
        "f/rewritten.txt": " ".join(w if i % 40 else "rewrite" for i, w in enumerate(book)),
        "g/case.txt": "!\n".join(w.upper() for w in book[:500]),
    }
    overrides = [f"task_bytes={task_bytes}"]
    documents, dropped, counts = run(tmp_path, contents, overrides=overrides)
    assert [d["id"] for d in documents] == [
        "books/in/b/longer.txt",
        "books/in/d/collection.txt",
        "books/in/f/rewritten.txt",
    ]
    assert {d["id"]: d["kept"] for d in dropped} == {
        "books/in/a/same.txt": "books/in/b/longer.txt",
        "books/in/c/other.txt": "books/in/d/collection.txt",
        "books/in/e/edited.txt": "books/in/b/longer.txt",
        "books/in/g/case.txt": "books/in/b/longer.txt",
    }
    assert len(counts["books"]) == (7 if task_bytes == 1 else 1)
    assert {d["reason"] for d in dropped} == {"over 0.9 of its 5-grams are in a longer book"}


def test_of_equal_books_the_first_is_kept(tmp_path):
    text = " ".join(words(1, 100))
    documents, _, _ = run(tmp_path, {"b.txt": text, "a.txt": text, "c.txt": text})
    assert [d["id"] for d in documents] == ["books/in/a.txt"]


def test_languages(tmp_path):
    other = OF_2005.replace(BODY, "a text without a language").replace("English", "Klingon")
    contents = {"a.txt": MODERN, "b.txt": OF_2005.replace("story", "tale"), "c.txt": other}
    documents, dropped, _ = run(tmp_path, contents, languages=["en"])
    assert [d["language"] for d in documents] == ["en", None]
    assert [d["reason"] for d in dropped] == ["in a language that is not wanted"]


def samples_of(texts, rate):
    """Samples of texts that are arrays of distinct hashes."""
    sampled = [containment.sample(np.sort(hashes), rate) for hashes in texts]
    return containment.Samples(
        [f"{i:04d}" for i in range(len(texts))],
        np.array([len(hashes) for hashes in texts]),
        np.array([len(hashes) for hashes in sampled]),
        np.concatenate(sampled),
    )


def test_candidates_of_a_sample():
    """Copies with 93% in common are found in a sample of 1%, among n-grams that all texts have."""
    rng = np.random.default_rng(0)
    common = rng.integers(2**64, size=1000, dtype=np.uint64)
    texts = []
    for _ in range(40):
        own = rng.integers(2**64, size=4000, dtype=np.uint64)
        texts += [np.concatenate([own, common]), np.concatenate([own[:3700], common[:900]])]
    candidates = containment.find_candidates(samples_of(texts, 100))
    assert {(2 * i + 1, 2 * i) for i in range(40)} <= set(candidates)
    assert len(candidates) < 60


def test_many_copies_of_one_text():
    rng = np.random.default_rng(0)
    text = rng.integers(2**64, size=2000, dtype=np.uint64)
    texts = [text[: 2000 - i] for i in range(50)]
    samples = samples_of(texts, 20)
    found = containment.contained_texts(
        containment.find_candidates(samples), samples.ranks(), lambda i: np.sort(texts[i]), 0.9
    )
    assert sorted(found) == list(range(1, 50))
    assert {kept for kept, _ in found.values()} == {0}


def test_blocks_do_not_change_the_words_and_bound_the_memory(monkeypatch):
    text = "Ä first, a se_cond! ﬁ 12a\n" * 9 + "x" * 50
    whole = decontaminate.word_hashes(text)
    assert len(whole) == len(decontaminate.split_words(text))
    monkeypatch.setattr(decontaminate, "_BLOCK", 7)
    np.testing.assert_array_equal(decontaminate.word_hashes(text), whole)
    monkeypatch.setattr(decontaminate, "_BLOCK", 1 << 15)
    text = "ab cd ef " * 60_000
    tracemalloc.start()
    containment.distinct_hashes(text, 5)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20 * len(text)  # a list of the words alone takes 30


def test_texts_shorter_than_an_ngram():
    assert len(containment.distinct_hashes("One, two", 5)) == 1
    assert len(containment.distinct_hashes("...", 5)) == 0
    assert containment.sampling_rate(1000) == 1
    assert containment.find_candidates(samples_of([np.zeros(0, np.uint64)], 1)) == []


@pytest.mark.skipif(not RAW.exists(), reason="needs the raw samples")
def test_three_editions_of_alice_are_one_book(tmp_path):
    documents, dropped, _ = inline.run("books", [RAW], tmp_path)
    assert [d["id"] for d in documents] == [
        f"books/gutenberg/{name}.txt" for name in ("pg11-b", "pg16", "pg236")
    ]
    assert {d["kept"] for d in dropped} == {"books/gutenberg/pg11-b.txt"}
    text = documents[0]["text"]
    assert "Gutenberg" not in text
    assert documents[0]["metadata"]["title"] == "Alice's Adventures in Wonderland"
    assert text.endswith("THE END")
