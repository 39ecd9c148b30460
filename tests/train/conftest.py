"""Runs in these tests neither measure the processor nor plot the losses, a second each, and use one
device if a size of their mesh is -1: a program for several devices takes longer to compile."""

import jax
import pytest

from llama_jax import chips
from llama_jax.model.sharding import AXES, mesh_for
from llama_jax.train import loop, metrics


@pytest.fixture(autouse=True, scope="module")
def quick_runs():
    def quick_mesh(recipe):
        sizes = [getattr(recipe.mesh, axis) for axis in AXES]
        return mesh_for(recipe, jax.devices()[: 1 if -1 in sizes else None])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chips, "peak_flops", lambda device: (1e12, "of this test"))
        patch.setattr(metrics, "plot_losses", lambda *_: None)
        patch.setattr(loop, "mesh_for", quick_mesh)
        yield


@pytest.fixture
def eight_devices():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "mesh_for", mesh_for)
        yield
