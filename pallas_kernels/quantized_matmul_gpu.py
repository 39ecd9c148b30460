"""Products with quantized weights for NVIDIA GPUs in Pallas (Triton).

A program unpacks one group of inputs at a time in registers, multiplies it, and adds the result
times the group's scales to a float32 sum. With few rows there are fewer blocks of outputs than a
GPU needs programs, so the groups are split over several programs, whose sums XLA adds.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import dispatch
from pallas_kernels.rotary_attention_gpu import _dot, check_triton, plt

PROGRAMS = 264
"""number of programs to split for: two for each of 132 multiprocessors"""
GROUPS = (32, 64, 128)
"""supported group sizes; each half of a packed group has the 16 inputs of a matrix instruction"""


def gpu(x, q, scale, out_dtype):
    """`quantized_matmul` in Pallas, with positional arguments."""
    check_triton()
    rows, inputs = x.shape
    groups, out = scale.shape
    if inputs // groups not in GROUPS:
        raise NotImplementedError(f"groups of {inputs // groups}: the GPU kernel supports {GROUPS}")
    if x.dtype not in (jnp.float32, jnp.bfloat16):
        raise NotImplementedError(f"{x.dtype}: the GPU kernel supports float32 and bfloat16")
    bm, bn, warps, stages = _blocks(rows, out, x.dtype)
    programs = pl.cdiv(rows, bm) * pl.cdiv(out, bn)
    # The sums of a split take 8 bytes per row and output, written and read: at most a tenth of q.
    splits = max(1, min(PROGRAMS // programs, len(q) // (80 * rows), groups))
    # Packed: all even inputs, which are in the low four bits, and then all odd ones.
    x = x.reshape(rows, len(q), -1).swapaxes(1, 2).reshape(rows, inputs)
    sums = pl.pallas_call(
        functools.partial(_kernel, rows=rows, groups=groups, splits=splits, out=out),
        grid=(pl.cdiv(rows, bm), pl.cdiv(out, bn), splits),
        in_specs=[
            pl.BlockSpec((bm, inputs), lambda i, j, k: (i, 0)),
            pl.BlockSpec((len(q), bn), lambda i, j, k: (0, j)),
            pl.BlockSpec((groups, bn), lambda i, j, k: (0, j)),
        ],
        out_specs=pl.BlockSpec((None, bm, bn), lambda i, j, k: (k, i, j)),
        out_shape=jax.ShapeDtypeStruct(
            (splits, rows, out), jnp.float32 if splits > 1 else out_dtype
        ),
        compiler_params=plt.CompilerParams(num_warps=warps, num_stages=stages),
        interpret=dispatch.platform() == "cpu",
        name="quantized_matmul",
    )(x, q, scale)
    return sums[0] if splits == 1 else jnp.sum(sums, axis=0).astype(out_dtype)


def _blocks(rows: int, out: int, dtype) -> tuple[int, int, int, int]:
    """Rows and outputs of a program, its warps, and groups that are loaded ahead."""
    if rows <= 16:
        return 16, 64 if out >= 64 * PROGRAMS // 2 else 32, 4, 5
    if dtype == jnp.float32:
        return 32, 32, 4, 3
    return (64, 64, 4, 4) if rows <= 64 else (128, 64, 8, 4)


def _kernel(x_ref, q_ref, scale_ref, out_ref, *, rows, groups, splits, out):
    i, j, split = (pl.program_id(n) for n in range(3))
    bm, (held, bn) = x_ref.shape[0], q_ref.shape  # rows of x and of q
    halves, size = x_ref.shape[1] // held, held // groups
    valid = (i * bm + jnp.arange(bm) < rows)[:, None]
    real = (j * bn + jnp.arange(bn) < out)[None, :]

    def add_group(group, acc):
        rows_of_q = pl.ds(group * size, size)
        q = plt.load(q_ref.at[rows_of_q, :], mask=real, other=0).astype(jnp.int32)
        scale = plt.load(scale_ref.at[pl.ds(group, 1), :], mask=real, other=0)
        part = jnp.zeros((bm, bn), jnp.float32)
        for half in range(halves):
            at = pl.ds(half * held + group * size, size)
            x = plt.load(x_ref.at[:, at], mask=valid, other=0)
            # Signed shifts copy the fourth bit into those above.
            w = q if halves == 1 else jnp.right_shift(q << (28 - 4 * half), 28)
            part += _dot(x, w.astype(x.dtype))
        return acc + part * scale

    per_split = pl.cdiv(groups, splits)
    acc = lax.fori_loop(
        split * per_split,
        jnp.minimum((split + 1) * per_split, groups),
        add_group,
        jnp.zeros((bm, bn), jnp.float32),
    )
    plt.store(out_ref, acc.astype(out_ref.dtype), mask=valid & real)
