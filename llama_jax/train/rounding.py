"""Weights and moments that are stored in bfloat16: computed in float32 and rounded stochastically.

A small update is lost if its sum with a weight is rounded to the nearest bfloat16 number. Rounding
up or down at random, with probabilities that make the mean exact, keeps it on average.
"""

from typing import Any

import jax
import jax.numpy as jnp

from llama_jax.model.sharding import no_mesh


def to_float32(tree: Any) -> Any:
    """The tree with its bfloat16 arrays in float32, which is exact."""
    cast = lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x
    return jax.tree.map(cast, tree)


def round_like(key: jax.Array, tree: Any, like: Any) -> Any:
    """The tree in the dtypes of another one: float32 arrays are rounded where those are bfloat16.

    The random bits depend on the key, the position of the array in the tree and the index of the
    element, and so are the same on any mesh.

    Args:
      key: random key; one for each call.
      tree: arrays.
      like: arrays of the same shapes.
    """
    leaves, treedef = jax.tree.flatten(tree)
    rounded = [
        x if x.dtype == y.dtype else stochastic_round(jax.random.fold_in(key, i), x)
        for i, (x, y) in enumerate(zip(leaves, jax.tree.leaves(like), strict=True))
    ]
    return jax.tree.unflatten(treedef, rounded)


def stochastic_round(key: jax.Array, x: jax.Array) -> jax.Array:
    """Float32 to one of the two nearest bfloat16 numbers, whose mean over keys is ``x``.

    Bfloat16 is the upper half of float32: a random lower half is added, and a carry rounds away
    from zero. Bfloat16 numbers and infinities stay as they are, and NaN is NaN.
    """
    sharding = None if no_mesh() else jax.typeof(x).sharding
    low = jax.random.bits(key, x.shape, jnp.uint16, out_sharding=sharding)
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32) + low.astype(jnp.uint32)
    upper = (bits >> 16).astype(jnp.uint16)
    rounded = jax.lax.bitcast_convert_type(upper, jnp.bfloat16)
    return jnp.where(jnp.isnan(x), x.astype(jnp.bfloat16), rounded)
