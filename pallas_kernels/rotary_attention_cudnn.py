"""Rotary attention by cuDNN: XLA turns queries and keys, cuDNN's FlashAttention does the rest.

Documents packed into a row go to cuDNN as lengths and offsets, so that nothing is computed between
them; a dense mask would be computed in full. cuDNN wants the number of documents bounded when the
program is compiled. A batch with more of them, or with one that does not lie together, is computed
by the Pallas kernel: which of the two runs is decided on the device, batch by batch.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import dispatch
from pallas_kernels.rotary_attention import rotate
from pallas_kernels.rotary_attention_gpu import gpu


def cudnn(q, k, v, positions, kv_positions, rope, segments, kv_segments, q_offset, causal, scale):
    """`rotary_attention` by cuDNN; arguments as its front door passes them."""
    _refuse(q, segments, kv_segments, q_offset, causal)
    attend = functools.partial(_packed if segments is not None else _plain, causal, scale)
    turned = rotate(q, positions, rope), rotate(k, kv_positions, rope), v
    if segments is None:
        return attend(*turned)
    starts, lengths, fits = documents(segments, most=max(2, min(64, q.shape[1] // 128)))
    by_pallas = lambda _: gpu(
        q, k, v, positions, kv_positions, rope, segments, segments, q_offset, causal, scale
    )
    return lax.cond(fits, lambda turned: attend(*turned, starts, lengths), by_pallas, turned)


def documents(segments_BT, most: int):
    """Runs of one id as cuDNN wants them.

    Args:
      segments_BT: ids; every position belongs to a run, padding to its own.
      most: M, how many runs a row may have.

    Returns:
      starts [B, M + 1] and lengths [B, M], int32, -1 where a row has fewer runs; and whether that
      says it all: no row has more than M runs, or one id in two of them.
    """
    T = segments_BT.shape[1]
    first_BT = jnp.diff(segments_BT, axis=1, prepend=segments_BT[:, :1] - 1) != 0
    run = functools.partial(jnp.nonzero, size=most + 1, fill_value=T)
    starts = jax.vmap(lambda first: run(first)[0])(first_BT).astype(jnp.int32)
    there = starts < T
    ids = jnp.take_along_axis(segments_BT, jnp.minimum(starts, T - 1), axis=1)
    same = (ids[:, :, None] == ids[:, None, :]) & there[:, :, None] & there[:, None, :]
    fits = ~there[:, most:].any() & ~jnp.triu(same, 1).any()
    lengths = jnp.where(there[:, :-1], jnp.diff(starts, axis=1), -1)
    return jnp.where(there, starts, -1), lengths, fits


def _refuse(q, segments, kv_segments, q_offset, causal) -> None:
    if dispatch.platform() not in ("gpu", "cuda"):
        raise NotImplementedError(
            f"cuDNN runs on NVIDIA GPUs, not on {dispatch.platform()}; there, xla does the same"
        )
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        raise NotImplementedError(f"cuDNN has bfloat16 and float16, not {q.dtype}")
    if causal and not (isinstance(q_offset, int) and q_offset == 0):
        raise NotImplementedError("cuDNN's causal mask starts at key 0; q_offset must be 0")
    if segments is not kv_segments:
        raise NotImplementedError(
            "documents go to cuDNN by offsets, of queries and keys alike: "
            "leave kv_segment_ids_BS out"
        )
    try:
        _fused().check_cudnn_version()
    except RuntimeError as e:
        raise NotImplementedError(f"cuDNN is not installed: {e}") from e


def _fused():
    # jax.nn.dot_product_attention does not hand offsets on.
    from jax._src.cudnn import fused_attention_stablehlo

    return fused_attention_stablehlo


def _plain(causal, scale, q, k, v):
    return jax.nn.dot_product_attention(
        q, k, v, scale=scale, is_causal=causal, implementation="cudnn"
    )


def _packed(causal, scale, q, k, v, starts, lengths):
    fused = _fused()
    if jax.__version_info__ < (0, 12):
        # jax 0.10 counts the offsets of keys in the queries' heads: wrong where these are more.
        k, v = (jnp.repeat(x, q.shape[2] // k.shape[2], axis=2) for x in (k, v))
    mask = fused.MaskType.PADDING_CAUSAL if causal else fused.MaskType.PADDING
    return fused.dot_product_attention(
        q, k, v, q_seqlen=lengths, kv_seqlen=lengths, q_offsets=starts, kv_offsets=starts,
        scale=scale, mask_type=mask,
    )  # fmt: skip
