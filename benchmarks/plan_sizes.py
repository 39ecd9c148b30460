"""The paper's four sizes planned for a TPU and for GPUs: do they fit, what does planning take?

    pip install -e '.[check]' && python -m benchmarks.plan_sizes [NAME ...]

Each recipe is compiled by `python -m llama_jax.plan` in a process of its own, 4.19M tokens a step.
Kept in results/plan_sizes.json: memory and the least time of a step (see the plan's own output),
and the seconds and memory that planning needed here.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results/plan_sizes.json"
PLANS = {
    f"{size}-{kind}": (f"configs/llama-{size}-{kind}.toml", on)
    for kind, machines in {"tpu": ["v5p:8x8x8"] * 4, "gpu": ["h100:64"] * 3 + ["h100:128"]}.items()
    for size, on in zip(["7b", "13b", "33b", "65b"], machines, strict=True)
}


def figures(plan: dict, seconds: float, rss_kib: int) -> dict:
    """What is kept of a plan."""
    kept = {k: plan[k] for k in ("machine", "mesh", "gradient_accumulation", "remat", "fits")}
    gib = {k: plan["memory"][k] / 2**30 for k in ("peak", "available")}
    ratio = plan["step"]["operations"] / plan["step"]["model_operations"]
    return kept | {
        "peak_gib": gib["peak"],
        "available_gib": gib["available"],
        "operations_over_model": ratio,
        "kernels": plan["step"]["kernels"],
        "least_step_seconds": plan["time"]["step"],
        "bound_by": plan["time"]["bound_by"],
        "compiler_estimate_seconds": plan["time"]["compiler_estimate"],
        "planning_seconds": seconds,
        "planning_gib": rss_kib / 2**20,
    }


def main() -> None:
    kept = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name in sys.argv[1:] or PLANS:
        recipe, on = PLANS[name]
        with tempfile.TemporaryDirectory() as folder:
            out = f"{folder}/plan.json"
            command = [sys.executable, "-m", "llama_jax.plan", recipe, "--on", on, "--out", out]
            start = time.perf_counter()
            process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
            _, status, usage = os.wait4(process.pid, 0)
            seconds = time.perf_counter() - start
            if os.waitstatus_to_exitcode(status):
                sys.exit(f"{name}: the plan failed or does not fit")
            kept[name] = figures(json.loads(Path(out).read_text()), seconds, usage.ru_maxrss)
        RESULTS.write_text(json.dumps(kept, indent=1) + "\n")
        print(name, kept[name])


if __name__ == "__main__":
    main()
