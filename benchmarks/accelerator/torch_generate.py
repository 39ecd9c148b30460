"""The peer of step "generate" in PyTorch."""

from benchmarks.accelerator.common import Row, Rows, Sizes
from benchmarks.accelerator.torch_peers import generate_rows


def rows(s: Sizes, earlier: dict[str, Row]) -> Rows:
    return generate_rows(s)
