"""Times the kernels, or compiles them if there is no accelerator.

``python -m benchmarks.kernels`` times rotary attention, forward and backward, at the shapes of
LLaMA 7B, 8B and 70B with 16384 tokens, and then decoding. Each implementation is compared with the
best public kernel of the platform (splash attention on TPU; XLA's rotation and cuDNN on GPU, which
is our ``cudnn``; tokamax if installed) and its error with a float32 reference. Without a TPU or
GPU, or with ``--chips``, the same programs are compiled for absent chips, and the benchmark prints
temporary memory, bytes that XLA moves outside the kernels, and on a TPU the bundles of the kernels'
inner loops (`benchmarks.kernels.schedule`).

Rates count unmasked scores: 4 * H FLOPs each in the forward pass, 2.5 times that in the backward.
"""

import argparse
import functools
import math
import statistics
import subprocess
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.kernels.cases import (
    CACHES,
    MODELS,
    add_arguments,
    both_ways,
    candidates,
    cases,
    decode,
    keep,
    rope_of,
    shapes,
)  # fmt: skip
from llama_jax import chips
from pallas_kernels import dispatch, rotary_attention


def main() -> None:
    arguments = argparse.ArgumentParser(
        prog="python -m benchmarks.kernels", description=(__doc__ or "").split("\n")[0]
    )
    arguments.add_argument(
        "--chips", nargs="+", help="compile for these chips instead of timing, such as v5p or h100"
    )
    args = add_arguments(arguments).parse_args()
    if args.chips is None and jax.devices()[0].platform != "cpu":
        here = jax.devices()[0]
        keep(args, here.device_kind, timed(args, here))
        return
    for chip in args.chips or ("v5p", "h100"):
        # One process per chip: libtpu reads its options once.
        command = [sys.executable, "-m", "benchmarks.kernels.compiled", chip]
        for name in ("models", "lengths"):
            command += [f"--{name}", *map(str, getattr(args, name))]
        subprocess.run([*command, "--results", str(args.results)], check=True)


# Timed --------------------------------------------------------------------------------------------


def timed(args, device: jax.Device) -> list[dict[str, Any]]:
    peak = chips.peak_tflops(device.device_kind) or math.nan
    rows = []
    for model, T, documents in cases(args):
        arrays, positions, ids, pairs = inputs(model, T, documents)
        rope = rope_of(MODELS[model][2])
        want = reference(*arrays, positions, rope, ids)
        forward_flops = 4 * MODELS[model][0] * MODELS[model][2] * pairs
        mine = []
        for name, attend in candidates("rotary_attention", dispatch.platform()).items():
            row: dict[str, Any] = dict(model=model, T=T, documents=documents, implementation=name)
            try:
                forward = seconds(attend, *arrays[:3], positions, rope, ids)
                both = seconds(functools.partial(both_ways, attend), *arrays, positions, rope, ids)
            except (NotImplementedError, jax.errors.JaxRuntimeError) as e:
                mine.append(row | {"cannot": str(e)[:200]})
                continue
            got = jax.jit(functools.partial(both_ways, attend))(*arrays, positions, rope, ids)
            for way, (median, spread), flops in (
                ("forward", forward, forward_flops),
                ("both", both, 3.5 * forward_flops),
            ):
                rate = flops / median / 1e12
                row[way] = dict(ms=median * 1e3, spread=spread, tflops=rate, of_peak=rate / peak)
            mine.append(row | {"error": max(map(relative_error, got, want))})
        peers = [r for r in mine if r["implementation"] in ("cudnn", "splash", "tokamax")]
        for row in mine:
            for way in ("forward", "both"):
                best = [peer[way]["ms"] for peer in peers if way in peer]
                if way in row and best:
                    row[way]["of_best_peer"] = min(best) / row[way]["ms"]
            print(_line(row), flush=True)
        rows += mine
    return rows + decoding()


def _line(row: dict[str, Any]) -> str:
    head = f"{row['model']:>4} T {row['T']:>6} {'documents' if row['documents'] else '':9} "
    head += f"{row['implementation']:8}"
    if "cannot" in row:
        return f"{head} cannot: {row['cannot'][:90]}"
    num_shards = "".join(
        f"  {way} {r['ms']:8.3f} ms ±{r['spread']:3.0%} {r['tflops']:5.0f} TFLOP/s "
        f"{r['of_peak']:4.0%} of peak, {r.get('of_best_peer', math.nan):4.2f} x peer"
        for way, r in row.items() if way in ("forward", "both")
    )  # fmt: skip
    return f"{head}{num_shards}  error {row['error']:.1e}"


def inputs(model: str, T: int, documents: bool):
    """Arrays, positions, segment ids, and the number of unmasked (query, key) pairs."""
    rng = np.random.default_rng(T)
    arrays = [
        jnp.asarray(rng.standard_normal(s, np.float32), jnp.bfloat16)
        for s in shapes(model, T).values()
    ]
    B = arrays[0].shape[0]
    positions = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T))
    if not documents:
        return arrays, jnp.asarray(positions), None, B * T * (T + 1) // 2
    # About 1024 tokens each, like web documents.
    first = rng.random((B, T)) < 1 / 1024
    first[:, 0] = True
    start = np.maximum.accumulate(np.where(first, positions, 0), axis=1)
    within = (positions - start).astype(np.int32)
    ids = np.cumsum(first, axis=1, dtype=np.int32)
    return arrays, jnp.asarray(within), jnp.asarray(ids), int((within + 1).sum(dtype=np.int64))


@functools.partial(jax.jit, static_argnames="block")
def reference(q, k, v, d_out, positions, rope, ids, block=512):
    """`both_ways` in float32, for the first key head of the first row and its query heads."""
    G, T = q.shape[2] // k.shape[2], q.shape[1]
    q, d_out, k, v = (
        x[:1, :, :n].astype(jnp.float32) for x, n in ((q, G), (d_out, G), (k, 1), (v, 1))
    )
    positions, ids = positions[:1], jnp.zeros((1, T), jnp.int32) if ids is None else ids[:1]

    def attend(q, k, v):
        @jax.checkpoint
        def part(start):
            cut = lambda x: jax.lax.dynamic_slice_in_dim(x, start, block, axis=1)
            return rotary_attention(
                cut(q), k, v, cut(positions), rope, kv_positions_BS=positions,
                segment_ids_BT=cut(ids), kv_segment_ids_BS=ids, q_offset=start,
                implementation="xla",
            )[0]  # fmt: skip

        return jax.lax.map(part, jnp.arange(0, T, block)).reshape(q.shape)

    with jax.default_matmul_precision("highest"):
        return both_ways(attend, q, k, v, d_out)


def relative_error(got, want) -> float:
    """|got - want| / |want| over the heads of the reference."""
    got, want = got[:1, :, : want.shape[2]].astype(jnp.float32), np.asarray(want)
    return float(np.linalg.norm(np.asarray(got) - want) / np.linalg.norm(want))


def seconds(function, *args) -> tuple[float, float]:
    """Median time per call over seven rounds of at least 50 ms; (longest - shortest) / median."""
    call = jax.jit(function)

    def run(n):
        for _ in range(n):
            out = call(*args)
        jax.block_until_ready(out)

    return rounds(run)


def rounds(run) -> tuple[float, float]:
    """As :func:`seconds`, for a function run(n) that makes n calls."""
    run(3)
    start = time.perf_counter()
    run(3)
    n = max(3, math.ceil(0.05 * 3 / (time.perf_counter() - start)))
    times = []
    for _ in range(7):
        start = time.perf_counter()
        run(n)
        times.append((time.perf_counter() - start) / n)
    median = statistics.median(times)
    return median, (max(times) - min(times)) / median


def decoding() -> list[dict[str, Any]]:
    """Decoding one token per row with the heads of the 8B, relative to the bandwidth of a copy."""
    N, K, H = MODELS["8B"]
    rows = []
    for B, S in CACHES:
        cache = jnp.ones((1, B, K, S, H), jnp.bfloat16)
        copied, _ = seconds(lambda x: x + 1, cache)
        bandwidth = 2 * cache.nbytes / copied
        for name in candidates("rotary_decode_attention", dispatch.platform()):
            row: dict[str, Any] = dict(model="8B", B=B, S=S, implementation=name)
            call = jax.jit(functools.partial(decode, name), donate_argnums=(3, 4))
            some = jnp.ones((B, 1, N, H), jnp.bfloat16)
            new = (some, some[:, :, :K], some[:, :, :K])
            caches = [cache + 0, cache + 0]

            def run(n, call=call, new=new, caches=caches, B=B, S=S):
                for _ in range(n):
                    out, *caches[:] = call(*new, *caches, jnp.full(B, S - 1), rope_of(H))
                jax.block_until_ready(out)

            try:
                median, spread = rounds(run)
            except (NotImplementedError, jax.errors.JaxRuntimeError) as e:
                rows.append(row | {"cannot": str(e)[:200]})
                continue
            share = 2 * cache.nbytes / median / bandwidth
            rows.append(row | dict(ms=median * 1e3, spread=spread, of_copy_bandwidth=share))
            print(f"decode B {B} S {S} {name}: {median * 1e3:.3f} ms ±{spread:.0%}, "
                  f"{share:.0%} of a copy's bandwidth ({bandwidth / 1e9:.0f} GB/s)")  # fmt: skip
    return rows


if __name__ == "__main__":
    main()
