"""What a run reads: prepared data, its tokenizer, and the checkpoint of ``train.init_from``."""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.experimental.multihost_utils import sync_global_devices

from llama_jax.checkpoint.file_hashes import record_files
from llama_jax.checkpoint.model_json import read_metadata, write_model_files
from llama_jax.config import ConfigError, Recipe, to_dict
from llama_jax.data.mixture import Mixture, open_mixture
from llama_jax.data.tokenizer import Tokenizer
from llama_jax.data.tokenizer_files import EXTRAS, JSON_FILE, MODEL_FILE
from llama_jax.io import atomic_write, sha256
from llama_jax.prepare.mixture import prepare_mixture
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
    if kind := metadata.get("quantize"):
        raise ConfigError(
            f"train.init_from={folder} holds {kind} matrices, which are for sampling; give the "
            "weights from which they were made"
        )
    if changes := run_folder.differences(to_dict(cfg), to_dict(recipe.model)):
        raise ConfigError(
            f"train.init_from={folder} is another model:\n  "
            + "\n  ".join(run_folder.lines(changes))
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
    return Pretrained(Path(folder), metadata, keeps_tokenizer)


def prepared_folder(recipe: Recipe) -> Path:
    """The folder of the token shards."""
    return Path(recipe.data.prepared or Path(recipe.checkpoint.dir) / "data")


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
    return open_mixture(prepared_folder(recipe))


def reopen_data(recipe: Recipe) -> Mixture:
    """Open the data of a continued run.

    The text is not prepared again: if it has changed, the new shards would replace the data on
    which the model was trained. Folders made by `prepare` may have moved; their content is checked.

    Raises:
      ValueError: the shards or the tokenizer are not those of the run.
    """
    paths = {name: Path(source.path) for name, source in recipe.data.sources.items()}
    moved = {n: p.resolve() for n, p in paths.items() if (p / "manifest.json").is_file()}
    mixture = open_mixture(prepared_folder(recipe), moved)
    saved = Path(recipe.checkpoint.dir) / MODEL_FILE
    if sha256(mixture.tokenizer) != sha256(saved):
        raise ConfigError(
            f"{mixture.tokenizer} is not the tokenizer with which this run was trained, {saved}; "
            "the shards were prepared again: restore the old ones, or use another checkpoint.dir"
        )
    given = Path(recipe.data.tokenizer)
    if given.is_file() and sha256(given) != sha256(saved):
        raise ConfigError(
            f"data.tokenizer={given} is not the tokenizer of this run, {saved}; use the old value, "
            "or another checkpoint.dir"
        )
    return mixture


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


def write_start(recipe: Recipe, tokenizer: Tokenizer, pretrained: Pretrained | None) -> None:
    """Write model.json and the tokenizer files of a new run.

    Args:
      recipe: the run; its folder is ``checkpoint.dir``.
      tokenizer: the tokenizer of the data.
      pretrained: the checkpoint from which the run starts. If its tokenizer is kept, its chat files
        and special token ids are copied.
    """
    folder = Path(recipe.checkpoint.dir)
    ids: dict[str, Any] = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id}
    ids = {k: v for k, v in ids.items() if v is not None}
    if pretrained and pretrained.keeps_tokenizer:
        ids = pretrained.metadata.get("token_ids", ids)
        for name in CHAT_FILES:
            if (pretrained.folder / name).is_file():
                atomic_write(folder / name, (pretrained.folder / name).read_bytes())
                record_files(folder, name)
    write_model_files(folder, recipe.model, tokenizer.path, ids)
