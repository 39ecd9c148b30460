"""All implementations of rotary attention against NumPy in float64.

An implementation is tested where the platform can run it: `xla` everywhere.
"""

import functools
import importlib
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import Rope, dispatch, rotary_attention

# The function of this name hides the module in the package.
attention_module = importlib.import_module("pallas_kernels.rotary_attention")

TOLERANCE = {"float32": 5e-6, "bfloat16": 1e-2}
PLATFORM = jax.default_backend()


def _here(module):
    table = module._IMPLEMENTATIONS
    return [name for name, (platforms, _) in table.items() if PLATFORM in platforms]


implementations = pytest.mark.parametrize("implementation", _here(attention_module))


# The reference -----------------------------------------------------------------------------------


def rotate64(x, positions, inv_freq, scale):
    """Pairs (i, i + H/2) as complex numbers."""
    half = x.shape[-1] // 2
    z = x[..., :half] + 1j * x[..., half:]
    z = z * np.exp(1j * positions[:, :, None, None] * inv_freq) * scale
    return np.concatenate([z.real, z.imag], axis=-1)


def attention64(q, k, v, d_out, mask, scale):
    """(out, d_q, d_k, d_v) for rotated q and k under mask [B, T, S], one score at a time."""
    group = q.shape[2] // k.shape[2]
    k_N, v_N = np.repeat(k, group, axis=2), np.repeat(v, group, axis=2)
    scores = np.einsum("btnh,bsnh->bnts", q, k_N) * scale
    weights = np.where(mask[:, None], np.exp(scores - scores.max(-1, keepdims=True)), 0)
    total = weights.sum(-1, keepdims=True)
    weights = weights / np.where(total == 0, 1, total)
    out = np.einsum("bnts,bsnh->btnh", weights, v_N)
    d_weights = np.einsum("btnh,bsnh->bnts", d_out, v_N)
    d_scores = weights * (d_weights - (weights * d_weights).sum(-1, keepdims=True)) * scale
    d_q = np.einsum("bnts,bsnh->btnh", d_scores, k_N)
    d_k = np.einsum("bnts,btnh->bsnh", d_scores, q)
    d_v = np.einsum("bnts,btnh->bsnh", weights, d_out)
    per_kv_head = lambda x: x.reshape(*k.shape[:3], group, k.shape[3]).sum(3)
    return out, d_q, per_kv_head(d_k), per_kv_head(d_v)


def reference(q, k, v, d_out, q_pos, kv_pos, rope, segments, kv_segments, offset, causal, scale):
    """rotary_attention and its gradients in float64."""
    rotate = functools.partial(rotate64, inv_freq=np.float64(rope.inv_freq_H2))
    q, k = rotate(q, q_pos, scale=rope.scale), rotate(k, kv_pos, scale=rope.scale)
    mask = np.ones((q.shape[0], q.shape[1], k.shape[1]), bool)
    if causal:
        mask &= np.arange(k.shape[1]) <= np.arange(q.shape[1])[:, None] + offset
    if segments is not None:
        mask &= segments[:, :, None] == kv_segments[:, None, :]
    out, d_q, d_k, d_v = attention64(q, k, v, d_out, mask, scale)
    # The gradient is rotated by the negative angle and scaled again.
    return out, rotate(d_q, -q_pos, scale=rope.scale), rotate(d_k, -kv_pos, scale=rope.scale), d_v


def relative_l2(got, want):
    """|got - want| / |want|."""
    return np.linalg.norm(np.float64(got) - want) / np.linalg.norm(want)


def rope_for(H, theta=1e4, scale=1.0):
    """Plain frequencies."""
    return Rope(np.float32(theta ** (-np.arange(0, H, 2) / H)), scale)


def normal(rng, shape, dtype):
    """Values that the dtype holds exactly, so that the reference starts from the same numbers."""
    return np.asarray(jnp.asarray(rng.standard_normal(shape), dtype))


# Attention ---------------------------------------------------------------------------------------

# (B, T, S, N, K, H), options
CASES = {
    "one_query": ((1, 1, 1, 1, 1, 2), {}),
    "heads": ((2, 16, 16, 4, 4, 8), {}),
    "grouped": ((2, 24, 24, 6, 2, 16), {}),
    "one_kv_head": ((1, 33, 33, 5, 1, 10), {}),
    "odd_lengths": ((2, 37, 37, 4, 2, 6), {"positions": True}),
    "wide": ((1, 130, 130, 2, 1, 128), {}),
    "not_causal": ((2, 12, 19, 4, 2, 8), {"causal": False}),
    "offset": ((2, 8, 24, 4, 2, 8), {"q_offset": 16}),
    "offset_in_the_middle": ((2, 8, 24, 4, 2, 8), {"q_offset": 5}),
    "fully_masked_queries": ((2, 9, 9, 4, 2, 8), {"q_offset": -4}),
    "segments": ((2, 32, 32, 4, 2, 8), {"segments": True}),
    "segments_positions": ((2, 32, 32, 4, 2, 8), {"segments": True, "positions": True}),
    "segments_elsewhere": ((2, 8, 20, 4, 2, 8), {"kv_segments": True, "causal": False}),
    "segments_offset": ((2, 10, 30, 4, 2, 8), {"kv_segments": True, "q_offset": 20}),
    "score_scale": ((2, 16, 16, 4, 2, 8), {"scale": 0.7}),
    "rope_scale": ((2, 16, 16, 4, 2, 8), {"rope_scale": 1.3}),
}


def _arguments(case, dtype):
    (B, T, S, N, K, H), options = CASES[case]
    rng = np.random.default_rng(list(case.encode()))
    q, d_out = normal(rng, (B, T, N, H), dtype), normal(rng, (B, T, N, H), dtype)
    k, v = normal(rng, (B, S, K, H), dtype), normal(rng, (B, S, K, H), dtype)
    offset, causal = options.get("q_offset", 0), options.get("causal", True)
    kv_pos = np.broadcast_to(np.arange(S, dtype=np.int32), (B, S))
    if options.get("positions"):
        kv_pos = rng.integers(0, 3000, (B, S), dtype=np.int32)
    q_pos = kv_pos if S == T else np.broadcast_to(np.arange(T, dtype=np.int32) + offset, (B, T))
    segments = kv_segments = None
    if options.get("segments"):
        segments = kv_segments = np.sort(rng.integers(0, 4, (B, S), dtype=np.int32), axis=1)
    if options.get("kv_segments"):
        kv_segments = rng.integers(0, 3, (B, S), dtype=np.int32)
        segments = rng.integers(0, 4, (B, T), dtype=np.int32)
    rope = rope_for(H, scale=options.get("rope_scale", 1.0))
    scale = options.get("scale")
    want = reference(
        *map(np.float64, (q, k, v, d_out)), q_pos, kv_pos, rope, segments, kv_segments,
        offset, causal, H**-0.5 if scale is None else scale,
    )  # fmt: skip
    keywords = dict(
        kv_positions_BS=kv_pos, segment_ids_BT=segments, kv_segment_ids_BS=kv_segments,
        q_offset=offset, causal=causal, scale=scale,
    )  # fmt: skip
    return (q, k, v, d_out), q_pos, rope, keywords, want


# Rounding to bfloat16 is the same code whatever the mask.
HALF = ("heads", "grouped", "segments_positions", "fully_masked_queries", "rope_scale")


@implementations
@pytest.mark.parametrize(
    ("case", "dtype"),
    [(case, "float32") for case in CASES] + [(case, "bfloat16") for case in HALF],
)
def test_attention_and_gradients(case, dtype, implementation):
    (q, k, v, d_out), q_pos, rope, keywords, want = _arguments(case, dtype)

    @jax.jit
    def run(q, k, v, d_out):
        attend = lambda q, k, v: rotary_attention(
            q, k, v, q_pos, rope, **keywords, implementation=implementation
        )
        out, pull = jax.vjp(attend, q, k, v)
        return out, *pull(d_out)

    for got, exact, like in zip(run(q, k, v, d_out), want, (q, q, k, v), strict=True):
        assert got.dtype == like.dtype
        assert got.shape == like.shape
        assert np.isfinite(np.float32(got)).all()
        if case == "one_query" and not exact.any():
            # A single key has weight 1 for any score: the gradient is only rounding error.
            assert np.abs(np.float32(got)).max() < 10 * TOLERANCE[dtype]
        else:
            assert relative_l2(got, exact) < TOLERANCE[dtype]


@implementations
def test_a_fully_masked_query_gives_zeros(implementation):
    (q, k, v, _), q_pos, rope, keywords, _ = _arguments("fully_masked_queries", "float32")
    attend = lambda q, k, v: rotary_attention(
        q, k, v, q_pos, rope, **keywords, implementation=implementation
    )
    out, pull = jax.vjp(jax.jit(attend), q, k, v)
    assert (np.asarray(out)[:, :4] == 0).all()
    assert (np.asarray(out)[:, 4:] != 0).all()
    d_q, d_k, d_v = pull(jnp.ones_like(out))
    assert (np.asarray(d_q)[:, :4] == 0).all()
    # Keys 5 to 8 are masked for all queries.
    assert (np.asarray(d_k)[:, 5:] == 0).all()
    assert (np.asarray(d_v)[:, 5:] == 0).all()


@implementations
def test_all_masked_gives_zeros_and_no_nan(implementation):
    (q, k, v, d_out), q_pos, rope, keywords, _ = _arguments("heads", "float32")
    keywords |= dict(segment_ids_BT=np.ones_like(q_pos), kv_segment_ids_BS=np.zeros_like(q_pos))
    attend = lambda q, k, v: rotary_attention(
        q, k, v, q_pos, rope, **keywords, implementation=implementation
    )
    out, pull = jax.vjp(jax.jit(attend), q, k, v)
    for x in (out, *pull(jnp.asarray(d_out))):
        assert (np.asarray(x) == 0).all()


@implementations
def test_large_scores_do_not_overflow(implementation):
    (q, k, v, _), q_pos, rope, keywords, _ = _arguments("heads", "float32")
    attend = jax.jit(lambda q, k: rotary_attention(
        q, k, v, q_pos, rope, **keywords, implementation=implementation))  # fmt: skip
    out = np.asarray(attend(q * 1e4, k * 1e4))
    assert np.isfinite(out).all()
    # The softmax is one-hot: each output is a row of v.
    per_head = np.repeat(v, q.shape[2] // v.shape[2], axis=2)
    nearest = np.abs(out[:, :, None] - per_head[:, None]).max(-1).min(2)
    assert np.median(nearest) < 1e-6


@implementations
def test_default_positions_and_segments_are_the_queries(implementation):
    (q, k, v, _), q_pos, rope, keywords, _ = _arguments("segments_positions", "float32")
    explicit = rotary_attention(q, k, v, q_pos, rope, **keywords, implementation=implementation)
    ids = dict(segment_ids_BT=keywords["segment_ids_BT"])
    short = rotary_attention(q, k, v, q_pos, rope, **ids, implementation=implementation)
    assert (np.asarray(explicit) == np.asarray(short)).all()


# Checks of arguments ------------------------------------------------------------------------------


def _zeros(*shape, dtype=jnp.float32):
    return jnp.zeros(shape, dtype)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(q=_zeros(2, 4, 8)), r"expected q \[B,T,N,H\]"),
        (dict(v=_zeros(2, 4, 2, 6)), "of one shape"),
        (dict(q=_zeros(3, 4, 4, 8), positions=jnp.zeros((3, 4), jnp.int32)), "agree in B"),
        (dict(q=_zeros(2, 4, 3, 8)), "3 query heads are not a multiple of 2 key heads"),
        (dict(q=_zeros(2, 4, 4, 8, dtype=jnp.bfloat16)), "share one floating dtype"),
        (dict(positions=jnp.zeros((2, 5), jnp.int32)), r"positions_BT must be integers of shape"),
        (dict(positions=_zeros(2, 4)), "positions_BT must be integers"),
        (dict(kv_positions_BS=jnp.zeros((2, 5), jnp.int32)), r"kv_positions_BS .* \(2, 4\)"),
        (dict(segment_ids_BT=_zeros(2, 4)), "segment_ids_BT must be integers"),
        (
            dict(kv_segment_ids_BS=jnp.zeros((2, 4), jnp.int32)),
            "pass the segment ids of the queries too",
        ),
        (dict(q_offset=0.5), "q_offset must be integers"),
        (dict(q=_zeros(2, 4, 4, 7), k=_zeros(2, 4, 2, 7), v=_zeros(2, 4, 2, 7)), "an even H"),
        (dict(q=_zeros(0, 4, 4, 8), k=_zeros(0, 4, 2, 8), v=_zeros(0, 4, 2, 8)), "no empty axis"),
        (dict(rope=rope_for(16)), r"inv_freq_H2 must have shape \(4,\)"),
        (dict(k=_zeros(2, 6, 2, 8), v=_zeros(2, 6, 2, 8)), "6 keys for 4 queries"),
        (dict(implementation="nonsense"), "no implementation 'nonsense'; there are .*xla"),
    ],
)
def test_attention_refuses(changes, message):
    arguments = dict(
        q=_zeros(2, 4, 4, 8), k=_zeros(2, 4, 2, 8), v=_zeros(2, 4, 2, 8),
        positions=jnp.zeros((2, 4), jnp.int32), rope=rope_for(8),
    ) | changes  # fmt: skip
    keywords = {name: arguments.pop(name) for name in [*arguments][5:]}
    with pytest.raises(ValueError, match=message):
        rotary_attention(*arguments.values(), **keywords)


def _cannot(*args):
    raise NotImplementedError("only even days")


def test_dispatch_tries_the_next_but_never_for_a_name():
    table = {"best": ((PLATFORM,), _cannot), "plain": ((PLATFORM,), lambda x: x + 1)}
    assert dispatch.call("op", table, None, 1) == 2
    assert dispatch.call("op", table, "plain", 1) == 2
    with pytest.raises(NotImplementedError, match="only even days"):
        dispatch.call("op", table, "best", 1)


def test_dispatch_refuses_a_name_of_another_platform(monkeypatch):
    monkeypatch.setattr(dispatch, "platform", lambda: "tpu")
    with pytest.raises(NotImplementedError, match="'best' runs on gpu, cuda, not on tpu"):
        dispatch.call("op", {"best": (("gpu", "cuda"), lambda x: x)}, "best", 1)


def test_the_platform_is_the_meshs(monkeypatch):
    """Compiling for a TPU on a machine without one: the mesh's devices count."""
    assert (dispatch.platform(), dispatch.device_kind()) == (PLATFORM, jax.devices()[0].device_kind)
    device = types.SimpleNamespace(platform="tpu", device_kind="TPU v6 lite")
    mesh = types.SimpleNamespace(abstract_device=device)
    monkeypatch.setattr(jax.sharding, "get_abstract_mesh", lambda: mesh)
    assert (dispatch.platform(), dispatch.device_kind()) == ("tpu", "TPU v6 lite")


def test_dispatch_names_the_reasons():
    table = {"best": ((PLATFORM,), _cannot), "other": (("elsewhere",), lambda x: x)}
    with pytest.raises(
        NotImplementedError, match=f"no implementation for .*{PLATFORM}.* best: only even"
    ):
        dispatch.call("op", table, None, 1)


def test_dispatch_leaves_errors_alone():
    def broken(x):
        raise TypeError("a real mistake")

    table = {"best": ((PLATFORM,), broken), "plain": ((PLATFORM,), lambda x: x)}
    with pytest.raises(TypeError, match="a real mistake"):
        dispatch.call("op", table, None, 1)
