"""Random adapters for tests, and weights with adapters merged into them."""

import jax
import jax.numpy as jnp
import numpy as np
from model_tools import F32

from llama_jax.model.lora import init_adapters, scale_of


def random_adapters(cfg, lora, seed=0):
    """Adapters whose update is about as large as the weights."""
    adapters = init_adapters(cfg, F32, lora, jax.random.key(seed))
    rng = np.random.default_rng(seed)
    noise = lambda x: np.asarray(x) + 0.3 * rng.standard_normal(x.shape).astype(np.float32)
    return jax.tree.map(noise, adapters)


def merged(params, adapters, lora):
    """The weights plus the scaled products of the adapters."""
    blocks = {k: dict(v) if isinstance(v, dict) else v for k, v in params["blocks"].items()}
    for module, matrices in adapters["blocks"].items():
        for name, x in matrices.items():
            blocks[module][name] += scale_of(lora) * jnp.einsum("Lir,Lro->Lio", x["a"], x["b"])
    return {**params, "blocks": blocks}
