"""What the steps share: sizes, timing, random arrays."""

import functools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

Row = dict[str, Any]
"""One line of the table. Possible keys: "seconds" (median, min, max, runs), "numbers" (by label),
"wrong" (why the result is not correct; empty if it is)."""
Rows = Iterator[tuple[str, Callable[[], Row]]]
"""Name of each row, and the function that measures it"""


class Sizes(NamedTuple):
    """Sizes of all steps."""

    copy_bytes: int
    product: int
    """rows and columns of the square product"""
    every_row: bool
    """all rows, or about half of them (compiling an interpreted kernel takes seconds)"""
    check_T: int
    """tokens of the correctness checks; not a multiple of a block"""
    check_S: int
    """slots of the cache of the decode checks"""
    last_position: int
    """the largest rotary position that is checked"""
    tokens: int
    """of an attention call"""
    lengths: tuple[int, ...]
    """sequence lengths of attention"""
    heads: tuple[int, int, int]
    """N, K, H of attention"""
    decode_heads: tuple[int, int, int]
    decode_rows: tuple[int, ...]
    decode_lengths: tuple[int, ...]
    decode_bytes: int
    """of the caches that a decode measurement reads, more than the chip's own cache"""
    matrix: tuple[int, int]
    """inputs and outputs of the quantized products"""
    num_matrices: int
    products_rows: tuple[int, ...]
    models: tuple[str, ...]
    """models that generate, small first"""
    batches: tuple[int, ...]
    prompt: int
    prefill: int
    """tokens of the prompt whose reading is timed"""
    train_model: str
    train_batch: tuple[int, int]
    """B, T of the training step"""
    rounds: int
    round_seconds: float


FULL = Sizes(
    copy_bytes=2 << 30, product=8192, every_row=True,
    check_T=1000, check_S=1008, last_position=131071,
    tokens=16384, lengths=(4096, 16384), heads=(32, 8, 128),
    decode_heads=(64, 8, 128), decode_rows=(1, 8, 32), decode_lengths=(2048, 8192, 32768),
    decode_bytes=256 << 20, matrix=(4096, 28672), num_matrices=4, products_rows=(1, 16, 2048),
    models=("llama3.2-1b", "llama3.1-8b"), batches=(1, 16), prompt=512, prefill=4096,
    train_model="llama3.2-1b", train_batch=(4, 4096), rounds=7, round_seconds=0.05,
)  # fmt: skip
TINY = Sizes(
    copy_bytes=1 << 16, product=64, every_row=False, check_T=72, check_S=112, last_position=255,
    tokens=128, lengths=(64,), heads=(2, 1, 64),
    decode_heads=(4, 2, 32), decode_rows=(2,), decode_lengths=(64,),
    decode_bytes=1 << 12, matrix=(64, 128), num_matrices=2, products_rows=(1, 16),
    models=("stories260k", "tiny"), batches=(2,), prompt=16, prefill=40,
    train_model="tiny", train_batch=(2, 64), rounds=2, round_seconds=0.0,
)  # fmt: skip


def sizes(platform: str) -> Sizes:
    """Full sizes for an accelerator; on a CPU tiny ones, whose times mean nothing."""
    return TINY if platform == "cpu" else FULL


def spread(values: list[float]) -> dict[str, float]:
    """Median, minimum, maximum and number of values."""
    return {
        "median": statistics.median(values), "min": min(values), "max": max(values),
        "runs": len(values),
    }  # fmt: skip


def seconds(run: Callable[[int], Any], s: Sizes) -> dict[str, float]:
    """Seconds per call over several rounds; ``run(n)`` makes n calls and waits for the last.

    A round takes at least ``round_seconds``. The first calls, which warm up, do not count.
    """
    run(1)
    start = time.perf_counter()
    run(2)
    each = (time.perf_counter() - start) / 2
    n = max(2, math.ceil(s.round_seconds / each))
    run(n)
    values = []
    for _ in range(s.rounds):
        start = time.perf_counter()
        run(n)
        values.append((time.perf_counter() - start) / n)
    return spread(values)


def time_calls(call: Callable[..., Any], inputs: list[tuple], s: Sizes) -> dict[str, float]:
    """:func:`seconds` of a compiled function that takes turns with several sets of inputs."""

    def run(n: int) -> None:
        for i in range(n):
            out = call(*inputs[i % len(inputs)])
        jax.block_until_ready(out)

    return seconds(run, s)


def random_arrays(seed: int, shapes: Sequence[tuple[int, ...]], dtype: Any = jnp.bfloat16) -> list:
    """Normal random arrays, made on the device."""
    return _random_arrays(jax.random.key(seed), tuple(shapes), jnp.dtype(dtype))


@functools.partial(jax.jit, static_argnums=(1, 2))
def _random_arrays(key, shapes, dtype):
    keys = jax.random.split(key, len(shapes))
    make = lambda key, shape: jax.random.normal(key, shape, jnp.float32).astype(dtype)
    return [make(k, shape) for k, shape in zip(keys, shapes, strict=True)]


def one_line(error: BaseException) -> str:
    """The first line of an error, at most 200 characters."""
    text = str(error).strip() or type(error).__name__
    return f"{type(error).__name__}: {text.splitlines()[0]}"[:200]
