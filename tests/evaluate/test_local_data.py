"""Files of the data sets: which file is found, which formats are read, what errors say."""

import gzip
import hashlib
import json
import shutil
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from llama_jax.evaluate.local_data import (
    FILES_READ,
    MissingData,
    field,
    find,
    find_all,
    hashes,
    read_located,
    read_records,
    strings,
)
from llama_jax.evaluate.paper_task import TaskOptions

ROWS = [{"question": 'a, "b"?', "answer": "1"}, {"question": "ç\nd", "answer": "2"}]
TEXT = {
    "rows.jsonl": "\n".join(map(json.dumps, ROWS)) + "\n\n",
    "array.json": json.dumps(ROWS, indent=2),
    "lines.json": "\n".join(map(json.dumps, ROWS)),
    "object.json": json.dumps(ROWS[0], indent=2),
    "object.txt": json.dumps(ROWS[0]),
    "rows.csv": 'question,answer\n"a, ""b""?",1\n"ç\nd",2\n',
    "rows.tsv": 'question\tanswer\na, "b"?\t1\n',
}


@pytest.mark.parametrize("name", TEXT)
@pytest.mark.parametrize("compressed", [False, True])
def test_formats(tmp_path, name, compressed):
    path = tmp_path / (name + ".gz" * compressed)
    content = TEXT[name].encode("utf-8-sig" if name == "rows.csv" else "utf-8")
    path.write_bytes(gzip.compress(content) if compressed else content)
    expected = ROWS[:1] if name.startswith("object") or name == "rows.tsv" else ROWS
    assert read_records(path) == expected


def test_tables_without_a_header(tmp_path):
    path = tmp_path / "anatomy_test.csv"
    path.write_text("a,b\nc,d\n")
    assert read_records(path, ("x", "y")) == [{"x": "a", "y": "b"}, {"x": "c", "y": "d"}]


def test_all_parts_of_a_parquet_data_set_are_read(tmp_path):
    for i, row in enumerate(ROWS):
        table = pyarrow.Table.from_pylist([row])
        parquet.write_table(table, tmp_path / f"test-0000{i}-of-00002.parquet")
    assert read_records(tmp_path / "test-00000-of-00002.parquet") == ROWS
    (tmp_path / "test-00001-of-00002.parquet").unlink()
    with pytest.raises(ValueError, match=r"test-00001-of-00002\.parquet is missing"):
        read_records(tmp_path / "test-00000-of-00002.parquet")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"a": 1}\n{"a"\n', "a.jsonl line 2 is not JSON"),
        ("a.jsonl", b'{"a": 1}\n[1]\n', "a.jsonl line 2: expected an object"),
        ("a.jsonl", b"", "a.jsonl is empty"),
        ("a.jsonl", b"\n\n", "a.jsonl has no records"),
        ("a.json", b'[{"a": 1}, 3]', "a.json record 2 .*: expected an object"),
        ("a.json", b'{"a": 1,\n "b" 2}', "a.json line 2 is not JSON"),
        ("a.json", b"[" * 100_000, "a.json .*nested too deeply"),
        ("a.json", b"[]", "has no records|is not JSON"),
        ("a.csv", b"x,y\n1,2\n1\n", r"a\.csv line 3 has 1 columns; expected 2: x, y"),
        ("a.csv", b'x,y\n1,2\n"1,2\n', r"a\.csv line 3 has 1 columns"),
        ("a.csv", b"x,y\n", "has no records"),
        ("a.tsv", "x\ty\né\t1\n".encode("latin-1"), "is not UTF-8 text, from byte 4 on"),
        ("a.csv.gz", b"x,y\n1,2\n", "is damaged"),
        ("a.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 99, mtime=0)[:-9], "is damaged"),
        ("a.parquet", b"PAR1", "is not a parquet file"),
        ("a.bin", b"x", r"expected a \.jsonl"),
        ("a", b"x", r"expected a \.jsonl"),
        ("a.csv", b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
    ],
)
def test_damaged_files(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_records(tmp_path / name)


def test_fields_are_checked(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"q": "x", "label": true, "options": ["a", " "]}\n')
    (record,) = read_located(path)
    assert field(record, "q", str) == "x"
    assert field(record, "label", bool) is True
    for name, kind, message in (
        ("goal", str, 'line 1: field "goal" must be a string; fields: q, label, options'),
        ("q", list, "line 1: field \"q\" must be a list; it is 'x'"),
        ("label", int, "must be a whole number; it is True"),
    ):
        with pytest.raises(ValueError, match=message):
            field(record, name, kind)
    with pytest.raises(ValueError, match="strings that are not blank"):
        strings(record, "options")
    with pytest.raises(ValueError, match="at least 3 strings"):
        strings(record, "options", 3)
    path.write_text('{"q": "\\ud800", "options": ["a", "\\ud800"]}\n')
    (record,) = read_located(path)
    for read in (lambda: field(record, "q", str), lambda: strings(record, "options")):
        with pytest.raises(ValueError, match=r'line 1: field ".*" is not valid Unicode'):
            read()


def test_parts_as_the_hub_converts_them_are_read_together(tmp_path):
    """validation/0000.parquet, 0001.parquet, ...; and a first part that is missing is an error."""
    folder = tmp_path / "piqa/plain_text/validation"
    folder.mkdir(parents=True)
    options = TaskOptions(data=tmp_path)
    for i, row in enumerate(ROWS):
        parquet.write_table(pyarrow.Table.from_pylist([row]), folder / f"000{i}.parquet")
    (path,) = find_all(options, ("piqa",), ("*validation*.parquet",), "")
    assert read_records(path) == ROWS
    other = tmp_path / "siqa/validation-00001-of-00002.parquet"
    other.parent.mkdir()
    shutil.copy(path, other)
    (path,) = find_all(options, ("siqa",), ("*validation*.parquet",), "")
    with pytest.raises(ValueError, match=r"validation-00000-of-00002\.parquet is missing"):
        read_records(path)


def touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")


def test_which_file_is_found(tmp_path):
    options = TaskOptions(data=tmp_path)
    folders, patterns = ("arc", "ai2_arc"), ("*challenge*test*", "*challenge*dev*")
    with pytest.raises(MissingData) as missing:
        find(options, folders, patterns, "download X to DIR/arc/")
    assert "\n" not in str(missing.value)
    assert "download X to DIR/arc/" in str(missing.value)
    assert str(tmp_path / "arc") in str(missing.value)

    def found() -> str:
        return find(options, folders, patterns, "").relative_to(tmp_path).as_posix()

    touch(
        tmp_path / "d-arc-challenge-dev.jsonl", tmp_path / "arch-challenge-dev.jsonl"
    )  # other words
    with pytest.raises(MissingData):
        found()
    cached = "datasets--allenai--ai2_arc/snapshots/1/ARC-Challenge/dev.jsonl"
    touch(tmp_path / cached)
    assert found() == cached
    touch(tmp_path / "ARC-Challenge-Dev.jsonl")
    assert found() == "ARC-Challenge-Dev.jsonl"
    touch(tmp_path / "AI2-ARC" / "ARC-Challenge" / "test-00000-of-00001.parquet")
    assert found() == "AI2-ARC/ARC-Challenge/test-00000-of-00001.parquet"
    touch(tmp_path / "arc" / "ARC-Challenge-Dev.jsonl")  # a test set is preferred
    assert found() == "AI2-ARC/ARC-Challenge/test-00000-of-00001.parquet"
    touch(tmp_path / "arc" / "ARC-Challenge-Test.jsonl")
    assert found() == "arc/ARC-Challenge-Test.jsonl"


def test_the_data_folder_may_be_the_folder_of_one_data_set(tmp_path):
    touch(tmp_path / "boolq" / "dev.jsonl")
    options = TaskOptions(data=tmp_path / "boolq")
    assert find(options, ("boolq",), ("dev.jsonl",), "").name == "dev.jsonl"
    with pytest.raises(MissingData):
        find(options, ("siqa",), ("dev.jsonl",), "")
    touch(tmp_path / "boolq" / "boolq" / "x" / "dev.jsonl", tmp_path / "boolq" / ".dev.jsonl")
    assert len(find_all(options, ("boolq",), ("dev.jsonl",), "")) == 2  # each file once


def test_training_files_are_found_on_request_only(tmp_path):
    touch(tmp_path / "nq" / "train-dev.jsonl")
    options = TaskOptions(data=tmp_path)
    with pytest.raises(MissingData):
        find(options, ("nq",), ("*dev*",), "")
    assert find(options, ("nq",), ("*train*",), "").name == "train-dev.jsonl"


def test_files_read_are_recorded(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n{"a": 2}\n{')
    assert len(read_located(tmp_path / "a.jsonl", count=2)) == 2
    assert tmp_path / "a.jsonl" in FILES_READ


def test_hashes(tmp_path):
    few, many = tmp_path / "few", tmp_path / "many"
    touch(few / "b", few / "a", *(many / f"{i:02d}" for i in range(21)))
    x = hashlib.sha256(b"x").hexdigest()
    lines = "".join(f"{x}  {i:02d}\n" for i in range(21))
    assert hashes([*many.iterdir(), *few.iterdir(), few / "a"]) == {
        str(few / "a"): x,
        str(few / "b"): x,
        f"{many} (21 files)": hashlib.sha256(lines.encode()).hexdigest(),
    }


def test_no_data_folder(tmp_path):
    with pytest.raises(MissingData, match=r"--data DIR.*download X"):
        find(TaskOptions(), ("piqa",), ("valid.jsonl",), "download X")
    with pytest.raises(ValueError, match="does not exist"):
        find(TaskOptions(data=tmp_path / "absent"), ("piqa",), ("valid.jsonl",), "download X")
