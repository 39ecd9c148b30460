"""Prepare: kinds of text, deterministic shards, the validation split, and error messages."""

import gzip
import hashlib
import itertools
import json
import logging
import os
import resource
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from llama_jax.config import DataConfig, SourceConfig, load_recipe
from llama_jax.data import mixture as data_module
from llama_jax.data.manifest import FORMAT, verify
from llama_jax.data.tokenizer import SentencePiece, Tokenizer
from llama_jax.prepare import mixture, shards
from llama_jax.prepare import source as source_module
from llama_jax.prepare import tokenizer as tokenizer_module
from llama_jax.prepare.__main__ import main, parse_source
from llama_jax.prepare.mixture import prepare_mixture
from llama_jax.prepare.records import key_of
from llama_jax.prepare.split import SplitRule, split_rule
from llama_jax.prepare.text import find_files, read_documents
from llama_jax.prepare.tokenizer import train_tokenizer

WORDS = ["every", "good", "boy", "does", "fine", "and", "then", "some", "123", "été", "日本", "x y"]


def texts(count: int, seed: int = 0) -> list[str]:
    """Different texts of about 150 bytes."""
    rng = np.random.default_rng(seed)
    return [f"text {i} of {seed}\n\n" + " ".join(rng.choice(WORDS, 25)) for i in range(count)]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    train_tokenizer(texts(100), 320, path)
    return str(path)


def config(model: str, workers: Any = 2, val_fraction: Any = 0.1, **paths: Any) -> DataConfig:
    sources = {name: SourceConfig(path=str(path)) for name, path in paths.items()}
    return DataConfig(
        sources=sources, tokenizer=model, seq_len=8, val_fraction=val_fraction, workers=workers
    )


def jsonl(path: Path, documents: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": t, "n": 1}) + "\n" for t in documents))
    return path


def manifest(folder: Path) -> dict:
    return json.loads((folder / "manifest.json").read_text())


def documents(folder: Path, split: str) -> list[list[int]]:
    """Ids of every document, read without code of llama_jax."""
    found, m = [], manifest(folder)
    dtype = {"uint16": "<u2", "uint32": "<u4"}[m["dtype"]]
    for shard in m["splits"][split]["shards"]:
        tokens = np.fromfile(folder / f"{shard['name']}.tokens", dtype)
        starts = np.fromfile(folder / f"{shard['name']}.starts", "<u8")
        ends = [*starts[1:], len(tokens)]
        found += [tokens[a:b].tolist() for a, b in zip(starts, ends, strict=True)]
    return found


def contents(folder: Path) -> dict[str, bytes]:
    """All files except locks."""
    files = [f for f in folder.rglob("*") if f.is_file() and f.name != ".lock"]
    return {str(f.relative_to(folder)): f.read_bytes() for f in files}


def write_every_kind(folder: Path, docs: list[str]) -> dict[str, Path]:
    """The same documents as a folder, .jsonl, .jsonl.gz, .jsonl.zst and .parquet."""
    folder.mkdir()
    for i, text in enumerate(docs):
        place = folder / "folder" / f"{i % 3}"
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{i:03d}{('.txt', '.md', '.py')[i % 3]}").write_bytes(text.encode())
    plain = jsonl(folder / "a.jsonl", docs).read_bytes()
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(plain))
    with pyarrow.CompressedOutputStream(str(folder / "c.jsonl.zst"), "zstd") as f:
        f.write(plain)
    table = pyarrow.table({"text": docs, "other": list(range(len(docs)))})
    parquet.write_table(table, folder / "d.parquet", row_group_size=7)
    names = ("folder", "a.jsonl", "b.jsonl.gz", "c.jsonl.zst", "d.parquet")
    return {name.partition(".")[0]: folder / name for name in names}


def test_every_kind_of_text_gives_the_same_documents(tmp_path, model):
    docs = texts(120)
    paths = write_every_kind(tmp_path / "in", docs)
    out = prepare_mixture(config(model, **paths), 320, tmp_path / "out")
    tokenizer = Tokenizer.load(model)
    expected = sorted(tokenizer.encode(t, bos=True, eos=True) for t in docs)
    held_out = {name: sorted(documents(out / name, "holdout")) for name in paths}
    for name in paths:
        assert sorted(held_out[name] + documents(out / name, "train")) == expected
        assert held_out[name] == held_out["folder"]
        splits = manifest(out / name)["splits"]
        assert splits["train"]["documents"] + splits["holdout"]["documents"] == 120
        assert sum(s["text_bytes"] for s in splits.values()) == sum(len(t.encode()) for t in docs)
    assert 1 <= len(held_out["folder"]) <= 30


def test_manifest_describes_the_files(tmp_path, model):
    source = jsonl(tmp_path / "a.jsonl", texts(80))
    out = prepare_mixture(config(model, a=source), 320, tmp_path / "out")
    top, m = manifest(out), manifest(out / "a")
    sha = hashlib.sha256(Path(model).read_bytes()).hexdigest()
    assert top["tokenizer"]["sha256"] == m["tokenizer_sha256"] == sha
    content = hashlib.sha256(json.dumps(m, sort_keys=True).encode()).hexdigest()
    assert top["sources"] == {"a": {"folder": "a", "weight": 1.0, "content": content}}
    assert (out / "tokenizer.model").read_bytes() == (out / "a" / "tokenizer.model").read_bytes()
    assert (m["format"], m["dtype"], m["path"]) == (FORMAT, "uint16", str(source))
    for name, split in m["splits"].items():
        docs = documents(out / "a", name)
        assert (split["documents"], split["tokens"]) == (len(docs), sum(map(len, docs)))
        for shard in split["shards"]:
            for kind in ("tokens", "starts"):
                content = (out / "a" / f"{shard['name']}.{kind}").read_bytes()
                assert hashlib.sha256(content).hexdigest() == shard[f"{kind}_sha256"]


def test_shards_are_the_same_for_any_number_of_workers(tmp_path, model, monkeypatch):
    monkeypatch.setattr(shards, "CHUNK_BYTES", 500)
    monkeypatch.setattr(shards, "SHARD_TOKENS", 700)
    source = jsonl(tmp_path / "a.jsonl", texts(150))
    made = []
    for workers in (1, 2, 7):
        out = prepare_mixture(config(model, workers, a=source), 320, tmp_path / f"out{workers}")
        made.append(contents(out))
        assert len(documents(out / "a", "train")) + len(documents(out / "a", "holdout")) == 150
    assert made[0] == made[1] == made[2]
    assert len([name for name in made[0] if "train" in name]) > 8


def test_a_large_vocabulary_needs_four_bytes_per_id(tmp_path, model, monkeypatch):
    monkeypatch.setattr(SentencePiece, "vocab_size", property(lambda self: 70000))
    out = prepare_mixture(
        config(model, a=jsonl(tmp_path / "a.jsonl", texts(30))), 70000, tmp_path / "out"
    )
    assert manifest(out / "a")["dtype"] == "uint32"
    expected = sorted(Tokenizer.load(model).encode(t, bos=True, eos=True) for t in texts(30))
    assert sorted(documents(out / "a", "train") + documents(out / "a", "holdout")) == expected


def test_only_what_changed_is_prepared_again(tmp_path, model, caplog):
    caplog.set_level(logging.INFO)
    source, out = jsonl(tmp_path / "a.jsonl", texts(80)), tmp_path / "out"
    other = str(tmp_path / "other.model")
    train_tokenizer(texts(100), 300, other)

    def run(model: str = model, val_fraction: float = 0.1) -> str:
        """Prepare; returns the output, and checks that shards changed only if there was output."""
        before = {f: f.stat().st_mtime_ns for f in out.glob("a/*")}
        caplog.clear()
        prepare_mixture(config(model, a=source, val_fraction=val_fraction), 320, out)
        said = " ".join(r.getMessage() for r in caplog.records)
        after = {f: f.stat().st_mtime_ns for f in out.glob("a/*")}
        assert (before == after) == (not said)
        return said

    prepare_mixture(config(model, a=source), 320, out)
    assert run() == ""
    jsonl(source, texts(80, seed=1))  # the same number of bytes
    assert "input changed" in run()
    assert run() == ""
    assert "val_fraction changed" in run(val_fraction=0.3)
    assert "tokenizer changed" in run(model=other, val_fraction=0.3)
    shard = out / "a" / "train-00000.tokens"
    shard.write_bytes(shard.read_bytes()[:-2])
    assert "a shard changed" in run(model=other, val_fraction=0.3)
    assert run(model=other, val_fraction=0.3) == ""
    names = [".lock", "a", "manifest.json", "tokenizer.model"]
    assert sorted(p.name for p in out.iterdir()) == names
    assert sorted(p.name for p in (out / "a").iterdir()) == [
        *(f"{split}-00000.{kind}" for split in ("holdout",) for kind in ("starts", "tokens")),
        "manifest.json", "tokenizer.model", "train-00000.starts", "train-00000.tokens",
    ]  # fmt: skip


def test_a_failure_leaves_no_incomplete_files(tmp_path, model, monkeypatch):
    """A damaged last line, a full disk, and files left by another run."""
    source, out = jsonl(tmp_path / "a.jsonl", texts(200)), tmp_path / "out"
    monkeypatch.setattr(shards, "CHUNK_BYTES", 500)
    good = source.read_text()
    # The split is decided first, so the broken line is read while shards are being written.
    source.write_text(good + '{"text": "never ends\n')
    with pytest.raises(ValueError, match="line 201 is not JSON"):
        prepare_mixture(config(model, a=source), 320, out)
    assert not (out / "a").exists()
    assert not list(out.glob("*.partial"))

    source.write_text(good)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    tokenizer_size = Path(model).stat().st_size
    resource.setrlimit(resource.RLIMIT_FSIZE, (tokenizer_size + 1000, hard))
    try:
        with pytest.raises(OSError, match="incomplete files were removed"):
            prepare_mixture(config(model, a=source), 320, out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not (out / "a").exists()
    assert not list(out.glob("*.partial"))

    (out / "a.partial").mkdir()
    (out / "a.partial" / "train-00007.tokens").write_bytes(b"stale")
    prepare_mixture(config(model, a=source), 320, out)
    assert not list(out.glob("*.partial"))
    assert not (out / "a" / "train-00007.tokens").exists()
    whole = contents(out)

    # The old folder stays usable when making a new one fails.
    source.write_text(good + "no json\n")
    with pytest.raises(ValueError, match="not JSON"):
        prepare_mixture(config(model, a=source), 320, out)
    assert contents(out) == whole


def test_killed_while_writing(tmp_path, model, monkeypatch):
    """SIGKILL while a source is written: it does not count as complete, and a new run continues."""
    source, out = jsonl(tmp_path / "a.jsonl", texts(3000)), tmp_path / "out"
    code = f"""
import os, signal
from llama_jax.prepare import mixture, shards
from llama_jax.config import DataConfig, SourceConfig, load_recipe
shards.CHUNK_BYTES, shards.PROGRESS_BYTES = 5000, 20000
add, count = shards.ShardWriter.add, 0
def killed(self, *args):
    global count
    count += 1
    if count == 40:
        os.kill(os.getpid(), signal.SIGKILL)
    add(self, *args)
shards.ShardWriter.add = killed
mixture.prepare_mixture(DataConfig(sources={{"a": SourceConfig(path={str(source)!r})}},
    tokenizer={model!r}, seq_len=8, val_fraction=0.1, workers=2), 320, {str(out)!r})
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert run.returncode == -9, run.stderr
    assert (out / "a.partial").is_dir()
    damaged = tmp_path / "damaged"
    shutil.copytree(out, damaged)
    assert not (out / "a").exists()
    with pytest.raises(ValueError, match=r"no manifest.json"):
        data_module.open_mixture(out)
    monkeypatch.setattr(shards, "CHUNK_BYTES", 5000)
    encode, encoded = shards._encode, []
    monkeypatch.setattr(
        shards, "_encode", lambda *args: encoded.append(len(args[-1])) or encode(*args)
    )
    prepare_mixture(config(model, a=source), 320, out)
    assert 0 < sum(encoded) < 2700
    fresh = prepare_mixture(config(model, a=source), 320, tmp_path / "fresh")
    assert contents(out) == contents(fresh)
    # A unit whose partial files are damaged is encoded again.
    tokens = damaged / "a.partial/unit-00000/train-00000.tokens"
    tokens.write_bytes(tokens.read_bytes()[:100] + b"\0" * 10)
    assert contents(prepare_mixture(config(model, a=source), 320, damaged)) == contents(fresh)


class Killed(BaseException):
    """Ends a run without clean-up, as a kill does."""


def write_folder(folder: Path) -> Path:
    """Files for several units: .jsonl, text of several blocks, and short texts."""
    folder.mkdir()
    for i in range(4):
        jsonl(folder / f"{i}.jsonl", texts(60, i))
    (folder / "long.txt").write_text("\n\n".join(texts(300, 8)))
    for i in range(12):
        (folder / f"text{i:02d}.txt").write_text(texts(1, 20 + i)[0])
    return folder


@pytest.fixture
def small_units(monkeypatch):
    monkeypatch.setattr(shards, "CHUNK_BYTES", 700)
    monkeypatch.setattr(shards, "SHARD_TOKENS", 2000)
    monkeypatch.setattr(source_module, "UNIT_BYTES", 12_000)


def test_killed_anywhere_and_continued_gives_the_same_bytes(
    tmp_path, model, small_units, monkeypatch
):
    """Killed again and again: between and inside writes, while progress is recorded, and while the
    units are merged; what was encoded before a record is not encoded again."""
    source = write_folder(tmp_path / "in")
    cfg = config(model, a=source)
    whole = contents(prepare_mixture(cfg, 320, tmp_path / "whole"))
    assert len([n for n in whole if n.endswith(".tokens")]) > 8
    encoded: list[int] = []
    encode = shards._encode
    monkeypatch.setattr(
        shards, "_encode", lambda *args: encoded.append(len(args[-1])) or encode(*args)
    )
    prepare_mixture(cfg, 320, tmp_path / "again")
    once, rng = sum(encoded), np.random.default_rng(0)
    for progress_bytes in (1, 3000):
        monkeypatch.setattr(shards, "PROGRESS_BYTES", progress_bytes)
        out, kills, done = tmp_path / f"killed{progress_bytes}", 0, False
        encoded.clear()
        while not done:
            left = [int(rng.integers(1, 60))]

            def countdown(call: Any, left: list[int] = left) -> Any:
                def counted(*args: Any, **more: Any) -> Any:
                    left[0] -= 1
                    if left[0] > 0:
                        return call(*args, **more)
                    for f in getattr(args[0], "_files", ()):  # a part of it is in the files
                        f.write(b"torn")
                        f.flush()
                    raise Killed

                return counted

            with monkeypatch.context() as patch:
                patch.setattr(shards.ShardWriter, "add", countdown(shards.ShardWriter.add))
                for module in (mixture, source_module, shards, tokenizer_module):
                    for name in ("atomic_write", "write_manifest", "sync_folder"):
                        if call := getattr(module, name, None):
                            patch.setattr(module, name, countdown(call))
                patch.setattr(Path, "rename", countdown(Path.rename))
                try:
                    prepare_mixture(cfg, 320, out)
                    done = True
                except Killed:
                    kills += 1
        assert kills > 3
        assert contents(out) == whole
        assert sum(encoded) < once * 3, (sum(encoded), once, kills)


def test_several_processes_share_the_work(tmp_path, model, small_units, monkeypatch):
    """Processes started together each encode some units; the result is that of one process."""
    cfg = config(model, 1, a=write_folder(tmp_path / "in"))
    whole = contents(prepare_mixture(cfg, 320, tmp_path / "whole"))
    made: dict[str, int] = {}
    encode, errors = shards.encode_files, []

    def counted(*args: Any) -> None:
        name = threading.current_thread().name
        made[name] = made.get(name, 0) + 1
        time.sleep(0.05)
        encode(*args)

    def run() -> None:
        try:
            prepare_mixture(cfg, 320, tmp_path / "out")
            assert contents(tmp_path / "out") == whole
        except BaseException as e:
            errors.append(e)

    monkeypatch.setattr(shards, "encode_files", counted)
    processes = [threading.Thread(target=run, name=f"host {i}") for i in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert not errors
    units = source_module._units(find_files("a", cfg.sources["a"].path))
    assert len(units) >= 4
    assert sum(made.values()) == len(units)
    assert len(made) > 1


def test_skipped_bad_lines_are_counted(tmp_path, model, caplog, capsys):
    good = texts(80)
    lines = [json.dumps({"text": t}) for t in good]
    bad = [
        "no json",
        '{"text": 5}',
        "[" * 100_000,
        '{"body": "x"}',
        '{"text": "\\ud800"}',
        '"text"',
    ]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(lines[:40] + bad + lines[40:]))
    arguments = [str(tmp_path / "out"), "--source", f"a={path}", "--tokenizer", model]
    with pytest.raises(SystemExit, match=r"a.jsonl line 41 is not JSON.*\(--skip-bad-lines"):
        main([*arguments, "--val-fraction", "0.001"])
    main([*arguments, "--skip-bad-lines"])
    assert "left out 6 bad lines: 3 no text, 2 not JSON, 1 not Unicode" in caplog.text
    out = tmp_path / "out" / "a"
    assert manifest(out)["bad_lines"] == {"no text": 3, "not JSON": 2, "not Unicode": 1}
    assert len(documents(out, "train") + documents(out, "holdout")) == 80
    # Without the option, the prepared result is not accepted.
    with pytest.raises(SystemExit, match="line 41 is not JSON"):
        main([*arguments])
    text = tmp_path / "b.txt"
    text.write_bytes("\n\n".join(texts(200)).encode().replace(b"of 0", b"of \xe9", 1))
    main(
        [str(tmp_path / "out2"), "--source", f"b={text}", "--tokenizer", model, "--skip-bad-lines"]
    )
    assert manifest(tmp_path / "out2" / "b")["bad_lines"] == {"not UTF-8": 1}
    text.write_bytes(b"caf\xe9")
    with pytest.raises(SystemExit, match=r"no text that is not blank; left out: 1 x not UTF-8$"):
        main([str(tmp_path / "out3"), "--source", f"b={text}", "--vocab-size", "320",
              "--skip-bad-lines"])  # fmt: skip


def test_a_tokenizer_that_loses_text_is_refused(tmp_path):
    import sentencepiece

    for name, more in (("unknown", {}), ("normalizes", {"byte_fallback": True})):
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(["some plain words here"] * 50),
            model_prefix=str(tmp_path / name), vocab_size=280 if more else 22, model_type="bpe",
            hard_vocab_limit=False, minloglevel=3, **more,
        )  # fmt: skip
        source = jsonl(
            tmp_path / "a.jsonl", ["some plain words", "some  words: 日本", "plain here"]
        )
        with pytest.raises(
            ValueError, match=r"tokenizer.model loses text of source a: 1 of the 3 .*becomes"
        ):
            prepare_mixture(
                config(str(tmp_path / f"{name}.model"), a=source), 300, tmp_path / "out"
            )
        assert not list((tmp_path / "out").glob("a*"))


def test_a_moved_mixture_is_found(tmp_path, model):
    """If mixture, source or both were moved; another source in its place is not accepted."""
    a, b = jsonl(tmp_path / "a.jsonl", texts(60)), jsonl(tmp_path / "b.jsonl", texts(60, 1))
    (tmp_path / "one").mkdir()
    prepare_mixture(config(model, x=a), 320, tmp_path / "one" / "parts")
    out = prepare_mixture(
        config("", x=tmp_path / "one" / "parts" / "x", b=b), 320, tmp_path / "one" / "mix"
    )
    shards = data_module.open_mixture(out).sources["x"].manifest["splits"]
    (tmp_path / "one").rename(tmp_path / "two")
    found = data_module.open_mixture(tmp_path / "two" / "mix")
    assert found.sources["x"].folder.resolve() == tmp_path / "two" / "parts" / "x"
    (tmp_path / "two" / "parts" / "x").rename(tmp_path / "two" / "y")
    found = data_module.open_mixture(tmp_path / "two" / "mix")
    assert found.sources["x"].folder.resolve() == tmp_path / "two" / "y"
    assert found.sources["x"].manifest["splits"] == shards
    assert verify(tmp_path / "two" / "mix") == []
    (tmp_path / "two" / "y").rename(tmp_path / "elsewhere")
    prepare_mixture(config(model, x=b), 320, tmp_path / "two" / "parts")
    with pytest.raises(ValueError, match=r"source x of .* is neither at .* nor next to"):
        data_module.open_mixture(tmp_path / "two" / "mix")


def test_no_document_in_both_splits(tmp_path, model):
    """All copies of a text, in one source or in two, are in one split."""
    docs = texts(100)
    many = jsonl(tmp_path / "a.jsonl", docs + docs[::-1] + docs[:50])
    some = jsonl(tmp_path / "b.jsonl", docs[20:])
    out = prepare_mixture(config(model, a=many, b=some, val_fraction=0.3), 320, tmp_path / "out")
    held_out = {tuple(d) for n in "ab" for d in documents(out / n, "holdout")}
    trained = {tuple(d) for n in "ab" for d in documents(out / n, "train")}
    assert held_out
    assert trained
    assert not held_out & trained
    assert len(documents(out / "a", "train") + documents(out / "a", "holdout")) == 250


@pytest.mark.parametrize("seed", range(5))
def test_both_splits_have_a_document(tmp_path, model, seed):
    """Also with two documents and a small val_fraction."""
    source = jsonl(tmp_path / "a.jsonl", texts(2, seed))
    out = prepare_mixture(config(model, a=source, val_fraction=0.001), 320, tmp_path / "out")
    assert len(documents(out / "a", "train")) == len(documents(out / "a", "holdout")) == 1


def test_one_rule_for_all_sources(tmp_path, model):
    """A validation document of a small source is a validation document of a large one."""
    docs = texts(100)
    keys = {t: key for t in docs for key in [key_of(t)]}
    small = sorted(docs, key=keys.get)[40:45]  # none is below the threshold
    big, few = jsonl(tmp_path / "big.jsonl", docs), jsonl(tmp_path / "few.jsonl", small)
    out = prepare_mixture(config(model, big=big, few=few, val_fraction=0.05), 320, tmp_path / "out")
    held_out = {n: {tuple(d) for d in documents(out / n, "holdout")} for n in ("big", "few")}
    trained = {tuple(d) for n in ("big", "few") for d in documents(out / n, "train")}
    assert len(held_out["few"]) == 1
    assert held_out["few"] <= held_out["big"]
    assert not trained & (held_out["big"] | held_out["few"])
    # Prepared folders keep their exceptions and their share.
    more = prepare_mixture(
        config("", few=out / "few", big=big, val_fraction=0.05), 320, tmp_path / "more"
    )
    assert {tuple(d) for d in documents(more / "big", "holdout")} == held_out["big"]
    with pytest.raises(
        ValueError, match=r"validation fraction differs: 0.05 in few, 0.1 in the other sources"
    ):
        prepare_mixture(config("", few=out / "few", big=big), 320, tmp_path / "more2")
    # Two sources of two texts each, where no split can be right.
    ordered = sorted(docs, key=keys.get)
    a, b = (jsonl(tmp_path / f"{i}.jsonl", ordered[i : i + 2]) for i in (50, 51))
    with pytest.raises(ValueError, match="source a: no document is left for training"):
        prepare_mixture(config(model, a=a, b=b, val_fraction=0.01), 320, tmp_path / "none")


def test_blocks_of_a_long_file_stay_together(tmp_path):
    """A file is in one split as a whole; a file that is most of the text, by sections."""
    for i in range(60):
        (tmp_path / f"{i:02d}.txt").write_text("\n\n".join(texts(40, i)))
    source = find_files("a", str(tmp_path))
    assert source.section_blocks == 0
    blocks = [list(read_documents(source, [f])) for f in source.files]
    assert min(map(len, blocks)) > 1
    assert all(len({d.key for d in file}) == 1 for file in blocks)
    assert len({file[0].key for file in blocks}) == 60
    (tmp_path / "one.txt").write_text("\n\n".join(texts(60_000)))
    source = find_files("a", str(tmp_path / "one.txt"))
    keys = [d.key for d in read_documents(source, source.files)]
    changes = sum(x != y for x, y in itertools.pairwise(keys))
    assert changes == len(set(keys)) - 1
    assert 90 < len(set(keys)) < 230
    assert source.section_blocks == len(keys) // changes > 0


def test_one_document_cannot_be_split(tmp_path, model):
    source = jsonl(tmp_path / "a.jsonl", texts(1) * 3)
    with pytest.raises(ValueError, match="one document"):
        prepare_mixture(config(model, a=source), 320, tmp_path / "out")


def test_a_long_file_is_cut_at_blank_lines(tmp_path, model, caplog):
    caplog.set_level(logging.INFO)
    text = "\n\n".join(texts(600))
    (tmp_path / "a.txt").write_text(text)
    source = find_files("a", str(tmp_path / "a.txt"))
    cut = [d.text for d in read_documents(source, source.files)]
    assert "".join(cut) == text
    assert 50 < len(cut) < 250
    assert all(c.endswith("\n\n") for c in cut[:-1])
    prepare_mixture(config(model, a=tmp_path / "a.txt"), 320, tmp_path / "out")
    assert f"1 text files split into {len(cut)} documents" in caplog.text


@pytest.mark.parametrize("text", ["é" * 9000, "日本語" * 3000, "word " * 3000, "line\n" * 3000])
def test_text_without_blank_lines_is_cut_between_characters(tmp_path, text):
    (tmp_path / "a.txt").write_text(text)
    source = find_files("a", str(tmp_path / "a.txt"))
    cut = [d.text for d in read_documents(source, source.files)]
    assert "".join(cut) == text
    assert max(len(c.encode()) for c in cut) <= source.block_bytes


def test_text_is_kept_byte_for_byte(tmp_path, model):
    (tmp_path / "in").mkdir()
    bodies = ["a\r\nb\r\n", "\ttabs\n\n\n", "  spaces  ", "no newline", "é 😀\n"]
    for i, body in enumerate(bodies):
        (tmp_path / "in" / f"{i}.txt").write_bytes(body.encode())
    (tmp_path / "in" / "5.txt").write_bytes(
        b"\xef\xbb\xbfmarked"
    )  # the byte order mark is not text
    out = prepare_mixture(config(model, a=tmp_path / "in"), 320, tmp_path / "out")
    ids = documents(out / "a", "train") + documents(out / "a", "holdout")
    assert {Tokenizer.load(model).decode(i) for i in ids} == {*bodies, "marked"}
    assert all(i[0] == 1 and i[-1] == 2 for i in ids)


def test_a_folder_leaves_out_what_is_not_text(tmp_path, model, caplog):
    folder = tmp_path / "in"
    (folder / ".git").mkdir(parents=True)
    for name, content in {
        "a.txt": b"one text", "b.txt": b"another text", "c.txt": b"ELF\0\1\2", "d.png": b"\x89PNG",
        "e.txt": b"", ".hidden.txt": b"hidden text", ".git/f.txt": b"hidden text", "g.txt": b" \n",
    }.items():  # fmt: skip
        (folder / name).write_bytes(content)
    out = prepare_mixture(config(model, a=folder), 320, tmp_path / "out")
    ids = documents(out / "a", "train") + documents(out / "a", "holdout")
    assert {Tokenizer.load(model).decode(i) for i in ids} == {"one text", "another text"}
    assert "skipped 2 files that are not text" in caplog.text
    assert manifest(out / "a")["skipped"] == {".png": 1, ".txt": 1}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", None, "'{path}' does not exist"),
        ("a.txt", b"", "{path} is empty"),
        ("a.txt", b" \n \n", "no text that is not blank"),
        ("a.txt", b"abc\0def", "{path} is binary"),
        ("a.txt", b"good text, caf\xe9 bad", r"{path} is not UTF-8 text \(byte 14.*iconv"),
        ("a.docx", b"PK", "unknown extension; known are .jsonl"),
        ("a.jsonl", b"", "{path} is empty"),
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', "{path} line 2 is not JSON"),
        ("a.jsonl", b'{"text": "x"}\n\n{"body": "x"}\n', '{path} line 3 has no "text" .* body'),
        ("a.jsonl", b'{"text": 5}\n', '{path} line 1 has no "text" field that is a string'),
        ("a.jsonl", b'["text"]\n', '{path} line 1 has no "text" field'),
        ("a.jsonl", b'{"text": "\xe9"}\n', r"{path} line 1 is not UTF-8 text \(byte 10:.*iconv"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', "{path} line 1: the text is not valid Unicode"),
        ("a.jsonl.gz", b"not gzip", "{path} is damaged after line 0"),
        # The bytes are part of the test's name, so no time of day in the header.
        (
            "a.jsonl.gz",
            gzip.compress(b'{"text": "x"}\n' * 999, mtime=0)[:-9],
            "{path} is damaged after",
        ),
        ("a.jsonl.zst", b"not zstd", "{path} is damaged after line 0"),
        ("a.parquet", b"not parquet", "{path} is not a parquet file"),
        ("folder", {}, "'{path}' has no text in 0 files"),
        ("folder", {"a.png": b"x", "b.bin": b"y"}, "has no text in 2 files"),
        ("folder", {"a.txt": b"\0", "b.txt": b"\0"}, "has no text in 2 files"),
        ("folder", {"a.txt": b"good", "b.txt": b"caf\xe9"}, "b.txt is not UTF-8 text"),
    ],
)
def test_bad_input(tmp_path, model, name, content, message):
    path = tmp_path / name
    if isinstance(content, dict):
        path.mkdir()
        for file, inside in content.items():
            (path / file).write_bytes(inside)
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=message.replace("{path}", str(path))):
        prepare_mixture(config(model, a=path), 320, tmp_path / "out")
    assert not list(tmp_path.glob("out/a*"))


def test_truncated_zst_is_an_error(tmp_path, model):
    """Cut between two lines, where the package zstandard raises no error."""
    rng = np.random.default_rng(0)
    lines = "".join(json.dumps({"text": rng.bytes(300).hex()}) + "\n" for _ in range(3000))
    path = tmp_path / "a.jsonl.zst"
    with pyarrow.CompressedOutputStream(str(path), "zstd") as f:
        f.write(lines.encode())
    path.write_bytes(path.read_bytes()[:-200_000])
    with pytest.raises(ValueError, match="is damaged after line"):
        prepare_mixture(config(model, a=path), 320, tmp_path / "out")


def test_bad_parquet(tmp_path, model):
    path = tmp_path / "a.parquet"
    for column, message in (
        ({"body": ["x"]}, 'no "text" column, only body'),
        ({"text": [1, 2]}, 'row 1: "text" is 1'),
        ({"text": ["x", None]}, 'row 2: "text" is None'),
    ):
        parquet.write_table(pyarrow.table(column), path)
        with pytest.raises(ValueError, match=message):
            prepare_mixture(config(model, a=path), 320, tmp_path / "out")


def test_bad_settings(tmp_path, model):
    source = jsonl(tmp_path / "a.jsonl", texts(40))
    out = tmp_path / "out"
    with pytest.raises(ValueError, match=r"has 320 ids, more than model\.vocab_size=300"):
        prepare_mixture(config(model, a=source), 300, out)
    with pytest.raises(ValueError, match=r"9999 is more than the text supports.*possible is \d+"):
        prepare_mixture(config("", a=source), 9999, out)
    with pytest.raises(ValueError, match="does not exist"):
        prepare_mixture(config(str(tmp_path / "no.model"), a=source), 320, out)
    with pytest.raises(ValueError, match="embedded ones are python:code and python:prose"):
        prepare_mixture(config(model, a="python:poems"), 320, out)
    with pytest.raises(ValueError, match="it is empty; give a path"):
        prepare_mixture(config(model, a=""), 320, out)
    with pytest.raises(ValueError, match=r"source name '\.\./a' must be of letters"):
        prepare_mixture(config(model, **{"../a": source}), 320, out)
    assert sorted(p.name for p in tmp_path.rglob("*")) == [".lock", "a.jsonl", "out"]
    (out / "a").mkdir(parents=True)
    with pytest.raises(ValueError, match="is not a folder of shards"):
        prepare_mixture(config(model, a=source), 320, out)


def test_tokenizer_trained_on_the_training_documents(tmp_path):
    """No validation document is in the sample."""
    path = jsonl(tmp_path / "a.jsonl", texts(300))
    source = find_files("a", str(path))
    rule = split_rule([source], 0.2)
    keys = {d.text: d.key for d in read_documents(source, source.files)}
    marked = [t for t in texts(300) if rule.is_val(keys[t])]
    assert len(marked) > 20

    def trained_on(data: DataConfig) -> str:
        sample = tokenizer_module._sample(data, {"a": source}, rule)
        return "".join(sample)

    data = config("", a=path, val_fraction=0.2)
    assert not [t for t in marked if t in trained_on(data)]
    assert len(trained_on(data)) > 200 * 100
    out = prepare_mixture(data, 330, tmp_path / "out")
    assert Tokenizer.load(out).vocab_size == 330
    assert manifest(out)["tokenizer"]["trained_on"]


def test_tokenizer_sample_follows_the_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizer_module, "SAMPLE_BYTES", 20_000)
    sources = {}
    for seed, (name, weight) in enumerate({"a": 3.0, "b": 1.0}.items()):
        path = jsonl(tmp_path / f"{name}.jsonl", texts(400, seed))
        sources[name] = SourceConfig(path=str(path), weight=weight)
    data = DataConfig(sources=sources, seq_len=8, val_fraction=0.1)
    raw = {n: find_files(n, s.path) for n, s in sources.items()}
    sample = list(tokenizer_module._sample(data, raw, SplitRule(0)))
    of_a = sum(len(t.encode()) for t in sample if " of 0\n" in t)
    of_b = sum(len(t.encode()) for t in sample if " of 1\n" in t)
    assert abs(of_a - 15_000) < 400
    assert abs(of_b - 5_000) < 400


def test_a_tokenizer_is_trained_again_only_if_the_recipe_changes(tmp_path):
    source, out = jsonl(tmp_path / "a.jsonl", texts(300)), tmp_path / "out"
    prepare_mixture(config("", a=source), 330, out)
    first = contents(out)
    prepare_mixture(config("", a=source), 330, out)
    assert contents(out) == first
    prepare_mixture(config("", a=source), 331, out)
    assert Tokenizer.load(out).vocab_size == manifest(out / "a")["vocab_size"] == 331
    prepare_mixture(config("", a=source), 330, out)
    assert contents(out) == first


def test_prepared_folders_as_sources(tmp_path, model):
    a, b = jsonl(tmp_path / "a.jsonl", texts(60)), jsonl(tmp_path / "b.jsonl", texts(60, 1))
    first = prepare_mixture(config(model, a=a), 320, tmp_path / "first")
    before = contents(first)
    # Its tokenizer is that of the mixture; nothing in it is written.
    out = prepare_mixture(config("", x=first / "a", b=b), 320, tmp_path / "out")
    assert contents(first) == before
    assert (out / "tokenizer.model").read_bytes() == Path(model).read_bytes()
    names = [".lock", "b", "manifest.json", "tokenizer.model"]
    assert sorted(p.name for p in out.iterdir()) == names
    mixture = data_module.open_mixture(out)
    assert mixture.sources["x"].folder == (first / "a").resolve()

    other = str(tmp_path / "other.model")
    train_tokenizer(texts(100), 300, other)
    with pytest.raises(ValueError, match=r"source x: .* prepared with another tokenizer"):
        prepare_mixture(config(other, x=first / "a"), 320, tmp_path / "out2")
    with pytest.raises(
        ValueError,
        match=f"prepared sources; set data.sources.x.path to one of them: {first / 'a'}",
    ):
        prepare_mixture(config("", x=first), 320, tmp_path / "out2")
    path = first / "a" / "manifest.json"
    path.write_text(path.read_text().replace('"format": 1', '"format": 99'))
    with pytest.raises(ValueError, match="has format 99, this version reads 1"):
        prepare_mixture(config("", x=first / "a"), 320, tmp_path / "out2")


@pytest.fixture(scope="module")
def embedded(tmp_path_factory) -> Path:
    sources = {
        "code": SourceConfig(path="python:code", weight=0.7),
        "prose": SourceConfig(path="python:prose", weight=0.3),
    }
    data = DataConfig(sources=sources, seq_len=256)
    return prepare_mixture(data, 4096, tmp_path_factory.mktemp("embedded"))


def test_embedded_sources(embedded):
    tokenizer = Tokenizer.load(embedded)
    assert tokenizer.vocab_size == 4096
    texts = {
        (name, split): [tokenizer.decode(d) for d in documents(embedded / name, split)]
        for name in ("code", "prose")
        for split in ("train", "holdout")
    }
    code = texts["code", "train"] + texts["code", "holdout"]
    assert 300 < len(code) < 1000
    assert Path(json.__file__).read_text() in code
    assert not [t for t in code if "class TestCase(unittest" in t]
    prose = "".join(texts["prose", "train"] + texts["prose", "holdout"])
    assert (json.loads.__doc__ or "").split("\n")[0] in prose
    assert min(map(len, texts.values())) >= 3


def test_embedded_sources_share_their_split(embedded):
    """Code and docstrings of a module are in one split."""
    tokenizer = Tokenizer.load(embedded)
    keys = {}
    for name in ("code", "prose"):
        source = find_files(name, f"python:{name}")
        keys[name] = {d.text: d.key for d in read_documents(source, source.files)}
    held_out = {
        n: {keys[n][tokenizer.decode(d)] for d in documents(embedded / n, "holdout")} for n in keys
    }
    trained = {
        n: {keys[n][tokenizer.decode(d)] for d in documents(embedded / n, "train")} for n in keys
    }
    assert not held_out["code"] & trained["prose"]
    assert not held_out["prose"] & trained["code"]
    assert held_out["prose"] <= held_out["code"]
    # No validation document equals a training document or is part of one.
    for n in keys:
        for d in documents(embedded / n, "holdout"):
            text = tokenizer.decode(d)
            assert not [t for t in keys["code"] if keys["code"][t] in trained["code"] and text in t]


def test_embedded_sources_split_alike():
    """Also if val_fraction is so small that exceptions decide."""
    sources = [find_files(name, f"python:{name}") for name in ("code", "prose")]
    rule = split_rule(sources, 1e-6)
    assert 1 <= len(rule.val_keys) <= 2
    keys = [{d.key for d in read_documents(s, s.files) if rule.is_val(d.key)} for s in sources]
    assert keys[1] <= keys[0]
    assert keys[1]


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("a=x.txt", ("a", "x.txt", 1.0)),
        ("a=dir/x.txt:0.25", ("a", "dir/x.txt", 0.25)),
        ("code=python:code", ("code", "python:code", 1.0)),
        ("code=python:code:3", ("code", "python:code", 3.0)),
        ("a=c:/x=y.txt:.5", ("a", "c:/x=y.txt", 0.5)),
        ("a=x.txt:1e-3", ("a", "x.txt", 0.001)),
        ("a=x.txt:2.", ("a", "x.txt", 2.0)),
        ("a=x:1e", ("a", "x:1e", 1.0)),
    ],
)
def test_source_argument(argument, expected):
    name, source = parse_source(argument)
    assert (name, source.path, source.weight) == expected


def test_command(tmp_path, model, capsys):
    source = jsonl(tmp_path / "a.jsonl", texts(60))
    main([str(tmp_path / "out"), "--source", f"a={source}:2", "--tokenizer", model])
    assert "train" in capsys.readouterr().out
    assert manifest(tmp_path / "out")["sources"]["a"]["weight"] == 2
    good = ["--source", f"a={source}", "--tokenizer", model]
    fifo = tmp_path / "a.jsonl.fifo"
    os.mkfifo(fifo)
    for arguments, message in (
        (["--source", "a=missing.txt", "--tokenizer", model], "does not exist"),
        (["--source", "missing.txt", "--tokenizer", model], "is not of the form NAME=PATH"),
        (["--source", f"a={source}", "--vocab-size", "99999"], "largest possible is"),
        (["--source", f"a={source}", "--vocab-size", "0"], "vocab_size=0 is out of range"),
        (["--source", f"a={source}", "--vocab-size", "10000000000"], "is out of range"),
        (["--source", f"a={source}:0", "--tokenizer", model], "the weight 0 must be more than 0"),
        (["--source", f"a={source}:-1", "--tokenizer", model], "weight -1 must be more than 0"),
        (["--source", f"a={source}:1e999", "--tokenizer", model], "the weight 1e999 must be"),
        ([*good, "--val-fraction", "0.9"], "--val-fraction 0.9: Input should be less than 0.5$"),
        ([*good, "--val-fraction", "nan"], "--val-fraction nan: Input should be"),
        ([*good, "--workers", "-1"], "--workers -1: Input should be greater than or equal to 0$"),
        ([*good, "--workers", "1000000"], "--workers 1000000: Input should be less than"),
        ([*good, "--source", "a=x.txt"], "--source a is given twice"),
        ([*good, "--source", f"b={source}"], "--source: .* is the text of data.sources.a too"),
        (["--source", "a=ftp://b/x", "--tokenizer", model], "--source ftp://b/x: ftp:// is not"),
        ([*good, "--source", f"b={source.parent}/./a.jsonl"], "of data.sources.a too"),
        (["--source", f"a={fifo}", "--tokenizer", model], "a.jsonl.fifo' is not a regular file"),
        (["--source", f"a={source}", "--tokenizer", str(fifo)], "fifo is not a regular file"),
    ):
        with pytest.raises(SystemExit, match=message) as e:
            main([str(tmp_path / "out2"), *arguments])
        assert e.value.code != 0
        assert "\n" not in str(e.value)
    assert not list(tmp_path.glob("out2/a*"))
    for out, message in (
        ("ftp://b/x", "ftp:// is not supported; give a path"),
        (" ", "is empty"),
        (str(source), "a.jsonl is a file; give a folder$"),
    ):
        with pytest.raises(SystemExit, match=message):
            main([out, *good])


def test_the_layout_of_the_recipes(tmp_path, monkeypatch):
    """One command per source fills the folders that the pretraining recipes name."""
    recipe_file = Path(__file__).parents[2] / "configs" / "llama-7b-tpu.toml"
    monkeypatch.chdir(tmp_path)
    train_tokenizer(texts(100), 320, "tokenizer.model")
    recipe = load_recipe(recipe_file, ["model.vocab_size=320"])
    for seed, name in enumerate(recipe.data.sources):
        source_path = jsonl(tmp_path / f"{name}.jsonl", texts(60, seed))
        main(["data", "--source", f"{name}={source_path}", "--tokenizer", "tokenizer.model"])
    assert list(manifest(Path("data"))["sources"]) == list(recipe.data.sources)
    before = contents(Path("data"))
    opened = data_module.open_mixture(prepare_mixture(recipe.data, 320, "run/data"))
    assert contents(Path("data")) == before
    for name, source in recipe.data.sources.items():
        assert opened.sources[name].folder == (tmp_path / "data" / name).resolve()
        assert opened.sources[name].weight == source.weight
    assert verify("data") == []

    # The folder above one prepared source, as path of a source and as OUT.
    main(["data/web", "--source", f"web={source_path}", "--tokenizer", "tokenizer.model"])
    overrides = ["model.vocab_size=320", "data.sources.c4.path=data/web"]
    with pytest.raises(ValueError, match=r"set data\.sources\.c4\.path to one of .*: data/web/web"):
        prepare_mixture(load_recipe(recipe_file, overrides).data, 320, "run/data2")
    with pytest.raises(SystemExit, match=r"data/c4 is a prepared source.* give its parent folder"):
        main(["data/c4", "--source", f"c4={source_path}", "--tokenizer", "tokenizer.model"])
    assert manifest(Path("data/c4")) == json.loads(before["c4/manifest.json"])


def test_a_source_is_added_to_a_folder(tmp_path):
    """Other sources stay, with one tokenizer and one validation fraction for all."""
    a, b = jsonl(tmp_path / "a.jsonl", texts(300)), jsonl(tmp_path / "b.jsonl", texts(60, 1))
    out = tmp_path / "out"
    main([str(out), "--source", f"a={a}:3", "--vocab-size", "330"])
    before = contents(out)
    main([str(out), "--source", f"a={a}:3", "--vocab-size", "330"])
    assert contents(out) == before
    main([str(out), "--source", f"b={b}:2", "--vocab-size", "340"])
    assert {n: s["weight"] for n, s in manifest(out)["sources"].items()} == {"a": 3, "b": 2}
    assert Tokenizer.load(out / "b").vocab_size == 330
    assert contents(out / "a") == {n[2:]: c for n, c in before.items() if n.startswith("a/")}
    after = contents(out)
    other = tmp_path / "other.model"
    train_tokenizer(texts(100), 300, other)
    for more, message in (
        (["--tokenizer", str(other)], "source a: .* prepared with another tokenizer"),
        (["--vocab-size", "330", "--val-fraction", "0.3"], "fraction differs: 0.02 in a"),
        (["--vocab-size", "320"], "has 330 ids, more than"),
    ):
        with pytest.raises(SystemExit, match=message):
            main([str(out), "--source", f"b={b}", *more])
        assert contents(out) == after
    # Training replaces the mixture of its run folder: sources of an earlier recipe do not stay.
    prepare_mixture(config("", b=b, val_fraction=0.02), 330, out)
    assert list(manifest(out)["sources"]) == ["b"]


def during_the_second_source(monkeypatch, action: Any) -> None:
    """Run ``action`` once, while a unit of source b is being encoded."""
    encode = shards.encode_files

    def encode_and_act(source: Any, *args: Any) -> None:
        if source.name == "b":
            monkeypatch.setattr(shards, "encode_files", encode)
            action()
        encode(source, *args)

    monkeypatch.setattr(shards, "encode_files", encode_and_act)


def test_another_command_in_the_same_folder_at_the_same_time(tmp_path, model, monkeypatch):
    """It cannot replace the tokenizer in use, or add a source with another validation fraction."""
    files = {n: jsonl(tmp_path / f"{n}.jsonl", texts(60, i)) for i, n in enumerate("abc")}
    out, other = tmp_path / "out", tmp_path / "other.model"
    train_tokenizer(texts(100), 300, other)
    both = [str(out), "--source", f"a={files['a']}", "--source", f"b={files['b']}"]
    both += ["--tokenizer", model]

    def another(*options: str) -> None:
        main([str(out), "--source", f"c={files['c']}", *options])

    def refused() -> None:
        for options in (["--tokenizer", str(other)], ["--vocab-size", "310"]):
            with pytest.raises(SystemExit, match=r"command prepares source b in .* with"):
                another(*options)

    during_the_second_source(monkeypatch, refused)
    main(both)
    assert verify(out) == []
    assert list(manifest(out)["sources"]) == ["a", "b"]

    shutil.rmtree(out)
    fraction = ["--tokenizer", model, "--val-fraction", "0.3"]
    during_the_second_source(monkeypatch, lambda: another(*fraction))
    with pytest.raises(SystemExit, match=r"differs: 0\.3 in c, 0\.02 in the other sources"):
        main(both)
    assert list(manifest(out)["sources"]) == ["c"]

    # Between two sources no unit is locked: the command whose tokenizer was replaced ends.
    shutil.rmtree(out)
    replace = lambda: (out / "tokenizer.model").write_bytes(other.read_bytes())
    during_the_second_source(monkeypatch, replace)
    with pytest.raises(SystemExit, match=r"another command replaced .* while"):
        main(both)
    assert not (out / "b").exists()
    main(both)
    assert verify(out) == []


def test_a_damaged_list_of_sources_is_not_replaced(tmp_path, model):
    """The command would forget the other sources."""
    a, b = (jsonl(tmp_path / f"{n}.jsonl", texts(60, i)) for i, n in enumerate("ab"))
    out = tmp_path / "out"
    main([str(out), "--source", f"a={a}", "--tokenizer", model])
    text = (out / "manifest.json").read_text()
    (out / "manifest.json").write_text(text.replace('"weight": 1', '"weight": 2'))
    with pytest.raises(SystemExit, match=r"was altered.*: remove .*manifest\.json, and name every"):
        main([str(out), "--source", f"b={b}", "--tokenizer", model])
    (out / "manifest.json").unlink()
    main([str(out), "--source", f"a={a}", "--source", f"b={b}", "--tokenizer", model])
    assert verify(out) == []


def test_an_added_small_source_does_not_leak(tmp_path, model, caplog):
    """Its validation document may be a training document of a source that was there before."""
    docs = sorted(texts(100), key=key_of)
    big, few = jsonl(tmp_path / "big.jsonl", docs), jsonl(tmp_path / "few.jsonl", docs[40:45])
    out, given = tmp_path / "out", ["--tokenizer", model, "--val-fraction", "0.05"]
    main([str(out), "--source", f"big={big}", *given])
    assert "validation documents" not in caplog.text
    main([str(out), "--source", f"few={few}", *given])
    assert "of small sources (1) may be training documents of source big" in caplog.text
    caplog.clear()
    main([str(out), "--source", f"big={big}", *given])
    assert not {tuple(d) for d in documents(out / "few", "holdout")} & {
        tuple(d) for d in documents(out / "big", "train")
    }
    before = contents(out)
    main([str(out), "--source", f"few={few}", *given])
    assert contents(out) == before
    assert "validation documents" not in caplog.text


def test_import_is_cheap_and_without_side_effects():
    code = (
        "import sys, threading, llama_jax.prepare as p\n"
        "heavy = {'jax', 'grain', 'pyarrow', 'sentencepiece', 'torch'}\n"
        "print(sorted(heavy & set(sys.modules)), threading.active_count())"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (run.stdout, run.stderr) == ("[] 1\n", "")


def test_no_thread_is_left(tmp_path, model):
    prepare_mixture(config(model, a=jsonl(tmp_path / "a.jsonl", texts(60))), 320, tmp_path / "out")
    assert not [t for t in threading.enumerate() if t.name.startswith("tokenize")]
