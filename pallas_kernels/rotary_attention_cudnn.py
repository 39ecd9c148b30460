"""Rotary attention by cuDNN: XLA rotates queries and keys, then cuDNN's FlashAttention runs.

Packed documents are passed to cuDNN as lengths and offsets, so blocks between documents are
skipped; with a dense mask they would be computed. The maximal number of documents must be known at
compile time. A batch with more documents, or with documents that are not contiguous, is computed by
the Pallas kernel; the choice is made on the device for each batch.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import dispatch
from pallas_kernels.rotary_attention import rotate
from pallas_kernels.rotary_attention_gpu import gpu


def cudnn(q, k, v, positions, kv_positions, rope, segments, kv_segments, q_offset, causal, scale):
    """`rotary_attention` by cuDNN, with positional arguments."""
    _check_supported(q, segments, kv_segments, q_offset, causal)
    attend = functools.partial(_packed if segments is not None else _plain, causal, scale)
    rotated = rotate(q, positions, rope), rotate(k, kv_positions, rope), v
    if segments is None:
        return attend(*rotated)
    starts, lengths, exact = documents(segments, max_documents=max(2, min(64, q.shape[1] // 128)))
    by_pallas = lambda _: gpu(
        q, k, v, positions, kv_positions, rope, segments, segments, q_offset, causal, scale
    )
    return lax.cond(exact, lambda rotated: attend(*rotated, starts, lengths), by_pallas, rotated)


def documents(segments_BT, max_documents: int):
    """Starts and lengths of documents (runs of equal ids) in the form that cuDNN expects.

    Args:
      segments_BT: segment ids; padding is a document too.
      max_documents: M, the maximal number of documents per row.

    Returns:
      starts [B, M + 1] and lengths [B, M], int32, -1 where a row has fewer documents; and a boolean
      scalar, whether they are exact: no row has more than M documents, or two with the same id.
    """
    T = segments_BT.shape[1]
    first_BT = jnp.diff(segments_BT, axis=1, prepend=segments_BT[:, :1] - 1) != 0
    starts_of = functools.partial(jnp.nonzero, size=max_documents + 1, fill_value=T)
    starts = jax.vmap(lambda first: starts_of(first)[0])(first_BT).astype(jnp.int32)
    valid = starts < T
    ids = jnp.take_along_axis(segments_BT, jnp.minimum(starts, T - 1), axis=1)
    same = (ids[:, :, None] == ids[:, None, :]) & valid[:, :, None] & valid[:, None, :]
    exact = ~valid[:, max_documents:].any() & ~jnp.triu(same, 1).any()
    lengths = jnp.where(valid[:, :-1], jnp.diff(starts, axis=1), -1)
    return jnp.where(valid, starts, -1), lengths, exact


def _check_supported(q, segments, kv_segments, q_offset, causal) -> None:
    if dispatch.platform() not in ("gpu", "cuda"):
        raise NotImplementedError(
            f"cuDNN runs on NVIDIA GPUs, not on {dispatch.platform()}; use 'xla'"
        )
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        raise NotImplementedError(f"cuDNN supports bfloat16 and float16, not {q.dtype}")
    if causal and not (isinstance(q_offset, int) and q_offset == 0):
        raise NotImplementedError("cuDNN's causal mask starts at key 0; q_offset must be 0")
    if segments is not kv_segments:
        raise NotImplementedError(
            "cuDNN supports the same documents for queries and keys only: "
            "leave kv_segment_ids_BS out"
        )
    try:
        _fused().check_cudnn_version()
    except RuntimeError as e:
        raise NotImplementedError(f"cuDNN is not installed: {e}") from e


def _fused():
    # jax.nn.dot_product_attention does not pass offsets on.
    from jax._src.cudnn import fused_attention_stablehlo

    return fused_attention_stablehlo


def _plain(causal, scale, q, k, v):
    return jax.nn.dot_product_attention(
        q, k, v, scale=scale, is_causal=causal, implementation="cudnn"
    )


def _packed(causal, scale, q, k, v, starts, lengths):
    fused = _fused()
    if jax.__version_info__ < (0, 12):
        # jax 0.10 computes the keys' offsets from the number of query heads: wrong if N > K.
        k, v = (jnp.repeat(x, q.shape[2] // k.shape[2], axis=2) for x in (k, v))
    mask = fused.MaskType.PADDING_CAUSAL if causal else fused.MaskType.PADDING
    return fused.dot_product_attention(
        q, k, v, q_seqlen=lengths, kv_seqlen=lengths, q_offsets=starts, kv_offsets=starts,
        scale=scale, mask_type=mask,
    )  # fmt: skip
