"""Dropped and unreadable documents are counted and logged; a task never ends because of one."""

import itertools
import json
import signal

import pytest

pytest.importorskip("datatrove", reason="needs the extra corpus")
zstandard = pytest.importorskip("zstandard")
from datatrove.data import Document  # noqa: E402

from llama_jax.corpus import steps  # noqa: E402


class Lines(steps.Reader):
    def read(self, path):
        for line in path.read_text(encoding="utf-8").splitlines():
            if line == "bad":
                yield self.skipped(f"{path.name}: line", "is bad")
            elif line == "damaged":
                raise EOFError
            else:
                yield Document(text=line, id=line, metadata={"source": "lines", "url": None})


class Short(steps.Step):
    name = "short"
    cpu_seconds = 0.2

    def process(self, document):
        if document.text == "error":
            raise KeyError("x")
        if document.text == "disk full":
            raise OSError(28, "No space left on device")
        while document.text == "forever":
            pass
        document.text = document.text.upper()
        return "more than 7 characters" if len(document.text) > 7 else None


def lines(path):
    with zstandard.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def run(tmp_path, text):
    (tmp_path / "in.txt").write_text(text, encoding="utf-8")
    data = None
    folders = [tmp_path / name for name in ("documents", "dropped", "counts")]
    for step in (Lines([[tmp_path / "in.txt"]]), Short(), steps.Writer(*folders)):
        data = step.run(data, 0, 1)
    assert len(list(data)) == json.loads((folders[2] / "00000.json").read_text())["written"]
    return [lines(folders[i] / "00000.jsonl.zst") for i in range(2)], json.loads(
        (folders[2] / "00000.json").read_text()
    )


def test_every_record_is_written_or_logged(tmp_path):
    text = "one\nbad\nerror\nfar too long\nforever\ntwo\ndamaged\nthree\n"
    (documents, dropped), counts = run(tmp_path, text)
    assert [d["text"] for d in documents] == ["ONE", "TWO"]
    assert documents[0]["metadata"] == {"place": "in.txt: record 1"}
    assert [(d["step"], d["reason"]) for d in dropped] == [
        ("read", "is bad"),
        ("short", "error: KeyError"),
        ("short", "more than 7 characters"),
        ("short", "took too much processor time"),
        ("read", "the rest of the file is unreadable: EOFError"),
    ]
    assert dropped[2]["place"] == "in.txt: record 4"
    assert counts["read"] == 7
    assert counts["written"] == 2
    assert counts["dropped"]["short"]["error: KeyError"] == 1


def test_sizes_are_those_of_the_written_text(tmp_path):
    surrogate = Document(text="a\ud800é", id="a", metadata={})  # such as of JSON
    list(steps.Writer(*(tmp_path / name for name in "dlc")).run([surrogate]))
    counts = json.loads((tmp_path / "c/00000.json").read_text())
    [written] = lines(tmp_path / "d/00000.jsonl.zst")
    assert counts["text_bytes"] == len(written["text"].encode()) == 4
    assert counts["characters"] == len(written["text"])


def test_the_limit_of_processor_time_uses_no_signal_of_others(monkeypatch):
    """TPU's compiler sends SIGPROF 100 times a second."""
    used, set_handler = [], signal.signal
    monkeypatch.setattr(signal, "signal", lambda *a: [used.append(a), set_handler(*a)][1])
    with pytest.raises(steps._OutOfTime), steps._cpu_limit(0.05):
        all(i >= 0 for i in itertools.count())
    assert [number for number, _ in used] == [signal.SIGVTALRM] * 2
    assert signal.getsignal(signal.SIGVTALRM) is signal.SIG_DFL
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0, 0)


def test_a_fault_of_the_machine_ends_the_task_and_leaves_no_file(tmp_path):
    with pytest.raises(OSError, match="No space left"):
        run(tmp_path, "one\ndisk full\n")
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["in.txt"]


def test_an_intermediate_file_that_is_missing_or_damaged_ends_the_task(tmp_path):
    path = tmp_path / "00000.jsonl.zst"
    with pytest.raises(FileNotFoundError):
        list(steps.Documents([[path]]).run(None))
    path.write_bytes(b"damaged")
    with pytest.raises(zstandard.ZstdError):
        list(steps.Documents([[path]]).run(None))


def test_a_stage_reads_what_an_earlier_one_wrote(tmp_path):
    run(tmp_path, "one\ntwo\n")
    read = list(steps.Documents([[tmp_path / "documents/00000.jsonl.zst"]]).run(None))
    assert [(d.text, d.id, d.metadata["source"]) for d in read] == [
        ("ONE", "one", "lines"),
        ("TWO", "two", "lines"),
    ]
