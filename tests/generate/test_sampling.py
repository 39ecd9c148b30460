"""Samplers draw from the stated distribution: 20,000 draws against computed probabilities."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.generate.sampler import Greedy, Sample, choose, settings_of
from llama_jax.generate.warp import warp_logits
from pallas_kernels import dispatch

DRAWS = 20_000
LOGITS = np.array([2.0, 1.5, 1.0, 0.5, 0.0, -0.5, -1.0, -3.0], np.float32)


def draws(sampling, logits=LOGITS, seen=None):
    keys = jax.random.split(jax.random.key(7), DRAWS)
    many = jnp.broadcast_to(logits, (DRAWS, len(logits)))
    seen = jnp.zeros(many.shape, bool) if seen is None else jnp.broadcast_to(seen, many.shape)
    chosen = jax.jit(choose)(many, seen, keys, settings_of(sampling))
    return np.bincount(np.asarray(chosen), minlength=len(logits))


def softmax(x):
    x = np.exp(np.asarray(x, np.float64) - np.max(x))
    return x / x.sum()


def kept(p, keep):
    p = np.where(keep, p, 0)
    return p / p.sum()


P = softmax(LOGITS)
BEFORE = np.cumsum(P) - P  # LOGITS are in order
CASES = {
    "plain": (Sample(), P),
    "temperature": (Sample(temperature=0.5), softmax(LOGITS / 0.5)),
    "hot": (Sample(temperature=2.0), softmax(LOGITS / 2)),
    "top_k": (Sample(top_k=3), kept(P, np.arange(8) < 3)),
    "top_p": (Sample(top_p=0.7), kept(P, BEFORE < 0.7)),
    "min_p": (Sample(min_p=0.2), kept(P, 0.2 * P.max() <= P)),
    "all": (
        Sample(temperature=1.5, top_k=6, top_p=0.9, min_p=0.05),
        None,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_distribution(case):
    """Chi-square test at one in a million; dropped tokens are never drawn."""
    sampling, p = CASES[case]
    if p is None:  # the steps in order, written out
        p = softmax(LOGITS / 1.5)
        p = kept(p, np.arange(8) < 6)
        cut = kept(p, np.cumsum(p) - p < 0.9)
        p = kept(cut, cut >= 0.05 * cut.max())
    counts = draws(sampling)
    assert counts[p == 0].sum() == 0
    expected = p[p > 0] * DRAWS
    freedom = len(expected) - 1
    statistic = ((counts[p > 0] - expected) ** 2 / expected).sum()
    # Wilson and Hilferty's approximation of the quantile that one draw in a million exceeds.
    limit = freedom * (1 - 2 / (9 * freedom) + 4.75 * math.sqrt(2 / (9 * freedom))) ** 3
    assert statistic < limit


def test_samplers_that_equal_greedy():
    for sampling in (Greedy(), Sample(temperature=0.0), Sample(top_k=1), Sample(top_p=1e-6)):
        assert draws(sampling)[0] == DRAWS


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_greedy_is_numpys_argmax(platform, monkeypatch):
    """The first of equal logits; also with 0 and -0, and in rows of -inf and of NaN."""
    monkeypatch.setattr(dispatch, "platform", lambda: platform)
    logits_BV = np.random.default_rng(0).integers(-9, 9, (64, 300)).astype(np.float32)
    logits_BV[1] = -np.inf
    logits_BV[2] = np.minimum(logits_BV[2], -0.0)
    logits_BV[3, ::2] = 0.0
    logits_BV[4] = np.nan
    greedy, keys_B = settings_of(Greedy()), jax.random.split(jax.random.key(0), 64)
    seen_BV = np.zeros(logits_BV.shape, bool)
    for settings in (greedy, jax.tree.map(lambda x: np.full(64, x), greedy)):
        chosen_B = jax.jit(choose)(logits_BV, seen_BV, keys_B, settings)
        np.testing.assert_array_equal(chosen_B, np.argmax(logits_BV, axis=1))


def test_tiny_temperature_overflows_nothing():
    assert draws(Sample(temperature=1e-30))[0] == DRAWS


def test_repetition_penalty():
    """A seen token's logit is divided when positive, multiplied when negative."""
    seen = np.array([True, False, False, False, False, False, True, False])
    counts = draws(Sample(repetition_penalty=2.0), seen=seen)
    changed = LOGITS.copy()
    changed[0], changed[6] = 1.0, -2.0
    assert abs(counts / DRAWS - softmax(changed)).max() < 0.02


def test_a_row_does_not_depend_on_other_rows():
    """The same row with the same key gives the same token in any batch."""
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(16, 50)).astype(np.float32)
    keys = jax.random.split(jax.random.key(1), 16)
    settings = settings_of(Sample(temperature=1.3, top_p=0.9, top_k=20))
    seen = np.zeros((16, 50), bool)
    together = choose(logits, seen, keys, settings)
    for i in (0, 5, 15):
        alone = choose(logits[i : i + 1], seen[:1], keys[i : i + 1], settings)
        assert alone[0] == together[i]


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("temperature", -1), ("temperature", math.nan), ("temperature", "hot"), ("top_k", 0),
        ("top_k", 2.5), ("top_p", 0), ("top_p", 1.1), ("min_p", -0.1), ("min_p", math.nan),
        ("repetition_penalty", 0), ("temperature", math.inf), ("top_k", True),
    ],
)  # fmt: skip
def test_settings_out_of_range(setting, value):
    with pytest.raises(ValueError, match=f"{setting}={value!r} must be a"):
        Sample(**{setting: value})


def kept_by(sampling, logits_BV):
    """Which tokens can be drawn, bool [B, V]."""
    return np.isfinite(jax.jit(warp_logits)(logits_BV, settings_of(sampling)))


def test_top_p_where_a_sum_meets_it_exactly():
    """Tokens whose sum reaches top_p exactly are enough: the next one is dropped."""
    even = jnp.zeros((1, 4))  # a quarter each, exactly
    for top_p, count in ((0.25, 1), (0.5, 2), (0.75, 3), (0.7501, 4), (0.2, 1), (1.0, 4)):
        assert kept_by(Sample(top_p=top_p), even).sum() == count, top_p
    halves = jnp.log(jnp.array([[0.125, 0.5, 0.125, 0.25]]))
    assert kept_by(Sample(top_p=0.75), halves).tolist() == [[False, True, False, True]]
    # top_k applies first: top_p counts only the tokens that it keeps.
    assert kept_by(Sample(top_k=2, top_p=0.6), halves).tolist() == [[False, True, False, False]]


def test_top_k_keeps_the_unlikely():
    """Even if the float32 sum of the more likely tokens has reached 1."""
    steep = jnp.arange(0, -60, -1.0)[None]
    assert kept_by(Sample(top_k=50), steep).sum() == 50
    close = jnp.array([[20.0, 1.0, np.nextafter(np.float32(1), np.float32(0)), 0.5]])
    assert kept_by(Sample(top_k=2), close).tolist() == [[True, True, False, False]]


def test_the_tokens_kept_are_those_of_transformers():
    """265 sets: normal logits and ones in bfloat16, of which many are equal."""
    torch = pytest.importorskip("torch", reason="needs torch and transformers")
    transformers = pytest.importorskip("transformers")
    warpers = transformers.generation.logits_process
    rng = np.random.default_rng(0)
    flat, steep = (rng.normal(size=(53, 3000)).astype(np.float32) * s for s in (3, 12))
    rounded = np.asarray(jnp.asarray(flat, jnp.bfloat16).astype(jnp.float32))
    for logits_BV, compute in (
        (steep, dict(top_k=1000)), (flat, dict(top_p=0.9)), (rounded, dict(top_k=50, top_p=0.95)),
        (rounded, dict(top_p=0.7)), (rounded, dict(top_k=300, min_p=0.01)),
    ):  # fmt: skip
        kinds = dict(
            top_k=warpers.TopKLogitsWarper,
            top_p=warpers.TopPLogitsWarper,
            min_p=warpers.MinPLogitsWarper,
        )
        theirs = torch.tensor(logits_BV)
        for name, value in compute.items():
            theirs = kinds[name](value)(None, theirs)
        # Among equal logits at the limit, the two may keep different tokens.
        mine = np.where(kept_by(Sample(**compute), logits_BV), logits_BV, -np.inf)
        np.testing.assert_array_equal(np.sort(mine), np.sort(theirs.numpy()), err_msg=str(compute))


def kept_by_sort(sampling, logits_V):
    """Kept ids of one row, from a sort in float64: all sets that rounding allows."""
    x = logits_V.astype(np.float64) + 0.0
    ids = np.lexsort((-np.arange(len(x)), -x))  # most likely first, then the largest id
    if sampling.top_k is not None and sampling.top_k < len(x):
        ids = ids[x[ids] >= x[ids[sampling.top_k - 1]]]
    with np.errstate(over="ignore"):
        p = softmax((x[ids] - x.max()) / np.float64(np.float32(sampling.temperature)))
    up_to = np.cumsum(p[::-1])[::-1]
    tail = np.float64(np.float32(1 - sampling.top_p)) if sampling.top_p else -1
    sizes = [max(np.sum(up_to > tail + error), 1) for error in (1e-6, 0, -1e-6)]
    return [set(ids[:n][np.isfinite(x[ids[:n]])]) for n in range(min(sizes), max(sizes) + 1)]


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_the_tokens_kept_are_those_of_a_sort(platform, monkeypatch):
    """714 sets of random, equal, infinite, tiny and steep logits; digits of 1 and of 4 bits."""
    monkeypatch.setattr("pallas_kernels.dispatch.platform", lambda: platform)
    rng = np.random.default_rng(0)
    normal = lambda scale: (rng.normal(size=(5, 301)) * scale).astype(np.float32)
    rows = [normal(3), normal(30), np.asarray(jnp.asarray(normal(9), jnp.bfloat16), np.float32)]
    rows += [np.where(normal(1) > 0, normal(3), -np.inf), np.abs(normal(2)) - 20, normal(1e-3)]
    rows += [np.where(normal(1) > 0.5, zero, -zero) for zero in np.float32([0.0, 1.0])]
    rows += [np.full((2, 301), -7.5, np.float32)]
    logits_BV = np.concatenate(rows)
    logits_BV[:, -1] = np.maximum(logits_BV[:, -1], -9)
    warp = jax.jit(lambda *args: warp_logits(*args))  # not shared between platforms
    samplings = [dict(top_k=k) for k in (1, 2, 50, 300, 301, 10**10)]
    samplings += [dict(top_p=p) for p in (1e-9, 0.1, 0.5, 0.9, 0.999, 1 - 1e-7, 1.0)]
    samplings += [dict(top_k=40, top_p=0.8), dict(temperature=1e-30, top_k=9, top_p=0.9)]
    samplings += [dict(temperature=0.3, top_p=0.7), dict(temperature=1e20, top_k=77, top_p=0.35)]
    for sampling in (Sample(**settings) for settings in samplings):
        kept_BV = np.isfinite(warp(logits_BV, settings_of(sampling)))
        for row, logits_V in zip(kept_BV, logits_BV, strict=True):
            if sampling.temperature == 1e-30:  # what is kept has overflowed to -inf
                logits_V = np.where(logits_V == logits_V.max(), logits_V, -np.inf)
            assert set(np.flatnonzero(row)) in kept_by_sort(sampling, logits_V), sampling


def test_nothing_is_sorted():
    """A sort of the vocabulary would cost more than a layer of a small model."""
    args = jnp.zeros((1, 1000)), settings_of(Sample(top_k=50, top_p=0.9))
    program = jax.jit(warp_logits).lower(*args).compile().as_text()
    assert " while(" in program
    assert not re.search(r" (sort|topk)\(|TopK", program)


def test_not_a_sampler():
    with pytest.raises(ValueError, match=r"must be Greedy\(\) or Sample"):
        settings_of(0.7)
