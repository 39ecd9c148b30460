"""Properties of training that a whole run does not show, each tested as cheaply as possible.

The loop is tested with a step that computes nothing, so that a run takes seconds.
"""

import dataclasses
import json
import os
import re
import resource
import shutil
import signal
import stat
import subprocess
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import make_golden_run as golden
import model_tools as tools
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from train_tools import make_zeros

from llama_jax import io
from llama_jax.checkpoint.checkpoints import CheckpointError, Checkpoints
from llama_jax.checkpoint.weights import load_weights
from llama_jax.config import DataConfig, OptimConfig, SourceConfig
from llama_jax.data.batch import Batch
from llama_jax.data.mixture import Mixture, TrainData
from llama_jax.data.sequences import Source, TokenStream
from llama_jax.model.llama import ComputeConfig
from llama_jax.model.sharding import AXES
from llama_jax.prepare.mixture import prepare_mixture
from llama_jax.train import initial_state, loop, metrics
from llama_jax.train.__main__ import main
from llama_jax.train.distributed import SAVE, STOP, combine, exchange
from llama_jax.train.loss import nll_sum
from llama_jax.train.optim import make_optimizer
from llama_jax.train.step import compute_config
from llama_jax.versions import source_version
from pallas_kernels import rms_norm

CFG = tools.small()


# The step ----------------------------------------------------------------------------------------


def batch_of(rows: int = 2, T: int = 12) -> Batch:
    """Random ids and masks, two segments per row, positions that differ from the defaults."""
    rng = np.random.default_rng(0)
    ids = rng.integers(0, CFG.vocab_size, (rows, T + 1), np.int32)
    return Batch(
        inputs_BT=ids[:, :-1],
        targets_BT=ids[:, 1:],
        mask_BT=(rng.random((rows, T)) < 0.6).astype(np.float32),
        segment_ids_BT=np.sort(rng.integers(1, 3, (rows, T)), axis=1).astype(np.int32),
        positions_BT=np.cumsum(rng.integers(1, 4, (rows, T)), axis=1).astype(np.int32),
    )


def test_the_loss_uses_everything_in_a_batch():
    """Mask, segments and positions: the sum equals that of the model's own logits, which use them.

    Positions that restart with each document give the same loss as ones that do not, since rotary
    attention depends only on differences, so these have gaps.
    """
    batch = batch_of()
    build = tools.model_of(CFG)
    params = tools.tree_of(tools.random_weights(CFG))
    ours = jax.jit(lambda params, batch: nll_sum(build(params), batch, 0))

    @jax.jit
    def want(params, batch):
        known = {k: getattr(batch, k) for k in ("segment_ids_BT", "positions_BT")}
        log_p = jax.nn.log_softmax(build(params)(batch.inputs_BT, **known))
        nll = -jnp.take_along_axis(log_p, batch.targets_BT[..., None], axis=-1)[..., 0]
        return jnp.sum(nll * batch.mask_BT)

    whole = float(ours(params, batch))
    assert whole == pytest.approx(float(want(params, batch)), rel=1e-6)
    for key in ("mask_BT", "segment_ids_BT", "positions_BT"):
        less = batch._replace(**{key: None})
        assert abs(float(ours(params, less)) / whole - 1) > 1e-4, key


@pytest.mark.parametrize("decay", ["matrices", "all"])
@pytest.mark.parametrize("clip", [0.5, 0.0])
def test_the_optimizer_is_adamw_with_a_warm_up_and_a_cosine(decay, clip):
    """Eight updates of a matrix, an embedding and a norm, written out in float64."""
    cfg = OptimConfig(
        peak_lr=0.1, warmup_steps=3, final_fraction=0.3, b1=0.7, b2=0.8, eps=1e-2,
        weight_decay=0.4, decay=decay, max_grad_norm=clip,
    )  # fmt: skip
    rng = np.random.default_rng(0)
    shapes = {"embed": (3, 4), "up": (2, 4, 5), "mlp_norm": (2, 4)}
    weights = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    optimizer = make_optimizer(cfg, 8)
    found = jax.tree.map(jnp.float32, weights)
    state = optimizer.init(found)
    m, v = ({name: np.zeros(shape) for name, shape in shapes.items()} for _ in range(2))
    for i in range(8):
        # Norms on both sides of the limit.
        grads = {n: rng.normal(size=w.shape) * 0.05 * (1 + i) for n, w in weights.items()}
        updates, state = optimizer.update(jax.tree.map(jnp.float32, grads), state, found)
        found = jax.tree.map(jnp.add, found, updates)
        norm = np.sqrt(sum((g**2).sum() for g in grads.values()))
        turn = (1 + np.cos(np.pi * (i - 3) / 5)) / 2
        rate = 0.1 * ((i + 1) / 3 if i < 3 else 0.3 + 0.7 * turn)
        for n, w in weights.items():
            g = grads[n] * (min(1, clip / norm) if clip else 1)
            m[n], v[n] = 0.7 * m[n] + 0.3 * g, 0.8 * v[n] + 0.2 * g**2
            step = m[n] / (1 - 0.7 ** (i + 1)) / (np.sqrt(v[n] / (1 - 0.8 ** (i + 1))) + 1e-2)
            decays = decay == "all" or n != "mlp_norm"
            weights[n] = w - rate * (step + 0.4 * decays * w)
            np.testing.assert_allclose(found[n], weights[n], rtol=1e-5, atol=1e-6, err_msg=n)


def test_norm_statistics_are_float32():
    """Also with bfloat16 activations: equal to float32 statistics rounded once, except for ties."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(16, 32, 64)) * 3, jnp.bfloat16)
    exact = np.asarray(x, np.float64)
    exact = exact / np.sqrt((exact**2).mean(-1, keepdims=True) + 1e-5)
    want = np.asarray(jnp.asarray(exact, jnp.float32).astype(jnp.bfloat16), np.float32)
    found = np.asarray(rms_norm(x, jnp.ones(64, jnp.bfloat16), 1e-5), np.float32)
    assert (found != want).mean() < 1e-3


def test_what_remat_recomputes():
    """matmuls: no product with a weight is recomputed; full: all that the gradient needs."""
    tokens = np.zeros((1, 8), np.int32)
    params = tools.tree_of(tools.random_weights(CFG))
    products = {}
    for remat in ("none", "matmuls", "full"):
        build = tools.model_of(CFG, ComputeConfig(jnp.dtype("float32"), remat=remat))
        gradient = jax.grad(lambda p, build=build: jnp.sum(build(p)(tokens) ** 2))
        text = jax.jit(gradient).lower(params).as_text()
        lines = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
        # Products with weights have no batch dimensions; those of attention have.
        products[remat] = sum("batching_dims" not in line for line in lines)
    assert products["none"] == products["matmuls"] < products["full"]


def test_a_request_to_stop_by_any_process_stops_all():
    """With one process, the request itself; with several, one per device (here eight)."""
    mesh = jax.make_mesh((8, 1, 1, 1), AXES, axis_types=(AxisType.Explicit,) * 4)
    assert [exchange(request, 1.0, mesh)[0] for request in (0, SAVE, STOP)] == [0, 1, 2]
    with jax.set_mesh(mesh):
        for asks in ({}, {2: SAVE}, {0: SAVE, 7: STOP}, {3: STOP}):
            rows = np.array([[asks.get(i, 0), i / 8] for i in range(8)], np.float32)
            highest, seconds = combine(jax.device_put(rows, NamedSharding(mesh, P(AXES))))
            assert int(highest) == max(asks.values(), default=0)
            assert np.asarray(seconds).tolist() == [i / 8 for i in range(8)]


def test_dtypes_follow_the_platform():
    recipe = golden.loaded()
    auto = dataclasses.replace(
        recipe, train=dataclasses.replace(recipe.train, compute_dtype="auto")
    )
    assert [compute_config(auto, p).dtype for p in ("cpu", "tpu", "gpu")] == [
        jnp.float32,
        jnp.bfloat16,
        jnp.bfloat16,
    ]
    assert compute_config(recipe, "tpu").dtype == jnp.float32


# The loop ----------------------------------------------------------------------------------------


def a_run(monkeypatch, folder: Path, metrics_of, *overrides: str) -> int:
    """The exit code of the command, on the recipe of the golden run with a step that only counts.

    ``metrics_of(step)`` replaces metrics of that step (a traced number from 1).
    """

    def make(recipe, compute):
        def step(state, batch):
            done = state.optimizer[-1].count + 1
            count_up = lambda x: x + 1 if jnp.issubdtype(x.dtype, jnp.integer) else x
            metrics = {
                "loss": jnp.float32(1),
                "grad_norm": jnp.float32(1),
                "learning_rate": jnp.float32(1),
            }
            return jax.tree.map(count_up, state), metrics | metrics_of(done)

        return step

    monkeypatch.setattr(initial_state, "init_state", make_zeros)
    monkeypatch.setattr(loop, "make_train_step", make)
    monkeypatch.setattr(loop, "make_eval_step", lambda *_: lambda params, batch: jnp.float32(1))
    paths = [f"data.sources.{n}.path={golden.FOLDER / n}" for n in ("letters", "numbers")]
    more = ["train.log_every=1000", "train.eval_every=0", f"checkpoint.dir={folder}"]
    return main([str(golden.FOLDER / "recipe.toml"), *paths, *more, *overrides])


def test_a_step_is_checked_before_it_is_saved(monkeypatch, tmp_path, capsys):
    """A gradient that is not finite, at a step that would be saved, between two log lines."""
    bad = lambda step: {"grad_norm": jnp.where(step == 6, jnp.nan, 1.0)}
    assert a_run(monkeypatch, tmp_path, bad, "checkpoint.save_every=3") == 1
    assert "step 6: loss 1.0, gradient norm nan" in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "steps").iterdir()] == ["3"]


def test_the_logged_loss_is_the_mean_since_the_last_line(monkeypatch, tmp_path):
    """Also in a run that is stopped between two log lines: it logs what an unstopped run logs."""
    loss = lambda step: {"loss": step.astype(jnp.float32)}
    assert a_run(monkeypatch, tmp_path / "a", loss, "train.log_every=8") == 0
    draw = TrainData.__next__

    def draw_and_stop(self):
        if self.state()["batches"] + 1 == 11:
            os.kill(os.getpid(), signal.SIGTERM)
        return draw(self)

    monkeypatch.setattr(TrainData, "__next__", draw_and_stop)
    assert a_run(monkeypatch, tmp_path / "b", loss, "train.log_every=8") == 143
    assert (tmp_path / "b/steps/11").is_dir()
    monkeypatch.setattr(TrainData, "__next__", draw)
    assert a_run(monkeypatch, tmp_path / "b", loss, "train.log_every=8") == 0
    for run in ("a", "b"):
        records = metrics.read_records(tmp_path / run / "metrics.jsonl")
        losses = {r["step"]: r["loss"] for r in records if r["kind"] == "train"}
        assert losses == {8: 4.5, 16: 12.5, 20: 18.5}, run


def test_a_saved_record_does_not_change_afterwards(monkeypatch, tmp_path):
    """Orbax writes it in a thread, while the next steps already add their losses."""
    save, records = Checkpoints.save, {}

    def keep(self, step, params, optimizer, run):
        records[step] = run
        save(self, step, params, optimizer, run)

    monkeypatch.setattr(Checkpoints, "save", keep)
    loss = lambda step: {"loss": step.astype(jnp.float32)}
    settings = ["train.log_every=8", "checkpoint.save_every=5"]
    assert a_run(monkeypatch, tmp_path, loss, *settings) == 0
    losses = {step: run["losses"] for step, run in records.items()}
    assert losses == {5: [1, 2, 3, 4, 5], 10: [9, 10], 15: [9, 10, 11, 12, 13, 14, 15], 20: []}


# Checkpoints -------------------------------------------------------------------------------------


def save(checkpoints: Checkpoints, step: int, size: int = 6) -> None:
    state = {"a": jnp.full(size, float(step))}, {"count": jnp.int32(7)}
    checkpoints.save(step, *state, {"step": step, "data": {"batches": 1}})


def save_whole(checkpoints: Checkpoints, step: int, size: int) -> None:
    save(checkpoints, step, size)
    checkpoints.wait()


def abstract(size: int = 6) -> tuple[dict, dict]:
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    place = lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=here)
    return {"a": place((size,), jnp.float32)}, {"count": place((), jnp.int32)}


def test_a_finished_save_gets_its_checksums_without_another(tmp_path):
    """The loop polls at each log line, so a run killed long after a save has its checksums."""
    checkpoints = Checkpoints(tmp_path, 2)
    save(checkpoints, 1)
    sums = lambda: list((tmp_path / "steps").glob("1/checksums*.json"))
    end = time.monotonic() + 20
    while not sums() and time.monotonic() < end:
        checkpoints.poll()
        time.sleep(0.01)
    assert sums()
    checkpoints.close()


def test_a_failed_save_leaves_nothing(tmp_path):
    """A failed save on a full disk removes its files; the previous step remains."""
    checkpoints = Checkpoints(tmp_path, 2)
    save_whole(checkpoints, 1, 6)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(CheckpointError, match="newest good step is 1"):
            save_whole(checkpoints, 2, 100_000)  # four bytes each
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [p.name for p in (tmp_path / "steps").iterdir()] == ["1"]
    checkpoints.close()


def test_the_run_record_is_checked_too(tmp_path):
    """Otherwise a run would silently continue from a changed data position."""
    checkpoints = Checkpoints(tmp_path, 2)
    save(checkpoints, 1)
    checkpoints.close()
    [record] = [p for p in (tmp_path / "steps/1/run").rglob("*") if b'"batches"' in content_of(p)]
    record.write_bytes(record.read_bytes().replace(b'"batches": 1', b'"batches": 2'))
    checkpoints = Checkpoints(tmp_path, 2)
    with pytest.raises(CheckpointError, match=re.escape(str(record))):
        checkpoints.restore(*abstract())
    checkpoints.close()


def test_the_newest_weights_are_loaded(tmp_path):
    """Newest by number: 10 is after 9."""
    checkpoints = Checkpoints(tmp_path, 3)
    for step in (9, 10):
        save(checkpoints, step)
    checkpoints.close()
    assert load_weights(tmp_path, abstract()[0])["a"][0] == 10


def content_of(path: Path) -> bytes:
    return path.read_bytes() if path.is_file() else b""


# Data --------------------------------------------------------------------------------------------


def source(name: str, folder: str = "numbers", **changes) -> Source:
    path = golden.FOLDER / folder
    manifest = json.loads((path / "manifest.json").read_text())
    return Source(name, path, 1.0, manifest | changes)


def data_of(*sources: Source) -> TrainData:
    mixture = Mixture(golden.FOLDER / "numbers/tokenizer.model", 288, {s.name: s for s in sources})
    cfg = DataConfig(
        sources={s.name: SourceConfig(path=f"unused {s.name}") for s in sources}, seq_len=16
    )
    return TrainData(mixture, cfg, 4)


def test_a_position_belongs_to_the_content_and_the_weights_of_the_data():
    """Shards of the same name and size with other tokens are other data."""
    data = data_of(source("a"))
    state = data.state()
    data.restore(state)
    data.close()
    splits = json.loads(json.dumps(source("a").manifest["splits"]))
    splits["train"]["shards"][0]["tokens_sha256"] = "0" * 64
    for changed in (source("a", splits=splits), dataclasses.replace(source("a"), weight=2.0)):
        other = data_of(changed)
        with pytest.raises(ValueError, match="belongs to other data"):
            other.restore(state)
        other.close()


def test_a_file_that_takes_the_place_of_another_is_read(tmp_path):
    """Shards stay open; one that was made again is another file of the same name and size."""
    folder = shutil.copytree(golden.FOLDER / "numbers", tmp_path / "numbers")
    manifest = source("a").manifest
    ids = TokenStream(folder, manifest, "train").read(0, 600)[0]
    np.full(712, 9, "<u2").tofile(folder / "new")
    (folder / "new").rename(folder / "train-00000.tokens")
    assert (ids != 9).any()
    assert (TokenStream(folder, manifest, "train").read(0, 600)[0] == 9).all()


def test_sources_of_one_length_are_shuffled_differently():
    data = data_of(source("a"), source("b"))
    rows = np.concatenate([next(data).inputs_BT for _ in range(20)])
    data.close()
    # Both have the same text; with one order for both, the batches would alternate.
    assert len({row.tobytes() for row in rows}) > 30
    assert (rows[::2] == rows[1::2]).all(axis=1).sum() < len(rows) / 8


@pytest.mark.parametrize("fits", [False, True])
def test_the_largest_id_is_one_less_than_the_vocabulary(fits):
    ids, _ = golden.read_split("numbers", "train")
    manifest = source("a").manifest | {"vocab_size": int(ids.max()) + (1 if fits else 0)}
    stream = TokenStream(golden.FOLDER / "numbers", manifest, "train")
    if fits:
        assert stream.read(0, len(ids))[0].max() == ids.max()
    else:
        with pytest.raises(ValueError, match=f"token id {ids.max()} is outside the vocabulary"):
            stream.read(0, len(ids))


def test_a_text_changed_in_place_is_prepared_again(tmp_path):
    """New content of the same size is detected by its time; other text is not prepared again."""
    text = tmp_path / "a.jsonl"
    lines = [json.dumps({"text": f"the cat sat on mat {i}"}) for i in range(40)]
    text.write_text("\n".join(lines))
    cfg = DataConfig(
        sources={"a": SourceConfig(path=str(text))},
        tokenizer=str(golden.FOLDER / "numbers/tokenizer.model"),
        seq_len=16,
        val_fraction=0.3,  # a large fraction, so the split rule has no exceptions
    )

    def tokens():
        out = prepare_mixture(cfg, 288, tmp_path / "out")
        path = out / "a" / "train-00000.tokens"
        return path.read_bytes(), path.stat().st_ino

    first = tokens()
    assert tokens() == first
    text.write_text("\n".join(lines).replace("cat", "tac"))
    assert tokens()[0] != first[0]
    assert tokens()[0] == tokens()[0]


# The record of a run -----------------------------------------------------------------------------


def test_a_damaged_metrics_file_does_not_end_a_run(tmp_path):
    """Lines after a damaged one are dropped, and those of steps that will be repeated."""
    record = {"kind": "train", "tokens": 1, "loss": 1.0}
    line = lambda step: json.dumps(record | {"step": step}) + "\n"
    file = tmp_path / "metrics.jsonl"
    file.write_text(line(1) + line(2) + line(3) + '{"kind": "train", "st\n' + line(4))
    log = metrics.MetricsLog(tmp_path, 2)
    log.write(record | {"step": 3})
    log.close("test")
    steps = [json.loads(x)["step"] for x in file.read_text().splitlines()]
    assert steps == [1, 2, 3]


LARGE_RUN = {
    "step": 333780, "tokens": 1.4e12, "loss": 11.7708, "grad_norm": 12.345, "learning_rate": 3e-5,
    "tokens_per_second": 4012345.6, "mfu": 0.521, "data_wait": 0.156, "memory_gib": 71.25,
}  # fmt: skip


def test_log_lines_fit_120_columns():
    line = metrics.train_line(LARGE_RUN, 333787)
    assert line == (
        "step 333780/333787 | 1.40T tokens | loss 11.771, grad 12.35, lr 3.0e-05 | "
        "4.01M tok/s, MFU 52.1%, wait 15.6% | 71.2 GiB"
    )
    lines = [line, *metrics.environment().splitlines()]
    assert max(map(len, lines)) <= 120
    short = [metrics.short(x) for x in (7, 999.4, 999.6, 1234567, 999_999_999, 20e12)]
    assert short == ["7", "999", "1.00k", "1.23M", "1.00B", "20.0T"]


def test_validation_lines():
    """The loss in nats/token, bits/byte, and the loss of the unigram model to compare with."""
    code = {"loss": 6.1422, "bits_per_byte": 3.0414, "unigram_entropy": 5.7941}
    prose = {"loss": 5.0, "bits_per_byte": 2.5, "unigram_entropy": 5.5}
    assert metrics.eval_lines({**code, "sources": {"code": code}}) == [
        "val/code loss 6.142 (3.04 bits/byte), unigram baseline 5.794"
    ]
    lines = metrics.eval_lines({**prose, "sources": {"code": code, "prose": prose}})
    assert [line.partition(" ")[0] for line in lines] == ["val/code", "val/prose", "val/mixture"]


def test_the_logged_commit_is_the_packages_own(tmp_path):
    """Not that of a repository which merely encloses an installed package."""
    commit = lambda folder: subprocess.run(
        "git init -q . && git add -A && git -c user.name=a -c user.email=a@b commit -qm a",
        cwd=folder, shell=True, check=True,
    )  # fmt: skip
    installed = tmp_path / "project/venv/site-packages/llama_jax"
    checkout = tmp_path / "checkout/llama_jax"
    for package in (installed, checkout):
        package.mkdir(parents=True)
        (package / "versions.py").touch()
    (checkout.parent / "pyproject.toml").touch()
    (tmp_path / "project/pyproject.toml").touch()
    commit(tmp_path / "project")
    commit(checkout.parent)
    assert "commit" not in source_version(installed)
    assert re.fullmatch("commit [0-9a-f]{12}", source_version(checkout))
    (checkout / "versions.py").write_text("changed")
    assert source_version(checkout).endswith("+changes")


# Files -------------------------------------------------------------------------------------------


def test_content_is_on_the_disk_before_it_has_its_name(monkeypatch, tmp_path):
    """A power cut leaves the old file or the new one: content first, then the name, then the
    folder."""
    path, events, real = tmp_path / "file", [], os.fsync

    def fsync(descriptor):
        folder = stat.S_ISDIR(os.fstat(descriptor).st_mode)
        events.append(("folder" if folder else "content", path.exists()))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    io.atomic_write(path, b"new")
    assert events == [("content", False), ("folder", True)]
