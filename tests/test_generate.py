"""Continuations: a real model's text, transformers' ids, rows that do not depend on each other."""

import dataclasses
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from model_tools import F32, hf_model, random_weights, small, tree_of

import llama_jax
from llama_jax import Greedy, Sample
from llama_jax.generate import main
from llama_jax.llm import LLM, Generation
from llama_jax.model import Execution, Llama
from llama_jax.rows import Row
from llama_jax.scores import windows
from llama_jax.sharding import AXES, PRESETS
from llama_jax.step import merge, split, structure, take_apart
from llama_jax.tokenizer import train_tokenizer

ROOT = Path(__file__).parents[1]
DATA = ROOT.parent / "shared/data"
STORIES = DATA / "stories260k"
TEXT = ["the cat sat on a mat", "some animals saw 12 cats", "日本 and é", "def main(argv):"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    return train_tokenizer([t for t in TEXT for _ in range(50)], 300, path)


UNROLLED = Execution(jnp.dtype("float32"), unroll=True)


def model(tokenizer, seed=0, std=0.3, how=F32, **changes):
    """A random model whose logits differ enough to make text of."""
    cfg = small(vocab_size=300, context=400, **changes)
    return LLM(cfg, split(Llama(cfg, how, nnx.Rngs(seed), std))[1], tokenizer, how)


@pytest.fixture(scope="module")
def llm(tokenizer):
    return model(tokenizer)


def test_layers_apart_make_the_same_text(llm, tokenizer):
    """As weights are loaded on CPU and GPU; nothing of the stack is left."""
    stacked = split(Llama(llm.cfg, F32, nnx.Rngs(0), 0.3))[1]
    held = stacked["blocks"]
    apart = LLM(llm.cfg, take_apart(stacked), tokenizer, UNROLLED)
    assert sorted(apart.params["blocks"]) == [0, 1]
    assert held == {}
    prompts = ["the cat", "some animals saw 12 cats"]
    assert apart.generate(prompts, max_new_tokens=24) == llm.generate(prompts, max_new_tokens=24)


@pytest.fixture(scope="module")
def stories(tmp_path_factory):
    if not STORIES.exists():
        # Only where the material lies beside the project; the tests below run without it as well.
        return None
    folder = tmp_path_factory.mktemp("stories") / "st"
    command = [sys.executable, "-m", "llama_jax.convert", str(STORIES / "hf-mha"), str(folder)]
    subprocess.run(command, check=True, cwd=ROOT, capture_output=True)
    return llama_jax.load(folder)


def test_a_real_model(stories):
    """The text of llama2.c, alone and beside rows of other lengths; its likelihoods."""
    if stories is None:
        return
    golden = json.loads((STORIES / "golden.json").read_text())
    want = golden["greedy_text_200_steps"]
    assert stories.generate("", max_new_tokens=200) == want
    others = ["Lily", "", "One day, a dog and a cat went to the park to play with a ball."]
    assert stories.generate(others, max_new_tokens=200)[1] == want
    assert "".join(stories.stream("", max_new_tokens=200)) == want
    (whole,) = stories.generate([""], max_new_tokens=200, logprobs=True)
    assert list(whole.ids) == golden["greedy_ids_from_bos"][1:]
    np.testing.assert_allclose(-np.mean(whole.logprobs), golden["nll"]["greedy200"], rtol=1e-4)
    text = (DATA / "tinyshakespeare/input.txt").read_text()[:3000]
    scores = stories.score(text)
    assert len(scores.ids) == golden["rolling"]["n_tokens"]
    np.testing.assert_allclose(sum(scores.logprobs), golden["rolling"]["loglikelihood"], rtol=1e-5)


def test_ids_are_those_of_transformers(tokenizer):
    """Greedy, prompts of mixed length, one with the end of a document in it."""
    pytest.importorskip("torch", reason="needs torch and transformers")
    pytest.importorskip("transformers")
    import torch

    for changes in ({}, {"num_kv_heads": 4, "tie_embeddings": True}):
        cfg = small(vocab_size=300, context=400, **changes)
        weights = random_weights(cfg)
        ours = LLM(cfg, tree_of(weights), tokenizer, F32)
        theirs = hf_model(cfg, weights)
        theirs.generation_config.eos_token_id = tokenizer.eos_id
        prompts = ["the cat", "some animals saw 12 cats and a mat", ""]
        made = ours.generate(prompts, max_new_tokens=24, logprobs=True)
        for prompt, mine in zip(prompts, made, strict=True):
            ids = torch.tensor([tokenizer.encode(prompt, bos=True)])
            out = theirs.generate(ids, max_new_tokens=24, do_sample=False, pad_token_id=0)
            assert [i for i in out[0, ids.shape[1] :].tolist() if i != 2] == list(mine.ids)
        ids = [1, 2, 1, 20, 30]
        out = theirs.generate(
            torch.tensor([ids]), max_new_tokens=8, do_sample=False, pad_token_id=0
        )
        again, *_ = ours.resume(ids, [], None, max_new_tokens=8, sampling=Greedy(), seed=0)
        assert [i for i in out[0, 5:].tolist() if i != 2] == list(again.ids)


@pytest.mark.parametrize("sampling", [Greedy(), Sample(temperature=1.2, top_p=0.95)])
def test_a_row_does_not_depend_on_its_mates(llm, sampling):
    prompts = ["the cat", "", "some animals saw 12 cats " * 4, "日本", "def main("]
    together = llm.generate(prompts, max_new_tokens=40, sampling=sampling, seed=5)
    turned = llm.generate(prompts[::-1], max_new_tokens=40, sampling=sampling, seed=5)
    assert turned[::-1] == together
    for prompt, text in zip(prompts, together, strict=True):
        assert llm.generate(prompt, max_new_tokens=40, sampling=sampling, seed=5) == text


def test_seeds_and_samples(llm):
    draw = lambda seed, n=3: llm.generate(
        "the cat", max_new_tokens=20, sampling=Sample(), n=n, seed=seed
    )
    first = draw(0)
    assert len(set(first)) == 3
    assert draw(0) == first
    assert draw(0, n=2) == first[:2]
    assert draw(1) != first
    assert llm.generate(["a", "b"], max_new_tokens=2, n=2, sampling=Sample())[1:] == [
        llm.generate("b", max_new_tokens=2, n=2, sampling=Sample())
    ]


@pytest.mark.parametrize("length", [600])
def test_chunks_of_a_prompt_equal_the_whole(tokenizer, length):
    """A prompt in padded chunks, and what follows it, equal one pass over all of it."""
    cfg = dataclasses.replace(model(tokenizer).cfg, context=1024)
    llm = LLM(cfg, split(Llama(cfg, F32, nnx.Rngs(0), 0.3))[1], tokenizer, F32)
    llm.empty_cache(300)  # a smaller one first: sizes are kept apart
    ids = np.random.default_rng(0).integers(3, 300, length).tolist()
    logits_V, cache = llm.prefill(ids, llm.empty_cache(length + 256))
    whole = merge(structure(cfg, F32), llm.params)(np.asarray([ids]))[0, -1]
    np.testing.assert_allclose(logits_V, whole, atol=1e-5 * float(jnp.ptp(whole)))
    assert cache.lengths_B.tolist() == [length]
    made, *_ = llm.resume(ids, [], None, max_new_tokens=12, sampling=Greedy(), seed=0)
    whole = merge(structure(cfg, F32), llm.params)(np.asarray([[*ids, *made.ids]]))[0]
    assert list(made.ids) == np.argmax(whole[length - 1 : -1], axis=-1).tolist()


def test_nothing_compiles_again(tokenizer):
    llm = model(tokenizer)
    llm.generate("the cat", max_new_tokens=5)
    llm.generate("the cat " * 20, max_new_tokens=5, sampling=Sample(temperature=0.5))
    compiled = len(llm._compiled)
    for length, new, sampling in (
        (1, 40, Greedy()), (9, 3, Sample(top_k=4)), (3, 64, Sample(temperature=2.0, top_p=0.3)),
        (17, 31, Sample(min_p=0.1, repetition_penalty=1.1)),
    ):  # fmt: skip
        llm.generate("a cat " * length, max_new_tokens=new, sampling=sampling, seed=new)
    assert len(llm._compiled) == compiled


@pytest.mark.parametrize("seed", range(4))
def test_a_stream_joins_to_the_text(llm, seed):
    """No piece ends inside a character: this model speaks bytes at random."""
    how = dict(max_new_tokens=60, sampling=Sample(temperature=1.5), seed=seed)
    whole = llm.generate("日本", **how)
    pieces = list(llm.stream("日本", **how))
    assert "".join(pieces) == whole
    assert not any(p.endswith("\ufffd") for p in pieces[:-1])
    stop = whole[20:23]
    stopped = llm.generate("日本", stop=stop, **how)
    assert stopped == whole[: whole.index(stop)]
    assert "".join(llm.stream("日本", stop=stop, **how)) == stopped


def test_text_is_made_of_new_tokens_alone(tokenizer, monkeypatch):
    """Decoding all of a text for each of its tokens would cost the square of its length."""
    decoded = []
    decode = type(tokenizer).decode
    count = lambda self, ids: decoded.append(len(ids)) or decode(self, ids)
    ids = tokenizer.encode("some animals saw 12 cats on a mat " * 40)
    row = Row(tokenizer, [1], ["dog"])
    monkeypatch.setattr(type(tokenizer), "decode", count)
    for token in ids:
        row.take([token], [0.0], (), 10**6)
        row.settled()
    assert max(decoded) < 16
    assert row.result().text == decode(tokenizer, ids)


def test_ends(llm, tokenizer):
    (g,) = llm.generate(["the cat"], max_new_tokens=3, logprobs=True)
    assert isinstance(g, Generation)
    assert (g.finish, len(g.ids), len(g.logprobs)) == ("length", 3, 3)
    (longest,) = llm.generate(["the cat"], max_new_tokens=10**6, logprobs=True)
    assert len(longest.ids) <= llm.cfg.context
    ended = LLM(llm.cfg, llm.params, tokenizer, F32, eos_ids=[g.ids[1]])
    (end,) = ended.generate(["the cat"], max_new_tokens=9, logprobs=True)
    assert (end.finish, end.ids) == ("end", g.ids[:1])


def test_draws_and_logprobs_are_the_models_own(llm):
    """Token i of a sample is drawn with its own key from the logits after those before it."""
    (made,) = llm.generate(["the cat"], max_new_tokens=8, sampling=Sample(), seed=5, logprobs=True)
    ids = llm.encode("the cat")
    tokens = np.asarray([[*ids, *made.ids]])
    logits = np.asarray(merge(structure(llm.cfg, F32), llm.params)(tokens))[0, len(ids) - 1 : -1]
    key = jax.random.fold_in(jax.random.key(5), 0)
    drawn = [jax.random.categorical(jax.random.fold_in(key, i), x) for i, x in enumerate(logits)]
    assert list(made.ids) == list(map(int, drawn))
    want = np.asarray(jax.nn.log_softmax(logits))[range(8), list(made.ids)]
    np.testing.assert_allclose(made.logprobs, want, atol=1e-4)


def test_the_penalty_counts_what_was_drawn(llm):
    """So large a penalty never takes a token twice; without it, this text repeats itself."""
    draw = lambda penalty: llm.generate(
        ["def main("], max_new_tokens=60, logprobs=True,
        sampling=Sample(temperature=0.0, repetition_penalty=penalty),
    )[0].ids  # fmt: skip
    assert len(set(draw(1.0))) < 50
    assert len(set(draw(1e6))) == 60


def test_a_conversation_that_turns_back_reads_anew(llm):
    """What the cache holds is used as far as the new ids equal it."""
    ask = dict(max_new_tokens=8, sampling=Greedy(), seed=0)
    _, known, cache = llm.resume([1, 20, 30, 40], [], None, **ask)
    ids = [1, 20, 31, 40, 50]
    again, *_ = llm.resume(ids, known, cache, **ask)
    anew, *_ = llm.resume(ids, [], None, **ask)
    assert again.ids == anew.ids


def test_a_mesh_gives_the_same_text(llm, tokenizer):
    cfg = dataclasses.replace(llm.cfg, num_kv_heads=4)
    params = jax.tree.map(np.asarray, split(Llama(cfg, F32, nnx.Rngs(0), 0.3))[1])
    want = LLM(cfg, params, tokenizer, F32).generate(["the cat", "a"], max_new_tokens=12)
    mesh = jax.make_mesh((1, 1, 4, 1), AXES, (AxisType.Explicit,) * 4, devices=jax.devices()[:4])
    how = Execution(jnp.dtype("float32"), PRESETS["fsdp_tensor"])
    with jax.set_mesh(mesh):
        like = split(nnx.eval_shape(lambda: Llama(cfg, how, nnx.Rngs(0))))[1]
        place = lambda x, s: jax.device_put(x, NamedSharding(mesh, s.sharding.spec))
        placed = jax.tree.map(place, params, like)
    split_llm = LLM(cfg, placed, tokenizer, how, mesh=mesh)
    assert split_llm.generate(["the cat", "a"], max_new_tokens=12) == want


def test_scores(llm):
    scores = llm.score("the 日本 cat")
    assert "".join(scores.pieces) == "the 日本 cat"
    assert len(scores.ids) == len(scores.logprobs) == len(scores.entropies)
    assert all(x <= 0 for x in scores.logprobs)
    assert "perplexity" in scores._repr_html_()
    assert "<script" not in llm.score("<script>")._repr_html_()
    assert scores.plot().get_ylabel() == "nats"
    assert abs(llm.perplexity(["the 日本 cat"]) / scores.perplexity - 1) < 1e-6
    (made,) = llm.generate(["the"], max_new_tokens=4, logprobs=True)
    ids = llm.encode("the")[1:]
    inputs = [1, *ids, *made.ids]
    from llama_jax.scores import _score_window

    logprob_TV, _ = _score_window(llm, inputs[:-1])
    at = np.arange(len(ids), len(inputs) - 1)
    np.testing.assert_allclose(made.logprobs, logprob_TV[at, list(made.ids)], atol=1e-4)


def test_windows_count_each_token_once():
    assert windows([5, 6, 7], 1, 8) == [([1, 5, 6], [5, 6, 7])]
    assert windows([5, 6, 7, 8, 9], 1, 3) == [([1, 5, 6], [5, 6, 7]), ([6, 7, 8], [8, 9])]


TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}"
    "{{ eos_token if m.role == 'assistant' }}{% endfor %}[assistant]"
)


def test_a_chat_keeps_its_cache(llm, tokenizer):
    """Each answer equals that of the whole conversation read anew."""
    talker = LLM(llm.cfg, llm.params, tokenizer, F32, chat_template=TEMPLATE)
    chat = talker.chat(system="cats")
    chat.say("the cat", max_new_tokens=8)
    kept = list(chat._ids)
    answer = chat.say("a mat", max_new_tokens=8)
    assert [m["role"] for m in chat.messages] == ["system", *["user", "assistant"] * 2]
    ids = chat._encode(chat.messages[:-1])
    anew, *_ = talker.resume(ids, [], None, max_new_tokens=8, sampling=Greedy(), seed=0)
    assert answer == anew.text.strip()
    assert ids[:10] == kept[:10]
    with pytest.raises(ValueError, match="no chat template: it is a base model"):
        llm.chat()


@pytest.mark.parametrize(
    ("prompt", "how", "message"),
    [
        (5, {}, "the prompt must be a string, not int: 5"),
        (["a", None], {}, r"prompts\[1\] must be a string, not NoneType"),
        (b"a", {}, "the prompt must be a string, not bytes: b'a'"),
        ("a\ud800", {}, "the prompt holds half a character, .* at 1"),
        (["a", "cat " * 400], {}, r"prompts\[1\] has \d+ tokens"),
        # As large as its key would be another's.
        ("a", {"seed": 2**32}, "seed=4294967296 must be less than"),
        ("a", {"stop": 3}, "stop=3 must be texts"),
        ("a", {"max_new_tokens": 0}, "max_new_tokens=0 must be a whole number, 1 or more"),
        ("a", {"n": 0}, "n=0 must be"),
        ("a", {"seed": -1}, "seed=-1 must be"),
        ("a", {"stop": [""]}, "must be texts that are not empty"),
        ("a", {"sampling": "hot"}, r"must be Greedy\(\) or Sample"),
        ("cat " * 400, {}, r"the prompt has \d+ tokens; the model's context is 400"),
    ],
)
def test_bad_arguments(llm, prompt, how, message):
    with pytest.raises(ValueError, match=message):
        llm.generate(prompt, **how)
    if isinstance(prompt, str) and "n" not in how:
        with pytest.raises(ValueError, match=message):
            llm.stream(prompt, **how)


def test_a_cache_too_large(llm, monkeypatch):
    """Refused before it is made, with what it takes and what there is."""
    monkeypatch.setattr("llama_jax.llm.memory_of", lambda *_: 3e6)
    assert llm.generate("the cat", max_new_tokens=2)
    message = r"cache of 32 rows of 512 positions takes .* has 0.0 GB: give fewer prompts"
    with pytest.raises(MemoryError, match=message):
        llm.generate(["the cat"] * 32, max_new_tokens=2)


def test_lines_that_cannot_be_read_and_readers_that_leave(llm, monkeypatch, capsys):
    monkeypatch.setattr("llama_jax.generate.load", lambda *_, **__: llm)
    monkeypatch.setattr("sys.stdin", io.StringIO("a\n" + "cat " * 400))
    assert main(["x", "-", "--max-new-tokens", "1"]) == 2
    assert "error: line 2: the prompt has" in capsys.readouterr().err
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as closed:
        monkeypatch.setattr("sys.stdout", closed)
        assert main(["x", "a", "--max-new-tokens", "1"]) == 141


def test_what_cannot_be_loaded(tmp_path, capsys):
    assert main([str(tmp_path / "none"), "x"]) == 2
    assert "does not exist" in capsys.readouterr().err
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf/readme.txt").write_text("x")
    assert main([str(tmp_path / "hf"), "x"]) == 2
    assert "is not a checkpoint of llama_jax" in capsys.readouterr().err
    with pytest.raises(ValueError, match="quantize='int3'"):
        llama_jax.load(tmp_path, quantize="int3")
    if STORIES.exists():
        assert main([str(STORIES / "hf-mha"), "x"]) == 2
        err = capsys.readouterr().err
        assert "holds Hugging Face weights; convert them first:" in err
        assert "python -m llama_jax.convert" in err


def test_import_is_light():
    code = "import llama_jax, sys; print('jax' in sys.modules)"
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    out = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert out.stdout.strip() == "False"
