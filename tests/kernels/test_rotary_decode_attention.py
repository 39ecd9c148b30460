"""Decode attention: one suite for all implementations, against NumPy in float64.

On a CPU the kernels run in Pallas' interpreter.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import (
    Rope,
    fused_decode_attention,
    rotary_attention,
    rotary_decode_attention,
)
from pallas_kernels.rotary_decode_attention import quantize_rows
from pallas_kernels.rotary_decode_attention_gpu import num_splits

TOLERANCE = {"float32": 5e-6, "bfloat16": 1e-2}
IMPLEMENTATIONS = ["xla", "tpu", "gpu"]
# Head dimensions that an implementation supports, if not all.
HEADS = {"tpu": (64, 128), "gpu": (32, 64, 128)}
# The cache length must be a multiple of this number, if not of 1.
CACHE_MULTIPLE = {"tpu": 16}
L = 3  # layers of every cache here; one of them is changed

implementations = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
dtypes = pytest.mark.parametrize("dtype", TOLERANCE)


# The reference -----------------------------------------------------------------------------------


def rope_for(H, theta=1e4, scale=1.0):
    """Plain frequencies."""
    return Rope(np.float32(theta ** (-np.arange(0, H, 2) / H)), scale)


def rotate64(x_TNH, positions_T, rope):
    """Pairs (i, i + H/2) as complex numbers."""
    half = x_TNH.shape[-1] // 2
    z = x_TNH[..., :half] + 1j * x_TNH[..., half:]
    z = z * np.exp(1j * positions_T[:, None, None] * np.float64(rope.inv_freq_H2)) * rope.scale
    return np.concatenate([z.real, z.imag], axis=-1)


def _attend64(q, cache_k, cache_v, layer, lengths, rope):
    """Attention of new queries to a cache that already holds the new keys and values."""
    k, v = (np.stack([c[layer, b, :, n : n + q.shape[1]].swapaxes(0, 1)
                      for b, n in enumerate(lengths)]) for c in (cache_k, cache_v))  # fmt: skip
    B, T = q.shape[:2]
    positions = lengths[:, None] + np.arange(T)
    back = Rope(-rope.inv_freq_H2, rope.scale)
    unrotated = np.stack([rotate64(np.float64(k[b]), positions[b], back) for b in range(B)])
    arrays = map(np.float64, (q, unrotated, v, cache_k, cache_v))
    return decode64(*arrays, layer, lengths, rope)[0]


def decode64(q, k, v, cache_k, cache_v, layer, lengths, rope):
    """One row, head and query at a time, over a copy of the caches."""
    out, caches = np.zeros(q.shape), (cache_k.copy(), cache_v.copy())
    B, T, N, H = q.shape
    group = N // k.shape[2]
    for b in range(B):
        positions = lengths[b] + np.arange(T)
        rotated = rotate64(q[b], positions, rope)
        caches[0][layer, b, :, positions] = rotate64(k[b], positions, rope)
        caches[1][layer, b, :, positions] = v[b]
        for n in range(N):
            keys, values = (c[layer, b, n // group] for c in caches)
            for t in range(T):
                live = slice(0, lengths[b] + t + 1)
                scores = keys[live] @ rotated[t, n] * H**-0.5
                weights = np.exp(scores - scores.max())
                out[b, t, n] = weights @ values[live] / weights.sum()
    return out, *caches


def relative_l2(got, want):
    """|got - want| / |want|."""
    return np.linalg.norm(np.float64(got) - want) / np.linalg.norm(want)


def normal(rng, shape, dtype):
    """Values that the dtype holds exactly, so that the reference starts from the same numbers."""
    return np.asarray(jnp.asarray(rng.standard_normal(shape), dtype))


# (B, T, S, N, K, H), live positions of each row
CASES = {
    "one": ((3, 1, 24, 4, 2, 8), [0, 7, 23]),
    "few": ((2, 4, 24, 6, 2, 16), [20, 3]),
    "prefill": ((2, 16, 16, 4, 4, 8), [0, 0]),
    "one_kv_head": ((2, 3, 130, 5, 1, 10), [127, 64]),
    "h32": ((2, 70, 200, 4, 1, 32), [0, 77]),
    "h64": ((2, 1, 256, 4, 4, 64), [130, 255]),
    "h64_odd": ((3, 1, 700, 4, 2, 64), [0, 699, 300]),
    "h64_blocks": ((3, 2, 1040, 4, 2, 64), [0, 1038, 512]),
    "h128": ((3, 1, 384, 8, 2, 128), [383, 0, 200]),
    "h128_few": ((2, 5, 256, 4, 1, 128), [126, 251]),
    "h128_chunk": ((2, 16, 160, 3, 3, 128), [144, 7]),
}


PAIRS = [
    (case, name)
    for name in IMPLEMENTATIONS
    for case, (shape, _) in CASES.items()
    if shape[5] in HEADS.get(name, shape) and shape[2] % CACHE_MULTIPLE.get(name, 1) == 0
]
cases = pytest.mark.parametrize(("case", "implementation"), PAIRS)
# In bfloat16 tiles are of another height and sums are rounded: a case of each kind shows both.
HALF = ("few", "one_kv_head", "h64_blocks", "h128_few")


def _arguments(case, dtype, dead=0.0):
    (B, T, S, N, K, H), lengths = CASES[case]
    rng = np.random.default_rng(list(case.encode()))
    q, k, v = (normal(rng, (B, T, n, H), dtype) for n in (N, K, K))
    cache_k, cache_v = (normal(rng, (L, B, K, S, H), dtype) for _ in range(2))
    lengths = np.array(lengths, np.int32)
    gone = (np.arange(S) >= lengths[:, None])[:, None, :, None]
    fill = np.asarray(dead, cache_k.dtype)
    return q, k, v, np.where(gone, fill, cache_k), np.where(gone, fill, cache_v), 1, lengths


@functools.cache
def _decode(implementation):
    return jax.jit(functools.partial(rotary_decode_attention, implementation=implementation))


@pytest.mark.parametrize(
    ("dtype", "case", "implementation"),
    [("float32", *pair) for pair in PAIRS] + [("bfloat16", *p) for p in PAIRS if p[0] in HALF],
)
def test_decode(case, dtype, implementation):
    """Output and caches: new positions are written, everything else is unchanged."""
    arguments = _arguments(case, dtype)
    rope = rope_for(arguments[0].shape[3])
    want = decode64(*map(np.float64, arguments[:5]), *arguments[5:], rope)
    got = _decode(implementation)(*arguments, rope)
    for x, exact, like in zip(got, want, (arguments[0], *arguments[3:5]), strict=True):
        assert x.dtype == like.dtype
        assert relative_l2(x, exact) < TOLERANCE[dtype]
    for x, exact, before in zip(got[1:], want[1:], arguments[3:5], strict=True):
        untouched = exact == np.float64(before)
        assert (np.asarray(x)[untouched] == before[untouched]).all()


@pytest.mark.parametrize("implementation", ["xla", "gpu"])
@pytest.mark.parametrize(("case", "dtype"), [("h64_odd", "float32"), ("h128", "bfloat16")])
def test_fused_queries_keys_and_values(case, dtype, implementation):
    """One array of partial sums, with a row more than the cache, gives what three arrays give."""
    q, k, v, *rest = _arguments(case, dtype)
    rope = rope_for(q.shape[3])
    want = _decode("xla")(q, k, v, *rest, rope)
    whole = np.concatenate([q, k, v], axis=2).astype(np.float32)
    part = np.asarray(jnp.asarray(whole * 0.25, dtype), np.float32)
    parts = np.stack([part, whole - part])
    parts = np.concatenate([parts, np.full_like(parts[:, :1], np.nan)], axis=1)
    cache_k, cache_v, layer, lengths = rest
    run = functools.partial(
        fused_decode_attention, dtype=jnp.dtype(dtype), implementation=implementation
    )
    got = jax.jit(run)(parts, cache_k, cache_v, jnp.int32(layer), lengths, rope)
    for x, exact in zip(got, want, strict=True):
        assert x.dtype == exact.dtype
        assert relative_l2(np.float64(x), np.float64(exact)) < TOLERANCE[dtype]


@pytest.mark.parametrize("implementation", ["xla", "gpu"])
@pytest.mark.parametrize(("case", "dtype"), [("h64_blocks", "float32"), ("h128_few", "bfloat16")])
def test_int8_cache(case, dtype, implementation):
    """As over a cache of the dequantized keys and values; NaN in scales of dead positions."""
    q, k, v, cache_k, cache_v, layer, lengths = _arguments(case, dtype)
    T, H = k.shape[1], k.shape[3]
    S, rope = cache_k.shape[3], rope_for(H)
    (k8, k_scale), (v8, v_scale) = quantize_rows(cache_k), quantize_rows(cache_v)
    dead = (np.arange(S) >= lengths[:, None])[:, None]
    scales = tuple(jnp.where(dead, jnp.nan, x) for x in (k_scale, v_scale))
    wide = lambda x, scale: np.asarray(x, np.float32) * np.asarray(scale, np.float32)[..., None]
    run = jax.jit(functools.partial(rotary_decode_attention, implementation=implementation))
    out, new_k, new_v, new_scales = run(q, k, v, k8, v8, layer, lengths, rope, scales=scales)
    # The new keys and values are read as later calls read them, rounded to 8 bits.
    whole = decode64(*map(np.float64, (q, k, v, wide(k8, k_scale), wide(v8, v_scale))), layer,
                     lengths, rope)  # fmt: skip
    here = np.zeros(k8.shape[:4], bool)  # the new positions of the layer
    here[layer] = (np.arange(S) < lengths[:, None] + T)[:, None] & dead
    for x, scale, exact, before in zip(
        (new_k, new_v), new_scales, whole[1:], (k8, v8), strict=True
    ):
        assert (x.dtype, scale.dtype) == (jnp.int8, jnp.bfloat16)
        assert (np.asarray(x)[~here] == np.asarray(before)[~here]).all()
        assert relative_l2(wide(x, scale)[here], exact[here]) < 0.012
    rounded = [np.nan_to_num(wide(x, s)) for x, s in zip((new_k, new_v), new_scales, strict=True)]
    assert relative_l2(out, _attend64(q, *rounded, layer, lengths, rope)) < TOLERANCE[dtype]


@pytest.mark.parametrize(
    ("programs", "cache_len", "multiprocessors", "splits"),
    [
        (8, 4096, 132, 16),  # 8B, one row: one wave
        (128, 4096, 132, 2),  # 16 rows: one wave of 256
        (320, 4096, 132, 3),  # 40 rows: 3.6 of 4 waves; without splits, 1.2 of 2
        (264, 4096, 132, 1),
        (8, 512, 132, 2),  # at least four blocks a split
        (8, 64, 132, 1),
        (32, 8192, 108, 6),
        (4096, 4096, 132, 1),
    ],
)
def test_splits_fill_whole_waves(programs, cache_len, multiprocessors, splits):
    assert num_splits(programs, cache_len, multiprocessors) == splits


@implementations
@dtypes
def test_random_shapes(dtype, implementation):
    rng = np.random.default_rng(7)
    # An implementation is compiled again for each shape, which takes seconds.
    for _ in range(1 if dtype == "bfloat16" else 4 if implementation == "xla" else 2):
        B, K, G, T = rng.integers(1, 4), rng.integers(1, 4), rng.integers(1, 9), rng.integers(1, 17)
        S, H = 16 * rng.integers(1, 20), rng.choice([64, 128])
        T = min(T, S)
        q, k, v = (normal(rng, (B, T, n, H), dtype) for n in (K * G, K, K))
        caches = [normal(rng, (L, B, K, S, H), dtype) for _ in range(2)]
        lengths, layer = rng.integers(0, S - T + 1, B, dtype=np.int32), rng.integers(0, L)
        rope, scale = rope_for(H, scale=1.2), 0.1
        # The reference's own scale is H**-0.5.
        stretched = q.astype(np.float64) * scale * H**0.5
        want = decode64(stretched, *map(np.float64, (k, v, *caches)), layer, lengths, rope)
        run = jax.jit(
            functools.partial(rotary_decode_attention, scale=scale, implementation=implementation)
        )
        got = run(q, k, v, *caches, layer, lengths, rope)
        for x, exact in zip(got, want, strict=True):
            assert relative_l2(x, exact) < TOLERANCE[dtype]


def test_without_jit():
    """Without jit, as in a notebook."""
    arguments = _arguments("one", "float32")
    got = rotary_decode_attention(*arguments, rope_for(8))
    for x, compiled in zip(got, _decode("xla")(*arguments, rope_for(8)), strict=True):
        assert relative_l2(x, compiled) < TOLERANCE["float32"]


@cases
def test_invalid_positions_have_no_effect(case, implementation):
    rope, run = rope_for(CASES[case][0][5]), _decode(implementation)
    of = lambda dead: np.asarray(run(*_arguments(case, "float32", dead), rope)[0])
    clean = of(0.0)
    for poison in (np.nan, -np.inf, 3e38):
        assert (of(poison) == clean).all(), poison


@pytest.mark.parametrize(
    ("implementation", "chunks"),
    [("xla", [20]), ("xla", [1] * 20), *((name, [9, 1, 1, 9]) for name in IMPLEMENTATIONS)],
    ids=["xla-whole", "xla-ones", *(f"{name}-mixed" for name in IMPLEMENTATIONS)],
)
def test_decode_after_prefill_equals_attention(chunks, implementation):
    B, S, N, K, H = 2, 20, 4, 2, 64
    rng = np.random.default_rng(0)
    q, k, v = (normal(rng, (B, S, n, H), "float32") for n in (N, K, K))
    positions = np.broadcast_to(np.arange(S, dtype=np.int32), (B, S))
    want = rotary_attention(q, k, v, positions, rope_for(H), implementation="xla")
    cache = [jnp.full((L, B, K, 32, H), jnp.nan)] * 2
    out, at = [], 0
    for n in chunks:
        new = (x[:, at : at + n] for x in (q, k, v))
        lengths = jnp.full(B, at, jnp.int32)
        piece, *cache = _decode(implementation)(*new, *cache, 2, lengths, rope_for(H))
        out.append(piece)
        at += n
    assert relative_l2(np.concatenate(out, axis=1), np.float64(want)) < 1e-6


def test_tpu_kernel_has_no_races():
    """Two rows whose new positions cross a tile, in the interpreter that detects races."""
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call
    from jax.experimental.pallas import tpu as pltpu

    poisoned, clean = (_arguments("h128_few", "float32", dead) for dead in (np.nan, 0.0))
    rope = rope_for(128)
    want = decode64(*map(np.float64, clean[:5]), *clean[5:], rope)[0]
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True)):
        run = jax.jit(functools.partial(rotary_decode_attention, implementation="tpu"))
        out = run(*poisoned, rope)[0]
    assert relative_l2(out, want) < TOLERANCE["float32"]
    assert not interpret_pallas_call.races.races_found


@pytest.mark.parametrize(
    ("T", "N", "K"), [(3, 16, 2), (2, 16, 8), (12, 4, 2)], ids=["one_head", "half", "by_head"]
)
def test_both_cores_share_one_row(T, N, K, monkeypatch):
    """One row on a v5p: each core, of two that are simulated, has half the heads; no races."""
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call
    from jax.experimental.pallas import tpu as pltpu

    monkeypatch.setattr("pallas_kernels.dispatch.device_kind", lambda: "TPU v5")
    rng, H, S = np.random.default_rng(1), 64, 160
    q, k, v = (normal(rng, (1, T, n, H), "float32") for n in (N, K, K))
    caches = [normal(rng, (L, 1, K, S, H), "float32") for _ in range(2)]
    rest = 1, np.array([142], np.int32), rope_for(H)
    want = decode64(*map(np.float64, (q, k, v, *caches)), *rest)
    decode = functools.partial(rotary_decode_attention, implementation="tpu")
    params = pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2)
    with pltpu.force_tpu_interpret_mode(params):
        got = jax.jit(decode)(q, k, v, *caches, *rest)
    assert not interpret_pallas_call.races.races_found
    for x, exact in zip(got, want, strict=True):
        assert relative_l2(x, exact) < TOLERANCE["float32"]
    for x, exact, before in zip(got[1:], want[1:], caches, strict=True):
        untouched = exact == np.float64(before)
        assert (np.asarray(x)[untouched] == before[untouched]).all()


@pytest.mark.parametrize(
    ("kind", "B", "K", "G", "T", "programs"),
    [
        ("TPU v5", 1, 8, 4, 1, 2),
        ("TPU v5", 1, 8, 8, 5, 2),
        ("TPU v5", 1, 4, 1, 16, 2),  # a chunk, whose layout has no tiles of heads
        ("TPU v5", 2, 8, 4, 1, 1),
        ("TPU v5", 1, 32, 1, 1, 4),
        ("TPU v5", 1, 8, 1, 1, 1),  # half of the queries is not a tile
        ("TPU v5", 1, 1, 8, 1, 1),
        ("TPU v5 lite", 1, 8, 4, 1, 1),
        ("TPU v6 lite", 1, 8, 4, 1, 1),
        ("TPU v6 lite", 1, 32, 1, 1, 4),
    ],
)
def test_tpu_programs_of_a_row(kind, B, K, G, T, programs, monkeypatch):
    """Fewer heads per program only where a core would be idle."""
    monkeypatch.setattr("pallas_kernels.dispatch.device_kind", lambda: kind)
    of = lambda *shape: jax.ShapeDtypeStruct(shape, "bfloat16")
    cache, new = of(L, B, K, 4096, 128), of(B, T, K, 128)
    decode = functools.partial(rotary_decode_attention, rope=rope_for(128), implementation="tpu")
    lengths = jax.ShapeDtypeStruct((B,), "int32")
    program = jax.make_jaxpr(decode)(of(B, T, K * G, 128), new, new, cache, cache, 0, lengths)
    assert re.findall(r"grid=\((\d+), (\d+), \d+\)", str(program)) == [(str(B), str(programs))]


@pytest.mark.parametrize(
    ("T", "N", "S", "H", "dtype", "cache_dtype", "message"),
    [
        (1, 2, 32, 32, "float32", "float32", "head_dim 32: the TPU kernel supports 64 and 128"),
        (1, 2, 32, 64, "float16", "float16", "float16: the TPU kernel supports"),
        (1, 2, 32, 64, "float32", "bfloat16", "a bfloat16 cache for float32 queries"),
        (
            1,
            2,
            40,
            64,
            "float32",
            "float32",
            "cache length 40: .* a multiple of 16",
        ),
        (65, 16, 96, 64, "float32", "float32", "520 queries per key head"),
    ],
)
def test_tpu_kernel_names_what_it_does_not_support(T, N, S, H, dtype, cache_dtype, message):
    q, new = jnp.zeros((1, T, N, H), dtype), jnp.zeros((1, T, 2, H), dtype)
    cache = jnp.zeros((1, 1, 2, S, H), cache_dtype)
    lengths = jnp.zeros(1, jnp.int32)
    with pytest.raises(NotImplementedError, match=message):
        rotary_decode_attention(
            q, new, new, cache, cache, 0, lengths, rope_for(H), implementation="tpu"
        )


def _zeros(*shape, dtype=jnp.float32):
    return jnp.zeros(shape, dtype)


INT8 = np.zeros((3, 2, 2, 9, 8), np.int8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(cache_k=_zeros(3, 2, 2, 9, 6)), r"caches must be \[L, 2, 2, S, 8\]"),
        (dict(cache_v=_zeros(3, 2, 2, 8, 8)), r"caches must be \[L, 2, 2, S, 8\]"),
        (dict(cache_k=_zeros(2, 2, 9, 8), cache_v=_zeros(2, 2, 9, 8)), r"caches must be \[L, 2"),
        (dict(cache_v=_zeros(3, 2, 2, 9, 8, dtype=jnp.bfloat16)), "caches must share one dtype"),
        (
            dict(cache_k=_zeros(3, 2, 2, 3, 8), cache_v=_zeros(3, 2, 2, 3, 8)),
            "4 new positions do not fit in a cache of length 3",
        ),
        (dict(q=_zeros(2, 4, 3, 8)), "not a multiple"),
        (dict(lengths=jnp.zeros(3, jnp.int32)), r"lengths_B must be integers of shape \(2,\)"),
        (dict(lengths=jnp.zeros(2)), "lengths_B must be integers"),
        (dict(lengths=jnp.array([0, 6])), r"lengths_B must be from 0 to 5 \(4 new .* length 9\)"),
        (dict(lengths=jnp.array([-1, 0])), "lengths_B must be from 0 to 5"),
        (dict(scales=()), "int8 caches, and no others, have scales; got float32 caches with"),
        (dict(cache_k=INT8, cache_v=INT8), "got int8 caches without scales"),
        (
            dict(cache_k=INT8, cache_v=INT8, scales=(_zeros(3, 2, 2, 9), _zeros(3, 2, 9))),
            r"scales of caches \(3, 2, 2, 9, 8\) must be \(3, 2, 2, 9\); got .*, \(3, 2, 9\)",
        ),
        (dict(layer=3), r"layer must be from 0 to 2 \(3 layers\)"),
        (dict(q=_zeros(2, 3, 4, 8)), "of the same new positions"),
        (dict(implementation="nonsense"), "no implementation 'nonsense'"),
    ],
)
def test_decode_refuses(changes, message):
    arguments = dict(
        q=_zeros(2, 4, 4, 8), k=_zeros(2, 4, 2, 8), v=_zeros(2, 4, 2, 8),
        cache_k=_zeros(3, 2, 2, 9, 8), cache_v=_zeros(3, 2, 2, 9, 8), layer=0,
        lengths=jnp.zeros(2, jnp.int32), rope=rope_for(8), scales=None, implementation=None,
    ) | changes  # fmt: skip
    implementation = arguments.pop("implementation")
    with pytest.raises(ValueError, match=message):
        rotary_decode_attention(*arguments.values(), implementation=implementation)


@pytest.mark.parametrize("implementation", ["tpu_prefill", "gpu_prefill"])
@pytest.mark.parametrize(("dtype", "length"), [("float32", 0), ("float32", 77), ("bfloat16", 128)])
def test_prompts_by_the_training_kernels(implementation, dtype, length, monkeypatch):
    """They append and attend as the decode kernels do, and ignore what the cache holds beyond."""
    monkeypatch.setattr("pallas_kernels.rotary_prefill_attention.MAX_DECODE_QUERIES", 100)
    T, N, K, H, S = 128, 4, 2, 64, 256
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)
    caches = [normal(L, 1, K, S, H).at[:, :, :, length:].set(jnp.nan) for _ in range(2)]
    args = (
        normal(1, T, N, H),
        normal(1, T, K, H),
        normal(1, T, K, H),
        *caches,
        1,
        jnp.array([length]),
    )
    results = {}
    for name in (implementation, "xla"):
        results[name] = _decode(name)(*args, rope_for(H, scale=1.2))
    for x, want in zip(results[implementation], results["xla"], strict=True):
        tolerance = dict(rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
        np.testing.assert_allclose(np.float32(x), np.float32(want), **tolerance)


def test_prompts_that_the_training_kernels_leave_to_others():
    """Several rows, and chunks that the decode kernels read without a copy of the cache."""
    for B, T in ((2, 300), (1, 256)):
        cache, new = jnp.zeros((L, B, 2, 512, 64)), jnp.zeros((B, T, 2, 64))
        args = jnp.zeros((B, T, 4, 64)), new, new, cache, cache, 0, jnp.zeros(B, int), rope_for(64)
        for name in ("tpu_prefill", "gpu_prefill"):
            with pytest.raises(NotImplementedError, match="queries per key head"):
                rotary_decode_attention(*args, implementation=name)
