"""GPU implementations: documents in cuDNN's format, and unsupported arguments."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_rotary_attention as suite
from test_kernels import relative_l2

from pallas_kernels import Rope, rotary_attention
from pallas_kernels.rotary_attention_cudnn import documents
from pallas_kernels.rotary_attention_gpu import Blocks, KernelConfig, _ranges

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
    got = documents(jnp.asarray(rows), max_documents=3)
    np.testing.assert_array_equal(got[0], starts)
    np.testing.assert_array_equal(got[1], lengths)
    assert got[2]


@pytest.mark.parametrize(
    "rows", [[[1, 2, 3, 4]], [[1, 2, 1, 1]], [[1, 1, 1, 1], [0, 3, 3, 0]], [[1, 2, 1, 2]]]
)
def test_documents_that_offsets_cannot_describe(rows):
    assert not documents(jnp.asarray(rows), max_documents=3)[2]


# Which blocks are visited -------------------------------------------------------------------------


def test_earlier_documents_are_skipped():
    ids = np.repeat(np.arange(8, dtype=np.int32), 32)[None]
    block, x = Blocks(32, 32, 4, 2), jnp.zeros((1, 256, 1, 1))
    config = KernelConfig(True, 1.0, 256, block, block, block)
    ranges = _ranges(config, block, x, x, ids, ids, jnp.array([0]), "q")
    assert [(start, stop) for start, _, _, stop in ranges[0].tolist()] == [
        (i, i + 1) for i in range(8)
    ]


# Unsupported arguments ----------------------------------------------------------------------------


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


def test_jax_without_triton(monkeypatch):
    """The next implementation is tried."""
    monkeypatch.setattr("pallas_kernels.dispatch.platform", lambda: "gpu")
    monkeypatch.setattr("pallas_kernels.rotary_attention_gpu.plt", None)
    with pytest.raises(NotImplementedError, match="has no Triton lowering of Pallas"):
        _call(implementation="gpu")
    assert _call(q_offset=1).shape == (1, 8, 2, 64)


# Against the reference ----------------------------------------------------------------------------


def test_heads_of_32():
    """Only these kernels support it; the other cases are in `test_rotary_attention`."""
    options = {"q_offset": 70, "documents": 3, "positions": 150, "rope_scale": 1.1}
    suite._check(((2, 50, 130, 4, 1, 32), options), "float32", "gpu")


def _by_offsets(causal, scale, q, k, v, starts, lengths):
    """cuDNN's operation computed by XLA: each document, selected by its offset and length."""
    out = []
    for b in range(q.shape[0]):
        at = np.arange(q.shape[1])[:, None]
        inside = (at >= starts[b, :-1]) & (at < starts[b, :-1] + lengths[b])
        same_TT = jnp.any(inside[:, None] & inside[None], axis=-1)
        attend = functools.partial(jax.nn.dot_product_attention, implementation="xla")
        cut = (x[b][None] for x in (q, k, v))
        out.append(attend(*cut, mask=same_TT[None, None], scale=scale, is_causal=causal)[0])
    return jnp.stack(out)


@pytest.mark.parametrize(
    "options",
    [{"scale": 0.2}, {"causal": False}, {"documents": 2}, {"strewn": 2}],
    ids=["plain", "not_causal", "documents", "strewn"],
)
def test_around_cudnn(options, monkeypatch):
    """Rotation, scale, offsets, fallback to our kernel; XLA computes cuDNN's part."""
    plain = functools.partial(jax.nn.dot_product_attention, implementation="xla")
    module = "pallas_kernels.rotary_attention_cudnn."
    monkeypatch.setattr(module + "_check_supported", lambda *_: None)
    monkeypatch.setattr(
        module + "_plain",
        lambda causal, scale, q, k, v: plain(q, k, v, is_causal=causal, scale=scale),
    )
    monkeypatch.setattr(module + "_packed", _by_offsets)
    arrays, q_pos, rope, keywords, _ = suite._arguments(((2, 40, 40, 4, 2, 32), options), "float32")
    ids = keywords["kv_segment_ids_BS"]
    keywords |= {"segment_ids_BT": ids, "kv_segment_ids_BS": None}

    def both_ways(implementation, *arrays):
        attend = lambda q, k, v: rotary_attention(
            q, k, v, q_pos, rope, **keywords, implementation=implementation
        )
        out, pull = jax.vjp(attend, *arrays[:3])
        return out, *pull(arrays[3])

    run = jax.jit(both_ways, static_argnums=0)
    for x, exact in zip(run("cudnn", *arrays), run("xla", *arrays), strict=True):
        assert relative_l2(x, np.float64(exact)) < 5e-6
