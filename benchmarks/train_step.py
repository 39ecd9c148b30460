"""A training step on the CPU against Hugging Face + torch, float32, in one run.

    pip install -e '.[check]' && python -m benchmarks.train_step [--rounds 5]

Both train the same LLaMA (AdamW, clip 1.0, batch 8 x 256) in a process of their own with the same
allocator settings,
taking turns; a round is 5 steps after 2 to warm up. Reported: median milliseconds a step over the
rounds, their range, and
the median of the rounds' ratios. Result: benchmarks/results/train_step.json.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
SHAPES = ("small", "mini")
B, T = 8, 256
# glibc gives large buffers back to the kernel and faults them in again each step; kept, both sides
# are faster.
ALLOCATOR = {
    "MALLOC_ARENA_MAX": "1",
    "GLIBC_TUNABLES": "glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=17179869184:"
    "glibc.malloc.top_pad=268435456:glibc.malloc.hugetlb=1",
}


def jax_steps(shape: str):
    """A function that trains one step, as `llama_jax.train` does with train.unroll = true."""
    import jax
    import numpy as np

    from llama_jax.config import load_recipe
    from llama_jax.data.batch import Batch
    from llama_jax.model.sharding import make_mesh
    from llama_jax.train.step import execution, init_state, make_train_step

    recipe = load_recipe(ROOT / "configs/tiny.toml", [f"model.name={shape}"])
    jax.set_mesh(make_mesh(recipe.mesh))
    compute = execution(recipe, "cpu")
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
    """The same with transformers, eager."""
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
    """Train a round for each line on standard input; answer with the milliseconds of its steps."""
    train = {"jax": jax_steps, "torch": torch_steps}[side](shape)
    for _ in range(2):
        train()
    print("ready", flush=True)
    for _ in sys.stdin:
        times = []
        for _ in range(5):
            start = time.perf_counter()
            train()
            times.append(1e3 * (time.perf_counter() - start))
        print(statistics.median(times), flush=True)


def start(side: str, shape: str) -> subprocess.Popen:
    """A worker, warmed up."""
    process = subprocess.Popen(
        [sys.executable, __file__, "--worker", side, shape],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env=os.environ | ALLOCATOR | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    while process.stdout.readline().strip() != "ready":
        if process.poll() is not None:
            sys.exit(f"the {side} worker ended with code {process.returncode}")
    return process


def main() -> None:
    """Measure, print a table, keep it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--worker", nargs=2)
    arguments = parser.parse_args()
    if arguments.worker:
        return worker(*arguments.worker)
    versions = {
        p: importlib.metadata.version(p) for p in ("jax", "flax", "optax", "torch", "transformers")
    }
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(": ")[1] for line in lines if line.startswith("model name")), "?")
    result = {
        "machine": f"{cpu}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "versions": versions,
    }
    for shape in SHAPES:
        workers = {side: start(side, shape) for side in ("jax", "torch")}
        times: dict[str, list[float]] = {side: [] for side in workers}
        for _ in range(arguments.rounds):
            for side, process in workers.items():
                process.stdin.write("go\n")
                process.stdin.flush()
                times[side].append(float(process.stdout.readline()))
        for process in workers.values():
            process.stdin.close()
            process.wait()
        ratios = [t / j for j, t in zip(times["jax"], times["torch"], strict=True)]
        result[shape] = {"ms": times, "ratio": ratios}
        for side, ms in times.items():
            middle = statistics.median(ms)
            print(
                f"{shape:6} {side:6} {middle:8.1f} ms ({min(ms):.1f}-{max(ms):.1f}), "
                f"{B * T / middle * 1e3:8,.0f} tokens/s"
            )
        print(
            f"{shape:6} tokens/s against torch: {statistics.median(ratios):.2f} "
            f"({min(ratios):.2f}-{max(ratios):.2f})"
        )
    out = ROOT / "benchmarks/results/train_step.json"
    out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{result['machine']}, Python {result['python']}, {versions} -> {out.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
