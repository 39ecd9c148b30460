"""C4: published rows, and expected pages of its rules."""

import json
import shutil

import pytest

pytest.importorskip("datatrove", reason="needs the extra corpus")
pytest.importorskip("spacy", reason="needs the extra corpus")
import fasttext
from corpus import inline
from datatrove.data import Document

from llama_jax.corpus import c4
from llama_jax.corpus.recipe import load_corpus_recipe

SETTINGS = load_corpus_recipe("c4").settings


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """A classifier of two languages in place of fastText's."""
    folder = tmp_path_factory.mktemp("models")
    english, german = (
        text.split()
        for text in (
            "the page has a line with some words and the end of it is",
            "die seite hat eine zeile mit ein paar wörtern und das ende ist da",
        )
    )
    rows = [
        f"__label__{label} {words[i % 14]} {words[i * 5 % 14]} {words[i * 3 % 14]}\n"
        for i in range(400)
        for label, words in (("en", english), ("de", german))
    ]
    (folder / "rows.txt").write_text("".join(rows), encoding="utf-8")
    model = fasttext.train_supervised(
        str(folder / "rows.txt"), thread=12, dim=10, epoch=20, verbose=0
    )
    model.save_model(str(folder / "lid.176.ftz"))
    return folder


def make(output, inputs, models, **options):
    shutil.copytree(models, output / "models")
    return inline.run("c4", inputs, output, **options)


def test_published_rows_are_kept_as_they_are(tmp_path, model_folder):
    rows = [
        {"text": "The page has {curly} brackets", "url": "http://a.org", "timestamp": "2019"},
        {"text": "Die Seite ist hier und hat das Ende", "url": ["http://b.org"]},
    ]
    lines = [json.dumps(rows[0]), "not JSON", '{"url": "x"}', json.dumps(rows[1])]
    path = tmp_path / "c4-train.json"
    path.write_text("\n".join(lines))
    documents, dropped, _ = make(tmp_path / "out", [path], model_folder)
    assert [(d["id"], d["text"], d["url"], d["language"]) for d in documents] == [
        ("c4/c4-train.json/1", rows[0]["text"], "http://a.org", "en"),
        ("c4/c4-train.json/4", rows[1]["text"], None, "de"),
    ]
    assert documents[0]["metadata"]["timestamp"] == "2019"
    assert [(d["place"], d["reason"]) for d in dropped] == [
        ("c4-train.json: line 2", "not a row of C4"),
        ("c4-train.json: line 3", "not a row of C4"),
    ]
    documents, dropped, _ = make(tmp_path / "en", [path], model_folder, languages=["en"])
    assert [d["id"] for d in documents] == ["c4/c4-train.json/1"]


FIVE = "One line is here. Two lines are here. Three are here.\nFour lines end. Five lines end."


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (FIVE, FIVE),
        (f"Menu\n{FIVE}\nA line without an end\nTwo words.\nIt goes on ...", FIVE),
        (f'{FIVE}\nHe said "it ends here!"', f'{FIVE}\nHe said "it ends here!"'),
        (f"{FIVE}\nPlease enable Javascript to read.", FIVE),
        (f"{FIVE}\nThis site uses cookies for you.\nRead our privacy policy now.", FIVE),
        (f"{FIVE}\n{'w' * 1001} is a long word.", FIVE),
        (f"{FIVE}\nIt cites [12] this [citation needed].", f"{FIVE}\nIt cites  this ."),
        ("One line is here. Two lines are here.", "too few sentences"),
        (f"{FIVE}\nThe text lorem ipsum is here.", "lorem ipsum"),
        (f"{FIVE}\nThe function {{ is here.", "curly bracket"),
    ],
)  # fmt: skip
def test_rules_for_lines_and_pages(text, expected):
    document = Document(text=text, id="a")
    reason = c4.QualityRules(SETTINGS.rules).process(document)
    assert (reason or document.text) == expected


def test_bad_words_are_whole_words(tmp_path):
    (tmp_path / "en.txt").write_text("Ass\nvery bad\n\n")
    step = c4.BadWords({"en": tmp_path / "en.txt"})
    texts = ["a class", "an ASS!", "this is very bad", "very badly", "ass"]
    found = [step.process(Document(t, "a", metadata={"language": "en"})) for t in texts]
    assert found == [None, "a bad word", "a bad word", None, "a bad word"]
    assert step.process(Document("ass", "a", metadata={"language": "de"})) is None
    with pytest.raises(ValueError, match=r"rules.bad_words: .*de.txt cannot be read"):
        c4.BadWords({"de": tmp_path / "de.txt"})


def wet(path, pages):
    lines = ["WARC/1.0", "WARC-Type: conversion", "WARC-Record-ID: {}", "Content-Length: {}"]
    record = "\r\n".join([*lines, "", "{}", "", ""])
    content = "".join(record.format(name, len(text), text) for name, text in pages)
    path.write_bytes(content.encode())
    return path


def story(name, numbers):
    """Sentences that differ in words: datatrove ignores numbers."""
    nouns = ("river", "city", "king", "novel", "island", "album", "war", "species")
    return " ".join(f"The {name} of the {nouns[n]} is here and has some words." for n in numbers)


@pytest.mark.parametrize("parts", [1, 2])
def test_repeated_spans_of_three_sentences_are_removed(tmp_path, model_folder, monkeypatch, parts):
    monkeypatch.setattr(c4, "TASKS_PER_COMPARISON", 2 // parts)
    first = wet(tmp_path / "a.wet", [("1", story("line", range(8))), ("2", story("end", range(8)))])
    again = f"{story('page', range(5))}\n{story('line', range(2, 6))} {story('word', range(3))}"
    second = wet(tmp_path / "b.wet", [
        ("3", again),
        ("4", story("end", range(8))),
        ("5", f"{story('it', range(6))}\n{story('line', range(3, 5))}"),
    ])  # fmt: skip
    documents, dropped, counts = make(
        tmp_path / "out", [second, first], model_folder, overrides=["language.min_score=0.1"]
    )
    texts = {d["id"]: d["text"] for d in documents}
    assert set(texts) == {"1", "2", "3", "5"}
    assert texts["1"] == story("line", range(8))
    assert texts["3"] == f"{story('page', range(5))} {story('word', range(3))}"
    assert texts["5"] == f"{story('it', range(6))}\n{story('line', range(3, 5))}"
    assert [(d["id"], d["step"], d["reason"]) for d in dropped] == [
        ("4", "repeated spans", "too short without repeated spans")
    ]
    assert [c["written"] for c in counts["pages"]] == [2, 3]


def test_published_files_and_crawl_files_are_not_mixed(tmp_path, model_folder):
    (tmp_path / "a.json").write_text('{"text": "a"}')
    page = wet(tmp_path / "b.wet", [("1", "text")])
    with pytest.raises(ValueError, match=r"b.wet is a WARC file and a.json is not"):
        make(tmp_path / "out", [tmp_path / "a.json", page], model_folder)
    assert c4.looks_like(b'{"url": "x", "text": "y"}', "a")
    assert not c4.looks_like(b'{"content": "x"}', "a")
