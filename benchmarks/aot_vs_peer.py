"""The train step compiled for TPUs, beside MaxText's own ahead-of-time figures.

    JAX_PLATFORMS=cpu python -m benchmarks.aot_vs_peer [ROW ...]

Same model, topology, batch, sequence and recomputation; pure FSDP, float32 weights and optimizer,
bfloat16 compute. The peer's column: MaxText e591f30, compiled by its `train_compile` for the same
topologies with splash attention; cycles and bytes counted by the walk of `planning.hlo`. Each row
is compiled in a process of its own. Kept in results/aot_vs_peer.json.
"""

import json
import resource
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results/aot_vs_peer.json"

# name: recipe, machine, overrides; the peer's peak GB, Mcycles (of them products), collective GB.
ROWS = {
    "7B v5p-8 full": ("7b", "v5p:2x2x2", 8, 4096, "full", (17.27, 1307, 934, 43.0)),
    "7B v5p-8 matmuls": ("7b", "v5p:2x2x2", 8, 4096, "matmuls", (26.92, 1337, 756, 44.0)),
    "7B v5p-64 full": ("7b", "v5p:4x4x4", 64, 4096, "full", (4.19, 1064, 912, 39.4)),
    "65B v5p-512 4.19M": ("65b", "v5p:8x8x8", 2048, 2048, "full", (17.85, 20208, 18827, 390.0)),
}


def measure(name: str) -> dict:
    """One row, compiled here."""
    from llama_jax.plan.__main__ import prepare_jax

    prepare_jax(1)
    from llama_jax.config import load_recipe
    from llama_jax.plan.compile import compile_step
    from llama_jax.plan.machines import machine
    from llama_jax.plan.report import recomputed

    size, on, batch, seq_len, remat, _ = ROWS[name]
    settings = {"train.batch_size": batch, "train.gradient_accumulation": 1, "train.remat": remat}
    settings |= {"data.seq_len": seq_len, "model.context": seq_len}
    overrides = [f"{k}={v}" for k, v in settings.items()]
    recipe = load_recipe(ROOT / f"configs/llama-{size}-tpu.toml", overrides)
    c = compile_step(recipe, machine(on))
    assert c.cost is not None, f"{name} does not fit: {c.memory.peak / 1e9:.1f} GB"
    tokens = batch * seq_len / c.machine.devices
    own = recipe.model.flops_per_token(seq_len) * tokens
    return {
        "peak_gb": c.memory.peak / 1e9,
        "mcycles": c.cost.cycles / 1e6,
        "product_mcycles": c.cost.product_cycles / 1e6,
        "collective_gb": {k: v / 1e9 for k, v in c.cost.by_kind().items()},
        "operations_over_model": c.cost.flops / own,
        "operations_over_model_and_recomputed": c.cost.flops / (own + recomputed(recipe) * tokens),
        "kernels": dict(c.cost.kernels),
        "compile_s": c.seconds,
        "rss_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }


def main() -> None:
    if sys.argv[1:2] == ["--one"]:
        print(json.dumps(measure(sys.argv[2])))
        return
    import importlib.metadata as about

    kept = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"rows": {}}
    for name in sys.argv[1:] or ROWS:
        command = [sys.executable, "-m", "benchmarks.aot_vs_peer", "--one", name]
        run = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
        ours = json.loads(run.stdout.splitlines()[-1])
        peak, cycles, products, moved = ROWS[name][-1]
        peer = {"peak_gb": peak, "mcycles": cycles, "product_mcycles": products}
        versions = {p: about.version(p) for p in ("jax", "libtpu")}
        kept["rows"][name] = {"ours": ours, "peer": peer | {"collective_gb": moved}}
        kept["rows"][name] |= {"versions": versions, "date": time.strftime("%Y-%m-%d")}
        RESULTS.write_text(json.dumps(kept, indent=1) + "\n")
        total = sum(ours["collective_gb"].values())
        print(
            f"{name}: peak {ours['peak_gb']:.2f} GB (peer {peak}), {ours['mcycles']:,.0f} Mcycles "
            f"({cycles:,}), collectives {total:.1f} GB ({moved}), operations "
            f"{ours['operations_over_model']:.2f} x the model's "
            f"({ours['operations_over_model_and_recomputed']:.3f} x with what is recomputed); "
            f"compiled in {ours['compile_s']:.0f} s, {ours['rss_gib']:.1f} GiB"
        )


if __name__ == "__main__":
    main()
