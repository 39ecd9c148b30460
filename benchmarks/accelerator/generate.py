"""Step 5: tokens per second of a model with random weights, and of reading a prompt.

A value is one call of the compiled program that adds tokens to all rows, divided by its tokens.
Shares of bandwidth count the weights that a step reads, and the live part of the cache.
"""

import functools
import math
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.accelerator.common import Row, Rows, Sizes, spread
from benchmarks.accelerator.launches import launches
from llama_jax import chips
from llama_jax.config import MODELS, ModelConfig
from llama_jax.generate.decode import DECODE_STEPS_PER_CALL, Engine, Request
from llama_jax.generate.sampler import Greedy, settings_of
from llama_jax.model.cache import bytes_per_position
from llama_jax.model.llama import ComputeConfig
from llama_jax.model.params import Params, abstract_params, unstack_layers
from llama_jax.model.quantize import quantize

RESERVED = 512
"""positions for new tokens, of which the warm-up and the timed calls use a part"""


def rows(s: Sizes, earlier: dict[str, Row]) -> Rows:
    copy = earlier.get("copy", {}).get("numbers", {}).get("GB/s")
    engines = functools.cache(random_engine)
    # The rows with targets first: one row of the large model.
    small, large = s.models
    order = [(small, "bfloat16"), (large, "bfloat16"), (large, "int8"), (small, "int8")]
    for batch in s.batches:
        for model, kind in order[:: 1 if s.every_row else 2]:
            yield (
                f"generate {model}, {kind}, batch {batch}",
                functools.partial(decode_rate, s, engines, model, kind, batch, copy),
            )
    yield (
        f"read a prompt of {s.prefill} tokens, {large}, bfloat16",
        functools.partial(prefill_rate, s, engines, large),
    )


def compute_config(platform: str) -> ComputeConfig:
    """As `llama_jax.load` computes on one device: unstacked layers except on a TPU."""
    return ComputeConfig(jnp.dtype(jnp.bfloat16), unroll=platform != "tpu")


def weight_shapes(cfg: ModelConfig, compute: ComputeConfig) -> Params:
    """Shapes of stacked weights in bfloat16."""
    of = lambda x: jax.ShapeDtypeStruct(x.shape, compute.dtype)
    return jax.tree.map(of, abstract_params(cfg, compute))


def random_weights(cfg: ModelConfig, compute: ComputeConfig) -> Params:
    """Weights made one array at a time: in one program, XLA needs five times their memory."""
    leaves, tree = jax.tree.flatten_with_path(weight_shapes(cfg, compute))
    keys = jax.random.split(jax.random.key(0), len(leaves))
    made = [
        jnp.ones(x.shape, x.dtype) if "norm" in str(path[-1]) else matrix(key, shape=x.shape)
        for key, (path, x) in zip(keys, leaves, strict=True)
    ]
    return jax.tree.unflatten(tree, made)


@functools.partial(jax.jit, static_argnames="shape")
def matrix(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Normal with a standard deviation of 0.02."""
    return 0.02 * jax.random.normal(key, shape, jnp.bfloat16)


def weights_of(cfg: ModelConfig, compute: ComputeConfig, kind: str) -> Params:
    """Random weights in a number format, as `llama_jax.load` gives them."""
    params = random_weights(cfg, compute)
    if kind != "bfloat16":
        params = quantize(params, kind)
    return unstack_layers(params) if compute.unroll else params


def random_engine(model: str, kind: str) -> Engine:
    """A model with random weights, made on the device."""
    cfg, compute = MODELS[model], compute_config(jax.default_backend())
    return Engine(cfg, weights_of(cfg, compute, kind), compute, mesh=None)


def decode_rate(s: Sizes, engines: Any, model: str, kind: str, batch: int, copy: Any) -> Row:
    """Seconds per token of each row, greedy."""
    cfg, engine = MODELS[model], engines(model, kind)
    ids = np.random.default_rng(0).integers(1, cfg.vocab_size, s.prompt).tolist()
    requests = [Request(ids, 0)] * batch
    state = engine.start(requests, RESERVED, seed=0)
    stop_ids, settings = np.full(8, -1, np.int32), settings_of(Greedy())
    values, steps = [], DECODE_STEPS_PER_CALL
    for _ in range(1 + s.rounds):
        start = time.perf_counter()
        state, drawn = engine.decode(state, settings, stop_ids, steps, False, False)
        values.append((time.perf_counter() - start) / steps)
    each = spread(values[1:])  # the first one compiles
    length = s.prompt + steps * s.rounds // 2
    moved = read_bytes(engine) + batch * length * bytes_per_position(cfg, engine.compute.dtype)
    rate = moved / each["median"] / 1e9
    numbers = {"tokens/s": batch / each["median"], "GB/s": rate}
    numbers |= {"of copy": rate / copy} if copy else {}
    numbers |= {"launches a token": launches(text)} if (text := program_text(engine)) else {}
    finite = np.isfinite(np.asarray(state.logits_BV)).all()
    right = finite and (drawn.tokens_TB >= 0).all() and (drawn.tokens_TB < cfg.vocab_size).all()
    return {"seconds": each, "numbers": numbers, "wrong": "" if right else "logits or tokens"}


def prefill_rate(s: Sizes, engines: Any, model: str) -> Row:
    """Seconds for a whole prompt."""
    cfg, engine = MODELS[model], engines(model, "bfloat16")
    values = []
    for seed in range(4):
        ids = np.random.default_rng(seed).integers(1, cfg.vocab_size, s.prefill).tolist()
        cache = engine.empty_cache(s.prefill + 256)
        start = time.perf_counter()
        logits_V, _ = engine.prefill(ids, cache)
        logits_V.block_until_ready()
        values.append(time.perf_counter() - start)
    each = spread(values[1:])
    rate = s.prefill / each["median"]
    numbers = {"tokens/s": rate}
    if jax.default_backend() != "cpu":
        peak, _ = chips.peak_flops(jax.devices()[0])
        numbers["MFU"] = rate * cfg.flops_per_token(s.prefill) / 3 / peak
    finite = bool(jnp.isfinite(logits_V).all())
    return {"seconds": each, "numbers": numbers, "wrong": "" if finite else "logits"}


def read_bytes(engine: Engine) -> int:
    """Bytes of the weights that a step reads: all but an embedding that is only looked up."""
    embed = 0 if engine.cfg.tie_embeddings else math.prod(engine.cfg.shape("VD")) * 2
    return engine.weight_bytes - embed


def program_text(engine: Engine) -> str:
    """HLO of the last decode program; empty if it was not compiled ahead of its call."""
    programs = [p for key, p in engine._compiled.items() if key[0] == "decode"]
    return programs[-1].as_text() if hasattr(programs[-1], "as_text") else ""
