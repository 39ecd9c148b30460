"""Buckets: paths, locks, caches, and a run that is killed while it writes, against emulators."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest
import quick_options
from bucket_tools import emulated_buckets
from convert_tools import ANY
from train_tools import write_recipe

from llama_jax.checkpoint.arrays import open_array
from llama_jax.checkpoint.steps import whole_steps
from llama_jax.data.shard_cache import local_shards
from llama_jax.io import folder_lock, in_use
from llama_jax.storage import lock
from llama_jax.storage.copies import upload_folder
from llama_jax.storage.errors import StorageError, reason, redacted
from llama_jax.storage.paths import as_path, check_access, remove_tree

ROOT = Path(__file__).parents[1]
SCHEMES = ("s3", "gs")
STEPS = 4
PREPARED = "s3://bucket/prepared sets/v1"

# Ends itself by SIGKILL when Orbax has written an item of the last step, and not the others.
KILLED = """
import os, signal, sys
from llama_jax import chips
from llama_jax.train import loop, metrics
from orbax.checkpoint._src.path.atomicity import CommitFileTemporaryPath as Path
chips.peak_flops = lambda device: (1e12, "of this test")
finalize = Path.finalize
async def kill(self):
    if "/steps/4" in str(self.get_final()):
        os.kill(os.getpid(), signal.SIGKILL)
    await finalize(self)
Path.finalize = kill
from llama_jax.train.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a recipe and its text, and the emulators."""
    folder = tmp_path_factory.mktemp("buckets")
    with emulated_buckets() as environment, pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        write_recipe(
            folder,
            data={"prepared": "", "sources": {"words": {"path": f"{PREPARED}/words"}}},
            train={"steps": STEPS, "eval_batches": 1},
        )
        yield folder, environment


@pytest.mark.parametrize("scheme", SCHEMES)
def test_paths(place, scheme):
    folder = as_path(f"{scheme}://bucket/a folder/ünï+1%20")
    assert not folder.exists()
    assert folder.files() == {}
    (folder / "a b.txt").write_bytes(b"hello")
    (folder / "in/c.txt").write_bytes(b"")
    assert (folder.is_dir(), folder.is_file(), (folder / "a b.txt").is_file()) == (
        True,
        False,
        True,
    )
    assert (folder / "a b.txt").read_range(1, 3) == b"el"
    assert (folder / "a b.txt").open().read() == "hello"
    assert [p.name for p in folder.iterdir()] == ["a b.txt", "in"]
    assert {n: s.st_size for n, s in folder.files().items()} == {"a b.txt": 5, "in/c.txt": 0}
    with pytest.raises(FileExistsError):
        (folder / "a b.txt").create(b"")
    with pytest.raises(FileNotFoundError):
        (folder / "missing").read_bytes()
    (folder / "in").rename(folder / "out")
    assert [str(p.relative_to(folder)) for p in folder.rglob("*")] == ["a b.txt", "out/c.txt"]
    remove_tree(folder)
    assert not folder.exists()
    with pytest.raises(TypeError):
        os.fspath(folder)  # never a local folder named "s3:"
    for path in ("missing-bucket/run", "missing-bucket"):
        with pytest.raises(StorageError, match=r"the bucket .*does not exist; create it"):
            check_access(as_path(f"{scheme}://{path}"))


def test_errors_have_one_line_and_no_credentials():
    text = (
        "GET https://u:pw@host/a?sig=q9x&X-Amz-Signature=abc&X-Amz-Credential=AKIAABCDEFGHIJKLMNOP "
        "failed, "
        "Authorization: Bearer ya29.abc-def secret_key='s3cr3t' AKIAABCDEFGHIJKLMNOP\nmore"
    )
    shown = redacted(text)
    for secret in ("pw", "q9x", "abc", "AKIA", "ya29", "s3cr3t"):
        assert secret not in shown
    began = time.process_time()
    redacted("a" * 10**6)  # an answer of a server that is one long word
    assert time.process_time() - began < 5
    assert "\n" not in reason(ValueError(text), "s3")
    assert "permission denied" in reason(PermissionError("Access Denied"), "gs")
    assert "aws configure" in reason(type("NoCredentialsError", (Exception,), {})(), "s3")
    assert "gcloud auth" in reason(ValueError("Anonymous caller does not have access"), "gs")
    assert "no connection" in reason(type("ClientConnectorError", (Exception,), {})(), "gs")


def test_lock(place, monkeypatch):
    folder = as_path("s3://bucket/locked")
    monkeypatch.setattr(lock, "RENEW_SECONDS", 0.1)
    monkeypatch.setattr(lock, "STALE_SECONDS", 1.0)
    monkeypatch.setattr(lock, "_POLL_SECONDS", 0.3)
    with folder_lock(folder, "training"):
        assert in_use(folder)
        message = f"in use: training .process {os.getpid()} on"
        with pytest.raises(ValueError, match=message), folder_lock(folder, "training"):
            pass
    assert not in_use(folder)
    # Damaged, of a process of this machine that has ended, and of another machine.
    (folder / ".lock").write_bytes(b"[" * 200_000)
    with folder_lock(folder, "training"):
        pass
    dead = subprocess.Popen(["true"])
    mine = lock._process(os.getpid()).split()
    dead.wait()
    gone = " ".join([*mine[:2], str(dead.pid), mine[3]])
    for process, known in ((gone, True), ("other machine 1 1", False)):
        content = {"holder": "training", "id": "x", "process": process}
        (folder / ".lock").write_bytes(json.dumps(content).encode())
        assert in_use(folder) is not known
        with folder_lock(folder, "training"):
            assert in_use(folder)


def run(folder: Path, to: str, code: int = 0) -> None:
    from llama_jax.train.__main__ import main

    assert main([str(folder / "recipe.toml"), f"checkpoint.dir={to}"]) == code


@pytest.fixture(scope="module")
def runs(place):
    """An uninterrupted local run, and two that were killed while they wrote step 4 to a bucket."""
    from llama_jax import chips
    from llama_jax.model.sharding import mesh_for
    from llama_jax.prepare.__main__ import main as prepare
    from llama_jax.train import loop, metrics

    folder, environment = place
    prepare([PREPARED, "--source", f"words={folder / 'text'}", "--vocab-size", "288"])
    flags = {
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": quick_options.FLAGS,
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }
    killed = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(folder / "recipe.toml"),
         "checkpoint.dir=s3://bucket/a run"],
        env=os.environ | environment | flags, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True,
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chips, "peak_flops", lambda device: (1e12, "of this test"))
        patch.setattr(metrics, "plot_losses", lambda *_: None)
        patch.setattr(loop, "mesh_for", lambda recipe: mesh_for(recipe, jax.devices()[:1]))
        run(folder, str(folder / "run"))
        upload_folder(folder / "run", as_path("gs://bucket/a run"))
        out, _ = killed.communicate(timeout=300)
        assert killed.returncode == -signal.SIGKILL, out
        _interrupt(as_path("gs://bucket/a run"))
        yield folder


def _interrupt(run: Path) -> None:
    """Leave a finished run as SIGKILL while step 4 is written leaves it."""
    step = run / "steps" / str(STEPS)
    for path in step.rglob("*"):
        if path.name.startswith(("commit_success", "checksums")) or "/optimizer/" in str(path):
            path.unlink()
    (run / ".lock").write_bytes(json.dumps({"process": lock._process(os.getpid()) + "0"}).encode())


def content(run: Path, number: int = STEPS, *items: str) -> dict[str, bytes]:
    """Every array of some items of a step."""
    found = {}
    for item in items or ("model", "optimizer"):
        step = run / "steps" / str(number) / item
        for path in sorted(p.parent for p in step.rglob("zarr.json")):
            found[f"{item}/{path.name}"] = open_array(step, path.name).read().result().tobytes()
    assert len(found) > 10
    return found


def losses(run: Path) -> list[tuple]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(r["step"], r["loss"], r.get("grad_norm")) for r in records if "loss" in r]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_run_killed_while_it_writes_continues(runs, scheme, capsys):
    """SIGKILL after one of the items of step 4: step 2 is the newest, and the result is equal bit
    for bit to that of an uninterrupted run."""
    folder = as_path(f"{scheme}://bucket/a run")
    assert (folder / f"steps/{STEPS}").is_dir()
    assert whole_steps(folder) == [2]
    run(runs, str(folder))
    assert "from step 2" in capsys.readouterr().out
    assert whole_steps(folder) == [2, STEPS]
    assert content(folder) == content(runs / "run")
    assert losses(folder) == losses(runs / "run")
    names = set(folder.files())
    assert {"model.json", "recipe.toml", "tokenizer.model", "manifest.json"} <= names
    assert any(name.startswith("tensorboard/events") for name in names)
    assert not any(name.endswith(".lock") for name in names)
    assert not list(runs.glob("**/s3:")) + list(Path.cwd().glob("*:"))


def test_damage_in_a_bucket_is_found(runs):
    from llama_jax.verify.__main__ import verify

    folder = as_path("gs://bucket/a run/steps/2")
    path = next(p for p in folder.rglob("0") if "/optimizer/" in str(p))
    before = path.read_bytes()
    path.write_bytes(bytes([before[0] ^ 1]) + before[1:])
    assert verify(folder) == [f"{path} has changed since it was written"]
    path.write_bytes(before)
    assert verify(folder) == []


def test_sampling_and_conversion(runs, capsys):
    """Text of weights in a bucket is that of the local ones, also after conversion there."""
    from llama_jax import load
    from llama_jax.convert.__main__ import main as convert

    upload_folder(runs / "run", as_path("s3://bucket/whole run"))
    want = load(runs / "run").generate("the cat", max_new_tokens=4)
    assert load("s3://bucket/whole run").generate("the cat", max_new_tokens=4) == want
    hf, back = "gs://bucket/hf model", "s3://bucket/back again"
    assert convert(["s3://bucket/whole run", hf, *ANY]) == 0
    assert "config.json" in as_path(hf).files()
    assert convert([hf, back, *ANY]) == 0
    assert content(as_path(back), 0, "model") == content(runs / "run", STEPS, "model")
    capsys.readouterr()
    assert convert([hf, back, *ANY]) == 1
    assert "exists; remove it" in capsys.readouterr().err
    # An upload that was interrupted is no checkpoint, and is written again.
    (as_path(back + ".uploading") / "started").write_bytes(b"")
    (as_path(back) / "model.json").unlink()
    assert convert([hf, back, *ANY]) == 0
    assert whole_steps(as_path(back)) == [0]
    assert convert(["s3://nobucket/x", str(runs / "x"), *ANY]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: s3://nobucket/x: the bucket")
    assert error.count("\n") == 1


def test_a_conversion_never_replaces_what_others_have_put_there(runs, capsys, monkeypatch):
    """What others have put at the destination after a conversion failed, or during it, is kept; two
    conversions to one destination are refused."""
    from llama_jax.convert.__main__ import main as convert
    from llama_jax.convert.bucket import uploaded
    from llama_jax.convert.formats import ConvertError

    monkeypatch.setattr(lock, "RENEW_SECONDS", 0.2)
    command = [str(runs / "run"), "s3://bucket/theirs", *ANY]
    assert convert([*command, "--to", "meta", "--shards", "77"]) == 1
    precious = as_path("s3://bucket/theirs/a.txt")
    precious.write_bytes(b"mine")
    assert convert(command) == 1
    assert "s3://bucket/theirs exists; remove it" in capsys.readouterr().err
    assert precious.read_bytes() == b"mine"
    precious.unlink()
    with contextlib.ExitStack() as stack:
        stack.enter_context(uploaded(precious.parent, None)).mkdir()
        assert convert(command) == 1
        assert "in use: converting" in capsys.readouterr().err
        precious.write_bytes(b"mine")
        with pytest.raises(ConvertError, match="exists"):
            stack.close()
    assert list(precious.parent.files()) == ["a.txt"]
    assert not as_path("s3://bucket/theirs.uploading").exists()


def test_the_cache_of_shards_is_repaired(runs, monkeypatch):
    """A copy is made once; an interrupted one continues, and damage in the bucket is an error."""
    source = as_path(f"{PREPARED}/words")
    copy = local_shards(source)
    shard = copy / "train-00000.tokens"
    content, names = shard.read_bytes(), {p.name for p in copy.iterdir()}
    inode = shard.stat().st_ino
    assert local_shards(source) == copy
    assert shard.stat().st_ino == inode  # not copied again
    shard.unlink()
    shard.with_name(shard.name + ".partial").write_bytes(content[:1001])
    assert local_shards(source) == copy
    assert shard.read_bytes() == content
    shard.unlink()  # a part that is not the beginning of the file
    shard.with_name(shard.name + ".partial").write_bytes(b"\xff" * 999)
    local_shards(source)
    assert shard.read_bytes() == content
    shard.write_bytes(content[:-2])
    local_shards(source)
    assert shard.read_bytes() == content
    assert {p.name for p in copy.iterdir()} == names
    shard.unlink()
    (source / shard.name).write_bytes(content[:-2] + b"\0\1")
    with pytest.raises(StorageError, match=r"train-00000.tokens is damaged"):
        local_shards(source)
    assert not shard.exists()
    (source / shard.name).write_bytes(content)
    (source.parent / "deep/manifest.json").write_bytes(b"[" * 200_000)
    assert local_shards(source.parent / "deep").is_dir()  # the next reader reports the damage
    with pytest.raises(ValueError, match=r"has no manifest.json; make it with"):
        local_shards(as_path("s3://bucket/nothing"))


def test_preparing_in_a_bucket_again(runs, monkeypatch, tmp_path):
    """On another machine, a source is added to those in the bucket, with their tokenizer."""
    from llama_jax.data.manifest import MixtureManifest, read_manifest
    from llama_jax.prepare.__main__ import main as prepare

    before = as_path(PREPARED).files()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    prepare([PREPARED, "--source", f"more={runs / 'text'}", "--tokenizer", PREPARED])
    assert set(read_manifest(as_path(PREPARED), MixtureManifest)["sources"]) == {"words", "more"}
    after = as_path(PREPARED).files()
    assert {n for n in before if after[n].st_mtime != before[n].st_mtime} <= {
        "manifest.json", "tokenizer.model",
    }  # fmt: skip
    equal = [
        (as_path(PREPARED) / f"{n}/train-00000.tokens").read_bytes() for n in ("words", "more")
    ]
    assert equal[0] == equal[1]


def test_bad_buckets_are_one_line(runs, capsys, monkeypatch):
    run(runs, "gs://nobucket/run", code=1)
    error = capsys.readouterr().err
    assert error == (
        "error: gs://nobucket/run: the bucket gs://nobucket does not exist; create it, or correct "
        "the name\n"
    )
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    from llama_jax.storage.paths import filesystem

    filesystem.cache_clear()
    run(runs, "s3://bucket/new", code=1)
    assert "pip install 'llama_jax[s3]'" in capsys.readouterr().err
    filesystem.cache_clear()
