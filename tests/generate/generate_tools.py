"""Helpers for the tests of generation."""

from llama_jax.generate.decode import DECODE_STEPS_PER_CALL
from llama_jax.generate.detokenize import OutputSequence
from llama_jax.generate.sampler import check_options


def resume(llm, ids, known, cache, **options):
    """Continue ids with a cache: (Generation, ids that the cache now holds, cache)."""
    checked = check_options(**options)
    llm._check_fits(ids)
    sequence = OutputSequence(llm.tokenizer, ids, checked.stops)
    steps = llm._resume(ids, known, cache, sequence, checked, DECODE_STEPS_PER_CALL)
    *_, state = steps
    made = sequence.result()
    return made, [*ids, *made.ids], state.cache
