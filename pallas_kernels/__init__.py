"""Attention with rotary embedding for TPU, GPU and CPU. Depends on JAX only.

from pallas_kernels import Rope, rotary_attention, rotary_decode_attention
"""

from pallas_kernels.rotary_attention import Rope, rotary_attention
from pallas_kernels.rotary_decode_attention import rotary_decode_attention

__all__ = ["Rope", "rotary_attention", "rotary_decode_attention"]
