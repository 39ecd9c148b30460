"""The engine with a model that remembers what it has read: every program finds the request's own
text in its pages, whatever was cancelled, shared and given to other requests before."""

import copy
import random
import types

import numpy as np
import pytest
from engine_tools import EveryThird, prompt, submit

from llama_jax.serve import engine as engine_module
from llama_jax.serve.engine import Engine
from llama_jax.serve.pages import Pages

PAGE, CONTEXT, VOCAB = 8, 48, 300


def key_of(model, before, token):
    """What the cache has at a position: it depends on the model and on everything before."""
    return hash((model, token, *before))


def draw(keys, mask_W):
    """The token after positions with these keys, among those of a mask."""
    allowed = np.unpackbits(mask_W.view(np.uint8), bitorder="little")[:VOCAB]
    token = hash(tuple(keys)) % VOCAB
    return int((token + np.argmax(np.roll(allowed, -token))) % VOCAB)


class Remembering:
    """In place of :class:`Programs` and :class:`BoundPrograms`."""

    def __init__(self, model, sizes):
        self.sizes, self.bound = sizes, []
        self.cache = np.zeros((sizes.pages + 1, PAGE), object)
        self.last = [(0, 0)] * sizes.slots  # positions in the cache, last token
        self.all = np.full((sizes.slots, sizes.mask_words), -1, np.int32)

    def compile(self, params):
        self.bound.append(copy.copy(self))
        self.bound[-1].model = len(self.bound)
        return self.bound[-1]

    def try_out(self):
        return b""

    def rows(self, rows_B):
        return rows_B.copy()

    def result(self, out):
        return out

    def read(self, pages, tokens, length):
        """Append tokens; returns the keys of all positions."""
        keys = [self.cache[pages[p // PAGE], p % PAGE] for p in range(length)]
        for token in tokens:
            page = pages[len(keys) // PAGE]
            assert page > 0
            keys.append(key_of(self.model, keys, token))
            self.cache[page, (len(keys) - 1) % PAGE] = keys[-1]
        return keys

    def drawn(self, slot, keys, mask_W):
        drawn = np.zeros((), self.sizes.drawn)
        drawn["token"] = draw(keys, mask_W)
        self.last[slot] = len(keys), int(drawn["token"])
        return drawn

    def prefill_chunk(self, chunk):
        count, slot = int(chunk["count"]), int(chunk["slot"])
        keys = self.read(chunk["pages"], chunk["tokens"][:count].tolist(), int(chunk["start"]))
        self.cache[chunk["pages"][(len(keys) - 1) // PAGE], count:] = 0  # padding
        return self.drawn(slot, keys, chunk["mask"]), None

    def decode_step(self, rows_B, mask_BW):
        drawn_B = np.zeros(len(rows_B), self.sizes.drawn)
        for slot in np.flatnonzero(rows_B["active"]):
            length, token = self.last[slot]
            keys = self.read(rows_B["pages"][slot], [token], length)
            drawn_B[slot] = self.drawn(slot, keys, (self.all if mask_BW is None else mask_BW)[slot])
        return drawn_B


def expected(model, ids, new, grammar, eos_ids):
    """The answer without pages."""
    keys, made, mask_W = [], [], np.full(-(-VOCAB // 32), -1, np.int32)
    for token in ids:
        keys.append(key_of(model, keys, token))
    while len(made) < new:
        if grammar is not None:
            grammar.fill(mask_W)
        made.append(draw(keys, mask_W))
        if made[-1] in eos_ids:
            return made[:-1]
        if grammar is not None:
            grammar.accept(made[-1])
        keys.append(key_of(model, keys, made[-1]))
    return made


@pytest.mark.parametrize("seed", range(3))
def test_every_program_finds_its_text(llm, monkeypatch, seed):
    monkeypatch.setattr(engine_module, "Programs", Remembering)
    rng = random.Random(seed)
    engine = Engine(llm, slots=3, context=CONTEXT, page=PAGE, adapters={"a": copy.copy(llm)})
    count = rng.randint(6, 18)  # one request needs up to 6
    engine._pages = Pages(count, max_cached=rng.randint(0, count))
    engine.start()
    asked = []
    for i in range(150):
        length = rng.randint(1, CONTEXT - 1)
        shared = prompt(CONTEXT, rng.randrange(2))[: rng.choice([0, 8, 16, 17, length])]
        ids = [*shared[:length], *rng.choices(range(VOCAB), k=length)][:length]
        new = rng.choice([1, 2, CONTEXT - length, rng.randint(1, CONTEXT - length)])
        new, model = min(new, CONTEXT - length), rng.choice(["", "a"])
        eos_ids = tuple(range(rng.choice([0, 0, 40])))
        grammar = EveryThird(i) if rng.random() < 0.2 else None
        want = expected(1 + (model == "a"), ids, new, copy.copy(grammar), eos_ids)
        answer = submit(engine, ids, new, model=model, eos_ids=eos_ids, grammar=grammar)
        asked.append((answer, want))
        if rng.random() < 0.2:
            engine.cancel(rng.choice(asked[-8:])[0].number)
    finished = 0
    for answer, want in asked:
        answer.wait()
        assert answer.finish in ("length", "end", "cancelled"), answer.updates[-1].error
        assert answer.ids == (want if answer.finish != "cancelled" else want[: len(answer.ids)])
        finished += answer.finish != "cancelled"
    assert finished > 90
    assert any(answer.cached for answer, _ in asked)
    engine.drain(1)  # also waits until the last one is released
    assert (engine.status().running, engine.status().pages_used) == (0, 0)


@pytest.mark.parametrize(
    ("prompts", "decoding", "chunks"), [(16, 0, 4), (15, 1, 4), (8, 4, 2), (3, 4, 1), (0, 4, 1)]
)
def test_chunks_before_a_step(prompts, decoding, chunks):
    """Few rows that decode wait for several prompts; many wait for one chunk."""
    engine = Engine.__new__(Engine)
    rows = [False] * prompts + [True] * decoding
    engine._running = [types.SimpleNamespace(prefilled=prefilled) for prefilled in rows]
    assert engine._chunks_before_a_step() == chunks
