"""llama.cpp's blocks are read bit for bit, and multiplied by the kernels.

golden/gguf_blocks.npz holds a matrix [out, in], its Q8_0 and Q4_0 blocks and their dequantized
values, computed by `gguf.quants` of the gguf package 0.19.0.
"""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.model.gguf_blocks import from_blocks
from llama_jax.model.quantize import QuantizedWeight, matmul
from pallas_kernels import quantized_matmul

GOLDEN = np.load(Path(__file__).parent.parent / "golden/gguf_blocks.npz")


@pytest.mark.parametrize(("kind", "bits"), [("Q8_0", 8), ("Q4_0", 4)])
def test_blocks_equal_those_of_gguf(kind, bits):
    q, scale = from_blocks(GOLDEN[kind], kind)
    w = QuantizedWeight(jnp.asarray(q), jnp.asarray(scale))
    assert (w.bits, w.group) == (bits, 32)
    want = GOLDEN[f"{kind}_dequantized"].T
    got = np.asarray(w.astype(jnp.float32))
    np.testing.assert_array_equal(got.view(np.uint32), np.ascontiguousarray(want).view(np.uint32))
    x = jnp.asarray(np.random.default_rng(1).standard_normal((3, 96)), jnp.float32)
    for y in (matmul(x, w, jnp.float32), quantized_matmul(x, w.q, w.scale, implementation="gpu")):
        np.testing.assert_allclose(y, np.asarray(x) @ want, rtol=1e-5, atol=1e-5)


def test_wrong_blocks():
    with pytest.raises(ValueError, match="blocks of kind 'Q4_K': must be 'Q8_0' or 'Q4_0'"):
        from_blocks(GOLDEN["Q4_0"], "Q4_K")
    with pytest.raises(ValueError, match=r"Q8_0: expected .* multiple of 34 bytes; got uint8"):
        from_blocks(GOLDEN["Q4_0"], "Q8_0")
