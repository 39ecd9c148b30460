"""Continue text with a model: prefill, then one token at a time through the cache.

In: weights, tokenizer, prompts. Out: the prompts continued.
"""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from llama_jax.checkpoint import load_weights, read_about
from llama_jax.config import ModelConfig
from llama_jax.model import Execution, KVCache, Llama
from llama_jax.step import merge, split, structure
from llama_jax.tokenizer import Tokenizer


def load(folder: str | Path) -> tuple[ModelConfig, dict[str, Any], Tokenizer]:
    """Model, float32 weights and tokenizer of a run or converted checkpoint.

    Raises:
      ConfigError: not a checkpoint, or a damaged one.
      ValueError: its tokenizer is missing or not a SentencePiece model.
    """
    cfg, _ = read_about(folder)
    how = Execution(jnp.dtype(jnp.float32))
    abstract = jax.eval_shape(lambda: split(Llama(cfg, how, nnx.Rngs(0)))[1])
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here)
    params = load_weights(folder, jax.tree.map(place, abstract))
    return cfg, params, Tokenizer.load(Path(folder))


def continue_text(
    cfg: ModelConfig,
    params: dict[str, Any],
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 100,
    temperature: float = 0.7,
    seed: int = 0,
) -> list[str]:
    """Each prompt and its sampled continuation, up to the end of the text or ``max_new_tokens``;
    on one device, float32.

    ``temperature`` 0 takes the likeliest token.
    """
    how = Execution(jnp.dtype(jnp.float32))
    step = jax.jit(functools.partial(_step, structure(cfg, how), temperature))
    texts = []
    for i, prompt in enumerate(prompts):
        ids = tokenizer.encode(prompt, bos=True)
        budget = min(max_new_tokens, cfg.context - len(ids))
        key = jax.random.fold_in(jax.random.key(seed), i)
        cache = KVCache.empty(cfg, 1, len(ids) + max(budget, 0), how.dtype)
        tokens = np.asarray([ids], np.int32)
        for n in range(budget):
            token, cache = step(params, tokens, cache, jax.random.fold_in(key, n))
            if int(token) == tokenizer.eos_id:
                break
            ids.append(int(token))
            tokens = np.asarray([[token]], np.int32)
        texts.append(tokenizer.decode(ids))
    return texts


def _step(graphdef, temperature, params, tokens_BT, cache, key):
    logits_BTV, cache = merge(graphdef, params)(tokens_BT, cache=cache)
    last_V = logits_BTV[0, -1]
    if temperature == 0:
        return jnp.argmax(last_V), cache
    return jax.random.categorical(key, last_V / temperature), cache
