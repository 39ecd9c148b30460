"""The same work in PyTorch: attention with SDPA, transformers' static cache, a training step.

It runs in processes of its own: JAX keeps the memory that it has taken. Every row is "not
measured" without torch and CUDA.
"""

import importlib.util
import inspect
import time
from collections.abc import Callable
from typing import Any

from benchmarks.accelerator.common import Row, Rows, Sizes, seconds, spread
from llama_jax.config import MODELS, ModelConfig

NO_TORCH = "no torch with CUDA"
GENERATED = 64
"""tokens per timed value"""


def device() -> str | None:
    """ "cuda", or None without torch or a GPU."""
    if importlib.util.find_spec("torch") is None:
        return None
    import torch

    return "cuda" if torch.cuda.is_available() else None


def guarded(measure: Callable[..., Row], *args: Any) -> Callable[[], Row]:
    """The measurement, or "not measured"."""

    def run() -> Row:
        where = device()
        return measure(where, *args) if where else {"not measured": NO_TORCH}

    return run


def wait(where: str) -> None:
    """Return when the device has finished."""
    import torch

    if where == "cuda":
        torch.cuda.synchronize()


def calls(where: str, call: Callable[[int], Any], s: Sizes) -> dict[str, float]:
    """Seconds of ``call(i)``, for i = 0, 1, ..."""

    def run(n: int) -> None:
        for i in range(n):
            call(i)
        wait(where)

    return seconds(run, s)


# Attention ----------------------------------------------------------------------------------------


def attention_rows(s: Sizes) -> Rows:
    for T in s.lengths:
        for backend in ("cudnn", "flash"):
            for way in ("forward", "forward + backward"):
                yield (
                    f"attention T {T}, {way}: torch {backend} + rotary",
                    guarded(attention, s, T, backend, way),
                )


def attention(where: str, s: Sizes, T: int, backend: str, way: str) -> Row:
    """Compiled rotation, then SDPA with one backend; heads before positions."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    names = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
    (N, K, H), B = s.heads, s.tokens // T
    make = lambda heads: torch.randn(
        B, heads, T, H, dtype=torch.bfloat16, device=where, requires_grad=True
    )
    inputs = [(make(N), make(K), make(K)) for _ in range(2)]
    d_out = torch.randn(B, N, T, H, dtype=torch.bfloat16, device=where)
    angle = torch.arange(T, device=where)[:, None] * 5e5 ** (
        -torch.arange(0, H, 2, device=where) / H
    )
    cos, sin = angle.cos(), angle.sin()

    def rotate(x):
        a, b = x.float().chunk(2, -1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)

    rotate = torch.compile(rotate) if where == "cuda" else rotate

    def call(i):
        q, k, v = inputs[i % 2]
        out = scaled_dot_product_attention(rotate(q), rotate(k), v, is_causal=True, enable_gqa=True)
        if way != "forward":
            torch.autograd.grad(out, (q, k, v), d_out)

    with sdpa_kernel([names[backend]] if where == "cuda" else [SDPBackend.MATH]):
        time = calls(where, call, s)
    flops = (1 if way == "forward" else 3.5) * 4 * N * H * B * T * (T + 1) / 2
    return {"seconds": time, "numbers": {"TFLOP/s": flops / time["median"] / 1e12}}


# Models -------------------------------------------------------------------------------------------


def llama(cfg: ModelConfig, where: str, dtype: Any) -> Any:
    """transformers' LLaMA with random weights, made on the device."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=cfg.vocab_size, hidden_size=cfg.dim, intermediate_size=cfg.ffn_dim,
        num_hidden_layers=cfg.num_layers, num_attention_heads=cfg.num_heads,
        num_key_value_heads=cfg.num_kv_heads, max_position_embeddings=cfg.context,
        rms_norm_eps=cfg.norm_eps, tie_word_embeddings=cfg.tie_embeddings,
        attn_implementation="sdpa",
    )  # fmt: skip
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(where):
            return LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)


def generate_rows(s: Sizes) -> Rows:
    for model in s.models:
        for batch in s.batches:
            yield (
                f"generate {model}, torch, batch {batch}",
                guarded(decode_rate, s, model, batch),
            )


def decode_rate(where: str, s: Sizes, model: str, batch: int, compile_: bool = True) -> Row:
    """Greedy decoding with a static cache and the compiled forward pass (CUDA graphs)."""
    import torch

    model_ = llama(MODELS[model], where, torch.bfloat16).eval()
    ids = torch.randint(1, model_.config.vocab_size, (batch, s.prompt), device=where)
    each, _ = greedy(where, model_, ids, GENERATED if where == "cuda" else 4, compile_)
    return {"seconds": each, "numbers": {"tokens/s": batch / each["median"]}}


def greedy(where: str, model: Any, ids: Any, steps: int, compile_: bool) -> tuple[dict, list]:
    """Seconds per token of rounds of ``steps`` tokens, and the tokens.

    Args:
      where: the device.
      model: of transformers.
      ids: the prompts.
      steps: tokens of a round.
      compile_: compile the forward pass of one token.
    """
    import torch
    from transformers import StaticCache

    (B, start), rounds = ids.shape, 5
    cache = StaticCache(config=model.config, max_cache_len=start + rounds * steps)
    accepted = inspect.signature(model.forward).parameters
    # Newer releases have another name for the cache, and count positions in it.
    shared = {"cache" if "cache" in accepted else "past_key_values": cache, "use_cache": True}

    def positions(first, count):
        at = torch.arange(first, first + count, device=where)
        known = {"position_ids": at[None].expand(B, count), "cache_position": at}
        return {name: x for name, x in known.items() if name in accepted}

    forward = model.forward
    if compile_:
        forward = torch.compile(forward, mode="reduce-overhead", fullgraph=True)
    values, tokens = [], []
    with torch.no_grad():
        out = model(ids, **shared, **positions(0, start))
        for _ in range(rounds):
            wait(where)
            began = time.perf_counter()
            for _ in range(steps):
                token = out.logits[:, -1].argmax(-1, keepdim=True)
                tokens.append(token)
                if compile_:
                    torch.compiler.cudagraph_mark_step_begin()
                out = forward(token, **shared, **positions(start + len(tokens) - 1, 1))
            wait(where)
            values.append((time.perf_counter() - began) / steps)
    return spread(values[1:]), tokens  # the first round compiles


def train_rows(s: Sizes) -> Rows:
    yield f"train {s.train_model}, torch", guarded(train, s)


def train(where: str, s: Sizes, compile_: bool = True) -> Row:
    """float32 weights, bfloat16 products (autocast), fused AdamW, gradients clipped."""
    import torch

    cfg, (B, T) = MODELS[s.train_model], s.train_batch
    model = llama(cfg, where, torch.float32)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    batches = [torch.randint(0, cfg.vocab_size, (B, T + 1), device=where) for _ in range(4)]

    def loss_of(ids):
        logits = model(ids[:, :-1], use_cache=False).logits
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())

    loss_of = torch.compile(loss_of) if compile_ else loss_of

    def step(i):
        with torch.autocast(where, torch.bfloat16):
            loss = loss_of(batches[i % 4])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    time = calls(where, step, s)
    tokens = B * T / time["median"]
    numbers = {"tokens/s": tokens}
    if where == "cuda":
        numbers["GiB"] = torch.cuda.max_memory_allocated() / 2**30
    return {"seconds": time, "numbers": numbers}
