"""A training step on the CPU against Hugging Face transformers with PyTorch, float32.

    pip install -e '.[check]' && python -m benchmarks.train_step [--rounds 5]

Both train the same LLaMA (AdamW, gradient norm clipped to 1.0, batch 8 x 256), each in its own
process with the same allocator settings. They take turns: a round is 5 steps, after 2 warm-up
steps. Printed: median milliseconds per step over the rounds, their range, and the median of the
rounds' ratios. Result: benchmarks/results/train_step.json.
"""

import argparse
import statistics
import sys
import time

from benchmarks.common import ROOT, Worker, environment, take_turns, write

SHAPES = ("small", "mini")
B, T = 8, 256


def jax_steps(shape: str):
    """A function that trains one step, as `llama_jax.train` does with train.unroll = true."""
    import jax
    import numpy as np

    from llama_jax.config import load_recipe
    from llama_jax.data.batch import Batch
    from llama_jax.model.sharding import make_mesh
    from llama_jax.train.step import compute_config, init_state, make_train_step

    recipe = load_recipe(ROOT / "configs/tiny.toml", [f"model.name={shape}"])
    jax.set_mesh(make_mesh(recipe.mesh))
    compute = compute_config(recipe, "cpu")
    state = jax.jit(lambda: init_state(recipe, compute))()
    step = jax.jit(make_train_step(recipe, compute), donate_argnums=0)
    ids = np.random.default_rng(0).integers(0, recipe.model.vocab_size, (1, B, T + 1), np.int32)
    batch = Batch(ids[..., :-1], ids[..., 1:])

    def train():
        nonlocal state
        state, metrics = step(state, batch)
        return float(metrics["loss"])

    return train


def torch_steps(shape: str):
    """The same with transformers and eager PyTorch."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from llama_jax.config import MODELS

    cfg = MODELS[shape]
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=cfg.vocab_size, hidden_size=cfg.dim, intermediate_size=cfg.ffn_dim,
            num_hidden_layers=cfg.num_layers, num_attention_heads=cfg.num_heads,
            num_key_value_heads=cfg.num_kv_heads, max_position_embeddings=cfg.context,
        )
    )  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1)
    ids = torch.randint(0, cfg.vocab_size, (B, T + 1))

    def train():
        logits = model(ids[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss.item()

    return train


def worker(side: str, shape: str) -> None:
    """Train a round per line on standard input; print the median milliseconds of its steps."""
    train = {"jax": jax_steps, "torch": torch_steps}[side](shape)
    for _ in range(2):
        train()
    print("ready null", flush=True)
    for _ in sys.stdin:
        times = []
        for _ in range(5):
            start = time.perf_counter()
            train()
            times.append(1e3 * (time.perf_counter() - start))
        print(statistics.median(times), flush=True)


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--worker", nargs=2)
    arguments = parser.parse_args()
    if arguments.worker:
        return worker(*arguments.worker)
    result = environment(("jax", "flax", "optax", "torch", "transformers"))
    for shape in SHAPES:
        workers = {side: Worker("benchmarks.train_step", side, shape) for side in ("jax", "torch")}
        times = take_turns(workers, arguments.rounds)
        ratios = [t / j for j, t in zip(times["jax"], times["torch"], strict=True)]
        result[shape] = {"ms": times, "ratio": ratios}
        for side, ms in times.items():
            median = statistics.median(ms)
            print(
                f"{shape:6} {side:6} {median:8.1f} ms ({min(ms):.1f}-{max(ms):.1f}), "
                f"{B * T / median * 1e3:8,.0f} tokens/s"
            )
        print(
            f"{shape:6} tokens/s against torch: {statistics.median(ratios):.2f} "
            f"({min(ratios):.2f}-{max(ratios):.2f})"
        )
    write("train_step", result)


if __name__ == "__main__":
    main()
