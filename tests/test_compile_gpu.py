"""Programs compiled for GPUs that are not there, by XLA's CUDA compiler on a CPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from pallas_kernels.chips import gpu_topology

needs_compiler = pytest.mark.usefixtures("compiler")


@pytest.fixture(scope="module")
def compiler():
    pytest.importorskip("jax_cuda13_plugin", reason="needs jax's CUDA plugin")


def compiled_for(gpu, function, *shapes, count=1):
    """The function compiled for a GPU by name; shapes are arrays or ShapeDtypeStructs."""
    mesh = Mesh(np.array(gpu_topology(gpu, count)), ("x",), axis_types=(AxisType.Explicit,))
    everywhere = NamedSharding(mesh, PartitionSpec())
    place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere)
    with jax.set_mesh(mesh):
        return jax.jit(function).lower(*jax.tree.map(place, shapes)).compile()


@needs_compiler
@pytest.mark.parametrize(
    ("gpu", "kind"), [("a100", "A100-SXM4-80GB"), ("h100", "H100 80GB"), ("h200", "H200 141GB")]
)
def test_a_product_compiles(gpu, kind):
    x = jax.ShapeDtypeStruct((256, 512), jnp.bfloat16)
    program = compiled_for(gpu, lambda x: x @ x.T, x)
    assert kind in gpu_topology(gpu)[0].device_kind
    assert program.memory_analysis().output_size_in_bytes == 256 * 256 * 2


@needs_compiler
def test_many_gpus_are_hosts_of_eight():
    devices = gpu_topology("h100", 32)
    assert [d.process_index for d in devices[::8]] == [0, 1, 2, 3]
    assert len(gpu_topology("h100", 2)) == 2
    with pytest.raises(ValueError, match="12 GPUs are not a whole number of hosts of 8"):
        gpu_topology("h100", 12)


def test_unknown_gpu():
    with pytest.raises(ValueError, match="no GPU 'h300'; there are a100, h100, h200"):
        gpu_topology("h300")
