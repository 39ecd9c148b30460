"""Weight-only quantization for generation: the layers' matrices in int8 or int4.

int8 has one scale per output (LLM.int8(), arXiv 2208.07339, without outliers); int4 one per output
and group of up to 64 inputs (as GPTQ, arXiv 2210.17323, without error feedback), with two integers
in a byte. Both are symmetric: round(w / scale) with scale = max(abs(w)) / 127 or / 7. Embedding,
norms and output matrix are not quantized: they are small, and the loss is most sensitive to them.
:func:`matmul` multiplies with such matrices.
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
from pallas_kernels.quantized_matmul import dequantize, quantized_matmul

MAX_INTEGER = {"int8": 127, "int4": 7}
KINDS = tuple(MAX_INTEGER)
GROUP = 64
"""inputs that share a scale in int4, at most"""
MATRICES = ("attention", "mlp")
"""modules of a layer whose weights are all matrices"""


@functools.partial(jax.tree_util.register_dataclass, data_fields=["q", "scale"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class QuantizedWeight:
    """A matrix [in, out] as integers times float32 scales, for :func:`matmul`.

    Both arrays may have a leading axis of layers. Any group size can be stored, such as the 32
    inputs of llama.cpp's blocks.

    Example:
      w = quantize_weight(w_IO, "int8")
      y = matmul(x, w, jnp.bfloat16)
    """

    q: jax.Array
    """int8 [in, out]; or uint8 [in / 2, out], two 4-bit integers per byte as :func:`pack` says"""
    scale: jax.Array
    """[groups, out], for groups of consecutive inputs; one group: one scale per output"""

    @property
    def bits(self) -> int:
        """Bits of an integer, 4 or 8."""
        return 4 if self.q.dtype == jnp.uint8 else 8

    @property
    def group(self) -> int:
        """Inputs that share a scale."""
        return self.q.shape[-2] * (8 // self.bits) // self.scale.shape[-2]

    @property
    def needs_kernel(self) -> bool:
        """Whether XLA alone would write a copy of the matrix in another dtype to memory."""
        return self.bits == 4 or self.scale.shape[-2] > 1

    def astype(self, dtype: jnp.dtype) -> jax.Array:
        """The matrix of one layer, [in, out]. In products use :func:`matmul`: on a GPU, XLA would
        write this matrix to memory and read it again."""
        local = functools.partial(dequantize, dtype=dtype)
        if no_mesh():
            return local(self.q, self.scale)
        specs = _specs((self.q, self.scale))
        return jax.shard_map(local, in_specs=specs, out_specs=specs[0])(self.q, self.scale)

    def reshard(self, inputs: Any, out: Any) -> "QuantizedWeight":
        """The matrix of one layer, with inputs and outputs sharded over these mesh axes."""
        groups = inputs if len(self.scale) > 1 else None
        q = jax.sharding.reshard(self.q, PartitionSpec(inputs, out))
        return QuantizedWeight(q, jax.sharding.reshard(self.scale, PartitionSpec(groups, out)))


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
    w: jax.Array | QuantizedWeight,
    out_dtype: jnp.dtype,
    out_sharding: PartitionSpec | None = None,
) -> jax.Array:
    """x [..., in] times a matrix [in, out], a plain or a quantized one.

    A quantized matrix is read in its 4 or 8 bits: integers with one scale per output by XLA, which
    applies the scales to the product; others by a kernel, see
    :func:`pallas_kernels.quantized_matmul`. Sums are float32. The gradient is with respect to x.

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
        if not w.needs_kernel:
            y = product(x, w.q.astype(x.dtype), preferred_element_type=jnp.float32)
            return (y * w.scale[0]).astype(out_dtype)
        rows = x.reshape(-1, x.shape[-1])
        y = quantized_matmul(rows, w.q, w.scale, out_dtype=out_dtype)
        return y.reshape(*x.shape[:-1], -1)

    if out_sharding is None:
        return local(x, w)
    # Kernels do not declare over which mesh axes their results vary.
    return jax.shard_map(local, in_specs=_specs((x, w)), out_specs=out_sharding, check_vma=False)(
        x, w
    )


@functools.partial(jax.jit, static_argnames="kind")
def quantize_weight(w_IO: jax.Array, kind: str) -> QuantizedWeight:
    """Quantizes one matrix [in, out] to ``kind``, "int8" or "int4"."""
    w = w_IO.astype(jnp.float32)
    if kind == "int8":
        scale = scale_of(max_abs(w), kind)
        return QuantizedWeight(to_integers(w, scale, jnp.int8), scale)
    spec = PartitionSpec(None, None) if no_mesh() else jax.typeof(w).sharding.spec
    # The largest group that divides a device's share of the inputs.
    group = math.gcd(w.shape[0] // num_shards(spec[0]), GROUP)
    w = _reshape(w, (-1, group, w.shape[1]), (spec[0], None, spec[1]))
    scale = scale_of(max_abs(w), kind)
    q = to_integers(w, scale, jnp.int8)
    if group % 2 == 0:  # else a byte would hold integers of two groups
        low_and_high = _reshape(q, (-1, 2, q.shape[2]), (spec[0], None, spec[1]))
        q = jax.lax.bitcast_convert_type(low_and_high, jnp.uint8)
        q = q[:, 0] & 15 | q[:, 1] << 4
    return QuantizedWeight(_reshape(q, (-1, q.shape[-1]), spec), scale[:, 0])


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
    """
    if kind == "int8":
        return q, scale
    stored = inputs // len(scale)
    group = math.gcd(inputs // devices, stored)
    scale = np.repeat(scale, stored // group, axis=0)
    return unpack(q, inputs) if group % 2 else q, scale


def _specs(arrays: Any) -> Any:
    return jax.tree.map(lambda x: jax.typeof(x).sharding.spec, arrays)


def _reshape(w: jax.Array, shape: tuple[int, ...], spec: Any) -> jax.Array:
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
    total = 0
    for x in jax.tree.leaves(abstract_params, is_leaf=is_quantized):
        total += bytes_of(x) if is_quantized(x) else x.size * floating.itemsize
    return total


def bytes_of(params: Any) -> int:
    """Bytes of an array tree."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(params))


def is_quantized(x: Any) -> bool:
    """Whether ``x`` is a quantized matrix, for ``is_leaf``."""
    return isinstance(x, QuantizedWeight)
