"""The sources and their settings: TOML files in ``configs/corpus``, one per source."""

import importlib
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, NamedTuple

import pydantic

from llama_jax.config import load_settings, recipes_folder
from llama_jax.storage.copies import cache_folder

SOURCES = {
    "commoncrawl": "WET or WARC files of Common Crawl, as CCNet processed them",
    "c4": "WET or WARC files of Common Crawl, or files of C4, with the rules of C4",
    "github": "rows of BigQuery's GitHub data, or folders with checkouts",
    "wikipedia": "pages-articles dumps of Wikipedia",
    "books": "books of Project Gutenberg",
    "arxiv": "archives of LaTeX sources of arXiv",
    "stackexchange": "Posts.xml or 7z dumps of StackExchange",
}

WITHOUT_LANGUAGES = ("github", "arxiv")
"""Sources that do not know the languages of their documents."""

AFTERWARDS = {
    "deduplicate": "near-duplicates between and within complete corpora are dropped",
    "decontaminate": "documents of complete corpora with text of evaluation sets are dropped",
}
"""Run as sources, with complete corpora as input."""


class Common(pydantic.BaseModel, extra="forbid", frozen=True):
    """Settings of every source; see ``configs/corpus/common.toml``."""

    format: Literal["jsonl", "parquet"]


class CorpusRecipe(NamedTuple):
    """What a recipe says."""

    settings: Any
    """``Settings`` of the source"""
    common: Common


def source_module(source: str) -> ModuleType:
    """The module of a source.

    It has ``Settings``, the class of its settings; ``stages(run)``, which yields its stages;
    ``looks_like(content, name)``, whether a file with this beginning (decompressed) and name is of
    the source; and, if it reads other files than the input, ``models(run)``, which returns them.

    Raises:
        ValueError: The extra ``corpus`` is not installed.
    """
    try:
        return importlib.import_module(f"llama_jax.corpus.{source}")
    except ImportError as e:
        if (e.name or "").startswith("llama_jax"):
            raise
        raise ValueError(f"{e.name} is not installed: pip install 'llama_jax[corpus]'") from None


def load_corpus_recipe(
    source: str, recipe: Path | None = None, overrides: Sequence[str] = (), section: str = ""
) -> CorpusRecipe:
    """Settings of a source.

    Args:
        source: Name of the source.
        recipe: File whose settings replace those of the shipped file.
        overrides: ``NAME=VALUE``.
        section: Section of ``recipe`` that has the settings of the source.

    Raises:
        ValueError: A file that cannot be read, or settings that are unknown or wrong.
    """
    if recipe and not recipe.exists():
        example = f"configs/corpus/{source}.toml"
        raise ValueError(f"--recipe {recipe} does not exist; give a file such as {example}")
    cls = source_module(source).Settings
    combined = type("Settings", (cls, Common), {})
    folder = recipes_folder() / "corpus"
    shipped = [folder / "common.toml", folder / f"{source}.toml"]
    values = load_settings(combined, shipped, recipe, overrides, section)
    # The steps with the settings are copied to workers, which know the class of the source only.
    part = lambda c: c.model_construct(**{name: getattr(values, name) for name in c.model_fields})
    return CorpusRecipe(part(cls), part(Common))


def models_folder() -> Path:
    """Where ``llama-jax corpus models`` writes by default."""
    return cache_folder() / "corpus"
