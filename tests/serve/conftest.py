"""A tiny model and its engine, once per test module."""

import pytest
from engine_tools import start_engine, tiny_llm


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    return tiny_llm(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def engine(llm):
    with pytest.MonkeyPatch.context() as monkeypatch:
        engine = start_engine(llm, monkeypatch)
    yield engine
    engine.drain(0)
