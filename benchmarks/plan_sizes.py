"""Plans of the paper's four sizes for a TPU and for GPUs, and what planning costs.

    pip install -e '.[check]' && python -m benchmarks.plan_sizes [NAME ...]

Each recipe is compiled by `python -m llama_jax.plan` in its own process, 4.19M tokens per step.
results/plan_sizes.json: memory and the lower bound of the step time (as the plan reports them), and
the seconds and memory of planning on this machine.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.common import RESULTS, ROOT

FILE = RESULTS / "plan_sizes.json"
PLANS = {
    f"{size}-{kind}": (f"configs/llama-{size}-{kind}.toml", on)
    for kind, machines in {"tpu": ["v5p:8x8x8"] * 4, "gpu": ["h100:64"] * 3 + ["h100:128"]}.items()
    for size, on in zip(["7b", "13b", "33b", "65b"], machines, strict=True)
}


def metrics(plan: dict, seconds: float, rss_kib: int) -> dict:
    """The values to record of a plan."""
    kept = {k: plan[k] for k in ("machine", "mesh", "gradient_accumulation", "remat", "fits")}
    gib = {k: plan["memory"][k] / 2**30 for k in ("peak", "available")}
    ratio = plan["step"]["flops"] / plan["step"]["model_flops"]
    return kept | {
        "peak_gib": gib["peak"],
        "available_gib": gib["available"],
        "flops_over_model": ratio,
        "kernels": plan["step"]["kernels"],
        "least_step_seconds": plan["time"]["step"],
        "bound_by": plan["time"]["bound_by"],
        "compiler_estimate_seconds": plan["time"]["compiler_estimate"],
        "planning_seconds": seconds,
        "planning_gib": rss_kib / 2**20,
    }


def main() -> None:
    kept = json.loads(FILE.read_text()) if FILE.exists() else {}
    for name in sys.argv[1:] or PLANS:
        recipe, on = PLANS[name]
        with tempfile.TemporaryDirectory() as folder:
            out = f"{folder}/plan.json"
            command = [sys.executable, "-m", "llama_jax.plan", recipe, "--on", on, "--output", out]
            start = time.perf_counter()
            process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
            _, status, usage = os.wait4(process.pid, 0)
            seconds = time.perf_counter() - start
            if os.waitstatus_to_exitcode(status):
                sys.exit(f"{name}: the plan failed or does not fit")
            kept[name] = metrics(json.loads(Path(out).read_text()), seconds, usage.ru_maxrss)
        FILE.write_text(json.dumps(kept, indent=1) + "\n")
        print(name, kept[name])


if __name__ == "__main__":
    main()
