"""Loading weights of Hugging Face and Meta: converted once, to a cache."""

import fcntl
import os
import shutil
import signal
import time
from pathlib import Path

import jax
import pytest
from convert_tools import DTYPES, make_hf, make_meta, meta_state, random_values, small
from forked import Forked

import llama_jax
from llama_jax.config import ConfigError
from llama_jax.convert import job
from llama_jax.prepare.tokenizer import train_tokenizer

TEXT = ["the cat sat on a mat", "some animals saw 12 cats", "def main(argv):"]
CFG = small(vocab_size=300)


@pytest.fixture(scope="module")
def weights():
    return meta_state(CFG, DTYPES["float32"], make=random_values)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    train_tokenizer([t for t in TEXT for _ in range(50)], 300, path)
    return path


@pytest.fixture
def source(tmp_path, weights, tokenizer):
    folder = make_hf(tmp_path / "hf", weights, CFG)
    shutil.copy(tokenizer, folder)
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """The conversions in the user's cache, which is a new folder here."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "cache/llama_jax/converted"
    return lambda: sorted(p for p in folder.iterdir() if p.is_dir())


def text_of(folder):
    return llama_jax.load(folder).generate("the cat", max_new_tokens=8)


def test_source_weights_are_converted_once(
    source, weights, tokenizer, cache, tmp_path, capfd, monkeypatch
):
    """One line at the first load, none at the second; the same text as converted weights."""
    want = text_of(job.convert(source, tmp_path / "converted"))
    capfd.readouterr()
    assert text_of(source) == want
    out, err = capfd.readouterr()
    (converted,) = cache()
    assert out == ""
    assert err == f"converting {source} (Hugging Face) once, to {converted}\n"
    monkeypatch.setattr(job, "convert", lambda *_, **__: pytest.fail("converted again"))
    monkeypatch.chdir(source.parent)
    assert text_of("hf") == want
    assert capfd.readouterr() == ("", "")
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    meta = make_meta(tmp_path / "meta", weights, CFG)
    shutil.copy(tokenizer, meta)
    assert text_of(meta) == want
    assert len(cache()) == 2


def test_a_source_that_has_changed_is_converted_again(source, weights, tokenizer, cache):
    first = text_of(source)
    shutil.rmtree(source)
    make_hf(source, {k: w[::-1].copy() for k, w in weights.items()}, CFG)
    shutil.copy(tokenizer, source)
    assert text_of(source) != first
    assert len(cache()) == 2


def test_a_changed_tokenizer_in_the_parent_folder(weights, tokenizer, cache, tmp_path):
    """LLaMA 1 of Meta has one tokenizer beside the folders 7B, 13B, ..."""
    folder = tmp_path / "LLaMA/7B"
    folder.parent.mkdir()
    make_meta(folder, weights, CFG)
    shutil.copy(tokenizer, tmp_path / "LLaMA")
    llama_jax.load(folder)
    llama_jax.load(folder)
    assert len(cache()) == 1
    texts = [t for t in (*TEXT, "ten dogs ran") for _ in range(50)]
    train_tokenizer(texts, 300, tmp_path / "LLaMA/tokenizer.model")
    llama_jax.load(folder)
    assert len(cache()) == 2


def test_a_cache_that_cannot_be_written(source, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(OSError, match=r"Not a directory; set XDG_CACHE_HOME to a folder .*file/"):
        llama_jax.load(source)
    converted = job.convert(source, tmp_path / "converted")
    monkeypatch.delenv("XDG_CACHE_HOME")

    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    compiled = "jax_compilation_cache_dir"
    before = jax.config.values[compiled]
    jax.config.update(compiled, None)
    try:
        with pytest.raises(ValueError, match="no home folder: set XDG_CACHE_HOME"):
            llama_jax.load(source)
        llama_jax.load(converted)
    finally:
        jax.config.update(compiled, before)


def test_a_source_with_a_long_name(source, cache):
    assert text_of(source.rename(source.with_name("é" * 120))) == text_of(cache()[0])


def test_sources_that_cannot_be_loaded(source, cache, tmp_path):
    """A missing tokenizer, before conversion; a damaged cache, with advice."""
    (source / "tokenizer.model").rename(tmp_path / "tokenizer.model")
    with pytest.raises(ConfigError, match=r"hf has no tokenizer \(tokenizer\.model or"):
        llama_jax.load(source)
    assert not (tmp_path / "cache").exists()
    (tmp_path / "tokenizer.model").rename(source / "tokenizer.model")
    llama_jax.load(source)
    (converted,) = cache()
    (converted / "steps/0/model/embed/c/0/0").write_bytes(b"x")
    with pytest.raises(ConfigError, match=r"hf-\w+ is converted from .*hf: remove it, and load"):
        llama_jax.load(source)
    (source / "model.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(ConfigError, match=r"hf cannot be loaded: .*not a safetensors file"):
        llama_jax.load(source)


def test_a_source_that_does_not_fit_is_not_converted(source, tmp_path, monkeypatch):
    monkeypatch.setattr("llama_jax.generate.load.device_memory", lambda *_: 1e4)
    with pytest.raises(MemoryError, match=r"weights of .*/hf take .* load with quantize="):
        llama_jax.load(source)
    assert not (tmp_path / "cache").exists()


def load_killed(source):
    job._write_small_files = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    llama_jax.load(source)


def load_slowly(source, converting, waiting):
    write = job._write_small_files

    def slow(*args):
        converting.touch()
        while not waiting.exists():
            time.sleep(0.01)
        time.sleep(1)
        return write(*args)

    job._write_small_files = slow
    jax.config.update("jax_platforms", "cpu")
    llama_jax.load(source)


def test_a_killed_conversion_and_two_processes_at_once(source, cache, tmp_path, capfd, monkeypatch):
    """An incomplete conversion is not read; of two processes one converts, the other waits."""
    killed = Forked(load_killed, source)
    err, _ = killed.communicate()
    assert killed.returncode == -signal.SIGKILL, err
    assert all(p.name.endswith(".partial") for p in cache())
    converting, waiting = tmp_path / "converting", tmp_path / "waiting"
    other = Forked(load_slowly, source, converting, waiting)
    while not converting.exists():
        assert other.poll() is None
        time.sleep(0.01)
    flock = fcntl.flock
    monkeypatch.setattr(fcntl, "flock", lambda *args: waiting.touch() or flock(*args))
    text = text_of(source)
    assert "converting" not in capfd.readouterr().err
    err, _ = other.communicate()
    assert other.returncode == 0, err
    assert err.startswith("converting ")
    (converted,) = cache()
    assert text_of(converted) == text == text_of(job.convert(source, tmp_path / "converted"))
