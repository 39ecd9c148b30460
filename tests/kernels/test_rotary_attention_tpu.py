"""TPU implementation: chunks, races, block sizes, and unsupported arguments."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from test_kernels import reference, relative_l2, rope_for

from pallas_kernels import Rope, rotary_attention
from pallas_kernels.ranges import block_ranges
from pallas_kernels.rotary_attention_tpu import KernelConfig, visible_pairs
from pallas_kernels.rotary_attention_tpu_sizes import sizes


def _inputs(T, N, K, H, documents):
    rng = np.random.default_rng(0)
    some = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
    arrays = some(1, T, N, H), some(1, T, K, H), some(1, T, K, H), some(1, T, N, H)
    ids = np.sort(rng.integers(0, documents, (1, T), dtype=np.int32), axis=1)
    return arrays, ids


def _positions(T):
    """Small, so that float32 angles are those of float64."""
    return np.arange(T, dtype=np.int32)[None] % 150


def _both_ways(q, k, v, d_out, ids):
    """Output and gradients of the kernels."""
    T, H = q.shape[1], q.shape[3]

    @jax.jit
    def run(q, k, v, d_out):
        attend = lambda q, k, v: rotary_attention(
            q, k, v, _positions(T), rope_for(H), segment_ids_BT=ids, implementation="tpu"
        )
        out, pull = jax.vjp(attend, q, k, v)
        return out, *pull(d_out)

    return run(q, k, v, d_out)


def _check(arrays, ids):
    """The kernels against NumPy in float64."""
    T, H = arrays[0].shape[1], arrays[0].shape[3]
    want = reference(
        *map(np.float64, arrays), _positions(T), _positions(T), rope_for(H), ids, ids, 0, True,
        H**-0.5,
    )  # fmt: skip
    for got, exact in zip(_both_ways(*arrays, ids), want, strict=True):
        assert relative_l2(got, exact) < 5e-6


def _in_chunks(monkeypatch, T, heads=1):
    """Streams keys and queries through VMEM in halves, in blocks of 128, as for long sequences."""
    chosen = (heads, 128, 128, T // 2, T // 2, T // 2, 60 << 20, True)
    monkeypatch.setattr("pallas_kernels.rotary_attention_tpu.sizes", lambda *_: chosen)


@pytest.mark.parametrize("heads", [1, 2])
def test_streamed_in_chunks(heads, monkeypatch):
    _in_chunks(monkeypatch, 512, heads)
    _check(*_inputs(512, 4, 2, 64, 3))


def test_blocks_of_1024(monkeypatch):
    """As on a TPU7x: a full block and two on the diagonal."""
    chosen = (1, 1024, 1024, 2048, 2048, 2048, 60 << 20, True)
    monkeypatch.setattr("pallas_kernels.rotary_attention_tpu.sizes", lambda *_: chosen)
    arrays, _ = _inputs(2048, 1, 1, 128, 1)
    _check(arrays, None)


@pytest.mark.parametrize(
    ("T", "N", "K", "H", "documents", "heads"),
    [(300, 8, 2, 128, 4, 4), (384, 3, 1, 64, 1, 3), (600, 4, 2, 64, 5, 2), (130, 12, 2, 128, 2, 3)],
)
def test_query_heads_together(T, N, K, H, documents, heads, monkeypatch):
    """As on a TPU7x: query heads of a key head are rows of the same products."""
    monkeypatch.setattr("pallas_kernels.dispatch.device_kind", lambda: "TPU7x")
    assert sizes(T, T, H, N // K, 4, True)[0] == heads
    _check(*_inputs(T, N, K, H, documents))


@pytest.mark.parametrize(("N", "H"), [(4, 64), (2, 128)])
def test_both_cores_share_one_key_head(N, H, monkeypatch):
    """B * K = 1 on a v5p: the query heads are divided, and the gradients of the keys summed."""
    arrays, ids = _inputs(300, N, 1, H, 3)
    monkeypatch.setattr("pallas_kernels.dispatch.device_kind", lambda: "TPU v5")
    _check(arrays, ids)
    program = str(jax.make_jaxpr(lambda *x: _both_ways(*x, ids))(*arrays))
    grids = re.findall(r"grid=\((\d+), (\d+), \d+, \d+, \d+\)", program)
    assert grids == [("1", "2")] * 2


@pytest.mark.parametrize("chunked", [False, True])
def test_no_races_and_no_unset_memory(chunked, monkeypatch):
    """Interpreter mode that simulates DMAs: unwritten memory is NaN, and races are detected."""
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call

    if chunked:
        _in_chunks(monkeypatch, 256, heads=2)
    params = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
    with pltpu.force_tpu_interpret_mode(params):
        _check(*_inputs(256, 2, 1, 128, 3))
    assert interpret_pallas_call.races is not None
    assert not interpret_pallas_call.races.races_found


# 17 and -31: the last query of a block attends only to the first key of a block.
@pytest.mark.parametrize("offset", [0, 17, -31, 1000, -1000])
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_ranges_hold_all_visible_pairs(offset, documents, causal):
    """Against the dense mask: all visible pairs are in range, and full blocks mask none."""
    B, T, S, keys, rng = 2, 96, 128, 117, np.random.default_rng(0)
    q_ids = np.sort(rng.integers(0, 4, (B, T)), axis=1) if documents else None
    k_ids = rng.integers(0, 4, (B, S)) if documents else None
    mask = np.broadcast_to(np.arange(S) < keys, (B, T, S)).copy()
    if causal:
        mask &= np.arange(S) <= np.arange(T)[:, None] + offset
    if documents:
        mask &= q_ids[:, :, None] == k_ids[:, None, :]
    tiles = mask.reshape(B, T // 32, 32, S // 16, 16)
    as_jax = lambda x: None if x is None else jnp.asarray(x)
    for of, axes in (("q", (0, 1, 3, 2, 4)), ("k", (0, 3, 1, 2, 4))):
        found = block_ranges(
            of, 32, 16, (B, T, S), keys, causal, offset, as_jax(q_ids), as_jax(k_ids)
        )
        assert found.shape == (B, *tiles.transpose(axes).shape[1:2], 4)
        for row, tiles_of_row in zip(found, tiles.transpose(axes), strict=True):
            for (start, full_start, full_stop, stop), line in zip(row, tiles_of_row, strict=True):
                assert 0 <= start <= full_start <= full_stop <= stop <= len(line)
                assert not line[:start].any()
                assert not line[stop:].any()
                assert line[full_start:full_stop].all()


def test_ranges_leave_out_other_documents():
    """Four documents of one block each: a block visits only its own."""
    ids = jnp.repeat(jnp.arange(4), 32)[None]
    for of in "qk":
        found = block_ranges(of, 32, 32, (1, 128, 128), 128, False, 0, ids, ids)
        assert found[0].tolist() == [[i, i, i + 1, i + 1] for i in range(4)]
        mixed = jnp.arange(128)[None] % 2
        found = block_ranges(of, 32, 32, (1, 128, 128), 128, False, 0, mixed, mixed)
        assert found[0].tolist() == [[0, 4, 4, 4]] * 4


@pytest.mark.parametrize("offset", [0, 5, -3, 100, -100])
@pytest.mark.parametrize(("T", "S"), [(1, 1), (7, 7), (4, 12), (12, 4)])
def test_cost_counts_the_visible_pairs(T, S, offset):
    config = KernelConfig(True, 1.0, offset, T, S, 1, 1, 128, 128, S, T, S, 0, True)
    visible = np.arange(S)[None] <= np.arange(T)[:, None] + offset
    assert visible_pairs(config) == visible.sum()
    assert visible_pairs(config._replace(offset=None)) == T * S
    assert visible_pairs(config._replace(causal=False)) == T * S


@pytest.mark.parametrize("G", [1, 4])
@pytest.mark.parametrize("kind", ["TPU v5", "TPU v6 lite", "TPU7x"])
@pytest.mark.parametrize("T", [1, 128, 600, 2048, 4096, 8192, 32768])
def test_sizes_cover_the_sequence(T, kind, G, monkeypatch):
    monkeypatch.setattr("pallas_kernels.dispatch.device_kind", lambda: kind)
    for documents in (False, True):
        _, block_q, block_k, *parts, _, _ = sizes(T, T, 128, G, 2, documents)
        for part, block in zip(parts, (block_k, block_q, block_k), strict=True):
            padded = T + -T % block
            assert padded - T <= max(T // 8, 127)
            assert padded % part == 0
            assert part % block == 0
            if T <= 4096 and G == 1:
                assert part == padded


@pytest.mark.parametrize(
    ("kind", "T", "S", "G", "documents", "blocks"),
    [
        ("TPU v6 lite", 4096, 4096, 1, False, (1, 1024, 1024)),
        ("TPU v6 lite", 4096, 4096, 1, True, (1, 512, 512)),
        ("TPU v6 lite", 2048, 2048, 1, False, (1, 512, 512)),
        # A chunk of a prompt, with the cache as keys.
        ("TPU v6e", 1024, 8192, 1, False, (1, 1024, 1024)),
        ("TPU v6 lite", 4096, 4096, 8, True, (4, 256, 512)),
        ("TPU7x", 16384, 16384, 4, True, (4, 256, 512)),
        ("TPU7x", 2048, 2048, 6, False, (3, 256, 512)),
        ("TPU7x", 2048, 2048, 2, False, (2, 512, 512)),
        ("TPU7x", 200, 4096, 4, False, (4, 128, 512)),
        # The float32 gradients of the keys leave no space for larger blocks.
        ("TPU7x", 32768, 32768, 1, False, (1, 512, 512)),
        ("TPU v5", 8192, 8192, 4, False, (1, 512, 512)),
        ("TPU v5 lite", 8192, 8192, 4, False, (1, 512, 512)),
    ],
)
def test_blocks_fit_the_chip(kind, T, S, G, documents, blocks, monkeypatch):
    monkeypatch.setattr("pallas_kernels.dispatch.device_kind", lambda: kind)
    assert sizes(T, S, 128, G, 2, documents)[:3] == blocks


@pytest.mark.parametrize(
    ("H", "dtype", "platform", "why"),
    [
        (48, "float32", "cpu", "head_dim 48: the TPU kernels support 64 and 128"),
        (64, "float16", "cpu", "float16: the TPU kernels support float32 and bfloat16"),
        (64, "float32", "gpu", "'tpu' runs on tpu, not on gpu"),
    ],
)
def test_refuses(H, dtype, platform, why, monkeypatch):
    monkeypatch.setattr("pallas_kernels.dispatch.platform", lambda: platform)
    q, positions = jnp.zeros((1, 8, 2, H), dtype), jnp.zeros((1, 8), jnp.int32)
    with pytest.raises(NotImplementedError, match=why):
        rotary_attention(q, q, q, positions, Rope(jnp.zeros(H // 2), 1.0), implementation="tpu")
