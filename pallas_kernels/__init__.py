"""Attention with rotary embedding, and quantized products, for TPU, GPU and CPU. Needs JAX only.

from pallas_kernels import Rope, quantized_matmul, rotary_attention, rotary_decode_attention
"""

from pallas_kernels.add_rms_norm import add_rms_norm, rms_norm
from pallas_kernels.quantized_matmul import quantized_matmul
from pallas_kernels.rotary_attention import Rope, rotary_attention
from pallas_kernels.rotary_decode_attention import fused_decode_attention, rotary_decode_attention

__all__ = [
    "Rope",
    "add_rms_norm",
    "fused_decode_attention",
    "quantized_matmul",
    "rms_norm",
    "rotary_attention",
    "rotary_decode_attention",
]
