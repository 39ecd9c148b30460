"""Counts the kernels that a GPU launches for each token, in a compiled decode program."""

from llama_jax.plan.hlo import is_launch
from llama_jax.plan.hlo_text import Op, all_called, called, parse, trip_count


def launches(text: str) -> int:
    """Instructions of the largest loop's body that start a kernel or a copy.

    Args:
      text: `jax.stages.Compiled.as_text()` of the program that adds tokens; its loop over tokens
        is the largest one.
    """
    computations, _ = parse(text)
    loops = [op for ops in computations.values() for op in ops.values() if op.kind == "while"]
    return max((_count(computations, called(op, "body")) for op in loops), default=0)


def _count(computations: dict[str, dict[str, Op]], name: str) -> int:
    total = 0
    for op in computations[name].values():
        if op.kind == "while":
            inner = _count(computations, called(op, "body"))
            try:
                total += trip_count(computations, op) * inner
            except ValueError:
                total += inner
        elif op.kind in ("call", "async-start"):
            total += sum(_count(computations, c) for c in all_called(op) if c in computations)
        elif op.kind == "conditional":  # the cheapest branch: greedy, no log p
            total += min(_count(computations, c) for c in all_called(op) if c in computations)
        else:
            total += is_launch(op)
    return total
