"""Runs tasks of lm-evaluation-harness on a model, and writes a report."""

import contextlib
import functools
import hashlib
import json
import logging
import math
import os
import time
import types
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import numpy as np
from tqdm import tqdm

from llama_jax.checkpoint.file_hashes import weights_sha256
from llama_jax.checkpoint.steps import loaded_step
from llama_jax.evaluate.journal import Journal
from llama_jax.evaluate.local_data import hashes
from llama_jax.evaluate.paper_task import TaskOptions
from llama_jax.evaluate.special_tokens import special_tokens
from llama_jax.io import folder_lock, sha256

if TYPE_CHECKING:
    from llama_jax.evaluate.harness_model import HarnessModel
    from llama_jax.evaluate.selection import Selection
    from llama_jax.generate.llm import LLM

ANSWERS = "answers.jsonl"


def evaluate(
    llm: "LLM",
    tasks: "Sequence[str] | Selection",
    options: TaskOptions,
    output: Path,
    *,
    limit: int | None = None,
    chat_template: bool = False,
    name: str = "",
    command: str = "",
) -> dict[str, Any]:
    """Evaluate a model, and write ``report.md``, ``report.json`` and ``chart.png``.

    Answers are kept in ``answers.jsonl`` of the output folder as they are computed. A run that was
    interrupted continues from them; answers of another model or of other settings are not used.

    Args:
      llm: a model made by :func:`llama_jax.load`.
      tasks: names, as for :func:`llama_jax.evaluate.selection.select_tasks`, or its result.
      options: data folder, number of samples, permission to run code.
      output: folder of the report and the answers, made if needed.
      limit: number of questions of each task; None: all.
      chat_template: whether to put each prompt in the model's chat template.
      name: of the model in the report; default: the name of its folder.
      command: the command line, for the report.

    Returns:
      The results of ``lm_eval.simple_evaluate``, with samples.

    Raises:
      ValueError: an unknown task, missing data, a model without chat template, NaN in the logits.
    """
    from llama_jax.evaluate.harness_model import HarnessModel
    from llama_jax.evaluate.report import RunInfo, write_report
    from llama_jax.evaluate.selection import Selection, select_tasks

    start = time.time()
    with quiet():
        selection = tasks if isinstance(tasks, Selection) else select_tasks(tasks, options)
        check_output(output)
        output.mkdir(parents=True, exist_ok=True)
        with folder_lock(output, "evaluating"):
            model = HarnessModel.from_llm(llm, Journal(output / ANSWERS, identity(llm)))
            results = run_tasks(model, selection, limit, chat_template)
            run = RunInfo(
                model=name or llm.tokenizer.path.resolve().parent.name,
                command=command,
                data=hashes(selection.files),
                limit=limit,
                chat_template=chat_template,
                truncated_prompts=sum(map(len, model.truncated.values())),
                sandbox=_sandbox(selection, options),
                missing=selection.missing,
                seconds=time.time() - start,
            )
            print(write_report(output, results, run))
    return results


def check_output(output: Path) -> None:
    """Refuse an output folder that cannot be written to, before a model is loaded.

    Raises:
      ValueError: the path or a parent is a file, or may not be written to.
    """
    parent = next(p for p in (output, *output.absolute().parents) if p.exists())
    if not parent.is_dir():
        raise ValueError(f"the output folder {output} cannot be made: {parent} is a file")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise ValueError(
            f"the output folder {output} cannot be written: no permission to write in {parent}; "
            "choose another folder"
        )


def run_tasks(
    model: "HarnessModel",
    selection: "Selection",
    limit: int | None = None,
    chat_template: bool = False,
) -> dict[str, Any]:
    """The results of ``lm_eval.simple_evaluate``.

    Args:
      model: answers the requests.
      selection: the tasks.
      limit: number of questions of each task; None: all.
      chat_template: whether to put each prompt in the model's chat template.

    Raises:
      ValueError: as for :func:`evaluate`.
    """
    import lm_eval.api.metrics
    import lm_eval.evaluator_utils
    from lm_eval.api.metrics import mean, mean_stderr
    from lm_eval.tasks import TaskManager

    class Loaded(TaskManager):
        def load(self, task_list: Any) -> Any:
            return selection.loaded

    if chat_template:
        model.chat_template(True)  # raises
    # The harness's bootstrap would fork this process with its threads: only means have standard
    # errors, from which the harness computes those of groups.
    only_of_means = lambda metric, bootstrap_iters: {mean: mean_stderr}.get(metric)
    functions = types.SimpleNamespace(**{**vars(math), "exp": _exp})
    with (
        mock.patch.object(lm_eval.evaluator_utils, "stderr_for_metric", only_of_means),
        mock.patch.object(lm_eval.api.metrics, "math", functions),
    ):
        return lm_eval.simple_evaluate(
            model=model, tasks=list(selection.loaded["tasks"]), limit=limit, bootstrap_iters=1,
            task_manager=Loaded(include_defaults=False), apply_chat_template=chat_template,
            torch_random_seed=None,  # would import torch, if that is installed
        )  # fmt: skip


def _exp(x: float) -> float:
    """Infinity for a perplexity beyond the range of numbers, such as that of a word in a language
    without blanks: the harness would end with an error after all answers."""
    try:
        return math.exp(x)
    except OverflowError:
        return math.inf


def identity(llm: "LLM") -> str:
    """What the answers of a model depend on: weights, sizes and settings such as rotary
    frequencies, adapter, tokenizer, special tokens, dtype, quantization."""
    compute = llm._engine.compute
    settings = dict(
        weights=_weights_hashes(llm),
        config=repr(llm.cfg),
        tokenizer=sha256(llm.tokenizer.path),
        special_tokens=special_tokens(llm.tokenizer, llm),
        eos=llm.eos_ids,
        compute=repr((compute.dtype, compute.cache_dtype)),
        model=repr(llm),
    )
    return json.dumps(settings, sort_keys=True)


def _weights_hashes(llm: "LLM") -> list[str]:
    if llm._checkpoint is None:  # weights in memory
        import jax

        digest = hashlib.sha256()
        for array in jax.tree.leaves(llm.params):
            digest.update(np.asarray(array).tobytes())
        return [digest.hexdigest()]
    folders = [llm._checkpoint]
    if llm._adapter:
        from llama_jax.generate.adapters import open_adapter

        folders.append(open_adapter(llm._adapter, llm._checkpoint).checkpoint)
    return [weights_sha256(folder, loaded_step(folder)) for folder in folders]


def _sandbox(selection: "Selection", options: TaskOptions) -> str:
    """What generated code ran in; "" if none ran."""
    if "code" not in selection.table_names or not options.allow_code_execution:
        return ""
    from llama_jax.evaluate.sandbox import sandbox_name

    return sandbox_name()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the messages and progress bars of the harness and of ``datasets``."""
    import datasets
    import lm_eval.api.task
    import lm_eval.evaluator

    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets", "huggingface_hub")]
    levels = [logger.level for logger in loggers]
    bars = not datasets.are_progress_bars_disabled()
    no_bar = functools.partial(tqdm, disable=True)
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    datasets.disable_progress_bars()
    try:
        with (
            warnings.catch_warnings(),
            mock.patch.object(lm_eval.api.task, "tqdm", no_bar),
            # It runs git in the current folder, which prints an error outside a repository.
            mock.patch.object(lm_eval.evaluator, "get_git_commit_hash", return_value=None),
            # It imports torch, if that is installed, and runs pip: seconds in each evaluation.
            mock.patch.object(lm_eval.evaluator, "add_env_info"),
        ):
            warnings.filterwarnings("ignore", module="(lm_eval|datasets|huggingface_hub)")
            yield
    finally:
        if bars:
            datasets.enable_progress_bars()
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
