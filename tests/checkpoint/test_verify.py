"""Damage of any file is found and named: in every byte by verify, and when weights are read."""

import contextlib
import json
import os
import re
import shutil
import threading
from pathlib import Path

import convert_tools as tools
import jax.numpy as jnp
import pytest

import llama_jax
from llama_jax.checkpoint.checkpoints import Checkpoints
from llama_jax.checkpoint.file_hashes import files_below, record_files
from llama_jax.checkpoint.model_json import write_model_files
from llama_jax.checkpoint.weights import check_weights
from llama_jax.config import DataConfig, SourceConfig
from llama_jax.convert import job as convert
from llama_jax.convert import logits as verification
from llama_jax.convert.__main__ import main
from llama_jax.io import folder_lock
from llama_jax.prepare.mixture import prepare_mixture
from llama_jax.prepare.tokenizer import train_tokenizer
from llama_jax.verify import __main__ as verify

CFG = tools.small(vocab_size=300, dim=64, head_dim=16, num_heads=4, num_kv_heads=4, ffn_dim=96)
TEXT = ["the cat sat on a mat", "some animals saw 12 cats", "日本 and é", "def main(argv):"]
CHUNK = "steps/0/model/blocks.mlp.up/c/1/0/0"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Converted weights in four kinds, and a run of two steps with its data."""
    root = tmp_path_factory.mktemp("verify")
    state = tools.meta_state(CFG, tools.DTYPES["float32"], make=tools.random_values)
    state["layers.0.ffn_norm.weight"][:] = 0  # a chunk of zeros is a file as well
    tools.make_meta(root / "source", state, CFG)
    train_tokenizer(TEXT * 50, 300, root / "source/tokenizer.model")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(verification, "compare_logits", lambda *_: "logits compared")
        convert.convert(root / "source", root / "orbax")
        convert.convert(root / "source", root / "int8", quantize="int8")
        convert.convert(root / "orbax", root / "hf", to="hf", shards=2)
        convert.convert(root / "orbax", root / "meta", to="meta", verify=True)
    run = root / "run"
    run.mkdir()
    (run / "recipe.toml").write_text("[model]\n")
    record_files(run, "recipe.toml")
    write_model_files(run, CFG, root / "orbax/tokenizer.model", {"bos": 1, "eos": 2})
    (root / "text").mkdir()
    for i, text in enumerate(TEXT * 10):
        (root / f"text/{i}.txt").write_text(f"{text} {i}")
    data = DataConfig(
        sources={"a": SourceConfig(path=str(root / "text"))}, seq_len=8, val_fraction=0.2
    )
    prepare_mixture(data, 300, run / "data")
    weights = {"a": jnp.ones((64, 64)), "b": {"c": jnp.zeros(5)}}
    checkpoints = Checkpoints(run, 2)
    for step in (1, 2):
        checkpoints.save(step, weights, {"count": jnp.int32(step)}, {"step": step})
    checkpoints.close()
    return root


@contextlib.contextmanager
def damaged(path: Path, compute: str):
    """Context manager: the file has this content inside the block."""
    before = path.read_bytes()
    if compute == "missing":
        path.unlink()
    elif compute == "longer":
        path.write_bytes(before + b"x")
    else:
        middle = len(before) // 2
        path.write_bytes(before[:middle] + bytes([before[middle] ^ 1]) + before[middle + 1 :])
    yield
    path.write_bytes(before)


@pytest.mark.parametrize("name", ["orbax", "int8", "hf", "meta", "run", "run/steps/2", "run/data"])
def test_any_altered_byte_is_found_and_named(place, name, capsys):
    folder = place / name
    assert verify.main([str(folder)]) == 0
    assert "OK: " in capsys.readouterr().out
    # .lock and .tokenizer.json (what a tokenizer was trained on) are notes of `prepare` to itself.
    files = [f for f in files_below(folder) if not Path(f).name.startswith(".")]
    assert len(files) >= 4
    missed = []
    for file in files:
        with damaged(folder / file, "flipped"):
            problems = verify.verify(folder)
        if not any(str(folder / file) in problem for problem in problems):
            missed.append(file)
    assert not missed


@pytest.mark.parametrize("name", ["orbax", "hf", "run"])
def test_missing_and_longer_files_are_found_and_named(place, name, capsys):
    folder = place / name
    files = [f for f in files_below(folder) if not f.startswith("data/")]  # test_prepare's
    by_kind = {(Path(f).name.split("-")[0], f.count("/")): f for f in files}
    for file in by_kind.values():
        for compute in ("missing", "longer"):
            with damaged(folder / file, compute):
                assert verify.main([str(folder)]) in (1, 2), (file, compute)
            # For a missing list, the message names its folder.
            named = file.rpartition("/")[0] if file.endswith(".json") else file
            assert str(folder / named) in "".join(capsys.readouterr()), (file, compute)


def test_steps_that_cannot_be_checked(place, tmp_path):
    """During a run, old steps are removed and the newest has no list yet."""
    run = tmp_path / "run"
    shutil.copytree(place / "run", run)
    first, second = run / "steps/1", run / "steps/2"
    (second / "checksums.0-of-1.json").unlink()
    (run / "data/a/tokenizer.model").rename(run / "gone")
    problems = "".join(verify.verify(run))
    assert "the process ended before" in problems
    assert "data/a/tokenizer.model is missing" in problems
    (run / "gone").rename(run / "data/a/tokenizer.model")
    with folder_lock(run, "training"):
        (first / "commit_success.txt").unlink(missing_ok=True)
        shutil.rmtree(first / "model")
        remover = threading.Timer(0.3, shutil.rmtree, [first])
        remover.start()
        [problem] = verify.verify(run)
        remover.join()
    assert problem.startswith(f"{second} has no checksums: the run in progress has not")
    (second / "checksums.json").write_text("{}")  # of before SHA-256
    [problem] = verify.verify(run)
    assert "written by an older version" in problem


def test_other_folders_are_refused(place, tmp_path, capsys):
    for folder in (tmp_path, tmp_path / "nowhere", place / "source"):
        assert verify.main([str(folder)]) == 2
        assert capsys.readouterr().err.startswith("error: ")


def convert_error(source: Path, out: Path, capsys) -> str:
    """The output of the command; no destination is created."""
    assert main([str(source), str(out), "--max-memory", "64GiB"]) == 1
    assert not out.exists()
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert "Traceback" not in error
    return error


def load_error(folder: Path, **options) -> str:
    with pytest.raises((ValueError, MemoryError)) as raised:
        llama_jax.load(folder, **options)
    return str(raised.value)


def test_reading_weights_refuses_damage(place, tmp_path, capsys):
    """Loading in three ways, training from them (check_weights) and converting."""
    for name, file in (("orbax", CHUNK), ("int8", CHUNK.replace("up", "up.q"))):
        for compute in ("missing", "longer", "flipped"):
            path = place / name / file
            with damaged(path, compute):
                errors = [load_error(place / name)]
                if name == "orbax":
                    errors.append(load_error(place / name, quantize="int8"))
                    errors.append(convert_error(place / name, tmp_path / "out", capsys))
                with pytest.raises(ValueError, match=file) as raised:
                    check_weights(place / name)
                errors.append(str(raised.value))
            assert all(str(path) in error for error in errors), errors
    for file in ("tokenizer.model", "model.json", "steps/0/model/_METADATA"):
        with damaged(place / "orbax" / file, "flipped"):
            assert file in load_error(place / "orbax")
    with damaged(place / "run/recipe.toml", "flipped"):
        check_weights(place / "run")


def test_a_missing_chunk_is_never_zeros(place, tmp_path, capsys):
    """Even if no list contains the file."""
    for name, file in (("orbax", CHUNK), ("int8", CHUNK.replace("up", "up.q"))):
        folder = tmp_path / name
        shutil.copytree(place / name, folder)
        (folder / "manifest.json").unlink()
        (folder / file).unlink()
        errors = [load_error(folder)]
        if name == "orbax":
            errors.append(load_error(folder, quantize="int8"))
            errors.append(convert_error(folder, tmp_path / "out", capsys))
        assert all(str(folder / file) in error for error in errors), errors


DEEP = '{"a":' * 100_000 + "1" + "}" * 100_000


def set_json(file: str, change):
    """A damage that changes one JSON file."""

    def damage(folder: Path) -> None:
        tree = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps(change(tree)))

    return damage


def replaced(file: str, make):
    """A damage that replaces a file with something else."""

    def damage(folder: Path) -> None:
        (folder / file).rename(folder.with_suffix(".before"))
        make(folder / file, folder.with_suffix(".before"))

    return damage


UP = "steps/0/model/blocks.mlp.up/zarr.json"
HUGE = {"name": "regular", "configuration": {"chunk_shape": [1, 10**12, 10**12]}}
# what: (damage, what the message says, whether convert says it too)
HOSTILE = {
    "no model": (
        set_json("model.json", lambda t: {k: v for k, v in t.items() if k != "model"}),
        "model.json is damaged: it has no model", False,
    ),
    "model a list": (set_json("model.json", lambda t: t | {"model": [1]}), "model.json", False),
    "token ids a list": (
        set_json("model.json", lambda t: t | {"token_ids": [2]}),
        "model.json: token_ids must be an object", False,
    ),
    "other quantize": (
        set_json("model.json", lambda t: t | {"quantize": ["int8"]}), "model.json: quantize", False,
    ),
    "other layers": (
        set_json("model.json", lambda t: t | {"model": t["model"] | {"num_layers": 3}}),
        r"is \[2, 64, 64\], not \[3, 64, 64\]", False,
    ),
    "many layers": (
        set_json("model.json", lambda t: t | {"model": t["model"] | {"num_layers": 10**8}}),
        "num_layers=100000000|the weights of .* take 13977", False,
    ),
    "deep": (replaced("model.json", lambda p, _: p.write_text(DEEP)), "nested too deeply", False),
    "metadata a list": (
        replaced("steps/0/model/_METADATA", lambda p, _: p.write_text("[1]")), "_METADATA", True,
    ),
    "metadata deep": (
        replaced("steps/0/model/_METADATA", lambda p, _: p.write_text(DEEP)), "_METADATA", False,
    ),
    "huge chunk": (set_json(UP, lambda t: t | {"chunk_grid": HUGE}), "zarr.json is damaged", True),
    "negative shape": (set_json(UP, lambda t: t | {"shape": [-1] * 3}), "zarr.json", True),
    "array deep": (replaced(UP, lambda p, _: p.write_text(DEEP)), "zarr.json is damaged", True),
    "link": (replaced(CHUNK, lambda p, old: p.symlink_to(old)), "is a link out of", True),
    "pipe": (replaced(CHUNK, lambda p, _: os.mkfifo(p)), "is not a regular file", True),
    "tokenizer of another": (
        replaced("tokenizer.model", lambda p, _: train_tokenizer(TEXT * 50, 301, p)),
        "has 301 tokens, the embedding of", False,
    ),
}  # fmt: skip


def test_malformed_checkpoints_are_refused_in_one_line(place, tmp_path, capsys):
    """Without a list of hashes, as in a folder from an unknown source."""
    for i, (what, (damage, says, converts)) in enumerate(HOSTILE.items()):
        folder = tmp_path / f"{i}"
        shutil.copytree(place / "orbax", folder)
        (folder / "manifest.json").unlink()
        damage(folder)
        errors = [load_error(folder)]
        if converts:
            errors.append(convert_error(folder, tmp_path / "out", capsys).rstrip())
        for error in errors:
            assert re.search(says, error), (what, error)
            assert len(error.splitlines()) == 1, (what, error)
            assert len(error) < 500, (what, error)
