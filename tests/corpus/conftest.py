"""Fixtures of the tests of corpora."""

import pytest
from corpus_tools import use_toy_source
from forked import stop_server


@pytest.fixture(autouse=True, scope="module")
def own_server():
    """Tasks are forked from a server that has imported their steps."""
    stop_server()


@pytest.fixture
def corpus(monkeypatch, tmp_path, capsys):
    """Runs ``llama-jax corpus`` with the toy source, in ``tmp_path``.

    Returns the exit status, the output and the errors.
    """
    from llama_jax.corpus.__main__ import main

    use_toy_source(monkeypatch, tmp_path / "configs")
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        status = main(list(map(str, arguments)))
        return status, *capsys.readouterr()

    return run
