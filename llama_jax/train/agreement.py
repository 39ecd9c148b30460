"""Checks that all processes of a job have the recipe, the software and the data of process 0."""

import fnmatch
import json
from typing import Any

import jax

from llama_jax.config import ConfigError, Recipe, to_dict
from llama_jax.data.mixture import Mixture, fingerprint
from llama_jax.io import sha256
from llama_jax.train import failure, run_folder
from llama_jax.versions import source_version

MAY_DIFFER = ("data.prepared", "data.tokenizer", "data.sources.*.path", "data.workers",
              "train.init_from", "train.evaluate.data")  # fmt: skip
"""Settings that may differ between hosts: paths of a local disk, and threads."""


def check_recipe(recipe: Recipe) -> None:
    """Raise a :class:`ConfigError` unless process 0 has the same recipe and software."""
    if not failure.several():  # without the calls of git that find the version of the source
        return
    different = [
        f"{name}={now!r:.100} (process 0: {was!r:.100})"
        for name, (was, now) in _differences(
            to_dict(recipe) | {"llama_jax": source_version(), "jax": jax.__version__}
        ).items()
        if not any(fnmatch.fnmatchcase(name, pattern) for pattern in MAY_DIFFER)
    ]
    if different:
        raise ConfigError(
            f"not the recipe and software of process 0: {', '.join(different)}; start the same "
            "command with the same software on every host"
        )


def check_data(recipe: Recipe, mixture: Mixture) -> None:
    """Raise a :class:`ConfigError` unless process 0 has the same shards and tokenizer."""
    sources = fingerprint(mixture, recipe.data, 0)["sources"]
    mine = {f"the shards of source {name}": s["shards"] for name, s in sources.items()}
    mine["the tokenizer"] = sha256(mixture.tokenizer)
    if changes := _differences(mine):
        raise ConfigError(
            f"not the data of process 0: {' and '.join(changes)} in {mixture.tokenizer.parent} "
            "differ; copy the prepared data of process 0 to every host"
        )


def _differences(mine: dict[str, Any]) -> run_folder.Changes:
    """What differs from process 0's value; nothing in a run of one process."""
    if not failure.several():
        return {}
    (of_process_0,) = failure.values(mine, [0])
    return run_folder.differences(of_process_0, json.loads(json.dumps(mine)))
