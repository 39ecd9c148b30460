"""``llama-jax corpus``: the result and its manifest, continuation, explanations, bad input."""

import json
import os
import shutil

import pytest

pytest.importorskip("datatrove", reason="needs the extra corpus")

from corpus_tools import FILES, lines, tree, use_toy_source, write_inputs

from llama_jax.corpus import manifest as manifests
from llama_jax.corpus import recipe
from llama_jax.corpus.__main__ import main
from llama_jax.corpus.inputs import find_inputs
from llama_jax.prepare.text import find_files, read_documents


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a complete corpus of `FILES` in ``out``."""
    folder = tmp_path_factory.mktemp("made")
    write_inputs(folder / "in")
    with pytest.MonkeyPatch.context() as patch:
        use_toy_source(patch, folder / "configs")
        patch.chdir(folder)
        assert main(["toy", "in", "--output", "out"]) == 0
    return folder


@pytest.fixture
def done(corpus, made, tmp_path):
    """A copy of the corpus in ``out``, and of its input."""
    for name in ("in", "out"):
        shutil.copytree(made / name, tmp_path / name)
    return tmp_path / "out"


def test_documents_and_log(done):
    texts = [[d["text"] for d in lines(p)] for p in sorted(done.glob("documents/*"))]
    assert texts == [["ONE", "TWO"], ["THREE"]]
    first = lines(done / "documents/00000.jsonl.zst")[0]
    assert first == {
        "id": "toy/a/0",
        "text": "ONE",
        "source": "toy",
        "url": "http://a/0",
        "language": "en",
        "scores": {"length": 3.0},
        "metadata": {"place": "a.txt: record 1"},
    }
    assert [d["reason"] for d in lines(done / "dropped/lines/00001.jsonl.zst")] == [
        "invalid UTF-8",
        "too many characters",
    ]


def test_manifest_counts_what_goes_in_and_out_of_each_step(done):
    manifest = json.loads((done / "manifest.json").read_text())
    assert [(s["stage"], s["documents"], s["steps"]) for s in manifest["stages"]] == [
        (
            "lines",
            5,
            [
                {"step": "read", "in": 7, "out": 6, "dropped": {"invalid UTF-8": 1}},
                {"step": "upper", "in": 6, "out": 5, "dropped": {"too many characters": 1}},
            ],
        ),
        (
            "documents",
            3,
            [
                {"step": "read", "in": 5, "out": 5},
                {"step": "deduplicate", "in": 5, "out": 3, "dropped": {"duplicate": 2}},
            ],
        ),
    ]
    assert manifest["documents"] == 3
    assert manifest["text_bytes"] == len("ONETWOTHREE")
    assert [f["name"] for f in manifest["made_from"]["inputs"]] == [
        "in/a.txt",
        "in/b.txt",
        "in/c.txt",
    ]
    assert manifest["made_from"]["inputs"][0]["bytes"] == len(FILES["a"])
    assert manifest["notes"] == {"files": 3}
    assert manifest["files"]["documents/00000.jsonl.zst"]["documents"] == 2
    assert str(done.parent) not in (done / "manifest.json").read_text()
    assert not (done / "work/documents").exists()


def test_a_complete_corpus_is_left_as_it_is(corpus, done):
    before = {path: path.stat().st_mtime_ns for path in done.rglob("*") if path.name != ".lock"}
    status, shown, _ = corpus("toy", "in", "--output", "out")
    assert status == 0
    assert "complete already" in shown
    assert {p: p.stat().st_mtime_ns for p in done.rglob("*") if p.name != ".lock"} == before


@pytest.mark.parametrize("workers", [1, 4])
def test_equal_bytes_with_any_number_of_workers(corpus, done, workers):
    corpus("toy", "in", "--output", "other", "--workers", workers)
    assert tree(done.parent / "other") == tree(done)
    assert len(tree(done)) > 8


def test_changes_are_refused(corpus, done):
    assert corpus("toy", "in", "--output", "out", "max_characters=6")[::2] == (
        1,
        "error: out was made with other settings or input: max_characters was 5 and is now 6. "
        "Give the former ones, or a new folder for --output\n",
    )
    (done.parent / "in/b.txt").write_bytes(b"other")
    (done.parent / "in/c.txt").unlink()
    errors = corpus("toy", "in", "--output", "out")[2]
    assert "input in/b.txt has changed; input in/c.txt is missing." in errors


def test_models_are_input_too(corpus, done):
    (done.parent / "models").mkdir()
    (done.parent / "models/a.model").write_bytes(b"other")
    errors = corpus("toy", "in", "--output", "out", "--models", "models")[2]
    assert "models.a.model is new." in errors


def test_versions_are_settings_too(corpus, done, monkeypatch):
    monkeypatch.setattr(manifests, "source_version", lambda: "0")
    assert "versions.llama_jax was" in corpus("toy", "in", "--output", "out")[2]


def test_an_unchanged_copy_of_the_input_is_accepted(corpus, done):
    shutil.move(done.parent / "in/a.txt", done.parent / "copy")
    shutil.copy(done.parent / "copy", done.parent / "in/a.txt")
    assert corpus("toy", "in", "--output", "out")[0] == 0


def test_settings_may_change_before_a_task_is_complete(corpus, tmp_path):
    write_inputs(tmp_path / "in", {"fail": b"one\n"})
    status, _, errors = corpus("toy", "in", "--output", "out")
    assert status == 1
    assert "ValueError: no model: run llama-jax corpus models toy" in errors
    (tmp_path / "in/fail.txt").rename(tmp_path / "in/good.txt")
    assert corpus("toy", "in", "--output", "out", "max_characters=3")[0] == 0


def test_explain(corpus, done):
    explain = lambda wanted: corpus("toy", "--output", "out", "--explain", wanted)
    assert explain("toy/a/0")[1] == "toy/a/0: kept, documents/00000.jsonl.zst, document 1\n"
    assert explain("http://b/0")[1] == (
        "toy/b/0 (b.txt: record 1): dropped by step deduplicate of stage documents: duplicate\n"
    )
    assert explain("b.txt: line 1")[1] == (
        "b.txt: line 1: dropped by step read of stage lines: invalid UTF-8\n"
    )
    status, _, errors = explain("toy/a/7")
    assert status == 1
    assert "no document with the id, URL or place 'toy/a/7'; similar: toy/a/" in errors


def test_parquet_has_the_same_documents(corpus, done):
    parquet = pytest.importorskip("pyarrow.parquet")
    corpus("toy", "in", "--output", "parquet", "format=parquet")
    folder = done.parent / "parquet"
    rows = [r for p in sorted(folder.glob("documents/*.parquet")) for r in lines_of(parquet, p)]
    assert rows == [d for p in sorted(done.glob("documents/*")) for d in lines(p)]
    found = corpus("toy", "--output", "parquet", "--explain", "toy/c/0")[1]
    assert found == "toy/c/0: kept, documents/00001.parquet, document 1\n"


def lines_of(parquet, path):
    for row in parquet.read_table(path).to_pylist():
        yield {**row, "scores": dict(row["scores"]), "metadata": json.loads(row["metadata"])}


def test_prepare_reads_the_documents_only(done):
    def texts(path):
        source = find_files("web", str(path))
        return [document.text for document in read_documents(source, source.files)]

    assert texts(done) == ["ONE", "TWO", "THREE"]
    with pytest.raises(ValueError, match=r"parent folder of corpora; give one of them: .*/out"):
        texts(done.parent)
    (done / "manifest.json").unlink()
    with pytest.raises(ValueError, match="a corpus that is not complete; run its command again"):
        texts(done)


def test_names_of_files_that_are_not_utf_8_can_be_written(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    for name in (b"caf\xe9.txt", "café.txt".encode()):
        (folder / os.fsdecode(name)).write_bytes(b"text")
    files, names = find_inputs([folder])
    assert names == ["in/caf\\xe9.txt", "in/café.txt"]
    assert [os.fsencode(path.name) for path in files] == [b"caf\xe9.txt", "café.txt".encode()]


def test_a_corpus_as_input_is_its_manifest_and_documents(done):
    (done / "manifest.json").rename(done / "manifest")
    assert "out/work/run.json" in find_inputs([done])[1]
    (done / "manifest").rename(done / "manifest.json")
    assert find_inputs([done])[1] == [
        "out/documents/00000.jsonl.zst",
        "out/documents/00001.jsonl.zst",
        "out/manifest.json",
    ]


def test_all_sources_of_a_folder(corpus, tmp_path):
    (tmp_path / "dumps").mkdir()
    write_inputs(tmp_path / "dumps/toy")
    (tmp_path / "dumps/wikipedia").mkdir()
    (tmp_path / "recipe.toml").write_text("[toy]\nmax_characters = 3\n")
    command = ["all", "dumps", "--output", "out", "--recipe", "recipe.toml", "toy.sleep=0.001"]
    status, shown, errors = corpus(*command)
    assert status == 1
    assert "books: dumps/books does not exist: left out\n" in errors
    assert "\nerror: wikipedia: " in errors
    assert shown.split()[:3] == ["toy", "2", "documents"]
    settings = json.loads((tmp_path / "out/toy/manifest.json").read_text())["made_from"]["settings"]
    assert settings == {"max_characters": 3, "sleep": 0.001, "format": "jsonl"}
    errors = corpus(*command, "toi.sleep=1")[2]
    assert errors == "error: command line: toi is not a source; did you mean toy?\n"
    errors = corpus("all", "dumps", "--output", "out", "--recipe", "none.toml")[2]
    assert errors.count("\n") == 1, "one error, not one for each source"
    assert "none.toml" in errors


@pytest.mark.parametrize("source", [*recipe.SOURCES, *recipe.AFTERWARDS])
def test_shipped_recipes(source):
    small = recipe.recipes_folder() / "corpus-small.toml"
    settings, common = recipe.load_corpus_recipe(source, small, section=source)
    assert type(settings) is recipe.source_module(source).Settings
    assert common.format == "jsonl"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["toi", "in"], "unknown source 'toi'; did you mean toy?"),
        (["toy"], "give the files or folders that toy reads"),
        (
            ["toy", "--language", "en", "other.xml"],
            "other.xml is not the code of a language, such as",
        ),
        (["arxiv", "in", "--language", "en"], "--language does not apply to arxiv, which does"),
        (["deduplicate", "in", "--language", "en"], "--language does not apply to deduplicate"),
        (["toy", "missing"], "missing does not exist"),
        (["toy", "in", "max_character=3"], "unknown setting max_character; did you mean max_ch"),
        (["toy", "in", "format=csv"], "format='csv': input should be 'jsonl' or 'parquet'"),
        (["toy", "in", "--recipe", "none.toml"], "none.toml does not exist; give a file such"),
        (["toy", "in", "sleep", "=", "0"], "write settings as NAME=VALUE, without spaces"),
        (["toy", "in", "Max_characters=3"], "unknown setting Max_characters; did you mean max_ch"),
        (["toy", "in", "--output", "configs"], "configs has other files (corpus) and is not a c"),
        (
            ["toy", "in", "--output", "in/out"],
            "--output in/out and the input in contains the other",
        ),
        (["toy", "other.xml"], "other.xml does not look like toy (text files)"),
        (["toy", "in", "--output", "other.xml"], "other.xml is a file; give a folder"),
        (["toy", "--output", "none", "--explain", "x"], "none is not the folder of a corpus; give"),
        (["toy", "--output", "in", "--explain", "x"], "in is not the folder of a corpus; give one"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(corpus, tmp_path, arguments, message):
    write_inputs(tmp_path / "in")
    (tmp_path / "other.xml").write_text("<mediawiki>")
    output = [] if "--output" in arguments else ["--output", "out"]
    before = sorted(tmp_path.rglob("*"))
    status, _, errors = corpus(*arguments, *output)
    assert status == 1
    assert errors.startswith("error: ")
    assert message in errors
    assert errors.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before
