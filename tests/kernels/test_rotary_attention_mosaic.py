"""The Mosaic GPU attention kernel in its interpreter, which detects races, and compiled for Hopper.

The interpreter runs a product of the tensor cores at once. So it misses two mistakes: no fence
between the writes of the queries and the product that reads them (checked in the machine code
here), and a slot of keys that is handed back while a product still reads it.
"""

import functools
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_rotary_attention as suite
from test_compile_gpu import _arguments as shapes
from test_compile_gpu import _attend, compiled_for
from test_kernels import TOLERANCE, relative_l2

from pallas_kernels import Rope, rotary_attention

SUPPORTED = jax.__version_info__ >= (0, 11)

CASES = {
    "documents": ((2, 200, 200, 4, 2, 64), {"documents": 6, "positions": 150}),
    "shard": ((1, 140, 520, 2, 1, 128), {"strewn": 3, "q_offset": 250, "rope_scale": 1.3}),
    "fully_masked_queries": ((1, 200, 200, 3, 1, 64), {"q_offset": -140}),
    "not_causal": ((1, 130, 290, 2, 1, 128), {"causal": False, "scale": 0.2}),
}


def _forward(case):
    """The output, and what it should be."""
    arrays, q_pos, rope, keywords, want = suite._arguments(case, "bfloat16")
    keywords = dict(keywords)

    @jax.jit
    def run(q, k, v, q_offset):
        return rotary_attention(
            q, k, v, q_pos, rope, **keywords, q_offset=q_offset, implementation="mosaic"
        )

    offset = jnp.int32(keywords.pop("q_offset"))
    return np.float32(run(*arrays[:3], offset)), want()[0]


def _call(H=64, dtype=jnp.bfloat16):
    q, k = jnp.zeros((1, 8, 2, H), dtype), jnp.zeros((1, 8, 1, H), dtype)
    rope = Rope(jnp.zeros(H // 2), 1.0)
    return rotary_attention(q, k, k, jnp.zeros((1, 8), jnp.int32), rope, implementation="mosaic")


@pytest.fixture
def disassembler(monkeypatch):
    """Prints what the assembler says and its machine code, during compilation."""
    pytest.importorskip("jax_cuda13_plugin", reason="needs jax's CUDA plugin")
    package = pytest.importorskip("nvidia.cu13", reason="needs nvidia-cuda-nvdisasm")
    root = next(p for p in package.__path__ if (pathlib.Path(p) / "bin/nvdisasm").exists())
    monkeypatch.setenv("MOSAIC_GPU_CUDA_ROOT", root)
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTXAS", "1")
    monkeypatch.setenv("MOSAIC_GPU_DUMP_SASS", "1")


def opcodes(text):
    """Of a disassembled kernel, in the order of the listing."""
    return re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+ )?\s*([A-Z][\w.]+)", text, re.M)


if not SUPPORTED:

    def test_an_older_jax():
        with pytest.raises(NotImplementedError, match=r"need jax 0\.11 or newer; this is 0\.10"):
            _call()

else:

    @pytest.mark.parametrize("case", CASES)
    def test_attention(case, capfd):
        out, exact = _forward(CASES[case])
        assert "RACE" not in "".join(capfd.readouterr())
        assert relative_l2(out, exact) < TOLERANCE["bfloat16"]
        blind = np.abs(exact).max(-1) == 0
        assert blind.any() or case != "fully_masked_queries"
        assert (out[blind] == 0).all()

    def test_gradients(capfd):
        """By the kernels of "gpu", from what this kernel saves."""
        suite._check(((1, 150, 150, 2, 1, 64), {"documents": 3}), "bfloat16", "mosaic")
        assert "RACE" not in "".join(capfd.readouterr())

    def test_far_positions():
        """Angles are exact where the kernel approximates other functions."""
        arrays, q_pos, rope, keywords, _ = suite._arguments(
            ((1, 130, 130, 1, 1, 64), {"positions": 1 << 20}), "bfloat16"
        )
        run = lambda name: rotary_attention(
            *arrays[:3], q_pos, rope, **keywords, implementation=name
        )
        assert relative_l2(run("mosaic"), np.float64(run("xla"))) < TOLERANCE["bfloat16"]

    def test_a_race_is_reported(capfd, monkeypatch):
        """The kernel without its fences: jax 0.11 prints a race, 0.12 raises."""
        from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

        from pallas_kernels import rotary_attention_mosaic

        monkeypatch.setattr(rotary_attention_mosaic.plgpu, "commit_smem", lambda: None)
        error = ""
        try:
            _forward(((1, 128, 128, 1, 1, 64), {}))
        except Exception as e:
            error = str(e)
            gpu_callbacks.reset_gpu_interpret_mode_state()
        assert "race" in (error + "".join(capfd.readouterr())).lower()

    @pytest.mark.parametrize(
        ("options", "why"), [(dict(H=32), "head_dim 32"), (dict(dtype=jnp.float32), "float32")]
    )
    def test_refuses(options, why):
        with pytest.raises(NotImplementedError, match=why):
            _call(**options)

    def test_too_few_threads(monkeypatch):
        """The interpreter would wait forever."""
        monkeypatch.setattr("jax.device_count", lambda: 1)
        monkeypatch.setattr("os.cpu_count", lambda: 2)
        with pytest.raises(NotImplementedError, match="needs 6 threads"):
            _call()

    @pytest.mark.parametrize(("H", "documents"), [(128, True), (64, False)])
    def test_compiled_for_hopper(H, documents, disassembler, capfd):
        """Products by wgmma without spills; a fence between the queries and the first product."""
        arguments = shapes(1, 4096, 32, 8, H, documents=documents)
        compiled_for("h100", functools.partial(_attend, "mosaic"), *arguments)
        text = capfd.readouterr().out
        assert " 0 bytes spill stores, 0 bytes spill loads" in text
        assert "serialized" not in text
        found = opcodes(text)
        products = [i for i, x in enumerate(found) if x.startswith("HGMMA")]
        # Scores: H / 16; values: 128 / 16; both with and without a mask.
        assert len(products) == 2 * (H // 16 + 8)
        before = found[: products[0]]
        writes = max(i for i, x in enumerate(before) if x.startswith("ST"))
        assert any(x.startswith("FENCE.VIEW.ASYNC") for x in before[writes:])

    def test_other_gpus_are_refused():
        pytest.importorskip("jax_cuda13_plugin", reason="needs jax's CUDA plugin")
        with pytest.raises(NotImplementedError, match=r"Hopper's instructions; this is .*A100"):
            compiled_for("a100", functools.partial(_attend, "mosaic"), *shapes(1, 256, 2, 1, 64))
