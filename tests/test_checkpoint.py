"""Checkpoints that cannot be written, or have been damaged; and what is kept."""

import resource

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.checkpoint import CheckpointError, Checkpoints, load_weights, read_about
from llama_jax.config import ConfigError

FULL = r"saving step 2 .* failed(.|\n)*step 1; make room"


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
    """The next steps overwrite donated buffers while the write is under way."""
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


def test_a_full_disk_keeps_the_checkpoint_before(tmp_path):
    checkpoints = saved(tmp_path, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # `a` is 262,144 bytes
    try:
        with pytest.raises(CheckpointError, match=FULL):
            save(checkpoints, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
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
@pytest.mark.parametrize("item", ["model", "optimizer"])
def test_damage_names_the_file_and_the_step_before(tmp_path, damage, item):
    saved(tmp_path, 1, 2).close()
    files = [p for p in (tmp_path / "steps/2" / item).rglob("*") if p.is_file()]
    victim = max(files, key=lambda p: (p.stat().st_size, str(p)))
    damage(victim)
    checkpoints = Checkpoints(tmp_path, 3)
    with pytest.raises(CheckpointError) as error:
        restored(checkpoints)
    assert str(victim) in str(error.value)
    assert "step 1 is the one before it" in str(error.value)
    checkpoints.close()


def test_folders_that_are_no_checkpoint(tmp_path):
    with pytest.raises(ConfigError, match=r"not a checkpoint .*llama_jax.convert"):
        read_about(tmp_path)
    with pytest.raises(ConfigError, match="no finished step"):
        load_weights(tmp_path, {})
    (tmp_path / "model.json").write_text("{")
    with pytest.raises(ConfigError, match="damaged"):
        read_about(tmp_path)
