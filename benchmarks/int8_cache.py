"""Perplexity and logits with a cache of keys and values in int8 against an exact one.

    python -m benchmarks.int8_cache FOLDER  # a run, or weights in the layout of Hugging Face

The text is sampled from the model itself, and each token is predicted over the cache.
"""

import argparse
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import llama_jax
from benchmarks.common import environment, write
from llama_jax.model.cache import KVCache, bytes_per_position
from llama_jax.model.params import merge

ROWS, TOKENS = 16, 256


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    llm = llama_jax.load(parser.parse_args().folder, dtype="float32")
    start = [llm.tokenizer.bos_id]
    sampling = llama_jax.Sample(temperature=1.0)
    options = dict(max_new_tokens=TOKENS, sampling=sampling, logprobs=True)
    texts = [list(g.ids) for g in llm.generate([start] * ROWS, **options)]
    length = min(map(len, texts))
    tokens_BT = np.array([[*start, *ids[:length]] for ids in texts], np.int32)

    @jax.jit
    def logits(params, cache):
        return merge(llm._engine._graphdef, params)(tokens_BT[:, :-1], cache=cache)[0]

    result, exact = {}, None
    for dtype in (jnp.float32, jnp.int8):
        cache = KVCache.empty(llm.cfg, ROWS, length, dtype)
        logits_BTV = np.asarray(logits(llm.params, cache))
        exact = logits_BTV if exact is None else exact
        nats = -np.asarray(jax.nn.log_softmax(logits_BTV))[
            np.arange(ROWS)[:, None], np.arange(length), tokens_BT[:, 1:]
        ].mean()
        name = jnp.dtype(dtype).name
        result[name] = {
            "perplexity": math.exp(nats),
            "logit_error": float(np.linalg.norm(logits_BTV - exact) / np.linalg.norm(exact)),
            "same_best_token": float(np.mean(logits_BTV.argmax(-1) == exact.argmax(-1))),
            "bytes_per_position": bytes_per_position(llm.cfg, dtype),
        }
        print(name, result[name])
    question = "perplexity over a cache of keys and values in float32 and int8"
    model = f"{llm.cfg.num_layers} layers, D {llm.cfg.dim}, head_dim {llm.cfg.head_dim}"
    write("int8_cache", {"question": question, "model": model, "tokens": ROWS * length, **result,
                         **environment()})  # fmt: skip


if __name__ == "__main__":
    main()
