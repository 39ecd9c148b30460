"""LLaMA in Flax NNX: the only forward pass, for training, prefill and decoding.

In: token ids [B, T], and for decoding a :class:`KVCache`. Out: logits [B, T, V]. RMSNorm before
each sub-layer, SwiGLU, rotary attention with grouped queries; layers stacked along L. Source: arXiv
2302.13971, section 2.2.

    llama = Llama(MODELS["tiny"], Execution(jnp.float32), nnx.Rngs(0))
    logits_BTV = llama(tokens_BT)
"""

import dataclasses
import functools
import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from llama_jax.config import ModelConfig
from llama_jax.model.sharding import (
    PRESETS,
    Rules,
    all_gather_columns,
    first_position,
    gather,
    gather_float32_gradient,
    is_sharded,
    no_mesh,
    reshard,
)
from pallas_kernels import Rope, rotary_attention, rotary_decode_attention


@dataclasses.dataclass(frozen=True)
class ComputeConfig:
    """How a model is computed, as opposed to what it computes."""

    dtype: jnp.dtype
    """of activations and matrix products; weights are cast to it where they are used"""
    rules: Rules = PRESETS["fsdp"]
    """sharding, when a mesh is set"""
    remat: Literal["none", "matmuls", "full"] = "none"
    """what the backward pass recomputes, see TrainConfig.remat"""
    unroll: bool = False
    """layers one after the other instead of a scan"""
    attention: str | None = None
    """implementation of the attention; None: the best for the platform"""
    reduce_float32: bool = False
    """gradients of weights are summed over devices in float32, and not in ``dtype``"""


class KVCache(NamedTuple):
    """Rotated keys and values of the positions seen so far; dead slots hold anything."""

    k_LBKSH: jax.Array
    v_LBKSH: jax.Array
    lengths_B: jax.Array
    """int32, live positions of each row"""

    @classmethod
    def empty(cls, cfg: ModelConfig, batch: int, slots: int, dtype: jnp.dtype) -> "KVCache":
        """A cache for ``slots`` positions a row."""
        L, K, H = cfg.shape("LKH")
        zeros = jnp.zeros((L, batch, K, slots, H), dtype)
        return cls(zeros, zeros, jnp.zeros(batch, jnp.int32))


class Attention(nnx.Module):
    """Grouped-query attention with the rotary embedding: x_BTD -> [B, T, D]."""

    def __init__(self, cfg: ModelConfig, compute: ComputeConfig, init_std: float, rngs: nnx.Rngs):
        w = functools.partial(_weight, cfg, compute.rules, rngs)
        # Heads side by side, as matrices: on a TPU, H = 64 or few heads as axes of their own would
        # be padded, and [D, N, H] turned whole before each product.
        self.q = w("DQ", init_std)
        self.k = w("DE", init_std)
        self.v = w("DE", init_std)
        self.o = w("QD", init_std / math.sqrt(2 * cfg.num_layers))
        self.compute, self.head_dim = compute, cfg.head_dim
        Q, E = cfg.shape("QE")
        self.bounds = Q, Q + E

    def __call__(self, x_BTD, where: "Where", cache=None, layer=None):
        q_BTNH, k_BTKH, v_BTKH = map(self._heads, self._qkv(x_BTD))
        out_BTNH, cache = _attend(self.compute, q_BTNH, k_BTKH, v_BTKH, where, cache, layer)
        return _project(self.compute, out_BTNH, self.o, "QD", "BTD"), cache

    def _qkv(self, x_BTD):
        if hasattr(self, "qkv"):  # fused by params.unstack_layers
            qkv = _project(self.compute, x_BTD, self.qkv, "DQ", "BTQ")
            return jnp.split(qkv, self.bounds, axis=-1)
        q_BTQ = _project(self.compute, x_BTD, self.q, "DQ", "BTQ")
        k_BTE = _project(self.compute, x_BTD, self.k, "DE", "BTE")
        v_BTE = _project(self.compute, x_BTD, self.v, "DE", "BTE")
        return q_BTQ, k_BTE, v_BTE

    def _heads(self, x_BTQ):
        shape = (*x_BTQ.shape[:2], -1, self.head_dim)
        if no_mesh():
            return x_BTQ.reshape(shape)
        return x_BTQ.reshape(shape, out_sharding=self.compute.rules.activation("BTNH"))


class MLP(nnx.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)); arXiv 2002.05202."""

    def __init__(self, cfg: ModelConfig, compute: ComputeConfig, init_std: float, rngs: nnx.Rngs):
        w = functools.partial(_weight, cfg, compute.rules, rngs)
        self.gate = w("DF", init_std)
        self.up = w("DF", init_std)
        self.down = w("FD", init_std / math.sqrt(2 * cfg.num_layers))
        self.compute = compute

    def __call__(self, x_BTD):
        if hasattr(self, "gate_up"):  # fused by params.unstack_layers
            gate_up = _project(self.compute, x_BTD, self.gate_up, "DF", "BTF")
            gate_BTF, up_BTF = jnp.split(gate_up, 2, axis=-1)
        else:
            gate_BTF = _project(self.compute, x_BTD, self.gate, "DF", "BTF")
            up_BTF = _project(self.compute, x_BTD, self.up, "DF", "BTF")
        return _project(self.compute, jax.nn.silu(gate_BTF) * up_BTF, self.down, "FD", "BTD")


class Block(nnx.Module):
    """One layer: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, cfg: ModelConfig, compute: ComputeConfig, init_std: float, rngs: nnx.Rngs):
        self.attention_norm = _weight(cfg, compute.rules, rngs, "D", None)
        self.attention = Attention(cfg, compute, init_std, rngs)
        self.mlp_norm = _weight(cfg, compute.rules, rngs, "D", None)
        self.mlp = MLP(cfg, compute, init_std, rngs)
        self.eps = cfg.norm_eps

    def __call__(self, x_BTD, where: "Where", cache=None, layer=None):
        whole = self.attention.compute.rules.activation_without_tensor("BTD")
        normed_BTD = reshard(rms_norm(x_BTD, self.attention_norm[...], self.eps), whole)
        out_BTD, cache = self.attention(normed_BTD, where, cache, layer)
        x_BTD = x_BTD + out_BTD
        normed_BTD = reshard(rms_norm(x_BTD, self.mlp_norm[...], self.eps), whole)
        return x_BTD + self.mlp(normed_BTD), cache


class Where(NamedTuple):
    """What attention needs to know of the positions, the same for every layer."""

    rope: Rope
    positions_BT: jax.Array | None
    segment_ids_BT: jax.Array | None


class Llama(nnx.Module):
    """Embedding, L blocks, a final norm, and the output matrix (the embedding again when tied)."""

    def __init__(
        self, cfg: ModelConfig, compute: ComputeConfig, rngs: nnx.Rngs, init_std: float = 0.02
    ):
        self.embed = _weight(cfg, compute.rules, rngs, "VD", init_std)

        @nnx.split_rngs(splits=cfg.num_layers)
        @nnx.vmap(transform_metadata={nnx.PARTITION_NAME: None})
        def stack(rngs):
            return Block(cfg, compute, init_std, rngs)

        self.blocks = stack(rngs)
        self.norm = _weight(cfg, compute.rules, rngs, "D", None)
        if not cfg.tie_embeddings:
            self.unembed = _weight(cfg, compute.rules, rngs, "DV", init_std)
        self.cfg = cfg
        self.compute = compute

    def __call__(self, tokens_BT, **kwargs):
        """Logits [B, T, V] float32; with a cache, (logits, cache). Arguments as :meth:`hidden`."""
        hidden = self.hidden(tokens_BT, **kwargs)
        if isinstance(hidden, tuple):
            return self.logits(hidden[0]), hidden[1]
        return self.logits(hidden)

    def hidden(
        self,
        tokens_BT,
        *,
        positions_BT=None,
        segment_ids_BT=None,
        cache: KVCache | None = None,
        counts_B=None,
        rope_length=None,
    ):
        """Normed output of the last layer, [B, T, D] in the compute dtype.

        Args:
          tokens_BT: int32 ids.
          positions_BT: int32 rotary positions; default: 0 to T - 1, or from the cache's lengths on.
          segment_ids_BT: int32; attention stays inside runs of one id.
          cache: keys and values of earlier positions. The new ones are appended, and (hidden,
            cache) is returned; ``positions_BT`` and ``segment_ids_BT`` do not go with it. The
            caller keeps ``lengths_B + T`` within the cache's slots. Donated, or carried through a
            loop, it is changed in place.
          counts_B: int32, 0 to T, with a cache: how many tokens of each row are real, from the
            first on; the row's length grows by that many. The rest is padding, whose hidden states
            mean nothing. Default: all T.
          rope_length: int32 scalar, the length that dynamic rotary frequencies follow; the other
            types ignore it. Default: up to the last real token of ``tokens_BT``. Without a cache,
            padding at the end counts unless this says otherwise.
        """
        if cache is not None and (positions_BT is not None or segment_ids_BT is not None):
            raise ValueError(
                "with a cache, positions follow from its lengths: "
                "give no positions_BT or segment_ids_BT"
            )
        if cache is None and counts_B is not None:
            raise ValueError("counts_B says how a cache grows: give a cache")
        B, T = tokens_BT.shape
        if positions_BT is None:
            start = 0 if cache is None else cache.lengths_B[:, None]
            positions_BT = jnp.broadcast_to(start + jnp.arange(T, dtype=jnp.int32), (B, T))
        last = None
        if self.cfg.rope.type == "dynamic" and rope_length is not None:
            last = rope_length - 1
        elif self.cfg.rope.type == "dynamic":
            real_BT = jnp.arange(T) < (T if counts_B is None else counts_B[:, None])
            last = jnp.max(jnp.where(real_BT, positions_BT, 0))
        positions_BT = reshard(positions_BT, self.compute.rules.activation_without_tensor("BT"))
        where = Where(rope_of(self.cfg, last), positions_BT, segment_ids_BT)
        x_BTD = _embed(self.compute, self.embed[...], tokens_BT)
        x_BTD, cache = self._layers(x_BTD, where, cache)
        if cache is not None:
            grown_B = cache.lengths_B + (T if counts_B is None else counts_B)
            cache = cache._replace(lengths_B=grown_B)
        x_BTD = rms_norm(x_BTD, self.norm[...], self.cfg.norm_eps)
        x_BTD = reshard(x_BTD, self.compute.rules.activation_without_tensor("BTD"))
        return x_BTD if cache is None else (x_BTD, cache)

    def logits(self, x_BTD):
        """Output matrix product: [B, T, D] -> [B, T, V] float32."""
        w = jnp.swapaxes(self.embed[...], 0, 1) if self.cfg.tie_embeddings else self.unembed[...]
        # float32: the softmax over V that follows loses small probabilities in bfloat16.
        return _project(self.compute, x_BTD, w, "DV", "BTV", jnp.float32)

    def layers(self) -> list[Block]:
        """The layers one by one."""
        if isinstance(self.blocks, nnx.List):
            return list(self.blocks)
        graphdef, state = nnx.split(self.blocks)
        return [nnx.merge(graphdef, layer) for layer in unstack(state)]

    def _layers(self, x_BTD, where: Where, cache: KVCache | None):
        def body(carry, block_and_index):
            x, cache = carry
            block, layer = block_and_index
            return block(x, where, cache, layer), None

        body = _remat(body, self.compute.remat)
        L = self.cfg.num_layers
        if self.compute.unroll or isinstance(self.blocks, nnx.List):
            body = body if cache is None else jax.jit(body)  # sampling: traced once for all layers
            carry = (x_BTD, cache)
            for i, block in enumerate(self.layers()):
                carry, _ = body(carry, (block, jnp.int32(i)))
        else:
            carry, _ = jax.lax.scan(body, (x_BTD, cache), (self.blocks, jnp.arange(L)))
        return carry


def rms_norm(x_BTD: jax.Array, scale_D: jax.Array, eps: float) -> jax.Array:
    """x / sqrt(mean(x^2) + eps) * scale over D; arXiv 1910.07467.

    Statistics and product in float32, as Meta's.
    """
    x = x_BTD.astype(jnp.float32)
    x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)
    # Rounded before the scale, as the published models were trained.
    return (x.astype(x_BTD.dtype) * scale_D).astype(x_BTD.dtype)


def rope_of(cfg: ModelConfig, last_position: jax.Array | None = None) -> Rope:
    """Rotary frequencies of a model, [H // 2] float32 radians a position; the factor on cos, sin.

    The types are those of Hugging Face's ``rope_parameters``, with its formulas: linear (arXiv
    2306.15595), dynamic (NTK by the current length; needs ``last_position``, a scalar), llama3
    (Llama 3.1), yarn (arXiv 2309.00071).
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

    def dim_of(rotations):  # the pair that turns this many times over the original context
        return H * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dim_of(beta_fast), dim_of(beta_slow)
    if rope.truncate is not False:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, H - 1)
    high = high + 0.001 if low == high else high  # as the reference, against a division by zero
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


def _weight(
    cfg: ModelConfig, rules: Rules, rngs: nnx.Rngs, letters: str, std: float | None
) -> nnx.Param:
    """A float32 weight: normal with standard deviation ``std``; ones (a norm's scale) for None."""
    shape = cfg.shape(letters)
    if std is None:
        value = jnp.ones(shape)
    else:
        value = std * jax.random.normal(rngs.params(), shape, jnp.float32)
    if jax.sharding.get_abstract_mesh().empty:
        return nnx.Param(value)
    return nnx.Param(value, out_sharding=rules.weight(letters))


def _embed(compute: ComputeConfig, embed_VD, tokens_BT):
    if no_mesh():
        return embed_VD.astype(compute.dtype)[tokens_BT]
    stored, out = compute.rules.weight("VD"), compute.rules.activation("BTD")
    rows, width = stored

    def lookup(table_VD, tokens_BT):
        table_VD = all_gather_columns(table_VD, width, compute.dtype, compute.reduce_float32)
        if rows is None:
            return table_VD[tokens_BT]
        ids = tokens_BT - jax.lax.axis_index(rows) * table_VD.shape[0]
        here = (ids >= 0) & (ids < table_VD.shape[0])
        x_BTD = jnp.where(here[..., None], table_VD[jnp.where(here, ids, 0)], 0)
        if is_sharded(out[1]) and rows in out[1]:
            return jax.lax.psum_scatter(x_BTD, rows, scatter_dimension=1, tiled=True)
        return jax.lax.psum(x_BTD, rows)

    BT = compute.rules.activation_without_tensor("BT")
    looked_up = jax.shard_map(lookup, in_specs=(stored, BT), out_specs=out)
    return looked_up(embed_VD, reshard(tokens_BT, BT))


def _project(compute: ComputeConfig, x, w, w_letters: str, out_letters: str, out_dtype=None):
    """Matrix product of activations (B, T, ...) and a weight (in, out), [B, T, out].

    The weight is cast, then gathered over ``fsdp``. Where no axis splits T, the product is one of
    two dimensions over B * T tokens: the form that every platform's matrix library is tuned for, in
    the backward pass too.
    """
    B, T = x.shape[:2]
    # A weight of the model, or a matrix made of one; either may stand for small integers.
    w = w.get_value() if isinstance(w, nnx.Variable) else w
    product = functools.partial(jnp.einsum, preferred_element_type=out_dtype or compute.dtype)
    if no_mesh():
        y = product("xi,io->xo", x.reshape(B * T, -1), w.astype(compute.dtype)).reshape(B, T, -1)
        return checkpoint_name(y, "matmul")
    tokens, out = (
        compute.rules.activation_without_tensor("BT"),
        compute.rules.activation(out_letters),
    )
    flat = not is_sharded(tokens[1])
    gathered = compute.rules.weight_without_fsdp(w_letters, tokens[:1] if flat else tokens)
    w_in, w_out = gathered.partitions
    if compute.reduce_float32:
        w = gather_float32_gradient(w, gathered, compute.dtype)
    else:
        w = gather(w.astype(compute.dtype), gathered)
    # Over heads or widths that lie on several devices, each has a partial sum; it is summed into
    # the sharding wanted.
    partial = frozenset({w_in} if w_in else ())
    x = x.reshape(B, T, -1, out_sharding=P(*tokens, w_in))
    if flat:
        x = x.reshape(B * T, -1, out_sharding=P(tokens[0], w_in))
        y = product("xi,io->xo", x, w, out_sharding=P(tokens[0], w_out, unreduced=partial))
        y = y.reshape(B, T, -1, out_sharding=P(*tokens, w_out, unreduced=partial))
    else:
        y = product("BTi,io->BTo", x, w, out_sharding=P(*tokens, w_out, unreduced=partial))
    return checkpoint_name(reshard(y, out), "matmul")


def _attend(compute: ComputeConfig, q, k, v, where: Where, cache: KVCache | None, layer):
    """The kernel on each device's own heads and queries.

    Keys of a sequence split over ``context`` are gathered.
    """

    def train(q, k, v, positions, kv_positions, segments, kv_segments, rope):
        offset = first_position(q.shape[1])
        if q.shape[1] == k.shape[1]:
            kv_segments = None  # the queries' own; some kernels can only do that
        return rotary_attention(
            q, k, v, positions, rope, kv_positions_BS=kv_positions, segment_ids_BT=segments,
            kv_segment_ids_BS=kv_segments, q_offset=offset, implementation=compute.attention,
        )  # fmt: skip

    act = compute.rules.activation
    positions, segments = where.positions_BT, where.segment_ids_BT
    if cache is not None:
        heads, stack = act("BTNH"), act("LBKSH")
        new = (q, k, v, cache.k_LBKSH, cache.v_LBKSH, layer, cache.lengths_B, where.rope)
        specs = (heads, act("BTKH"), act("BTKH"), stack, stack, P(), act("B"), P())
        out_specs = (heads, stack, stack)
        out, *stacks = _on_each_device(rotary_decode_attention, new, specs, out_specs)
        return out, cache._replace(k_LBKSH=stacks[0], v_LBKSH=stacks[1])
    args = (q, k, v, positions, positions, segments, segments, where.rope)
    BT, BS = compute.rules.activation_without_tensor("BT"), act("BS")
    in_specs = (act("BTNH"), act("BSKH"), act("BSKH"), BT, BS, BT, BS, P())
    return _on_each_device(train, args, in_specs, act("BTNH")), None


def _on_each_device(function, args, in_specs, out_specs):
    if no_mesh():
        return function(*args)
    args = [
        jax.tree.map(functools.partial(reshard, spec=spec), arg)
        for arg, spec in zip(args, in_specs, strict=True)
    ]
    # Kernels say nothing of what varies over which axis (check_vma), and every axis an output
    # varies over is in its spec.
    return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, check_vma=False)(*args)


def _remat(body, policy: str):
    if policy == "none":
        return body
    policies = {
        "full": None,
        # Products with weights are kept; attention's own are recomputed (the paper, section 2.4).
        "matmuls": jax.checkpoint_policies.save_only_these_names("matmul"),
    }
    return jax.checkpoint(body, policy=policies[policy], prevent_cse=False)


def unstack(tree_L: Any) -> list[Any]:
    """A tree of arrays stacked along L as one tree per layer."""
    leaves, treedef = jax.tree.flatten(tree_L)
    # `split` and not indexing: its gradient is one concatenation, not L sums of padded zeros.
    split = [jax.lax.split(w, [1] * w.shape[0]) for w in leaves]
    layers = zip(*split, strict=True)
    return [jax.tree.unflatten(treedef, [x.squeeze(0) for x in layer]) for layer in layers]
