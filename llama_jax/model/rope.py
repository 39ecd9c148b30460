"""Rotary frequencies of a model, for every type of Hugging Face's ``rope_parameters``."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.config import ModelConfig
from pallas_kernels import Rope


def rope_of(cfg: ModelConfig, last_position: jax.Array | None = None) -> Rope:
    """The rotary embedding of a model, with the formulas of Hugging Face.

    Types: linear (arXiv 2306.15595), dynamic (NTK scaling by the current length), llama3 (Llama
    3.1), yarn (arXiv 2309.00071).

    Args:
      cfg: the model.
      last_position: scalar, the highest position in use; only type dynamic reads it.

    Returns:
      Frequencies [H // 2] in float32, radians per position, and the factor on cos and sin.

    Raises:
      ValueError: type dynamic without ``last_position``.
    """
    rope, H = cfg.rope, cfg.head_dim
    exponent = np.arange(0, H, 2, dtype=np.float32) / np.float32(H)
    inv_freq = (1.0 / np.power(np.float32(rope.theta), exponent)).astype(np.float32)
    scale = 1.0
    original = rope.original_context or cfg.context
    if rope.type == "linear":
        inv_freq = inv_freq / np.float32(rope.factor)
    elif rope.type == "llama3":
        inv_freq = _llama3_frequencies(inv_freq, rope, original)
    elif rope.type == "yarn":
        inv_freq, scale = _yarn_frequencies(inv_freq, rope, H, original)
    elif rope.type == "dynamic":
        if last_position is None or rope.factor is None:
            raise ValueError("rope.type='dynamic' needs last_position, a scalar, and rope.factor")
        length = jnp.maximum(last_position + 1, original).astype(jnp.float32)
        stretch = rope.factor * length / original - (rope.factor - 1)
        theta = rope.theta * stretch ** (H / (H - 2))
        inv_freq = 1.0 / theta**exponent
    return Rope(jnp.asarray(inv_freq, jnp.float32), jnp.float32(scale))


def _llama3_frequencies(inv_freq, rope, original):
    low, high = rope.low_freq_factor, rope.high_freq_factor
    wavelength = 2 * math.pi / inv_freq
    smooth = (original / wavelength - low) / (high - low)
    between = (1 - smooth) * inv_freq / rope.factor + smooth * inv_freq
    stretched = np.where(wavelength > original / low, inv_freq / rope.factor, between)
    return np.where(wavelength < original / high, inv_freq, stretched)


def _yarn_frequencies(inv_freq, rope, H, original):
    beta_fast = 32.0 if rope.beta_fast is None else rope.beta_fast
    beta_slow = 1.0 if rope.beta_slow is None else rope.beta_slow

    def dim_of(rotations):  # the pair that rotates this many times over the original context
        return H * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dim_of(beta_fast), dim_of(beta_slow)
    if rope.truncate is not False:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, H - 1)
    high = high + 0.001 if low == high else high  # avoids a division by zero, as Hugging Face does
    ramp = np.clip((np.arange(H // 2, dtype=np.float32) - low) / (high - low), 0, 1)
    mixed = inv_freq / rope.factor * ramp + inv_freq * (1 - ramp)
    magnitude = lambda m: 0.1 * m * math.log(rope.factor) + 1.0 if rope.factor > 1 else 1.0
    if rope.attention_factor is not None:
        scale = rope.attention_factor
    elif rope.mscale and rope.mscale_all_dim:
        scale = magnitude(rope.mscale) / magnitude(rope.mscale_all_dim)
    else:
        scale = magnitude(1.0)
    return mixed, scale
