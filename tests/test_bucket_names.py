"""Hostile or misspelt names of buckets and of the objects in them."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from llama_jax.config import ConfigError, load_recipe
from llama_jax.storage import paths
from llama_jax.storage.copies import local_folder
from llama_jax.storage.paths import StorageError, as_path, check_path, remove_tree

SECRET = "abcd/EFGH+1234"


@pytest.mark.parametrize(
    "url",
    [
        f"s3://AKIDEXAMPLE:{SECRET}@bucket/run",
        f"s3://AKIDEXAMPLE:EFGH@{SECRET}@bucket/run",
        f"s3://{SECRET.replace('/', '')}@bucket/run",
        f"gs://bucket/run?X-Goog-Signature={SECRET}",
        "s3:/bucket/run",
        "s3://my bucket/run",
    ],
)
def test_urls_with_credentials_or_mistakes_are_refused(url: str) -> None:
    """One line, which does not show the credentials."""
    with pytest.raises(ValueError, match=r"bucket|object") as plain:
        check_path(url)
    with pytest.raises(ConfigError, match=r"checkpoint\.dir=.*: the name|two slashes") as error:
        load_recipe("tiny", [f"checkpoint.dir={url}"])
    for text in (str(plain.value), str(error.value)):
        assert "EFGH" not in text
        assert "\n" not in text


@pytest.mark.parametrize("name", ["../../evil", "/OUTSIDE", "a/../../evil", "a//b", "a/./b"])
def test_objects_cannot_reach_local_files_outside_the_cache(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An object store accepts such names: nothing is written or deleted elsewhere."""
    outside = tmp_path / "outside"
    outside.write_text("mine")
    key = f"bucket/data/{name.replace('/OUTSIDE', str(outside))}"
    store = SimpleNamespace(
        ls=lambda *_, **__: [key],
        info=lambda *_, **__: {"type": "directory"},
        find=lambda *_, **__: {key: {"type": "file", "size": 4}},
        cat_file=lambda *_, **__: b"evil",
        rm_file=lambda *_, **__: None,
    )
    monkeypatch.setattr(paths, "filesystem", lambda _: store)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home/cache"))
    folder = as_path("s3://bucket/data")
    for use in (local_folder, remove_tree):
        with pytest.raises(StorageError, match="cannot be the name of a file"):
            use(folder)
    assert outside.read_text() == "mine"
    assert {p.name for p in tmp_path.rglob("*")} <= {"outside", "home", "cache", "llama_jax"}
