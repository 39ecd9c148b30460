"""The kernel benchmark runs at a small size, and its numbers are correct."""

import argparse
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.kernels import __main__ as bench
from benchmarks.kernels import cases as bench_cases
from benchmarks.kernels import compiled as bench_compiled


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setitem(bench_cases.MODELS, "8B", (4, 2, 64))
    monkeypatch.setattr(bench_cases, "TOKENS", 1024)
    monkeypatch.setattr(bench, "CACHES", ((2, 64),))
    monkeypatch.setattr(bench, "rounds", _once)


def _once(run):
    run(1)
    return 0.5, 0.0


def test_timing_on_a_present_chip(small, tmp_path, capsys):
    args = argparse.Namespace(models=["8B"], lengths=[512], results=tmp_path)
    bench.keep(args, "a Machine (of kind 3)", bench.timed(args, jax.devices()[0]))
    kept = json.loads((tmp_path / "kernels-a-machine-of-kind-3.json").read_text())
    plain, documents, decode = kept["rows"]
    for row in (plain, documents):
        assert row["error"] < 1e-2
        assert row["both"]["ms"] == 500
    # 2 rows of 512 * 513 / 2 pairs, 4 heads of 64, 4 operations each, in half a second.
    flops = 4 * 4 * 64 * 2 * 512 * 513 // 2
    assert plain["forward"]["tflops"] == pytest.approx(flops / 0.5e12)
    assert documents["forward"]["tflops"] <= plain["forward"]["tflops"]
    assert decode["S"] == 64
    assert "8B T    512" in capsys.readouterr().out


def test_a_wrong_kernel_shows_in_its_error(small, monkeypatch):
    wrong = lambda q, k, v, positions, rope, ids: q * 1.0
    monkeypatch.setattr(bench, "candidates", lambda *_: {"wrong": wrong})
    monkeypatch.setattr(bench, "decoding", list)
    args = argparse.Namespace(models=["8B"], lengths=[512])
    assert bench.timed(args, jax.devices()[0])[0]["error"] > 0.5


def test_reference_is_float32_whatever_the_block(small):
    arrays, positions, ids, _ = bench.inputs("8B", 512, True)
    rope = bench_cases.rope_of(64)
    whole, parts = (
        bench.reference(*arrays, positions, rope, ids, block=block) for block in (512, 64)
    )
    for x, y in zip(whole, parts, strict=True):
        assert x.dtype == jnp.float32
        np.testing.assert_allclose(x, y, atol=1e-5)


def test_bytes_around(users_compilation):
    x = jax.ShapeDtypeStruct((64, 32), jnp.bfloat16)
    program = jax.jit(lambda x: jnp.sin(x.T.astype(jnp.float32))).lower(x).compile()
    assert bench_compiled.bytes_around(program.as_text()) == 64 * 32 * (2 + 4)
    nothing = jax.jit(lambda x: x).lower(x).compile()
    assert bench_compiled.bytes_around(nothing.as_text()) <= 2 * 64 * 32 * 2


def test_compiled(small, tmp_path, capsys, monkeypatch):
    """All of it for a present chip, except for a TPU's schedules."""
    monkeypatch.setattr(bench_compiled, "CACHES", ((2, 64),))
    args = argparse.Namespace(models=["8B"], lengths=[512], results=tmp_path, chip="cpu")
    rows = bench_compiled.compiled(args, jax.devices()[0], str(tmp_path))
    plain, documents, decode = rows
    for row in (plain, documents):
        assert 0 < row["forward"]["moved_mb"] < row["both"]["moved_mb"]
    # Both caches read, at the least.
    assert decode["decode"]["moved_mb"] > 0.0
    assert "  3/3   8B decode, 2 rows of 64" in capsys.readouterr().out


def test_the_printed_line_lists_the_loops():
    """And states the floor of the matrix unit beside the bundles of a head."""
    both = dict(temporary_mib=96.04, moved_mb=143.4)
    head = dict(bundles=91296, mxu_floor=92160, at_least=102501)
    loops = dict(program=1, full=2198, partial=2434, **head)
    row = dict(
        model="8B", T=4096, implementation="tpu", both=both | {"bundles": {"backward": loops}}
    )
    assert bench_compiled.line(row).split(" | ") == [
        "  8B T   4096                tpu      both 96.0 MiB, 143 MB",
        "backward bundles: full 2,198, partial 2,434; a head at least 102,501 cycles "
        "(bundles 91,296, floor of the matrix unit 92,160)",
    ]
