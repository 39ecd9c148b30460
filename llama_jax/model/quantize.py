"""Weight-only quantisation for generation: the matrices of the layers in 8 or 4 bits.

In: the weights of a model. Out: the same tree with each layer's matrix as a
:class:`QuantizedWeight`, which the model multiplies like any other. Embedding, norms and output
matrix stay as they are: they are few, and the loss feels them most.

int8 has one scale for each output (LLM.int8(), arXiv 2208.07339, without its outliers); int4 one
for each output and group of up to 64 inputs (as GPTQ, arXiv 2210.17323, without its error
feedback). Both are symmetric: round(w / scale), scale = largest times 1 / 127 or 1 / 7.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.convert.quantised import MOST, unpack
from llama_jax.convert.tensors import GROUP
from llama_jax.model.sharding import no_mesh, num_shards

KINDS = tuple(MOST)
MATRICES = ("attention", "mlp")
"""parts of a layer whose weights are all matrices"""


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["q", "scale"], meta_fields=["grouped"]
)
@dataclasses.dataclass(frozen=True)
class QuantizedWeight:
    """A matrix (in, out) as small integers times scales.

    ``q`` is [in, out] with a ``scale`` [1, out] in float32; or, ``grouped``, [groups, inputs of a
    group, out] with [groups, 1, out]. Layers may be stacked in front of both.
    """

    q: jax.Array
    scale: jax.Array
    grouped: bool

    def astype(self, dtype: jnp.dtype) -> jax.Array:
        """The weight of one layer, [in, out]; a product's compiler fuses this into its operand."""
        w = self.q.astype(dtype) * self.scale.astype(dtype)
        if not self.grouped:
            return w
        groups, _, out = jax.typeof(w).sharding.spec
        return _reshape(w, (-1, w.shape[-1]), (groups, out))


@functools.partial(jax.jit, static_argnames="kind")
def quantize_weight(w_IO: jax.Array, kind: str) -> QuantizedWeight:
    """One matrix (in, out)."""
    w = w_IO.astype(jnp.float32)
    dtype = jnp.int8
    if kind == "int4":
        dtype = jnp.int4
        inputs, out = jax.typeof(w).sharding.spec
        # The widest group that divides what a device has of the inputs.
        group = math.gcd(w.shape[0] // (1 if no_mesh() else num_shards(inputs)), GROUP)
        w = _reshape(w, (-1, group, w.shape[1]), (inputs, None, out))
    largest = jnp.max(jnp.abs(w), axis=-2, keepdims=True)
    # Products: XLA makes such of these divisions anyway, and conversion is to give the same bits.
    scale = jnp.where(largest == 0, 1, largest * (1 / MOST[kind]))
    return QuantizedWeight(jnp.round(w * (1 / scale)).astype(dtype), scale, kind == "int4")


def from_stored(
    q: np.ndarray, scale: np.ndarray, kind: str, inputs: int, devices: int
) -> tuple[np.ndarray, np.ndarray]:
    """``q`` (int8) and ``scale`` of a matrix of a quantised checkpoint, for so many devices along
    its ``inputs``.

    A group of int4 that would lie on two devices becomes two with the same scale.
    """
    if kind == "int8":
        return q, scale
    q = unpack(q, inputs)
    had = inputs // len(scale)
    group = math.gcd(inputs // devices, had)
    scale = np.repeat(scale, had // group, axis=0)[:, None]
    return q.reshape(-1, group, q.shape[1]), scale


def _reshape(w: jax.Array, shape: tuple[int, ...], spec: tuple) -> jax.Array:
    if no_mesh():
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
    one = functools.partial(quantize_weight, kind=kind)
    stack = jax.jit(functools.partial(jax.lax.map, one))
    blocks = dict(params["blocks"])
    for room in MATRICES:
        blocks[room] = dict(blocks[room])
        for name in list(blocks[room]):
            blocks[room][name] = stack(blocks[room].pop(name))
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


def bytes_of(params: Any) -> int:
    """Bytes that weights take as they are; two numbers of 4 bits take one."""
    bits = lambda x: 4 if x.dtype == jnp.int4 else 8 * x.dtype.itemsize
    return sum(x.size * bits(x) for x in jax.tree.leaves(params)) // 8


def is_quantized(x: Any) -> bool:
    """Whether ``x`` stands for a whole matrix."""
    return isinstance(x, QuantizedWeight)
