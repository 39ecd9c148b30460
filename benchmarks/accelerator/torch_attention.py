"""The peer of step "attention" in PyTorch."""

from benchmarks.accelerator.common import Row, Rows, Sizes
from benchmarks.accelerator.torch_peers import attention_rows


def rows(s: Sizes, earlier: dict[str, Row]) -> Rows:
    return attention_rows(s)
