"""Generation on a machine: memory of weights and cache, the largest batch and context, and the most
tokens a second. From shapes and stated rates alone; nothing is compiled.

In: a model's settings and a :class:`~llama_jax.plan.machines.Machine`. Out: plain values.
"""

import math
from typing import Any

from llama_jax.chips import CHIPS, GIB
from llama_jax.config.model_config import MODELS, ModelConfig
from llama_jax.model.quantize import GROUP
from llama_jax.plan.machines import Machine, PlanError

DTYPES = ("float32", "bfloat16", "int8", "int4")


def weight_bytes(cfg: ModelConfig, dtype: str) -> float:
    """Bytes of the weights as `llama_jax.generate` keeps them.

    int8 and int4 hold the layers' matrices in 8 or 4 bits, with a float32 scale an output (int8) or
    an output and 64 inputs (int4); embedding, output matrix and norms stay bfloat16.
    """
    if dtype in ("float32", "bfloat16"):
        return cfg.num_params * (4 if dtype == "float32" else 2)
    total, whole = 0.0, 0
    for matrix in ("DQ", "DE", "DE", "QD", "DF", "DF", "FD"):
        n, m = cfg.shape(matrix)
        scales = m if dtype == "int8" else m * n / math.gcd(n, GROUP)
        total += cfg.num_layers * (n * m * (1 if dtype == "int8" else 0.5) + 4 * scales)
        whole += cfg.num_layers * n * m
    return total + 2 * (cfg.num_params - whole)


def cache_bytes(cfg: ModelConfig, context: int) -> float:
    """Bytes of one sequence's keys and values, bfloat16."""
    return 2 * math.prod(cfg.shape("LKH")) * context * 2


def model_of(name: str) -> ModelConfig:
    """A row of the table of models.

    Raises:
      PlanError: no such model.
    """
    if name not in MODELS:
        raise PlanError(f"no model {name!r}; known: {', '.join(MODELS)}")
    return MODELS[name]


def plan(cfg: ModelConfig, on: Machine, dtype: str, context: int, batch: int) -> dict[str, Any]:
    """What generating takes, all chips together sharing weights and cache by heads and widths.

    Bounds hold at the stated rates: a decoding step reads every weight once and each sequence's
    whole cache; it does 2 operations a weight and token. Links between chips are not counted, so
    a real step is slower.

    Raises:
      PlanError: the context is longer than the model's, or the chips do not divide its heads.
    """
    if context > cfg.context:
        raise PlanError(f"--context {context} is longer than the model's own, {cfg.context}")
    n = on.devices
    if cfg.num_heads % n or cfg.ffn_dim % n:
        raise PlanError(
            f"{on.name}: {n} devices do not divide the model's {cfg.num_heads} heads and "
            f"{cfg.ffn_dim} feed-forward width"
        )
    # Fewer kv heads than devices: each device holds a whole head, some hold the same one.
    copies = max(1, n // cfg.num_kv_heads)
    weights = weight_bytes(cfg, dtype) / n
    per_sequence = cache_bytes(cfg, context) * copies / n
    # Logits of a step and one layer's activations, float32.
    work = 4 * (cfg.vocab_size / n + 4 * cfg.dim + 2 * cfg.ffn_dim / n) * batch
    available = on.chip.memory * GIB
    used = weights + batch * per_sequence + work
    room = available - weights - work
    seconds = (weights + batch * per_sequence) / (on.chip.bandwidth * 1e9)
    rate = on.chip.tflops * 1e12
    compute = 2 * batch * (cfg.num_params - cfg.vocab_size * cfg.dim) / n / rate
    step = max(seconds, compute)
    most = cache_bytes(cfg, 1) * copies / n * batch
    return {
        "machine": on.name,
        "dtype": dtype,
        "context": context,
        "batch": batch,
        "fits": used <= available,
        "available": available,
        "weights": weights,
        "cache": batch * per_sequence,
        "work": work,
        "largest_batch": max(0, int(room // per_sequence)),
        "largest_context": max(0, min(int(room // most), cfg.context)),
        "seconds_a_token": step,
        "bound_by": "memory" if seconds >= compute else "compute",
        "tokens_per_second": batch / step,
    }


def text(f: dict[str, Any], title: str) -> str:
    """A generation plan for a person."""
    gib = lambda k: f"{f[k] / GIB:.2f} GiB"
    used = f["weights"] + f["cache"] + f["work"]
    verdict = "FITS" if f["fits"] else "DOES NOT FIT"
    lines = [
        title,
        f"{verdict}: {used / GIB:.2f} of {gib('available')} a device",
        f"  weights  {gib('weights'):>12}  {f['dtype']}",
        f"  cache    {gib('cache'):>12}  keys and values, bfloat16: batch {f['batch']} x "
        f"{f['context']} positions",
        f"  work     {gib('work'):>12}  logits and one layer's activations",
        f"largest batch at {f['context']} positions: {f['largest_batch']:,}; longest context at "
        f"batch {f['batch']}: {f['largest_context']:,}",
    ]
    if f["fits"]:
        lines.append(
            f"at most {f['tokens_per_second']:,.0f} tokens/s, {1 / f['seconds_a_token']:,.0f} for "
            f"each sequence (bound by {f['bound_by']}; every weight and the whole cache are read "
            "for each token)"
        )
    return "\n".join(lines)


SIZES = ("llama-7b", "llama-13b", "llama-33b", "llama-65b", "llama3.1-8b", "llama3.1-70b")


def table() -> str:
    """LLaMA sizes against common cards, one card each: the widest type that fits, and its bound."""
    names = [k for k, c in CHIPS.items() if c.memory and k not in ("cpu", "tpu7x")]
    lines = [
        "One card, batch 1, 2,048 positions: the widest type that fits, and the most tokens a",
        "second that reading the weights allows (- : not even int4 fits).",
        "",
        f"{'':<14}" + "".join(f"{name:>10}" for name in names),
        f"{'memory, GiB':<14}" + "".join(f"{CHIPS[name].memory:>10.1f}" for name in names),
    ]
    for size in SIZES:
        cells = []
        for name in names:
            on = Machine(f"{name}:1", CHIPS[name], 1)
            plans = [plan(MODELS[size], on, d, 2048, 1) for d in DTYPES[1:]]
            best = next((p for p in plans if p["fits"]), None)
            kind = best["dtype"].replace("bfloat", "bf") if best else ""
            cells.append(f"{kind} {best['tokens_per_second']:,.0f}" if best else "-")
        lines.append(f"{size:<14}" + "".join(f"{cell:>10}" for cell in cells))
    return "\n".join(lines)
