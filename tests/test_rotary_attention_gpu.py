"""What is the GPU implementations' own: documents as cuDNN wants them, and what each refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import Rope, rotary_attention
from pallas_kernels.rotary_attention_cudnn import documents
from pallas_kernels.rotary_attention_gpu import Blocks, Setting, _ranges

# Documents in cuDNN's form ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "starts", "lengths"),
    [
        ([[1, 1, 1, 1]], [[0, -1, -1, -1]], [[4, -1, -1]]),
        ([[1, 1, 2, 0]], [[0, 2, 3, -1]], [[2, 1, 1]]),
        ([[5, 4, 4, 4], [7, 7, 7, 9]], [[0, 1, -1, -1], [0, 3, -1, -1]],
         [[1, 3, -1], [3, 1, -1]]),
    ],
)  # fmt: skip
def test_documents_as_offsets(rows, starts, lengths):
    got = documents(jnp.asarray(rows), most=3)
    np.testing.assert_array_equal(got[0], starts)
    np.testing.assert_array_equal(got[1], lengths)
    assert got[2]


@pytest.mark.parametrize(
    "rows", [[[1, 2, 3, 4]], [[1, 2, 1, 1]], [[1, 1, 1, 1], [0, 3, 3, 0]], [[1, 2, 1, 2]]]
)
def test_documents_that_offsets_cannot_say(rows):
    assert not documents(jnp.asarray(rows), most=3)[2]


# Which blocks are looked at -----------------------------------------------------------------------


@pytest.mark.parametrize("offset", [0, 24, -40, 1000, -1000])
@pytest.mark.parametrize("documented", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_ranges_hold_all_that_is_seen(offset, documented, causal):
    """Against the whole mask: nothing seen is outside, nothing in the clear is hidden."""
    B, T, S, keys, rng = 2, 96, 128, 117, np.random.default_rng(0)
    q_ids = np.sort(rng.integers(0, 4, (B, T)), axis=1) if documented else None
    k_ids = rng.integers(0, 4, (B, S)).astype(np.int32) if documented else None
    mask = np.broadcast_to(np.arange(S) < keys, (B, T, S)).copy()
    if causal:
        mask &= np.arange(S) <= np.arange(T)[:, None] + offset
    if documented:
        mask &= q_ids[:, :, None] == k_ids[:, None, :]
    block = Blocks(32, 16, 4, 2)
    setting = Setting(causal, 1.0, keys, block, block, block)
    tiles = mask.reshape(B, T // 32, 32, S // 16, 16)
    for of, axes in (("q", (0, 1, 3, 2, 4)), ("k", (0, 3, 1, 2, 4))):
        ranges = _ranges(
            setting, block, jnp.zeros((B, T, 1, 1)), jnp.zeros((B, S, 1, 1)), q_ids, k_ids,
            jnp.array([offset]), of,
        )  # fmt: skip
        for row, tiles_of_row in zip(ranges, tiles.transpose(axes), strict=True):
            for (start, clear, masked, stop), line in zip(row, tiles_of_row, strict=True):
                assert 0 <= start <= clear <= masked <= stop <= len(line)
                assert not line[:start].any()
                assert not line[stop:].any()
                assert line[clear:masked].all()
    if causal and not documented and offset == 0:
        assert ranges[0, :, 0].tolist() == [0, 0, 1, 1, 2, 2, 0, 0]


def test_earlier_documents_are_skipped():
    ids = np.repeat(np.arange(8, dtype=np.int32), 32)[None]
    block, x = Blocks(32, 32, 4, 2), jnp.zeros((1, 256, 1, 1))
    setting = Setting(True, 1.0, 256, block, block, block)
    ranges = _ranges(setting, block, x, x, ids, ids, jnp.array([0]), "q")
    assert [(start, stop) for start, _, _, stop in ranges[0].tolist()] == [
        (i, i + 1) for i in range(8)
    ]


# What they refuse ---------------------------------------------------------------------------------


def _call(H=64, dtype=jnp.bfloat16, **options):
    q, k = jnp.zeros((1, 8, 2, H), dtype), jnp.zeros((1, 8, 1, H), dtype)
    positions = jnp.zeros((1, 8), jnp.int32)
    rope = Rope(jnp.zeros(H // 2), 1.0)
    return rotary_attention(q, k, k, positions, rope, **options)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (dict(implementation="gpu", H=48), "head_dim 48"),
        (dict(implementation="gpu", dtype=jnp.float16), "float16"),
        (dict(implementation="cudnn"), "cuDNN runs on NVIDIA GPUs, not on"),
    ],
)
def test_refuses(options, why):
    with pytest.raises(NotImplementedError, match=why):
        _call(**options)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (dict(dtype=jnp.float32), "bfloat16 and float16, not float32"),
        (dict(q_offset=3), "q_offset must be 0"),
        (dict(q_offset=jnp.int32(0)), "q_offset must be 0"),
        (dict(segment_ids_BT=np.zeros((1, 8), np.int32),
              kv_segment_ids_BS=np.zeros((1, 8), np.int32)), "leave kv_segment_ids_BS out"),
    ],
)  # fmt: skip
def test_cudnn_refuses(options, why, monkeypatch):
    monkeypatch.setattr("pallas_kernels.dispatch.platform", lambda: "gpu")
    with pytest.raises(NotImplementedError, match=why):
        _call(implementation="cudnn", **options)


# Against the reference ----------------------------------------------------------------------------

CASES = {
    "short": ((1, 1, 1, 2, 1, 64), {}),
    "grouped": ((2, 200, 200, 8, 2, 64), {}),
    "offset_and_documents": ((2, 130, 300, 4, 1, 32), {"q_offset": 70, "documents": 3}),
    "documents": ((1, 300, 300, 2, 1, 128), {"documents": 5}),
    "not_causal": ((1, 100, 330, 4, 2, 64), {"causal": False}),
    "blind_queries": ((1, 100, 100, 2, 1, 64), {"q_offset": -40}),
}


@pytest.mark.parametrize(
    ("case", "dtype"), [*((case, "float32") for case in CASES), ("documents", "bfloat16")]
)
def test_attention_and_gradients(case, dtype):
    (B, T, S, N, K, H), options = CASES[case]
    rng = np.random.default_rng(len(case))
    some = lambda *shape: jnp.asarray(rng.standard_normal(shape), dtype)
    q, k, v, d_out = some(B, T, N, H), some(B, S, K, H), some(B, S, K, H), some(B, T, N, H)
    ids = lambda n: np.sort(rng.integers(0, options["documents"], (B, n), dtype=np.int32), axis=1)
    if "documents" in options:
        options = options | dict(segment_ids_BT=ids(T), kv_segment_ids_BS=ids(S))
        del options["documents"]
    positions, kv_positions = (rng.integers(0, 3000, (B, n), dtype=np.int32) for n in (T, S))
    rope = Rope(np.float32(1e4 ** (-np.arange(0, H, 2) / H)), 1.1)

    def run(implementation, q_offset, *arrays):
        attend = lambda q, k, v: rotary_attention(
            q, k, v, positions, rope, kv_positions_BS=kv_positions, q_offset=q_offset,
            implementation=implementation,
            **{name: x for name, x in options.items() if name != "q_offset"},
        )  # fmt: skip
        out, pull = jax.vjp(attend, *arrays[:3])
        return out, *pull(arrays[3])

    offset = jnp.int32(options.get("q_offset", 0))
    exact = [x.astype(jnp.float32) for x in (q, k, v, d_out)]
    want = jax.jit(run, static_argnums=0)("xla", offset, *exact)
    got = jax.jit(run, static_argnums=0)("gpu", offset, q, k, v, d_out)
    for x, reference in zip(got, map(np.float64, want), strict=True):
        assert x.dtype == dtype
        far = np.linalg.norm(np.float64(x) - reference)
        limit = 5e-6 if dtype == "float32" else 1e-2
        # One key has weight 1 whatever its score: its gradient is rounding.
        assert far <= limit * max(np.linalg.norm(reference), 1 if case == "short" else 0)
    if case == "blind_queries":
        assert not np.asarray(got[0])[:, :40].any()
        assert not np.asarray(got[1])[:, :40].any()
