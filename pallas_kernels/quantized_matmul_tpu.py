"""Products with quantized weights for TPU in Pallas (Mosaic).

Columns of integers are streamed through VMEM, where a few groups at a time are scaled and rounded
to the activations' dtype, because the matrix unit needs many inputs at once. The activations stay
in VMEM.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import dispatch

LANES = 128
GROUPS = (32, 64, 128)
"""supported group sizes"""
CHUNK = 512
"""inputs that are scaled at a time; more if eight groups, a tile of scales, have more"""
COLUMN_BYTES = 4 << 20
"""of the integers of a block"""
ROW_BYTES = 32 << 20
"""of the activations of a block; with more, the matrix is read once per block of rows"""
VMEM_BYTES = 56 << 20
"""of all blocks; v5p and TPU7x have 64 MiB"""


def tpu(x, q, scale, out_dtype):
    """`quantized_matmul` in Pallas for TPU, with positional arguments."""
    rows, inputs = x.shape
    groups, out = scale.shape
    group = inputs // groups
    if x.dtype not in (jnp.float32, jnp.bfloat16):
        raise NotImplementedError(f"{x.dtype}: the TPU kernel supports float32 and bfloat16")
    if group not in GROUPS:
        raise NotImplementedError(f"groups of {group}: the TPU kernel supports {GROUPS}")
    if out % LANES:
        raise NotImplementedError(f"{out} outputs: the TPU kernel supports multiples of {LANES}")
    bn = next((n for n in (512, 256) if out % n == 0 and len(q) * n <= COLUMN_BYTES), LANES)
    bm = min(rows, max(16, ROW_BYTES // (inputs * x.dtype.itemsize) // 16 * 16), 1024)
    return pl.pallas_call(
        functools.partial(_kernel, group=group, per_chunk=max(8, CHUNK // group)),
        grid=(pl.cdiv(rows, bm), out // bn),
        in_specs=[
            pl.BlockSpec((bm, inputs), lambda i, j: (i, 0), pipeline_mode=pl.Buffered(1)),
            pl.BlockSpec((len(q), bn), lambda i, j: (0, j)),
            pl.BlockSpec((groups, bn), lambda i, j: (0, j)),
        ],
        out_specs=pl.BlockSpec((bm, bn), lambda i, j: (i, j)),
        out_shape=jax.ShapeDtypeStruct((rows, out), out_dtype),
        scratch_shapes=[pltpu.VMEM((bm, bn), jnp.float32)],
        cost_estimate=pl.CostEstimate(
            flops=2 * rows * inputs * out,
            transcendentals=0,
            bytes_accessed=x.nbytes
            + pl.cdiv(rows, bm) * (q.nbytes + scale.nbytes)
            + rows * out * jnp.dtype(out_dtype).itemsize,
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel"), vmem_limit_bytes=VMEM_BYTES
        ),
        interpret=dispatch.platform() == "cpu",
        name="quantized_matmul",
    )(x, q, scale)


def _kernel(x_ref, q_ref, scale_ref, out_ref, acc_ref, *, group, per_chunk):
    groups, bn = scale_ref.shape
    held = q_ref.shape[0] // groups  # rows of q in a group
    # Mosaic multiplies float32 in one bfloat16 pass by default.
    precision = lax.Precision.HIGHEST if x_ref.dtype == jnp.float32 else None
    acc_ref[...] = jnp.zeros_like(acc_ref)

    def add_groups(chunk, count):
        """Adds the product of ``count`` groups, which start at a multiple of ``per_chunk``."""
        first = lambda n: pl.multiple_of(chunk * per_chunk * n, per_chunk * n)
        q = q_ref[pl.ds(first(held), count * held)]
        q = pltpu.bitcast(q, jnp.int4) if q.dtype == jnp.uint8 else q
        scale = scale_ref[pl.ds(first(1), count)]
        w = q.astype(jnp.float32).reshape(count, group, bn) * scale[:, None]
        acc_ref[...] += jnp.dot(
            x_ref[:, pl.ds(first(group), count * group)],
            w.reshape(count * group, bn).astype(x_ref.dtype),
            precision=precision, preferred_element_type=jnp.float32,
        )  # fmt: skip

    chunks, rest = divmod(groups, per_chunk)
    if chunks:
        pl.loop(0, chunks)(lambda chunk: add_groups(chunk, per_chunk))
    if rest:
        add_groups(chunks, rest)
    out_ref[...] = acc_ref[...].astype(out_ref.dtype)
