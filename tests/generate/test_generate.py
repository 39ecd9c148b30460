"""Generation: text of a real model, ids of transformers, rows independent of each other."""

import contextlib
import dataclasses
import importlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import typing
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from generate_tools import resume
from jax.sharding import AxisType, NamedSharding
from model_tools import F32, hf_model, random_weights, small, tree_of

import llama_jax
from llama_jax import Greedy, Sample
from llama_jax.config import ConfigError
from llama_jax.convert.job import convert
from llama_jax.generate.__main__ import main
from llama_jax.generate.decode import DECODE_STEPS_PER_CALL, Engine, Request
from llama_jax.generate.detokenize import Generation, OutputSequence
from llama_jax.generate.llm import LLM
from llama_jax.generate.model_files import read_eos_ids
from llama_jax.generate.sampler import check_options
from llama_jax.model.llama import ComputeConfig, Llama
from llama_jax.model.params import abstract_params, merge, params_of, structure, unstack_layers
from llama_jax.model.sharding import AXES, PRESETS
from llama_jax.prepare.tokenizer import train_tokenizer

ROOT = Path(__file__).parents[2]
DATA = ROOT.parent / "shared/data"
STORIES = DATA / "stories260k"
TEXT = ["the cat sat on a mat", "some animals saw 12 cats", "日本 and é", "def main(argv):"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    return train_tokenizer([t for t in TEXT for _ in range(50)], 300, path)


UNROLLED = ComputeConfig(jnp.dtype("float32"), unroll=True)


def model(tokenizer, seed=0, std=0.3, compute=F32, **changes):
    """A random model whose logits differ enough to generate varied text."""
    cfg = small(vocab_size=300, context=400, **changes)
    return LLM(cfg, params_of(Llama(cfg, compute, nnx.Rngs(seed), std)), tokenizer, compute)


@pytest.fixture(scope="module")
def llm(tokenizer):
    return model(tokenizer)


def test_unstacked_layers_give_the_same_text(llm, tokenizer):
    """As load does on CPU and GPU; the stacked arrays are freed."""
    stacked = params_of(Llama(llm.cfg, F32, nnx.Rngs(0), 0.3))
    held = stacked["blocks"]
    unstacked = LLM(llm.cfg, unstack_layers(stacked), tokenizer, UNROLLED)
    assert sorted(unstacked.params["blocks"]) == [0, 1]
    assert held == {}
    prompts = ["the cat", "some animals saw 12 cats"]
    assert unstacked.generate(prompts, max_new_tokens=24) == llm.generate(
        prompts, max_new_tokens=24
    )


@pytest.fixture(scope="module")
def stories(tmp_path_factory):
    if not STORIES.exists():
        # Only where the real model is present; the tests below do not need it.
        return None
    folder = tmp_path_factory.mktemp("stories") / "st"
    return llama_jax.load(convert(STORIES / "hf-mha", folder))


def test_a_real_model(stories):
    """The text of llama2.c, alone and in a batch with other lengths; its log-probabilities."""
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
        again, *_ = resume(ours, ids, [], None, max_new_tokens=8, sampling=Greedy(), seed=0)
        assert [i for i in out[0, 5:].tolist() if i != 2] == list(again.ids)


@pytest.mark.parametrize("sampling", [Greedy(), Sample(temperature=1.2, top_p=0.95)])
def test_a_row_does_not_depend_on_other_rows(llm, sampling):
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


def test_equal_prompts_have_different_samples(llm):
    """A repeated prompt gets its next sample, at any position among other prompts."""
    options = dict(max_new_tokens=20, sampling=Sample(), seed=4)
    mixed = llm.generate(["the cat", "a", "the cat", "a", "the cat"], **options)
    assert len(set(mixed)) == 5
    assert mixed[0::2] == llm.generate("the cat", n=3, **options)
    assert mixed[1::2] == llm.generate("a", n=2, **options)
    twice = llm.generate(["the cat", "the cat"], n=2, **options)
    assert [*twice[0], *twice[1]] == llm.generate("the cat", n=4, **options)
    assert llm.generate(["the cat", "a", "the cat", "a", "the cat"], **options) == mixed


def test_prompts_of_ids(llm):
    """No BOS id is added to ids; a list may contain ids and texts."""
    options = dict(max_new_tokens=20, sampling=Sample(), seed=4)
    ids, text = llm.encode("the cat"), llm.generate("the cat", **options)
    assert llm.generate(ids, **options) == text
    assert llm.generate(np.asarray(ids), **options) == text
    assert llm.generate([ids], **options) == [text]
    assert llm.generate(np.asarray([ids, ids]), **options)[0] == text
    assert llm.generate([ids, "a"], **options) == llm.generate(["the cat", "a"], **options)
    assert "".join(llm.stream(ids, **options)) == text
    (made,) = llm.generate([ids[1:]], logprobs=True, max_new_tokens=4)  # without BOS
    logits = merge(structure(llm.cfg, F32), llm.params)(np.asarray([[*ids[1:], *made.ids]]))[0]
    assert list(made.ids) == np.argmax(logits[len(ids) - 2 : -1], axis=-1).tolist()
    assert llm.generate([]) == []


def test_top_logprobs(llm):
    """The most likely tokens of the model's distribution; another number does not recompile."""
    options = dict(max_new_tokens=40, sampling=Sample(temperature=1.5), seed=4)
    plain = llm.generate(["the cat", "a"], logprobs=True, **options)
    assert plain[0].top_logprobs == ()
    made = llm.generate(["the cat", "a"], top_logprobs=3, **options)
    for prompt, g, other in zip(["the cat", "a"], made, plain, strict=True):
        assert (g.text, g.ids, g.logprobs) == (other.text, other.ids, other.logprobs)
        ids = llm.encode(prompt)
        tokens = np.asarray([[*ids, *g.ids]])
        logits = merge(structure(llm.cfg, F32), llm.params)(tokens)[0, len(ids) - 1 : -1]
        want = np.asarray(jax.nn.log_softmax(logits))
        assert len(g.top_logprobs) == len(g.ids)
        for logp_V, top in zip(want, g.top_logprobs, strict=True):
            best = np.argsort(-logp_V)[:3]
            assert list(top) == best.tolist()
            np.testing.assert_allclose(list(top.values()), logp_V[best], atol=1e-4)
    more = llm.generate(["the cat", "a"], top_logprobs=20, **options)
    assert [len(top) for g in more for top in g.top_logprobs] == [20] * sum(
        len(g.ids) for g in more
    )
    assert list(more[0].top_logprobs[0])[:3] == list(made[0].top_logprobs[0])
    assert llm.generate("the cat", top_logprobs=3, **options).text == made[0].text
    names = [name for name, *_ in llm._engine._compiled]
    assert names.count("decode with top_logprobs") == 2  # for batches of one and of two


def test_repr(llm):
    """repr: model, parameters, dtype, context, devices, memory."""
    assert repr(llm) == (
        f"LLM(2 layers of width 32, {llm.cfg.num_params / 1e6:.1f} million parameters, float32, "
        "context 400, 1 x cpu, 0.1 MB of weights per device)"
    )


def test_overloads_of_generate():
    """str -> str, list -> list; ids alike; Generation with logprobs."""
    hints = [typing.get_type_hints(f) for f in typing.get_overloads(LLM.generate)]
    returned = [h["return"] for h in hints]
    assert returned == [str, list[str], Generation, list[Generation], typing.Any]
    assert hints[0]["prompts"] == str | Sequence[int]
    assert hints[1]["prompts"] == list[str] | list[list[int]]


@pytest.mark.parametrize(("length", "platform"), [(600, "cpu"), (600, "tpu")])
def test_chunks_of_a_prompt_equal_the_whole(tokenizer, length, platform, monkeypatch):
    """A prompt read in padded chunks gives the same continuation as one pass over it."""
    # On an accelerator a full chunk of 512 comes first.
    monkeypatch.setattr("llama_jax.generate.decode.FULL_CHUNK", 512)
    monkeypatch.setattr(Engine, "devices", lambda self: [SimpleNamespace(platform=platform)])
    cfg = dataclasses.replace(model(tokenizer).cfg, context=1024)
    llm = LLM(cfg, params_of(Llama(cfg, F32, nnx.Rngs(0), 0.3)), tokenizer, F32)
    llm._engine.empty_cache(300)  # a smaller one first: each size has its own program
    ids = np.random.default_rng(0).integers(3, 300, length).tolist()
    logits_V, cache = llm._engine.prefill(ids, llm._engine.empty_cache(length + 256))
    whole = merge(structure(cfg, F32), llm.params)(np.asarray([ids]))[0, -1]
    np.testing.assert_allclose(logits_V, whole, atol=1e-5 * float(jnp.ptp(whole)))
    assert cache.lengths_B.tolist() == [length]
    made, *_ = resume(llm, ids, [], None, max_new_tokens=12, sampling=Greedy(), seed=0)
    whole = merge(structure(cfg, F32), llm.params)(np.asarray([[*ids, *made.ids]]))[0]
    assert list(made.ids) == np.argmax(whole[length - 1 : -1], axis=-1).tolist()


def test_nothing_recompiles(tokenizer):
    llm = model(tokenizer)
    llm.generate("the cat", max_new_tokens=5)
    llm.generate("the cat " * 20, max_new_tokens=5, sampling=Sample(temperature=0.5))
    compiled = len(llm._engine._compiled)
    for length, new, sampling in (
        (1, 40, Greedy()), (9, 3, Sample(top_k=4)), (3, 64, Sample(temperature=2.0, top_p=0.3)),
        (17, 31, Sample(min_p=0.1, repetition_penalty=1.1)),
    ):  # fmt: skip
        llm.generate("a cat " * length, max_new_tokens=new, sampling=sampling, seed=new)
    assert len(llm._engine._compiled) == compiled


@pytest.mark.parametrize("seed", range(4))
def test_a_stream_joins_to_the_text(llm, seed):
    """No piece ends inside a character; this model generates random bytes."""
    compute = dict(max_new_tokens=60, sampling=Sample(temperature=1.5), seed=seed)
    whole = llm.generate("日本", **compute)
    pieces = list(llm.stream("日本", **compute))
    assert "".join(pieces) == whole
    assert not any(p.endswith("\ufffd") for p in pieces[:-1])
    stop = whole[20:23]
    stopped = llm.generate("日本", stop=stop, **compute)
    assert stopped == whole[: whole.index(stop)]
    assert "".join(llm.stream("日本", stop=stop, **compute)) == stopped


def test_text_is_made_of_new_tokens_alone(tokenizer, monkeypatch):
    """Decoding the whole text for each token would take quadratic time."""
    decoded = []
    decode = type(tokenizer).decode
    count = lambda self, ids: decoded.append(len(ids)) or decode(self, ids)
    ids = tokenizer.encode("some animals saw 12 cats on a mat " * 40)
    row = OutputSequence(tokenizer, [1], ["dog"])
    monkeypatch.setattr(type(tokenizer), "decode", count)
    for token in ids:
        row.append([token], [0.0], (), 10**6)
        row.stable_text()
    assert max(decoded) < 16
    assert row.result().text == decode(tokenizer, ids)


def test_how_sequences_end(llm, tokenizer):
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
    """With a very large penalty no token occurs twice; without it, this text repeats."""
    draw = lambda penalty: llm.generate(
        ["def main("], max_new_tokens=60, logprobs=True,
        sampling=Sample(temperature=0.0, repetition_penalty=penalty),
    )[0].ids  # fmt: skip
    assert len(set(draw(1.0))) < 50
    assert len(set(draw(1e6))) == 60


def test_a_cache_is_used_up_to_the_first_different_id(llm):
    """Ids after the first difference are read again."""
    ask = dict(max_new_tokens=8, sampling=Greedy(), seed=0)
    _, known, cache = resume(llm, [1, 20, 30, 40], [], None, **ask)
    ids = [1, 20, 31, 40, 50]
    again, *_ = resume(llm, ids, known, cache, **ask)
    expected, *_ = resume(llm, ids, [], None, **ask)
    assert again.ids == expected.ids


def test_a_mesh_gives_the_same_text(llm, tokenizer):
    cfg = dataclasses.replace(llm.cfg, num_kv_heads=4)
    params = jax.tree.map(np.asarray, params_of(Llama(cfg, F32, nnx.Rngs(0), 0.3)))
    want = LLM(cfg, params, tokenizer, F32).generate(["the cat", "a"], max_new_tokens=12)
    mesh = jax.make_mesh((1, 1, 4, 1), AXES, (AxisType.Explicit,) * 4, devices=jax.devices()[:4])
    compute = ComputeConfig(jnp.dtype("float32"), PRESETS["fsdp_tensor"])
    with jax.set_mesh(mesh):
        like = abstract_params(cfg, compute)
        place = lambda x, s: jax.device_put(x, NamedSharding(mesh, s.sharding.spec))
        placed = jax.tree.map(place, params, like)
    split_llm = LLM(cfg, placed, tokenizer, compute, mesh=mesh)
    assert split_llm.generate(["the cat", "a"], max_new_tokens=12) == want
    whole = LLM(cfg, params, tokenizer, F32).score("the cat sat")
    scores = split_llm.score("the cat sat")
    np.testing.assert_allclose(scores.logprobs, whole.logprobs, atol=1e-4)
    np.testing.assert_allclose(scores.entropies, whole.entropies, atol=1e-4)


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        (5, {}, "the prompt must be text or token ids, not int: 5"),
        (["a", None], {}, r"prompts\[1\] must be text or token ids, not NoneType"),
        (b"a", {}, "the prompt must be text or token ids, not bytes: b'a'"),
        (bytearray(b"a"), {}, "the prompt must be text or token ids, not bytearray"),
        ([memoryview(b"a")], {}, "the prompt must be text or token ids, not memoryview"),
        ("a\ud800", {}, "the prompt is not valid Unicode: .* at 1"),
        (["a", "cat " * 400], {}, r"prompts\[1\] has \d+ tokens"),
        # Its 32-bit key would equal that of a smaller seed.
        ("a", {"seed": 2**32}, "seed=4294967296 must be less than"),
        ("a", {"stop": 3}, "stop=3 must be texts"),
        ("a", {"max_new_tokens": 0}, "max_new_tokens=0 must be a whole number, 1 or more"),
        ("a", {"n": 0}, "n=0 must be"),
        ("a", {"seed": -1}, "seed=-1 must be"),
        ("a", {"stop": [""]}, "must be texts that are not empty"),
        ("a", {"sampling": "hot"}, r"must be Greedy\(\) or Sample"),
        ("cat " * 400, {}, r"the prompt has \d+ tokens; the model's context is 400"),
        ([5, 300], {}, "the prompt has token id 300; those of the model are 0 to 299"),
        ([[5], [-1]], {}, r"prompts\[1\] has token id -1"),
        ([5, True], {}, r"prompts\[0\] must be text or token ids, not int: 5"),
        (["a", []], {}, r"prompts\[1\] is empty"),
        ([5] * 400, {}, "the prompt has 400 tokens"),
        ("a", {"top_logprobs": 21}, "top_logprobs=21 must be at most 20"),
        ("a", {"top_logprobs": -1}, "top_logprobs=-1 must be a whole number"),
    ],
)
def test_bad_arguments(llm, prompt, options, message):
    with pytest.raises(ValueError, match=message):
        llm.generate(prompt, **options)
    if isinstance(prompt, str) and not {"n", "top_logprobs"} & set(options):
        with pytest.raises(ValueError, match=message):
            llm.stream(prompt, **options)


def test_an_int8_cache(llm, tokenizer):
    """Rows of other lengths, log-probabilities near those of the exact cache, and its memory."""
    compute = dataclasses.replace(F32, cache_dtype=jnp.dtype("int8"))
    small = LLM(llm.cfg, llm.params, tokenizer, compute)
    prompts = ["the cat", "some animals saw 12 cats", "a"]
    together = small.generate(prompts, max_new_tokens=12)
    assert together == [small.generate(p, max_new_tokens=12) for p in prompts]
    options = dict(max_new_tokens=1, logprobs=True)
    for p in prompts:
        exact, rounded = (x.generate(p, **options).logprobs[0] for x in (llm, small))
        assert rounded == pytest.approx(exact, abs=0.05)
    cache = small._engine.empty_cache(100)
    assert cache.k_LBKSH.dtype == jnp.int8
    assert repr(small).endswith(", int8 cache)")
    assert "cache" not in repr(llm)
    assert small._engine._bytes_per_position < 0.34 * llm._engine._bytes_per_position


def test_a_cache_too_large(llm, monkeypatch):
    """Refused before allocation, with the memory needed and available."""
    monkeypatch.setattr("llama_jax.generate.decode.device_memory", lambda *_: 3e6)
    assert llm.generate("the cat", max_new_tokens=2)
    message = r"cache of 32 rows of 512 positions takes .* has 0.0 GB: give fewer prompts"
    with pytest.raises(MemoryError, match=message):
        llm.generate(["the cat"] * 32, max_new_tokens=2)


def test_the_cache_of_an_ended_row_does_not_grow(llm, tokenizer):
    """While other rows continue."""
    prompts = ["the cat", "some animals saw 12 cats"]
    first, _ = llm.generate(prompts, max_new_tokens=3, logprobs=True)
    ending = LLM(llm.cfg, llm.params, tokenizer, F32, eos_ids=[first.ids[2]])
    requests = [Request(llm.encode(p), 0) for p in prompts]
    rows = [OutputSequence(tokenizer, ids, ()) for ids, _ in requests]
    options = check_options(20, Greedy(), 0)
    *_, state = ending._decode(requests, rows, options, DECODE_STEPS_PER_CALL)
    made = [row.result() for row in rows]
    assert (made[0].finish, made[0].ids) == ("end", first.ids[:2])
    assert len(made[1].ids) > 2
    lengths = state.cache.lengths_B.tolist()
    assert lengths == [len(ids) + len(g.ids) for (ids, _), g in zip(requests, made, strict=True)]


def test_the_penalty_counts_the_prompt(llm):
    """The first new token, when the most likely token is in the prompt."""
    penalized = Sample(temperature=0.0, repetition_penalty=3.0)
    changed = 0
    for seed in range(6):
        ids = np.random.default_rng(seed).integers(3, 300, 120).tolist()
        logits_V = np.asarray(llm._engine.prefill(ids, llm._engine.empty_cache(400))[0])
        seen = np.isin(np.arange(300), ids)
        want = np.where(seen, np.where(logits_V > 0, logits_V / 3, logits_V * 3), logits_V)
        made, *_ = resume(llm, ids, [], None, max_new_tokens=1, sampling=penalized, seed=0)
        assert (made.ids or llm.eos_ids)[0] == np.argmax(want)
        changed += np.argmax(want) != np.argmax(logits_V)
    assert changed


def test_a_prompt_fills_the_context_but_for_one_token(llm):
    """Digits are a token each."""
    spare = len(llm.encode("1" * 50)) - 50
    digits = llm.cfg.context - spare
    assert len(llm.encode("1" * (digits - 1))) == llm.cfg.context - 1
    (made,) = llm.generate(["1" * (digits - 1)], max_new_tokens=9, logprobs=True)
    assert len(made.ids) <= 1
    for make in (llm.generate, llm.stream):
        with pytest.raises(ValueError, match="the prompt has 400 tokens; the model's context"):
            make("1" * digits)
    with pytest.raises(ValueError, match="the prompt has 400 tokens"):
        resume(llm, [5] * 400, [], None, max_new_tokens=1, sampling=Greedy(), seed=0)


def test_ids_that_the_tokenizer_does_not_know(tokenizer):
    """An embedding with more rows than the tokenizer has ids: the extra ids give no text."""
    cfg = small(vocab_size=400, context=200)  # caches of one size, compiled once
    llm = LLM(
        cfg, params_of(Llama(cfg, F32, nnx.Rngs(0), 0.3)), tokenizer, F32,
        chat_template="{{ messages[-1].content }}",
    )  # fmt: skip
    compute = dict(max_new_tokens=40, sampling=Sample(temperature=3.0), seed=2)
    made = llm.generate(["the cat", "a"], logprobs=True, **compute)
    for g in made:
        assert max(g.ids) >= 300
    prompt, ids = llm.encode("the cat"), made[0].ids
    known = [i for i in ids if i < 300]
    whole = tokenizer.decode([*prompt, *known])
    assert made[0].text == whole[len("the cat") :]
    assert "".join(llm.stream("the cat", **compute)) == made[0].text
    stop = made[0].text[5:8]
    assert llm.generate("the cat", stop=stop, **compute) == made[0].text.split(stop)[0]
    chat = llm.chat()
    assert chat.say("the cat", **compute)
    assert chat.say("a cat", max_new_tokens=2)
    narrow = small(vocab_size=100, context=400)
    llm = LLM(narrow, params_of(Llama(narrow, F32, nnx.Rngs(0))), tokenizer, F32)
    for read in (llm.generate, llm.score):
        with pytest.raises(ValueError, match=r"has token id \d+, and the model only 100 ids"):
            read("some animals saw 12 cats")


def test_ids_that_end_a_text(llm, tokenizer):
    """Any number of ids; invalid ones are refused."""
    (g,) = llm.generate(["the cat"], max_new_tokens=3, logprobs=True)
    spare = [i for i in range(3, 300) if i not in g.ids]
    many = LLM(llm.cfg, llm.params, tokenizer, F32, eos_ids=[*spare[:19], g.ids[1]])
    (end,) = many.generate(["the cat"], max_new_tokens=9, logprobs=True)
    assert (end.finish, end.ids) == ("end", g.ids[:1])
    for odd in (-1, 300, True, "2", 2.0, None, [2]):
        with pytest.raises(ValueError, match="must be a whole number from 0 to 299, an id of"):
            LLM(llm.cfg, llm.params, tokenizer, F32, eos_ids=[2, odd])
        if odd is not None:
            metadata = {"token_ids": {"eos": odd if odd != [2] else [2, [2]]}}
            with pytest.raises(ConfigError, match=r"run/model\.json: the end-of-text id"):
                read_eos_ids(Path("run"), metadata, llm.cfg)
    with pytest.raises(ConfigError, match=r"run/model\.json: token_ids must be an object"):
        read_eos_ids(Path("run"), {"token_ids": [1]}, llm.cfg)
    assert read_eos_ids(Path("run"), {"token_ids": {"eos": 2}}, llm.cfg) == (2,)
    assert read_eos_ids(Path("run"), {"token_ids": {"eos": [5, 2, 5]}}, llm.cfg) == (5, 2)
    assert read_eos_ids(Path("run"), {}, llm.cfg) is None


def test_the_command_line(llm, monkeypatch, capsys):
    """The seed is used; invalid arguments give one line, before the weights are read."""
    monkeypatch.setattr("llama_jax.generate.__main__.load", lambda *_, **__: llm)
    texts = []
    for seed in (0, 3):
        compute = ["--temperature", "1.5", "--max-new-tokens", "20", "--seed", str(seed)]
        assert main(["x", "the cat", *compute]) == 0
        out = capsys.readouterr().out
        sampling = Sample(temperature=1.5)
        text = llm.generate("the cat", sampling=sampling, max_new_tokens=20, seed=seed)
        assert out == f"the cat{text}\n"
        texts.append(out)
        assert main(["x", "the cat", "--json", *compute]) == 0
        assert json.loads(capsys.readouterr().out)["text"] == text
    assert texts[0] != texts[1]
    assert main(["x", "the cat", "--top-logprobs", "2", "--max-new-tokens", "4"]) == 0
    line = json.loads(capsys.readouterr().out)
    assert [len(top) for top in line["top_logprobs"]] == [2] * len(line["ids"])
    assert main(["x", "cat " * 400]) == 2
    assert "error: the prompt has" in capsys.readouterr().err

    monkeypatch.setattr(
        "llama_jax.generate.__main__.load", lambda *_, **__: pytest.fail("weights read")
    )
    for words, message in (
        (["--top-k", "x"], "argument --top-k: invalid int value: 'x'"),
        (["--top-p", "2"], "top_p=2.0 must be a number"),
        (["--max-new-tokens", "0"], "max_new_tokens=0 must be a whole number"),
        (["--seed", "-1"], "seed=-1 must be"), (["--seed", str(2**70)], "must be less than 2**32"),
        (["--n", "0"], "n=0 must be"), (["--top-logprobs", "99"], "top_logprobs=99 must be at"),
        (["--stop", ""], "must be texts that are not empty"),
        (["--dtype", "int3"], "invalid choice: 'int3'"), (["--sed", "1", "y"], "unrecognized"),
    ):  # fmt: skip
        try:
            status = main(["x", "a", *words])
        except SystemExit as e:
            status = e.code
        assert status == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
        assert error.startswith("error: ")


class Terminal(io.StringIO):
    """Shows what remains visible on a terminal."""

    def isatty(self):
        return True

    def screen(self):
        line, at = [], 0
        for c in re.findall(r"\033\[K|.|\n", self.getvalue()):
            if c == "\b":
                at -= 1
            elif c == "\r":
                at = 0
            elif c == "\033[K":
                del line[at:]
            else:
                line[at : at + 1], at = c, at + 1
        return "".join(line)


def test_notices_of_compilation_leave_the_prompt_alone(llm, tokenizer, monkeypatch):
    new = LLM(llm.cfg, llm.params, tokenizer, F32)
    text = llm.generate("the cat", max_new_tokens=4)
    monkeypatch.setattr("llama_jax.generate.__main__.load", lambda *_, **__: new)
    terminal = Terminal()
    monkeypatch.setattr("sys.stdout", terminal)
    monkeypatch.setattr("sys.stderr", terminal)
    assert main(["x", "the cat", "--max-new-tokens", "4"]) == 0
    assert "compiling decode ..." in terminal.getvalue()
    assert terminal.screen() == f"the cat{text}\n"
    new._engine._compiled.clear()
    print("prompt: ", end="")
    print(*new.stream("the cat", max_new_tokens=4), sep="", end="")
    assert terminal.screen().splitlines()[-1] == f"prompt: {text}".splitlines()[-1]
    assert "prompt: " in terminal.screen()


def test_ctrl_c(monkeypatch, capsys):
    """Immediate in every phase, with one line of output."""

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("llama_jax.generate.__main__.load", interrupted)
    assert main(["x", "a"]) == 130
    assert capsys.readouterr().err == "\nstopped\n"

    def compiling(*_, **__):  # Python raises its exception only after the compilation
        with contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
            time.sleep(0.01)
        assert over.wait(20)
        raise ImportError("numpy could not be imported")  # the error that a library raises instead

    over, ended = threading.Event(), []
    monkeypatch.setattr("llama_jax.generate.__main__.load", compiling)
    monkeypatch.setattr("llama_jax.generate.__main__._GRACE", 0.05)
    monkeypatch.setattr("os._exit", lambda status: (ended.append(status), over.set()))
    assert main(["x", "a"]) == 130
    assert ended == [130]


def test_another_error_because_of_ctrl_c_before_the_thread_has_run(monkeypatch, capsys):
    def failing(*_):  # the handler runs within `os.kill`, which holds the lock of Python's threads
        raise ImportError("numpy could not be imported")

    def importing(*_, **__):
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr("llama_jax.generate.__main__.load", importing)
    before = signal.signal(signal.SIGINT, failing)
    try:
        assert main(["x", "a"]) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert capsys.readouterr().err == "\nstopped\n"


def test_ctrl_c_while_libraries_are_imported():
    command = [sys.executable, "-X", "importtime", "-m", "llama_jax.generate", "none", "x"]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        for line in process.stderr:
            if "jax._src" in line:
                break
        process.send_signal(signal.SIGINT)
        rest = process.stderr.read()
    assert process.returncode == 130
    assert "stopped" in rest
    assert "Traceback" not in rest


def test_ctrl_c_within_an_import_raises_nothing_there(tmp_path, monkeypatch):
    """Some libraries crash if their import is interrupted by an exception."""
    (tmp_path / "imported_late.py").write_text("import signal\nsignal.raise_signal(signal.SIGINT)")
    monkeypatch.syspath_prepend(tmp_path)
    late = lambda *_, **__: importlib.import_module("imported_late")
    monkeypatch.setattr("llama_jax.generate.__main__.load", late)
    ended = []
    monkeypatch.setattr("os._exit", ended.append)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert main(["x", "a"]) == 130
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert ended[:1] == [130]


def test_bad_lines_and_a_closed_pipe(llm, monkeypatch, capsys):
    monkeypatch.setattr("llama_jax.generate.__main__.load", lambda *_, **__: llm)
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
    err = capsys.readouterr().err
    assert f"error: {tmp_path}/hf cannot be loaded: " in err
    assert "found readme.txt" in err
    with pytest.raises(ValueError, match="quantize='int3'"):
        llama_jax.load(tmp_path, quantize="int3")
    with pytest.raises(ValueError, match="cache='int4' must be 'int8'"):
        llama_jax.load(tmp_path, cache="int4")
