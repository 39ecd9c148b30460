"""What may go wrong: cancelled, late and failing requests, a full queue, bad weights, a failure of
the engine's thread. Nothing stays held, and other requests are not disturbed."""

import copy
import dataclasses
import random
import threading
import time
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from engine_tools import SIZES, EveryThird, ask, prompt, start_engine, submit, tiny_llm
from model_tools import F32, small

from llama_jax import Sample
from llama_jax.generate.llm import LLM
from llama_jax.serve import sizes
from llama_jax.serve.engine import Engine
from llama_jax.serve.pages import Pages
from llama_jax.serve.programs import BoundPrograms, _drawn
from llama_jax.serve.request import GenerationRequest, Metrics, QueueFull, Sampling, Stopping
from llama_jax.serve.running import Running
from llama_jax.serve.schemas import MAX_CHOICES
from llama_jax.serve.sizes import Sizes


def with_params(llm, params):
    """The model with other weights of the same structure."""
    other = copy.copy(llm)
    other._engine = llm._engine.with_params(params)
    return other


def until(condition, seconds=30):
    """Wait for the engine's thread."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


def check_nothing_is_held(engine):
    until(lambda: engine.status().running + engine.status().waiting == 0)
    status = engine.status()
    assert status.alive
    assert status.ready
    assert status.pages_used == 0
    assert status.seconds_since_step == 0
    assert len(engine._free_slots) == SIZES["slots"] == len(set(engine._free_slots))
    assert engine._waiting_tokens == 0


class Failing:
    """A receiver that raises at its n-th update."""

    def __init__(self, n):
        self.left = n

    def __call__(self, update):
        self.left -= 1
        if self.left <= 0:
            raise ConnectionError("the client has left")


def test_random_requests(engine):
    """Nothing is compiled, held or lost, whatever happens to a thousand requests."""
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, *args, **kwargs: compiled.append(event) if "/compile/" in event else None
    )
    rng = random.Random(0)
    reference = dict(ids=prompt(50), max_new_tokens=12, sampling=Sampling(Sample(), seed=1))
    want = ask(engine, **reference).content
    compiled.clear()
    answers, failing, watched = [], 0, []
    for i in range(1000):
        fields = dict(
            ids=prompt(rng.choice([1, 2, 10, 32, 60, 100]), rng.randrange(30)),
            max_new_tokens=rng.choice([1, 2, 3, 8]),
            sampling=Sampling(
                Sample(temperature=rng.choice([0.0, 1.0]), top_p=rng.choice([None, 0.9])),
                presence_penalty=rng.choice([0, 1]), seed=i,
            ),
            logprobs=rng.random() < 0.2,
            top_logprobs=rng.choice([0, 0, 0, 20]),
            prompt_logprobs=rng.random() < 0.1,
        )  # fmt: skip
        fault = rng.random()
        if fault < 0.1:
            fields["deadline"] = time.monotonic() + rng.random() * 0.05 - 0.01
        elif fault < 0.2:
            fields["send"] = Failing(rng.randint(1, 4))
            failing += 1
        elif fault < 0.3:
            fields["grammar"] = EveryThird(i, fails_after=rng.choice([1, 2, None]))
        until(lambda: engine.status().waiting < 40)
        answers.append(submit(engine, **fields))
        if rng.random() < 0.15:
            engine.cancel(rng.choice(answers).number)
        if i % 100 == 0:
            watched.append(submit(engine, **reference))
    check_nothing_is_held(engine)
    assert not compiled
    jax.jit(lambda x: x + 1)(1)
    assert compiled  # they are counted
    assert [answer.wait().content for answer in watched] == [want] * len(watched)
    finished = [answer.finish for answer in answers if answer.updates]
    assert len(finished) >= 1000 - failing
    assert {reason: finished.count(reason) > 5 for reason in set(finished)} == {
        reason: True for reason in ("length", "cancelled", "deadline", "error")
    }
    errors = {a.updates[-1].error for a in answers if a.updates and a.finish == "error"}
    assert errors == {"the grammar fails here"}


def test_cancel_frees_within_a_step(engine):
    """Running, being read, and waiting requests."""
    long = [submit(engine, prompt(5, i), 500) for i in range(16)]
    until(lambda: all(answer.updates for answer in long))
    waiting = submit(engine, prompt(7), 500)
    engine.cancel(waiting.number)
    assert waiting.wait().finish == "cancelled"
    assert not waiting.tokens
    engine.cancel(long[3].number)
    reading = submit(engine, prompt(550), 20)
    assert long[3].wait().finish == "cancelled"
    until(lambda: engine.status().running == 16)
    engine.cancel(reading.number)
    assert reading.wait().finish == "cancelled"
    late = submit(engine, prompt(8), 500, deadline=time.monotonic() + 0.1)
    assert late.wait().finish == "deadline"
    assert late.tokens
    assert late.text
    for answer in long:
        engine.cancel(answer.number)
    check_nothing_is_held(engine)


def test_the_timeout_of_the_server(llm, monkeypatch):
    """It counts from the submission, and is that of requests without a deadline of their own."""
    engine = start_engine(llm, monkeypatch, timeout=0.2)
    assert ask(engine, prompt(5), 3).finish == "length"
    start = time.monotonic()
    assert submit(engine, prompt(5), 500, deadline=start).wait().finish == "deadline"
    late, patient = submit(engine, prompt(6), 500), submit(engine, prompt(7), 500, deadline=1e12)
    assert late.wait().finish == "deadline"
    assert time.monotonic() - start < 5
    assert patient.wait().finish == "length"
    check_nothing_is_held(engine)
    engine.drain(1)


def test_a_full_queue(llm, monkeypatch):
    engine = start_engine(llm, monkeypatch, max_waiting=3, max_waiting_tokens=100)
    running = []
    for i in range(16):
        running.append(submit(engine, prompt(5, i), 500))
        until(lambda: not engine.status().waiting)
    waiting = [submit(engine, prompt(30), 2) for _ in range(3)]
    with pytest.raises(QueueFull) as caught:
        submit(engine, [5], 2)
    assert 1 <= caught.value.retry_after < 100
    engine.cancel(waiting[0].number)
    until(lambda: engine.status().waiting == 2)
    with pytest.raises(QueueFull):
        submit(engine, prompt(41), 2)
    waiting.append(submit(engine, prompt(40), 2))
    threading.Timer(0.1, lambda: [engine.cancel(answer.number) for answer in running]).start()
    engine.drain(60)
    assert [a.wait().finish for a in waiting] == ["cancelled", "length", "length", "length"]
    with pytest.raises(Stopping):
        submit(engine, [5], 2)
    assert not engine.status().alive


def test_an_empty_queue_takes_all_answers_to_one_request(llm, monkeypatch):
    """Otherwise the request would be refused for ever, and the client told to try again."""
    cfg = dataclasses.replace(llm.cfg, context=20_000)
    long = LLM(cfg, llm.params, llm.tokenizer, F32, eos_ids=())
    engine = Engine(long, slots=1, context=20_000)
    monkeypatch.setattr(engine, "_thread", threading.current_thread())  # answers nothing
    ids = tuple(prompt(19_990))
    for _ in range(MAX_CHOICES):
        engine.submit(GenerationRequest(ids, 10, send=print))
    assert engine.status().waiting == MAX_CHOICES


def test_the_first_of_the_queue_is_not_overtaken(llm, monkeypatch):
    """A request that needs many pages waits, and those after it wait for it."""
    engine = start_engine(llm, monkeypatch)
    engine._pages = Pages(20, 0)
    holds = submit(engine, prompt(5), 500)  # 16 pages
    until(lambda: holds.updates)
    large = submit(engine, prompt(6), 200)
    small = submit(engine, prompt(7), 1)
    until(lambda: len(holds.updates) > 30)
    assert not small.updates
    assert engine.status().waiting == 2
    engine.cancel(holds.number)
    assert small.wait().finish == large.wait().finish == "length"
    engine.drain(1)


def test_drain_cancels_what_takes_too_long(llm, monkeypatch):
    engine = start_engine(llm, monkeypatch)
    short, long = submit(engine, prompt(5), 3), submit(engine, prompt(6), 550)
    until(lambda: long.updates)
    start = time.monotonic()
    engine.drain(0.05)
    assert time.monotonic() - start < 5
    assert (short.finish, long.finish) == ("length", "cancelled")
    assert not engine.status().alive
    assert engine.status().pages_used == 0


def test_the_thread_fails(llm, monkeypatch):
    """All requests end, health can say so, and no new requests are taken."""
    engine = start_engine(llm, monkeypatch)
    answers = [submit(engine, prompt(5, i), 500) for i in range(20)]
    until(lambda: engine.status().running == 16)
    monkeypatch.setattr(threading, "excepthook", lambda args: None)

    def fails(*args):
        raise RuntimeError("device lost")

    monkeypatch.setattr(BoundPrograms, "decode_step", fails)
    for answer in answers:
        assert answer.wait().finish == "error"
        assert "device lost" in answer.updates[-1].error
    until(lambda: not engine.status().alive)
    assert (engine.status().running, engine.status().waiting) == (0, 0)
    with pytest.raises(Stopping):
        submit(engine, prompt(5))
    engine.drain(1)


def test_numbers_that_are_not_finite(llm, monkeypatch):
    """A token whose embedding is NaN ends the requests with it, and changes no other."""
    embed = llm.params["embed"].at[7].set(jnp.nan)
    engine = start_engine(with_params(llm, {**llm.params, "embed": embed}), monkeypatch)
    good = dict(ids=prompt(40, 1), max_new_tokens=30, sampling=Sampling(Sample(), seed=1))
    assert 7 not in good["ids"]
    want = ask(engine, **good).content
    answers = [submit(engine, **good) for _ in range(3)]
    bad = [submit(engine, [7, *prompt(i)], 9) for i in (1, 40)]
    forced = submit(engine, [5], 9, sampling=Sampling(logit_bias=((7, 1e4),)))
    answers.append(submit(engine, **good))
    for answer in bad:
        assert (answer.wait().finish, answer.tokens) == ("error", [])
        assert "finite" in answer.updates[-1].error
    assert (forced.wait().ids, forced.finish) == ([7], "error")
    assert [answer.wait().content for answer in answers] == [want] * 4
    assert ask(engine, **good).content == want  # pages and slots are used again
    check_nothing_is_held(engine)
    engine.drain(1)


def test_one_logit_that_is_not_finite():
    """The others have a largest one, but nothing follows from it. The token is -1."""
    constants = Sizes(slots=64, page=32, row_pages=1, pages=1, vocab_size=300)
    logits_BV = np.zeros((64, 300), np.float32)
    logits_BV[[1, 2, 3], [0, 150, 299]] = np.nan, np.inf, -np.inf
    token_B = np.full(64, 7, np.int32)
    drawn = jax.jit(_drawn, static_argnums=0)(constants, logits_BV, token_B, np.zeros(64, np.int32))
    found_B = np.asarray(drawn)[:, 0]
    assert found_B[:5].tolist() == [7, -1, -1, -1, 7]
    assert (found_B[5:] == 7).all()


def test_an_error_of_the_tokenizer(engine, llm, monkeypatch):
    """Ends the request, whose text cannot be computed, with an update."""
    decode = llm.tokenizer.decode

    def fails(ids):
        if 7 in ids:
            raise RuntimeError("no text")
        return decode(ids)

    monkeypatch.setattr(llm.tokenizer, "decode", fails)
    answer = ask(engine, [5], 9, sampling=Sampling(logit_bias=((7, 1e4),)))
    assert (answer.finish, answer.updates[-1].error) == ("error", "no text")
    check_nothing_is_held(engine)


def test_cached_tokens_are_in_the_first_update_only(llm):
    updates = []
    request = GenerationRequest(tuple(prompt(70)), 9, updates.append)
    running = Running(1, request, Sizes(1, 32, 4, 4, 300), Metrics())
    running.start(llm.tokenizer, known=2)
    running.receive(np.zeros((), running.sizes.drawn))
    running.end("cancelled")
    assert [u.cached_tokens for u in updates] == [64, 0]


def test_time_without_work_is_not_the_age_of_a_step(llm):
    """Health may be asked before the engine's thread has seen the first request."""
    engine = Engine(llm, **SIZES)
    engine._thread = threading.current_thread()  # alive; takes no request
    engine._last_step -= 1000
    submit(engine, [5])
    assert engine.status().seconds_since_step < 100
    engine._last_step -= 1000
    submit(engine, [5])
    assert engine.status().seconds_since_step > 900


def test_a_grammar_that_allows_nothing(engine):
    class Nothing(EveryThird):
        def fill(self, mask_W):
            if self.state:
                super().fill(mask_W)

    first, later = (submit(engine, prompt(5), 9, grammar=Nothing(seed)) for seed in (0, 3))
    assert first.wait().updates[-1].error == "the grammar allows no token here"
    assert later.wait().finish == "length"


def test_prefixes_are_read_once(llm, monkeypatch):
    """Requests with the same 512 tokens compute only the rest, also those that came together."""
    engine = start_engine(llm, monkeypatch, prefix_cache_bytes=SIZES["prefix_cache_bytes"])
    calls = []
    chunk_of = BoundPrograms.prefill_chunk
    monkeypatch.setattr(
        BoundPrograms,
        "prefill_chunk",
        lambda s, c: (calls.append(int(c["start"])), chunk_of(s, c))[1],
    )
    common = prompt(512, 5)
    first = ask(engine, [*common, *prompt(20, 1)], 4)
    assert (len(calls), first.cached) == (17, 0)
    second = ask(engine, [*common, *prompt(9, 2)], 4)
    assert (calls[17:], second.cached) == ([512], 512)
    exact = ask(engine, common, 4)  # at least one token is computed
    assert (calls[18:], exact.cached) == ([480], 480)
    calls.clear()
    common = prompt(512, 6)
    together = [submit(engine, [*common, *prompt(9, i)], 4) for i in range(4)]
    assert sorted(answer.wait().cached for answer in together) == [0, 512, 512, 512]
    assert len(calls) == 16 + 4
    scored = ask(engine, common, 1, prompt_logprobs=True)
    assert scored.cached == 0
    check_nothing_is_held(engine)
    engine.drain(1)


def test_pages_in_use_are_not_evicted(llm, monkeypatch):
    """With fewer pages than the requests want; answers are those of an idle engine."""
    engine = start_engine(llm, monkeypatch)
    engine._pages = Pages(30, 12)
    rng = random.Random(0)
    cases = [dict(ids=prompt(rng.randint(30, 200), i % 6), max_new_tokens=40) for i in range(12)]
    want = [ask(engine, **case).content for case in cases]
    for _ in range(3):
        order = rng.sample(range(12), 12)
        answers = {i: submit(engine, **cases[i]) for i in order}
        assert all(answers[i].wait().content == want[i] for i in order)
    assert 0 < engine.status().pages_cached <= 12
    check_nothing_is_held(engine)
    engine.drain(1)


def test_adapters(llm, monkeypatch, tmp_path):
    """Each model has its own answers and prefixes, whatever the others do."""
    params = jax.tree.map(lambda x: x * 1.1, llm.params)
    adapters = {"loud": with_params(llm, params)}
    engine = start_engine(llm, monkeypatch, adapters=adapters)
    alone = start_engine(adapters["loud"], monkeypatch)
    case = dict(ids=prompt(100), max_new_tokens=30, logprobs=True, sampling=Sampling(Sample()))
    base, loud = ask(engine, **case), ask(engine, model="loud", **case)
    assert (base.cached, loud.cached) == (0, 0)
    assert base.ids != loud.ids
    assert loud.content == ask(alone, **case).content
    answers = [submit(engine, model=name, **case) for name in ("", "loud") * 5]
    assert [a.wait().content for a in answers] == [base.content, loud.content] * 5
    assert {a.cached for a in answers} == {96}
    with pytest.raises(ValueError, match="'quiet' is not one of"):
        submit(engine, [5], model="quiet")
    engine.drain(1)
    alone.drain(1)
    with pytest.raises(ValueError, match="with_adapter"):
        Engine(llm, adapters={"x": tiny_llm(tmp_path)} | {"": llm})


def test_fingerprint(llm, monkeypatch):
    """It names the weights."""

    def of(llm):
        engine = start_engine(llm, monkeypatch)
        engine.drain(1)
        return engine.fingerprint

    assert of(llm) == of(llm)
    assert of(llm) != of(with_params(llm, jax.tree.map(lambda x: x * 1.01, llm.params)))


def test_invalid_requests(engine):
    for fields, message in (
        (dict(ids=[]), "prompt must have ids"),
        (dict(ids=[300]), "0 to 299"),
        (dict(ids=[-1]), "0 to 299"),
        (dict(ids=[5], max_new_tokens=0), "max_new_tokens=0"),
        (dict(ids=prompt(570), max_new_tokens=7), "more than the context of 576"),
        (dict(ids=[5], sampling=Sampling(logit_bias=((300, 1.0),))), "logit_bias"),
    ):
        with pytest.raises(ValueError, match=message):
            submit(engine, **fields)
    engine.cancel(10**9)
    check_nothing_is_held(engine)


def test_metrics(llm, monkeypatch):
    class Recorder(Metrics):
        def __init__(self):
            self.calls = []

        def admitted(self, seconds):
            self.calls.append(("admitted", seconds))

        def first_token(self, seconds):
            self.calls.append(("first", seconds))

        def next_token(self, seconds):
            self.calls.append(("next", seconds))

        def finished(self, reason, prompt_tokens, cached_tokens, new_tokens, seconds):
            self.calls.append((reason, prompt_tokens, cached_tokens, new_tokens, seconds))

    recorder = Recorder()
    engine = start_engine(llm, monkeypatch, metrics=recorder)
    ask(engine, prompt(70), 3)
    ask(engine, prompt(70), 1)
    ask(engine, prompt(5), 9, deadline=0)
    engine.drain(1)
    names = [name for name, *_ in recorder.calls]
    assert names == [
        "admitted", "first", "next", "next", "length", "admitted", "first", "length", "deadline"
    ]  # fmt: skip
    assert [call[1:4] for call in recorder.calls if len(call) == 5] == [
        (70, 0, 3), (70, 64, 1), (5, 0, 0)
    ]  # fmt: skip
    assert all(0 <= call[-1] < 60 for call in recorder.calls)


def test_memory(llm, monkeypatch):
    """Pages for all slots and the prefixes, or as many as fit beside the weights."""
    page_bytes = 32 * 2 * 2 * 2 * 6 * 4
    weights = sum(x.nbytes for x in jax.tree.leaves(llm.params))
    pages = lambda **changes: Engine(llm, **(SIZES | changes)).status().pages
    kept = SIZES["prefix_cache_bytes"] // page_bytes
    assert pages() == 16 * 18 + kept
    assert pages(slots=2, context=33, prefix_cache_bytes=0) == 4
    memory = lambda size: lambda *args: (weights + size * page_bytes) / sizes.MEMORY_FRACTION
    monkeypatch.setattr(sizes, "device_memory", memory(60.5))
    assert pages() == 59
    assert pages(adapters={"same": with_params(llm, llm.params)}) == 59
    monkeypatch.setattr(sizes, "device_memory", memory(18.5))
    with pytest.raises(MemoryError, match="one request of full length takes"):
        pages()
    assert pages(context=500) == 17
    monkeypatch.undo()
    for free, expected in ((1e6, 16 * 18 + kept), (3 * 18, 18), (5 * 18, 2 * 18), (1, 18)):
        monkeypatch.setattr(sizes, "free_memory", lambda size=free: int(size * page_bytes))
        assert pages() == expected
    assert sizes.free_memory() is not None or not Path("/proc/meminfo").exists()
    for context in (1, 601):
        with pytest.raises(ValueError, match=f"context={context}"):
            pages(context=context)


def test_the_context_with_dynamic_rotary_frequencies():
    """They would change with the lengths of other requests beyond the original context."""
    rope = {"type": "dynamic", "factor": 2.0, "original_context": 40}
    llm = types.SimpleNamespace(cfg=small(rope, context=160))
    assert sizes.checked_context(llm, None) == sizes.checked_context(llm, 40) == 40
    with pytest.raises(ValueError, match=r"context=41: .* more than 40 tokens"):
        sizes.checked_context(llm, 41)
