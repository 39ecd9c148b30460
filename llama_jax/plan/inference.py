"""Inference on a machine: memory of weights and KV cache, largest batch and context, tokens/s.

Computed from shapes and the chip's rates; nothing is compiled.
"""

import math
from typing import Any

import numpy as np

from llama_jax.checkpoint.model_json import QUANTIZED
from llama_jax.chips import CHIPS, GIB
from llama_jax.config.model_config import MODELS, ModelConfig
from llama_jax.convert.tensors import tensor_specs
from llama_jax.model.cache import bytes_per_position
from llama_jax.plan.machines import Machine, PlanError

DTYPES = ("float32", "bfloat16", "int8", "int4")


def weight_bytes(cfg: ModelConfig, dtype: str) -> int:
    """Bytes of the weights as `llama_jax.generate` stores them.

    int8 and int4 store the layers' matrices in 8 or 4 bits, with a float32 scale per output (int8)
    or per output and 64 inputs (int4); embedding, output matrix and norms stay bfloat16.
    """
    floating = np.dtype(np.float32 if dtype == "float32" else np.float16)  # as large as bfloat16
    total = 0
    for spec in tensor_specs(cfg, dtype if dtype in QUANTIZED else None):
        layers = cfg.num_layers if spec.stacked else 1
        total += layers * math.prod(spec.shape(cfg)) * (spec.quantized_dtype or floating).itemsize
    return total


def cache_bytes(cfg: ModelConfig, context: int, dtype: str = "bfloat16") -> float:
    """Bytes of one sequence's keys and values.

    Args:
      cfg: the model.
      context: positions.
      dtype: "bfloat16" or "int8"; int8 with scales.
    """
    return context * bytes_per_position(cfg, np.dtype(np.int8 if dtype == "int8" else np.float16))


CHAT = 161, 338
"""mean tokens of a prompt and of an answer in ShareGPT's conversations (arXiv 2309.06180)"""
PAGES = 256, 128
_WORK_BYTES = 2e9


def requests_at_once(positions: float, context: int, page: int | None) -> int:
    """How many requests of a server have keys and values in memory at the same time.

    A request has pages for its prompt and answer, whose lengths are log-normal with the means of
    :data:`CHAT` and a standard deviation of the logarithm of 1.

    Args:
      positions: that fit in memory.
      context: most positions of a request.
      page: positions per page; None: every request has a slot of ``context`` positions.
    """
    if page is None:
        return max(0, int(positions // context))
    rng = np.random.default_rng(0)
    prompt, answer = (rng.lognormal(math.log(mean) - 0.5, 1, 100_000) for mean in CHAT)
    length = np.minimum(np.ceil(prompt) + np.ceil(answer), context)
    return max(0, int(positions // np.mean(np.ceil(length / page) * page)))


def model_config(name: str) -> ModelConfig:
    """The config of a known model.

    Raises:
      PlanError: no such model.
    """
    if name not in MODELS:
        raise PlanError(f"no model {name!r}; known: {', '.join(MODELS)}")
    return MODELS[name]


def plan(
    cfg: ModelConfig,
    machine: Machine,
    dtype: str,
    context: int,
    batch: int,
    cache: str = "bfloat16",
) -> dict[str, Any]:
    """Memory and speed of generation, with weights and cache sharded over heads and widths.

    The speed is an upper bound at peak rates: a decode step reads the whole cache of each sequence
    and every weight once, but of an embedding that is not the output matrix too only one row per
    sequence, and takes 2 FLOPs per weight that it reads and token. Communication between chips is
    not counted, so a real step is slower.

    Args:
      cfg: the model.
      machine: all its devices share one replica.
      dtype: of the weights, one of `DTYPES`.
      context: positions per sequence.
      batch: sequences at a time.
      cache: dtype of keys and values, "bfloat16" or "int8".

    Raises:
      PlanError: the context is longer than the model's, or the devices do not divide its heads.
    """
    if context > cfg.context:
        raise PlanError(f"--context {context} is longer than the model's own, {cfg.context}")
    n, chip = machine.devices, machine.chip
    if cfg.num_heads % n or cfg.ffn_dim % n:
        raise PlanError(
            f"{machine.name}: {n} devices do not divide the model's {cfg.num_heads} heads and "
            f"{cfg.ffn_dim} feed-forward width"
        )
    # With fewer kv heads than devices, several devices store the same head.
    copies = max(1, n // cfg.num_kv_heads)
    weights = weight_bytes(cfg, dtype) / n
    per_sequence = cache_bytes(cfg, context, cache) * copies / n
    # Logits of a step and one layer's activations, float32.
    activations = 4 * (cfg.vocab_size / n + 4 * cfg.dim + 2 * cfg.ffn_dim / n) * batch
    available = chip.memory * GIB
    used = weights + batch * per_sequence + activations
    for_cache = available - weights - activations
    rows_only = 0 if cfg.tie_embeddings else cfg.vocab_size * cfg.dim / n
    read = weights - rows_only * (4 if dtype == "float32" else 2) + batch * per_sequence
    memory = read / (chip.bandwidth * 1e9)
    flops = 2 * batch * (cfg.num_params / n - rows_only)
    compute = flops / (chip.tflops * 1e12)
    step = max(memory, compute)
    per_position = cache_bytes(cfg, 1, cache) * copies / n * batch
    positions = (available - weights - _WORK_BYTES) / (per_position / batch)
    of_pages = {f"pages_of_{p}": requests_at_once(positions, context, p) for p in PAGES}
    return {
        "machine": machine.name,
        "dtype": dtype,
        "context": context,
        "batch": batch,
        "fits": used <= available,
        "available": available,
        "weights": weights,
        "cache": batch * per_sequence,
        "cache_dtype": cache,
        "activations": activations,
        "largest_batch": max(0, int(for_cache // per_sequence)),
        "largest_context": max(0, min(int(for_cache // per_position), cfg.context)),
        "requests_at_once": {"slots": requests_at_once(positions, context, None), **of_pages},
        "seconds_per_token": step,
        "bound_by": "memory" if memory >= compute else "compute",
        "tokens_per_second": batch / step,
    }


def to_text(f: dict[str, Any], title: str) -> str:
    """Format :func:`plan` for the terminal."""
    gib = lambda k: f"{f[k] / GIB:.2f} GiB"
    used = f["weights"] + f["cache"] + f["activations"]
    verdict = "FITS" if f["fits"] else "DOES NOT FIT"
    lines = [
        title,
        f"{verdict}: {used / GIB:.2f} of {gib('available')} per device",
        f"  weights      {gib('weights'):>12}  {f['dtype']}",
        f"  cache        {gib('cache'):>12}  keys and values, {f['cache_dtype']}: "
        f"batch {f['batch']} x {f['context']} positions",
        f"  activations  {gib('activations'):>12}  logits and one layer, float32",
        f"largest batch at {f['context']} positions: {f['largest_batch']:,}; longest context at "
        f"batch {f['batch']}: {f['largest_context']:,}",
    ]
    counts = f["requests_at_once"]
    pages = ", ".join(f"{counts[f'pages_of_{p}']:,} in pages of {p}" for p in PAGES)
    lines.append(
        f"server, requests at once of {CHAT[0]} + {CHAT[1]} tokens on average: {pages}, "
        f"{counts['slots']:,} in slots of {f['context']}"
    )
    if f["fits"]:
        lines.append(
            f"upper bound: {f['tokens_per_second']:,.0f} tokens/s, "
            f"{1 / f['seconds_per_token']:,.0f} per sequence, bound by {f['bound_by']} (each token "
            "reads all weights and the cache)"
        )
    return "\n".join(lines)


SIZES = ("llama-7b", "llama-13b", "llama-33b", "llama-65b", "llama3.1-8b", "llama3.1-70b")


def table() -> str:
    """LLaMA sizes on one device of each chip: the widest dtype that fits, and its tokens/s."""
    names = [k for k, c in CHIPS.items() if c.memory and k not in ("cpu", "tpu7x")]
    lines = [
        "One chip, batch 1, 2,048 positions: the widest dtype that fits, and the upper bound of",
        "tokens/s from reading the weights (-: not even int4 fits).",
        "",
        f"{'':<13}" + "".join(f"{name:>9}" for name in names),
        f"{'memory, GiB':<13}" + "".join(f"{CHIPS[name].memory:>9.1f}" for name in names),
    ]
    for size in SIZES:
        cells = []
        for name in names:
            machine = Machine(f"{name}:1", CHIPS[name], 1)
            plans = (plan(MODELS[size], machine, d, 2048, 1) for d in DTYPES[1:])
            best = next((p for p in plans if p["fits"]), None)
            kind = best["dtype"].replace("bfloat", "bf") if best else ""
            cells.append(f"{kind} {best['tokens_per_second']:,.0f}" if best else "-")
        lines.append(f"{size:<13}" + "".join(f"{cell:>9}" for cell in cells))
    return "\n".join(lines)
