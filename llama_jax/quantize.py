"""Weight-only quantisation for generation: the matrices of the layers in 8 or 4 bits.

In: the weights of a model. Out: the same tree with each layer's matrix as a
:class:`QuantizedWeight`, which the model multiplies like any other. Embedding, norms and output
matrix stay as they are: they are few, and the loss feels them most.

int8 has one scale for each output (LLM.int8(), arXiv 2208.07339, without its outliers); int4 one
for each output and group of up to 64 inputs (as GPTQ, arXiv 2210.17323, without its error
feedback). Both are symmetric: round(w / scale), scale = largest / 127 or 7.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

KINDS = ("int8", "int4")
GROUP = 64
"""Inputs that share a scale in int4: the widest that every head dimension of LLaMA is a multiple
of, so that no group crosses a head and none is cut by tensor parallelism."""

# The stacked matrices of a layer, and how many of their axes (after L) are summed over.
_INPUT_AXES: Mapping[str, Mapping[str, int]] = {
    "attention": {"q": 1, "k": 1, "v": 1, "o": 2},
    "mlp": {"gate": 1, "up": 1, "down": 1},
}


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["q", "scale"], meta_fields=["groups"]
)
@dataclasses.dataclass(frozen=True)
class QuantizedWeight:
    """A matrix (in, out) as small integers times scales.

    ``scale`` (float32) has 1 on the axes that share it. In int4 the last input axis is split in
    (groups, inputs of a group), in ``q`` and in ``scale``.
    """

    q: jax.Array
    scale: jax.Array
    groups: int | None
    """axis of the groups, counted from the last; None: one scale for all inputs"""

    def astype(self, dtype: jnp.dtype) -> jax.Array:
        """The weight, in its own shape; a product's compiler fuses this into its operand."""
        w = self.q.astype(dtype) * self.scale.astype(dtype)
        if self.groups is None:
            return w
        i = w.ndim + self.groups
        spec = jax.typeof(w).sharding.spec
        return _reshape(
            w, (*w.shape[:i], w.shape[i] * w.shape[i + 1], *w.shape[i + 2 :]),
            (*spec[: i + 1], *spec[i + 2 :]),
        )  # fmt: skip


@functools.partial(jax.jit, static_argnames=("inputs", "kind"))
def quantize_weight(w: jax.Array, inputs: int, kind: str) -> QuantizedWeight:
    """One matrix; its first ``inputs`` axes are summed over in a product."""
    w = w.astype(jnp.float32)
    most, dtype, shared, groups = 127, jnp.int8, tuple(range(inputs)), None
    if kind == "int4":
        most, dtype, shared, groups = 7, jnp.int4, (inputs,), inputs - 2 - w.ndim
        # A width that 64 does not divide (small models) gets the widest groups that fit it.
        size, spec = w.shape[inputs - 1], jax.typeof(w).sharding.spec
        group = math.gcd(size, GROUP)
        w = _reshape(
            w, (*w.shape[: inputs - 1], size // group, group, *w.shape[inputs:]),
            (*spec[:inputs], None, *spec[inputs:]),
        )  # fmt: skip
    largest = jnp.max(jnp.abs(w), axis=shared, keepdims=True)
    scale = jnp.where(largest == 0, 1, largest / most)
    return QuantizedWeight(jnp.round(w / scale).astype(dtype), scale, groups)


def _reshape(w: jax.Array, shape: tuple[int, ...], spec: tuple) -> jax.Array:
    if not any(spec):
        return w.reshape(shape)
    return w.reshape(shape, out_sharding=jax.sharding.PartitionSpec(*spec))


def quantize(params: dict[str, Any], kind: str) -> dict[str, Any]:
    """The weights of a model with the layers' matrices in 8 or 4 bits.

    Each matrix is quantised where it lies, one layer at a time, and let go if the caller holds no
    other reference: to fit a small accelerator, give weights in host memory and move the result.

    Raises:
      ValueError: no such kind.
    """
    if kind not in KINDS:
        raise ValueError(f"quantize={kind!r}: there are 'int8' and 'int4'")
    blocks = dict(params["blocks"])
    for room, matrices in _INPUT_AXES.items():
        blocks[room] = dict(blocks[room])
        for name, inputs in matrices.items():
            layers = blocks[room].pop(name)
            one = functools.partial(quantize_weight, inputs=inputs, kind=kind)
            blocks[room][name] = jax.jit(functools.partial(jax.lax.map, one))(layers)
    return {**params, "blocks": blocks}


def weight_bytes(abstract_params: Any, kind: str) -> int:
    """Bytes of a model's weights (arrays or shapes of them) as "float32", "bfloat16", "int8" or
    "int4"; in the last two, what is not quantised is bfloat16."""
    if kind in KINDS:
        abstract_params = jax.eval_shape(lambda p: quantize(p, kind), abstract_params)
    floating = jnp.dtype("float32" if kind == "float32" else "bfloat16")
    bits = 0
    for x in jax.tree.leaves(abstract_params, is_leaf=is_quantized):
        if is_quantized(x):
            bits += x.q.size * (8 if kind == "int8" else 4) + x.scale.size * 32
        else:
            bits += x.size * floating.itemsize * 8
    return bits // 8


def is_quantized(x: Any) -> bool:
    """Whether ``x`` stands for a whole matrix."""
    return isinstance(x, QuantizedWeight)
