"""Products with quantized weights against exact ones, for every implementation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import dispatch, quantized_matmul
from pallas_kernels.quantized_matmul import dequantize

IMPLEMENTATIONS = ("xla", "gpu", "tpu")

# rows, inputs, outputs, group, bits, dtype
CASES = [
    (1, 256, 128, 64, 4, "float32"),
    (1, 4096, 128, 64, 4, "bfloat16"),  # split on a GPU
    (3, 96, 256, 32, 4, "bfloat16"),
    (3, 2048 + 512, 128, 32, 4, "float32"),
    (16, 1344, 384, 32, 8, "bfloat16"),
    (17, 320, 128, 64, 4, "bfloat16"),
    (17, 7 * 32, 640, 32, 8, "float32"),
    (300, 320, 128, 64, 4, "float32"),
    (300, 512, 256, 32, 4, "bfloat16"),
    (1030, 128, 128, 32, 8, "bfloat16"),
]


def arguments(rows, inputs, out, group, bits, dtype, seed=0):
    """x, q and scale for the product, and the exact matrix in float64."""
    rng = np.random.default_rng(seed)
    largest = 1 << (bits - 1)
    q = rng.integers(-largest, largest, (inputs, out)).astype(np.int8)
    scale = rng.uniform(0.5, 2, (inputs // group, out)).astype(np.float32)
    x = jnp.asarray(rng.standard_normal((rows, inputs)), dtype)
    exact = q.astype(np.float64) * np.repeat(scale, group, axis=0)
    if bits == 4:
        q = q[::2].view(np.uint8) & 15 | q[1::2].view(np.uint8) << 4
    return (x, jnp.asarray(q), jnp.asarray(scale)), exact


@pytest.mark.parametrize("case", range(len(CASES)))
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_equals_the_exact_product(implementation, case):
    """NaN of a row does not reach another, and neither do the interpreters' NaN beyond the ends."""
    (x, q, scale), exact = arguments(*CASES[case], seed=case)
    poisoned = jnp.concatenate([x, jnp.full_like(x[:1], jnp.nan)])
    out = quantized_matmul(poisoned, q, scale, out_dtype=jnp.float32, implementation=implementation)
    assert out.dtype == jnp.float32
    want = np.asarray(x, np.float64) @ exact
    error = np.abs(np.asarray(out[:-1], np.float64) - want).max() / np.abs(want).max()
    # In bfloat16, the scaled weights are rounded, on a GPU only the integers, which are exact.
    assert error < (4e-3 if x.dtype == jnp.bfloat16 and implementation != "gpu" else 3e-6)
    assert np.isnan(out[-1]).all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_rounded_once_to_the_activations_dtype(implementation):
    (x, q, scale), _ = arguments(3, 256, 128, 64, 4, "bfloat16")
    product = lambda dtype: quantized_matmul(
        x, q, scale, out_dtype=dtype, implementation=implementation
    )
    assert product(None).dtype == jnp.bfloat16
    np.testing.assert_array_equal(product(None), product(jnp.float32).astype(jnp.bfloat16))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("bits", [4, 8])
def test_gradient_with_respect_to_activations(implementation, bits):
    (x, q, scale), exact = arguments(5, 128, 128, 32, bits, "float32")
    product = lambda x, scale: quantized_matmul(x, q, scale, implementation=implementation)
    out, pull = jax.vjp(product, x, scale)
    gradient = jnp.cos(out)
    d_x, d_scale = pull(gradient)
    want = np.asarray(gradient, np.float64) @ exact.T
    np.testing.assert_allclose(d_x, want, atol=2e-6 * np.abs(want).max())
    assert not d_scale.any()


def test_dequantized_bits():
    """Even inputs are in the low four bits, and the integers are signed."""
    q, scale = jnp.array([[0x8F], [0x71]], jnp.uint8), jnp.array([[2.0], [3.0]])
    np.testing.assert_array_equal(dequantize(q, scale, jnp.float32).T, [[-2, -16, 3, 21]])


def test_unsupported_arguments_fall_back(monkeypatch):
    """By name never: the message says what the kernels support."""
    for shape, reason in [
        ((2, 64, 128, 16, 4, "float32"), "groups of 16"),
        ((2, 64, 128, 32, 8, "float16"), "float16"),
    ]:
        (x, q, scale), exact = arguments(*shape)
        for name in ("gpu", "tpu"):
            with pytest.raises(NotImplementedError, match=reason):
                quantized_matmul(x, q, scale, implementation=name)
            with monkeypatch.context() as patched:
                patched.setattr(dispatch, "platform", lambda name=name: name)
                out = quantized_matmul(x, q, scale)
            want = np.asarray(x, np.float64) @ exact
            np.testing.assert_allclose(out, want, atol=0.02 * np.abs(want).max())
    (x, q, scale), _ = arguments(2, 64, 40, 32, 4, "float32")
    with pytest.raises(NotImplementedError, match="40 outputs"):
        quantized_matmul(x, q, scale, implementation="tpu")


def test_wrong_shapes():
    (x, q, scale), _ = arguments(2, 64, 128, 32, 4, "float32")
    for wrong in ((x[:, :62], q, scale), (x, q[:-1], scale), (x, q, jnp.ones((3, 128)))):
        with pytest.raises(ValueError, match="groups must divide the inputs"):
            quantized_matmul(*wrong)
    for wrong in ((x[0], q, scale), (x, q.astype(jnp.int32), scale), (x, q, scale[:, None])):
        with pytest.raises(ValueError, match="expected x"):
            quantized_matmul(*wrong)
