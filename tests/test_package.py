"""`import llama_jax`: public names and version."""

import importlib.metadata
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import llama_jax

ROOT = Path(__file__).parents[1]


def test_public_names():
    names = ["Greedy", "LLM", "MODELS", "Sample", "__version__", "load"]
    assert sorted(llama_jax.__all__) == dir(llama_jax) == names
    for name in names:
        assert getattr(llama_jax, name) is not None
    with pytest.raises(AttributeError, match="module 'llama_jax' has no attribute 'loda'"):
        llama_jax.loda  # noqa: B018


def test_names_of_a_model_are_those_for_users():
    public = [name for name in dir(llama_jax.LLM) if not name.startswith("_")]
    assert public == [
        "chat", "encode", "generate", "params", "perplexity", "score", "stream", "with_adapter",
    ]  # fmt: skip


@pytest.mark.parametrize("installed", ["9.8.7", None])
def test_version(installed, monkeypatch):
    """That of the installed package, or of a source checkout."""

    def version(name):
        if installed is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return installed

    monkeypatch.setattr(importlib.metadata, "version", version)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert llama_jax._version() == (installed or project["version"])


def test_star_import_and_dir_in_a_new_process():
    code = "from llama_jax import *; print(Sample(top_k=5).top_k, MODELS['tiny'].dim)"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.stdout.split() == ["5", str(llama_jax.MODELS["tiny"].dim)], run.stderr
