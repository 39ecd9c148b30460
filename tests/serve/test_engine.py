"""The answer to a request does not depend on other requests, bit for bit; it is that of
generate."""

import dataclasses
import random
import time

import numpy as np
import pytest
from engine_tools import EveryThird, ask, prompt, submit

from llama_jax import Sample
from llama_jax.serve.request import Sampling, Token

SAMPLES = {
    "greedy": Sample(temperature=0.0),
    "seeded": Sample(temperature=0.9),
    "top_p": Sample(temperature=0.9, top_p=0.8),
    "top_k_min_p": Sample(temperature=1.2, top_k=40, min_p=0.02),
    "repetition": Sample(temperature=0.0, repetition_penalty=1.4),
}
SAMPLING = {
    **{name: Sampling(sample, seed=i) for i, (name, sample) in enumerate(SAMPLES.items())},
    "penalties": Sampling(Sample(), presence_penalty=0.7, frequency_penalty=1.1, seed=2**32 - 1),
    "bias": Sampling(Sample(), logit_bias=((7, 4.0), (11, -100.0), (299, 3.0)), seed=8),
    "index": Sampling(Sample(), seed=8, index=3),
}


def fields_of(kind: str, i: int) -> dict:
    """A request: its settings, a prompt and a length of its own."""
    rng = random.Random(f"{kind} {i}")
    fields = dict(
        ids=prompt(rng.choice([1, 5, 31, 32, 33, 64, 100, 150]), seed=rng.randrange(10**6)),
        max_new_tokens=rng.choice([1, 2, 9, 30, 40]),
        logprobs=True,
        sampling=SAMPLING.get(kind, Sampling(Sample(), seed=i)),
    )
    if kind == "top_logprobs":
        fields["top_logprobs"] = 5
    if kind == "prompt_logprobs":
        fields |= dict(prompt_logprobs=True, top_logprobs=2)
    if kind == "stop":
        fields |= dict(stops=("a", "cat"), eos_ids=(40, 41, 42, 43), max_new_tokens=40)
    if kind == "grammar":
        fields["grammar"] = EveryThird(i)
    return fields


KINDS = [*SAMPLING, "top_logprobs", "prompt_logprobs", "stop", "grammar"]


@pytest.fixture(scope="module")
def alone(engine):
    """The answers to two requests of each kind, each asked when nothing else runs."""
    out = {}
    for case in [(kind, i) for kind in KINDS for i in range(2)]:
        answer = ask(engine, **fields_of(*case))
        assert answer.finish in ("length", "stop", "end")
        assert answer.cached == 0
        out[case] = answer.content
    return out


def test_asked_again(engine, alone):
    """With the prefix of the prompt in the cache."""
    cached = 0
    for case, content in alone.items():
        answer = ask(engine, **fields_of(*case))
        assert answer.content == content
        cached += answer.cached
        length = len(fields_of(*case)["ids"])
        assert answer.cached == (0 if case[0] == "prompt_logprobs" else (length - 1) // 32 * 32)
    assert cached > 500


@pytest.mark.parametrize("seed", range(8))
def test_other_requests(engine, alone, seed):
    """In random order and slots, with random other requests, some of which are cancelled."""
    rng = random.Random(seed)
    cases = rng.sample(sorted(alone), len(alone))
    others, asked = [], {}
    for _ in range(rng.randint(0, 15)):  # so that the requests get other slots
        others.append(submit(engine, prompt(rng.randint(1, 70), rng.randrange(999)), 60))
    for case in cases:
        asked[case] = submit(engine, **fields_of(*case))
        if rng.random() < 0.4:
            sampling = rng.choice(list(SAMPLING.values()))
            ids = prompt(rng.randint(1, 200), rng.randrange(999))
            others.append(submit(engine, ids, rng.randint(1, 50), sampling=sampling))
        if rng.random() < 0.3:
            engine.cancel(rng.choice([0, *(other.number for other in others)]))
        if rng.random() < 0.3:
            time.sleep(rng.random() * 0.01)
    for other in others:
        if rng.random() < 0.3:
            engine.cancel(other.number)
    for case, answer in asked.items():
        assert answer.wait().content == alone[case], case
    for other in others:
        assert other.wait().finish in ("length", "cancelled")


@pytest.mark.parametrize("kind", SAMPLES)
def test_equals_generate(engine, llm, alone, kind):
    """Both continuations of a prompt."""
    fields = fields_of(kind, 0)
    sampling = fields["sampling"]
    want = llm.generate(
        [int(i) for i in fields["ids"]], max_new_tokens=fields["max_new_tokens"], n=2,
        sampling=sampling.sample, seed=sampling.seed, logprobs=True,
    )  # fmt: skip
    second = fields | {"sampling": dataclasses.replace(sampling, index=1)}
    for (tokens, text, finish, _), generation in zip(
        (alone[kind, 0], ask(engine, **second).content), want, strict=True
    ):
        assert [t.id for t in tokens] == list(generation.ids)
        assert (text, finish) == (generation.text, generation.finish)
        np.testing.assert_allclose([t.logprob for t in tokens], generation.logprobs, atol=1e-4)


def test_log_probabilities_of_a_prompt(engine):
    """Equal to those of the same tokens when they were drawn."""
    ids = prompt(40)
    made = ask(engine, ids, 60, logprobs=True, top_logprobs=3, sampling=Sampling(Sample()))
    whole = ask(engine, ids + made.ids, 0, prompt_logprobs=True, top_logprobs=3)
    assert (whole.tokens, whole.text, whole.finish) == ([], "", "length")
    (update,) = whole.updates
    assert [t.id for t in update.prompt] == ids + made.ids
    assert update.prompt[0] == Token(ids[0], None, {})
    for again, drawn in zip(update.prompt[40:], made.tokens, strict=True):
        assert again.logprob == pytest.approx(drawn.logprob, abs=1e-4)
        assert list(again.top) == list(drawn.top)
    alike = ask(engine, ids, 4, prompt_logprobs=True)
    assert [t.logprob for t in alike.updates[0].prompt] == [t.logprob for t in update.prompt[:40]]
    assert alike.updates[0].prompt[5].top == {}
    assert alike.tokens[0].logprob is None
    assert ask(engine, [5], 0, prompt_logprobs=True).updates[0].prompt == (Token(5, None, {}),)


def test_up_to_the_end_of_the_context(engine):
    """The last token of an answer has the last position that the pages of a row have."""
    for length in (544, 563):
        ids = prompt(length)
        made = ask(engine, ids, 576 - length, logprobs=True, sampling=Sampling(Sample()))
        assert (len(made.ids), made.finish) == (576 - length, "length")
        whole = ask(engine, ids + made.ids, 0, prompt_logprobs=True).updates[0].prompt
        assert [t.logprob for t in whole[length:]] == pytest.approx(
            [t.logprob for t in made.tokens], abs=1e-4
        )


def test_penalties_count_new_tokens(engine):
    """Also the first one, and no token of the prompt."""
    bias = ((7, 100.0),)
    ids = ask(engine, [7] * 40, 12, sampling=Sampling(frequency_penalty=30, logit_bias=bias)).ids
    assert ids[:4] == [7] * 4  # its logit is about 100, 70, 40, 10, -20
    assert 7 not in ids[4:]
    ids = ask(engine, [7] * 40, 12, sampling=Sampling(presence_penalty=200, logit_bias=bias)).ids
    assert ids[0] == 7
    assert 7 not in ids[1:]


def test_stop_strings_and_eos_ids(engine, llm):
    """The text before a stop string, in updates that later tokens do not change."""
    free = ask(engine, prompt(20), 30, sampling=Sampling(Sample(), seed=1))
    stop = free.text[10:13]
    answer = ask(engine, prompt(20), 30, sampling=Sampling(Sample(), seed=1), stops=(stop,))
    assert (answer.text, answer.finish) == (free.text[: free.text.index(stop)], "stop")
    assert answer.ids == free.ids[: len(answer.ids)]
    assert len(answer.ids) < 30
    end = ask(engine, prompt(20), 30, sampling=Sampling(Sample(), seed=1), eos_ids=(free.ids[7],))
    assert end.finish == "end"
    assert end.ids == free.ids[: free.ids.index(free.ids[7])]  # without the EOS id
    assert free.tokens[0].logprob is None
    assert free.tokens[0].top == {}


def test_the_cache_is_updated_in_place(engine):
    """No program has a second copy of the pages, which take most of the memory."""
    programs = engine._programs[""]
    pages = sum(x.nbytes for x in programs._programs.state.cache[:2])
    for program in (programs._prefill, programs._decode):
        memory = program.memory_analysis()
        assert memory.alias_size_in_bytes > pages
        assert memory.temp_size_in_bytes < pages / 4


def test_a_complete_grammar_ends_the_answer(engine):
    answer = ask(engine, prompt(5), 30, grammar=EveryThird(length=6))
    assert (len(answer.ids), answer.finish) == (6, "end")
    assert answer.text == ask(engine, prompt(5), 6, grammar=EveryThird()).text
