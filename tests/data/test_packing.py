"""Packing of whole examples: each is once in an epoch and alone in its segment, rows are full."""

import dataclasses
import hashlib
import json
import math
import shutil
import time
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from llama_jax.config import DataConfig, SourceConfig
from llama_jax.data import token_stream
from llama_jax.data.batch import Batch
from llama_jax.data.chat_template import load_template
from llama_jax.data.conversations import read_example
from llama_jax.data.manifest import verify
from llama_jax.data.mixture import Mixture, TrainData, eval_batches, open_mixture, val_stats
from llama_jax.data.packing import first_fit
from llama_jax.data.sequences import SequenceDataset
from llama_jax.data.tokenizer import Tokenizer
from llama_jax.prepare.tokenizer import train_tokenizer

SHARED = Path(__file__).parents[2] / "../shared/data"
T = 32
VOCAB = 320
TEMPLATE = b"{{ messages }}"
Documents = list[tuple[list[int], list[int]]]
"""Ids and mask of each document."""


def write_source(
    folder: Path, name: str, splits: dict[str, Documents], tokenizer_sha256: str, format: str
) -> None:
    """A prepared source, written from the description of the format in shards of 6 documents."""
    (folder / name).mkdir()
    described = {}
    for split, documents in splits.items():
        shards = []
        for i in range(0, len(documents), 6):
            ids, masks = zip(*documents[i : i + 6], strict=True)
            shard = {"name": f"{split}-{i // 6:05d}", "tokens": sum(map(len, ids))}
            shard["documents"] = len(ids)
            files = {
                "tokens": np.concatenate(ids).astype("<u2"),
                "starts": np.cumsum([0, *(len(d) for d in ids[:-1])]).astype("<u8"),
            }
            if format != "text":
                files["mask"] = np.concatenate(masks).astype(np.uint8)
            for kind, content in files.items():
                content.tofile(folder / name / f"{shard['name']}.{kind}")
                shard[f"{kind}_sha256"] = hashlib.sha256(content.tobytes()).hexdigest()
            shards.append(shard)
        sums = {k: sum(s[k] for s in shards) for k in ("documents", "tokens")}
        described[split] = {**sums, "text_bytes": 0, "shards": shards}
    manifest = {
        "format": 1, "name": name, "tokenizer_sha256": tokenizer_sha256, "vocab_size": VOCAB,
        "dtype": "uint16", "splits": described,
    }  # fmt: skip
    if format != "text":
        template = hashlib.sha256(TEMPLATE).hexdigest()
        more = {"format": format, "template": "x", "template_sha256": template, "loss": "answers"}
        manifest["conversations"] = more
        (folder / name / "chat_template.jinja").write_bytes(TEMPLATE)
    (folder / name / "manifest.json").write_text(json.dumps(manifest))


def conversations(seed: int, count: int, longest: int = T + 1) -> Documents:
    """Different documents with BOS, EOS and a mask that counts the last third."""
    rng = np.random.default_rng(seed)
    documents = []
    for _ in range(count):
        length = int(rng.integers(4, longest + 1))
        ids = [1, *rng.integers(3, VOCAB, length - 2).tolist(), 2]
        documents.append((ids, [int(i > length * 2 / 3) for i in range(length)]))
    return documents


@pytest.fixture(scope="module")
def sources() -> dict[str, dict[str, Documents]]:
    long = [([1] + [5] * T + [6, 7, 2], [0] * 20 + [1] * (T - 16))]  # cut, and some targets count
    useless = [([1] + [8] * T + [9, 2], [0] * (T + 1) + [1, 1])]  # those that count are cut off
    return {
        "chat": {
            "train": conversations(0, 50) + long + useless + conversations(1, 9),
            "holdout": conversations(2, 20),
        },
        "text": {"train": conversations(3, 30, 100), "holdout": conversations(4, 10, 100)},
        "pairs": {"train": conversations(5, 40, T), "holdout": conversations(6, 10)},
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory, sources) -> Path:
    folder = tmp_path_factory.mktemp("mixture")
    words = ["every", "good", "boy", "does", "fine", "été", "日本"]
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(words, 20)) for _ in range(200)]
    tokenizer = train_tokenizer(texts, VOCAB, folder / "tokenizer.model")
    sha = hashlib.sha256(tokenizer.path.read_bytes()).hexdigest()
    formats = {"chat": "alpaca", "text": "text", "pairs": "preference"}
    entries = {}
    for name, splits in sources.items():
        write_source(folder, name, splits, sha, formats[name])
        entries[name] = {"folder": name, "weight": 1.0}
    top = {"format": 1, "tokenizer": {"file": "tokenizer.model", "sha256": sha}}
    (folder / "manifest.json").write_text(json.dumps(top | {"sources": entries}))
    return folder


@pytest.fixture(scope="module")
def mixture(folder) -> Mixture:
    return open_mixture(folder)


def config(**changes: Any) -> DataConfig:
    settings = {"seq_len": T, "packing": "examples"} | changes
    return DataConfig(sources={"a": SourceConfig(path="unused")}, **settings)


def segments(row: Batch) -> list[tuple[list[int], list[int], list[int]]]:
    """Inputs, targets and mask of each segment of a row; checks the rest of the row."""
    found = []
    ids = row.segment_ids_BT
    assert set(np.diff(ids)) <= {0, 1}
    assert ids[0] == 1
    for segment in range(1, ids[-1] + 1):
        own = ids == segment
        assert row.positions_BT[own].tolist() == list(range(own.sum()))
        fields = (row.inputs_BT, row.targets_BT, row.mask_BT)
        found.append(tuple(x[own].astype(int).tolist() for x in fields))
    if not any(found[-1][0]):  # padding
        assert not any(map(any, found.pop()))
    return found


def alone(document: tuple[list[int], list[int]], length: int = T) -> tuple[list[int], ...]:
    """Inputs, targets and mask of a document of which ``length`` positions are used."""
    ids, mask = document
    return ids[:-1][:length], ids[1:][:length], mask[1:][:length]


def rows_of(mixture: Mixture, name: str, split: str, cfg: DataConfig) -> list[Batch]:
    dataset = SequenceDataset(mixture.sources[name], cfg, split)
    assert dataset.padded_len == len(dataset)
    return [dataset[i] for i in range(len(dataset))]


def test_a_row_has_the_arrays_of_its_examples_alone(mixture, sources):
    """Every example once, with its own mask and positions; in order in validation."""
    train = [s for row in rows_of(mixture, "chat", "train", config()) for s in segments(row)]
    documents = sources["chat"]["train"]
    expected = [alone(d) for i, d in enumerate(documents) if i != 51]
    assert sorted(train) == sorted(expected)
    assert train != expected
    rows = rows_of(mixture, "chat", "holdout", config())
    found = [s for row in rows for s in segments(row)]
    expected = [alone(d) for d in sources["chat"]["holdout"]]
    assert sorted(found) == sorted(expected)
    first = [segments(row)[0] for row in rows]
    assert [s for s in expected if s in first] == first
    for row in rows:
        assert row.mask_BT.dtype == np.float32
        assert {x.dtype for x in row if x is not row.mask_BT} == {np.dtype(np.int32)}


def test_long_examples(mixture, sources, caplog):
    documents = sources["chat"]["train"]
    short = dataclasses.replace(config(), seq_len=12, seed=7)
    with caplog.at_level("INFO"):
        cut = [s for row in rows_of(mixture, "chat", "train", short) for s in segments(row)]
        rows_of(mixture, "chat", "train", short)
    expected = [alone(d, 12) for d in documents]
    used = [e for e in expected if any(e[2])]
    assert sorted(cut) == sorted(used)
    long = sum(len(d[0]) > 13 for d in documents)
    assert (
        f"source chat: {long} of 61 training examples are longer than data.seq_len=12"
        in caplog.text
    )
    assert f"{len(documents) - len(used)} of 61 training examples are dropped" in caplog.text
    assert caplog.text.count("are cut from the right") == 1  # not for every evaluation
    caplog.clear()
    drop = dataclasses.replace(short, long_examples="drop")
    with caplog.at_level("INFO"):
        kept = [s for row in rows_of(mixture, "chat", "train", drop) for s in segments(row)]
    assert sorted(kept) == sorted(alone(d) for d in documents if len(d[0]) <= 13)
    assert (
        f"{long} of 61 training examples are longer than data.seq_len=12 and are dropped"
        in caplog.text
    )
    with pytest.raises(
        ValueError, match=r"source chat: no training example can be used with data.seq_len=1 "
    ):
        rows_of(mixture, "chat", "train", dataclasses.replace(config(), seq_len=1))


def test_pairs_stay_together(mixture, sources):
    """Segments 2k - 1 and 2k are a pair; of a pair longer than T each side is cut to T / 2."""
    documents = sources["pairs"]["train"]
    expected, cuts = [], 0
    for chosen, rejected in zip(documents[::2], documents[1::2], strict=True):
        is_long = len(chosen[0]) + len(rejected[0]) - 2 > T
        pair = [alone(d, T // 2 if is_long else T) for d in (chosen, rejected)]
        cuts += is_long
        if all(any(mask) for _, _, mask in pair):
            expected.append(tuple(pair))
    assert 0 < cuts < len(documents) // 2
    found = []
    for row in rows_of(mixture, "pairs", "train", config()):
        own = segments(row)
        assert len(own) % 2 == 0
        found += zip(own[::2], own[1::2], strict=True)
    assert sorted(found) == sorted(expected)


def test_text_is_divided(mixture, sources):
    """A text longer than T becomes parts of T tokens, and every target counts once."""
    found = [s for row in rows_of(mixture, "text", "train", config()) for s in segments(row)]
    expected = []
    for ids, _ in sources["text"]["train"]:
        for start in range(0, len(ids) - 1, T):
            targets = ids[start + 1 : start + T + 1]
            expected.append((ids[start : start + len(targets)], targets, [1] * len(targets)))
    assert sorted(found) == sorted(expected)


def test_the_seed_decides_the_order(mixture):
    dataset = lambda **changes: rows_of(mixture, "chat", "train", config(**changes))
    same = lambda a, b: all(map(np.array_equal, jax.tree.leaves(a), jax.tree.leaves(b)))
    assert same(dataset(), dataset())
    assert not same(dataset(), dataset(seed=1))
    validation = [rows_of(mixture, "chat", "holdout", config(seed=seed)) for seed in (0, 1)]
    assert same(*validation)


def test_hosts_and_resume(mixture):
    """A mixture of text, conversations and pairs: any number of hosts, exact continuation."""
    shares = [[0, 3], [1, 2]]
    one = TrainData(mixture, config(), 4)
    parts = [TrainData(mixture, config(), 4, rows) for rows in shares]
    together: list[Batch] = []
    for _ in range(12):
        batch = next(one)
        together.append(batch)
        for data, rows in zip(parts, shares, strict=True):
            own = next(data)
            assert all(np.array_equal(x, y[rows]) for x, y in zip(own, batch, strict=True))
    state = json.loads(json.dumps(parts[0].state()))
    assert state == one.state()
    later = [next(one) for _ in range(4)]
    resumed = TrainData(mixture, config(), 4)
    resumed.restore(state)
    for batch in later:
        assert all(map(np.array_equal, next(resumed), batch))
    assert max(abs(p.share - 1 / 3) for p in resumed.progress().values()) < 1 / 64
    other = TrainData(mixture, config(long_examples="drop"), 4)
    with pytest.raises(ValueError, match="long_examples changed"):
        other.restore(state)
    concat = TrainData(
        dataclasses.replace(mixture, sources={"text": mixture.sources["text"]}),
        config(packing="concat"), 4,
    )  # fmt: skip
    assert "long_examples" not in concat.state()["data"]  # positions saved before stay valid
    for data in (one, *parts, resumed, other, concat):
        data.close()


def test_evaluation_counts_answers_only(mixture, sources):
    bytes_of_id = Tokenizer.load(mixture.tokenizer).bytes_of_id_V
    targets = [
        t
        for ids, mask in sources["chat"]["holdout"]
        for t, counts in zip(ids[1:], mask[1:], strict=True)
        if counts
    ]
    stats = val_stats(mixture, config(), 4, 100, "chat")
    # No answer begins a text, so no space was added before it.
    assert (stats.tokens, stats.text_bytes) == (len(targets), bytes_of_id[targets].sum())
    shares = [c / len(targets) for c in Counter(targets).values()]
    assert stats.unigram_entropy == pytest.approx(-sum(p * math.log(p) for p in shares), rel=1e-12)
    batches = list(eval_batches(mixture, config(), 4, 100, "chat"))
    assert sum(b.mask_BT.sum() for b in batches) == len(targets)
    parts = [list(eval_batches(mixture, config(), 4, 100, "chat", [r])) for r in range(4)]
    for i, batch in enumerate(batches):
        for r in range(4):
            assert all(np.array_equal(x[0], y[r]) for x, y in zip(parts[r][i], batch, strict=True))


@pytest.mark.parametrize("name", ["concat", "segments"])
def test_conversations_need_whole_examples(mixture, name):
    with pytest.raises(
        ValueError, match=f'chat has conversations, .*packing="examples", not "{name}"'
    ):
        TrainData(mixture, config(packing=name), 4)


def test_first_fit():
    assert first_fit([5, 4, 3, 6, 2, 1], 8).tolist() == [0, 1, 0, 2, 1, 1]
    rng = np.random.default_rng(0)
    # Lengths as those of Alpaca with LLaMA's tokenizer: 231 tokens on average, up to 800.
    sizes = np.clip(rng.lognormal(5.2, 0.7, 4000), 30, 800).astype(int)
    for seq_len in (1024, 2048):
        rows = first_fit(sizes.tolist(), seq_len)
        used = np.bincount(rows, sizes)
        assert used.max() <= seq_len
        assert used.sum() / (len(used) * seq_len) > 0.95
        assert set(rows) == set(range(len(used)))


def test_rows_of_alpaca_are_full():
    """The real records with LLaMA's tokenizer, where they exist."""
    if not SHARED.is_dir():
        return
    tokenizer = Tokenizer.load(SHARED / "llama_tokenizer/tokenizer.model")
    template = load_template("alpaca", None)
    sizes = []
    for record in json.loads((SHARED / "alpaca/alpaca_en_demo.json").read_text("utf-8")):
        messages = read_example(record, "alpaca").messages
        sizes.append(len(template.encode_example(messages, tokenizer)[0]) - 1)
    order = np.random.RandomState(0).permutation(len(sizes))
    for chosen in (order, np.arange(len(sizes))):
        rows = first_fit([min(sizes[i], 2048) for i in chosen], 2048)
        assert sum(sizes) / ((max(rows) + 1) * 2048) > 0.95


def test_a_million_examples_take_seconds():
    sizes = np.random.default_rng(0).integers(30, 500, 200_000).tolist()
    start = time.process_time()
    first_fit(sizes, 2048)
    assert time.process_time() - start < 10  # about 0.5 s for a fifth of a million


@pytest.fixture
def copy(folder, tmp_path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def test_altered_files_are_named(copy):
    assert verify(copy) == []
    path = copy / "chat" / "train-00000.mask"
    good = path.read_bytes()
    path.write_bytes(good[:-1] + bytes([1 - good[-1]]))
    assert [p for p in verify(copy) if f"{path} was altered" in p]
    path.write_bytes(good[:-1] + b"\7")
    assert [p for p in verify(copy) if str(path) in p]
    token_stream._mapped.cache_clear()
    with pytest.raises(ValueError, match=r"train-00000.mask is damaged: not a mask"):
        SequenceDataset(open_mixture(copy).sources["chat"], config(), "train")
    path.write_bytes(good[:-1])
    assert [p for p in verify(copy) if str(path) in p]
    with pytest.raises(ValueError, match=r"train-00000.mask has \d+ bytes"):
        open_mixture(copy)
    path.unlink()
    with pytest.raises(ValueError, match=r"train-00000.mask is missing"):
        open_mixture(copy)
    path.write_bytes(good)
    (copy / "chat" / "chat_template.jinja").write_bytes(b"other")
    assert "chat_template.jinja was altered" in verify(copy)[0]
    with pytest.raises(ValueError, match=r"chat_template.jinja was altered"):
        open_mixture(copy)


def test_a_mixture_has_one_template(copy, mixture):
    assert mixture.chat_template.read_bytes() == TEMPLATE
    path = copy / "pairs" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["conversations"]["template_sha256"] = hashlib.sha256(b"other").hexdigest()
    path.write_text(json.dumps(manifest))
    (copy / "pairs" / "chat_template.jinja").write_bytes(b"other")
    with pytest.raises(ValueError, match=r"sources chat and pairs .* different chat templates"):
        open_mixture(copy)


def test_a_mask_belongs_to_conversations(copy):
    path = copy / "chat" / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["conversations"]
    path.write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="shards of conversations, and no others, have a mask"):
        open_mixture(copy)
