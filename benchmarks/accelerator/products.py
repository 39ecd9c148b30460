"""Step 4: a product with a bfloat16, int8 or int4 matrix, as the model computes it."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.accelerator.common import Row, Rows, Sizes, random_arrays, time_calls
from benchmarks.accelerator.correctness import KINDS, LIMIT, relative_errors
from llama_jax.model.compute import ComputeConfig
from llama_jax.model.projection import project
from llama_jax.model.quantize import bytes_of, quantize_weight

COMPUTE = ComputeConfig(jnp.dtype(jnp.bfloat16), unroll=True)


def rows(s: Sizes, earlier: dict[str, Row]) -> Rows:
    copy = earlier.get("copy", {}).get("numbers", {}).get("GB/s")
    bfloat16: dict[int, float] = {}
    for number in s.products_rows:
        for kind in KINDS:
            yield (
                f"product of {number} rows, {kind}",
                functools.partial(measure, s, number, kind, copy, bfloat16),
            )


def program(x_LXD: jax.Array, matrices: list[Any]) -> list[jax.Array]:
    """The function to compile: one product per matrix."""
    return [
        project(COMPUTE, x[:, None], w, "DF", "BTF") for x, w in zip(x_LXD, matrices, strict=True)
    ]


def quantizer(kind: str) -> Callable[[jax.Array], Any]:
    """The matrix in another format."""
    return (lambda w: w) if kind == "bfloat16" else functools.partial(quantize_weight, kind=kind)


def measure(
    s: Sizes, number: int, kind: str, copy: float | None, bfloat16: dict[int, float]
) -> Row:
    """Time of one product; bytes are those of the matrix."""
    D, F = s.matrix
    matrices = [quantizer(kind)(w) for w in random_arrays(1, [(D, F)] * s.num_matrices)]
    inputs = [(random_arrays(seed, [(s.num_matrices, number, D)])[0], matrices) for seed in (2, 3)]
    call = jax.jit(program)
    time = time_calls(call, inputs, s)
    time = {k: x if k == "runs" else x / s.num_matrices for k, x in time.items()}
    x, w = inputs[0][0][0], matrices[0]
    with jax.default_matmul_precision("highest"):
        want = x.astype(jnp.float32) @ w.astype(jnp.float32)
    error, _ = relative_errors(call(*inputs[0])[0][:, 0], want)
    rate = bytes_of(w) / time["median"] / 1e9
    numbers = {"GB/s of weights": rate} | ({"of copy": rate / copy} if copy else {})
    if number >= 128:
        numbers = {"TFLOP/s": 2 * number * math.prod(s.matrix) / time["median"] / 1e12}
    if kind == "bfloat16":
        bfloat16[number] = time["median"]
    elif number in bfloat16:
        numbers["x bfloat16"] = bfloat16[number] / time["median"]
    wrong = "" if error < LIMIT else f"error {error:.1e}"
    return {"seconds": time, "numbers": numbers | {"error": error}, "wrong": wrong}
