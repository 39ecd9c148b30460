"""The Mosaic GPU decode kernel in its interpreter, which detects races, and compiled for Hopper."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_rotary_decode_attention as suite
from test_compile_gpu import compiled_for
from test_rotary_attention_mosaic import SUPPORTED, disassembler, opcodes  # noqa: F401

from pallas_kernels import Rope, rotary_decode_attention


def _zeros(T=1, S=64, H=64, dtype=jnp.bfloat16):
    new, cache = jnp.zeros((1, T, 2, H), dtype), jnp.zeros((1, 1, 2, S, H), dtype)
    rope = Rope(jnp.zeros(H // 2), 1.0)
    lengths = jnp.zeros(1, jnp.int32)
    return rotary_decode_attention(
        new, new, new, cache, cache, 0, lengths, rope, implementation="mosaic"
    )


if not SUPPORTED:

    def test_an_older_jax():
        with pytest.raises(NotImplementedError, match=r"need jax 0\.11 or newer; this is 0\.10"):
            _zeros()

else:

    @pytest.mark.parametrize("case", ["h64_odd", "h128_few"])
    def test_decode(case, capfd):
        """Output and caches, with NaN in invalid positions."""
        arguments = suite._arguments(case, "bfloat16", dead=np.nan)
        rope = suite.rope_for(arguments[0].shape[3])
        want = suite.decode64(*map(np.float64, arguments[:5]), *arguments[5:], rope)
        got = suite._decode("mosaic")(*arguments, rope)
        assert "RACE" not in "".join(capfd.readouterr())
        assert suite.relative_l2(got[0], want[0]) < suite.TOLERANCE["bfloat16"]
        for x, exact, before in zip(got[1:], want[1:], arguments[3:5], strict=True):
            x = np.asarray(x)
            old = np.isnan(exact) | (exact == np.float64(before))
            np.testing.assert_array_equal(np.float32(x[old]), np.float32(before[old]))
            assert suite.relative_l2(x[~old], exact[~old]) < suite.TOLERANCE["bfloat16"]

    def test_a_chunk_of_a_prompt(capfd):
        """More queries than rows of a program."""
        B, T, S, N, K, H = 1, 50, 140, 4, 2, 64
        rng = np.random.default_rng(0)
        q, k, v = (suite.normal(rng, (B, T, n, H), "bfloat16") for n in (N, K, K))
        caches = [suite.normal(rng, (1, B, K, S, H), "bfloat16") for _ in range(2)]
        arguments = q, k, v, *caches, 0, np.array([77], np.int32)
        rope = suite.rope_for(H)
        want = suite.decode64(*map(np.float64, arguments[:5]), *arguments[5:], rope)
        got = suite._decode("mosaic")(*arguments, rope)
        assert "RACE" not in "".join(capfd.readouterr())
        assert suite.relative_l2(got[0], want[0]) < suite.TOLERANCE["bfloat16"]

    @pytest.mark.parametrize(
        ("options", "why"),
        [
            (dict(H=32), "head_dim 32"),
            (dict(dtype=jnp.float32), "float32, cache float32"),
            (dict(S=63), "cache length 63"),
        ],
    )
    def test_refuses(options, why):
        with pytest.raises(NotImplementedError, match=why):
            _zeros(**options)

    def test_compiled_for_hopper(disassembler, capfd):
        """Products by wgmma without spills; the caches are written in place."""
        B, T, N, K, S, H = 4, 1, 32, 8, 8192, 128
        of = jax.ShapeDtypeStruct
        new = [of((B, T, n, H), jnp.bfloat16) for n in (N, K, K)]
        cache = of((2, B, K, S, H), jnp.bfloat16)
        program = compiled_for(
            "h100",
            lambda q, k, v, cache_k, cache_v, layer, lengths, inv_freq: rotary_decode_attention(
                q, k, v, cache_k, cache_v, layer, lengths, Rope(inv_freq, 1.0),
                implementation="mosaic",
            ),
            *new, cache, cache, of((), jnp.int32), of((B,), jnp.int32), of((H // 2,), jnp.float32),
            donate=(3, 4),
        )  # fmt: skip
        text = capfd.readouterr().out
        assert " 0 bytes spill stores, 0 bytes spill loads" in text
        assert "serialized" not in text
        # Scores: H / 16; values: 64 / 16; both with and without a mask.
        assert sum(x.startswith("HGMMA") for x in opcodes(text)) == 2 * (H // 16 + 4)
        memory = program.memory_analysis()
        assert memory.alias_size_in_bytes == 2 * math.prod(cache.shape) * 2
        # Eight rows of a key head are written for each split.
        assert memory.temp_size_in_bytes < 8 * B * K * 8 * (H + 2) * 4
