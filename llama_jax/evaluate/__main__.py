"""The command ``python -m llama_jax.evaluate``: benchmarks of a model, with a report."""

import argparse
import shlex
import sys
from pathlib import Path

from llama_jax.generate.__main__ import Parser, command_errors, model_options
from llama_jax.storage.paths import as_path


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    args = _parser().parse_args(argv)
    with command_errors() as status:
        _evaluate(args, argv)
    return status.code


def _evaluate(args: argparse.Namespace, argv: list[str]) -> None:
    try:
        import lm_eval  # noqa: F401
    except ImportError:
        raise ValueError(
            "evaluation needs lm-evaluation-harness: pip install 'llama_jax[eval]'"
        ) from None
    from llama_jax.evaluate.load import load_model
    from llama_jax.evaluate.paper_task import TaskOptions
    from llama_jax.evaluate.run import check_output, evaluate, quiet
    from llama_jax.evaluate.selection import select_tasks

    for name, value in (("limit", args.limit), ("samples", args.samples)):
        if value is not None and value < 1:
            raise ValueError(f"--{name} {value} must be 1 or more")
    model = as_path(args.adapter or args.checkpoint)
    name = model.resolve().name if model.exists() else model.name
    output = args.output or Path("evaluations") / name
    options = TaskOptions(args.data, args.samples, args.allow_code_execution, output)
    # Output, names and data are checked before the weights are read, which may take minutes.
    check_output(output)
    with quiet():
        selection = select_tasks([n.strip() for n in args.tasks.split(",") if n.strip()], options)
    for task, reason in selection.missing.items():
        print(f"not evaluated: {task}: {reason}", file=sys.stderr)
    llm = load_model(
        args.checkpoint, adapter=args.adapter, dtype=args.dtype, quantize=args.quantize,
        tensor=args.tensor,
    )  # fmt: skip
    evaluate(
        llm, selection, options, output, limit=args.limit, chat_template=args.chat_template,
        name=name, command=shlex.join(["llama-jax", "evaluate", *argv]),
    )  # fmt: skip
    files = [x for x in ("report.md", "report.json", "chart.png") if (output / x).exists()]
    print(f"\nwritten to {output}: {', '.join(files)}", file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m llama_jax.evaluate",
        description="Evaluate a model on benchmarks with lm-evaluation-harness, and write a report "
        "with the results of the LLaMA paper beside its own. An interrupted run continues when it "
        "is started again.",
        epilog="example: %(prog)s checkpoints/tiny --tasks paper --data benchmarks",
    )
    arg = parser.add_argument
    arg("checkpoint", metavar="CHECKPOINT", help="folder of a run, or of converted, Hugging Face "
        "or Meta weights; or a GGUF file")  # fmt: skip
    arg("--tasks", default="paper", metavar="NAMES", help="tasks and sets of this package "
        "(default: the set paper), tasks, groups and tags of the harness, YAML files of tasks; "
        "separated by commas")  # fmt: skip
    arg("--data", type=Path, metavar="DIR", help="folder of the benchmarks' files")
    arg("--limit", type=int, metavar="N", help="only the first N questions of each task")
    arg("--output", type=Path, metavar="FOLDER", help="of the report and the answers (default: "
        "evaluations/NAME of the checkpoint)")  # fmt: skip
    arg("--samples", type=int, default=1, metavar="N", help="sampled answers per question, for "
        "pass@k and maj1@k (default: 1)")  # fmt: skip
    arg("--allow-code-execution", action="store_true", help="run generated code in a sandbox")
    arg("--chat-template", action="store_true", help="put prompts in the model's chat template")
    arg = model_options(parser)
    arg("--tensor", type=int, default=1, metavar="N", help="devices that each weight is sharded "
        "over (default: 1)")  # fmt: skip
    return parser


if __name__ == "__main__":
    sys.exit(main())
