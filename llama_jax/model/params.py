"""Parameters as a nested dict of arrays, and the model that such a dict belongs to.

Checkpoints, conversion and compiled steps hold parameters as a dict; :func:`merge` makes the
:class:`Llama` of them. For decoding, layers are unstacked and their projections fused.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from llama_jax.config import ModelConfig
from llama_jax.model.llama import ComputeConfig, Llama
from llama_jax.model.projection import is_matrix
from llama_jax.model.sharding import no_mesh

Params = dict[str, Any]

FUSED = {"attention": ("qkv", ("q", "k", "v")), "mlp": ("gate_up", ("gate", "up"))}
"""Projections of one input that unstacked layers fuse into one matrix: fewer and wider products.
Only without a mesh: the columns of one device would mix those of the separate projections."""


def params_of(llama: Llama) -> Params:
    """The parameters of a model as a nested dict."""
    return nnx.to_pure_dict(nnx.state(llama))


def abstract_params(cfg: ModelConfig, compute: ComputeConfig) -> Params:
    """Shapes, dtypes and, with a mesh, shardings of the float32 parameters of a model."""
    return jax.eval_shape(lambda: params_of(Llama(cfg, compute, nnx.Rngs(0))))


def structure(cfg: ModelConfig, compute: ComputeConfig, unstacked: bool = False) -> Any:
    """Everything of a model but its arrays, the first argument of :func:`merge`.

    Args:
      cfg: the model.
      compute: how it is computed.
      unstacked: for parameters that :func:`unstack_layers` has unstacked.
    """

    def build() -> Llama:
        llama = Llama(cfg, compute, nnx.Rngs(0))
        if unstacked:
            blocks = llama.layers()
            for block in blocks if no_mesh() else ():
                for part, (fused, names) in FUSED.items():
                    module = getattr(block, part)
                    setattr(module, fused, getattr(module, names[0]))  # merge sets its value
                    for name in names:
                        delattr(module, name)
            llama.blocks = nnx.List(blocks)
        return llama

    graphdef, state = nnx.split(nnx.eval_shape(build))
    # The leaves are nnx.Variables, whose value may be an array, a QuantizedWeight or a LoraWeight.
    return graphdef, *jax.tree.flatten(state, is_leaf=lambda x: isinstance(x, nnx.Variable))


def merge(structure: Any, params: Params) -> Llama:
    """The model of this structure with these parameters."""
    graphdef, variables, tree = structure
    values = jax.tree.leaves(params, is_leaf=is_matrix)
    filled = [v.replace(x) for v, x in zip(variables, values, strict=True)]
    return nnx.merge(graphdef, jax.tree.unflatten(tree, filled))


def unstack_layers(params: Params) -> Params:
    """Parameters with one dict per layer instead of arrays stacked along L.

    For decoding on CPU and GPU, where slicing layers inside the jitted loop makes XLA copy every
    weight on each call. The arrays are removed from ``params["blocks"]`` one by one, so peak memory
    stays near one copy of the weights.
    """

    def unstack_arrays(tree: Params) -> Params:
        out = {}
        for name in list(tree):
            x = tree.pop(name)
            # One small program for all layers: one that returns all of them compiles for seconds.
            out[name] = (
                unstack_arrays(x)
                if isinstance(x, dict)
                else [_layer(x, np.int32(i)) for i in range(jax.tree.leaves(x)[0].shape[0])]
            )
        return out

    lists = unstack_arrays(params["blocks"])
    is_list = lambda x: isinstance(x, list)
    layers = {}
    for i in range(len(lists["mlp_norm"])):
        layers[i] = fuse_projections(jax.tree.map(lambda x: x.pop(0), lists, is_leaf=is_list))
    return {**params, "blocks": layers}


def fuse_projections(layer: Params) -> Params:
    """The parameters of one layer, fused in place as :data:`FUSED` says if no mesh is set."""
    for part, (fused, names) in FUSED.items() if no_mesh() else ():
        if part in layer:
            layer[part][fused] = _concatenate(*(layer[part].pop(name) for name in names))
    return layer


@jax.jit
def _layer(stack: Any, i: jax.Array) -> Any:
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False), stack)


@jax.jit
def _concatenate(*matrices: Any) -> Any:
    return jax.tree.map(lambda *w: jnp.concatenate(w, axis=-1), *matrices)
