"""The list of all settings, and the text of ``python -m llama_jax.train --help``."""

import argparse
import json
import os
import shutil
import sys
import textwrap
from types import UnionType
from typing import Any, NamedTuple, get_args

from llama_jax.config.model_config import MODELS, ModelConfig, RopeConfig
from llama_jax.config.recipe import (
    CheckpointConfig,
    DataConfig,
    DpoConfig,
    EvaluateConfig,
    LoraConfig,
    MeshConfig,
    OptimConfig,
    SourceConfig,
    TrainConfig,
)

SECTIONS = {
    "model": ModelConfig,
    "model.rope": RopeConfig,
    "data": DataConfig,
    "data.sources.NAME": SourceConfig,
    "mesh": MeshConfig,
    "optim": OptimConfig,
    "train": TrainConfig,
    "train.evaluate": EvaluateConfig,
    "lora": LoraConfig,
    "dpo": DpoConfig,
    "checkpoint": CheckpointConfig,
}

COMMON = (
    "model.name", "data.sources.NAME.path", "data.tokenizer", "data.seq_len", "optim.peak_lr",
    "optim.warmup_steps", "train.steps", "train.epochs", "train.batch_size",
    "train.gradient_accumulation", "train.init_from", "train.remat", "checkpoint.dir",
    "checkpoint.save_every",
)  # fmt: skip
"""The settings that most runs change; `--help` shows them first."""


class Setting(NamedTuple):
    """One setting of the recipe."""

    name: str
    type: str
    default: str
    meaning: str


def settings() -> list[Setting]:
    """Every setting with its type, default and meaning, section by section."""
    models = "start from a row of the table of models: " + ", ".join(MODELS)
    out = [Setting("model.name", "str", "optional", models)]
    for section, cls in SECTIONS.items():
        for key, field in cls.__pydantic_fields__.items():  # type: ignore[attr-defined]
            if (name := f"{section}.{key}") in ("model.rope", "data.sources", "train.evaluate"):
                continue  # sections of their own
            default = "from model.name" if cls is ModelConfig else "required"
            if not field.is_required():
                default = f"default {json.dumps(field.default)}".replace("default null", "optional")
            meaning = field.description.replace("\n", " ")
            out.append(Setting(name, _type_name(field.annotation), default, meaning))
    return out


def _type_name(annotation: Any) -> str:
    if annotation in (int, float, str, bool):
        return annotation.__name__
    args = [a for a in get_args(annotation) if a is not type(None)]
    if all(isinstance(a, str) for a in args):
        return "|".join(args)
    if isinstance(annotation, UnionType) and len(args) > 1:
        return "|".join(map(_type_name, args))
    if getattr(annotation, "__origin__", None) is tuple:
        return "[" + ", ".join("..." if a is ... else _type_name(a) for a in args) + "]"
    return _type_name(args[0])


class SettingsHelp(argparse.Action):
    """``-h``/``--help [SECTION]``: the common settings, one section, or (``all``) every setting.

    Example::

        parser = argparse.ArgumentParser(add_help=False)
        parser.add_argument("-h", "--help", action=SettingsHelp)
    """

    def __init__(self, option_strings: list[str], dest: str, help: str = ""):
        super().__init__(option_strings, dest, nargs="?", metavar="SECTION", help=help)

    def __call__(self, parser, namespace, values, option_string=None):
        if values and values not in (*SECTIONS, "all"):
            names = ", ".join(SECTIONS)
            parser.error(f"--help {values}: no such section; give one of {names}, or all")
        width = max(60, shutil.get_terminal_size().columns)
        text = "" if values else f"{parser.format_help()}\n"
        try:
            print(text + help_text(values or "", width), flush=True)
        except BrokenPipeError:  # `--help all | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        parser.exit()


def help_text(section: str, width: int) -> str:
    """The settings of a section; of all sections for "all"; for "", the common ones.

    Args:
      section: a key of `SECTIONS`, "all" or "".
      width: columns of the text.
    """
    if not section:
        common = [_row(s) for s in settings() if s.name in COMMON]
        more = "--help SECTION lists the settings of a section, --help all lists every setting."
        return "\n\n".join(
            [
                "Settings that most runs change:\n" + _table(common, width),
                "Sections:\n" + _table([(n, _title(n)) for n in SECTIONS], width),
                textwrap.fill(more, width),
            ]
        )
    in_section = lambda name: [_row(s) for s in settings() if s.name.rpartition(".")[0] == name]
    return "\n\n".join(
        textwrap.fill(f"[{name}]  {_title(name)}", width) + "\n" + _table(in_section(name), width)
        for name in (SECTIONS if section == "all" else [section])
    )


def _title(section: str) -> str:
    return (SECTIONS[section].__doc__ or "").partition("\n")[0]


def _row(setting: Setting) -> tuple[str, str]:
    return setting.name, f"{setting.meaning} ({setting.type}; {setting.default})"


def _table(rows: list[tuple[str, str]], width: int) -> str:
    indent = " " * (4 + max(len(name) for name, _ in rows))
    return "\n".join(
        textwrap.fill(
            text, width, initial_indent=f"  {name}".ljust(len(indent)), subsequent_indent=indent,
            break_on_hyphens=False,
        )
        for name, text in rows
    )  # fmt: skip
