"""`add_rms_norm` for NVIDIA GPUs in Pallas (Triton): one program per row."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import dispatch
from pallas_kernels.rotary_attention_gpu import check_triton, plt

MAX_WIDTH = 16384
"""so that a row fits in the registers of a program"""


def gpu(x, parts, scale, eps):
    """`add_rms_norm` in Pallas, with positional arguments."""
    check_triton()
    P, D = parts.shape[0], x.shape[-1]
    if D > MAX_WIDTH:
        raise NotImplementedError(f"width {D}: the GPU kernel supports up to {MAX_WIDTH}")
    if x.dtype not in (jnp.float32, jnp.bfloat16):
        raise NotImplementedError(f"{x.dtype}: the GPU kernel supports float32 and bfloat16")
    padded = pl.next_power_of_2(D)

    def kernel(x_ref, parts_ref, scale_ref, new_ref, normed_ref):
        column = jnp.arange(padded)
        load = lambda ref, *at: plt.load(ref.at[(*at, column)], mask=column < D, other=0)
        total = load(parts_ref, jnp.int32(0)).astype(jnp.float32)
        for i in range(1, P):
            total = total + load(parts_ref, jnp.int32(i))
        new = load(x_ref) + total.astype(x.dtype)
        wide = new.astype(jnp.float32)
        wide = wide * lax.rsqrt(jnp.sum(wide * wide) / D + eps)
        normed = (wide.astype(x.dtype) * load(scale_ref)).astype(x.dtype)
        plt.store(new_ref.at[column], new, mask=column < D)
        plt.store(normed_ref.at[column], normed, mask=column < D)

    row = pl.BlockSpec((None, D), lambda r: (r, 0))
    flat = x.reshape(-1, D)
    new, normed = pl.pallas_call(
        kernel,
        grid=(flat.shape[0],),
        in_specs=[
            row,
            pl.BlockSpec((P, None, D), lambda r: (0, r, 0)),
            pl.BlockSpec((D,), lambda r: (0,)),
        ],
        out_specs=[row, row],
        out_shape=[jax.ShapeDtypeStruct(flat.shape, x.dtype)] * 2,
        compiler_params=plt.CompilerParams(num_warps=min(16, max(1, padded // 256))),
        interpret=dispatch.platform() == "cpu",
        name="add_rms_norm",
    )(flat, parts.reshape(P, -1, D), scale)  # rows beyond those of x are not read
    return new.reshape(x.shape), normed.reshape(x.shape)
