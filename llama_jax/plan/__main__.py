"""Plan a run before renting anything: does it fit, how fast can it be, what does it cost.

    python -m llama_jax.plan RECIPE.toml --on v5p:8x8x8 [section.key=value ...]
    python -m llama_jax.plan RECIPE.toml --on h100:64 --search
    python -m llama_jax.plan llama-7b --sample --on h200:1 --dtype int8 --batch 16
    python -m llama_jax.plan --table
    python -m llama_jax.plan --budget 1e22 --served-tokens 1e12
    python -m llama_jax.plan --paper

The recipe's real train step is compiled, by XLA's own compiler for that machine, on this one: no
TPU or GPU is looked for, and no network is used.
"""

import argparse
import contextlib
import json
import math
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from llama_jax.config import ConfigError, Recipe, load_recipe, to_toml
from llama_jax.plan import budget
from llama_jax.plan import inference as sampling
from llama_jax.plan.machines import EXAMPLES, Machine, PlanError, parse_machine

PICTURES = (".png", ".svg", ".pdf")


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code: 0 done, 1 does not fit or the compiler failed, 2 wrong
    arguments."""
    parser = _parser()
    args = parser.parse_intermixed_args(argv)
    _check(parser, args)
    try:
        return _run(args)
    except (ConfigError, PlanError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    except OSError as e:
        print(f"error: {e.filename or ''}: {e.strerror or e}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130


def _check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """End with a message where arguments do not go together."""
    kinds = [args.paper, args.table, args.budget is not None, bool(args.what)]
    if sum(kinds) != 1:
        parser.error("give RECIPE --on MACHINE, or --budget, --table or --paper (one of them)")
    if args.served_tokens and args.budget is None:
        parser.error("--served-tokens goes with --budget")
    if args.what and not args.on:
        parser.error(f"{args.what[0]}: on which machine? give --on, as {EXAMPLES}")
    if args.what and args.what[0] in sampling.MODELS and not args.sample:
        parser.error(f"{args.what[0]} is a model: give its recipe, or --sample to generate with it")
    if args.sample and len(args.what) > 1:
        parser.error(f"--sample takes one model, not {' '.join(args.what)}")
    if args.search and (args.sample or not args.what):
        parser.error("--search goes with a recipe")
    if args.search and args.on.startswith("cpu"):
        parser.error("--search needs a machine whose rates are known, not cpu")
    for name in ("dtype", "context", "batch"):
        if getattr(args, name) is not None and not args.sample:
            parser.error(f"--{name} goes with --sample")
    for name in ("power", "price"):
        if getattr(args, name) is not None and (args.sample or not args.what):
            parser.error(f"--{name} goes with a recipe")
    if args.on is not None and not args.what:
        parser.error("--on goes with a recipe or --sample")
    if args.out and (args.table or args.paper):
        parser.error("--out goes with a recipe, --sample or --budget")
    if args.out and args.budget is not None and args.out.suffix not in PICTURES:
        parser.error(f"--out {args.out}: a picture is one of {', '.join(PICTURES)}")
    if args.budget is not None and not 1e15 <= args.budget <= 1e35:
        parser.error(f"--budget {args.budget:g}: the law says something from 1e15 to 1e35")


def _run(args: argparse.Namespace) -> int:
    if args.table:
        print(sampling.table())
        return 0
    if args.sample:
        return _sample(args)
    if args.paper:
        print(budget.paper_text())
        return 0
    if args.budget is not None:
        print(budget.budget_text(args.budget, args.served_tokens))
        picture = args.out or Path("budget.png")
        budget.draw_budget(args.budget, args.served_tokens, picture)
        print(f"picture: {picture}")
        return 0
    return _plan(args)


def _sample(args: argparse.Namespace) -> int:
    name = args.what[0]
    cfg, on = sampling.model_of(name), parse_machine(args.on, inference=True)
    context = args.context or min(cfg.context, 4096)
    f = sampling.plan(cfg, on, args.dtype or "bfloat16", context, args.batch or 1)
    print(sampling.text(f, f"{name}, generating on {on.name}: {on.rates()}"))
    if args.out:
        args.out.write_text(json.dumps({"model": name} | f, indent=1) + "\n")
        print(f"saved: {args.out}")
    return 0 if f["fits"] else 1


def _plan(args: argparse.Namespace) -> int:
    path, *overrides = args.what
    recipe = load_recipe(path, overrides)
    on = parse_machine(args.on)
    prepare_jax(on.chips if on.chip.platform == "cpu" else 1)
    with quiet():
        from llama_jax.model.sharding import changed_settings
        from llama_jax.plan.compile import compile_step
        from llama_jax.plan.report import figures, text

        if args.search:
            compiled = _search(recipe, on, path)
        else:
            print(f"compiling {path} for {on.name} ...", file=sys.stderr, flush=True)
            compiled = compile_step(recipe, on)
        adapted = [f"{k}={v}" for k, v in changed_settings(recipe, compiled.recipe).items()]
    recipe = compiled.recipe
    plan = figures(compiled, args.power, args.price)
    sizes = " x ".join(f"{a} {n}" for a, n in compiled.mesh.items() if n > 1) or "one device"
    train = recipe.train
    title = (
        f"{path} on {on.name}: {on.chips} x {on.chip.title}, mesh {sizes} ({recipe.mesh.preset}), "
        f"{recipe.model.num_params / 1e9:.3g}B weights\n{train.batch_size} sequences of "
        f"{recipe.data.seq_len} tokens a step, in {train.gradient_accumulation} part(s)"
    )
    if adapted and not args.search:
        title += "\nadapted to the machine, as training does: " + ", ".join(adapted)
    print(text(plan, title, on.rates()))
    out = args.out or Path(f"plan-{Path(path).stem}-{on.name.replace(':', '-')}.json")
    out.write_text(
        json.dumps({"recipe": str(path), "overrides": overrides} | plan, indent=1) + "\n"
    )
    print(f"saved: {out}")
    return 0 if plan["fits"] else 1


def _search(recipe: Recipe, on: Machine, path: str) -> Any:
    """The fastest plan that fits, its recipe written; or the one that lacks least."""
    from llama_jax.plan.search import search

    fitting, nearest = search(recipe, on, lambda text: tqdm.write(text, file=sys.stderr))
    if fitting:
        made = Path(f"{Path(path).stem}-{on.name.replace(':', '-')}.toml")
        made.write_text(to_toml(fitting[0].recipe), encoding="utf-8")
        print(f"fastest of {len(fitting)} that fit; recipe written: {made}\n")
        return fitting[0]
    if nearest is None:
        raise PlanError(
            f"{path} on {on.name}: no mesh of {on.devices} devices divides the batch of "
            f"{recipe.train.batch_size} and the width of {recipe.model.dim}"
        )
    print(f"nothing fits on {on.name}; this comes nearest:\n")
    return nearest


def prepare_jax(cpus: int) -> None:
    """Before JAX starts: this process compiles only, so it looks for no TPU or GPU, asks no
    metadata server, and shares the TPU compiler with other processes."""
    os.environ |= {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",
        "TPU_ACCELERATOR_TYPE": "",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_STDERR_LOG_LEVEL": "3",
        "TPU_MIN_LOG_LEVEL": "3",
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }
    import jax

    with contextlib.suppress(RuntimeError):  # JAX runs already, with the devices that it has
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", cpus)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hold back what the compilers' libraries write to the terminal by themselves; shown when the
    plan fails for a reason that is not ours."""
    sys.stderr.flush()
    terminal = os.dup(2)
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        mine, sys.stderr = sys.stderr, os.fdopen(os.dup(terminal), "w", buffering=1)
        try:
            yield
        except (ConfigError, PlanError, KeyboardInterrupt):
            raise
        except BaseException:
            held.seek(0)
            os.write(terminal, held.read()[-20_000:])
            raise
        finally:
            sys.stderr.close()
            sys.stderr = mine
            os.dup2(terminal, 2)
            os.close(terminal)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m llama_jax.plan",
        description="Compile a recipe for a machine that need not be there; say whether it fits, "
        "how fast it can be and what it costs.",
        epilog=f"machines: {EXAMPLES}, ...",
    )
    arg = parser.add_argument
    arg(
        "what",
        nargs="*",
        metavar="RECIPE.toml | section.key=value",
        help="what to train; with --sample, a model",
    )
    arg("--on", metavar="MACHINE", help="chip and number or grid")
    arg("--search", action="store_true", help="try meshes, parts and remat; write the fastest")
    arg("--sample", action="store_true", help="generate with a model (llama-7b, ...), not train")
    arg("--dtype", choices=sampling.DTYPES, help="with --sample: of the weights (bfloat16)")
    arg("--context", type=_count, metavar="S", help="with --sample: positions of a sequence")
    arg("--batch", type=_count, metavar="B", help="with --sample: sequences at a time (1)")
    arg("--table", action="store_true", help="generation: every size against common cards")
    arg("--power", type=_positive, metavar="WATTS", help="of one chip, instead of the maker's")
    arg("--price", type=_positive, metavar="MONEY", help="of a chip-hour")
    arg("--budget", type=_positive, metavar="FLOP", help="which size to train with so much")
    arg(
        "--served-tokens", type=_positive, default=0.0, metavar="N",
        help="with --budget: tokens the model will serve",
    )  # fmt: skip
    arg("--paper", action="store_true", help="the paper's carbon table, computed again")
    arg("--out", type=_file, metavar="FILE", help="the JSON (or the picture) to write")
    return parser


def _count(text: str) -> int:
    if not re.fullmatch(r"[1-9]\d*", text, re.ASCII):
        raise argparse.ArgumentTypeError(f"{text!r:.100} is not a positive whole number")
    if len(text) > 9:
        raise argparse.ArgumentTypeError(f"{text:.100} is too large, more than 999,999,999")
    return int(text)


def _file(text: str) -> Path:
    """A file that can be written; found out before a compilation of minutes."""
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
