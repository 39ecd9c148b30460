"""All benchmarks of the paper by name, and the sets that the command accepts."""

from llama_jax.evaluate.paper_task import PaperTask
from llama_jax.evaluate.tasks import (
    bias,
    closed_book,
    code,
    commonsense,
    knowledge,
    math_word,
    reading,
    toxicity,
    truthfulness,
)

TASKS: dict[str, PaperTask] = {
    **commonsense.TASKS,
    **knowledge.TASKS,
    **closed_book.TASKS,
    **reading.TASKS,
    **math_word.TASKS,
    **code.TASKS,
    **bias.TASKS,
    **toxicity.TASKS,
    **truthfulness.TASKS,
}
"""by name in the harness; each starts with ``paper_``"""


def task_sets() -> dict[str, list[str]]:
    """Names of the tasks of each set; "paper" has all."""
    sets: dict[str, list[str]] = {"paper": list(TASKS)}
    for name, task in TASKS.items():
        sets.setdefault(task.table, []).append(name)
    return sets
