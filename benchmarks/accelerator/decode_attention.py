"""Step 3: attention of one new position over a cache: bytes of the cache per second."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.accelerator.common import Row, Rows, Sizes, random_arrays, seconds
from benchmarks.accelerator.correctness import kernels, rope_of
from pallas_kernels import rotary_decode_attention
from pallas_kernels.rotary_decode_attention import _IMPLEMENTATIONS

# Microseconds and share of 4.8 TB/s by (B, S): cuDNN 9.27 on an H200, 64 query and 8 key heads of
# 128, bfloat16, paged (NVIDIA/cudnn-frontend, benchmark/.../decode_sweep_20260928_131747.csv).
CUDNN_H200 = {
    (1, 2048): (6.4, 0.27), (1, 8192): (14.6, 0.48), (1, 32768): (41.0, 0.68),
    (8, 2048): (24.8, 0.57), (8, 8192): (72.0, 0.78), (8, 32768): (250.0, 0.89),
    (32, 2048): (72.8, 0.77), (32, 8192): (252.0, 0.89), (32, 32768): (968.0, 0.92),
}  # fmt: skip
MAX_LAYERS = 16


def rows(s: Sizes, earlier: dict[str, Row]) -> Rows:
    copy = earlier.get("copy", {}).get("numbers", {}).get("GB/s")
    for B in s.decode_rows:
        for S in s.decode_lengths:
            for name in kernels(_IMPLEMENTATIONS):
                yield (
                    f"decode attention B {B}, S {S}: {name}",
                    functools.partial(measure, s, name, B, S, copy),
                )


def layers(s: Sizes, B: int, S: int) -> int:
    """Layers of a cache that is larger than the chip's own cache."""
    _, K, H = s.decode_heads
    return min(MAX_LAYERS, max(1, math.ceil(s.decode_bytes / (2 * B * K * S * H * 2))))


def program(s: Sizes, name: str, L: int) -> Callable[..., Any]:
    """The function to compile: one call per layer of the cache; caches are arguments 3 and 4."""

    def call(q, k, v, cache_k, cache_v, lengths):
        out, rope = 0, rope_of(s.decode_heads[2])
        for layer in range(L):
            one, cache_k, cache_v = rotary_decode_attention(
                q[layer], k[layer], v[layer], cache_k, cache_v, layer, lengths, rope,
                implementation=name,
            )  # fmt: skip
            out += one
        return out, cache_k, cache_v

    return call


def shapes(s: Sizes, B: int, S: int) -> list[tuple[int, ...]]:
    """Of q, k, v and the two caches."""
    (N, K, H), L = s.decode_heads, layers(s, B, S)
    return [(L, B, 1, N, H), *[(L, B, 1, K, H)] * 2, *[(L, B, K, S, H)] * 2]


def measure(s: Sizes, name: str, B: int, S: int, copy: float | None) -> Row:
    """Time of one call with a cache that is full except for one position."""
    L = layers(s, B, S)
    *new, cache_k, cache_v = random_arrays(0, shapes(s, B, S))
    caches = [cache_k, cache_v]
    lengths = jnp.full(B, S - 1, jnp.int32)
    call = jax.jit(program(s, name, L), donate_argnums=(3, 4))
    moved = 2 * cache_k.nbytes / L
    del cache_k, cache_v

    def run(n: int) -> None:
        for _ in range(n):
            out, *caches[:] = call(*new, *caches, lengths)
        jax.block_until_ready(out)

    time = {k: x if k == "runs" else x / L for k, x in seconds(run, s).items()}
    rate = moved / time["median"] / 1e9
    numbers = {"GB/s": rate} | ({"of copy": rate / copy} if copy else {})
    if known := CUDNN_H200.get((B, S)):
        numbers |= {"cuDNN on H200, us": known[0], "its share": known[1]}
    return {"seconds": time, "numbers": numbers}
