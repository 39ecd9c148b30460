"""Tools for the tests of tasks: stock tasks on local documents, and a model with fixed answers."""

import json
from pathlib import Path

import pytest

SHARED = Path(__file__).parents[3] / "shared" / "data"


def stock_task(yaml: str, docs: dict[str, list]):
    """A task of the harness, with documents of ours by split."""
    import lm_eval.tasks
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks._yaml_loader import load_yaml

    config = load_yaml(Path(lm_eval.tasks.__file__).parent / yaml, resolve_func=True)
    data = {split: Dataset.from_list(rows) for split, rows in docs.items()}
    for split in ("training_split", "fewshot_split", "validation_split", "test_split"):
        if config.get(split) not in data:
            config.pop(split, None)
    return ConfigurableTask(config={**config, "custom_dataset": lambda **_: data})


def requests(task, limit=None) -> list[tuple]:
    """Arguments of all requests of a task."""
    task.build_all_requests(limit=limit)
    return [instance.args for instance in task.instances]


def scores(task, answers, limit=None) -> dict[str, float]:
    """Metrics of a task from the answers to its requests.

    Args:
      task: of the harness.
      answers: by request: log-likelihoods, or texts; or a function of the request's arguments and
        the number of the sample.
      limit: number of documents.
    """
    import lm_eval
    from lm_eval.api.model import LM

    class FixedModel(LM):
        def __init__(self):
            super().__init__()
            self.answers = answers if callable(answers) else iter(answers)
            self.asked = {}

        def answer(self, request):
            if not callable(answers):
                return next(self.answers)
            number = self.asked[request.args[0]] = self.asked.get(request.args[0], -1) + 1
            return answers(request.args, number)

        def loglikelihood(self, requests):
            return [(float(self.answer(request)), False) for request in requests]

        def generate_until(self, requests):
            return [self.answer(request) for request in requests]

        def loglikelihood_rolling(self, requests):
            raise NotImplementedError

    results = lm_eval.evaluate(
        FixedModel(), {task.config.task: task}, limit=limit, bootstrap_iters=0
    )["results"][task.config.task]
    return {
        name.removesuffix(",none"): float(value)
        for name, value in results.items()
        if name.endswith(",none") and "stderr" not in name
    }


def shared(path: str) -> Path:
    """A folder of the real test data."""
    if not (SHARED / path).exists():
        pytest.skip(f"no real test data: {SHARED / path}")
    return SHARED / path


def write(folder, name, content):
    """A file of text, or of one record a line; a .parquet file of records."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if name.endswith(".parquet"):
        from pyarrow import Table, parquet

        parquet.write_table(Table.from_pylist(content), path)
    elif isinstance(content, str):
        path.write_text(content, encoding="utf-8")
    else:
        path.write_text("".join(json.dumps(record) + "\n" for record in content))
