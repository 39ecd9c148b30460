"""What the backward pass recomputes: activations of a layer by name."""

from collections.abc import Callable
from typing import Any

import jax

from llama_jax.config.activations import REMAT_NAMES, Remat

MATMULS = tuple(name for name in REMAT_NAMES if name != "attention")
"""Products with weights; those inside attention are recomputed (paper, section 2.4)"""

# cuDNN's attention has a primitive of JAX, in which no names can be given.
_CUDNN = "dot_product_attention_fwd_wrapper"


def kept_names(remat: Remat) -> tuple[str, ...]:
    """The activations of ``train.remat`` that the forward pass keeps for the backward pass.

    For "none", which keeps those between them too, and for "auto", all of them.
    """
    if isinstance(remat, str):
        return {"full": (), "matmuls": MATMULS}.get(remat, REMAT_NAMES)
    return remat


def checkpointed(
    body: Callable[..., Any], remat: Remat, offload: tuple[str, ...]
) -> Callable[..., Any]:
    """A layer whose backward pass recomputes what is not kept.

    Args:
      body: the layer.
      remat: as train.remat; "auto" must have been replaced by names.
      offload: names of activations to keep in the host's memory.
    """
    if remat == "none":
        return body
    kept = [name for name in kept_names(remat) if name not in offload]
    # A number per token, which takes a pass over the layer's input to compute.
    kept.append("reciprocal_rms")
    return jax.checkpoint(body, policy=_policy(kept, offload), prevent_cse=False)


def _policy(kept: list[str], offload: tuple[str, ...]) -> Callable[..., Any]:
    by_name = jax.checkpoint_policies.save_only_these_names(*kept)
    if offload:
        by_name = jax.checkpoint_policies.save_and_offload_only_these_names(
            names_which_can_be_saved=kept,
            names_which_can_be_offloaded=list(offload),
            offload_src="device",
            offload_dst="pinned_host",
        )

    def policy(primitive: Any, *args: Any, **params: Any) -> Any:
        if primitive.name == _CUDNN and "attention" in kept:
            return True
        return by_name(primitive, *args, **params)

    return policy
