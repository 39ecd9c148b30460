"""The settings of a model, and the table of the published models.

Modules that use these settings have no defaults of their own.
"""

import dataclasses
import math
from typing import Annotated, Literal, TypeVar, dataclass_transform

import pydantic
from pydantic import ConfigDict, Field

Positive = Annotated[int, Field(gt=0)]

_T = TypeVar("_T")


@dataclass_transform(frozen_default=True, kw_only_default=True)
def checked(cls: type[_T]) -> type[_T]:
    """Decorator: a frozen dataclass with checked types and ranges; docstrings describe fields."""
    config = ConfigDict(
        extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False, strict=True
    )
    decorated = pydantic.dataclasses.dataclass(cls, frozen=True, kw_only=True, config=config)
    return decorated  # type: ignore[return-value]


@checked
class RopeConfig:
    """Rotary embedding (RoPE) and its extension to longer contexts.

    Fields are named as in Hugging Face's ``rope_parameters``. A field that ``type`` does not use is
    an error.

    Example::

      RopeConfig(theta=10000.0, type="linear", factor=2.0)
    """

    theta: Annotated[float, Field(gt=0)] = 10000.0
    """base of the rotary frequencies: 1e4 for LLaMA 1 and 2, 5e5 for Llama 3"""
    type: Literal["default", "linear", "dynamic", "llama3", "yarn"] = "default"
    """how the frequencies are scaled for contexts longer than those of training"""
    factor: Annotated[float, Field(ge=1)] | None = None
    """context extension factor (linear, dynamic, llama3, yarn)"""
    original_context: Positive | None = None
    """context of the training before scaling (llama3, yarn, dynamic); default: model.context"""
    low_freq_factor: float | None = None
    """llama3: wavelengths above original_context / low_freq_factor are multiplied by factor"""
    high_freq_factor: float | None = None
    """llama3: wavelengths below original_context / high_freq_factor are unchanged"""
    beta_fast: float | None = None
    """yarn: frequencies with more rotations over original_context are unchanged (default 32)"""
    beta_slow: float | None = None
    """yarn: frequencies with fewer rotations are fully interpolated (default 1)"""
    attention_factor: float | None = None
    """yarn: factor on cos and sin (default 0.1 ln(factor) + 1, or from the mscale fields)"""
    mscale: float | None = None
    """yarn: numerator of the attention factor, 0.1 mscale ln(factor) + 1"""
    mscale_all_dim: float | None = None
    """yarn: denominator of the attention factor"""
    truncate: bool | None = None
    """yarn: round the correction range to whole dimensions (default true)"""

    def __post_init__(self):
        uses = {
            "default": (),
            "linear": ("factor",),
            "dynamic": ("factor", "original_context"),
            "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_context"),
            "yarn": (
                "factor", "original_context", "beta_fast", "beta_slow", "attention_factor",
                "mscale", "mscale_all_dim", "truncate",
            ),
        }[self.type]  # fmt: skip
        given = {f.name for f in dataclasses.fields(self) if getattr(self, f.name) is not None}
        given -= {"theta", "type"}
        if unused := given - set(uses):
            raise ValueError(
                f"rope.type={self.type!r} does not use {', '.join(sorted(unused))}; "
                f"it takes {', '.join(uses) or 'theta only'}"
            )
        needs = {"default": (), "llama3": uses[:3]}.get(self.type, ("factor",))
        if missing := [name for name in needs if name not in given]:
            raise ValueError(f"rope.type={self.type!r} needs {', '.join(missing)}")
        low, high = self.low_freq_factor, self.high_freq_factor
        if self.type == "llama3" and not (low is not None and high is not None and low < high):
            raise ValueError(
                f"rope.high_freq_factor={high} must be greater than low_freq_factor={low}"
            )


@checked
class ModelConfig:
    """Sizes of the model and the constants of its forward pass.

    Each size has the letter that names its axis everywhere in the code (``shape("LDF")``). Weights
    have two flattened axes: Q = N H, all query heads; E = K H, all key or value heads.

    Sizes have upper limits far above every published model, so that a damaged or hostile file
    cannot cause unbounded allocation.

    Example::

        cfg = MODELS["llama3-8b"]
        cfg.shape("LDQ")  # (32, 4096, 4096)
    """

    vocab_size: Annotated[int, Field(gt=0, le=2**24)]
    """V, vocabulary size"""
    dim: Annotated[int, Field(gt=0, le=2**20)]
    """D, model width"""
    num_layers: Annotated[int, Field(gt=0, le=2**12)]
    """L, number of layers"""
    num_heads: Annotated[int, Field(gt=0, le=2**14)]
    """N, number of query heads"""
    num_kv_heads: Annotated[int, Field(gt=0, le=2**14)]
    """K, number of key/value heads; N is a multiple of K"""
    head_dim: Annotated[int, Field(gt=0, le=2**14)]
    """H, dimension of a head; even"""
    ffn_dim: Annotated[int, Field(gt=0, le=2**22)]
    """F, hidden width of the SwiGLU feed-forward"""
    norm_eps: Annotated[float, Field(gt=0)]
    """epsilon under the square root of RMSNorm"""
    rope: RopeConfig
    """rotary embedding"""
    context: Annotated[int, Field(gt=0, le=2**30)]
    """maximum sequence length, tokens"""
    tie_embeddings: bool
    """use the embedding matrix as the output projection too"""

    def __post_init__(self):
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads={self.num_heads} must be a multiple of num_kv_heads={self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} must be even: RoPE rotates pairs")

    def size(self, letter: str) -> int:
        """Length of the axis ``letter`` (one of L D N K G H Q E F V)."""
        if letter == "G":
            return self.num_heads // self.num_kv_heads
        if letter in "QE":
            return self.head_dim * (self.num_heads if letter == "Q" else self.num_kv_heads)
        return getattr(self, FIELD_OF_LETTER[letter])

    def shape(self, letters: str) -> tuple[int, ...]:
        """Shape of a weight, ``shape("LDF")``."""
        return tuple(map(self.size, letters))

    @property
    def num_params(self) -> int:
        """Exact number of parameters."""
        per_layer = ("D", "DQ", "DE", "DE", "QD", "D", "DF", "DF", "FD")
        whole = ("VD", "D") if self.tie_embeddings else ("VD", "D", "DV")
        count = lambda words: sum(math.prod(self.shape(w)) for w in words)
        return self.num_layers * count(per_layer) + count(whole)

    def flops_per_token(self, seq_len: int) -> float:
        """FLOPs of the forward and backward pass per training token.

        6 per parameter, without the embedding lookup, plus attention, counted at half because it is
        causal: 12 L N H T / 2. This is the usual convention for MFU (PaLM, appendix B, causal).
        """
        lookup = 0 if self.tie_embeddings else math.prod(self.shape("VD"))
        attention = 6 * math.prod(self.shape("LNH")) * seq_len
        return 6 * (self.num_params - lookup) + attention


FIELD_OF_LETTER = dict(
    V="vocab_size", D="dim", L="num_layers", N="num_heads", K="num_kv_heads", H="head_dim",
    F="ffn_dim",
)  # fmt: skip


def different_sizes(a: ModelConfig, b: ModelConfig) -> list[tuple[str, int, int]]:
    """The sizes in which two models differ: name, value in ``a`` and value in ``b``."""
    values = [(name, getattr(a, name), getattr(b, name)) for name in FIELD_OF_LETTER.values()]
    return [size for size in values if size[1] != size[2]]


def _model(V, D, L, N, K, F, eps, theta, context, factor=None, *, tie=False) -> ModelConfig:
    rope = RopeConfig(theta=theta)
    if factor:  # as in Llama 3.1
        rope = RopeConfig(
            theta=theta, type="llama3", factor=factor, original_context=8192,
            low_freq_factor=1.0, high_freq_factor=4.0,
        )  # fmt: skip
    return ModelConfig(
        vocab_size=V, dim=D, num_layers=L, num_heads=N, num_kv_heads=K, head_dim=D // N, ffn_dim=F,
        norm_eps=eps, rope=rope, context=context, tie_embeddings=tie,
    )  # fmt: skip


# fmt: off
MODELS: dict[str, ModelConfig] = {
    #                             V     D    L    N   K      F   eps  theta context factor
    "llama-7b":     _model( 32000,  4096,  32, 32, 32, 11008, 1e-6, 1e4, 2048),
    "llama-13b":    _model( 32000,  5120,  40, 40, 40, 13824, 1e-6, 1e4, 2048),
    "llama-33b":    _model( 32000,  6656,  60, 52, 52, 17920, 1e-6, 1e4, 2048),
    "llama-65b":    _model( 32000,  8192,  80, 64, 64, 22016, 1e-5, 1e4, 2048),
    "llama2-7b":    _model( 32000,  4096,  32, 32, 32, 11008, 1e-5, 1e4, 4096),
    "llama2-13b":   _model( 32000,  5120,  40, 40, 40, 13824, 1e-5, 1e4, 4096),
    "llama2-70b":   _model( 32000,  8192,  80, 64,  8, 28672, 1e-5, 1e4, 4096),
    "llama3-8b":    _model(128256,  4096,  32, 32,  8, 14336, 1e-5, 5e5, 8192),
    "llama3-70b":   _model(128256,  8192,  80, 64,  8, 28672, 1e-5, 5e5, 8192),
    "llama3.1-8b":  _model(128256,  4096,  32, 32,  8, 14336, 1e-5, 5e5, 131072, 8.0),
    "llama3.1-70b": _model(128256,  8192,  80, 64,  8, 28672, 1e-5, 5e5, 131072, 8.0),
    "llama3.1-405b": _model(128256, 16384, 126, 128, 8, 53248, 1e-5, 5e5, 131072, 8.0),
    "llama3.2-1b":  _model(128256,  2048,  16, 32,  8,  8192, 1e-5, 5e5, 131072, 32.0, tie=True),
    "llama3.2-3b":  _model(128256,  3072,  28, 24,  8,  8192, 1e-5, 5e5, 131072, 32.0, tie=True),
    "smollm2-135m": _model(49152,   576,  30,  9,  3,  1536, 1e-5, 1e5, 8192, tie=True),
    # Small models: the default recipe, the two shapes of the CPU benchmarks, TinyStories models.
    "tiny":         _model(  2048,   192,   4,  3,  3,   512, 1e-5, 1e4, 256),
    "mini":         _model(  4096,   256,   4,  4,  4,   704, 1e-5, 1e4, 256),
    "small":        _model(  8192,   512,   8,  8,  8,  1376, 1e-5, 1e4, 256),
    "stories260k":  _model(   512,    64,   5,  8,  4,   172, 1e-5, 1e4, 512, tie=True),
    "stories15m":   _model( 32000,   288,   6,  6,  6,   768, 1e-5, 1e4, 256, tie=True),
    "stories110m":  _model( 32000,   768,  12, 12, 12,  2048, 1e-5, 1e4, 1024, tie=True),
}
# fmt: on
