"""Plan a run before renting a machine: does it fit, how fast can it be, what does it cost?

    python -m llama_jax.plan RECIPE.toml --on v5p:8x8x8 [section.key=value ...]
    python -m llama_jax.plan RECIPE.toml --on h100:64 --search --output best.toml
    python -m llama_jax.plan llama-7b --inference --on h200:1 --dtype int8 --batch 16
    python -m llama_jax.plan --table
    python -m llama_jax.plan --budget 1e22 --inference-tokens 1e12
    python -m llama_jax.plan --paper

The recipe's real train step is compiled with XLA's compiler for that machine. No TPU or GPU is
needed, and no network is used.
"""

import argparse
import json
import math
import re
import sys
from pathlib import Path

from llama_jax.config import ConfigError, recipe_names, to_toml
from llama_jax.io import file_error
from llama_jax.plan import energy, inference, scaling_laws
from llama_jax.plan.command import plan_inference, plan_training
from llama_jax.plan.machines import EXAMPLES, PlanError

PICTURES = (".png", ".svg", ".pdf")


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit code.

    0: done; 1: does not fit, or a file error; 2: invalid arguments, or the compiler failed; 130:
    interrupted.
    """
    parser = _parser()
    args = parser.parse_intermixed_args(argv)
    _check(parser, args)
    try:
        return _run(args)
    except (ConfigError, PlanError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    except OSError as e:
        print(f"error: {file_error(e)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130


def _run(args: argparse.Namespace) -> int:
    if args.table or args.paper:
        print(inference.table() if args.table else energy.paper_text())
        return 0
    if args.budget is not None:
        print(scaling_laws.to_text(args.budget, args.inference_tokens))
        if args.output:
            scaling_laws.draw(args.budget, args.inference_tokens, args.output)
            print(f"saved: {args.output}")
        return 0
    target, *overrides = args.target
    recipe = None
    if args.inference:
        dtype, batch = args.dtype or "bfloat16", args.batch or 1
        cache = args.cache or "bfloat16"
        plan = plan_inference(target, args.on, dtype, args.context, batch, cache)
    else:
        plan, recipe = plan_training(
            target, overrides, args.on, args.search, args.power, args.price
        )
    if args.output:
        as_recipe = recipe and args.output.suffix == ".toml"
        text = to_toml(recipe) if as_recipe else json.dumps(plan, indent=1) + "\n"
        args.output.write_text(text, encoding="utf-8")
        print(f"saved: {args.output}")
    return 0 if plan["fits"] else 1


def _check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Exit with a message if arguments cannot be combined."""
    train = bool(args.target) and not args.inference
    if sum([args.paper, args.table, args.budget is not None, bool(args.target)]) != 1:
        parser.error("give RECIPE --on MACHINE, or --budget, --table or --paper (one of them)")
    if args.inference_tokens and args.budget is None:
        parser.error("--inference-tokens requires --budget")
    if args.target and not args.on:
        parser.error(f"{args.target[0]}: no machine given; add --on MACHINE, such as {EXAMPLES}")
    if train and args.target[0] in inference.MODELS.keys() - recipe_names():
        parser.error(f"{args.target[0]} is a model: give a recipe, or add --inference")
    if args.inference and len(args.target) > 1:
        parser.error(f"--inference takes one model, not {' '.join(args.target)}")
    if args.search and not train:
        parser.error("--search requires a recipe")
    if args.search and args.on.startswith("cpu"):
        parser.error("--search needs a machine with known rates, not cpu")
    for name in ("dtype", "cache", "context", "batch"):
        if getattr(args, name) is not None and not args.inference:
            parser.error(f"--{name} requires --inference")
    for name in ("power", "price"):
        if getattr(args, name) is not None and not train:
            parser.error(f"--{name} requires a recipe")
    if args.on is not None and not args.target:
        parser.error("--on requires a recipe or --inference")
    if args.output and (args.table or args.paper):
        parser.error("--output requires a recipe, --inference or --budget")
    if args.output and args.budget is not None and args.output.suffix not in PICTURES:
        parser.error(
            f"--output {args.output}: the extension of a picture must be {', '.join(PICTURES)}"
        )
    if args.budget is not None and not 1e15 <= args.budget <= 1e35:
        parser.error(f"--budget {args.budget:g}: the scaling law applies from 1e15 to 1e35 FLOPs")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m llama_jax.plan",
        description="Compile a recipe for a machine that may be absent, and report whether it "
        "fits, how fast it can be and what it costs.",
        epilog=f"machines: {EXAMPLES}, ...",
        allow_abbrev=False,
    )
    arg = parser.add_argument
    arg(
        "target",
        nargs="*",
        metavar="RECIPE.toml | section.key=value",
        help="a recipe and overrides; with --inference, a model such as llama-7b",
    )
    arg("--on", metavar="MACHINE", help="chip and number or topology")
    arg("--search", action="store_true", help="vary mesh, microbatches and what is kept")
    arg("--inference", action="store_true", help="plan generation with a model, not training")
    arg("--dtype", choices=inference.DTYPES, help="with --inference: of the weights (bfloat16)")
    arg(
        "--cache",
        choices=["int8"],
        help="with --inference: dtype of keys and values (default: bfloat16)",
    )
    arg("--context", type=_count, metavar="S", help="with --inference: positions per sequence")
    arg("--batch", type=_count, metavar="B", help="with --inference: sequences at a time (1)")
    arg("--table", action="store_true", help="inference: every model size on common chips")
    arg("--power", type=_positive, metavar="WATTS", help="per chip, instead of the vendor's number")
    arg("--price", type=_positive, metavar="MONEY", help="per chip-hour")
    arg("--budget", type=_positive, metavar="FLOPS", help="the best model size for these FLOPs")
    arg(
        "--inference-tokens", type=_positive, default=0.0, metavar="N",
        help="with --budget: tokens that the trained model will process",
    )  # fmt: skip
    arg("--paper", action="store_true", help="the LLaMA paper's carbon table, recomputed")
    arg(
        "--output", type=_file, metavar="FILE",
        help="write the plan (JSON), its recipe (FILE.toml), or with --budget a picture",
    )  # fmt: skip
    return parser


def _count(text: str) -> int:
    if not re.fullmatch(r"[1-9]\d*", text, re.ASCII):
        raise argparse.ArgumentTypeError(f"{text!r:.100} is not a positive whole number")
    if len(text) > 9:
        raise argparse.ArgumentTypeError(f"{text:.100} is too large, more than 999,999,999")
    return int(text)


def _file(text: str) -> Path:
    """A path that can be written; checked before minutes of compilation."""
    if not text.strip() or "\0" in text:
        raise argparse.ArgumentTypeError(f"{text!r} is not the name of a file")
    path = Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is a folder; give a file")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text}: there is no folder {path.parent}")
    return path


def _positive(text: str) -> float:
    try:
        value = float(re.sub(r"[,_]", "", text))
    except ValueError:
        value = math.nan
    if not (value > 0 and math.isfinite(value)):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number such as 1e22")
    return value


if __name__ == "__main__":
    sys.exit(main())
