"""The page of results: what it shows of each kind of folder."""

import base64
import json
import re

import pytest

from llama_jax.report.__main__ import main

PNG = base64.b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGA")


@pytest.fixture
def results(tmp_path):
    run, corpus = tmp_path / "run", tmp_path / "corpus/report"
    run.mkdir()
    corpus.mkdir(parents=True)
    losses = {"loss": 3.25, "bits_per_byte": 2.0, "unigram_entropy": 5.5}
    records = [
        {"kind": "train", "step": 10, "tokens": 20480, "loss": 6.0},
        {"kind": "train", "step": 20, "tokens": 40960, "loss": 4.5},
        {"kind": "eval", "step": 20, "sources": {"books": losses, "code": losses}, **losses},
    ]
    lines = "".join(json.dumps(r) + "\n" for r in records)
    (run / "metrics.jsonl").write_text(lines + '{"kind": "tr')  # cut off by a crash
    (run / "loss.png").write_bytes(PNG)
    (corpus / "report.md").write_text("| source | share |\n| books | <50% |\n![a](report.png)\n")
    (corpus / "report.png").write_bytes(PNG)
    (tmp_path / "samples.txt").write_text("Once <b>upon</b> a time\n")
    return [run, corpus, tmp_path / "samples.txt"]


def test_the_page_has_tables_losses_pictures_and_samples(results, tmp_path, capsys):
    assert main([str(tmp_path / "out/page.html"), *map(str, results), "--title", "A & B"]) == 0
    text = (tmp_path / "out/page.html").read_text()
    assert "<h1>A &amp; B</h1>" in text
    assert "step 20, 40,960 tokens: training loss 4.500" in text
    assert "books: loss 3.250 (2.00 bits/byte), unigram baseline 5.500" in text
    assert "mixture: loss 3.250" in text
    assert "| books | &lt;50% |</pre>" in text  # the picture follows, not its name
    assert "Once &lt;b&gt;upon&lt;/b&gt; a time" in text
    pictures = re.findall('src="data:image/png;base64,([^"]+)"', text)
    assert [base64.b64decode(p) for p in pictures] == [PNG, PNG]
    assert "http" not in text  # the page loads nothing
    order = [text.index(f"<h2>{path}</h2>") for path in results]
    assert order == sorted(order)
    assert "page.html" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda run: (run / "metrics.jsonl").unlink(), "no metrics.jsonl and no report.md"),
        (lambda run: (run / "metrics.jsonl").write_text(""), "no training loss"),
        (lambda run: (run / "metrics.jsonl").write_text("[1]\n"), "no training loss"),
        (lambda run: (run / "metrics.jsonl").write_bytes(b"\xff"), "is not UTF-8"),
    ],
)
def test_results_that_cannot_be_shown(results, tmp_path, capsys, change, message):
    change(results[0])
    assert main([str(tmp_path / "page.html"), *map(str, results)]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "page.html").exists()


def test_bad_names(results, tmp_path, capsys):
    assert main([str(tmp_path / "page.md"), str(results[0])]) == 1
    assert "ends in .html" in capsys.readouterr().err
    assert main([str(tmp_path / "page.html"), str(tmp_path / "absent.txt")]) == 1
    assert "absent.txt does not exist" in capsys.readouterr().err
    (tmp_path / "file").touch()
    assert main([str(tmp_path / "file/page.html"), str(results[0])]) == 1
    assert capsys.readouterr().err == f"error: {tmp_path}/file: File exists\n"
