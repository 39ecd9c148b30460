"""Adapters of LoRA: their arrays, and a model's parameters with adapters beside its matrices.

Adapters are a tree ``{"blocks": {"attention": {"q": {"a": [L, in, r], "b": [L, r, out]}}, ...}}``
in float32. See :class:`llama_jax.model.projection.LoraWeight` for their product.
"""

import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from llama_jax.config import LoraConfig, ModelConfig
from llama_jax.config.recipe import LORA_TARGETS
from llama_jax.model.compute import ComputeConfig
from llama_jax.model.layers import unstack
from llama_jax.model.params import FUSED, Params, abstract_params
from llama_jax.model.projection import LoraWeight
from llama_jax.model.sharding import no_mesh

LETTERS = dict(q="DQ", k="DE", v="DE", o="QD", gate="DF", up="DF", down="FD")
"""Axes of each matrix of a layer."""
TARGETS = tuple(("attention" if name in "qkvo" else "mlp", name) for name in LORA_TARGETS)
"""Module and name of each matrix of a layer."""


def scale_of(lora: LoraConfig) -> float:
    """The factor of the product a b."""
    return lora.alpha / (math.sqrt(lora.rank) if lora.rslora else lora.rank)


def num_adapter_params(cfg: ModelConfig, lora: LoraConfig) -> int:
    """Exact number of parameters of the adapters."""
    return cfg.num_layers * lora.rank * sum(sum(cfg.shape(LETTERS[t])) for t in lora.targets)


def init_adapters(
    cfg: ModelConfig, compute: ComputeConfig, lora: LoraConfig, key: jax.Array
) -> Params:
    """Adapters as PEFT initializes them: a uniform in +-1 / sqrt(in), b zero.

    Args:
      cfg: the model.
      compute: how it is computed; with a mesh, the adapters are sharded as their matrices are.
      lora: rank and targets.
      key: random key.
    """
    blocks: Params = {}
    weights = abstract_params(cfg, compute)["blocks"]
    for i, module, name in _targets(lora):
        w_LIO = weights[module][name]
        L, inputs, outputs = w_LIO.shape
        _, w_in, w_out = (None,) * 3 if no_mesh() else w_LIO.sharding.spec
        sharded = lambda *spec: None if no_mesh() else P(None, *spec)
        bound = 1 / math.sqrt(inputs)
        a_LIr = jax.random.uniform(
            jax.random.fold_in(key, i), (L, inputs, lora.rank), jnp.float32, -bound, bound,
            out_sharding=sharded(w_in, None),
        )  # fmt: skip
        b_LrO = jnp.zeros((L, lora.rank, outputs), jnp.float32, out_sharding=sharded(None, w_out))
        blocks.setdefault(module, {})[name] = {"a": a_LIr, "b": b_LrO}
    return {"blocks": blocks}


def abstract_adapters(cfg: ModelConfig, compute: ComputeConfig, lora: LoraConfig) -> Params:
    """Shapes, dtypes and, with a mesh, shardings of :func:`init_adapters`."""
    return jax.eval_shape(lambda: init_adapters(cfg, compute, lora, jax.random.key(0)))


def with_adapters(
    params: Params, adapters: Params, lora: LoraConfig, dropout_key: jax.Array | None = None
) -> Params:
    """Parameters whose targeted matrices are :class:`LoraWeight`.

    Args:
      params: of the base, stacked or with one dict per layer; its arrays are shared, and may be
        quantized.
      adapters: of :func:`init_adapters`; fused if the base is.
      lora: their settings.
      dropout_key: key of this step; default: no dropout, as in evaluation.
    """
    stacked = {module: dict(matrices) for module, matrices in adapters["blocks"].items()}
    if dropout_key is not None and lora.dropout:
        for i, module, name in _targets(lora):
            pair = stacked[module][name]
            keys_L = jax.random.split(jax.random.fold_in(dropout_key, i), len(pair["a"]))
            stacked[module][name] = pair | {"key": keys_L}

    def add(block: Params, of_block: Params) -> Params:
        weight = lambda w, x: LoraWeight(
            w, x["a"], x["b"], scale_of(lora), lora.dropout, x.get("key")
        )
        weights = {
            module: {name: weight(block[module][name], x) for name, x in matrices.items()}
            for module, matrices in of_block.items()
        }
        return block | {module: block[module] | new for module, new in weights.items()}

    blocks = params["blocks"]
    if 0 not in blocks:
        return {**params, "blocks": add(blocks, stacked)}
    layers = zip(blocks, unstack(stacked), strict=True)
    return {**params, "blocks": {i: add(blocks[i], of_layer) for i, of_layer in layers}}


def add_adapters(cfg: ModelConfig, params: Params, adapters: Params, lora: LoraConfig) -> Params:
    """:func:`with_adapters` for generation, where the layers may be fused.

    Args:
      cfg: the model.
      params: of the base, stacked or with one dict per layer; its arrays are shared.
      adapters: of :func:`init_adapters`.
      lora: their settings.
    """
    if 0 in params["blocks"] and no_mesh():
        adapters = {"blocks": fuse_adapters(cfg, adapters["blocks"])}
    return with_adapters(params, adapters, lora)


def fuse_adapters(cfg: ModelConfig, blocks: Params) -> Params:
    """Adapters of the matrices that :data:`FUSED` joins: the matrices a are concatenated, and the
    matrices b are the blocks of a block-diagonal matrix."""
    blocks = {module: dict(matrices) for module, matrices in blocks.items()}
    for module, widths in (("attention", cfg.shape("QEE")), ("mlp", cfg.shape("FF"))):
        fused, names = FUSED[module]
        every_a, every_b = [], []
        for i, name in enumerate(names):
            if pair := blocks.get(module, {}).pop(name, None):
                around = sum(widths[:i]), sum(widths[i + 1 :])
                every_a.append(pair["a"])
                every_b.append(jnp.pad(pair["b"], ((0, 0), (0, 0), around)))
        if every_a:
            a, b = jnp.concatenate(every_a, axis=2), jnp.concatenate(every_b, axis=1)
            blocks[module][fused] = {"a": a, "b": b}
    return blocks


def _targets(lora: LoraConfig) -> Iterator[tuple[int, str, str]]:
    """Number, module and name of each targeted matrix."""
    for i, (module, name) in enumerate(TARGETS):
        if name in lora.targets:
            yield i, module, name
