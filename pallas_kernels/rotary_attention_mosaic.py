"""Rotary attention for Hopper GPUs in Pallas (Mosaic GPU), forward: FlashAttention-3
(arXiv 2407.08608). The backward kernels are those of `rotary_attention_gpu`.

A program has three warpgroups. One loads blocks of keys and values by TMA into a ring of slots in
shared memory; two compute, 64 queries each, and take turns: one uses the tensor cores while the
other computes its softmax. Queries are rotated in float32 on the way to shared memory, from which
the tensor cores read them; keys are rotated by XLA beforehand, as for the other GPU kernels. The
angles are computed by XLA: the fast sine of the hardware is wrong for large angles.

Letters as in `rotary_attention`; h = H // 2.
"""

# mypy: ignore-errors
# The oldest jax, with which mypy runs, declares other arguments for these functions.

import functools
import math
import os
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import dispatch
from pallas_kernels.ranges import block_ranges
from pallas_kernels.rotary_attention import rotate
from pallas_kernels.rotary_attention_gpu import (
    MASK_VALUE,
    KernelConfig,
    _backward,
    _cos_sin,
    _padded_call,
    blocks,
    check_triton,
)

BLOCK_Q = 64
"""queries of a warpgroup: the rows of a wgmma instruction"""
COMPUTE_WARPGROUPS = 2
BLOCK_K = 128
SLOTS = 2
"""blocks of keys and of values in shared memory; a third does not fit with H = 128"""
INTERPRETER_THREADS = 6
"""of XLA on a CPU: with fewer, warpgroups wait for one that gets no thread"""
LOADER_REGISTERS, COMPUTE_REGISTERS = 40, 232
"""per thread: a program of 384 threads has 168 each, which the loader cedes to the others"""


def check_device() -> None:
    """Raises NotImplementedError where Mosaic GPU kernels cannot run: an older jax, a GPU without
    Hopper's instructions, or a CPU with too few threads for the interpreter.
    """
    if jax.__version_info__ < (0, 11):
        raise NotImplementedError(
            f"Mosaic GPU kernels need jax 0.11 or newer; this is {jax.__version__}"
        )
    if dispatch.platform() == "cpu":
        if max(os.cpu_count() or 1, jax.device_count()) < INTERPRETER_THREADS:
            raise NotImplementedError(
                f"the interpreter of Mosaic GPU kernels needs {INTERPRETER_THREADS} threads: set "
                f"jax_num_cpu_devices to {INTERPRETER_THREADS} or more"
            )
    elif not any(name in dispatch.device_kind() for name in ("H100", "H200", "H800", "H20")):
        raise NotImplementedError(
            f"Mosaic GPU kernels use Hopper's instructions; this is {dispatch.device_kind()}"
        )


def mosaic(q, k, v, positions, kv_positions, rope, segments, kv_segments, q_offset, causal, scale):
    """`rotary_attention` in Pallas, with positional arguments."""
    T, S, H = q.shape[1], k.shape[1], q.shape[3]
    check_device()
    check_triton()  # for gradients
    if H not in (64, 128):
        raise NotImplementedError(f"head_dim {H}: the Mosaic GPU kernel supports 64 and 128")
    if q.dtype != jnp.bfloat16:
        raise NotImplementedError(f"{q.dtype}: the Mosaic GPU kernel supports bfloat16")
    config = KernelConfig(causal, scale, S, *blocks(H, q.dtype, T, S))
    inputs = q, k, v, positions, kv_positions, rope, segments, kv_segments, q_offset
    attention = functools.partial(_attention, config)
    return _padded_call(attention, COMPUTE_WARPGROUPS * BLOCK_Q, BLOCK_K, *inputs)


# The custom_vjp -----------------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(config, *args):
    return _forward(config, *args)[0]


def _forward(config, *args):
    q, k, v, positions, kv_positions, rope, segments, kv_segments, offset = args
    out, lse = _call_forward(
        config, q, rotate(k, kv_positions, rope), v, _cos_sin(positions, rope), segments,
        kv_segments, offset,
    )  # fmt: skip
    out, lse = checkpoint_name((out, lse), "attention")
    return out, (*args, out, lse)


_attention.defvjp(_forward, _backward)


# The kernel ---------------------------------------------------------------------------------------


class Operands(NamedTuple):
    """What the forward kernel reads and writes in main memory."""

    offset: Any
    ranges: Any
    q: Any
    k: Any
    v: Any
    cos: Any
    sin: Any
    q_ids: Any
    k_ids: Any
    out: Any = None
    lse: Any = None


def _call_forward(config, q, k, v, cos_sin, segments, kv_segments, offset):
    (B, T, N, H), S = q.shape, k.shape[1]
    bq = COMPUTE_WARPGROUPS * BLOCK_Q
    ranges = block_ranges(
        "q", bq, BLOCK_K, (B, T, S), config.keys, config.causal, offset, segments, kv_segments
    )
    operands = Operands(offset, ranges, q, k, v, *cos_sin, segments, kv_segments)
    present = [x is not None for x in operands[:-2]]

    def body(*refs):
        inputs, rest = refs[: sum(present)], refs[sum(present) :]
        inputs = iter(inputs)
        at = Operands(*(next(inputs) if x else None for x in present), *rest[:2])
        _kernel(at, *rest[2:], config=config)

    # A row of a tile has at most 128 bytes; half a head must be whole tiles.
    swizzle = H
    transforms = plgpu.TilingTransform((8, swizzle // 2)), plgpu.SwizzleTransform(swizzle)
    tile = lambda *shape: plgpu.SMEM(shape, q.dtype, transforms=transforms)
    filled, read = (
        plgpu.Barrier(num_barriers=SLOTS),
        plgpu.Barrier(num_arrivals=COMPUTE_WARPGROUPS, num_barriers=SLOTS),
    )
    return plgpu.kernel(
        body,
        out_type=[
            jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct((B, N, T), jnp.float32)
        ],
        scratch_types=[
            tile(COMPUTE_WARPGROUPS, BLOCK_Q, H), tile(SLOTS, BLOCK_K, H), tile(SLOTS, BLOCK_K, H),
            plgpu.SMEM((COMPUTE_WARPGROUPS, BLOCK_Q), jnp.float32),
            filled, filled, read, read, plgpu.Barrier(num_arrivals=COMPUTE_WARPGROUPS),
        ],
        grid=(N, T // bq, B),
        grid_names=("head", "block", "batch"),
        num_threads=COMPUTE_WARPGROUPS + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpreter(),
        kernel_name="rotary_attention_forward",
    )(*(x for x in operands if x is not None))  # fmt: skip


def interpreter():
    """The interpreter on a CPU, which reports races; None: compile."""
    return plgpu.InterpretGPUParams(detect_races=True) if dispatch.platform() == "cpu" else None


def _kernel(
    at: Operands, q_smem, k_smem, v_smem, lse_smem, k_filled, v_filled, k_read, v_read, turn,
    *, config,
):  # fmt: skip
    warpgroup, b, n = lax.axis_index("warpgroup"), lax.axis_index("batch"), lax.axis_index("head")
    # The last block starts first: with a causal mask it has the most keys and takes longest.
    block = lax.axis_size("block") - 1 - lax.axis_index("block")
    start, full_start, full_stop, stop = (at.ranges[b, block, i] for i in range(4))
    num_full, num_blocks = full_stop - full_start, stop - start

    def key_block(i):
        """The i-th block to visit: those that need no mask come first."""
        i_partial = i - num_full
        before = full_start - start
        partial = jnp.where(i_partial < before, start + i_partial, i_partial + num_full + start)
        return jnp.where(i < num_full, full_start + i, partial)

    @pl.when(warpgroup == COMPUTE_WARPGROUPS)
    def load():
        plgpu.set_max_registers(LOADER_REGISTERS, action="decrease")
        head = lax.div(n, jnp.int32(at.q.shape[2] // at.k.shape[2]))

        def copy(i, _):
            slot = lax.rem(i, jnp.int32(SLOTS))
            rows = b, pl.ds(key_block(i) * BLOCK_K, BLOCK_K), head
            for source, target, filled, read in (
                (at.k, k_smem, k_filled, k_read), (at.v, v_smem, v_filled, v_read)
            ):  # fmt: skip
                pl.when(i >= SLOTS)(lambda read=read: plgpu.barrier_wait(read.at[slot]))
                plgpu.copy_gmem_to_smem(source.at[rows], target.at[slot], filled.at[slot])

        lax.fori_loop(0, num_blocks, copy, None)

        def drain(i, _):
            """The interpreter requires that each phase of a barrier is awaited."""
            slot = lax.rem(i, jnp.int32(SLOTS))
            plgpu.barrier_wait(k_read.at[slot])
            plgpu.barrier_wait(v_read.at[slot])

        lax.fori_loop(jnp.maximum(num_blocks - SLOTS, 0), num_blocks, drain, None)

    @pl.when(warpgroup < COMPUTE_WARPGROUPS)
    def compute():
        plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")
        q_tile, lse_row = q_smem.at[warpgroup], lse_smem.at[warpgroup]
        first = (block * COMPUTE_WARPGROUPS + warpgroup) * BLOCK_Q
        rows = pl.ds(first, BLOCK_Q)
        _rotate_queries(at, b, rows, n, config, q_tile)
        attend = functools.partial(
            _attend, at, b, first, config, q_tile, k_smem, v_smem, k_filled, v_filled, k_read,
            v_read, turn, key_block, num_blocks,
        )  # fmt: skip
        # m starts finite: in a fully masked row, exp2(-inf - m) is 0 instead of NaN.
        carry = (
            float_array((BLOCK_Q, at.q.shape[3]), 0, plgpu.Layout.WGMMA),
            float_array((BLOCK_Q,), MASK_VALUE, plgpu.Layout.WGMMA.reduce(1)),
            float_array((BLOCK_Q,), 0, plgpu.Layout.WGMMA.reduce(1)),
        )
        pl.when(num_blocks > 0)(lambda: plgpu.barrier_wait(k_filled.at[0]))
        pl.when(warpgroup == 1)(lambda: _take_turn(turn))
        carry = lax.fori_loop(0, num_full, functools.partial(attend, False), carry)
        acc, m, l = lax.fori_loop(num_full, num_blocks, functools.partial(attend, True), carry)
        pl.when(warpgroup == 0)(lambda: _take_turn(turn))
        l = jnp.where(l == 0, 1.0, l)
        q_tile[...] = (acc / lax.broadcast_in_dim(l, acc.shape, [0])).astype(q_tile.dtype)
        lse_row[...] = m + jnp.log2(l)
        # TMA reads shared memory through another proxy: without this, it may read old data.
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(q_tile, at.out.at[b, rows, n])
        plgpu.copy_smem_to_gmem(lse_row, at.lse.at[b, n, rows])
        plgpu.wait_smem_to_gmem(0)


def float_array(shape, value, layout):
    """A float32 array of one value in the registers of a warpgroup.

    Args:
      shape: of the array.
      value: of all elements.
      layout: a `plgpu.Layout`, how the elements are divided over the threads.
    """
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def _take_turn(turn):
    """Both warpgroups arrive here alternately, so that they do not use the tensor cores at once."""
    plgpu.barrier_arrive(turn)
    plgpu.barrier_wait(turn)


def _rotate_queries(at: Operands, b, rows, n, config, q_tile):
    """Writes the rotated queries, times the scale and log2(e), to shared memory."""
    h = at.cos.shape[2]
    load = functools.partial(plgpu.load, layout=plgpu.Layout.WGMMA, optimized=False)
    x, y = (load(at.q.at[b, rows, n, pl.ds(i * h, h)]).astype(jnp.float32) for i in range(2))
    cos, sin = load(at.cos.at[b, rows]), load(at.sin.at[b, rows])
    factor = config.scale * math.log2(math.e)
    q_tile[:, pl.ds(0, h)] = ((x * cos - y * sin) * factor).astype(q_tile.dtype)
    q_tile[:, pl.ds(h, h)] = ((y * cos + x * sin) * factor).astype(q_tile.dtype)
    # wgmma reads shared memory through another proxy than these writes. The interpreter does not
    # notice if this is missing.
    plgpu.commit_smem()


def _attend(
    at: Operands, b, first, config, q_tile, k_smem, v_smem, k_filled, v_filled, k_read, v_read,
    turn, key_block, num_blocks, is_partial, i, carry,
):  # fmt: skip
    """One block of keys: scores, online softmax, values."""
    acc, m, l = carry
    slot = lax.rem(i, jnp.int32(SLOTS))

    def product(acc_ref):
        plgpu.wgmma(acc_ref, q_tile, k_smem.at[slot].transpose((1, 0)))
        _take_turn(turn)
        return acc_ref[...]  # waits for the product

    scores = pl.run_scoped(product, plgpu.ACC((BLOCK_Q, BLOCK_K), jnp.float32))
    # Only now: the loader may overwrite the slot.
    plgpu.barrier_arrive(k_read.at[slot])
    if is_partial:
        scores = _mask(at, b, first, key_block(i) * BLOCK_K, config, scores)
    m_new = jnp.maximum(m, jnp.max(scores, axis=1))
    alpha = jnp.exp2(m - m_new)
    weights = jnp.exp2(scores - lax.broadcast_in_dim(m_new, scores.shape, [0]))
    acc *= lax.broadcast_in_dim(alpha, acc.shape, [0])
    l = l * alpha + jnp.sum(weights, axis=1)
    acc, l, m_new, weights = lax.optimization_barrier((acc, l, m_new, weights.astype(v_smem.dtype)))
    plgpu.barrier_arrive(turn)  # the softmax is done
    plgpu.barrier_wait(v_filled.at[slot])
    plgpu.barrier_wait(turn)  # the tensor cores are free

    def await_next_keys():
        next_slot = lax.rem(i + 1, jnp.int32(SLOTS))
        pl.when(i + 1 < num_blocks)(lambda: plgpu.barrier_wait(k_filled.at[next_slot]))

    acc = add_product(acc, weights, v_smem.at[slot], await_next_keys)
    plgpu.barrier_arrive(v_read.at[slot])
    return acc, m_new, l


def add_product(acc, weights, values_ref, meanwhile=lambda: None):
    """acc + weights @ values on the tensor cores, complete on return.

    Args:
      acc: float32, in registers.
      weights: in registers.
      values_ref: in shared memory.
      meanwhile: called when the product has been started.
    """
    if interpreter() is not None:
        # The interpreter has neither run_state nor wgmma with an operand in registers.
        acc += jnp.dot(weights, values_ref[...], preferred_element_type=jnp.float32)
        plgpu.commit_smem()
        meanwhile()
        return acc

    def product(acc_ref):
        plgpu.wgmma(acc_ref, weights, values_ref)
        meanwhile()

    return pl.run_state(product)(plgpu.ACC.init(acc))


def _mask(at: Operands, b, first_q, first_k, config, scores):
    """Scores with -inf where a query does not attend to a key."""
    iota = lambda axis: plgpu.broadcasted_iota(
        jnp.int32, scores.shape, axis, layout=plgpu.Layout.WGMMA
    )
    s = iota(1) + first_k
    visible = s < config.keys
    if config.causal:
        visible &= s <= iota(0) + (first_q + at.offset[0])
    if at.q_ids is not None:
        load = lambda ref, first, axis: lax.broadcast_in_dim(
            plgpu.load(
                ref.at[b, pl.ds(first, scores.shape[axis])],
                layout=plgpu.Layout.WGMMA.reduce(1 - axis), optimized=False,
            ),
            scores.shape, [axis],
        )  # fmt: skip
        visible &= load(at.q_ids, first_q, 0) == load(at.k_ids, first_k, 1)
    return jnp.where(visible, scores, -jnp.inf)
