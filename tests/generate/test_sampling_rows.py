"""A batch whose rows have different samplers: each row gets what it gets alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.generate.sampler import Adjustments, Greedy, Sample, choose, settings_of
from llama_jax.generate.warp import warp_logits

V, WORDS, BIASES = 301, 10, 5
FREE = np.full(WORDS, -1, np.int32)


def row(sampling, presence=0.0, frequency=0.0, bias=None, mask=FREE):
    """Settings, adjustments and mask of one row."""
    ids, values = np.zeros(BIASES, np.int32), np.zeros(BIASES, np.float32)
    for i, (token, value) in enumerate((bias or {}).items()):
        ids[i], values[i] = token, value
    adjustments = Adjustments(np.float32(presence), np.float32(frequency), ids, values)
    return settings_of(sampling), adjustments, mask


def mask_of(allowed, words=WORDS):
    """Words with the bits of these ids."""
    bits = np.zeros(words * 32, np.uint8)
    bits[list(allowed)] = 1
    return np.packbits(bits, bitorder="little").view(np.int32)


def stack(rows):
    return jax.tree.map(lambda *x: np.stack(x), *rows)


PROGRAMS = {name: jax.jit(lambda *args: choose(*args)) for name in ("cpu", "tpu")}


@pytest.fixture(params=PROGRAMS)
def program(request, monkeypatch):
    """The compiled choice, in the form of a CPU (row by row) and of an accelerator."""
    monkeypatch.setattr("pallas_kernels.dispatch.platform", lambda: request.param)
    return lambda *args: np.asarray(PROGRAMS[request.param](*args))


def inputs(rng, B, V=V):
    logits_BV = (rng.normal(size=(B, V)) * rng.choice([0.1, 3, 30], size=(B, 1))).astype(np.float32)
    logits_BV[::3] = np.round(logits_BV[::3])  # equal logits
    counts_BV = rng.integers(-3, 4, size=(B, V)).clip(0).astype(np.int32)
    keys_B = jax.random.split(jax.random.key(int(rng.integers(2**31))), B)
    return logits_BV, counts_BV > 1, keys_B, counts_BV


def random_row(rng):
    maybe = lambda x: x if rng.random() < 0.5 else None
    if rng.random() < 0.4:
        sampling = Sample(temperature=0.0, repetition_penalty=maybe(1.7))
    else:
        sampling = Sample(
            temperature=float(rng.choice([0.3, 1.0, 2.0])),
            top_k=maybe(int(rng.integers(1, 60))),
            top_p=maybe(float(rng.uniform(0.2, 1))),
            min_p=maybe(float(rng.uniform(0, 0.3))),
            repetition_penalty=maybe(1.3),
        )
    allowed = np.flatnonzero(rng.random(V) < rng.choice([0.02, 0.5]))
    return row(
        sampling,
        presence=maybe(0.7) or 0.0,
        frequency=maybe(-0.4) or 0.0,
        bias=maybe({3: 2.0, 250: -100.0, 17: 5.5}),
        mask=mask_of({*allowed, 5}) if rng.random() < 0.5 else FREE,
    )


def test_random_mixtures(program):
    """96 rows in batches of 8: the token is the same beside 7 greedy rows, and with other mates."""
    rng = np.random.default_rng(0)
    idle = row(Greedy())
    used = set()
    for _ in range(12):
        logits, seen, keys, counts = inputs(rng, 8)
        rows = [random_row(rng) for _ in range(8)]
        together = program(logits, seen, keys, *order(stack(rows), counts))
        for b in range(8):
            slot = (b + 3) % 8
            mates = [idle] * 8
            mates[slot] = rows[b]
            roll = lambda x, b=b, slot=slot: jnp.roll(x, slot - b, axis=0)
            alone = program(
                roll(logits), roll(seen), roll(keys), *order(stack(mates), roll(counts))
            )
            assert alone[slot] == together[b], rows[b]
            used.add(int(together[b]))
    assert len(used) > 40


def order(stacked, counts):
    settings, adjustments, mask = stacked
    return settings, adjustments, counts, mask


def test_a_row_equals_one_setting_for_all(program):
    """Rows with their own settings draw what ``generate`` draws with these settings for all."""
    rng = np.random.default_rng(1)
    logits, seen, keys, counts = inputs(rng, 8)
    samplings = [
        Greedy(), Sample(), Sample(temperature=0.7, top_p=0.8), Sample(top_k=20),
        Sample(min_p=0.05, temperature=1.5), Sample(top_k=40, top_p=0.9, repetition_penalty=1.4),
        Sample(temperature=0.0, repetition_penalty=2.0), Sample(temperature=1e-30),
    ]  # fmt: skip
    mixed = program(logits, seen, keys, *order(stack([row(s) for s in samplings]), counts))
    generate = jax.jit(lambda *args: choose(*args))
    for b, sampling in enumerate(samplings):
        assert generate(logits, seen, keys, settings_of(sampling))[b] == mixed[b], sampling


def test_draws_are_those_of_jax_random(program):
    """The bits of ``jax.random.categorical``, in each form of the program."""
    logits, seen, keys, counts = inputs(np.random.default_rng(3), 8)
    expected = jax.vmap(jax.random.categorical)(keys, logits - logits.max(-1, keepdims=True))
    rows = stack([row(Sample())] * 8)
    assert program(logits, seen, keys, *order(rows, counts)).tolist() == expected.tolist()
    assert choose(logits, seen, keys, settings_of(Sample())).tolist() == expected.tolist()


DRAWS, SMALL_V = 8000, 70


@pytest.mark.parametrize("platform", PROGRAMS)
def test_the_distributions_of_rows(platform, monkeypatch):
    """The same bits as with one setting for all, whatever the other rows keep."""
    monkeypatch.setattr("pallas_kernels.dispatch.platform", lambda: platform)
    warp = jax.jit(lambda *args: warp_logits(*args))
    samplings = [
        Sample(), Sample(temperature=0.7, top_p=0.6), Sample(top_k=20), Sample(min_p=0.3),
        Sample(temperature=2.0), Sample(top_k=40, top_p=0.9), Sample(top_p=0.2), Sample(top_k=300),
    ]  # fmt: skip
    logits_BV = np.tile(np.random.default_rng(2).normal(size=V).astype(np.float32), (8, 1))
    alone = [np.asarray(warp(logits_BV, settings_of(s)))[0] for s in samplings]
    for shift in range(8):
        order = np.roll(np.arange(8), shift)
        mixed_BV = np.asarray(warp(logits_BV, stack([settings_of(samplings[i]) for i in order])))
        for row_V, i in zip(mixed_BV, order, strict=True):
            np.testing.assert_array_equal(row_V, alone[i], err_msg=str(samplings[i]))


def draw(program, row_, logits, seen=(), counts=()):
    """How often each id is drawn; ids beyond ``logits`` are impossible."""
    many = lambda x: np.broadcast_to(x, (DRAWS, *np.shape(x)))
    settings, adjustments, mask = jax.tree.map(many, row_)
    keys = jax.random.split(jax.random.key(3), DRAWS)
    logits_V = np.full(SMALL_V, -np.inf, np.float32)
    logits_V[: len(logits)] = logits
    counts_V = np.zeros(SMALL_V, np.int32)
    counts_V[: len(counts)] = counts
    in_context = np.isin(np.arange(SMALL_V), seen)
    args = many(logits_V), many(in_context), keys, settings, adjustments, many(counts_V), mask
    return np.bincount(program(*args), minlength=SMALL_V)[: len(logits)]


def test_the_distribution_of_all_settings(program):
    """Bias, then the three penalties, grammar, temperature, top_k, top_p, min_p; written out."""
    logits = np.array([2.0, 1.5, 1.2, 1.0, 0.5, 0.0, -0.5, -1.0, -2.0])
    counts = np.array([2, 0, 1, 0, 0, 0, 0, 0, 0])
    sampling = Sample(temperature=1.25, top_k=5, top_p=0.9, min_p=0.1, repetition_penalty=1.5)
    allowed = [0, 2, 3, 4, 5, 6, 7]
    row_ = row(sampling, 0.25, -0.5, {4: 1.0, 8: 100.0}, mask_of(allowed, 2))
    counted = draw(program, row_, logits, seen=[0, 2, 4, 7], counts=counts)
    x = logits.copy()
    x[4] += 1
    x[8] += 100
    for i in (0, 2, 4, 7):
        x[i] = x[i] / 1.5 if x[i] > 0 else x[i] * 1.5
    x = x + 0.5 * counts - 0.25 * (counts > 0)
    x[[1, 8]] = -np.inf
    p = np.exp(x / 1.25)
    ids = np.argsort(-p)
    p[ids[5:]] = 0
    p /= p.sum()
    cumulative = np.cumsum(p[ids])
    p[ids[1:][cumulative[:-1] >= 0.9]] = 0
    p[p < 0.1 * p.max()] = 0
    p /= p.sum()
    assert 2 < np.sum(p > 0) < 6
    assert counted[p == 0].sum() == 0
    expected = p[p > 0] * counted.sum()
    statistic = np.sum((counted[p > 0] - expected) ** 2 / expected)
    assert statistic < 33  # one in a million for 4 degrees of freedom


def test_penalties_by_hand(program):
    """OpenAI's: frequency counts the new text's tokens, presence counts each once."""

    def greedy(logits, counts=(), seen=(), repetition_penalty=None, **more):
        sampling = Sample(repetition_penalty, temperature=0.0)
        row_ = row(sampling, mask=FREE[:2], **more)
        return int(np.argmax(draw(program, row_, logits, seen, counts)))

    assert greedy([3.0, 2.0, 1.0], counts=[0, 5, 0], frequency=-0.3) == 1  # 2 + 1.5
    assert greedy([3.0, 2.0, 1.0], counts=[0, 3, 0], frequency=-0.3) == 0  # 2 + 0.9
    assert greedy([3.0, 2.0, 1.0], counts=[9, 0, 0], presence=0.9) == 0  # 3 - 0.9
    assert greedy([3.0, 2.0, 1.0], counts=[9, 0, 0], presence=1.1) == 1
    assert greedy([3.0, 2.0, 1.0], counts=[2, 1, 0], presence=1.0, frequency=1.0) == 2
    # The prompt counts in the repetition penalty alone.
    assert greedy([3.0, 2.0, 1.0], seen=[0], presence=2.0, frequency=2.0) == 0
    assert greedy([3.0, 2.0, 1.0], seen=[0], repetition_penalty=2.0) == 1
    # The bias comes before the repetition penalty: (1 + 4) / 2 < 3, (1 + 6) / 2 > 3.
    for bias, chosen in ((4.0, 0), (6.0, 2)):
        assert greedy([3.0, 2.0, 1.0], seen=[2], repetition_penalty=2.0, bias={2: bias}) == chosen


def test_a_grammar_allows_no_other_token(program):
    """Also those that a bias makes likely, and ids of padded rows of the vocabulary."""
    logits = np.full(70, 5.0)
    logits[64:] = 50.0  # the tokenizer has fewer ids than the model
    for allowed in ([0], [31], [32, 63], [1, 33]):
        row_ = row(Sample(temperature=3.0), bias={7: 100.0}, mask=mask_of(allowed, 2))
        counted = draw(program, row_, logits)
        assert np.flatnonzero(counted).tolist() == allowed
    assert np.flatnonzero(draw(program, row(Greedy(), mask=mask_of([63], 2)), logits)) == 63


def test_extreme_settings_stay_numbers(program):
    """A grammar holds for the largest and smallest temperatures."""
    logits = np.array([5.0, 4.0, 3.0])
    for temperature in (1e-300, 1e-40, 1e-30, 1e30, 1e300):
        row_ = row(Sample(temperature=temperature, top_p=0.9), mask=mask_of([1, 2], 2))
        counted = draw(program, row_, logits)
        assert counted[0] == 0
        assert (counted[2] > 0) == (temperature > 1)
