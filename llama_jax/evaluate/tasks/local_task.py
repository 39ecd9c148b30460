"""Tasks of the harness on documents that are already in memory."""

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

Doc = dict[str, Any]


def in_turn(groups: Iterable[Sequence[Doc]]) -> list[Doc]:
    """One document of each group in turn, so that a limit keeps documents of all groups."""
    turns = itertools.zip_longest(*groups)
    return [doc for turn in turns for doc in turn if doc is not None]


def local_task(
    name: str,
    docs: Sequence[Doc],
    metrics: Sequence[str],
    *,
    higher_is_better: bool = True,
    shots: Sequence[Doc] | Callable[[Doc], Sequence[Doc]] = (),
    answer_context: bool = False,
    samples: int = 1,
    sampling: dict[str, Any] | None = None,
    **config: Any,
) -> Any:
    """A task whose metrics are averages over documents.

    Args:
      name: of the task.
      docs: the documents; all have the same fields.
      metrics: their names, as the harness or ``process_results`` computes them.
      higher_is_better: whether a higher value of a metric is better.
      shots: examples that precede the questions, in this order; or a function that returns those
        of a question, whose number is the same for all.
      answer_context: compute the metric "acc_mutual_info" from log P(choice | prompt) -
        log P(choice | "Answer:"), as the paper does. The harness's own has an empty context.
      samples: if more than 1, a second request of each question is answered this many times.
      sampling: settings of the generation of those answers.
      config: other fields of ``lm_eval.config.task.TaskConfig``.

    Raises:
      ValueError: there are no documents.

    Returns:
      An ``lm_eval.api.task.ConfigurableTask``.
    """
    if not docs:
        raise ValueError(f"{name}: its data files have no questions")
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask

    examples = list(shots(docs[0]) if callable(shots) else shots)

    class LocalTask(ConfigurableTask):
        def download(self, *_: Any, **__: Any) -> None:
            self.dataset = {"test": Dataset.from_list(list(docs))}

        def fewshot_context(self, doc: Doc, **kwargs: Any) -> Any:
            if callable(shots):
                self.sampler.replace_df(shots(doc))
            return super().fewshot_context(doc, **kwargs)

        def construct_requests(self, doc: Doc, ctx: Any, **kwargs: Any) -> Any:
            requests = super().construct_requests(doc, ctx, **kwargs)
            if answer_context:
                for request in requests[len(requests) // 2 :]:
                    request.arguments = ("Answer:", request.arguments[1])
            if samples > 1:
                kwargs["metadata"] = (*kwargs["metadata"][:2], samples)
                sampled = super().construct_requests(doc, ctx, **kwargs)
                sampled.arguments, sampled.idx = (ctx, dict(sampling or {})), 1
                requests = [requests, sampled]
            return requests

    return LocalTask(
        config={
            "task": name,
            "test_split": "test",
            "num_fewshot": len(examples),
            "fewshot_config": {"sampler": "first_n", "samples": examples} if examples else None,
            "metric_list": [
                {"metric": metric, "aggregation": "mean", "higher_is_better": higher_is_better}
                for metric in metrics
            ],
            **config,
        }
    )
