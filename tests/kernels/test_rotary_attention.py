"""Rotary attention: one suite for all implementations, against NumPy in float64.

On a CPU the kernels run in Pallas' interpreter. `test_kernels` has the reference, other head
dimensions and the checks of arguments; `test_rotary_attention_gpu` has what surrounds cuDNN, which
runs only on GPUs.
"""

import functools

import jax
import numpy as np
import pytest
from test_kernels import (
    TOLERANCE,
    attention_module,
    normal,
    reference,
    relative_l2,
    rope_for,
)

from pallas_kernels import rotary_attention

IMPLEMENTATIONS = ["xla", "tpu", "gpu"]
implementations = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)

# (B, T, S, N, K, H), options: what every implementation can do. Blocks of 128 are
# before, on and after the diagonal, full and partial, with documents aligned to blocks or not.
CASES = {
    "one_position": ((2, 1, 1, 2, 1, 64), {}),
    "blocks": ((1, 256, 256, 2, 2, 64), {}),
    "eight_heads_a_key": ((1, 200, 200, 8, 1, 128), {"positions": 150}),
    "documents": ((2, 300, 300, 2, 1, 64), {"documents": 6, "positions": 150}),
    "document_a_row": ((2, 384, 384, 1, 1, 64), {"documents": 1}),
    "strewn_documents": ((1, 300, 300, 3, 1, 64), {"strewn": 3, "rope_scale": 1.3}),
    "shard": ((1, 140, 420, 4, 2, 64), {"documents": 4, "q_offset": 150}),
    "fully_masked_queries": ((1, 300, 300, 2, 1, 64), {"q_offset": -140}),
    "not_causal": ((1, 130, 290, 2, 1, 128), {"causal": False, "scale": 0.2}),
}


def _arguments(case, dtype):
    (B, T, S, N, K, H), options = CASES[case] if isinstance(case, str) else case
    rng = np.random.default_rng(list(str(case).encode()))
    q, d_out = normal(rng, (B, T, N, H), dtype), normal(rng, (B, T, N, H), dtype)
    k, v = normal(rng, (B, S, K, H), dtype), normal(rng, (B, S, K, H), dtype)
    offset, causal = options.get("q_offset", 0), options.get("causal", True)
    kv_pos = np.broadcast_to(np.arange(S, dtype=np.int32), (B, S))
    if most := options.get("positions"):
        kv_pos = rng.integers(0, most, (B, S), dtype=np.int32)
    q_pos = kv_pos if S == T else np.broadcast_to(np.arange(T, dtype=np.int32) + offset, (B, T))
    segments = kv_segments = None
    if most := options.get("documents"):
        kv_segments = np.sort(rng.integers(0, most, (B, S), dtype=np.int32), axis=1)
        segments = kv_segments if S == T else kv_segments[:, offset : offset + T]
    if most := options.get("strewn"):
        kv_segments = rng.integers(0, most, (B, S), dtype=np.int32)
        segments = rng.integers(0, most + 1, (B, T), dtype=np.int32)
    rope = rope_for(H, scale=options.get("rope_scale", 1.0))
    scale = options.get("scale")
    keywords = dict(
        kv_positions_BS=kv_pos, segment_ids_BT=segments, kv_segment_ids_BS=kv_segments,
        q_offset=offset, causal=causal, scale=scale,
    )  # fmt: skip
    want = functools.partial(
        reference, *map(np.float64, (q, k, v, d_out)), q_pos, kv_pos, rope, segments, kv_segments,
        offset, causal, H**-0.5 if scale is None else scale,
    )  # fmt: skip
    return (q, k, v, d_out), q_pos, rope, keywords, want


@functools.cache
def _program(implementation, causal, scale, fixed=()):
    """Jitted: the output and the gradients. Tests of the same shapes share what is compiled."""

    @jax.jit
    def run(q, k, v, d_out, q_pos, rope, keywords):
        attend = lambda q, k, v: rotary_attention(
            q, k, v, q_pos, rope, **keywords, **dict(fixed), causal=causal, scale=scale,
            implementation=implementation,
        )  # fmt: skip
        out, pull = jax.vjp(attend, q, k, v)
        return out, *pull(d_out)

    return run


def _both_ways(implementation, q_pos, rope, keywords, fixed=()):
    """A function of q, k, v, d_out: the output and the gradients.

    All arguments are traced but those named by ``fixed``.
    """
    keywords = dict(keywords)
    fixed = tuple((name, keywords.pop(name)) for name in fixed)
    run = _program(implementation, keywords.pop("causal"), keywords.pop("scale"), fixed)
    return lambda *arrays: run(*arrays, q_pos, rope, keywords)


def _check(case, dtype, implementation, fixed=()):
    arrays, q_pos, rope, keywords, want = _arguments(case, dtype)
    got = _both_ways(implementation, q_pos, rope, keywords, fixed)(*arrays)
    for x, exact, like in zip(got, want(), (arrays[0], *arrays[:3]), strict=True):
        assert x.dtype == like.dtype
        assert x.shape == like.shape
        assert np.isfinite(np.float32(x)).all()
        if keywords["kv_positions_BS"].shape[1] == 1 and np.abs(exact).max() < 1e-9:
            # A single key has weight 1 for any score: the gradient is only rounding error.
            assert np.abs(np.float32(x)).max() < 10 * TOLERANCE[dtype]
        else:
            assert relative_l2(x, exact) < TOLERANCE[dtype]


# Compiling an interpreted kernel takes seconds, so cases that other tests cover are left out.
LEFT_OUT = {
    "gpu": ("blocks", "document_a_row", "strewn_documents", "fully_masked_queries"),
    "tpu": ("document_a_row", "fully_masked_queries"),
}


@pytest.mark.parametrize(
    ("case", "implementation"),
    [(case, x) for x in IMPLEMENTATIONS for case in CASES if case not in LEFT_OUT.get(x, ())],
)
def test_attention_and_gradients(case, implementation):
    _check(case, "float32", implementation)


@pytest.mark.parametrize("case", ["documents", "shard", "fully_masked_queries"])
def test_the_reference_in_blocks(case, monkeypatch):
    """With a known offset, it reads blocks of queries, with the keys up to the last of them."""
    shapes, whole = [], attention_module.masked_attention

    def part(q, k, *rest):
        shapes.append((q.shape[1], k.shape[1]))
        return whole(q, k, *rest)

    monkeypatch.setattr(attention_module, "masked_attention", part)
    _check(case, "float32", "xla", fixed=("q_offset",))
    assert (
        shapes
        == {
            "documents": [(128, 128), (128, 256), (44, 300)],
            "shard": [(128, 278), (12, 290)],
            "fully_masked_queries": [(128, 1), (128, 116), (44, 160)],
        }[case]
    )


@implementations
def test_attention_in_bfloat16(implementation):
    _check("documents", "bfloat16", implementation)


def _random_case(seed):
    rng = np.random.default_rng(seed)
    K, G = rng.choice([1, 2, 3]), rng.integers(1, 9)
    T = int(rng.integers(1, 400))
    options = {"positions": int(rng.integers(1, 150)), "documents": int(rng.integers(1, 12))}
    return (1, T, T, int(K * G), int(K), int(rng.choice([64, 128]))), options


@pytest.mark.parametrize(
    ("seed", "implementation"), [(0, "xla"), (1, "xla"), (0, "tpu"), (1, "gpu")]
)
def test_random_shapes(seed, implementation):
    _check(_random_case(seed), "float32", implementation)


@implementations
def test_a_fully_masked_query_gives_zeros(implementation):
    (q, k, v, _), q_pos, rope, keywords, _ = _arguments(CASES["fully_masked_queries"], "float32")
    n = -keywords["q_offset"]
    run = _both_ways(implementation, q_pos, rope, keywords)
    out, d_q, d_k, d_v = map(np.asarray, run(q, k, v, np.ones_like(q)))
    assert (out[:, :n] == 0).all()
    assert (out[:, n:] != 0).all()
    assert (d_q[:, :n] == 0).all()
    # The last n keys are masked for all queries.
    assert (d_k[:, -n:] == 0).all()
    assert (d_v[:, -n:] == 0).all()


@implementations
def test_all_masked_gives_zeros_and_no_nan(implementation):
    arrays, q_pos, rope, keywords, _ = _arguments("documents", "float32")
    keywords |= dict(segment_ids_BT=np.ones_like(q_pos), kv_segment_ids_BS=np.zeros_like(q_pos))
    for x in _both_ways(implementation, q_pos, rope, keywords)(*arrays):
        assert (np.asarray(x) == 0).all()


@implementations
def test_padding_never_leaks(implementation):
    """Padding has its own ids: its values and their gradients do not change the rest."""
    arrays, q_pos, rope, keywords, _ = _arguments("documents", "float32")
    ids = keywords["segment_ids_BT"].copy()
    ids[0, 170:], ids[1, :30] = -1, -2
    keywords |= dict(segment_ids_BT=ids, kv_segment_ids_BS=ids)
    run = _both_ways(implementation, q_pos, rope, keywords)
    padding = (ids < 0)[:, :, None, None]
    clean, poisoned = (
        run(*(np.where(padding, np.float32(x), y) for y in arrays)) for x in (0, -1e8)
    )
    for x, y in zip(clean, poisoned, strict=True):
        assert (np.asarray(x)[ids >= 0] == np.asarray(y)[ids >= 0]).all()
        assert (np.asarray(y)[ids >= 0] != 0).any()


@implementations
def test_large_scores_do_not_overflow(implementation, users_compilation):
    (q, k, v, d_out), q_pos, rope, keywords, _ = _arguments("blocks", "float32")
    run = _both_ways(implementation, q_pos, rope, keywords)
    out, *grads = map(np.asarray, run(q * 1e4, k * 1e4, v, d_out))
    assert all(np.isfinite(x).all() for x in (out, *grads))
    # The softmax is one-hot: each output is a row of v.
    per_head = np.repeat(v, q.shape[2] // v.shape[2], axis=2)
    nearest = np.abs(out[:, :, None] - per_head[:, None]).max(-1).min(2)
    assert np.median(nearest) < 1e-6


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS[1:])
def test_far_positions_equal_the_reference(implementation):
    """Float32 angles of positions about a million: far from float64's, the same everywhere."""
    case = (1, 150, 150, 2, 1, 64), {"positions": 1 << 20}
    arrays, q_pos, rope, keywords, _ = _arguments(case, "float32")
    want = _both_ways("xla", q_pos, rope, keywords)(*arrays)
    for x, exact in zip(
        _both_ways(implementation, q_pos, rope, keywords)(*arrays), want, strict=True
    ):
        assert relative_l2(x, np.float64(exact)) < TOLERANCE["float32"]
