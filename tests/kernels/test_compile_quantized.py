"""Products with quantized weights, compiled for absent chips: bytes moved."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding

from llama_jax.chips import topology
from llama_jax.model.quantize import bytes_of, matmul, quantize_weight
from llama_jax.plan.hlo import count

IN, OUT = 4096, 28672
"""gate and up of 7B and 8B, fused"""


@pytest.fixture
def device(monkeypatch):
    """A chip by name -> one of its devices."""
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "true")

    def device(name):
        package = "libtpu" if name.startswith("v") else "jax_cuda13_plugin"
        pytest.importorskip(package, reason="needs the compiler")
        return topology(name)[0]

    return device


@pytest.mark.parametrize("rows", [1, 16])
@pytest.mark.parametrize("name", ["h100", "v5p", "v6e"])
def test_int8_is_read_once_and_never_written_in_another_dtype(device, name, rows):
    here = SingleDeviceSharding(device(name))
    place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here)
    w = jax.eval_shape(
        functools.partial(quantize_weight, kind="int8"), jax.ShapeDtypeStruct((IN, OUT), "float32")
    )
    x = jax.ShapeDtypeStruct((rows, IN), jnp.bfloat16)
    product = jax.jit(functools.partial(matmul, out_dtype=jnp.bfloat16))
    program = product.lower(*jax.tree.map(place, (x, w))).compile()
    needed = bytes_of((x, w)) + rows * OUT * 2
    assert needed <= count(program.as_text()).bytes < 1.01 * needed
    assert needed < 1.05 * IN * OUT
    assert program.memory_analysis().temp_size_in_bytes == 0
