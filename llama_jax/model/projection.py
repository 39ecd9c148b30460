"""The product of activations and a weight, which may be quantized or have a LoRA adapter."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from llama_jax.model.compute import ComputeConfig
from llama_jax.model.quantize import QuantizedWeight, is_quantized, matmul
from llama_jax.model.sharding import gather, gather_float32_gradient, is_sharded, no_mesh, reshard


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["base", "a", "b", "dropout_key"],
    meta_fields=["scale", "dropout"],
)
@dataclasses.dataclass(frozen=True)
class LoraWeight:
    """A matrix with a low-rank update, base + scale * a b (LoRA, arXiv 2106.09685).

    The arrays may have a leading axis of layers. The update is never added to the matrix: the
    gradient of the sum would be as large as the matrix.

    Example:
      w = LoraWeight(base_IO, a_Ir, b_rO, scale=2.0)
      y_BTO = project(compute, x_BTI, w, "DF", "BTF")
    """

    base: Any
    """[in, out], an array or a :class:`QuantizedWeight`"""
    a: Any
    """[in, rank]"""
    b: Any
    """[rank, out]"""
    scale: float
    dropout: float = 0.0
    """probability that an input of ``a`` is zero, used with ``dropout_key``"""
    dropout_key: jax.Array | None = None
    """None: no dropout, as in evaluation"""

    def drop(self, x: jax.Array) -> jax.Array:
        """The inputs of ``a``."""
        if self.dropout_key is None or not self.dropout:
            return x
        keep = 1 - self.dropout
        sharding = None if no_mesh() else jax.typeof(x).sharding.spec
        kept = jax.random.bernoulli(self.dropout_key, keep, x.shape, out_sharding=sharding)
        return jnp.where(kept, x / keep, 0)


class GatheredWeight(NamedTuple):
    """A matrix that is gathered over ``fsdp`` already; from :func:`gather_once`."""

    w_IO: jax.Array


def is_matrix(x: Any) -> bool:
    """Whether ``x`` is a matrix that is not a plain array, for ``is_leaf``."""
    return isinstance(x, LoraWeight | QuantizedWeight)


def project(
    compute: ComputeConfig,
    x: jax.Array,
    w: Any,
    w_letters: str,
    out_letters: str,
    name: str = "",
    out_dtype: jnp.dtype | None = None,
) -> jax.Array:
    """Matrix product of activations [B, T, ...] and a weight [in, out], giving [B, T, out].

    Args:
      compute: dtype and sharding.
      x: activations.
      w: an array, a :class:`QuantizedWeight` or a :class:`LoraWeight`, in a variable or not; or the
        result of :func:`gather_once`.
      w_letters: axes of the weight, for the sharding rules.
      out_letters: axes of the result.
      name: of the result, for train.remat.
      out_dtype: of the result; default: the compute dtype.
    """
    w = w.get_value() if isinstance(w, nnx.Variable) else w
    out_dtype = out_dtype or compute.dtype
    out = compute.rules.activation(out_letters)
    product = functools.partial(_product, compute)
    if isinstance(w, LoraWeight):
        tokens = P(*out[:2])
        h_BTr = product(w.drop(x), w.a, f"{w_letters[0]}r", P(*tokens, None), jnp.float32)
        h_BTr = (w.scale * h_BTr).astype(compute.dtype)
        y = product(x, w.base, w_letters, out, out_dtype)
        y = y + product(h_BTr, w.b, f"r{w_letters[1]}", out, out_dtype, tokens)
    else:
        y = product(x, w, w_letters, out, out_dtype)
    return checkpoint_name(y, name) if name else y


def gather_once(compute: ComputeConfig, w: Any, w_letters: str) -> Any:
    """A weight for several calls of :func:`project`, gathered over ``fsdp`` once.

    The gradients of all products are added up in float32, and the sum is summed over devices once.

    Args:
      compute: dtype and sharding.
      w: an array or a quantized matrix, in a variable or not; the latter is returned as it is.
      w_letters: axes of the weight.
    """
    w = w.get_value() if isinstance(w, nnx.Variable) else w
    if no_mesh() or is_quantized(w) or not is_sharded("fsdp"):
        return w
    tokens = compute.rules.activation_without_tensor("BT")
    spec = _gathered_spec(compute, w_letters, tokens)
    return GatheredWeight(_gather(compute, w, spec, jnp.dtype("float32")))


def _gathered_spec(compute: ComputeConfig, w_letters: str, tokens) -> P:
    flat = not is_sharded(tokens[1])
    return compute.rules.weight_without_fsdp(w_letters, tokens[:1] if flat else tokens)


def _gather(compute: ComputeConfig, w_IO, gathered: P, out_dtype: jnp.dtype):
    if compute.reduce_float32:
        return gather_float32_gradient(w_IO, gathered, compute.dtype, out_dtype)
    return gather(w_IO.astype(compute.dtype), gathered).astype(out_dtype)


def _product(compute: ComputeConfig, x, w, w_letters: str, out: P, out_dtype, tokens=None):
    """The product with an array or a quantized matrix.

    ``out`` is the sharding of the result, ``tokens`` that of the positions of x. The weight is cast
    and then gathered over ``fsdp``. Where T is not sharded, B and T are flattened: matrix libraries
    are fastest for products of two matrices, also in the backward pass.
    """
    B, T = x.shape[:2]
    if no_mesh():
        w = w if is_quantized(w) else w.astype(compute.dtype)
        return matmul(x.reshape(B * T, -1), w, out_dtype).reshape(B, T, -1)
    tokens = tokens or compute.rules.activation_without_tensor("BT")
    flat = not is_sharded(tokens[1])
    gathered = _gathered_spec(compute, w_letters, tokens)
    w_in, w_out = gathered.partitions
    if isinstance(w, GatheredWeight):
        w = w.w_IO.astype(compute.dtype)
    elif is_quantized(w):
        w = w.reshard(w_in, w_out)
    else:
        w = _gather(compute, w, gathered, compute.dtype)
    # With the input axis sharded each device has a partial sum; reshard adds them up.
    partial = frozenset({w_in} if w_in else ())
    x = x.reshape(B, T, -1, out_sharding=P(*tokens, w_in))
    if flat:
        x = x.reshape(B * T, -1, out_sharding=P(tokens[0], w_in))
        y = matmul(x, w, out_dtype, P(tokens[0], w_out, unreduced=partial))
        y = y.reshape(B, T, -1, out_sharding=P(*tokens, w_out, unreduced=partial))
    else:
        y = matmul(x, w, out_dtype, P(*tokens, w_out, unreduced=partial))
    return reshard(y, out)
