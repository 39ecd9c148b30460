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

from llama_jax.model.sharding import no_mesh, num_shards

MAX_INTEGER = {"int8": 127, "int4": 7}
KINDS = tuple(MAX_INTEGER)
GROUP = 64
"""inputs that share a scale in int4, at most"""
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
    scale = scale_of(max_abs(w), kind)
    return QuantizedWeight(to_integers(w, scale, dtype), scale, kind == "int4")


# The arithmetic, for arrays of JAX and, in conversion, of NumPy, with the same bits.


def max_abs(w_IO: Any) -> Any:
    """Largest absolute weight over the inputs, [..., 1, out]."""
    xp = w_IO.__array_namespace__()
    return xp.max(xp.abs(w_IO), axis=-2, keepdims=True)


def scale_of(max_abs_O: Any, kind: str) -> Any:
    """The scale for weights of this largest magnitude; 1 for zeros."""
    xp = max_abs_O.__array_namespace__()
    # A product, here and below: XLA replaces such divisions by products, which rounds differently.
    return xp.where(max_abs_O == 0, 1, max_abs_O * (1 / MAX_INTEGER[kind]))


def to_integers(w_IO: Any, scale: Any, dtype: Any) -> Any:
    """round(w / scale), ties to even."""
    return w_IO.__array_namespace__().round(w_IO * (1 / scale)).astype(dtype)


def pack(q: np.ndarray) -> np.ndarray:
    """int8 [rows, out] of -8 to 7 as uint8 [rows / 2, out], rounded up.

    The even rows are in the low four bits.
    """
    if len(q) % 2:
        q = np.concatenate([q, np.zeros_like(q[:1])])
    q = q.view(np.uint8)
    return q[::2] & 15 | q[1::2] << 4


def unpack(packed: np.ndarray, rows: int) -> np.ndarray:
    """The inverse of :func:`pack`: int8 [rows, out]."""
    q = np.empty((2 * len(packed), packed.shape[1]), np.int8)
    q[::2] = packed.view(np.int8) << 4
    q[1::2] = packed.view(np.int8)
    return np.right_shift(q, 4, out=q)[:rows]  # signed: copies the fourth bit into those above


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
