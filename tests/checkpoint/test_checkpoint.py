"""Failed saves, damaged checkpoints, and which steps are kept."""

import errno
import resource
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.checkpoint import checkpoints as checkpoint
from llama_jax.checkpoint.checkpoints import CheckpointError, Checkpoints
from llama_jax.checkpoint.file_hashes import files_below, read_checksums
from llama_jax.checkpoint.model_json import read_metadata
from llama_jax.checkpoint.weights import load_weights
from llama_jax.config import ConfigError

FULL = r"saving step 2 .* failed(.|\n)*step is 1; free some"


def tree(value: float) -> dict:
    return {"a": jnp.full((64, 1024), value), "b": {"c": jnp.arange(5.0) + value}}


def saved(folder, *steps: int, keep: int = 3) -> Checkpoints:
    checkpoints = Checkpoints(folder, keep)
    for step in steps:
        save(checkpoints, step)
    return checkpoints


def save(checkpoints: Checkpoints, step: int) -> None:
    checkpoints.save(step, tree(step), {"count": jnp.int32(step)}, {"step": step})
    checkpoints.wait()


def restored(checkpoints: Checkpoints):
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here)
    return checkpoints.restore(*jax.tree.map(place, (tree(0), {"count": jnp.int32(0)})))


def test_the_newest_steps_are_kept_and_read_back(tmp_path):
    checkpoints = saved(tmp_path, 1, 2, 3, keep=2)
    params, optimizer, run = restored(checkpoints)
    jax.tree.map(np.testing.assert_array_equal, params, tree(3))
    assert int(optimizer["count"]) == run["step"] == 3
    assert sorted(p.name for p in (tmp_path / "steps").iterdir()) == ["2", "3"]
    checkpoints.close()


def test_what_is_saved_is_the_state_of_that_step(tmp_path):
    """The next steps overwrite donated buffers while the checkpoint is being written."""
    checkpoints = Checkpoints(tmp_path, 3)
    params = tree(1.0)
    add = jax.jit(lambda p: jax.tree.map(lambda x: x + 1, p), donate_argnums=0)
    checkpoints.save(1, params, {"count": jnp.int32(1)}, {"step": 1})
    for _ in range(50):
        params = add(params)
    jax.block_until_ready(params)
    checkpoints.wait()
    jax.tree.map(np.testing.assert_array_equal, restored(checkpoints)[0], tree(1.0))
    checkpoints.close()


def test_a_full_disk_keeps_the_checkpoint_before(tmp_path, capfd):
    """A single error reports it, without tracebacks of the writing threads."""
    checkpoints = saved(tmp_path, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # `a` is 262,144 bytes
    try:
        with pytest.raises(CheckpointError, match=FULL):
            save(checkpoints, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    checkpoints.close()
    assert capfd.readouterr() == ("", "")
    whole = lambda: [p.name for p in (tmp_path / "steps").iterdir() if p.name.isdigit()]
    assert whole() == ["1"]
    again = Checkpoints(tmp_path, 3)
    assert again.latest() == 1
    jax.tree.map(np.testing.assert_array_equal, restored(again)[0], tree(1))
    again.close()


def _truncate(path):
    path.write_bytes(path.read_bytes()[:-7])


def _flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [_truncate, _flip, lambda path: path.unlink()])
@pytest.mark.parametrize("item", ["model", "optimizer", "run"])
def test_damage_names_the_file_and_the_step_before(tmp_path, damage, item):
    saved(tmp_path, 1, 2).close()
    files = [p for p in (tmp_path / "steps/2" / item).rglob("*") if p.is_file()]
    victim = max(files, key=lambda p: (p.stat().st_size, str(p)))
    damage(victim)
    checkpoints = Checkpoints(tmp_path, 3)
    with pytest.raises(CheckpointError) as error:
        restored(checkpoints)
    assert str(victim) in str(error.value)
    assert "from the previous step, 1, remove" in str(error.value)
    checkpoints.close()


def test_hashes_of_every_file_follow_the_save_at_once(tmp_path):
    """The hashes do not wait for a log line or the next save."""
    checkpoints = Checkpoints(tmp_path, 3)
    checkpoints.save(1, tree(1), {"count": jnp.int32(1)}, {"step": 1})
    step, end = tmp_path / "steps/1", time.monotonic() + 60
    while not (step.is_dir() and (files := read_checksums(step))):
        assert time.monotonic() < end
        time.sleep(0.01)
    checkpoints.close()
    assert sorted(files) == [n for n in files_below(step) if not n.startswith("checksums.")]
    assert {n.partition("/")[0] for n in files} > {"model", "optimizer", "run"}


def test_hashes_that_cannot_be_written_are_an_error(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "write_list", full)
        checkpoints = Checkpoints(tmp_path, 3)
        with pytest.raises(CheckpointError, match=r"step 1 was saved .*No space left"):
            save(checkpoints, 1)
        checkpoints.close()
    checkpoints = Checkpoints(tmp_path, 3)
    assert restored(checkpoints)[2] == {"step": 1}
    assert read_checksums(tmp_path / "steps/1")
    checkpoints.close()


def test_killed_during_the_first_save_starts_again(tmp_path):
    saved(tmp_path, 1).close()
    (tmp_path / "steps/1").rename(tmp_path / "steps/1.orbax-checkpoint-tmp")
    checkpoints = Checkpoints(tmp_path, 3)
    assert checkpoints.latest() is None
    save(checkpoints, 1)
    assert restored(checkpoints)[2] == {"step": 1}
    assert [p.name for p in (tmp_path / "steps").iterdir()] == ["1"]
    checkpoints.close()


def test_killed_between_save_and_checksums_gets_them_at_the_next_start(tmp_path):
    """Here one of two processes had written its part."""
    saved(tmp_path, 1, 2).close()
    step = tmp_path / "steps/2"
    whole = read_checksums(step)
    (step / "checksums.0-of-1.json").rename(step / "checksums.0-of-2.json")
    assert read_checksums(step) is None
    checkpoints = Checkpoints(tmp_path, 3)
    params, _, run = restored(checkpoints)
    jax.tree.map(np.testing.assert_array_equal, params, tree(2))
    assert run == {"step": 2}
    assert read_checksums(step) == whole
    save(checkpoints, 3)
    checkpoints.close()
    chunk = max(step.rglob("a/c/*/*"))  # and without them a missing chunk is found as well
    (step / "checksums.0-of-1.json").unlink()
    (tmp_path / "steps/3").rename(tmp_path / "3")
    chunk.unlink()
    checkpoints = Checkpoints(tmp_path, 3)
    with pytest.raises(CheckpointError, match=f"is damaged: .*{chunk}(.|\n)*previous step, 1"):
        restored(checkpoints)
    checkpoints.close()


def test_errors_other_than_damage_are_not_called_damage(tmp_path, monkeypatch):
    saved(tmp_path, 1).close()
    checkpoints = Checkpoints(tmp_path, 3)

    def message(target=None, name="", error=None) -> str:
        def fail(*_, **__):
            raise error

        with monkeypatch.context() as patched:
            if target is not None:
                patched.setattr(target, name, fail)
            with pytest.raises(CheckpointError) as raised:
                restored(checkpoints)
        text = str(raised.value)
        assert "is damaged" not in text
        assert "remove" not in text
        return text

    manager = checkpoints._manager
    full = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes")
    for error in (full, MemoryError()):
        assert message(manager, "restore", error).startswith("out of memory")
    denied = PermissionError(errno.EACCES, "Permission denied", "steps/1/model/a")
    assert "Permission denied" in message(checkpoint, "find_problems", denied)
    broken = ValueError("UNAVAILABLE: Input/output error")
    assert "Input/output error" in message(manager, "restore", broken)
    monkeypatch.setitem(globals(), "tree", lambda value: {"a": jnp.zeros((8, 8))})
    assert "another model: a is [64, 1024], not [8, 8]" in message()
    checkpoints.close()


class _Sharding:
    """Rows split over four devices of two processes, interleaved as on a torus; or copied."""

    def __init__(self, split: bool):
        self.split = split

    def devices_indices_map(self, shape):
        rows = shape[0] // 4
        device = lambda i: type("Device", (), {"process_index": i % 2, "i": i})()
        part = lambda i: slice(i * rows, (i + 1) * rows) if self.split else slice(None)
        return {device(i): (part(i), slice(None)) for i in range(4)}

    def shard_shape(self, shape):
        return (shape[0] // 4, shape[1]) if self.split else shape


def test_processes_share_the_files_of_a_step(tmp_path, monkeypatch):
    """Each file has one owner, which holds its values; replicated files are divided evenly."""
    metadata = '{"shape": [64, 64], "chunk_grid": {"configuration": {"chunk_shape": [16, 8]}}}'
    for name in ("split", "copied"):
        (tmp_path / "model" / name).mkdir(parents=True)
        (tmp_path / "model" / name / "zarr.json").write_text(metadata)
    leaf = lambda split: type("Leaf", (), {"shape": (64, 64), "sharding": _Sharding(split)})()
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    owner = checkpoint._owners(tmp_path, {"model": {"split": leaf(True), "copied": leaf(False)}})
    chunks = [(i, j) for i in range(4) for j in range(8)]
    assert all(owner(f"model/split/c/{i}/{j}") == i % 2 for i, j in chunks)
    copied = [owner(f"model/copied/c/{i}/{j}") for i, j in chunks]
    assert 8 < sum(copied) < 24
    assert owner("model/split/zarr.json") == owner("_CHECKPOINT_METADATA") == 0


def test_folders_that_are_not_checkpoints(tmp_path):
    with pytest.raises(ConfigError, match=r"not a checkpoint .*llama_jax.convert"):
        read_metadata(tmp_path)
    with pytest.raises(ConfigError, match="no finished step"):
        load_weights(tmp_path, {})
    (tmp_path / "model.json").write_text("{")
    with pytest.raises(ConfigError, match="damaged"):
        read_metadata(tmp_path)
