"""Data: exact mixture, the same batches on any number of hosts and after a restart, right masks."""

import hashlib
import json
import math
import os
import resource
import threading
from collections import Counter
from fractions import Fraction
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from llama_jax.config import DataConfig, SourceConfig
from llama_jax.data import mixture as data_module
from llama_jax.data import token_stream
from llama_jax.data.batch import Batch
from llama_jax.data.manifest import verify
from llama_jax.data.mixture import (
    Mixture,
    MixtureSampler,
    TrainData,
    eval_batches,
    open_mixture,
    val_stats,
)
from llama_jax.data.sequences import SequenceDataset
from llama_jax.data.token_stream import TokenStream
from llama_jax.data.tokenizer import Tokenizer
from llama_jax.prepare.tokenizer import train_tokenizer

T = 16
BOS, EOS = 1, 2
WORDS = ["every", "good", "boy", "does", "fine", "and", "then", "some", "123", "été", "日本"]


def write_source(
    folder: Path,
    name: str,
    splits: dict[str, list[list[int]]],
    sha256: str,
    vocab_size: int,
    shard_documents: int = 7,
) -> None:
    """A prepared source written from the description of the format, in several shards."""
    described = {}
    for split, documents in splits.items():
        shards = []
        for i in range(0, len(documents), shard_documents):
            part = documents[i : i + shard_documents]
            shard = f"{split}-{i // shard_documents:05d}"
            tokens = np.concatenate([np.array(d, "<u2") for d in part])
            starts = np.cumsum([0] + [len(d) for d in part[:-1]]).astype("<u8")
            folder.joinpath(name).mkdir(parents=True, exist_ok=True)
            tokens.tofile(folder / name / f"{shard}.tokens")
            starts.tofile(folder / name / f"{shard}.starts")
            sha = {f"{k}_sha256": hashlib.sha256(a.tobytes()).hexdigest()
                   for k, a in (("tokens", tokens), ("starts", starts))}  # fmt: skip
            shards.append({"name": shard, "tokens": len(tokens), "documents": len(part)} | sha)
        sums = {k: sum(s[k] for s in shards) for k in ("documents", "tokens")}
        described[split] = {**sums, "text_bytes": 0, "shards": shards}
    manifest = {
        "format": 1, "name": name, "tokenizer_sha256": sha256, "vocab_size": vocab_size,
        "dtype": "uint16", "splits": described,
    }  # fmt: skip
    (folder / name / "manifest.json").write_text(json.dumps(manifest))


def texts(seed: int, count: int) -> list[str]:
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, rng.integers(1, 30))) for _ in range(count)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Three sources with documents of 3 to some 60 tokens, that have no document in common."""
    folder = tmp_path_factory.mktemp("mixture")
    tokenizer = train_tokenizer(texts(0, 200), 320, folder / "tokenizer.model")
    sha = hashlib.sha256(tokenizer.path.read_bytes()).hexdigest()
    sources = {}
    for seed, (name, weight, count) in enumerate((("a", 3.0, 60), ("b", 1.5, 25), ("c", 0.1, 20))):
        docs = [tokenizer.encode(f"{name}{t}", bos=True, eos=True) for t in texts(seed, count)]
        write_source(folder, name, {"train": docs, "holdout": docs[::-1][:12]}, sha, 320)
        sources[name] = {"folder": name, "weight": weight}
    top = {"format": 1, "tokenizer": {"file": "tokenizer.model", "sha256": sha}}
    (folder / "manifest.json").write_text(json.dumps(top | {"sources": sources}))
    return folder


@pytest.fixture(scope="module")
def mixture(folder) -> Mixture:
    return open_mixture(folder)


def config(packing: Any = "concat", seed: int = 0, seq_len: int = T) -> DataConfig:
    return DataConfig(
        sources={"a": SourceConfig(path="unused")}, seq_len=seq_len, packing=packing, seed=seed
    )


def documents(mixture: Mixture, name: str, split: str) -> list[list[int]]:
    """Documents of a source, cut at BOS."""
    source = mixture.sources[name]
    found: list[list[int]] = []
    for shard in source.manifest["splits"][split]["shards"]:
        for token in np.fromfile(source.folder / f"{shard['name']}.tokens", "<u2").tolist():
            if token == BOS:
                found.append([])
            found[-1].append(token)
    return found


def take(data: TrainData, count: int) -> list[Batch]:
    return [next(data) for _ in range(count)]


def fields(batch: Batch) -> dict[str, np.ndarray]:
    """The fields that are present, by name."""
    return {name: x for name, x in batch._asdict().items() if x is not None}


def same(a: list[Batch], b: list[Batch]) -> bool:
    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        map(np.array_equal, jax.tree.leaves(a), jax.tree.leaves(b))
    )


def reference(docs: list[list[int]], index: int, segments: bool) -> dict[str, list]:
    """Window ``index``, token by token."""
    flat = [(token, d, i) for d, doc in enumerate(docs) for i, token in enumerate(doc)]
    window = flat[index * T : index * T + T + 1]
    inputs, targets, mask, segment, position = [], [], [], [], []
    for t in range(T):
        here = window[t] if t < len(window) else (0, window[-1][1], None)
        after = window[t + 1] if t + 1 < len(window) else None
        inputs.append(here[0])
        targets.append(after[0] if after else 0)
        mask.append(float(after is not None and (not segments or after[1] == here[1])))
        segment.append(here[1] - window[0][1] + 1)
        # From the start of the document, or of the window for one that began before it.
        seen = [t2 for t2 in range(min(t, len(window) - 1) + 1) if window[t2][1] == here[1]]
        position.append(t - seen[0])
    found: dict[str, list] = {"inputs_BT": inputs, "targets_BT": targets, "mask_BT": mask}
    return found | ({"segment_ids_BT": segment, "positions_BT": position} if segments else {})


@pytest.mark.parametrize("split", ["train", "holdout"])
@pytest.mark.parametrize("packing", ["concat", "segments"])
def test_windows_equal_a_slow_reference(mixture, split, packing):
    for name, source in mixture.sources.items():
        docs = documents(mixture, name, split)
        windows = SequenceDataset(source, config(packing), split)
        tokens = sum(map(len, docs))
        assert len(windows) == (tokens - 1) // T
        assert windows.padded_len == math.ceil((tokens - 1) / T)
        for index in range(windows.padded_len):
            expected = reference(docs, index, packing == "segments")
            found = windows.padded(index)
            assert {k: v.tolist() for k, v in fields(found).items()} == expected
            if index < len(windows):
                plain = windows[index]
                assert same([plain], [found if packing == "segments" else Batch(*found[:2])])


def test_read_across_shards(mixture):
    source = mixture.sources["a"]
    docs = documents(mixture, "a", "train")
    flat = np.concatenate(docs)
    stream = TokenStream(source.folder, source.manifest, "train")
    assert len(stream) == len(flat)
    assert len(source.manifest["splits"]["train"]["shards"]) > 5
    for start, length in ((0, len(flat)), (len(flat) - 1, 1), (150, 500), (len(flat) - 3, 9)):
        ids, is_start = stream.read(start, length)
        expected = np.zeros(length, int)
        expected[: len(flat) - start] = flat[start : start + length]
        assert ids.tolist() == expected.tolist()
        assert is_start.tolist() == (expected == BOS).tolist()


def test_more_shards_than_a_process_may_open(tmp_path):
    """Few file descriptors are open; a replaced file is opened again."""
    docs = [[BOS, i % 250 + 3, EOS] for i in range(300)]
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    for offset in (0, 1):
        made = [[BOS, d[1] + offset, EOS] for d in docs]
        write_source(tmp_path, "a", {"train": made, "holdout": made}, "0" * 64, 320, 1)
        manifest = json.loads((tmp_path / "a" / "manifest.json").read_text())
        resource.setrlimit(resource.RLIMIT_NOFILE, (400, limits[1]))
        try:
            stream = TokenStream(tmp_path / "a", manifest, "train")
            ids, is_start = stream.read(0, 900)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        assert ids.tolist() == [t for d in made for t in d]
        assert is_start.tolist() == [True, False, False] * 300


def test_arrays_of_a_batch(mixture):
    names = {"inputs_BT": np.int32, "targets_BT": np.int32}
    more = {"segment_ids_BT": np.int32, "positions_BT": np.int32, "mask_BT": np.float32}
    for packing, expected in (("concat", names), ("segments", names | more)):
        data = TrainData(mixture, config(packing), 6)
        batch = next(data)
        data.close()
        assert {k: v.dtype for k, v in fields(batch).items()} == expected
        assert {v.shape for v in fields(batch).values()} == {(6, T)}
        assert all(v.flags.writeable for v in fields(batch).values())
        np.testing.assert_array_equal(batch.inputs_BT[:, 1:], batch.targets_BT[:, :-1])


PAPER = [0.67, 0.15, 0.045, 0.045, 0.045, 0.025, 0.02]


@pytest.mark.parametrize("weights", [[3.0, 1.5, 0.1], [1.0], [1 / 3, 2 / 3], PAPER])
def test_mixture_is_exact(weights):
    mixing = MixtureSampler(weights, 1, range(1))
    total = sum(Fraction(str(w)) for w in weights)
    seen: Counter[int] = Counter()
    for place in range(3000):
        source, index = mixing[place]
        assert index == seen[source]  # each source in its own order, none left out
        seen[source] += 1
        assert mixing.counts(place + 1) == [seen[i] for i in range(len(weights))]
    for places in (3000, 10**6, 10**12, 10**15 + 7):
        counts = mixing.counts(places)
        assert sum(counts) == places
        for count, weight in zip(counts, weights, strict=True):
            assert abs(count - places * Fraction(str(weight)) / total) < len(weights)


def windows_of(mixture: Mixture) -> dict[bytes, list[tuple[str, int]]]:
    found: dict[bytes, list[tuple[str, int]]] = {}
    for name, source in mixture.sources.items():
        windows = SequenceDataset(source, config(), "train")
        for i in range(len(windows)):
            found.setdefault(windows[i].inputs_BT.tobytes(), []).append((name, i))
    assert all(len(places) == 1 for places in found.values())
    return found


def test_realised_mixture_and_epochs(mixture):
    """Counted from the batches: shares of the sources, and every sequence once per epoch."""
    where = windows_of(mixture)
    data = TrainData(mixture, config(), 10)
    lengths = {n: len(SequenceDataset(s, config(), "train")) for n, s in mixture.sources.items()}
    order: dict[str, list[int]] = {n: [] for n in lengths}
    assert {n: p.epochs for n, p in data.progress().items()} == {"a": 0, "b": 0, "c": 0}
    for _ in range(60):
        for row in next(data).inputs_BT:
            [(name, index)] = where[row.tobytes()]
            order[name].append(index)
        total = sum(map(len, order.values()))
        for name, p in data.progress().items():
            assert p.share == len(order[name]) / total
            assert p.epochs == len(order[name]) / lengths[name]
    data.close()
    for name, weight in (("a", 3.0), ("b", 1.5), ("c", 0.1)):
        assert abs(len(order[name]) - 600 * weight / 4.6) < 3
    epochs = [order["a"][i : i + lengths["a"]] for i in range(0, len(order["a"]), lengths["a"])]
    assert len(epochs) > 3
    for epoch in epochs[:-1]:
        assert sorted(epoch) == list(range(lengths["a"]))
    assert epochs[0] != epochs[1] != epochs[2]  # reshuffled
    assert epochs[0] != sorted(epochs[0])


def test_seed_decides_the_order(mixture):
    runs = []
    for seed in (0, 0, 1):
        data = TrainData(mixture, config(seed=seed), 4)
        runs.append(take(data, 20))
        data.close()
    assert same(runs[0], runs[1])
    assert not same(runs[0], runs[2])


@pytest.mark.parametrize("packing", ["concat", "segments"])
def test_hosts_share_the_same_global_batches(mixture, packing):
    def run(shares: list[list[int]]) -> list[Batch]:
        parts = []
        for rows in shares:
            data = TrainData(mixture, config(packing), 8, rows)
            parts.append(take(data, 25))
            data.close()
        return together(parts, shares)

    one = run([list(range(8))])
    assert one[0].inputs_BT.shape == (8, T)
    for shares in SHARES:
        assert same(one, run(shares))


# Rows of a batch of 8 by host: contiguous, alternating, and as on a TPU torus.
SHARES = [
    [[0, 1, 2, 3], [4, 5, 6, 7]],
    [[0, 2, 4, 6], [1, 3, 5, 7]],
    [[0, 7], [1, 6], [3, 4], [2, 5]],
]


def together(parts: list[list[Batch]], shares: list[list[int]]) -> list[Batch]:
    """The batches of all hosts, each row in its place."""
    places = np.argsort(np.concatenate(shares))
    join = lambda *x: np.concatenate(x)[places]
    return [jax.tree.map(join, *batches) for batches in zip(*parts, strict=True)]


def test_resume_at_any_batch(mixture):
    data = TrainData(mixture, config("segments"), 4)
    states, batches = [], []
    for _ in range(30):
        states.append(json.loads(json.dumps(data.state())))
        batches.append(next(data))
    progress = data.progress()
    # In the same object, with batches already prefetched.
    data.restore(states[11])
    assert same(take(data, 19), batches[11:])
    assert data.progress() == progress
    data.close()
    for at, state in enumerate(states):
        resumed = TrainData(mixture, config("segments"), 4)
        if at % 2:
            take(resumed, 3)
        resumed.restore(state)
        assert resumed.state() == state
        count = min(3, len(batches) - at)
        assert same(take(resumed, count), batches[at : at + count])
        resumed.close()


def test_resume_on_another_number_of_hosts(mixture):
    one = TrainData(mixture, config(), 8)
    take(one, 13)
    state = one.state()
    expected = take(one, 5)
    one.close()
    parts = []
    for rows in SHARES[2]:
        data = TrainData(mixture, config(), 8, rows)
        assert data.state()["data"] == state["data"]
        data.restore(state)
        parts.append(take(data, 5))
        data.close()
    assert same(together(parts, SHARES[2]), expected)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 1}, "seed"),
        ({"packing": "segments"}, "packing"),
        ({"seq_len": 8}, "seq_len"),
        ({"batch_size": 8}, "batch_size"),
        ({"shard": True}, "sources"),
        ({"weight": True}, "sources"),
    ],
)
def test_position_in_other_data_is_an_error(mixture, change, named):
    data = TrainData(mixture, config(), 4)
    state = data.state()
    data.close()
    if "shard" in change or "weight" in change:
        state = json.loads(json.dumps(state))
        state["data"]["sources"]["a"]["shards" if "shard" in change else "weight"] = "another"
        change = {}
    batch_size = change.pop("batch_size", 4)
    other = TrainData(mixture, config(**change), batch_size)
    with pytest.raises(ValueError, match=f"belongs to other data: {named} changed"):
        other.restore(state)
    other.close()


def test_closing_ends_the_threads(mixture):
    before = set(threading.enumerate())
    data = TrainData(mixture, config(), 4)
    take(data, 2)
    data.close()
    data.close()
    for thread in set(threading.enumerate()) - before:
        thread.join(5)
        assert not thread.is_alive()


# Evaluation --------------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", ["concat", "segments"])
def test_evaluation_covers_every_validation_token_once(mixture, packing):
    for name in mixture.sources:
        docs = documents(mixture, name, "holdout")
        batches = list(eval_batches(mixture, config(packing), 4, 10**6, name))
        assert {x.shape for x in jax.tree.leaves(batches)} == {(4, T)}
        mask = np.concatenate([b.mask_BT for b in batches]).ravel()
        targets = np.concatenate([b.targets_BT for b in batches]).ravel()[mask > 0]
        flat = [t for doc in docs for t in doc]
        wanted = flat[1:] if packing == "concat" else [t for doc in docs for t in doc[1:]]
        # A segment cut by a window keeps its target: only the first token of a document is none.
        assert targets.tolist() == wanted
        assert set(mask.tolist()) == {0, 1}


def test_evaluation_is_spread_and_the_same_on_any_number_of_hosts(mixture):
    everything = list(eval_batches(mixture, config(), 4, 10**6, "a"))
    few = list(eval_batches(mixture, config(), 4, 2, "a"))
    assert len(few) == 2 < len(everything)
    rows = [r.tobytes() for b in everything for r in b.inputs_BT]
    places = [rows.index(r.tobytes()) for b in few for r in b.inputs_BT]
    assert places == sorted(set(places))
    assert places[-1] > len(rows) * 0.7
    for shares in ([[0, 1], [2, 3]], [[1, 2], [0, 3]], [[3], [0], [1], [2]]):
        parts = [list(eval_batches(mixture, config(), 4, 10**6, "a", rows)) for rows in shares]
        assert same(together(parts, shares), everything)


def test_val_stats(mixture):
    """Bytes are those of the text; the entropy is that of the counted targets."""
    tokenizer = Tokenizer.load(mixture.tokenizer)
    for name in mixture.sources:
        docs = documents(mixture, name, "holdout")
        text_bytes = sum(len(tokenizer.decode(d).encode()) for d in docs)
        for packing, targets in (
            ("concat", [t for d in docs for t in d][1:]),
            ("segments", [t for d in docs for t in d[1:]]),
        ):
            found = val_stats(mixture, config(packing), 4, 10**6, name)
            assert (found.tokens, found.text_bytes) == (len(targets), text_bytes)
            shares = [c / len(targets) for c in Counter(targets).values()]
            entropy = -sum(p * math.log(p) for p in shares)
            assert found.unigram_entropy == pytest.approx(entropy, rel=1e-12)
        part = val_stats(mixture, config(), 4, 1, name)
        assert part.tokens == 4 * T
        assert 0 < part.text_bytes < text_bytes


def test_no_validation_window_in_training(tmp_path):
    """With prepared data: an epoch of training contains no validation document."""
    from llama_jax.prepare.mixture import prepare_mixture

    path = tmp_path / "a.jsonl"
    lines = [f"{i} {t}" for i, t in enumerate(texts(5, 300))]
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in lines + lines[:100]))
    cfg = DataConfig(
        sources={"a": SourceConfig(path=str(path))}, seq_len=T, packing="segments", val_fraction=0.2
    )
    mixture = open_mixture(prepare_mixture(cfg, 320, tmp_path / "out"))
    held = {tuple(d) for d in documents(mixture, "a", "holdout")}
    kept = {tuple(d) for d in documents(mixture, "a", "train")}
    assert len(held) > 30
    windows = SequenceDataset(mixture.sources["a"], cfg, "train")
    data = TrainData(mixture, cfg, 1)
    met = set()
    for batch in take(data, len(windows)):
        ids, segments = batch.inputs_BT[0], batch.segment_ids_BT[0]
        for s in range(1, segments.max() + 1):
            met.add(tuple(ids[segments == s].tolist()))
    data.close()
    whole = {d for d in met if d[0] == BOS and d[-1] == EOS}
    assert len(whole) > 20
    assert whole <= kept
    assert not met & held


# Errors ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [[], [0, 6], [-1]])
def test_rows_outside_the_batch(mixture, rows):
    with pytest.raises(ValueError, match=r"are not rows of a batch of 6"):
        TrainData(mixture, config(), 6, rows)
    with pytest.raises(ValueError, match=r"are not rows of a batch of 6"):
        next(eval_batches(mixture, config(), 6, 1, "a", rows))


def test_sequences_longer_than_the_text(mixture):
    """Training needs a whole sequence; validation text is filled up with padding."""
    tokens = {s: sum(map(len, documents(mixture, "a", s))) for s in ("train", "holdout")}
    with pytest.raises(ValueError, match=f"the train split has {tokens['train']} tokens, too few"):
        SequenceDataset(mixture.sources["a"], config(seq_len=tokens["train"]), "train")
    shorter = config(seq_len=tokens["train"] - 1)
    assert len(SequenceDataset(mixture.sources["a"], shorter, "train")) == 1
    with pytest.raises(ValueError, match=r"source a: the train split .* smaller data.seq_len"):
        TrainData(mixture, config(seq_len=100_000), 4)
    count = tokens["holdout"]
    (batch,) = eval_batches(mixture, config(seq_len=count + 9), 4, 10, "a")
    assert batch.mask_BT.sum() == batch.mask_BT[0, : count - 1].sum() == count - 1
    stats = val_stats(mixture, config(seq_len=count + 9), 4, 10, "a")
    assert stats == val_stats(mixture, config(), 4, 10**6, "a")


def test_validation_text_is_read_by_one_process(mixture, monkeypatch):
    """The other processes receive the exact values and read nothing."""
    from jax.experimental import multihost_utils

    expected = val_stats(mixture, config(), 4, 10, "a")
    sent: list[np.ndarray] = []
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(multihost_utils, "broadcast_one_to_all", lambda x: sent.append(x) or x)
    assert val_stats(mixture, config(), 4, 10, "a") == expected
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    monkeypatch.setattr(data_module, "eval_batches", None)
    monkeypatch.setattr(multihost_utils, "broadcast_one_to_all", lambda x: sent[0])
    assert val_stats(mixture, config(), 4, 10, "a") == expected
    assert sent[0].dtype == np.uint8


@pytest.fixture
def copy(folder, tmp_path) -> Path:
    import shutil

    return Path(shutil.copytree(folder, tmp_path / "copy"))


@pytest.mark.parametrize("kind", ["tokens", "starts"])
@pytest.mark.parametrize("damage", ["shorter", "longer", "gone"])
def test_damaged_shards_are_named(copy, kind, damage):
    path = copy / "b" / f"holdout-00001.{kind}"
    content = path.read_bytes()
    path.unlink()
    if damage != "gone":
        path.write_bytes(content[:-1] if damage == "shorter" else content + b"\0")
    with pytest.raises(ValueError, match=f"shard {path} .* prepare the source again"):
        open_mixture(copy)


def test_ids_outside_the_vocabulary(copy):
    path = copy / "c" / "train-00000.tokens"
    tokens = np.fromfile(path, "<u2")
    tokens[3] = 5000
    tokens.tofile(path)
    windows = SequenceDataset(open_mixture(copy).sources["c"], config(), "train")
    with pytest.raises(ValueError, match=r"copy/c: token id 5000 is outside the vocabulary of 320"):
        windows[0]
    data = TrainData(open_mixture(copy), config(), 4)
    with pytest.raises(ValueError, match="token id 5000 is outside the vocabulary of 320"):
        take(data, 400)
    data.close()
    assert windows[1].inputs_BT.max() < 320


def alter(path: Path, change: Any, *keys: Any) -> None:
    """Change one value of a manifest ("gone": remove it)."""
    content = tree = json.loads(path.read_text())
    for key in keys[:-1]:
        tree = tree[key]
    if change == "gone":
        del tree[keys[-1]]
    else:
        tree[keys[-1]] = change
    path.write_text(json.dumps(content))


SHARD = ("splits", "train", "shards", 0)
BAD_MANIFESTS = [
    ("a", "gone", ("name",), "name: Field required"),
    ("a", "gone", ("splits",), "splits: Field required"),
    ("a", "gone", ("splits", "holdout"), "splits.holdout: Field required"),
    ("a", "gone", ("tokenizer_sha256",), "tokenizer_sha256: Field required"),
    ("a", "gone", ("vocab_size",), "vocab_size: Field required"),
    ("a", "gone", ("format",), "format None, this version reads 1"),
    ("a", "gone", (*SHARD, "tokens_sha256"), "splits.train.shards.0.tokens_sha256: Field required"),
    ("a", 7, ("splits", "train", "shards"), "splits.train.shards=7: Input should be a valid array"),
    ("a", [], ("splits", "train", "shards"), "documents is 60, but its shards have 0"),
    ("a", "float16", ("dtype",), "dtype='float16': Input should be 'uint16' or 'uint32'"),
    ("a", "int16", ("dtype",), "dtype='int16'"),
    ("a", 70_000, ("vocab_size",), "70000 ids do not fit dtype uint16"),
    ("a", "320", ("vocab_size",), "vocab_size='320': Input should be a valid integer"),
    ("a", 2, ("format",), "format 2, this version reads 1"),
    ("a", "../../outside", (*SHARD, "name"), r"shards.0.name='../../outside': String should match"),
    ("a", "/etc/passwd", (*SHARD, "name"), "shards.0.name='/etc/passwd'"),
    ("a", "train-00001", (*SHARD, "name"), "two shards have the same name"),
    ("a", -5, (*SHARD, "tokens"), "shards.0.tokens=-5: Input should be greater than"),
    ("a", 10**30, (*SHARD, "tokens"), "shards.0.tokens=1000000000"),
    ("a", "0" * 64, ("tokenizer_sha256",), "made with another tokenizer"),
    ("a", "0" * 64, ("sha256",), "was altered: its content does not match its sha256"),
    ("a", "0" * 64, ("sha257",), "sha257='0+: Extra inputs are not permitted"),
    (".", "gone", ("tokenizer",), "tokenizer: Field required"),
    (".", "gone", ("tokenizer", "sha256"), "tokenizer.sha256: Field required"),
    (".", "../t.model", ("tokenizer", "file"), r"tokenizer.file='../t.model': String should"),
    (".", {}, ("sources",), "sources: Dictionary should have at least 1 item"),
    (".", [], ("sources",), "sources: Input should be"),
    (".", 5, ("sources", "a"), "sources.a=5"),
    (".", "gone", ("sources", "a", "folder"), "sources.a.folder: Field required"),
    (".", "gone", ("sources", "a", "weight"), "sources.a.weight: Field required"),
    (".", float("nan"), ("sources", "a", "weight"), "sources.a.weight=nan"),
    (".", 0, ("sources", "a", "weight"), "sources.a.weight=0: Input should be greater than 0"),
    (".", "a\0b", ("sources", "a", "folder"), "sources.a.folder="),
    (".", "0" * 64, ("sources", "a", "content"), "source a of .* was prepared again afterwards"),
]


def test_manifests(copy):
    """Opening and verify name every wrong or missing field in one line."""
    assert verify(copy) == []
    for place, change, keys, message in BAD_MANIFESTS:
        path = copy / place / "manifest.json"
        before = path.read_text()
        alter(path, change, *keys)
        with pytest.raises(ValueError, match=message) as e:
            open_mixture(copy)
        assert "\n" not in str(e.value), e
        assert str(path.parent) in str(e.value)
        if message != "made with another tokenizer":
            assert verify(copy) == [str(e.value)]
        path.write_text(before)
    path = copy / "a" / "manifest.json"
    for content, message in (
        (b'{"format": ', "manifest.json is damaged"),
        (b"[]", "it holds a list, not an object"),
        (b'{"format": 1, "name": ' + b"[" * 100_000, "is damaged: nested too deeply"),
        (b"\xff\xfe", "is damaged: not JSON"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            open_mixture(copy)
    path.unlink()
    with pytest.raises(ValueError, match=r"a has no manifest.json; make it"):
        open_mixture(copy)
    os.mkfifo(path)
    with pytest.raises(ValueError, match=r"manifest.json is not a regular file"):
        open_mixture(copy)


def test_verify_finds_every_altered_file(copy):
    """A byte of a shard, of its starts or of the tokenizer, a missing file; which opening finds."""
    files = [f for f in copy.rglob("*") if f.suffix in (".tokens", ".starts", ".model")]
    assert len(files) > 20
    for file in files:
        content = file.read_bytes()
        at = len(content) // 2
        file.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        (problem,) = verify(copy)
        assert str(file) in problem
        assert "altered" in problem or "damaged" in problem or "outside the vocabulary" in problem
        if file.suffix == ".model":
            with pytest.raises(ValueError, match=r"tokenizer.model was altered"):
                open_mixture(copy)
        file.write_bytes(content)
    source = copy / "a"
    (source / "train-00000.tokens").unlink()
    (source / "train-00001.tokens").write_bytes(b"")
    assert [p.split(" ")[1] for p in verify(source)] == [
        f"{source}/train-0000{i}.tokens" for i in (0, 1)
    ]
    assert "is missing" in verify(copy)[0]


def test_documents_that_do_not_start_in_order(copy, monkeypatch):
    path = copy / "a" / "train-00000.starts"
    starts = np.fromfile(path, "<u8")
    for wrong in (starts[::-1], starts + 1, np.where(starts == starts[-1], 2**40, starts)):
        wrong.astype("<u8").tofile(path)
        with pytest.raises(ValueError, match=r"train-00000.starts is damaged: document offsets"):
            open_mixture(copy)
    # Of very many documents the order is checked where they are read.
    monkeypatch.setattr(token_stream, "MAX_CHECKED_DOCUMENTS", 0)
    starts[[2, 3]] = starts[[3, 2]]
    starts.tofile(path)
    windows = SequenceDataset(open_mixture(copy).sources["a"], config(seq_len=100), "train")
    with pytest.raises(ValueError, match=r"train-00000.starts is damaged: document offsets"):
        windows[0]


def test_ids_of_four_bytes_beyond_the_vocabulary(tmp_path):
    """From 2**31 on they would be negative in int32."""
    ids = np.array([1, 2**31 + 5, 2], "<u4")
    np.array([0], "<u8").tofile(tmp_path / "s.starts")
    ids.tofile(tmp_path / "s.tokens")
    shard = {"name": "s", "tokens": 3, "documents": 1}
    content = {"vocab_size": 320, "dtype": "uint32", "splits": {"train": {"shards": [shard]}}}
    with pytest.raises(ValueError, match=f"token id {2**31 + 5} is outside the vocabulary of 320"):
        TokenStream(tmp_path, content, "train").read(0, 3)


def test_no_validation_text_is_an_error_at_the_start(copy):
    empty = {"documents": 0, "tokens": 0, "text_bytes": 0, "shards": []}
    alter(copy / "b" / "manifest.json", empty, "splits", "holdout")
    with pytest.raises(ValueError, match=r"source b: .*/b has no validation text"):
        open_mixture(copy)
