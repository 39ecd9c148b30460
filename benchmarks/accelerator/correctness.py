"""Step 1: every kernel of the platform against the reference in float32.

Each program runs with two sets of inputs. Its outputs are written over arrays of NaN, and memory
that is free is filled with NaN first, so an element that the kernel does not write is found. The
second run is repeated: the results must be equal bit for bit.
"""

import functools
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.accelerator import generate
from benchmarks.accelerator.common import Row, Rows, Sizes, random_arrays
from llama_jax.config import MODELS
from llama_jax.model.llama import ComputeConfig, KVCache
from llama_jax.model.params import merge, structure
from llama_jax.model.quantize import is_quantized
from pallas_kernels import Rope, dispatch, rotary_attention, rotary_decode_attention
from pallas_kernels.rotary_attention import _IMPLEMENTATIONS as ATTENTION
from pallas_kernels.rotary_decode_attention import _IMPLEMENTATIONS as DECODE

LIMIT = 1e-2
"""|got - want| / |want|: bfloat16 rounds each number by up to 0.4 %"""
WORST = 5e-2
"""the same of the worst head and position"""
MODEL_LIMIT = 3e-2
"""of logits: the roundings of all layers add up"""
KINDS = ("bfloat16", "int8", "int4")
UNORDERED = ("cudnn",)
"""implementations whose backward pass sums in any order, so that a repeat may differ"""


def kernels(table: Mapping[str, Any]) -> list[str]:
    """The implementations of this platform, without the reference; on a CPU, those of a GPU."""
    here = dispatch.platform() if dispatch.platform() != "cpu" else "gpu"
    return [name for name, (where, _) in table.items() if name != "xla" and here in where]


def rows(s: Sizes, earlier: dict[str, Row]) -> Rows:
    step = 1 if s.every_row else 2
    for case, make in list(attention_cases(s).items())[::step]:
        want: dict[int, Any] = {}  # computed once, by the first implementation
        for name in kernels(ATTENTION):
            yield (
                f"right: attention {name}, {case}",
                functools.partial(check_attention, name, make, want),
            )
    for case, shape in list(decode_cases(s).items())[::step]:
        for name in kernels(DECODE):
            yield f"right: decode {name}, {case}", functools.partial(check_decode, name, *shape)
    for kind in KINDS[::step]:
        yield f"right: decoding step by step, {kind}", functools.partial(check_model, kind)


def rope_of(H: int) -> Rope:
    return Rope(jnp.asarray(5e5 ** (-np.arange(0, H, 2) / H), jnp.float32), 1.0)


# Attention ----------------------------------------------------------------------------------------


def attention_cases(s: Sizes) -> dict[str, Callable[[int], tuple]]:
    """Name -> function of a seed: arrays (q, k, v, d_out) and further arguments by name."""
    T, H = s.check_T, s.heads[2]
    return {
        f"H {H}": functools.partial(_attention_inputs, T, T, H),
        f"H {H // 2}": functools.partial(_attention_inputs, T, T, H // 2),
        "q_offset": functools.partial(_attention_inputs, T // 3, T, H),
        "documents": functools.partial(_attention_inputs, T, T, H, documents=True),
        "masked rows": functools.partial(_attention_inputs, T, T, H, masked=True),
        f"not causal, positions to {s.last_position}": functools.partial(
            _attention_inputs, T, T, H, first=s.last_position + 1 - T, causal=False
        ),
    }


def _attention_inputs(T, S, H, seed, documents=False, masked=False, first=0, causal=True):
    B, N, K = 2, 4, 2
    arrays = random_arrays(seed, [(B, T, N, H), (B, S, K, H), (B, S, K, H), (B, T, N, H)])
    keys = jnp.broadcast_to(first + jnp.arange(S, dtype=jnp.int32), (B, S))
    positions = keys[:, S - T :]
    more = {"positions_BT": positions, "kv_positions_BS": keys}
    static = {"causal": causal}
    if S != T:
        static["q_offset"] = S - T
    if documents or masked:
        rng = np.random.default_rng(seed)
        ids = np.cumsum(rng.random((B, S)) < 8 / S, axis=1, dtype=np.int32)
        ids[:, -S // 20 :] = ids.max() + 1  # padding
        more["segment_ids_BT"] = jnp.asarray(ids)
    if masked:  # queries of an id that no key has
        own = ids.copy()
        own[:, S // 3 : S // 2] = 10_000
        more["segment_ids_BT"], more["kv_segment_ids_BS"] = jnp.asarray(own), jnp.asarray(ids)
    return arrays, more, static


def attention_program(static, implementation, _, q, k, v, d_out, more):
    """The function to compile: output and gradients."""
    attend = lambda q, k, v: rotary_attention(
        q, k, v, more["positions_BT"], rope_of(q.shape[-1]), implementation=implementation,
        **{n: x for n, x in more.items() if n != "positions_BT"}, **static,
    )  # fmt: skip
    out, pull = jax.vjp(attend, q, k, v)
    return out, *pull(d_out)


def check_attention(name: str, make: Callable[[int], Any], want: dict[int, Any]) -> Row:
    """Forward and backward."""
    static = make(0)[2]
    both = lambda implementation: functools.partial(attention_program, static, implementation)
    program, errors, worst = None, [], []
    for seed in (0, 1):
        arrays, more, _ = make(seed)
        if program is None:
            program = _Poisoned(both(name), (*arrays, more))
        if seed not in want:
            wide = [x.astype(jnp.float32) for x in arrays]
            want[seed] = jax.device_get(_reference(both("xla"))(None, *wide, more))
        got = program(*arrays, more)
        pairs = [relative_errors(g, w) for g, w in zip(got, want[seed], strict=True)]
        errors.append([whole for whole, _ in pairs])
        worst.append([most for _, most in pairs])
    same = _same(got, program(*arrays, more))
    found = dict(zip(("out", "d_q", "d_k", "d_v"), np.max(errors, axis=0).tolist(), strict=True))
    found["worst row"] = float(np.max(worst))
    wrong = _too_large(found)
    if not same and name not in UNORDERED:
        wrong.append("a repeat with the same inputs differs")
    return {"numbers": found, "wrong": "; ".join(wrong), "repeat": "equal" if same else "differs"}


# Decoding -----------------------------------------------------------------------------------------


def decode_cases(s: Sizes) -> dict[str, tuple]:
    """Name -> T, S, H, lengths."""
    H, S = s.heads[2], s.check_S
    lengths = lambda T: [n for n in (0, 1, 63, 64, S - T) if n <= S - T]
    chunk = S // 4
    return {
        f"T 1, H {H}": (1, S, H, lengths(1)),
        "T 4": (4, S, H, lengths(4)),
        f"T {chunk}": (chunk, S, H, lengths(chunk)),
        f"position {s.last_position}, H {H // 2}": (
            1,
            s.last_position + 1,
            H // 2,
            [s.last_position],
        ),
    }


def decode_program(implementation, _, q, k, v, cache_k, cache_v, lengths):
    """The function to compile: output and the two caches."""
    return rotary_decode_attention(
        q, k, v, cache_k, cache_v, 1, lengths, rope_of(q.shape[-1]), implementation=implementation
    )


def check_decode(name: str, T: int, S: int, H: int, lengths: list[int]) -> Row:
    """Output and caches; slots that hold nothing are NaN before."""
    B, N, K, L = len(lengths), 8, 2, 2

    length_B = jnp.asarray(lengths, jnp.int32)
    live = (jnp.arange(S) < length_B[:, None])[None, :, None, :, None]
    written = np.asarray(jnp.arange(S)[None] >= length_B[:, None]) & np.asarray(
        jnp.arange(S)[None] < length_B[:, None] + T
    )
    program, errors, wrong = None, [], []
    for seed in (0, 1):
        q, k, v, *caches = random_arrays(
            seed, [(B, T, N, H), (B, T, K, H), (B, T, K, H), *[(L, B, K, S, H)] * 2]
        )
        caches = [jnp.where(live, x, jnp.nan) for x in caches]
        if program is None:
            arguments = (q, k, v, *caches, length_B)
            program = _Poisoned(functools.partial(decode_program, name), arguments, donated=(4, 5))
        wide = [x.astype(jnp.float32) for x in (q, k, v, *caches)]
        want = _reference(functools.partial(decode_program, "xla"))(None, *wide, length_B)
        got = program(q, k, v, *(x + 0 for x in caches), length_B)
        errors.append(list(relative_errors(got[0], want[0])))
        for before, after, right in zip(caches, got[1:], want[1:], strict=True):
            before, after, right = (
                np.asarray(x.astype(jnp.float32)) for x in (before, after, right)
            )
            new = np.zeros(before.shape, bool)
            new[1] = written[:, None, :, None]
            if not np.allclose(after[new], right[new], rtol=2**-7, atol=2**-6):
                wrong.append("new keys or values in the cache are wrong")
            if not np.array_equal(after[~new], before[~new], equal_nan=True):
                wrong.append("the rest of the cache has changed")
    same = _same(got, program(q, k, v, *(x + 0 for x in caches), length_B))
    found = dict(zip(("out", "worst row"), np.max(errors, axis=0).tolist(), strict=True))
    wrong += _too_large(found)
    if not same:
        wrong.append("a repeat with the same inputs differs")
    return {
        "numbers": found,
        "wrong": "; ".join(dict.fromkeys(wrong)),
        "repeat": "equal" if same else "differs",
    }


# A whole model, with every kernel of a decoding step ---------------------------------------------


def check_model(kind: str) -> Row:
    """Logits of a small model, token by token with a cache, against one pass in float32."""
    cfg, compute = MODELS["tiny"], generate.compute_config(jax.default_backend())
    params = generate.weights_of(cfg, compute, kind)
    graphdef = structure(cfg, compute, unstacked=compute.unroll)
    tokens_BT = jax.random.randint(jax.random.key(1), (2, 12), 0, cfg.vocab_size)
    step = jax.jit(lambda p, tokens, cache: merge(graphdef, p)(tokens, cache=cache))
    cache, logits = KVCache.empty(cfg, 2, 64, compute.dtype), []
    for token_B1 in jnp.split(tokens_BT, tokens_BT.shape[1], axis=1):
        logits_B1V, cache = step(params, token_B1, cache)
        logits.append(logits_B1V)
    exact = ComputeConfig(jnp.dtype(jnp.float32), unroll=compute.unroll, attention="xla")
    exactdef = structure(cfg, exact, unstacked=compute.unroll)
    wide = jax.tree.map(lambda w: w.astype(jnp.float32), params, is_leaf=is_quantized)
    want = _reference(lambda p, tokens: merge(exactdef, p)(tokens))(wide, tokens_BT)
    error, worst = relative_errors(jnp.concatenate(logits, axis=1), want)
    wrong = "" if error < MODEL_LIMIT else "logits"
    return {"numbers": {"logits": error, "worst row": worst}, "wrong": wrong}


# Comparison ---------------------------------------------------------------------------------------


class _Poisoned:
    """A compiled function whose outputs are written over donated arrays of NaN.

    Args:
      function: its first argument is ignored; the others are the arguments.
      arguments: an example of them.
      donated: positions of arguments that are donated too, counted with the ignored one.
    """

    def __init__(self, function: Callable[..., Any], arguments: tuple, donated: tuple = ()):
        shapes = jax.eval_shape(functools.partial(function, None), *arguments)
        self._like = shapes[: len(shapes) - len(donated)]
        self._call = jax.jit(function, donate_argnums=(0, *donated), keep_unused=True)

    def __call__(self, *arguments: Any) -> tuple:
        nan = lambda x: jnp.full(x.shape, jnp.nan, x.dtype)
        for x in [nan(x) for x in self._like for _ in range(4)]:
            x.block_until_ready().delete()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Some donated buffers were not usable")
            return self._call([nan(x) for x in self._like], *arguments)


def _reference(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*arguments):
        with jax.default_matmul_precision("highest"):
            return function(*arguments)

    return jax.jit(call)


@jax.jit
def _norms(got, want):
    got, want = got.astype(jnp.float32), want.astype(jnp.float32)
    of_row = lambda x: jnp.sqrt(jnp.sum(x * x, axis=-1))
    rows, off = of_row(want), of_row(got - want)
    typical = jnp.sqrt(jnp.mean(rows * rows))
    # Many gradients of queries that see few keys are nearly zero.
    worst = jnp.max(off / (jnp.maximum(rows, 0.3 * typical) + 1e-30))
    return jnp.linalg.norm(off) / (jnp.linalg.norm(rows) + 1e-30), worst


def relative_errors(got: Any, want: Any) -> tuple[float, float]:
    """|got - want| / |want| of the whole array, and of the worst vector along the last axis."""
    whole, worst = _norms(got, want)
    return float(whole), float(worst)


def _too_large(found: dict[str, float]) -> list[str]:
    limit = lambda label: WORST if label == "worst row" else LIMIT
    # "not <" is true for NaN.
    return [f"error of {n}" for n, x in found.items() if not x < limit(n)]


def _same(a: tuple, b: tuple) -> bool:
    bits = lambda x: np.asarray(x).view(np.uint8)
    return all(np.array_equal(bits(x), bits(y)) for x, y in zip(a, b, strict=True))
