"""Sum and RMSNorm in one kernel, in Pallas' interpreter against the reference."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import add_rms_norm, rms_norm


@functools.cache
def _run(implementation):
    """Jitted; with excess precision allowed, XLA may leave out a rounding to bfloat16 and back."""
    function = functools.partial(add_rms_norm, implementation=implementation)
    return jax.jit(
        function, static_argnums=3, compiler_options={"xla_allow_excess_precision": False}
    )


def _arguments(dtype, B=3, P=4, D=48):
    rng = np.random.default_rng(0)
    of = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
    return of(B, 1, D).astype(dtype), of(P, B + 1, 1, D), of(D).astype(dtype), 1e-5


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("P", [1, 4])
def test_kernel_equals_reference(dtype, P):
    """Also at a width that is no power of two, with a row of parts more than rows of x."""
    arguments = _arguments(dtype, P=P)
    want, got = _run("xla")(*arguments), _run("gpu")(*arguments)
    for x, exact in zip(got, want, strict=True):
        assert x.shape == exact.shape
        assert x.dtype == exact.dtype
        # One rounding of bfloat16 may fall to the other side.
        error = np.abs(np.float32(x) - np.float32(exact)).max()
        assert error < (1e-6 if dtype == "float32" else 0.04)
        assert np.mean(np.float32(x) != np.float32(exact)) < (1 if dtype == "float32" else 0.02)


@pytest.mark.parametrize("implementation", ["xla", "gpu"])
def test_sum_is_rounded_before_it_is_added_and_before_the_norm(implementation):
    """In bfloat16, as in a product that is rounded, then added, then normalized."""
    x, parts, scale, eps = _arguments("bfloat16", P=1)
    new, normed = _run(implementation)(x, parts, scale, eps)
    want = x + parts[0, :3].astype(jnp.bfloat16)
    assert (np.asarray(new) == np.asarray(want)).all()
    assert np.mean(np.asarray(normed) != np.asarray(rms_norm(want, scale, eps))) < 0.02


def test_kernel_names_what_it_does_not_support():
    x, parts, scale, eps = _arguments("float32", D=32768)
    with pytest.raises(NotImplementedError, match="width 32768: the GPU kernel supports up to"):
        add_rms_norm(x, parts, scale, eps, implementation="gpu")
    with pytest.raises(NotImplementedError, match="float16: the GPU kernel supports"):
        add_rms_norm(*_arguments("float16"), implementation="gpu")
