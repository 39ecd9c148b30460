"""What a run reads: prepared data, its tokenizer, and the checkpoint of ``train.init_from``."""

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.experimental.multihost_utils import sync_global_devices

from llama_jax.checkpoint.file_hashes import record_files, weights_sha256
from llama_jax.checkpoint.model_json import adapter_settings, read_metadata, write_model_files
from llama_jax.checkpoint.steps import loaded_step
from llama_jax.config import ConfigError, Recipe, to_dict
from llama_jax.data.chat_template import load_template
from llama_jax.data.manifest import SPLITS
from llama_jax.data.mixture import Mixture, fingerprint, open_mixture
from llama_jax.data.shard_cache import local_shards
from llama_jax.data.tokenizer import Tokenizer
from llama_jax.data.tokenizer_files import EXTRAS, JSON_FILE, MODEL_FILE
from llama_jax.io import atomic_write, sha256
from llama_jax.model.quantize import KINDS
from llama_jax.prepare.mixture import prepare_mixture
from llama_jax.storage.copies import local_files
from llama_jax.storage.paths import as_path
from llama_jax.train import run_folder

CHAT_FILES = (JSON_FILE, *EXTRAS, "generation_config.json")
"""Files of a chat model's checkpoint, besides its weights, tokenizer.model and model.json."""


class Pretrained(NamedTuple):
    """The checkpoint of ``train.init_from``."""

    folder: Path
    metadata: dict[str, Any]
    """The content of its model.json."""
    keeps_tokenizer: bool
    """Whether the run uses its tokenizer."""


def open_pretrained(recipe: Recipe) -> Pretrained | None:
    """The checkpoint from which a new run starts; None for random weights.

    Raises:
      ConfigError: the checkpoint holds another model or quantized weights, or the recipe has
        another tokenizer.
    """
    folder, data = recipe.train.init_from, recipe.data
    if not folder:
        return None
    cfg, metadata = read_metadata(folder)
    if "adapter" in metadata:
        raise ConfigError(
            f"train.init_from={folder} holds an adapter, not a whole model; to train from it, "
            f"merge it first: `llama-jax convert {folder} MERGED --merge`, and give MERGED"
        )
    kind = metadata.get("quantize")
    if kind and (recipe.lora is None or recipe.lora.base != kind):
        raise ConfigError(
            f"train.init_from={folder} holds {kind} matrices, which are for sampling; give the "
            f"weights from which they were made, or train adapters beside them: lora.base={kind}"
        )
    if changes := run_folder.differences(to_dict(cfg), to_dict(recipe.model)):
        raise ConfigError(
            f"train.init_from={folder} is another model:\n  "
            + "\n  ".join(run_folder.lines(changes))
            + "\nset model.name or the section [model] to the sizes of that checkpoint"
        )
    own = Tokenizer.load(folder)
    given = Tokenizer.load(data.tokenizer) if data.tokenizer else own
    keeps_tokenizer = sha256(given.path) == sha256(own.path)
    if not keeps_tokenizer and not recipe.train.allow_other_tokenizer:
        raise ConfigError(
            f"data.tokenizer={data.tokenizer} is not the tokenizer of train.init_from={folder} "
            f"({own.path}), so token ids would change their meaning; remove data.tokenizer, or set "
            "train.allow_other_tokenizer=true if this is intended"
        )
    return Pretrained(local_files(as_path(folder)), metadata, keeps_tokenizer)


def model_tokenizer(recipe: Recipe, mixture: Mixture, pretrained: Pretrained | None) -> Tokenizer:
    """The tokenizer with the files beside it in a checkpoint, which name its special tokens.

    Args:
      recipe: the run.
      mixture: its data.
      pretrained: the checkpoint from which a new run starts; None for a continued run.
    """
    if pretrained and pretrained.keeps_tokenizer:
        return Tokenizer.load(pretrained.folder)
    folder = as_path(recipe.checkpoint.dir)
    continued = (folder / "recipe.toml").exists()
    return Tokenizer.load(folder if continued else mixture.tokenizer)


def prepared_folder(recipe: Recipe) -> Path:
    """The folder of the token shards."""
    return as_path(recipe.data.prepared or as_path(recipe.checkpoint.dir) / "data")


def prepare_data(recipe: Recipe, pretrained: Pretrained | None) -> Mixture:
    """Prepare the data of a new run, with the tokenizer of the checkpoint from which it starts.

    Raises:
      ValueError: the text, the tokenizer or existing shards cannot be used.
    """
    data = recipe.data
    if pretrained and pretrained.keeps_tokenizer:
        data = dataclasses.replace(data, tokenizer=str(pretrained.folder))
    if jax.process_index() == 0:
        prepare_mixture(data, recipe.model.vocab_size, prepared_folder(recipe))
    sync_global_devices("prepared")
    return open_mixture(local_shards(prepared_folder(recipe)))


def reopen_data(recipe: Recipe) -> Mixture:
    """Open the data of a continued run.

    The text is not prepared again: if it has changed, the new shards would replace the data on
    which the model was trained. Folders made by `prepare` may have moved; their content is checked.

    Raises:
      ValueError: the shards or the tokenizer are not those of the run.
    """
    paths = {name: as_path(source.path) for name, source in recipe.data.sources.items()}
    moved = {n: p.resolve() for n, p in paths.items() if (p / "manifest.json").is_file()}
    mixture = open_mixture(local_shards(prepared_folder(recipe)), moved)
    saved = as_path(recipe.checkpoint.dir) / MODEL_FILE
    if sha256(mixture.tokenizer) != sha256(saved):
        raise ConfigError(
            f"{mixture.tokenizer} is not the tokenizer with which this run was trained, {saved}; "
            "the shards were prepared again: restore the old ones, or use another checkpoint.dir"
        )
    given = as_path(recipe.data.tokenizer)
    if given.is_file() and sha256(given) != sha256(saved):
        raise ConfigError(
            f"data.tokenizer={given} is not the tokenizer of this run, {saved}; use the old value, "
            "or another checkpoint.dir"
        )
    return mixture


def check_sources(recipe: Recipe, mixture: Mixture) -> None:
    """Check that the loss can be computed from the sources.

    Raises:
      ConfigError: a source has pairs and the recipe no [dpo], or the other way round, or nothing in
        a split counts in the loss.
    """
    for name, source in mixture.sources.items():
        conversations = source.manifest.get("conversations") or {}
        is_pairs = conversations.get("format") == "preference"
        if is_pairs and not recipe.dpo:
            raise ConfigError(
                f"source {name} has pairs of a chosen and a rejected answer: add the section [dpo] "
                "(such as dpo.beta=0.1) to train on them"
            )
        if recipe.dpo and not is_pairs:
            raise ConfigError(
                f"source {name} has no pairs of a chosen and a rejected answer, which [dpo] needs; "
                "remove the section [dpo], or give a source of the format preference"
            )
        for split, kind in zip(SPLITS, ("training", "validation"), strict=True):
            if conversations and not source.manifest["splits"][split].get("counted"):
                raise ConfigError(
                    f"source {name}: no token of its {kind} conversations counts in the loss; give "
                    'conversations with answers, or data.loss="all"'
                )


def check_prompts(recipe: Recipe, tokenizer: Tokenizer) -> None:
    """Raise a :class:`ConfigError` before training if a sample prompt is empty or too long."""
    bos = tokenizer.bos_id is not None
    for i, prompt in enumerate(recipe.train.sample_prompts):
        count = len(tokenizer.encode(prompt, bos=bos))
        if not 0 < count < recipe.model.context:
            raise ConfigError(
                f"train.sample_prompts: prompt {i + 1} has {count} tokens; it must have from 1 to "
                f"{recipe.model.context - 1}, one less than model.context"
            )


def write_start(
    recipe: Recipe, tokenizer: Tokenizer, mixture: Mixture, pretrained: Pretrained | None
) -> None:
    """Write model.json, the tokenizer and the chat files of a new run.

    Args:
      recipe: the run; its folder is ``checkpoint.dir``.
      tokenizer: the tokenizer of the data.
      mixture: the data. If conversations were prepared with a chat template, the run gets this
        template, and its end-of-turn ids become stop ids.
      pretrained: the checkpoint from which the run starts. If its tokenizer is kept, its chat files
        and special token ids are copied.
    """
    folder = as_path(recipe.checkpoint.dir)
    ids: dict[str, Any] = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id}
    ids = {k: v for k, v in ids.items() if v is not None}
    if pretrained and pretrained.keeps_tokenizer:
        ids = dict(pretrained.metadata.get("token_ids", ids))
        for name in CHAT_FILES:
            _copy(pretrained.folder / name, folder)
    if template := mixture.chat_template:
        _copy(template, folder)
        stop_ids = load_template("", template.parent).stop_ids(tokenizer)
        ids["eos"] = _united(ids.get("eos"), stop_ids)
    write_model_files(folder, recipe.model, tokenizer.path, ids, **_lineage(recipe, mixture))


def _copy(file: Path, folder: Path) -> None:
    if file.is_file():
        atomic_write(folder / file.name, file.read_bytes())
        record_files(folder, file.name)


def _united(eos: int | list[int] | None, more: Iterable[int]) -> int | list[int]:
    """EOS ids with more of them; one alone is a number, as in files of Hugging Face."""
    ids = list(eos) if isinstance(eos, list) else [] if eos is None else [eos]
    ids += [i for i in more if i not in ids]
    return ids[0] if len(ids) == 1 else ids


def _lineage(recipe: Recipe, mixture: Mixture) -> dict[str, Any]:
    """What model.json says about the origin of a new run's weights."""
    lineage: dict[str, Any] = {
        "data": {
            name: {
                "path": recipe.data.sources[name].path,
                "sha256": fingerprint(mixture, recipe.data, 0)["sources"][name]["shards"],
            }
            for name in mixture.sources
        }
    }
    adapter = None
    if folder := recipe.train.init_from:
        base = {"path": str(as_path(folder).resolve()), "sha256": _base_sha256(folder)}
        lineage = {"base": base} | lineage
        if lora := recipe.lora:
            kind = {"quantize": lora.base} if lora.base in KINDS else {}
            adapter = adapter_settings(lora, base | kind)
    return {"adapter": adapter, "lineage": lineage}


def _base_sha256(folder: str) -> str:
    return weights_sha256(as_path(folder), loaded_step(folder))


def check_base(recipe: Recipe) -> None:
    """Check that ``train.init_from`` still holds the weights with which a run with LoRA or DPO
    started.

    Raises:
      ConfigError: it holds others.
    """
    run, folder = recipe.checkpoint.dir, recipe.train.init_from
    recorded = read_metadata(run)[1].get("lineage", {}).get("base", {})
    if _base_sha256(folder) != recorded.get("sha256"):
        raise ConfigError(
            f"train.init_from={folder} does not hold the weights with which {run} started (then in "
            f"{recorded.get('path')}): give the folder that holds them, or use another "
            "checkpoint.dir"
        )
