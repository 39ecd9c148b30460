"""Answers to the harness's requests: those of its own `hf` model on the same weights."""

import functools

import jax
import jax.numpy as jnp
import pytest
from harness_tools import (
    chatml_folder,
    counted,
    instances,
    llama_folder,
    simple_scorer,
    tiny,
)

from llama_jax.data.chat_template import folder_template

pytest.importorskip("lm_eval")
from llama_jax.evaluate.harness_model import HarnessModel
from llama_jax.evaluate.journal import Journal
from llama_jax.evaluate.special_tokens import special_tokens

FOLDERS = {"llama": llama_folder, "chatml": chatml_folder}
GREEDY = {"until": ["."], "max_gen_toks": 8, "do_sample": False}
ROWS = "abcde"
"""Batches of five to eight texts share a compiled program."""
SAMPLED = {"until": ["."], "max_gen_toks": 8, "do_sample": True, "temperature": 1.0}


def made(llm, score=None, **more):
    tokens = special_tokens(llm.tokenizer, llm)
    score = score or simple_scorer(llm._engine)
    return HarnessModel(llm.tokenizer, score, llm.cfg.context, tokens=tokens, llm=llm, **more)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {name: make(tmp_path_factory.mktemp(name)) for name, make in FOLDERS.items()}


@pytest.fixture(scope="module")
def llms(folders):
    template, _ = folder_template(folders["chatml"])
    return {
        "llama": tiny(folders["llama"]),
        "chatml": tiny(folders["chatml"], chat_template=template),
    }


def test_bos_is_added_once(llms):
    model = made(llms["llama"])
    ids = model.tok_encode("the cat")
    assert ids[0] == model.prefix_token_id == 1
    assert 1 not in ids[1:]
    # A chat template writes the BOS token itself.
    assert model.tok_encode("<s>the cat") == ids
    assert model.tok_encode("the cat", add_special_tokens=False) == ids[1:]
    chatml = made(llms["chatml"])
    assert (chatml.prefix_token_id, chatml.eot_token_id) == (1, 2)
    assert 1 not in chatml.tok_encode("the cat")


@pytest.mark.parametrize("name", FOLDERS)
def test_contexts(llms, name):
    """No context means BOS; blanks at the end of a context belong to the continuation."""
    score, seen = counted(simple_scorer(llms[name]._engine))
    model = made(llms[name], score)
    model.loglikelihood(
        instances("loglikelihood", [("", "the cat"), ("the cat ", "sat"), ("the cat", " sat")])
    )
    encode = functools.partial(model.tok_encode, add_special_tokens=False)
    assert seen[0] == ([1], encode("the cat"))
    assert seen[1] == seen[2]
    assert seen[1][0] + seen[1][1] == model.tok_encode("the cat sat")
    assert seen[1][0] == model.tok_encode("the cat")


def test_long_prompts_lose_their_start_and_are_counted(llms):
    score, seen = counted(simple_scorer(llms["llama"]._engine))
    model = made(llms["llama"], score)
    long = "the cat sat on a mat. " * 20
    requests = instances("loglikelihood", [(long, " some"), (long, " the cat sat"), ("a", " b")])
    requests[1].doc_id = 0
    model.loglikelihood(requests)
    for context, continuation in seen[:2]:
        assert len(context) + len(continuation) == 96 + 1
        ids = model.tok_encode(long.rstrip())
        assert context == ids[-len(context) :]
    assert model.truncated == {"task": {0}}
    # The prompts of texts leave a place for each new token.
    generated = instances("generate_until", [(long + i, GREEDY) for i in ROWS] + [("a", GREEDY)])
    model.generate_until(generated)
    assert model.truncated == {"task": set(range(5))}
    assert "must be less" in error(model, "a", GREEDY | {"max_gen_toks": 96})
    with pytest.raises(ValueError, match="must have from 1 to 96"):
        model.loglikelihood(instances("loglikelihood", [("a", long)]))


def error(model, context, settings):
    with pytest.raises(ValueError, match=r".") as e:
        model.generate_until(instances("generate_until", [(context + i, settings) for i in ROWS]))
    assert "\n" not in str(e.value)
    return str(e.value)


def test_each_request_is_computed_once(llms, tmp_path):
    path = tmp_path / "answers.jsonl"
    score, seen = counted(simple_scorer(llms["llama"]._engine))
    pairs = [("the cat", " sat"), ("", "a mat"), ("the cat", " sat"), ("the cat", " saw")]
    model = made(llms["llama"], score, journal=Journal(path))
    first = model.loglikelihood(instances("loglikelihood", pairs))
    assert len(seen) == 3
    assert first[0] == first[2]
    assert len(set(first)) == 3
    texts = instances("loglikelihood_rolling", [("the cat sat. " * 30,), ("the",)])
    rolling = model.loglikelihood_rolling(texts)
    again = made(llms["llama"], lambda requests: 1 / 0, journal=Journal(path))
    assert again.loglikelihood(instances("loglikelihood", pairs)) == first
    assert again.loglikelihood_rolling(texts) == rolling
    assert isinstance(again.loglikelihood(instances("loglikelihood", pairs))[0], tuple)


def test_samples_do_not_depend_on_order_or_on_other_requests(llms, tmp_path):
    texts = ["the cat", "some animals saw"]
    requests = instances("generate_until", [(t, SAMPLED) for t in texts for _ in range(4)])
    samples = made(llms["chatml"]).generate_until(requests)
    assert len(set(samples)) > 5
    assert (
        made(llms["chatml"]).generate_until(requests[4:] + requests[:4])
        == samples[4:] + samples[:4]
    )
    assert made(llms["chatml"]).generate_until(requests[3:]) == [samples[0], *samples[4:]]
    # Continued after a kill: the third sample of a request is still its third.
    path = tmp_path / "answers.jsonl"
    made(llms["chatml"], journal=Journal(path)).generate_until(requests)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:3]))
    assert made(llms["chatml"], journal=Journal(path)).generate_until(requests) == samples


def test_names_of_control_tokens_end_texts(llms):
    model = made(llms["chatml"])
    stops = model._options({"until": ["<|endoftext|>", "\n"]})
    assert stops[0] == ["<|endoftext|>", "\n", "<|im_end|>"]
    assert stops[1].stops == ["\n"]
    assert model._options({"until": None})[0] == ["<|im_end|>"]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"num_beams": 10}, "num_beams=10"),
        ({"presence_penalty": 1.0}, "presence_penalty=1.0"),
        ({"do_sample": True, "temperature": -1.0}, "temperature"),
        ({"max_gen_toks": 0}, "max_new_tokens"),
    ],
)
def test_settings_of_generation(llms, settings, words):
    assert words in error(made(llms["chatml"]), "a", settings)
    made(llms["chatml"])._options({"num_beams": 1, "do_sample": True, "temperature": 0.0})


def test_chat_templates(llms):
    model = made(llms["chatml"])
    talk = [{"role": "user", "content": "who? <|im_end|>"}]
    text = "<|im_start|>user\nwho? <|im_end|><|im_end|>\n"
    assert model.apply_chat_template(talk) == text + "<|im_start|>assistant\n"
    talk.append({"role": "assistant", "content": "Answer: "})
    assert model.apply_chat_template(talk, add_generation_prompt=False) == text + (
        "<|im_start|>assistant\nAnswer: "
    )
    base = made(llms["llama"])
    with pytest.raises(ValueError, match="has no chat template"):
        base.apply_chat_template(talk)
    assert base.chat_template(False) is None


def test_logits_that_are_not_finite_are_an_error(folders):
    llm = tiny(folders["llama"])
    nan = jax.tree.map(lambda x: x * jnp.nan, llm.params["norm"])
    llm._engine = llm._engine.with_params(llm.params | {"norm": nan})
    model = made(llm)
    with pytest.raises(ValueError, match="continuation 'sat'"):
        model.loglikelihood(instances("loglikelihood", [("the cat", " sat")]))
    with pytest.raises(ValueError, match="not finite"):
        model.loglikelihood_rolling(instances("loglikelihood_rolling", [("the cat",)]))
    assert "NaN" in error(model, "the cat", GREEDY)
    assert "does not generate" in error(made_without_llm(llm), "the cat", GREEDY)


def made_without_llm(llm):
    return HarnessModel(llm.tokenizer, simple_scorer(llm._engine), llm.cfg.context)
