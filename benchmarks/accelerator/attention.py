"""Step 2: attention with rotary embedding, forward, and forward and backward, 8B's heads.

"cudnn" is XLA's rotation and cuDNN's attention. Rates count unmasked scores: 4 H FLOPs each in the
forward pass, 2.5 times that in the backward.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.accelerator.common import Row, Rows, Sizes, random_arrays, time_calls
from benchmarks.accelerator.correctness import LIMIT, kernels, rope_of
from benchmarks.kernels.__main__ import reference, relative_error
from benchmarks.kernels.cases import both_ways, candidates
from pallas_kernels import dispatch
from pallas_kernels.rotary_attention import _IMPLEMENTATIONS

WAYS = ("forward", "forward + backward")
# (q, k, warps, stages) of forward, d_q, d_kv. 128 x 128 forward and 64 x 64 backward were the
# fastest of Triton kernels on an H100 (openxla/tokamax, cache of autotuned sizes, at 783ea95).
BLOCKS = {
    "128x128 8 warps 3 stages, backward 64x64": ((128, 128, 8, 3), (64, 64, 4, 2), (64, 64, 4, 2)),
    "128x128 8 warps 2 stages": ((128, 128, 8, 2), (128, 64, 8, 2), (64, 128, 8, 2)),
}
"""further block sizes of the implementation "gpu" to try"""


def rows(s: Sizes, earlier: dict[str, Row]) -> Rows:
    for T in s.lengths:
        for way in WAYS:
            for name, attend, blocks in implementations():
                yield (
                    f"attention T {T}, {way}: {name}",
                    functools.partial(measure, s, T, way, attend, blocks),
                )


def implementations() -> Iterator[tuple[str, Callable[..., Any], tuple | None]]:
    """Name, function(q, k, v, positions, rope, ids) and block sizes of every implementation."""
    others = candidates("rotary_attention", dispatch.platform())
    names = kernels(_IMPLEMENTATIONS)
    found = {name: _ours(name) for name in names} | {n: f for n, f in others.items() if n != "xla"}
    for name, attend in found.items():
        yield name, attend, None
        if name == "gpu":
            for text, blocks in BLOCKS.items():
                yield f"gpu, {text}", attend, blocks


def _ours(name: str) -> Callable[..., Any]:
    from pallas_kernels import rotary_attention

    def attend(q, k, v, positions, rope, ids):
        return rotary_attention(q, k, v, positions, rope, implementation=name)

    return attend


@contextlib.contextmanager
def use_blocks(blocks: tuple | None) -> Iterator[None]:
    """The implementation "gpu" with other block sizes."""
    if blocks is None:
        yield
        return
    from pallas_kernels import rotary_attention_gpu as gpu

    before = gpu.blocks
    gpu.blocks = lambda H, dtype, T, S: tuple(
        gpu.Blocks(min(q, T), min(k, S), warps, stages) for q, k, warps, stages in blocks
    )
    try:
        yield
    finally:
        gpu.blocks = before


def program(way: str, attend: Callable[..., Any]) -> Callable[..., Any]:
    """The function to compile: (q, k, v, d_out, positions, rope) -> out, and gradients."""

    def call(q, k, v, d_out, positions, rope):
        if way == "forward":
            return (attend(q, k, v, positions, rope, None),)
        return both_ways(attend, q, k, v, d_out, positions, rope, None)

    return call


def shapes(s: Sizes, T: int) -> list[tuple[int, ...]]:
    """Of q, k, v and d_out."""
    N, K, H = s.heads
    B = s.tokens // T
    return [(B, T, N, H), (B, T, K, H), (B, T, K, H), (B, T, N, H)]


def flops(s: Sizes, T: int, way: str) -> float:
    N, _, H = s.heads
    return (1 if way == "forward" else 3.5) * 4 * N * H * s.tokens // T * T * (T + 1) / 2


def measure(s: Sizes, T: int, way: str, attend: Callable[..., Any], blocks: tuple | None) -> Row:
    """Time, rate, and the error of the first head."""
    B = s.tokens // T
    positions = jnp.asarray(np.broadcast_to(np.arange(T, dtype=np.int32), (B, T)))
    rope = rope_of(s.heads[2])
    inputs = [(*random_arrays(seed, shapes(s, T)), positions, rope) for seed in range(2)]
    call = jax.jit(program(way, attend))
    with use_blocks(blocks):
        got = call(*inputs[1])
    time = time_calls(call, inputs, s)
    want = reference(*inputs[1], None, block=min(512, T))
    error = max(relative_error(g, w) for g, w in zip(got, want[: len(got)], strict=True))
    rate = flops(s, T, way) / time["median"] / 1e12
    wrong = "" if error < LIMIT else f"error {error:.1e}"
    return {"seconds": time, "numbers": {"TFLOP/s": rate, "error": error}, "wrong": wrong}
