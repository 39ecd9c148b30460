"""The settings of a request become one row of the sampler's arrays."""

import numpy as np
import pytest

from llama_jax.generate.sampler import Sample, settings_of
from llama_jax.serve.request import Sampling
from llama_jax.serve.sampling import MAX_BIAS, row_of


def test_a_row():
    sample = Sample(temperature=0.5, top_k=7, top_p=0.75, min_p=0.1, repetition_penalty=1.5)
    request = Sampling(sample, 0.25, -1.5, logit_bias=((4, 2.5), (9, -100)))
    settings, adjustments = row_of(request, vocab_size=10)
    assert settings == settings_of(sample)
    assert (adjustments.presence_penalty, adjustments.frequency_penalty) == (0.25, -1.5)
    assert adjustments.bias_ids[:3].tolist() == [4, 9, 0]
    assert adjustments.bias[:3].tolist() == [2.5, -100, 0]
    shapes = [(x.shape, x.dtype) for x in (*settings, *adjustments)]
    assert shapes == [(x.shape, x.dtype) for row in row_of(Sampling(), 10) for x in row]
    assert not np.any(row_of(Sampling(), 10)[1].bias)


def test_a_bad_logit_bias():
    many = tuple((i, 1.0) for i in range(MAX_BIAS + 1))
    with pytest.raises(ValueError, match="has 301 tokens; at most 300"):
        row_of(Sampling(logit_bias=many), 1000)
    row_of(Sampling(logit_bias=many[:-1]), 1000)
    for token in (-1, 10, 2**40, True, "4"):
        with pytest.raises(ValueError, match="is not a token id, 0 to 9"):
            row_of(Sampling(logit_bias=((token, 1.0),)), 10)
