"""Rotary attention compiled for absent TPUs by libtpu on a CPU."""

import importlib.metadata

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from llama_jax.chips import topology
from pallas_kernels import Rope, rotary_attention

MIB = 1 << 20


@pytest.fixture(scope="module")
def compiler():
    pytest.importorskip("libtpu", reason="needs libtpu")
    with pytest.MonkeyPatch.context() as patch:
        # libtpu would ask a cloud machine's metadata, and let one process in at a time.
        patch.setenv("TPU_SKIP_MDS_QUERY", "1")
        patch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "true")
        yield


needs_compiler = pytest.mark.usefixtures("compiler")


def compiled_for(chip, function, *shapes):
    """The function compiled for one chip by name; shapes are ShapeDtypeStructs."""
    mesh = Mesh(np.array(topology(chip)[:1]), ("x",), axis_types=(AxisType.Explicit,))
    where = NamedSharding(mesh, PartitionSpec())
    place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)
    with jax.set_mesh(mesh):
        return jax.jit(function).lower(*jax.tree.map(place, shapes)).compile()


def both_ways(q, k, v, d_out, positions, inv_freq, ids, offset):
    """Attention and its gradients by the default implementation of the platform.

    Arrays are [B, T, N * H], as projections have them: XLA may store arguments with a separate N in
    another layout and copy them.
    """
    H = 2 * inv_freq.shape[0]
    heads = lambda x: x.reshape(*x.shape[:2], -1, H)

    def attend(q, k, v):
        out = rotary_attention(
            *map(heads, (q, k, v)), positions, Rope(inv_freq, 1.0), segment_ids_BT=ids,
            q_offset=offset,
        )  # fmt: skip
        return out.reshape(q.shape)

    out, pull = jax.vjp(attend, q, k, v)
    return out, *pull(d_out)


def arguments(B, T, N, K, H, dtype="bfloat16", documents=True):
    """Shapes for :func:`both_ways`."""
    of = jax.ShapeDtypeStruct
    q, k, at = of((B, T, N * H), dtype), of((B, T, K * H), dtype), of((B, T), jnp.int32)
    ids = at if documents else None
    return q, k, k, q, at, of((H // 2,), jnp.float32), ids, of((), jnp.int32)


@needs_compiler
@pytest.mark.parametrize(
    ("chip", "T", "K", "H", "documents", "dtype"),
    [
        ("v5e", 2048, 2, 128, True, "bfloat16"),
        ("v5e", 4096, 1, 128, True, "bfloat16"),
        ("v5e", 8192, 1, 128, True, "bfloat16"),
        ("v5e", 32768, 1, 128, True, "bfloat16"),
        ("v5p", 2048, 2, 64, True, "bfloat16"),
        ("v5p", 4096, 1, 128, False, "bfloat16"),
        ("v5p", 8192, 1, 128, True, "bfloat16"),
        ("v5p", 32768, 1, 128, True, "bfloat16"),
        ("v6e", 2048, 1, 128, True, "float32"),
        ("v6e", 4096, 1, 64, False, "bfloat16"),
        ("v6e", 8192, 2, 128, False, "bfloat16"),
        ("v6e", 32768, 1, 128, True, "bfloat16"),
        ("v5p", 1000, 1, 128, True, "bfloat16"),
        ("tpu7x", 8192, 1, 128, False, "bfloat16"),
        ("tpu7x", 16384, 1, 128, True, "bfloat16"),
    ],
)
def test_attention_compiles(chip, T, K, H, documents, dtype):
    """Forward and backward with a traced offset: temporary memory is O(T), never O(T * T).

    It holds two tables of cos and sin, which XLA writes in halves first; one number per query and
    head; copies of inputs and outputs if H is 64 or T is padded; beyond T = 4096 rotated keys,
    which are streamed, and one more table; the gradients of a single key head from each core of a
    v5p. Before its version 0.0.50, libtpu stores the copies for H = 64 also where the results will
    be; then their bytes are not counted.
    """
    N = 4
    program = compiled_for(chip, both_ways, *arguments(1, T, N, K, H, dtype, documents))
    text = program.as_text()
    assert "rotary_attention_forward" in text
    assert "rotary_attention_backward" in text
    row = T * 128 * (4 if dtype == "float32" else 2)
    long = T > 4096
    tables = (5 if long else 4) * T * 128 * 4
    heads = (2 * N + 2 * K) * row if H == 64 or T % 128 else (2 if long else 1) * K * row
    heads += 4 * row if chip == "v5p" and K == 1 else 0
    libtpu = tuple(map(int, importlib.metadata.version("libtpu").split(".")[:3]))
    heads += (2 * N + 2 * K) * T * H * 2 if H == 64 and libtpu >= (0, 0, 50) else 0
    assert program.memory_analysis().temp_size_in_bytes < tables + heads + MIB


def test_too_many_keys_for_vmem_are_refused(monkeypatch):
    """The float32 gradients of a head's keys stay in VMEM."""
    monkeypatch.setattr("pallas_kernels.dispatch.platform", lambda: "tpu")
    monkeypatch.setattr("pallas_kernels.dispatch.device_kind", lambda: "TPU v5")
    shape = jax.ShapeDtypeStruct((1, 1 << 17, 1, 128), jnp.bfloat16)
    positions = jax.ShapeDtypeStruct((1, 1 << 17), jnp.int32)

    def attend(q, positions):
        rope = Rope(jnp.ones(64), 1.0)
        return rotary_attention(q, q, q, positions, rope, implementation="tpu")

    with pytest.raises(NotImplementedError, match=r"131072 keys.*do not fit 64 MiB of VMEM"):
        jax.eval_shape(attend, shape, positions)
