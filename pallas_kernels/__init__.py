"""Rotary attention for TPU and GPU. Needs jax alone; usable without the rest of this project.

``from pallas_kernels import Rope, rotary_attention, rotary_decode_attention``
"""

from pallas_kernels.rotary_attention import Rope, rotary_attention
from pallas_kernels.rotary_decode_attention import rotary_decode_attention

__all__ = ["Rope", "rotary_attention", "rotary_decode_attention"]
