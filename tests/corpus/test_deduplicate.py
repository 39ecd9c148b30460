"""Near-duplicates: which are found, which copy stays, and what is logged."""

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("datatrove", reason="needs the extra corpus")

import inline
from finished_corpora import all_lines, write_corpus

from llama_jax.corpus import deduplicate

RAW = Path(__file__).parents[2].parent / "shared/data/raw/gutenberg"


def words(first, count=60):
    return " ".join(
        f"word{chr(97 + i % 26)}{chr(97 + i // 26)}" for i in range(first, first + count)
    )


CORPORA = {
    "commoncrawl": {
        "head/00000": [
            # The same page as in Wikipedia, with other punctuation and case, and one more word.
            {"id": "cc/1", "text": words(0).upper() + "! more"},
            {"id": "cc/2", "text": words(100)},
        ],
        "tail/00001": [
            {"id": "cc/3", "text": words(100) + "."},
            {"id": "cc/4", "text": "too few words"},
            {"id": "cc/5", "text": "too few words"},
        ],
    },
    "wikipedia": {
        "00000": [
            {"id": "wikipedia/en/1", "text": words(200)},
            {"id": "wikipedia/en/2", "text": words(0)},
        ]
    },
}


def run(tmp_path, corpora, *overrides):
    for name, files in corpora.items():
        write_corpus(tmp_path / name, files)
    out = tmp_path / "out"
    inline.run("deduplicate", [tmp_path / name for name in corpora], out, overrides=overrides)
    return all_lines(out / "documents"), all_lines(out / "dropped/deduplicate")


def test_the_copy_of_the_first_source_stays(tmp_path):
    documents, dropped = run(tmp_path, CORPORA)
    assert {name: [d["id"] for d in found] for name, found in documents.items()} == {
        "wikipedia/00000": ["wikipedia/en/1", "wikipedia/en/2"],
        "commoncrawl/head/00001": ["cc/2"],
        "commoncrawl/tail/00002": ["cc/4", "cc/5"],
    }
    assert [(d["id"], d["reason"], d["kept"]) for file in dropped.values() for d in file] == [
        ("cc/1", "near-duplicate of a document of wikipedia", "wikipedia/en/2"),
        ("cc/3", "near-duplicate of a document of commoncrawl", "cc/2"),
    ]
    # Nothing else of a document changes.
    assert documents["wikipedia/00000"][0]["text"] == words(200)
    assert documents["wikipedia/00000"][0]["source"] == "wikipedia"
    assert "folder" not in documents["wikipedia/00000"][0]["metadata"]


def test_parquet_is_read(tmp_path):
    write_corpus(tmp_path / "wikipedia", CORPORA["wikipedia"], "parquet")
    write_corpus(tmp_path / "commoncrawl", CORPORA["commoncrawl"])
    documents, _, _ = inline.run(
        "deduplicate", [tmp_path / "wikipedia", tmp_path / "commoncrawl"], tmp_path / "out"
    )
    assert [d["id"] for d in documents] == [
        "cc/2", "cc/4", "cc/5", "wikipedia/en/1", "wikipedia/en/2",
    ]  # fmt: skip
    assert documents[3]["scores"] == {"length": 1.0}
    assert documents[3]["metadata"]["title"] == "A"
    assert documents[3]["source"] == "wikipedia"


def test_the_order_of_the_settings_decides(tmp_path):
    documents, _ = run(tmp_path, CORPORA, 'priority=["commoncrawl"]')
    assert [d["id"] for d in documents["commoncrawl/head/00000"]] == ["cc/1", "cc/2"]
    assert [d["id"] for d in documents["wikipedia/00002"]] == ["wikipedia/en/1"]


def test_many_files_are_read_by_few_tasks(tmp_path, monkeypatch):
    monkeypatch.setattr(deduplicate, "MAX_TASKS", 2)
    files = {f"0000{i}": [{"id": f"{i}", "text": words(50 * (i % 3))}] for i in range(5)}
    documents, dropped = run(tmp_path, {"c4": files, "books": {"00000": []}})
    assert list(documents) == ["c4/00001"]
    assert [d["id"] for d in documents["c4/00001"]] == ["0", "1", "2"]
    assert [(d["id"], d["kept"]) for d in dropped["00002"]] == [("3", "0"), ("4", "1")]


def test_nothing_is_dropped_without_duplicates(tmp_path):
    documents, dropped = run(tmp_path, {"wikipedia": CORPORA["wikipedia"]})
    assert len(documents["wikipedia/00000"]) == 2
    assert dropped == {"00000": []}


def test_groups_are_connected_and_keep_their_first_document():
    pairs = np.array([[2, 5, 1, 9], [1, 9, 3, 0], [0, 7, 0, 8], [0, 8, 0, 7]], np.uint32)
    assert deduplicate.removed_documents(pairs).tolist() == [
        [0, 8, 0, 7],
        [2, 5, 1, 9],
        [3, 0, 1, 9],
    ]


def test_a_long_document_is_hashed_in_parts(tmp_path, monkeypatch):
    config = deduplicate.MinhashConfig()
    signature = deduplicate.Signature(tmp_path, config)
    shingles = signature.get_shingles(words(0, 300))
    whole = signature.get_signature(shingles)
    monkeypatch.setattr(deduplicate, "_BLOCK", 7)
    assert signature.get_signature(shingles) == whole
    assert len(whole) == 14
    assert len(whole[0]) == 8


def test_an_unfinished_corpus_is_refused(tmp_path):
    folder, out = tmp_path / "c4", tmp_path / "out"
    write_corpus(folder, {"00000": [{"id": "1", "text": "a"}]})
    (folder / "work").mkdir()
    (folder / "manifest.json").rename(folder / "work/run.json")
    with pytest.raises(ValueError, match="c4 is not finished"):
        inline.run("deduplicate", [folder], out)
    with pytest.raises(ValueError, match="no finished corpus"):
        inline.run("deduplicate", [__file__], out)


@pytest.mark.skipif(not RAW.is_dir(), reason="needs the raw samples")
def test_editions_of_a_book_are_found(tmp_path):
    texts = {p.stem: p.read_text(encoding="utf-8-sig") for p in sorted(RAW.glob("*.txt"))}
    books = [{"id": name, "text": text} for name, text in texts.items()]
    documents, _ = run(tmp_path, {"books": {"00000": books}})
    assert [d["id"] for d in documents["books/00000"]] == ["pg11-a", "pg16", "pg236"]
