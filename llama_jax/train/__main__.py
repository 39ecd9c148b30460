"""Pretrain or fine-tune a model: ``python -m llama_jax.train [RECIPE] [section.key=value]``.

Writes checkpoints, metrics and a plot of the loss to a run folder. Starting the same command again
continues the run.
"""

import argparse
import contextlib
import signal
import sys
import textwrap
import threading
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama_jax.train import interrupt

if TYPE_CHECKING:
    from llama_jax.train.loop import Trainer


def main(argv: list[str] | None = None) -> int:
    """Run the command.

    Returns:
      The exit code: 0 finished; 1 the run failed; 2 the recipe is invalid; 75 the same command may
      succeed when it is started again; 130 stopped by Ctrl-C; 143 stopped by SIGTERM, here or in
      another process of the job.
    """
    # The imports take seconds; `interrupt.start_command` has to run before them.
    from llama_jax.checkpoint.checkpoints import CheckpointError
    from llama_jax.config import ConfigError, load_recipe, recipes_folder
    from llama_jax.io import file_error
    from llama_jax.train import failure, loop
    from llama_jax.train.distributed import JoinError, start_distributed
    from llama_jax.train.watchdog import EXIT_CODE

    arguments = list(_parser().parse_args(argv).arguments)
    has_recipe = bool(arguments) and ("=" not in arguments[0] or Path(arguments[0]).is_file())
    path = arguments.pop(0) if has_recipe else recipes_folder() / "tiny.toml"
    with interrupt.listening() as preemption, _quiet_threads():
        try:
            recipe = load_recipe(path, arguments)
            start_distributed()
            preemption.install()  # jax.distributed has replaced the handler of SIGTERM
            if failure.several():
                preemption.before_end = failure.end_all
            failure.watch()
            trainer = loop.run(recipe, preemption)
            if trainer is not None:
                preemption.phase("sampling; the run is finished and saved")
                try:
                    _print_samples(trainer)
                finally:
                    trainer.trackers.close()
        except KeyboardInterrupt:
            return 128 + (preemption.signal or signal.SIGINT)
        except ConfigError as e:
            return _fail(str(e), EXIT_CODE if isinstance(e, JoinError) else 2)
        except (loop.TrainingError, CheckpointError, OSError) as e:
            return _fail(file_error(e), 1)
        except Exception as e:
            text = (str(e).strip() or type(e).__name__).splitlines()[0]
            if "RESOURCE_EXHAUSTED" in text:
                return _fail(
                    f"out of memory while {preemption.doing}: {text:.300}\n"
                    "lower train.batch_size, raise train.gradient_accumulation, or set "
                    'train.remat="full"',
                    1,
                )
            if not failure.several():
                raise
            failure.wait_for_cause(str(e))
            traceback.print_exc()
            return _fail(f"{type(e).__name__}: {text}", 1)
        finally:
            failure.stop_watching()
    if preemption.signal == signal.SIGINT:
        return 128 + signal.SIGINT
    return 128 + signal.SIGTERM if preemption.stopped else 0


@contextlib.contextmanager
def _quiet_threads() -> Iterator[None]:
    """Print no traceback of an OSError in a thread: a full disk also ends the writing threads of
    libraries, and the main thread reports it once."""
    before = threading.excepthook
    threading.excepthook = lambda e: None if isinstance(e.exc_value, OSError) else before(e)
    try:
        yield
    finally:
        threading.excepthook = before


def _fail(error: str, code: int) -> int:
    from llama_jax.train import failure

    if failure.several():
        failure.wait_for_cause(error)
        failure.end_all(error, code)
    print(f"error: {error}", file=sys.stderr)
    return code


def _print_samples(trainer: "Trainer") -> None:
    """Print texts for ``train.sample_prompts``, if one process holds all weights."""
    import jax

    from llama_jax.train.metrics import log

    if not trainer.recipe.train.sample_prompts or jax.process_count() > 1:
        return
    answers = trainer.frozen or trainer.mixture.chat_template
    texts = []
    for text in (_answers if answers else _continuations)(trainer):
        log("sample:\n" + textwrap.indent(text, "  | ", lambda line: True))
        texts.append(text)
    trainer.trackers.samples(trainer.step, texts)


def _continuations(trainer: "Trainer") -> Iterator[str]:
    """Continue ``train.sample_prompts`` with the weights in memory."""
    import jax
    import numpy as np

    from llama_jax.generate.llm import LLM
    from llama_jax.model.llama import ComputeConfig

    recipe = trainer.recipe
    compute = ComputeConfig(np.dtype("float32"), unroll=trainer.compute.unroll)
    llm = LLM(recipe.model, jax.device_get(trainer.state.params), trainer.tokenizer, compute)
    for prompt, options in _sampling(trainer):
        yield prompt + llm.generate(prompt, **options)


def _answers(trainer: "Trainer") -> Iterator[str]:
    """Answer ``train.sample_prompts`` with the saved model, which has the adapter, the chat
    template and the stop ids of the run; without a template, continue them."""
    from llama_jax.generate.load import load
    from llama_jax.train.metrics import log

    trainer.release()
    try:
        llm = load(trainer.folder)
        for prompt, options in _sampling(trainer):
            if trainer.mixture.chat_template:
                yield f"{prompt}\n{llm.chat().say(prompt, **options)}"
            else:
                yield prompt + llm.generate(prompt, **options)
    except (ValueError, MemoryError) as e:  # such as a prompt too long for the chat template
        log(f"no samples: {e}")


def _sampling(trainer: "Trainer") -> Iterator[tuple[str, dict[str, Any]]]:
    """Each sample prompt, and how its text is generated. The seeds differ: with equal ones, a
    barely trained model continues all prompts alike."""
    from llama_jax.generate.sampler import Sample

    train = trainer.recipe.train
    for i, prompt in enumerate(train.sample_prompts):
        seed = (train.seed + i) % 2**32
        yield prompt, dict(max_new_tokens=100, sampling=Sample(temperature=0.7), seed=seed)


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, and say how a setting is written."""

    def error(self, message: str) -> Any:
        if message.startswith("unrecognized"):
            message += "; a setting has no dashes: section.key=value, such as train.steps=1000"
        self.exit(2, f"error: {message} (--help lists all)\n")


class _Formatter(argparse.HelpFormatter):
    """Does not break the names of recipes at hyphens."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return textwrap.fill(
            " ".join(text.split()), width, initial_indent=indent, subsequent_indent=indent,
            break_on_hyphens=False,
        )  # fmt: skip


def _parser() -> argparse.ArgumentParser:
    from llama_jax.config import SettingsHelp, recipe_names

    parser = _Parser(
        formatter_class=_Formatter,
        prog="python -m llama_jax.train",
        usage="%(prog)s [RECIPE] [section.key=value ...]",
        description="Pretrain or fine-tune a LLaMA. RECIPE is a TOML file or the name of a shipped "
        f"recipe: {', '.join(recipe_names())}. The default, tiny, needs no download.",
        add_help=False,
    )
    parser.add_argument(
        "arguments", nargs="*", metavar="section.key=value", help="a setting: TOML or plain text"
    )
    parser.add_argument("-h", "--help", action=SettingsHelp, help="settings of a section, or all")
    return parser


if __name__ == "__main__":
    interrupt.start_command()
    sys.exit(main())
