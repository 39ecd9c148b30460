"""The train step compiled for TPUs against MaxText's ahead-of-time numbers.

    JAX_PLATFORMS=cpu python -m benchmarks.aot_vs_peer [ROW ...]

Same model, topology, batch and sequence length; pure FSDP, float32 weights and optimizer, bfloat16
compute. Rows named "full" and "matmuls" recompute the same, the others have the best choice of
each side. The peer is MaxText e591f30, compiled by its `train_compile` for the
same topologies with splash attention; `llama_jax.plan.hlo` counts cycles and bytes of both. Each
row is compiled in its own process. Result: results/aot_vs_peer.json.
"""

import json
import resource
import subprocess
import sys
import time

from benchmarks.common import RESULTS, ROOT

FILE = RESULTS / "aot_vs_peer.json"

KEEP_65B = '["gate","up","q","k"]'
ALL = '["gate","up","q","k","v","o","attention"]'

# name: size, machine, batch, sequence length, train.remat, train.loss_chunk; the peer's peak GB,
# Mcycles, Mcycles of matmuls, collective GB.
ROWS = {
    "7B v5p-8 full": ("7b", "v5p:2x2x2", 8, 4096, "full", 2048, (17.27, 1307, 934, 43.0)),
    "7B v5p-8 matmuls": ("7b", "v5p:2x2x2", 8, 4096, "matmuls", 2048, (26.92, 1337, 756, 44.0)),
    "7B v5p-64 full": ("7b", "v5p:4x4x4", 64, 4096, "full", 2048, (4.19, 1064, 912, 39.4)),
    "7B v5p-64 kept": ("7b", "v5p:4x4x4", 64, 4096, ALL, 0, (13.89, 966, 812, 39.4)),
    "65B v5p-512 4.19M": ("65b", "v5p:8x8x8", 2048, 2048, "full", 2048, (17.85, 20208, 18827, 390)),
    "65B v5p-512 4.19M, kept": (
        "65b",
        "v5p:8x8x8",
        2048,
        2048,
        KEEP_65B,
        0,
        (17.85, 20208, 18827, 390),
    ),
}


def measure(name: str) -> dict:
    """Compile one row in this process."""
    from llama_jax.plan.command import prepare_jax

    prepare_jax(1)
    from llama_jax.config import load_recipe
    from llama_jax.plan.compile import compile_step
    from llama_jax.plan.machines import parse_machine
    from llama_jax.plan.report import recomputed_flops

    size, machine, batch, seq_len, remat, chunk, _ = ROWS[name]
    settings = {"train.batch_size": batch, "train.gradient_accumulation": 1, "train.remat": remat}
    settings["train.loss_chunk"] = chunk
    settings |= {"data.seq_len": seq_len, "model.context": seq_len}
    overrides = [f"{k}={v}" for k, v in settings.items()]
    recipe = load_recipe(ROOT / f"configs/llama-{size}-tpu.toml", overrides)
    c = compile_step(recipe, parse_machine(machine))
    assert c.cost is not None, f"{name} does not fit: {c.memory.peak / 1e9:.1f} GB"
    tokens = batch * seq_len / c.machine.devices
    model_flops = recipe.model.flops_per_token(seq_len) * tokens
    recomputed = recomputed_flops(recipe) * tokens
    return {
        "peak_gb": c.memory.peak / 1e9,
        "mcycles": c.cost.cycles / 1e6,
        "matmul_mcycles": c.cost.matmul_cycles / 1e6,
        "collective_gb": {k: v / 1e9 for k, v in c.cost.by_kind().items()},
        "flops_over_model": c.cost.flops / model_flops,
        "flops_over_model_and_recomputed": c.cost.flops / (model_flops + recomputed),
        "kernels": dict(c.cost.kernels),
        "compile_s": c.seconds,
        "rss_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }


def main() -> None:
    if sys.argv[1:2] == ["--one"]:
        print(json.dumps(measure(sys.argv[2])))
        return
    from importlib.metadata import version

    rows = json.loads(FILE.read_text()) if FILE.exists() else {"rows": {}}
    for name in sys.argv[1:] or ROWS:
        command = [sys.executable, "-m", "benchmarks.aot_vs_peer", "--one", name]
        run = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
        ours = json.loads(run.stdout.splitlines()[-1])
        peak, cycles, matmuls, moved = ROWS[name][-1]
        peer = {"peak_gb": peak, "mcycles": cycles, "matmul_mcycles": matmuls}
        versions = {p: version(p) for p in ("jax", "libtpu")}
        rows["rows"][name] = {"ours": ours, "peer": peer | {"collective_gb": moved}}
        rows["rows"][name] |= {"versions": versions, "date": time.strftime("%Y-%m-%d")}
        FILE.write_text(json.dumps(rows, indent=1) + "\n")
        total = sum(ours["collective_gb"].values())
        print(
            f"{name}: peak {ours['peak_gb']:.2f} GB (peer {peak}), {ours['mcycles']:,.0f} Mcycles "
            f"({cycles:,}), collectives {total:.1f} GB ({moved}), FLOPs "
            f"{ours['flops_over_model']:.2f} x the model's "
            f"({ours['flops_over_model_and_recomputed']:.3f} x including recomputation); "
            f"compiled in {ours['compile_s']:.0f} s, {ours['rss_gib']:.1f} GiB"
        )


if __name__ == "__main__":
    main()
