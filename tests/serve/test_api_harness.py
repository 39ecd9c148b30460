"""lm-evaluation-harness asks the server: the answers are those of the model in this process."""

import json

import pytest

pytest.importorskip("starlette", reason="needs the extra serve")
pytest.importorskip("lm_eval")
pytest.importorskip("transformers")
pytest.importorskip("tenacity")

import lm_eval
from api_tools import Running
from engine_tools import start_engine
from flax import nnx
from model_tools import F32, small

from llama_jax.data.tokenizer import Tokenizer
from llama_jax.evaluate.harness_model import HarnessModel
from llama_jax.generate.llm import LLM
from llama_jax.model.llama import Llama
from llama_jax.model.params import params_of
from llama_jax.prepare.tokenizer import train_tokenizer
from llama_jax.serve.models import served_model

TEXT = ["the cat sat on a mat.", "some animals saw 12 cats!", "日本 and é"]
QUESTIONS = [
    {"question": "the cat sat on", "choices": [" a mat.", " 12 cats!"], "answer": 0},
    {"question": "some animals", "choices": [" saw", " sat on a mat", "日本"], "answer": 0},
    {"question": "saw 12", "choices": [" cats", " animals", "é"], "answer": 2},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tokenizer like LLaMA's in the files of transformers, and a data set."""
    from llama_jax.data.sentencepiece_json import to_json

    folder = tmp_path_factory.mktemp("model")
    train_tokenizer([t for t in TEXT for _ in range(50)], 300, folder / "tokenizer.model")
    tree = to_json((folder / "tokenizer.model").read_bytes())
    (folder / "tokenizer.json").write_text(json.dumps(tree))
    settings = dict(tokenizer_class="PreTrainedTokenizerFast", bos_token="<s>", eos_token="</s>")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "questions.jsonl").write_text("".join(json.dumps(q) + "\n" for q in QUESTIONS))
    return folder


@pytest.fixture(scope="module")
def llm(folder):
    cfg = small(vocab_size=300, context=128)
    params = params_of(Llama(cfg, F32, nnx.Rngs(0), 0.3))
    return LLM(cfg, params, Tokenizer.load(folder), F32)


def tasks(folder):
    data = dict(
        dataset_path="json", dataset_kwargs={"data_files": str(folder / "questions.jsonl")},
        test_split="train", doc_to_text="{{question}}",
    )  # fmt: skip
    return [
        data | dict(task="choose", output_type="multiple_choice", doc_to_choice="choices",
                    doc_to_target="answer", metric_list=[{"metric": "acc"}]),
        data | dict(task="continue", output_type="generate_until", doc_to_target="question",
                    generation_kwargs={"until": ["."], "max_gen_toks": 8, "do_sample": False},
                    metric_list=[{"metric": "exact_match"}]),
    ]  # fmt: skip


def answers(results):
    """The answers to each question."""
    samples = results["samples"]
    scores = [[float(r[0][0]) for r in s["resps"]] for s in samples["choose"]]
    texts = [s["resps"][0][0] for s in samples["continue"]]
    return scores, texts


def test_local_completions(folder, llm, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    evaluate = lambda model, **more: lm_eval.simple_evaluate(
        model=model, tasks=tasks(folder), bootstrap_iters=0, **more
    )
    engine = start_engine(llm, monkeypatch, slots=2, context=128, prefix_cache_bytes=0)
    with Running(engine, [served_model(llm, "tiny")]) as server:
        arguments = dict(
            model="tiny", base_url=f"{server.url}/v1/completions", tokenizer=str(folder),
            num_concurrent=2, max_length=128, tokenizer_backend="huggingface",
            add_bos_token=True,
        )  # fmt: skip
        scores, texts = answers(evaluate("local-completions", model_args=arguments))
    own_scores, own_texts = answers(evaluate(HarnessModel.from_llm(llm)))
    for found, want in zip(scores, own_scores, strict=True):
        assert found == pytest.approx(want, abs=1e-4)
    assert texts == own_texts
    assert len(set(texts)) > 1
