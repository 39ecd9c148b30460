"""Single layers of a model: split from the stacked ones, or chosen by index in a compiled loop."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from llama_jax.model.quantize import LayerWeights, is_quantized


def one_block(blocks: list[Any]) -> Callable[[jax.Array], Any]:
    """A function from the index of a layer, an array, to its block; for a loop that compiles one.

    The block's matrices are :class:`LayerWeights`: slices of a stack would be copied.
    """
    is_variable = lambda x: isinstance(x, nnx.Variable)
    graphdefs, states = zip(*map(nnx.split, blocks), strict=True)
    variables = zip(*(jax.tree.leaves(s, is_leaf=is_variable) for s in states), strict=True)
    norms_stacked = lambda x: jnp.stack(x) if getattr(x[0], "ndim", 2) == 1 else x
    values = [(v[0], norms_stacked(tuple(x.get_value() for x in v))) for v in variables]
    tree = jax.tree.structure(states[0], is_leaf=is_variable)

    def block_of(layer: jax.Array) -> Any:
        matrix = lambda *layers: LayerWeights(layers, layer)
        choose = lambda x: jax.tree.map(matrix, *x, is_leaf=is_quantized)
        chosen = [v.replace(choose(x) if isinstance(x, tuple) else x[layer]) for v, x in values]
        return nnx.merge(graphdefs[0], jax.tree.unflatten(tree, chosen))

    return block_of


def unstack(tree_L: Any) -> list[Any]:
    """Splits a tree of arrays that are stacked along L into one tree per layer."""
    leaves, treedef = jax.tree.flatten(tree_L)
    # The gradient of lax.split is one concatenation; that of indexing is L sums of padded arrays.
    split = [jax.lax.split(w, [1] * w.shape[0]) for w in leaves]
    layers = zip(*split, strict=True)
    return [jax.tree.unflatten(treedef, [x.squeeze(0) for x in layer]) for layer in layers]
