"""``python -m llama_jax.prepare``: text and conversations to a tokenizer and token shards."""

import argparse
import dataclasses
import logging
import re
import sys
from pathlib import Path
from typing import get_args

import pydantic

from llama_jax.config import DataConfig, SourceConfig
from llama_jax.config.recipe import SourceFormat
from llama_jax.data.chat_template import BUILT_IN
from llama_jax.data.manifest import MANIFEST
from llama_jax.data.tokenizer import Tokenizer
from llama_jax.io import file_error, read_json_or_empty
from llama_jax.prepare.mixture import prepare_mixture
from llama_jax.prepare.python_library import PATHS
from llama_jax.prepare.show import show
from llama_jax.prepare.text import KNOWN
from llama_jax.storage.paths import as_path

EPILOG = """\
Example: two sources with LLaMA's tokenizer, for a recipe with the sources data/web and data/code.

  python -m llama_jax.prepare data --source web=web.jsonl.zst --source code=src/ \\
      --tokenizer tokenizer.model

Example: conversations with the chat template of a checkpoint, and a look at three of them.

  python -m llama_jax.prepare data --source alpaca=alpaca_data.json --tokenizer CHECKPOINT --show 3

Each source becomes the folder OUT/NAME; set data.sources.NAME.path of a recipe to it. The command
adds to OUT: sources prepared there earlier stay, and all have one tokenizer. Sources that are up to
date are not prepared again. After an interruption, the same command continues.
"""


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        data = _settings(options)
        vocab_size = options.vocab_size
        if vocab_size is None:
            vocab_size = Tokenizer.load(options.tokenizer).vocab_size
        out = prepare_mixture(data, vocab_size, options.out, keep_sources=True)
    except (ValueError, OSError) as e:
        sys.exit(f"error: {file_error(e)}")
    except KeyboardInterrupt:
        print("interrupted; the same command continues from here", file=sys.stderr)
        sys.exit(130)
    for name in data.sources:
        for split, n in read_json_or_empty(out / name / MANIFEST).get("splits", {}).items():
            # The tokens of conversations are also those of the template, which text_bytes lacks.
            more = (
                f"{n['counted']:,} count in the loss"
                if "counted" in n
                else f"{n['text_bytes'] / n['tokens']:.2f} bytes/token"
            )
            print(
                f"{name:16} {'train' if split == 'train' else 'val':5} "
                f"{n['documents']:>12,} documents {n['tokens']:>16,} tokens {more}"
            )
    if options.show > 0:
        for name, source in data.sources.items():
            folder = out / name
            show(folder if folder.is_dir() else Path(source.path), options.show)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m llama_jax.prepare",
        description="Encode text and conversations into token shards for training.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "out",
        metavar="OUT",
        help="folder to write, also gs://... or s3://...: one folder per source, and the tokenizer",
    )
    what = f"repeatable; PATH: a folder, {KNOWN}, {', '.join(PATHS)}"
    add("--source", action="append", required=True, metavar="NAME=PATH[:WEIGHT]", help=what)
    tokenizer = parser.add_mutually_exclusive_group(required=True)
    what = "SentencePiece model, tokenizer.json, tiktoken text, or the folder of a checkpoint"
    tokenizer.add_argument("--tokenizer", default="", metavar="FILE", help=what)
    what = "train a tokenizer of V ids, if OUT has no other sources"
    tokenizer.add_argument("--vocab-size", type=int, metavar="V", help=what)
    what = "fraction of the documents for validation (default 0.02)"
    add("--val-fraction", type=float, default=0.02, metavar="X", help=what)
    add("--workers", type=int, default=0, metavar="N", help="threads (default: one per core)")
    what = "leave out lines that cannot be used, and count them (default: stop with an error)"
    add("--skip-bad-lines", action="store_true", help=what)
    what = "of the records of all sources (default auto: the first record decides)"
    formats = get_args(SourceFormat)
    add(
        "--format",
        choices=formats,
        default="auto",
        metavar="FORMAT",
        help=f"{', '.join(formats)}: {what}",
    )
    what = "chat template of conversations: %s, or a .jinja file (default: that of the folder FILE)"
    add("--template", default="", metavar="NAME", help=what % ", ".join(BUILT_IN))
    what = "tokens of conversations that count in the loss (default answers)"
    add("--loss", choices=("answers", "all"), default="answers", help=what)
    what = "print N documents of each source, with the tokens that count in the loss marked"
    add("--show", type=int, default=0, metavar="N", help=what)
    return parser


def parse_source(argument: str) -> tuple[str, SourceConfig]:
    """``NAME=PATH[:WEIGHT]``; only a number after the last colon is a weight."""
    number = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
    found = re.fullmatch(rf"([^=]+)=(.+?)(?::({number}))?", argument)
    if not found:
        raise ValueError(f"--source {argument} is not of the form NAME=PATH or NAME=PATH:WEIGHT")
    weight = float(found[3] or 1)
    if not 0 < weight < float("inf"):
        raise ValueError(f"--source {argument}: the weight {found[3]} must be more than 0")
    return found[1], SourceConfig(path=found[2], weight=weight)


def _settings(options: argparse.Namespace) -> DataConfig:
    if not options.out.strip():
        raise ValueError("OUT is empty; give a folder, or a URL of a bucket")
    out = as_path(options.out)  # refuses URLs of other kinds
    if isinstance(out, Path) and out.exists() and not out.is_dir():
        raise ValueError(f"OUT {options.out} is a file; give a folder")
    sources: dict[str, SourceConfig] = {}
    try:
        for argument in options.source:
            name, source = parse_source(argument)
            if name in sources:
                raise ValueError(f"--source {name} is given twice")
            sources[name] = dataclasses.replace(source, format=options.format)
        return DataConfig(
            sources=sources,
            tokenizer=options.tokenizer,
            seq_len=1,
            packing="examples",
            template=options.template,
            loss=options.loss,
            val_fraction=options.val_fraction,
            workers=options.workers,
            skip_bad_lines=options.skip_bad_lines,
        )
    except pydantic.ValidationError as e:
        error = e.errors(include_url=False)[0]
        message = error["msg"].removeprefix("Value error, ")
        if error["loc"] in ((), ("path",)):  # of all sources, or of one
            given = f" {error['input']}" if error["loc"] else ""
            raise ValueError(f"--source{given}: {message}") from None
        option = str(error["loc"][0]).replace("_", "-")
        raise ValueError(f"--{option} {error['input']}: {message}") from None


if __name__ == "__main__":
    main()
