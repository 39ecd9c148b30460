"""The command line of ``llama-jax corpus``. ``--help`` does not need the extra ``corpus``."""

import argparse
import contextlib
import difflib
import importlib
import os
import re
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llama_jax.config import recipes_folder
from llama_jax.corpus.recipe import (
    AFTERWARDS,
    SOURCES,
    WITHOUT_LANGUAGES,
    load_corpus_recipe,
    models_folder,
)
from llama_jax.io import file_error

OTHERS = {
    "all": "all sources from a folder with one folder of dumps per source",
    "models": "train or fetch the models that commoncrawl and c4 need",
    "report": "table and picture of a corpus: share, epochs, size of each source",
}
EPILOG = """\
sources:
{sources}
other commands:
{others}

Example: the articles of two Wikipedias, with 4 processes.

  llama-jax corpus wikipedia itwiki-pages-articles.xml.bz2 dewiki-pages-articles.xml.bz2 \\
      --output corpus/wikipedia --workers 4

The settings of a source are in configs/corpus/SOURCE.toml; --recipe and NAME=VALUE replace single
ones. After an interruption, the same command continues.
"""


def run_command(argv: list[str]) -> int:
    """Runs a command; returns the exit status."""
    argv = argv or ["--help"]
    command = argv[0]
    if command in ("models", "report"):
        return importlib.import_module(f"llama_jax.corpus.{command}").main(argv[1:])
    parse = _all_options if command == "all" else _options
    run = _run_all if command == "all" else _run_source
    try:
        options = parse(argv)
        return run(options)
    except (ValueError, OSError) as e:
        print(f"error: {file_error(e)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command continues from here", file=sys.stderr)
        return 130


def _run_source(options: argparse.Namespace) -> int:
    from llama_jax.corpus.explain import explain
    from llama_jax.corpus.job import make_corpus
    from llama_jax.corpus.manifest import table

    source, output = options.source, options.output
    if options.explain is not None:
        print(explain(output, options.explain))
        return 0
    if options.language and source in (*WITHOUT_LANGUAGES, *AFTERWARDS):
        raise ValueError(
            f"--language does not apply to {source}, which does not select documents by language"
        )
    if not options.inputs:
        raise ValueError(f"give the files or folders that {source} reads")
    recipe = load_corpus_recipe(source, options.recipe, options.overrides)
    corpus = make_corpus(
        source, options.inputs, output, _place(options), recipe, options.language, options.models
    )
    if corpus.was_complete:
        print(f"{output} is complete already; nothing was done")
    print(table(corpus.manifest))
    print(
        f"{corpus.manifest['documents']:,} documents, "
        f"{corpus.manifest['text_bytes']:,} bytes of text: {output}"
    )
    return 0


def _run_all(options: argparse.Namespace) -> int:
    from llama_jax.corpus.job import make_corpus

    recipe = options.recipe or recipes_folder() / "corpus-small.toml"
    _check_sections(recipe, options.overrides)
    if not options.dumps.is_dir():
        raise ValueError(f"{options.dumps} is not a folder; give one with a folder per source")
    found = [source for source in SOURCES if (options.dumps / source).is_dir()]
    if not found:
        raise ValueError(f"{options.dumps} has none of the folders {', '.join(SOURCES)}")
    status = 0
    for source in SOURCES:
        if source not in found:
            print(f"{source}: {options.dumps / source} does not exist: left out", file=sys.stderr)
            continue
        try:
            own = [o.partition(".")[2] for o in options.overrides if o.startswith(f"{source}.")]
            settings = load_corpus_recipe(source, recipe, own, section=source)
            languages = () if source in WITHOUT_LANGUAGES else options.language
            corpus = make_corpus(
                source, [options.dumps / source], options.output / source, _place(options),
                settings, languages, options.models,
            )  # fmt: skip
        except (ValueError, OSError) as e:
            print(f"error: {source}: {file_error(e)}", file=sys.stderr)
            status = 1
            continue
        manifest = corpus.manifest
        print(
            f"{source:14} {manifest['documents']:>12,} documents "
            f"{manifest['text_bytes']:>16,} bytes of text"
        )
    return status


def _check_sections(recipe: Path, overrides: Sequence[str]) -> None:
    """Checks that the sections of a recipe, and of overrides, are sources."""
    names = [("command line", override.partition(".")[0]) for override in overrides]
    with contextlib.suppress(ValueError):  # the error of parsing it comes later
        sections = tomllib.loads(recipe.read_text(encoding="utf-8"))
        names += [(str(recipe), name) for name in sections if name != "extends"]
    for where, name in names:
        if name not in SOURCES:
            raise ValueError(f"{where}: {name} is not a source{_nearest(name, SOURCES)}")


def _place(options: argparse.Namespace) -> Any:
    from llama_jax.corpus.executors import Local, Ray, Slurm

    if options.slurm:
        return Slurm(options.slurm)
    return Ray(options.ray) if options.ray else Local(options.workers)


# Options -----------------------------------------------------------------------------------------


def _options(argv: list[str]) -> argparse.Namespace:
    width = max(map(len, SOURCES))
    listed = lambda names: "\n".join(f"  {name:{width}}  {what}" for name, what in names.items())
    others = {**AFTERWARDS, **OTHERS}
    parser = argparse.ArgumentParser(
        prog="llama-jax corpus",
        usage="llama-jax corpus SOURCE INPUT... --output DIR [options] [NAME=VALUE ...]",
        description="Make clean text of raw public dumps, as the LLaMA paper describes.",
        epilog=EPILOG.format(sources=listed(SOURCES), others=listed(others)),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", metavar="SOURCE", help="name of a source, see below")
    parser.add_argument("inputs", nargs="*", metavar="INPUT", help="files or folders of the dump")
    what = "say which step dropped a document of DIR and why; ID: its id, URL or place"
    parser.add_argument("--explain", metavar="ID", help=what)
    _add_common(parser)
    options = parser.parse_intermixed_args(argv)
    if options.source not in (*SOURCES, *AFTERWARDS):
        names = [*SOURCES, *AFTERWARDS, *OTHERS]
        raise ValueError(f"unknown source {options.source!r}{_nearest(options.source, names)}")
    if "=" in options.inputs:
        raise ValueError("write settings as NAME=VALUE, without spaces")
    options.overrides = [text for text in options.inputs if _is_override(text)]
    for code in options.language:
        if not re.fullmatch(r"[a-z]{2,12}([-_]\w+)*", code):
            hint = "; give INPUT before --language" if Path(code).exists() else ""
            raise ValueError(f"--language {code} is not the code of a language, such as en{hint}")
    options.inputs = [Path(text) for text in options.inputs if not _is_override(text)]
    return options


def _all_options(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="llama-jax corpus all",
        description="Make the corpus of every source that has a folder in DUMPS.",
    )
    parser.add_argument("dumps", type=Path, metavar="DUMPS", help="folder with DUMPS/SOURCE")
    what = "settings of a source, such as wikipedia.format=parquet"
    parser.add_argument("overrides", nargs="*", metavar="SOURCE.NAME=VALUE", help=what)
    _add_common(parser)
    return parser.parse_intermixed_args(argv[1:])


def _add_common(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--output", type=Path, required=True, metavar="DIR", help="folder to write")
    where = parser.add_mutually_exclusive_group()
    what = "processes on this machine (default: one per core)"
    where.add_argument("--workers", type=_count, default=_cores(), metavar="N", help=what)
    what = "run the tasks as a job of this Slurm partition"
    where.add_argument("--slurm", metavar="PARTITION", help=what)
    what = "run the tasks on this Ray cluster; auto: the one of this machine"
    where.add_argument("--ray", metavar="ADDRESS", help=what)
    without = " and ".join(WITHOUT_LANGUAGES)
    what = f"languages to keep (default: those of the settings); not for {without}"
    add("--language", nargs="+", action="extend", default=[], metavar="CODE", help=what)
    what = "settings that replace those of the shipped file"
    add("--recipe", type=Path, metavar="FILE", help=what)
    what = f"folder of the models (default: {models_folder()})"
    add("--models", type=Path, default=models_folder(), metavar="DIR", help=what)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of processes, such as 4")
    return int(text)


def _is_override(text: str) -> bool:
    return bool(re.match(r"[A-Za-z_][\w.]*=", text)) and not Path(text).exists()


def _nearest(name: str, known: Sequence[str] | dict[str, str]) -> str:
    close = difflib.get_close_matches(name, list(known), 1)
    return f"; did you mean {close[0]}?" if close else f"; known: {', '.join(known)}"
