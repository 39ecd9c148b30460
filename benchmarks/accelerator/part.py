"""One step in its own process: ``python -m benchmarks.accelerator.part NAME SECONDS RESULTS``.

It prints a line ``row {...}`` of JSON for each row. A row that fails does not stop the next one.
"""

import gc
import importlib
import json
import sys
import time
import traceback
from pathlib import Path

from benchmarks.accelerator.common import one_line


def main() -> None:
    import jax

    from benchmarks.accelerator.common import sizes

    name, limit, results = sys.argv[1], float(sys.argv[2]), Path(sys.argv[3])
    deadline = time.monotonic() + limit
    earlier = {r["name"]: r for r in json.loads(results.read_text())["rows"]}
    step = importlib.import_module(f"benchmarks.accelerator.{name}")
    platform = jax.default_backend()
    if platform == "cpu":  # nothing is measured: compile quickly
        jax.config.update("jax_disable_most_optimizations", True)
    for row_name, measure in step.rows(sizes(platform), earlier):
        row = {"name": row_name}
        if time.monotonic() > deadline:
            row["skipped"] = "the step's time is over"
        else:
            start = time.monotonic()
            try:
                row |= measure()
            except NotImplementedError as e:
                row["cannot"] = one_line(e).partition(": ")[2]
            except Exception as e:
                traceback.print_exc()
                row["error"] = one_line(e)
            row["took"] = round(time.monotonic() - start, 1)
        print("row", json.dumps(row), flush=True)
        gc.collect()


if __name__ == "__main__":
    main()
