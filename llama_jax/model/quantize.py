"""Weight-only quantization for generation: the layers' matrices in int8 or int4.

int8 has one scale per output (LLM.int8(), arXiv 2208.07339, without outliers); int4 one per output
and group of up to 64 inputs (as GPTQ, arXiv 2210.17323, without error feedback). Both are
symmetric: round(w / scale) with scale = max(abs(w)) / 127 or / 7. Embedding, norms and output
matrix are not quantized: they are small, and the loss is most sensitive to them. :func:`matmul`
multiplies with such matrices.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from llama_jax.model.sharding import no_mesh, num_shards

MAX_INTEGER = {"int8": 127, "int4": 7}
KINDS = tuple(MAX_INTEGER)
GROUP = 64
"""inputs that share a scale in int4, at most"""
MATRICES = ("attention", "mlp")
"""modules of a layer whose weights are all matrices"""


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["q", "scale"], meta_fields=["grouped"]
)
@dataclasses.dataclass(frozen=True)
class QuantizedWeight:
    """A matrix [in, out] as integers times scales, used like an array in products.

    ``q`` is [in, out] with a float32 ``scale`` [1, out]; if ``grouped``, ``q`` is [groups, inputs
    of a group, out] with a ``scale`` [groups, 1, out]. Both may have a leading axis of layers.

    Example:
      w = quantize_weight(w_IO, "int8")
      y = matmul(x, w, jnp.bfloat16)
    """

    q: jax.Array
    scale: jax.Array
    grouped: bool

    def astype(self, dtype: jnp.dtype) -> jax.Array:
        """The matrix of one layer, [in, out]. In products use :func:`matmul`: on a GPU, XLA would
        write this matrix to memory and read it again."""
        w = self.q.astype(dtype) * self.scale.astype(dtype)
        if not self.grouped:
            return w
        groups, _, out = jax.typeof(w).sharding.spec
        return _reshape(w, (-1, w.shape[-1]), (groups, out))

    def reshard(self, inputs: Any, out: Any) -> "QuantizedWeight":
        """The matrix of one layer, with inputs and outputs sharded over these mesh axes."""
        groups = (inputs, None) if self.grouped else (None,)
        rows = groups if self.grouped else (inputs,)
        q = jax.sharding.reshard(self.q, PartitionSpec(*rows, out))
        return dataclasses.replace(
            self, q=q, scale=jax.sharding.reshard(self.scale, PartitionSpec(*groups, out))
        )


class LayerWeights(NamedTuple):
    """A matrix of every layer, of which :func:`matmul` uses that of one layer without copying it.

    Example:
      y = matmul(x, LayerWeights((w0_IO, w1_IO), jnp.int32(1)), jnp.float32)
    """

    weights: tuple[Any, ...]
    """arrays, or quantized matrices"""
    layer: jax.Array
    """int32 scalar"""

    def astype(self, dtype: jnp.dtype) -> "LayerWeights":
        """The same matrices in another dtype, where they are not quantized."""
        cast = lambda w: w if is_quantized(w) else w.astype(dtype)
        return self._replace(weights=tuple(map(cast, self.weights)))


def matmul(
    x: jax.Array,
    w: "jax.Array | QuantizedWeight",
    out_dtype: jnp.dtype,
    out_sharding: PartitionSpec | None = None,
) -> jax.Array:
    """x [..., in] times a matrix [in, out], a plain or a quantized one.

    Scales per output are applied to the product, which is accumulated in float32: XLA reads the
    integers inside the product, and writes a scaled copy of the matrix on no chip.

    Args:
      x: activations, in the dtype of the computation.
      w: an array in x's dtype, or a quantized matrix.
      out_dtype: of the result.
      out_sharding: with a mesh, of the result; unreduced where the inputs are sharded.
    """
    if isinstance(w, LayerWeights):
        products = [functools.partial(matmul, w=w_IO, out_dtype=out_dtype) for w_IO in w.weights]
        return jax.lax.switch(w.layer, products, x)
    product = functools.partial(jnp.einsum, "...i,io->...o")
    if not is_quantized(w):
        return product(x, w, preferred_element_type=out_dtype, out_sharding=out_sharding)

    def local(x, w):
        if w.grouped:
            return product(x, w.astype(x.dtype), preferred_element_type=out_dtype)
        y = product(x, w.q.astype(x.dtype), preferred_element_type=jnp.float32)
        return (y * w.scale[0]).astype(out_dtype)

    if out_sharding is None:
        return local(x, w)
    spec = jax.tree.map(lambda array: jax.typeof(array).sharding.spec, (x, w))
    return jax.shard_map(local, in_specs=spec, out_specs=out_sharding, check_vma=False)(x, w)


@functools.partial(jax.jit, static_argnames="kind")
def quantize_weight(w_IO: jax.Array, kind: str) -> QuantizedWeight:
    """Quantizes one matrix [in, out] to ``kind``, "int8" or "int4"."""
    w = w_IO.astype(jnp.float32)
    dtype = jnp.int8
    if kind == "int4":
        dtype = jnp.int4
        inputs, out = jax.typeof(w).sharding.spec
        # The largest group that divides a device's share of the inputs.
        group = math.gcd(w.shape[0] // (1 if no_mesh() else num_shards(inputs)), GROUP)
        w = _reshape(w, (-1, group, w.shape[1]), (inputs, None, out))
    scale = scale_of(max_abs(w), kind)
    return QuantizedWeight(to_integers(w, scale, dtype), scale, kind == "int4")


# The arithmetic, for JAX and (in conversion) NumPy arrays, with bit-identical results.


def max_abs(w_IO: Any) -> Any:
    """Largest absolute weight over the inputs, [..., 1, out]."""
    xp = w_IO.__array_namespace__()
    return xp.max(xp.abs(w_IO), axis=-2, keepdims=True)


def scale_of(max_abs_O: Any, kind: str) -> Any:
    """The scale of weights with this maximal magnitude; 1 if all are zero."""
    xp = max_abs_O.__array_namespace__()
    # Multiplied, here and below: XLA replaces division by a constant, which rounds differently.
    return xp.where(max_abs_O == 0, 1, max_abs_O * (1 / MAX_INTEGER[kind]))


def to_integers(w_IO: Any, scale: Any, dtype: Any) -> Any:
    """round(w / scale), ties to even.

    Args:
      w_IO: weights, float32.
      scale: their scales, broadcast to them.
      dtype: of the result.
    """
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
    """The arrays of a :class:`QuantizedWeight` from those of a quantized checkpoint.

    A group of int4 that would be split over two devices becomes two groups with the same scale.

    Args:
      q: int8 [in, out]; for int4 packed, uint8 [in / 2, out].
      scale: float32 [1, out]; for int4 [groups, out].
      kind: "int8" or "int4".
      inputs: number of inputs.
      devices: number of shards along the inputs.

    Returns:
      ``q`` in int8, and ``scale``.
    """
    if kind == "int8":
        return q, scale
    q = unpack(q, inputs)
    stored = inputs // len(scale)
    group = math.gcd(inputs // devices, stored)
    scale = np.repeat(scale, stored // group, axis=0)[:, None]
    return q.reshape(-1, group, q.shape[1]), scale


def _reshape(w: jax.Array, shape: tuple[int, ...], spec: tuple) -> jax.Array:
    if no_mesh():
        return w.reshape(shape)
    return w.reshape(shape, out_sharding=PartitionSpec(*spec))


def quantize(params: dict[str, Any], kind: str) -> dict[str, Any]:
    """The parameters of a model with the layers' matrices quantized.

    Each matrix is quantized on its device, one layer at a time, and freed if the caller holds no
    other reference. For a small accelerator, pass parameters in host memory and move the result.

    Args:
      params: stacked parameters.
      kind: "int8" or "int4".

    Raises:
      ValueError: another kind.
    """
    if kind not in KINDS:
        raise ValueError(f"quantize={kind!r} must be 'int8' or 'int4'")
    one = functools.partial(quantize_weight, kind=kind)
    stack = jax.jit(functools.partial(jax.lax.map, one))
    blocks = dict(params["blocks"])
    for module in MATRICES:
        blocks[module] = dict(blocks[module])
        for name in list(blocks[module]):
            blocks[module][name] = stack(blocks[module].pop(name))
    return {**params, "blocks": blocks}


def weight_bytes(abstract_params: Any, kind: str) -> int:
    """Bytes of a model's parameters, given as arrays or shapes, in another number format.

    Args:
      abstract_params: stacked parameters, not quantized.
      kind: "float32", "bfloat16", "int8" or "int4"; with the last two, weights that are not
        quantized are bfloat16.
    """
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
    """Bytes of an array tree; two int4 numbers take one byte."""
    bits = lambda x: 4 if x.dtype == jnp.int4 else 8 * x.dtype.itemsize
    return sum(x.size * bits(x) for x in jax.tree.leaves(params)) // 8


def is_quantized(x: Any) -> bool:
    """Whether ``x`` is a quantized matrix, for ``is_leaf``."""
    return isinstance(x, QuantizedWeight)
