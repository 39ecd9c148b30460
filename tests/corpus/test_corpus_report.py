"""The table of a corpus: hand-calculated shares and epochs, beside the paper's."""

import base64
import json

import pytest

pytest.importorskip("datatrove", reason="needs the extra corpus")
from finished_corpora import write_corpus

from llama_jax.corpus import report


@pytest.fixture
def folder(tmp_path):
    """Three sources: 800 bytes of books, 200 of Wikipedia in two languages, 40 of another."""
    corpora = {
        "wikipedia": {"en/00000": ["a" * 100, "b" * 60], "it/00001": ["c" * 40]},
        "books": {"00000": ["é" * 400]},
        "mine": {"00000": ["d" * 40]},
    }
    for source, files in corpora.items():
        texts = {n: [{"id": t[:1], "text": t} for t in found] for n, found in files.items()}
        write_corpus(tmp_path / "corpus" / source, texts)
    return tmp_path / "corpus"


def run(folder, *options):
    assert report.main([str(folder), *map(str, options)]) == 0
    return json.loads((folder / "report/report.json").read_text())


def test_shares_and_epochs_by_hand(folder, capsys):
    result = run(folder, "--tokens", "1000")
    rows = result["sources"]
    assert list(rows) == ["wikipedia", "books", "mine"]  # the paper's order, then others
    # Both have 4.5 % in the paper: half each. 4 bytes per token: 50, 200 and 10 tokens.
    assert {name: row["share"] for name, row in rows.items()} == {
        "wikipedia": 0.5, "books": 0.5, "mine": 0.0,
    }  # fmt: skip
    assert {name: row["tokens"] for name, row in rows.items()} == {
        "wikipedia": 50, "books": 200, "mine": 10,
    }  # fmt: skip
    assert {name: row["epochs"] for name, row in rows.items()} == {
        "wikipedia": 10.0, "books": 2.5, "mine": 0.0,
    }  # fmt: skip
    assert rows["wikipedia"]["documents"] == 3
    assert rows["books"]["text_bytes"] == 800
    files = sorted((folder / "wikipedia/documents").rglob("*.zst"))
    assert rows["wikipedia"]["file_bytes"] == sum(path.stat().st_size for path in files)
    text = (folder / "report/report.md").read_text()
    assert "an ESTIMATE: 4 bytes of text per token" in text
    assert "absent: arxiv, c4, commoncrawl, github, stackexchange" in text
    assert text.split("\n\n")[1] in capsys.readouterr().out
    line = next(line for line in text.splitlines() if line.startswith("| wikipedia"))
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[1:3] == ["50.0%", "10.00"]
    assert cells[4:] == ["200 B", "3", "50", "4.5%", "2.45", "83 GB"]
    assert (folder / "report/report.png").read_bytes().startswith(b"\x89PNG")


def test_tokens_are_counted_with_a_tokenizer(folder, tmp_path):
    tokens = b"".join(base64.b64encode(bytes([i])) + b" %d\n" % i for i in range(256))
    (tmp_path / "tokenizer").write_bytes(tokens)  # one token a byte
    result = run(folder, "--tokenizer", tmp_path / "tokenizer")
    assert result["sources"]["books"]["tokens"] == 800
    assert result["sources"]["wikipedia"]["tokens"] == 200
    assert not result["tokens_are_estimated"]
    # Without --tokens: those of the sources of the mixture.
    assert result["training_tokens"] == 1000
    assert result["sources"]["books"]["epochs"] == 500 / 800
    assert "ESTIMATE" not in (folder / "report/report.md").read_text()


def test_weights_and_tokens_of_a_recipe(folder, tmp_path):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        'extends = "tiny"\n[data.sources]\nmine = {path = "a", weight = 3}\n'
        'books = {path = "b", weight = 1}\n[train]\nsteps = 10\nbatch_size = 2\n'
    )
    result = run(folder, "--recipe", recipe)
    assert result["training_tokens"] == 10 * 2 * 256
    assert result["sources"]["mine"]["share"] == 0.75
    assert result["sources"]["wikipedia"]["share"] == 0.0


def test_published_shares_are_those_of_table_1():
    weights = report.published_weights()
    assert list(weights) == list(report.PUBLISHED)
    assert sum(weights.values()) == 100
    # The epochs follow from the tokens; those of Github, the only one below 1, from the fewest.
    assert min(report.PUBLISHED, key=lambda name: report.PUBLISHED[name][0]) == "github"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda d: None, "is not a folder"),
        (lambda d: d.mkdir(), "has no finished corpus"),
        (lambda d: write_corpus(d / "x", {"0": [{"id": "1", "text": "a"}]}), "have x"),
    ],
)
def test_bad_input(tmp_path, capsys, make, message):
    make(tmp_path / "corpus")
    assert report.main([str(tmp_path / "corpus")]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "corpus/report").exists()
