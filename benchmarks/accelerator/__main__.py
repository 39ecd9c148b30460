"""Measures one accelerator: ``python -m benchmarks.accelerator [--minutes 10] [--output FOLDER]``.

Correctness of every kernel against float32, then times: attention, decode attention, quantized
products, sampling and training, beside cuDNN, PyTorch (if it is there with CUDA) and, on a TPU,
splash attention. It needs a GPU or TPU, jax, flax, optax, pydantic and tomli_w; no data and no
checkpoint. On a CPU the same code runs with tiny sizes, and its times mean nothing.

Each step runs in its own process: a crash or a hang ends that step alone. A step that does not fit
in the remaining minutes is skipped. The results are in FOLDER/accelerator.json after each row, the
table in FOLDER/table.txt; FOLDER/autotune keeps XLA's choices for the next run on the same machine.
"""

import argparse
import datetime
import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from llama_jax.io import atomic_write

ROOT = Path(__file__).parents[2]
NEEDED = (
    "jax", "flax", "optax", "numpy", "pydantic", "pydantic_core", "annotated_types",
    "typing_extensions", "typing_inspection", "tomli_w",
)  # fmt: skip
STEPS = {
    "card": 30, "correctness": 100, "attention": 90, "torch_attention": 30, "decode_attention": 50,
    "products": 40, "generate": 110, "train": 80, "torch_train": 60, "torch_generate": 80,
}  # fmt: skip
"""Name -> seconds that the step takes on a GPU, estimated"""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accelerator", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--minutes", type=float, default=10.0, help="time for all steps")
    parser.add_argument(
        "--output", type=Path, default=Path("accelerator-results"), metavar="FOLDER"
    )
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=list(STEPS), metavar="STEP",
                        help=f"only these of: {', '.join(STEPS)}")  # fmt: skip
    args = parser.parse_args()
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        sys.exit(f"missing packages: {', '.join(missing)}; install them with pip, or put their "
                 "wheels on PYTHONPATH")  # fmt: skip
    from benchmarks.accelerator.table import table

    args.output.mkdir(parents=True, exist_ok=True)
    run = Run(args.output, args.minutes)
    for name in args.steps:
        run.step(name)
    text = table(run.results)
    (args.output / "table.txt").write_text(text)
    print(text)
    sys.exit(1 if any(row.get("error") or row.get("wrong") for row in run.results["rows"]) else 0)


class Run:
    """The steps, their time, and the results file.

    Args:
      folder: of the results.
      minutes: for all steps.

    Example:
      run = Run(Path("accelerator"), minutes=10)
      run.step("card")
    """

    def __init__(self, folder: Path, minutes: float):
        self.folder, self.path = folder, folder / "accelerator.json"
        self.end = time.monotonic() + 60 * minutes
        self.results: dict[str, Any] = {
            "command": f"python -m benchmarks.accelerator {' '.join(sys.argv[1:])}".strip(),
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "rows": [],
        }
        self._write()

    def step(self, name: str) -> None:
        """Run a step in its own process, if there is time for it."""
        left, estimate = self.end - time.monotonic(), STEPS[name]
        if on_cpu := self._on_cpu():
            estimate = 5
        if estimate > left:
            why = f"it needs about {estimate:.0f} s, and {max(left, 0):.0f} s are left"
            self._add(name, {"name": name, "skipped": why})
            return
        print(f"{name} ...", file=sys.stderr, flush=True)
        log = self.folder / f"{name}.log"
        command = [sys.executable, "-m", "benchmarks.accelerator.part", name]
        limit = left if on_cpu else min(left, 1.5 * estimate)
        with log.open("w") as errors:
            process = subprocess.Popen(
                [*command, str(limit), str(self.path.resolve())], stdout=subprocess.PIPE,
                stderr=errors, text=True, cwd=ROOT, env=self._environment(),
                start_new_session=True,
            )  # fmt: skip
            # A kernel can hang. Otherwise the step ends by itself after the row that it is at.
            hung = threading.Timer(limit + min(60.0, estimate), _kill, [process])
            hung.start()
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith("row "):
                    self._add(name, json.loads(line[4:]))
            status = process.wait()
            timed_out, _ = not hung.is_alive(), hung.cancel()
        if status:
            last = [x for x in log.read_text().splitlines() if x.strip()][-1:] or ["no message"]
            why = "ended: it took too long" if timed_out else f"exit status {status}: {last[0]}"
            self._add(name, {"name": name, "error": why[:200]})

    def _on_cpu(self) -> bool:
        return any(row.get("platform") == "cpu" for row in self.results["rows"])

    def _environment(self) -> dict[str, str]:
        tuned = self.folder.resolve() / "autotune"
        tuned.mkdir(exist_ok=True)
        flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_per_fusion_autotune_cache_dir={tuned}"
        return {"XLA_PYTHON_CLIENT_MEM_FRACTION": ".92"} | os.environ | {"XLA_FLAGS": flags.strip()}

    def _add(self, step: str, row: dict[str, Any]) -> None:
        self.results["rows"].append({"step": step, **row})
        self._write()

    def _write(self) -> None:
        atomic_write(self.path, (json.dumps(self.results, indent=1) + "\n").encode())


def _kill(process: subprocess.Popen) -> None:
    os.killpg(process.pid, signal.SIGKILL)


if __name__ == "__main__":
    main()
