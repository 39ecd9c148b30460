"""Blocks of llama.cpp's formats Q8_0 and Q4_0 as the arrays of a quantized matrix, bit for bit."""

import numpy as np

from llama_jax.model.quantize import pack

BLOCK = 32
"""inputs that share a scale"""
BLOCK_BYTES = {"Q8_0": 2 + BLOCK, "Q4_0": 2 + BLOCK // 2}
"""a float16 scale, then the integers"""


def from_blocks(blocks: np.ndarray, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """The arrays of a :class:`~llama_jax.model.quantize.QuantizedWeight` from a GGUF tensor.

    Args:
      blocks: uint8 [out, bytes of a row]; a row holds the weights of one output.
      kind: "Q8_0" or "Q4_0".

    Returns:
      ``q``, int8 [in, out] or packed uint8 [in / 2, out], and ``scale``, float32 [in / 32, out].

    Raises:
      ValueError: another kind, or rows that are not whole blocks.
    """
    if kind not in BLOCK_BYTES:
        raise ValueError(f"blocks of kind {kind!r}: must be 'Q8_0' or 'Q4_0'")
    size = BLOCK_BYTES[kind]
    if blocks.ndim != 2 or blocks.dtype != np.uint8 or blocks.shape[1] % size:
        raise ValueError(
            f"{kind}: expected uint8 [out, bytes], a multiple of {size} bytes; got "
            f"{blocks.dtype} {blocks.shape}"
        )
    blocks = np.ascontiguousarray(blocks).reshape(len(blocks), -1, size)
    scale = blocks[..., :2].copy().view("<f2")[..., 0].astype(np.float32)
    integers = blocks[..., 2:]
    if kind == "Q4_0":  # the first 16 inputs are in the low four bits, plus 8
        integers = np.concatenate([integers & 15, integers >> 4], axis=-1) - np.uint8(8)
    q = np.ascontiguousarray(integers.reshape(len(blocks), -1).T).view(np.int8)
    return pack(q) if kind == "Q4_0" else q, np.ascontiguousarray(scale.T)
