"""The compiled programs of a server and the arrays that they update.

There are two programs: one reads a chunk of one prompt, one adds a token to every active row. Their
shapes are constants of the server and never depend on the requests.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from llama_jax.config import ModelConfig
from llama_jax.generate.decode import Engine as Model
from llama_jax.generate.sampler import Adjustments, choose
from llama_jax.generate.warp import Settings
from llama_jax.model.cache import KVCache
from llama_jax.model.compute import ComputeConfig
from llama_jax.model.params import Params, merge
from llama_jax.model.sharding import reshard
from llama_jax.serve.request import Sampling
from llama_jax.serve.sampling import row_of
from llama_jax.serve.sizes import LOGPROB, TOP_LOGPROBS, Sizes
from pallas_kernels import dispatch

DETERMINISTIC: dict[str, bool | str] = {"xla_gpu_exclude_nondeterministic_ops": True}
"""Options of the compiler on a GPU, where the order of sums could change from call to call."""
SCORES_AT_ONCE = 32
"""Positions of a prompt whose logits are in memory together."""


class Rows(NamedTuple):
    """One entry per slot."""

    lengths_B: jax.Array
    """int32, positions in the cache"""
    tokens_B: jax.Array
    """int32, the last token that was drawn; it is not in the cache yet"""
    num_generated_B: jax.Array
    """int32"""
    keys_B: jax.Array
    in_context_BV: jax.Array
    """bool, tokens of the prompt and of the text so far"""
    counts_BV: jax.Array
    """int32, occurrences of each token in the new text"""
    settings: Settings
    adjustments: Adjustments


class State(NamedTuple):
    """All arrays that the programs update in place."""

    cache: KVCache
    """paged; its lengths and table are not used"""
    rows: Rows


class Programs:
    """Compiled programs of one server, for the base model and its adapters.

    Args:
      model: the base.
      sizes: the constants of the server.
    """

    def __init__(self, model: Model, sizes: Sizes):
        self.sizes, self._model = sizes, model
        self._compiled: dict[Any, tuple[Any, Any]] = {}
        no_mask_BW = np.full((sizes.slots, sizes.mask_words), -1, np.int32)
        self._no_mask_BW = jax.device_put(no_mask_BW)
        make = functools.partial(_empty_state, model.compute, model.cfg, sizes)
        self.state: State = jax.jit(make).lower().compile()()

    def compile(self, params: Params) -> "BoundPrograms":
        """The programs for these weights; weights of equal shapes share them."""
        leaves, tree = jax.tree.flatten(params)
        key = tree, tuple((x.shape, x.dtype, x.sharding) for x in leaves)
        if key not in self._compiled:
            words = lambda dtype, *shape: jax.ShapeDtypeStruct(
                (*shape, dtype.itemsize // 4), jnp.int32
            )
            sizes, graphdef = self.sizes, self._model._graphdef
            on_gpu = self._model.devices()[0].platform == "gpu"

            def program(function: Callable, *args: Any) -> Any:
                def of_leaves(leaves, state, *args):
                    llama = merge(graphdef, jax.tree.unflatten(tree, leaves))
                    return function(sizes, llama, state, *args)

                jitted = jax.jit(of_leaves, donate_argnums=1)
                lowered = jitted.lower(leaves, self.state, *args)
                return lowered.compile(compiler_options=DETERMINISTIC if on_gpu else None)

            self._compiled[key] = (
                program(prefill_chunk, words(sizes.chunk)),
                program(decode_step, words(sizes.row, sizes.slots), self._no_mask_BW),
            )
        return BoundPrograms(self, leaves, *self._compiled[key])


class BoundPrograms:
    """The programs with the weights of one model."""

    def __init__(self, programs: Programs, leaves: list[Any], prefill: Any, decode: Any):
        self._programs, self._leaves = programs, leaves
        self._prefill, self._decode = prefill, decode

    def prefill_chunk(self, chunk: np.ndarray) -> tuple[Any, Any]:
        """Start :func:`prefill_chunk`.

        Args:
          chunk: one number of :attr:`Sizes.chunk`. Its memory must not change.

        Returns:
          Arrays that :meth:`result` reads: of the token, and of the chunk's tokens.
        """
        programs = self._programs
        words = chunk.reshape(1).view(np.int32)
        programs.state, *out = self._prefill(self._leaves, programs.state, words)
        return tuple(out)

    def decode_step(self, rows_B: Any, mask_BW: np.ndarray | None = None) -> Any:
        """Start :func:`decode_step`.

        Args:
          rows_B: result of :meth:`rows`.
          mask_BW: bits of the ids that grammars allow. Its memory must not change.

        Returns:
          An array that :meth:`result` reads.
        """
        programs = self._programs
        mask_BW = programs._no_mask_BW if mask_BW is None else mask_BW
        programs.state, out = self._decode(self._leaves, programs.state, rows_B, mask_BW)
        return out

    def try_out(self) -> bytes:
        """Run both programs once, without effect on any request.

        Returns:
          What follows the token 0, with the bits of its log-probabilities: other weights, another
          machine or compiler give others.
        """
        sizes = self._programs.sizes
        chunk = np.zeros((), sizes.chunk)
        chunk["count"] = chunk["last"] = chunk["length"] = 1
        chunk["logprobs"] = TOP_LOGPROBS
        drawn, _ = self.prefill_chunk(chunk)
        self.result(self.decode_step(self.rows(np.zeros(sizes.slots, sizes.row))))
        return self.result(drawn).tobytes()

    def rows(self, rows_B: np.ndarray) -> Any:
        """Rows of :attr:`Sizes.row` on the device."""
        return jax.device_put(rows_B.view(np.int32).reshape(len(rows_B), -1).copy())

    def result(self, out: Any) -> np.ndarray:
        """A result as :attr:`Sizes.drawn`; waits until it is computed."""
        words = np.asarray(out)
        return words.view(self._programs.sizes.drawn).reshape(words.shape[:-1])


def prefill_chunk(sizes: Sizes, llama: Any, state: State, words: jax.Array) -> tuple:
    """Read a chunk of a prompt into the pages of its row; after the last one, draw a token.

    Returns:
      The state, the drawn token [X], and scores of the chunk's tokens [C, X], in the format of
      :attr:`Sizes.drawn`.
    """
    chunk = _unpack(sizes.chunk, words)
    slot, count = chunk["slot"], chunk["count"]
    cache = state.cache._replace(lengths_B=chunk["start"][None], pages_BM=chunk["pages"][None])
    hidden_1CD, cache = llama.hidden(
        chunk["tokens"][None], cache=cache, counts_B=count[None], rope_length=chunk["length"]
    )
    scores_CX = _score(sizes, llama, hidden_1CD, chunk)

    row_of_1 = lambda fields: fields(*(chunk[name][None] for name in fields._fields))
    settings, adjustments = row_of_1(Settings), row_of_1(Adjustments)
    key = jax.random.fold_in(jax.random.key(chunk["seed"]), chunk["index"])
    in_context_1V = _bits(chunk["context"], sizes.vocab_size)[None]
    counts_1V = jnp.zeros((1, sizes.vocab_size), jnp.int32)
    nothing_X = jnp.zeros(sizes.drawn.itemsize // 4, jnp.int32)

    def draw():
        last_11D = jax.lax.dynamic_slice_in_dim(hidden_1CD, count - 1, 1, axis=1)
        logits_1V = reshard(llama.logits(last_11D), P())[:, 0]
        key_1 = jax.random.fold_in(key, 0)[None]
        token_1 = choose(
            logits_1V, in_context_1V, key_1, settings, adjustments, counts_1V, chunk["mask"][None]
        )
        return _drawn(sizes, logits_1V, token_1, chunk["logprobs"][None])[0]

    drawn_X = jax.lax.cond(chunk["last"] != 0, draw, lambda: nothing_X)
    token = drawn_X[0]
    row = Rows(
        lengths_B=chunk["start"] + count,
        tokens_B=token,
        num_generated_B=jnp.int32(1),
        keys_B=key,
        in_context_BV=in_context_1V[0].at[token].set(True),
        counts_BV=counts_1V[0].at[token].set(1),
        settings=jax.tree.map(lambda x: x[0], settings),
        adjustments=jax.tree.map(lambda x: x[0], adjustments),
    )
    rows = jax.tree.map(lambda all_B, x: all_B.at[slot].set(x), state.rows, row)
    return State(_without_table(state, cache), rows), drawn_X, scores_CX


def decode_step(
    sizes: Sizes, llama: Any, state: State, words_BX: jax.Array, mask_BW: jax.Array
) -> tuple[State, jax.Array]:
    """Add a token to every active row; the others keep their state.

    Returns:
      The state, and the drawn tokens [B, X] in the format of :attr:`Sizes.drawn`.
    """
    args = _unpack(sizes.row, words_BX)
    rows = state.rows
    active_B = args["active"] != 0
    lengths_B = jnp.where(active_B, rows.lengths_B, 0)
    pages_BM = jnp.where(active_B[:, None], args["pages"], 0)
    cache = state.cache._replace(lengths_B=lengths_B, pages_BM=pages_BM)
    logits_BTV, cache = llama(rows.tokens_B[:, None], cache=cache)
    logits_BV = reshard(logits_BTV, P())[:, 0]
    keys_B = jax.vmap(jax.random.fold_in)(rows.keys_B, rows.num_generated_B)
    # Idle rows have the settings of their last requests; at temperature 0 they take little time.
    temperature_B = jnp.where(active_B, rows.settings.temperature, 0)
    settings = rows.settings._replace(temperature=temperature_B)
    token_B = choose(
        logits_BV, rows.in_context_BV, keys_B, settings, rows.adjustments, rows.counts_BV, mask_BW
    )
    drawn_BX = _drawn(sizes, logits_BV, token_B, jnp.where(active_B, args["logprobs"], 0))
    token_B = drawn_BX[:, 0]
    one_B = active_B.astype(jnp.int32)
    b = jnp.arange(sizes.slots)
    at = jnp.where(active_B, token_B, sizes.vocab_size)  # idle rows: beyond the array, dropped
    rows = rows._replace(
        lengths_B=rows.lengths_B + one_B,
        tokens_B=jnp.where(active_B, token_B, rows.tokens_B),
        num_generated_B=rows.num_generated_B + one_B,
        in_context_BV=rows.in_context_BV.at[b, at].set(True, mode="drop"),
        counts_BV=rows.counts_BV.at[b, at].add(1, mode="drop"),
    )
    return State(_without_table(state, cache), rows), drawn_BX


def _score(sizes: Sizes, llama: Any, hidden_1CD: jax.Array, chunk: dict) -> jax.Array:
    """Log p of the ids that follow the chunk's tokens, if wanted, [C, X]."""
    C = sizes.page
    part = math.gcd(C, SCORES_AT_ONCE)

    def score_part(args):
        hidden_RD, targets_R = args
        logits_RV = reshard(llama.logits(hidden_RD[None]), P())[0]
        return _with_logprobs(sizes, logits_RV, targets_R, jnp.full(part, chunk["scores"]))

    def score():
        hidden = reshard(hidden_1CD, P()).reshape(C // part, part, -1)
        parts = jax.lax.map(score_part, (hidden, chunk["targets"].reshape(-1, part)))
        return parts.reshape(C, -1)

    nothing = lambda: jnp.zeros((C, sizes.drawn.itemsize // 4), jnp.int32)
    return jax.lax.cond(chunk["scores"] != 0, score, nothing)


def _drawn(
    sizes: Sizes, logits_BV: jax.Array, token_B: jax.Array, wanted_B: jax.Array
) -> jax.Array:
    """Drawn tokens and their log-probabilities as far as wanted, [B, X]."""
    # On a CPU, the maximum of many rows leaves NaN out.
    finite_B = jnp.all(jnp.isfinite(logits_BV), axis=-1)
    args = logits_BV, jnp.where(finite_B, token_B, -1), wanted_B
    if dispatch.platform() != "cpu":
        return _with_logprobs(sizes, *args)
    # One row after the other: only the rows that want it take the time, and the bits of the
    # logarithms of a vector may depend on the place in it.
    one_row = lambda row: _with_logprobs(sizes, *(x[None] for x in row))[0]
    return jax.lax.map(one_row, args)


def _with_logprobs(
    sizes: Sizes, logits_BV: jax.Array, token_B: jax.Array, wanted_B: jax.Array
) -> jax.Array:
    """Tokens and their log-probabilities as far as wanted, in the format of :attr:`Sizes.drawn`."""
    B, N = len(token_B), sizes.num_top
    log_sum_B = jax.lax.cond(
        jnp.any(wanted_B >= LOGPROB),
        lambda: jax.nn.logsumexp(logits_BV, axis=-1),
        lambda: jnp.zeros(B),
    )
    top_BN, ids_BN = jax.lax.cond(
        jnp.any(wanted_B >= TOP_LOGPROBS),
        lambda: tuple(jax.lax.top_k(logits_BV, N)),
        lambda: (jnp.zeros((B, N)), jnp.zeros((B, N), jnp.int32)),
    )
    picked_B1 = jnp.take_along_axis(logits_BV, jnp.maximum(token_B, 0)[:, None], axis=-1)
    log_sum_B1 = log_sum_B[:, None]
    fields = token_B[:, None], picked_B1 - log_sum_B1, ids_BN, top_BN - log_sum_B1
    return jnp.concatenate([jax.lax.bitcast_convert_type(x, jnp.int32) for x in fields], axis=1)


def _unpack(dtype: np.dtype, words: jax.Array) -> dict[str, jax.Array]:
    """The fields of numbers [..., X] of a format whose fields have 4 bytes per number."""
    out = {}
    for name, (field, offset, *_) in (dtype.fields or {}).items():
        part = words[..., offset // 4 : (offset + field.itemsize) // 4]
        part = jax.lax.bitcast_convert_type(part, field.base)
        out[name] = part if field.shape else part[..., 0]
    return out


def _bits(words_W: jax.Array, size: int) -> jax.Array:
    """The first ``size`` bits of words, the lowest bit of each first, bool [size]."""
    return (((words_W[:, None] >> jnp.arange(32)) & 1) != 0).reshape(-1)[:size]


def _without_table(state: State, cache: KVCache) -> KVCache:
    """The new pages with the lengths and table of the state, which no program changes."""
    return state.cache.with_arrays(cache.k_LBKSH, cache.v_LBKSH, cache.scales)


def _empty_state(compute: ComputeConfig, cfg: ModelConfig, sizes: Sizes) -> State:
    B, V = sizes.slots, sizes.vocab_size
    dtype = compute.cache_dtype or compute.dtype
    cache = KVCache.paged(cfg, sizes.pages + 1, sizes.page, 1, 1, dtype)
    zeros = lambda dtype, *shape: jnp.zeros((B, *shape), dtype)
    integer, key = zeros(jnp.int32), jax.random.key(0)
    sampling = jax.tree.map(lambda x: zeros(x.dtype, *x.shape), row_of(Sampling(), V))
    rows = Rows(
        integer, integer, integer, jnp.broadcast_to(key, (B,)), zeros(bool, V),
        zeros(jnp.int32, V), *sampling,
    )  # fmt: skip
    return State(cache.shard(compute.rules), rows)
