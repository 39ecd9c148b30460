"""Log-probabilities of continuations: against a plain forward pass, and shared prefixes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from model_tools import F32, model_of, random_weights, small, tree_of

from llama_jax.evaluate import likelihood
from llama_jax.evaluate.likelihood import _Cache, score_continuations
from llama_jax.evaluate.prefix_tree import build_tree
from llama_jax.generate.decode import Engine
from llama_jax.model.params import abstract_params
from llama_jax.model.quantize import quantize
from llama_jax.model.sharding import AXES, PRESETS

CFG = small(vocab_size=40, context=160)
PARAMS = tree_of(random_weights(CFG))


@pytest.fixture(autouse=True)
def few_shapes(monkeypatch):
    """Short rows and caches, so that random requests fill batches and split long prefixes."""
    monkeypatch.setattr(likelihood, "LENGTHS", (32,))
    monkeypatch.setattr(likelihood, "TOKENS_PER_CALL", (64,))
    monkeypatch.setattr(likelihood, "PAGE", 32)
    monkeypatch.setattr(likelihood, "POSITIONS", 1024)
    monkeypatch.setattr(likelihood, "LOGITS_PER_CHUNK", 8)


@pytest.fixture(scope="module")
def engine():
    return Engine(CFG, PARAMS, F32, None)


@functools.cache
def _forward(cfg):
    return jax.jit(lambda params, tokens, n: model_of(cfg)(params)(tokens, rope_length=n)[0])


def reference(cfg, params, context, continuation):
    """(sum of log p, greedy) by one forward pass over the whole sequence."""
    inputs = [*context, *continuation[:-1]]
    padded = np.asarray([inputs + [0] * (160 - len(inputs))], np.int32)
    logits = _forward(cfg)(params, padded, len(inputs))
    logprob = np.asarray(jax.nn.log_softmax(logits, axis=-1), np.float64)
    rows = logprob[len(context) - 1 : len(inputs)]
    greedy = bool((rows.argmax(-1) == continuation).all())
    return float(rows[np.arange(len(rows)), continuation].sum()), greedy


def random_requests(seed, count=30):
    """Contexts that extend each other at random places, and several continuations of each."""
    rng = np.random.default_rng(seed)
    ids = lambda low, high: rng.integers(0, 40, rng.integers(low, high)).tolist()
    contexts, out = [ids(1, 90)], []
    while len(out) < count:
        base = contexts[rng.integers(len(contexts))]
        context = (base[: rng.integers(1, len(base) + 1)] + ids(0, 40))[:120]
        contexts.append(context)
        for _ in range(rng.choice([1, 1, 2, 4, 12])):
            out.append((context, ids(1, rng.choice([2, 12, 40]))))
        if rng.random() < 0.2:
            out.append(out[-1])
    return out


def check(engine, requests, cfg=CFG, params=PARAMS, tolerance=1e-4):
    """Every request is scored once, as by a plain forward pass."""
    scored = list(score_continuations(engine, requests))
    assert sorted(i for i, *_ in scored) == list(range(len(requests)))
    for i, logprob, greedy in scored:
        want, want_greedy = reference(cfg, params, *requests[i])
        assert logprob == pytest.approx(want, abs=tolerance), (i, requests[i])
        assert greedy == want_greedy


def greedy_requests(count=3):
    """A request whose continuation is the most likely one, and one that differs at the end."""
    out = []
    for i in range(count):
        ids = [i, 7]
        for _ in range(5):
            padded = np.asarray([ids + [0] * (160 - len(ids))], np.int32)
            ids.append(int(_forward(CFG)(PARAMS, padded, 0)[len(ids) - 1].argmax()))
        out += [(ids[:2], ids[2:]), (ids[:2], [*ids[2:-1], (ids[-1] + 1) % 40])]
    return out


def test_random_trees_of_requests(engine, monkeypatch):
    """Also that other requests compile nothing."""
    monkeypatch.setattr(likelihood, "LENGTHS", (8, 32))
    short = [(context[:30], continuation) for context, continuation in random_requests(0)]
    check(engine, short)
    for seed in range(8):
        check(engine, random_requests(seed))
        if seed == 1:
            compiled = len(engine._compiled)
    assert len(engine._compiled) == compiled


def test_greedy(engine):
    requests = greedy_requests()
    check(engine, requests)
    scored = {i: greedy for i, _, greedy in score_continuations(engine, requests)}
    assert [scored[i] for i in range(6)] == [True, False] * 3


def test_few_pages(engine, monkeypatch):
    """No more than one sequence needs."""
    monkeypatch.setattr(likelihood, "POSITIONS", 32)
    ids = np.random.default_rng(0).integers(0, 40, 150).tolist()
    chain = [(ids, [1, 2]), (ids, [3, 4])]
    assert max(s.num_pages for s in build_tree(chain, [0, 0], 32, 32)) == 6
    made = []
    monkeypatch.setattr(likelihood, "_Cache", lambda *args: made.append(_Cache(*args)) or made[-1])
    for seed in range(10, 14):
        check(engine, [*random_requests(seed), *chain])
        assert len(made[-1].uses) < 12
        assert sorted(made[-1].free) == list(range(1, len(made[-1].uses)))


def test_many_continuations_of_one_token(engine):
    context = list(range(9))
    check(engine, [(context, [i]) for i in range(40)] + [(context[:8], [i]) for i in range(40)])
    repeated = [(context[:1], [i, j]) for i in range(4) for j in range(40)] * 2
    check(engine, repeated)


def tokens_read(requests):
    return sum(s.end - s.start for s in build_tree(requests, [0] * len(requests), 64, 64))


def test_shared_tokens_are_read_once():
    """Contexts of a question, a head of many questions, contexts with equal continuations."""
    rng = np.random.default_rng(0)
    ids = lambda n: rng.integers(0, 40, n).tolist()
    head, continuation = ids(150), ids(9)
    letters = [[i] for i in range(4)]
    contexts = [[*head, q, *ids(19)] for q in range(10)]
    assert tokens_read([(c, x) for c in contexts for x in letters]) == 150 + 10 * 20
    choices = [[x, *ids(6)] for x in range(4)]
    assert tokens_read([(c, x) for c in contexts for x in choices]) == 150 + 10 * (20 + 4 * 6)
    differing = [([*head[:40], name], continuation) for name in (5, 6)]
    assert tokens_read(differing) == 40 + 2 * (1 + 8)
    # A short prefix is read again: a copy of the cache would cost more.
    assert tokens_read([([3, 4, q, *head], [1]) for q in range(2)]) == 2 * 153
    assert tokens_read([(head, [1, 2, 3]), (head, [1, 2, 3]), (head, [1, 2])]) == 152


def test_dynamic_rotary_frequencies():
    """They depend on the length of the whole sequence beyond the original context."""
    cfg = small({"type": "dynamic", "factor": 2.0, "original_context": 40}, context=160)
    ids = np.random.default_rng(0).integers(0, 40, 60).tolist()
    requests = [(ids[:n], ids[50 : 50 + m]) for n in (20, 36, 37, 50) for m in (4, 5, 5, 9)]
    check(Engine(cfg, PARAMS, F32, None), requests, cfg)


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_quantized_weights_and_cache(kind):
    cfg = small(vocab_size=40, context=160, dim=32, head_dim=8, ffn_dim=64)
    params = quantize(tree_of(random_weights(cfg)), kind)
    requests = random_requests(3, 12)
    check(Engine(cfg, params, F32, None), requests, cfg, params)
    if kind == "int8":
        compute = dataclasses.replace(F32, cache_dtype=jnp.dtype("int8"))
        engine = Engine(cfg, params, compute, None)
        check(engine, requests, cfg, params, tolerance=2.0)
        # The same alone: keys and values are rounded at every position, shared or not.
        scored = {i: logprob for i, logprob, _ in score_continuations(engine, requests)}
        for i in range(0, len(requests), 4):
            ((_, alone, _),) = score_continuations(engine, [requests[i]])
            assert alone == pytest.approx(scored[i], abs=1e-4)


def test_a_mesh():
    """Sharded over ``tensor``, as generation shards models."""
    compute = dataclasses.replace(F32, rules=PRESETS["fsdp_tensor"])
    mesh = jax.make_mesh((1, 1, 2, 1), AXES, (AxisType.Explicit,) * 4, devices=jax.devices()[:2])
    with jax.set_mesh(mesh):
        place = lambda x, s: jax.device_put(x, NamedSharding(mesh, s.sharding.spec))
        params = jax.tree.map(place, PARAMS, abstract_params(CFG, compute))
    check(Engine(CFG, params, compute, mesh), random_requests(3, 12))


def test_logits_that_are_not_finite(engine):
    params = jax.tree.map(np.array, PARAMS)
    params["embed"][39] = np.nan
    engine = engine.with_params(params)
    with pytest.raises(ValueError, match=r"request 1: .* after token 3 are NaN or infinite"):
        list(score_continuations(engine, [([1, 2], [3]), ([1, 2, 39], [3])]))
    params["embed"][39] = 0
    # -inf for a token that is not scored, which the sum over all tokens does not show.
    params["unembed"][0, 5] = np.inf
    padded = np.asarray([[1, 2] + [0] * 158], np.int32)
    params["unembed"][0, 5] *= -np.sign(_forward(CFG)(params, padded, 0)[1, 5])
    with pytest.raises(ValueError, match=r"request 0: .* NaN or infinite"):
        list(score_continuations(engine, [([1, 2], [3])]))


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (([], [1]), "request 1: the context has no tokens"),
        (([1], []), "request 1: the continuation has no tokens"),
        (([1, 40], [1]), "request 1: id 40 is not in the model's vocabulary of 40"),
        (([1], [-1]), "request 1: id -1 is not"),
        (([1] * 160, [1, 2]), "request 1: 161 input tokens are more than the .* context of 160"),
    ],
)
def test_bad_requests(engine, request_, message):
    with pytest.raises(ValueError, match=message):
        next(score_continuations(engine, [([1], [2]), request_]))


def test_memory(engine, monkeypatch):
    """The weights and the pages, and no more."""
    needed = engine.weight_bytes + (1024 + 32) * engine._bytes_per_position
    memory = lambda size: lambda *args: size
    monkeypatch.setattr("llama_jax.generate.decode.device_memory", memory(needed))
    check(engine, [([1, 2], [3])])
    monkeypatch.setattr("llama_jax.generate.decode.device_memory", memory(needed - 1))
    with pytest.raises(MemoryError, match="a cache of 1056 positions takes"):
        list(score_continuations(engine, [([1, 2], [3])]))


def test_no_requests(engine):
    assert list(score_continuations(engine, [])) == []
