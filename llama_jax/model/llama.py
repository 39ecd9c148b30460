"""LLaMA in Flax NNX: the one forward pass for training, prefill and decoding.

RMSNorm before each sub-layer, SwiGLU, grouped-query attention with rotary embedding (arXiv
2302.13971, section 2.2). The parameters of the layers are stacked along L.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from llama_jax.config import ModelConfig
from llama_jax.model.cache import KVCache
from llama_jax.model.compute import ComputeConfig
from llama_jax.model.layers import one_block, unstack
from llama_jax.model.partial_sums import (
    Residual,
    add_and_norm,
    partial_products,
    use_partial_sums,
)
from llama_jax.model.projection import gather_once, project
from llama_jax.model.remat import checkpointed
from llama_jax.model.rope import rope_of
from llama_jax.model.sharding import (
    Rules,
    all_gather_columns,
    first_position,
    is_sharded,
    no_mesh,
    reshard,
)
from pallas_kernels import (
    Rope,
    dispatch,
    fused_decode_attention,
    rotary_attention,
    rotary_decode_attention,
)


class Rows(NamedTuple):
    """Rows of different lengths whose tokens pass through the layers one after the other.

    Only attention pads them to [B, T]; the matrix products compute no padding between rows.
    """

    token_BT: Any
    """int32, index of each token among all; any index for padding"""
    place_X: Any
    """int32, index of each token in ``token_BT`` flattened"""


class AttentionInputs(NamedTuple):
    """The inputs of attention that are the same for every layer."""

    rope: Rope
    positions_BT: jax.Array | None
    segment_ids_BT: jax.Array | None
    rows: Rows | None = None


class Attention(nnx.Module):
    """Grouped-query attention with rotary embedding, [B, T, D] -> [B, T, D]."""

    def __init__(self, cfg: ModelConfig, compute: ComputeConfig, init_std: float, rngs: nnx.Rngs):
        w = functools.partial(_weight, cfg, compute.rules, rngs)
        # Matrices with flattened heads: a TPU would pad separate axes N and H where H = 64 or N is
        # small, and transpose all of [D, N, H] before each product.
        self.q = w("DQ", init_std)
        self.k = w("DE", init_std)
        self.v = w("DE", init_std)
        self.o = w("QD", init_std / math.sqrt(2 * cfg.num_layers))
        self.compute, self.head_dim = compute, cfg.head_dim
        Q, E = cfg.shape("QE")
        self.bounds = Q, Q + E

    def __call__(self, x_BTD, attn_inputs: AttentionInputs, cache=None, layer=None):
        rows = attn_inputs.rows
        few = cache is not None and rows is None and use_partial_sums(x_BTD.shape[1])
        if few and hasattr(self, "qkv"):
            return self._partial(x_BTD, self.qkv, attn_inputs, cache, layer)
        q_BTNH, k_BTKH, v_BTKH = map(self._heads, self._qkv(x_BTD))
        if rows is not None:
            q_BTNH, k_BTKH, v_BTKH = (x[0][rows.token_BT] for x in (q_BTNH, k_BTKH, v_BTKH))
        out_BTNH, cache = _attend(self.compute, q_BTNH, k_BTKH, v_BTKH, attn_inputs, cache, layer)
        if rows is not None:
            out_BTNH = out_BTNH.reshape(1, -1, *out_BTNH.shape[2:])[:, rows.place_X]
        return project(self.compute, out_BTNH, self.o, "QD", "BTD", "o"), cache

    def _partial(self, x_BTD, qkv, attn_inputs: AttentionInputs, cache, layer):
        """The output as partial sums, [P, B, T, D]."""
        qkv_PBTQ = partial_products(x_BTD, qkv)
        out_BTNH, *arrays = fused_decode_attention(
            qkv_PBTQ.reshape(*qkv_PBTQ.shape[:3], -1, self.head_dim),
            cache.k_LBKSH, cache.v_LBKSH, layer, cache.lengths_B, attn_inputs.rope, x_BTD.dtype,
            scales=cache.scales, pages_BM=cache.pages_BM,
        )  # fmt: skip
        out_PBTD = partial_products(out_BTNH.reshape(*x_BTD.shape[:2], -1), self.o)
        return out_PBTD, cache.with_arrays(*arrays)

    def _qkv(self, x_BTD):
        if hasattr(self, "qkv"):  # fused by params.unstack_layers
            qkv = project(self.compute, x_BTD, self.qkv, "DQ", "BTQ")
            return jnp.split(qkv, self.bounds, axis=-1)
        for_q, for_k, for_v = dispatch.copies(x_BTD, 3)
        q_BTQ = project(self.compute, for_q, self.q, "DQ", "BTQ", "q")
        k_BTE = project(self.compute, for_k, self.k, "DE", "BTE", "k")
        v_BTE = project(self.compute, for_v, self.v, "DE", "BTE", "v")
        return q_BTQ, k_BTE, v_BTE

    def _heads(self, x_BTQ):
        shape = (*x_BTQ.shape[:2], -1, self.head_dim)
        if no_mesh():
            return x_BTQ.reshape(shape)
        return x_BTQ.reshape(shape, out_sharding=self.compute.rules.activation("BTNH"))


class MLP(nnx.Module):
    """SwiGLU, down(silu(gate(x)) * up(x)), arXiv 2002.05202."""

    def __init__(self, cfg: ModelConfig, compute: ComputeConfig, init_std: float, rngs: nnx.Rngs):
        w = functools.partial(_weight, cfg, compute.rules, rngs)
        self.gate = w("DF", init_std)
        self.up = w("DF", init_std)
        self.down = w("FD", init_std / math.sqrt(2 * cfg.num_layers))
        self.compute = compute

    def __call__(self, x_BTD, partial: bool = False):
        """[B, T, D]; with ``partial``, partial sums [P, B, T, D]."""
        if hasattr(self, "gate_up"):  # fused by params.unstack_layers
            gate_up = project(self.compute, x_BTD, self.gate_up, "DF", "BTF")
            gate_BTF, up_BTF = jnp.split(gate_up, 2, axis=-1)
        else:
            for_gate, for_up = dispatch.copies(x_BTD, 2)
            gate_BTF = project(self.compute, for_gate, self.gate, "DF", "BTF", "gate")
            up_BTF = project(self.compute, for_up, self.up, "DF", "BTF", "up")
        hidden_BTF = _swiglu(gate_BTF, up_BTF)
        if partial:
            return partial_products(hidden_BTF, self.down)
        return project(self.compute, hidden_BTF, self.down, "FD", "BTD", "down")


class Block(nnx.Module):
    """One layer: x = x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, cfg: ModelConfig, compute: ComputeConfig, init_std: float, rngs: nnx.Rngs):
        self.attention_norm = _weight(cfg, compute.rules, rngs, "D", None)
        self.attention = Attention(cfg, compute, init_std, rngs)
        self.mlp_norm = _weight(cfg, compute.rules, rngs, "D", None)
        self.mlp = MLP(cfg, compute, init_std, rngs)
        self.eps = cfg.norm_eps

    def __call__(self, x: Residual, attn_inputs: AttentionInputs, cache=None, layer=None):
        BTD = self.attention.compute.rules.activation_without_tensor("BTD")
        x_BTD, normed_BTD = add_and_norm(x, self.attention_norm[...], self.eps)
        out, cache = self.attention(reshard(normed_BTD, BTD), attn_inputs, cache, layer)
        partial = out.ndim == 4
        x = (x_BTD, out) if partial else x_BTD + out
        x_BTD, normed_BTD = add_and_norm(x, self.mlp_norm[...], self.eps)
        out = self.mlp(reshard(normed_BTD, BTD), partial)
        return (x_BTD, out) if partial else x_BTD + out, cache


class Llama(nnx.Module):
    """Embedding, L blocks, a final norm, and the output matrix (the embedding again when tied).

    Example:
      llama = Llama(MODELS["tiny"], ComputeConfig(jnp.dtype("float32")), nnx.Rngs(0))
      logits_BTV = llama(tokens_BT)
    """

    def __init__(
        self, cfg: ModelConfig, compute: ComputeConfig, rngs: nnx.Rngs, init_std: float = 0.02
    ):
        """Random float32 parameters.

        Args:
          cfg: the model.
          compute: how it is computed.
          rngs: random keys of the parameters.
          init_std: standard deviation of matrices; those that write to the residual stream get it
            divided by sqrt(2 * L).
        """
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
        """Logits [B, T, V] in float32; with a cache, (logits, cache). Arguments: :meth:`hidden`."""
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
        rows: Rows | None = None,
    ):
        """The last layer's output after the final norm.

        Args:
          tokens_BT: int32 token ids.
          positions_BT: int32 rotary positions. Default: from 0, or from the lengths of the cache.
          segment_ids_BT: int32; a token attends only to tokens with the same segment id.
          cache: keys and values of earlier positions; those of ``tokens_BT`` are appended. Excludes
            ``positions_BT`` and ``segment_ids_BT``. The caller ensures that ``lengths_B + T`` is at
            most the cache length, and T at most the length of a page. A cache that is donated or
            carried through a loop is updated in place.
          counts_B: int32, 0 to T, only with a cache: number of real tokens at the start of each
            row, which are added to its length. The rest is padding, whose outputs are
            undefined. Default: T.
          rope_length: int32 scalar, the sequence length for dynamic rotary frequencies; other types
            ignore it. Default: up to the last real token of ``tokens_BT``. Without a cache,
            padding at the end counts as real.
          rows: ``tokens_BT`` is [1, X], the tokens of the rows of the cache one after the other.
            Only with a cache, and on one device.

        Returns:
          [B, T, D] in the compute dtype; with a cache, that and the new cache.

        Raises:
          ValueError: positions or segment ids together with a cache, or ``counts_B`` without one.
        """
        if cache is not None and (positions_BT is not None or segment_ids_BT is not None):
            raise ValueError(
                "with a cache, positions follow from its lengths: "
                "pass neither positions_BT nor segment_ids_BT"
            )
        if cache is None and counts_B is not None:
            raise ValueError("counts_B requires a cache")
        B, T = tokens_BT.shape if rows is None else rows.token_BT.shape
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
        attn_inputs = AttentionInputs(rope_of(self.cfg, last), positions_BT, segment_ids_BT, rows)
        x_BTD = _embed(self.compute, self.embed[...], tokens_BT)
        x, cache = self._layers(x_BTD, attn_inputs, cache)
        if cache is not None:
            grown_B = cache.lengths_B + (T if counts_B is None else counts_B)
            cache = cache._replace(lengths_B=grown_B)
        _, x_BTD = add_and_norm(x, self.norm[...], self.cfg.norm_eps)
        x_BTD = reshard(x_BTD, self.compute.rules.activation_without_tensor("BTD"))
        return x_BTD if cache is None else (x_BTD, cache)

    def logits(self, x_BTD, unembed=None):
        """Product with the output matrix, [B, T, D] -> [B, T, V] in float32.

        ``unembed`` is the output matrix, :meth:`gathered_unembed` for several calls.
        """
        w = self._unembed() if unembed is None else unembed
        # float32: in bfloat16 the softmax over V would lose small probabilities.
        return project(self.compute, x_BTD, w, "DV", "BTV", out_dtype=jnp.float32)

    def gathered_unembed(self):
        """The output matrix, gathered over ``fsdp`` once for several calls of :meth:`logits`."""
        return gather_once(self.compute, self._unembed(), "DV")

    def _unembed(self):
        return jnp.swapaxes(self.embed[...], 0, 1) if self.cfg.tie_embeddings else self.unembed[...]

    def layers(self) -> list[Block]:
        """The L blocks, sliced from the stack where they are stacked."""
        if isinstance(self.blocks, nnx.List):
            return list(self.blocks)
        graphdef, state = nnx.split(self.blocks)
        return [nnx.merge(graphdef, layer) for layer in unstack(state)]

    def _layers(self, x_BTD, attn_inputs: AttentionInputs, cache: KVCache | None):
        def body(carry, block_and_index):
            x, cache = carry
            block, layer = block_and_index
            return block(x, attn_inputs, cache, layer), None

        body = checkpointed(body, self.compute.remat, self.compute.offload)
        L = self.cfg.num_layers
        unstacked = isinstance(self.blocks, nnx.List)
        one_device = unstacked and no_mesh() and not use_partial_sums(x_BTD.shape[1])
        if one_device and dispatch.platform() == "cpu":  # a GPU would wait for each choice
            block_of = one_block(self.layers())
            step = lambda carry, layer: body(carry, (block_of(layer), layer))
            carry, _ = jax.lax.scan(step, (x_BTD, cache), jnp.arange(L))
        elif self.compute.unroll or unstacked:
            body = body if cache is None else jax.jit(body)  # decoding: traced once for all layers
            carry = (x_BTD, cache)
            for i, block in enumerate(self.layers()):
                carry, _ = body(carry, (block, jnp.int32(i)))
        else:
            carry, _ = jax.lax.scan(body, (x_BTD, cache), (self.blocks, jnp.arange(L)))
        return carry


@jax.custom_vjp
def _swiglu(gate_BTF, up_BTF):
    return jax.nn.silu(gate_BTF) * up_BTF


def _swiglu_forward(gate_BTF, up_BTF):
    return dispatch.separate(_swiglu(gate_BTF, up_BTF)), (gate_BTF, up_BTF)


def _swiglu_backward(residuals, d_hidden_BTF):
    _, pull = jax.vjp(lambda gate, up: jax.nn.silu(gate) * up, *residuals)
    return dispatch.separate(pull(d_hidden_BTF))


_swiglu.defvjp(_swiglu_forward, _swiglu_backward)


def _weight(
    cfg: ModelConfig, rules: Rules, rngs: nnx.Rngs, letters: str, std: float | None
) -> nnx.Param:
    """A float32 weight: normal with standard deviation ``std``, ones (a norm's scale) for None."""
    shape = cfg.shape(letters)
    if std is None:
        value = jnp.ones(shape)
    else:
        value = std * jax.random.normal(rngs.params(), shape, jnp.float32)
    if no_mesh():
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


def _attend(
    compute: ComputeConfig, q, k, v, attn_inputs: AttentionInputs, cache: KVCache | None, layer
):
    """The attention kernel, on each device for its own heads and queries.

    Keys and values that are sharded over ``context`` are gathered.
    """

    def train(q, k, v, positions, kv_positions, segments, kv_segments, rope):
        offset = first_position(q.shape[1])
        if q.shape[1] == k.shape[1]:
            kv_segments = None  # equal to the queries' ids; some kernels support only that
        return rotary_attention(
            q, k, v, positions, rope, kv_positions_BS=kv_positions, segment_ids_BT=segments,
            kv_segment_ids_BS=kv_segments, q_offset=offset, implementation=compute.attention,
        )  # fmt: skip

    spec = compute.rules.activation
    rope, positions, segments, _ = attn_inputs
    if cache is not None:
        return _attend_to_cache(compute, q, k, v, rope, cache, layer)
    inputs = (q, k, v, positions, positions, segments, segments, rope)
    BT, BS = compute.rules.activation_without_tensor("BT"), spec("BS")
    in_specs = (spec("BTNH"), spec("BSKH"), spec("BSKH"), BT, BS, BT, BS, P())
    return _on_each_device(train, inputs, in_specs, spec("BTNH")), None


def _attend_to_cache(compute: ComputeConfig, q, k, v, rope, cache: KVCache, layer):
    """The decode kernel, on each device for its own heads and rows.

    With a paged cache, each device has all rows.
    """

    def decode(*args):
        return rotary_decode_attention(*args[:-1], pages_BM=args[-1])

    specs = cache.specs(compute.rules)
    heads = compute.rules.activation("BTNH")
    heads_of_all = heads if cache.pages_BM is None else P(None, *heads[1:])
    out, *arrays = _on_each_device(
        decode,
        (q, k, v, *cache[:2], layer, cache.lengths_B, rope, cache.scales, cache.pages_BM),
        (*[heads_of_all] * 3, *specs[:2], P(), specs.lengths_B, P(), specs.scales, P()),
        (heads_of_all, *specs[:2], *([] if cache.scales is None else [specs.scales])),
    )
    return reshard(out, heads), cache.with_arrays(*arrays)


def _on_each_device(function, args, in_specs, out_specs):
    if no_mesh():
        return function(*args)
    args = [
        jax.tree.map(functools.partial(reshard, spec=spec), arg)
        for arg, spec in zip(args, in_specs, strict=True)
    ]
    # Kernels do not declare over which mesh axes their outputs vary (check_vma); the out_specs do.
    return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, check_vma=False)(*args)
