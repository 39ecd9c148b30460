"""Which texts of evaluation sets are looked for, and which documents are dropped."""

import gzip
import json

import pytest

pytest.importorskip("datatrove", reason="needs the extra corpus")

import inline
from finished_corpora import all_lines, write_corpus

QUESTION = (
    "A farmer has seven red hens and sells two of them each day at the market, until none is left."
)
TRAIN = "This question is of the training split and so it is not looked for at all."
SHORT = "Which gas do plants take from the air?"  # 8 words
CHOICE = "the first amendment to the united states constitution"


@pytest.fixture
def evaluation(tmp_path):
    """A folder with one file of each format."""
    folder = tmp_path / "evaluation"
    for name in ("gsm8k", "arc", "mmlu/test", "boolq"):
        (folder / name).mkdir(parents=True)
    record = {"question": QUESTION, "answer": "4"}
    (folder / "gsm8k/test.jsonl").write_text('{"question": "short"}\n' + json.dumps(record) + "\n")
    train = {
        "question": "This question is of the training split and so it is not looked for at all"
    }
    (folder / "gsm8k/train.jsonl").write_text(json.dumps(train) + "\n")
    nested = {"question": {"stem": SHORT, "choices": [{"text": CHOICE, "label": "A"}]}}
    (folder / "arc/dev.json.gz").write_bytes(gzip.compress(json.dumps([nested]).encode()))
    (folder / "mmlu/test/law_test.csv").write_text(
        '"One, two, three, four, five, six, seven, ""eight"", nine, ten",A,B,C,D,A\n'
    )
    passage = " ".join(f"passage{i}" for i in range(40))
    boolq = {"passage": passage, "question": "is the first of all the passages a long one or not"}
    (folder / "boolq/dev.jsonl").write_text(json.dumps(boolq))
    return folder


def run(tmp_path, evaluation, texts, *overrides):
    documents = [{"id": str(i), "text": text} for i, text in enumerate(texts)]
    write_corpus(tmp_path / "corpora/c4", {"00000": documents})
    (tmp_path / "corpora/report.json").write_text(json.dumps(texts))  # of the corpora
    out = tmp_path / "out"
    inline.run("decontaminate", [tmp_path / "corpora", evaluation], out, overrides=overrides)
    kept = [int(d["id"]) for d in all_lines(out / "documents").get("c4/00000", [])]
    return kept, all_lines(out / "dropped/decontaminate")["00000"]


def test_documents_with_text_of_a_question_are_dropped(tmp_path, evaluation):
    thirteen = "has seven red hens and sells two of them each day at the"
    passage = " ".join(f"passage{i}" for i in range(40))
    texts = [
        f"Before it. A FARMER {thirteen.upper()}... after it.",  # other case and punctuation
        thirteen,
        thirteen.removesuffix(" the") + " his",  # 12 words only
        "He said: which gas do plants take\nfrom the air",
        "Which gas do plants take from air",  # a word is missing
        passage,  # a passage is no question
        "one two three four five six seven eight nine ten eleven",
        " ".join(reversed(thirteen.split())),  # another order
        TRAIN,
        "",
        CHOICE,
    ]
    kept, dropped = run(tmp_path, evaluation, texts)
    assert kept == [2, 4, 5, 7, 8, 9, 10]
    assert [d["question"] for d in dropped] == [
        "evaluation/gsm8k/test.jsonl: line 2",
        "evaluation/gsm8k/test.jsonl: line 2",
        "evaluation/arc/dev.json.gz: record 1",
        "evaluation/mmlu/test/law_test.csv: line 1",
    ]
    assert dropped[2]["reason"] == "contains text of evaluation/arc/dev.json.gz"
    assert dropped[0]["words"] == "a farmer " + thirteen.removesuffix(" at the")
    assert dropped[2]["words"] == "which gas do plants take from the air"


def test_a_field_that_is_not_ignored_counts(tmp_path, evaluation):
    passage = " ".join(f"passage{i}" for i in range(40))
    kept, dropped = run(tmp_path, evaluation, [passage], "ignored_fields=[]")
    assert kept == []
    assert dropped[0]["question"] == "evaluation/boolq/dev.jsonl: line 1"


def test_a_column_of_a_table_is_a_field(tmp_path):
    folder = tmp_path / "evaluation"
    folder.mkdir()
    question, source = (
        'How "often" does this happen in a year?',
        "one two three four five six seven",
    )
    (folder / "truthfulqa.tsv").write_text(f"Question\tSource\n{question}\t{source} eight nine\n")
    texts = [f"{source} eight nine", "how often does this happen in a year"]
    kept, dropped = run(tmp_path, folder, texts)
    assert kept == [0]
    assert dropped[0]["question"] == "evaluation/truthfulqa.tsv: line 2"
    assert dropped[0]["reason"] == "contains text of evaluation/truthfulqa.tsv"


def test_parquet(tmp_path):
    import pyarrow.parquet

    folder = tmp_path / "evaluation/nq"
    folder.mkdir(parents=True)
    table = pyarrow.table({"question": ["no", QUESTION], "answer": [["a", "b"], ["c"]]})
    pyarrow.parquet.write_table(table, folder / "validation.parquet")
    kept, dropped = run(tmp_path, folder.parent, [QUESTION])
    assert kept == []
    assert dropped[0]["question"] == "evaluation/nq/validation.parquet: record 2"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"question": "a"}\n{"question": \n', "test.jsonl line 2 is not JSON"),
        (b"\xff\xfe", "test.jsonl is not UTF-8"),
        ('{"question": "short"}\n', "has min_words = 8"),
    ],
)
def test_bad_evaluation_files(tmp_path, content, message):
    folder = tmp_path / "evaluation"
    folder.mkdir()
    content = content.encode() if isinstance(content, str) else content
    (folder / "test.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        run(tmp_path, folder, ["text"])


def test_without_evaluation_files(tmp_path):
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "evaluation/train.jsonl").write_text(json.dumps({"question": QUESTION}))
    with pytest.raises(ValueError, match="no files of evaluation sets"):
        run(tmp_path, tmp_path / "evaluation", ["text"])
