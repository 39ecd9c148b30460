"""A bucket without permission, and one that refuses or disappears in the middle of a run: one line,
and what was saved stays as it was."""

import contextlib
import time

import jax.numpy as jnp
import pytest
from bucket_tools import emulated_buckets, refused, writes
from train_tools import write_recipe

from llama_jax import load
from llama_jax.checkpoint.checkpoints import CheckpointError, Checkpoints
from llama_jax.checkpoint.steps import whole_steps
from llama_jax.convert.__main__ import main as convert
from llama_jax.generate.__main__ import main as generate
from llama_jax.prepare.__main__ import main as prepare
from llama_jax.storage import lock
from llama_jax.storage.errors import StorageError
from llama_jax.storage.paths import as_path
from llama_jax.train.__main__ import main as train

SCHEMES = ("s3", "gs")
EVERYTHING = lambda *_: True
ADVICE = (
    ": permission denied; the account needs to list and read objects of this bucket, and to write "
    "and delete them where something is saved"
)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("refused")
    with emulated_buckets(), pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        write_recipe(folder)
        yield folder


def shown(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().err


@pytest.mark.parametrize("which", [EVERYTHING, writes])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_commands_that_save_in_a_bucket_without_permission(place, scheme, which, capsys):
    bucket = f"{scheme}://bucket/mine"
    with refused(403, which):
        assert train([str(place / "recipe.toml"), f"checkpoint.dir={bucket}"]) == 1
        error = shown(capsys)
        with pytest.raises(SystemExit) as ended:
            prepare([bucket, "--source", f"words={place}/text", "--vocab-size", "288"])
    file = "" if which is EVERYTHING else "/.lock"
    assert error == f"error: {bucket}{file}{ADVICE}\n"
    assert ended.value.code == error.strip()
    assert as_path(bucket).files() == {}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_commands_that_read_a_bucket_without_permission(place, scheme, capsys):
    bucket = f"{scheme}://bucket/other"
    with refused(403):
        with pytest.raises(StorageError) as plain:
            load(bucket)
        assert convert([bucket, str(place / "out")]) == 1
        error = shown(capsys)
        assert generate([bucket, "the"]) == 2
    assert str(plain.value) == f"{bucket}/model.json{ADVICE}"
    assert shown(capsys) == f"error: {bucket}/model.json{ADVICE}\n"
    assert error == f"error: {bucket}{ADVICE}\n"


# In the middle of a run ---------------------------------------------------------------------------

REFUSALS = {
    "writes of one step": (403, lambda m, p: writes(m, p) and "steps/2" in p.replace("%2F", "/")),
    "everything": (403, EVERYTHING),
    "the bucket": (404, EVERYTHING),
}
DENIED = " failed: permission denied; the account needs"
GOOD = "; the newest good step is 1; start again to continue from it"
UNKNOWN = "; start again to continue from the newest complete step"
NONE = "; there is no earlier step; start again"
REASONS: dict[str, tuple[str, tuple[str, ...]]] = {
    "writes of one step": (DENIED, (GOOD,)),
    "everything": (DENIED, (UNKNOWN,)),
    "the bucket": (" does not exist; create it, ", (UNKNOWN, NONE)),
}


def save_2(checkpoints: Checkpoints, state: tuple) -> None:
    checkpoints.save(2, *state, {"step": 2})
    checkpoints.wait()


@pytest.mark.parametrize("what", REFUSALS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_save_that_is_refused_is_one_line(place, scheme, what):
    folder = as_path(f"{scheme}://bucket/run {what}")
    state = {"w": jnp.arange(4.0)}, {"m": jnp.zeros(2)}
    checkpoints = Checkpoints(folder, keep=2)
    checkpoints.save(1, *state, {"step": 1})
    checkpoints.wait()
    before = {name: (folder / name).read_bytes() for name in folder.files()}
    code, which = REFUSALS[what]
    with refused(code, which), pytest.raises(CheckpointError) as error:
        save_2(checkpoints, state)
    with contextlib.suppress(OSError, ValueError):  # the errors of the threads
        checkpoints.close()
    text = str(error.value)
    assert text.startswith(f"saving step 2 to {folder}/steps failed: ")
    reason, end = REASONS[what]
    assert reason in text
    assert text.endswith(end)
    assert "\n" not in text
    assert whole_steps(folder) == [1]
    assert {name: (folder / name).read_bytes() for name in before} == before


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_bucket_that_disappears_ends_the_process(place, scheme, monkeypatch):
    """TensorStore may try for ever to save there, so the thread that renews the lock does it."""
    said: list[str] = []
    monkeypatch.setattr(lock, "RENEW_SECONDS", 0.05)
    monkeypatch.setattr(lock, "_end", said.append)
    folder = as_path(f"{scheme}://bucket/locked here")
    with lock.object_lock(folder, "training"):
        with refused(404):
            wait_for(said)
        assert said == [f"{folder}: the bucket does not exist any more; ends without saving"]
        del said[:]
        with refused(403):  # a permission may come back
            time.sleep(0.3)
    assert not said


def wait_for(said: list[str]) -> None:
    end = time.monotonic() + 20
    while not said and time.monotonic() < end:
        time.sleep(0.02)
