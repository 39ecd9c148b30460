"""The compiled programs of sampling and the arrays that they update.

:class:`Engine` reads prompts into caches (prefill), puts them in the rows of a batch, and adds
tokens to all rows (decode). Array sizes are rounded up to a few values, and lengths, samplers and
limits are arguments: changing prompt length, temperature or the number of tokens does not trigger
recompilation.
"""

import contextlib
import copy
import functools
import os
import sys
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from llama_jax.config import ModelConfig
from llama_jax.generate.sampler import MAX_TOP_LOGPROBS, Settings, choose
from llama_jax.model.cache import KVCache, bytes_per_position
from llama_jax.model.llama import ComputeConfig
from llama_jax.model.params import Params, merge, structure
from llama_jax.model.quantize import bytes_of
from llama_jax.model.sharding import reshard, use_mesh

PREFILL_CHUNKS = (32, 256)
"""Prompt tokens per call of the model, padded: few for a chat message, many for a long prompt."""
FULL_CHUNK = 1024
"""Prompt tokens per call on TPU and GPU while the prompt has as many left. This is more than the
FLOPs per byte of memory bandwidth (h100 295, h200 206, v5p 166, v6e 560), so the products take
longer than reading the weights. Never padded, so caches need no more positions."""
DECODE_STEPS_PER_CALL = 32
"""Largest number of tokens per row before the host looks for stop strings and ended rows."""
MAX_BATCH = 32
"""Sequences decoded or texts scored at once; more than that are split into several batches."""


class Request(NamedTuple):
    """A prompt to continue."""

    ids: list[int]
    sample: int
    """number of this continuation among those of equal prompts; its key derives from it"""


class DecodeState(NamedTuple):
    """The state of decoding; one row per sequence."""

    cache: KVCache
    logits_BV: jax.Array
    """float32, of the next token"""
    in_context_BV: jax.Array
    """bool, tokens of the prompt and of the text so far"""
    keys_B: jax.Array
    done_B: jax.Array
    """bool, rows that have ended; their further tokens are ignored"""
    num_generated: jax.Array
    """int32 scalar, new tokens so far"""


class Drawn(NamedTuple):
    """Tokens of one call of :func:`decode`."""

    tokens_TB: Any
    """int32"""
    logprobs_TB: Any
    """float32, nats; zeros unless requested"""
    top_ids_TBN: Any
    """int32, the most likely tokens in order; N is 0 unless requested"""
    top_logprobs_TBN: Any
    """float32, nats"""


class Engine:
    """One model's weights and compiled programs.

    Example::

      engine = Engine(cfg, params, compute, mesh=None)
      state = engine.start([Request(ids, 0)], max_new_tokens=64, seed=0)
    """

    def __init__(
        self,
        cfg: ModelConfig,
        params: Params,
        compute: ComputeConfig,
        mesh: jax.sharding.Mesh | None,
    ):
        self.cfg, self.params, self.compute, self.mesh = cfg, params, compute, mesh
        self.weight_bytes = bytes_of(params)
        self._bytes_per_position = bytes_per_position(cfg, compute.cache_dtype or compute.dtype)
        self._compiled: dict[tuple, Any] = {}
        with use_mesh(mesh):
            self._graphdef = structure(cfg, compute, unstacked=0 in params["blocks"])

    def with_params(self, params: Params) -> "Engine":
        """An engine with other weights of the same structure, which shares compiled programs."""
        other = copy.copy(self)
        other.params, other.weight_bytes = params, bytes_of(params)
        return other

    def devices(self) -> list[jax.Device]:
        """The devices that hold the weights."""
        return jax.local_devices()[:1] if self.mesh is None else list(self.mesh.devices.flat)

    def empty_cache(self, positions: int) -> KVCache:
        """A cache of one row for at least ``positions`` positions."""
        cache_len = self._cache_len(positions)
        make = functools.partial(_empty_cache, self.compute, self.cfg, cache_len)
        return self.run(f"cache {cache_len}", make, ())

    def prefill(self, ids: Sequence[int], cache: KVCache) -> tuple[Any, KVCache]:
        """Read tokens into a cache of one row.

        Returns:
          Logits [V] of the token after the last one, and the cache.
        """
        done = 0
        logits_V = None
        while done < len(ids):
            size = self._chunk(len(ids) - done)
            part = list(ids[done : done + size])
            tokens_1T = np.zeros((1, size), np.int32)
            tokens_1T[0, : len(part)] = part
            remaining = np.int32(len(ids) - done)
            args = (self.params, tokens_1T, np.int32(len(part)), cache, remaining)
            logits_V, cache = self.run("prefill", prefill, args, donated=(3,))
            done += len(part)
        return logits_V, cache

    def _chunk(self, remaining: int) -> int:
        """Tokens of the next call of the model."""
        if remaining >= FULL_CHUNK and self.devices()[0].platform != "cpu":
            return FULL_CHUNK
        return next((c for c in PREFILL_CHUNKS if c >= remaining), PREFILL_CHUNKS[-1])

    def start(self, requests: Sequence[Request], max_new_tokens: int, seed: int) -> DecodeState:
        """Read each prompt on its own, and make a batch of them.

        Args:
          requests: the prompts.
          max_new_tokens: positions to reserve after each prompt.
          seed: equal seeds give equal samples.

        Raises:
          MemoryError: the caches do not fit in memory with the weights.
        """
        longest = max(len(r.ids) for r in requests)
        # The last chunk of a prompt is padded, and no sequence is longer than the context.
        positions = min(longest + max_new_tokens, self.cfg.context)
        positions = max(positions, longest + PREFILL_CHUNKS[-1])
        cache_len, rows = self._cache_len(positions), len(requests)
        self._check_memory(
            f"{rows} rows of {cache_len} positions",
            cache_len * (next_power_of_two(rows) + 1),  # one is being prefilled
        )

        def prefilled():
            before, result = None, None
            for ids, _ in requests:
                if ids != before:  # samples of one prompt share its prefill
                    before, result = ids, self.prefill(ids, self.empty_cache(positions))
                yield result

        return self.insert_all(requests, prefilled(), seed)

    def insert_all(
        self, requests: Sequence[Request], prefilled: Iterable[tuple[Any, KVCache]], seed: int
    ) -> DecodeState:
        """Put prefilled prompts (logits, cache) in the rows of a new batch.

        Args:
          requests: the prompts.
          prefilled: results of :meth:`prefill`, one per request.
          seed: equal seeds give equal samples.
        """
        batch = next_power_of_two(len(requests))
        root = jax.random.key(seed)
        state: Any = None  # its shapes follow those of the first row
        for b, ((ids, sample), row) in enumerate(zip(requests, prefilled, strict=True)):
            if state is None:
                make = functools.partial(_empty_state, self.compute, batch)
                state = self.run(f"rows {batch}", make, row)
            in_context_V = np.zeros(self.cfg.vocab_size, bool)
            in_context_V[ids] = True
            args = (state, np.int32(b), *row, in_context_V, jax.random.fold_in(root, sample))
            state = self.run("insert", insert, args, donated=(0,))
        return state

    def decode(
        self,
        state: DecodeState,
        settings: Settings,
        stop_ids: np.ndarray,
        count: int,
        logprobs: bool,
        top_logprobs: bool,
    ) -> tuple[DecodeState, Drawn]:
        """Run :func:`decode` with these arguments; its results as numpy arrays."""
        name, num_top = "decode", 0
        if top_logprobs:
            name, num_top = "decode with top_logprobs", min(MAX_TOP_LOGPROBS, self.cfg.vocab_size)
        args = (self.params, state, settings, stop_ids, np.int32(count), np.bool_(logprobs))
        program = functools.partial(decode, num_top=num_top)
        state, drawn = self.run(name, program, args, donated=(1,))
        return state, Drawn(*map(np.asarray, drawn))

    def run(self, name: str, function: Any, args: tuple, donated: tuple[int, ...] = ()) -> Any:
        """Call a compiled function, compiling it for new shapes.

        Args:
          name: of the program; those of the model get its structure as their first argument.
          function: pure.
          args: arrays, or trees of arrays.
          donated: positions in ``args`` whose memory the results reuse.
        """
        leaves, tree = jax.tree.flatten(args)
        key = (name, tree, *((x.shape, x.dtype) for x in leaves))
        with use_mesh(self.mesh):
            if key not in self._compiled:
                of_model = name.startswith(("prefill", "decode", "score"))
                with _compile_notice(name) if of_model else contextlib.nullcontext():
                    if of_model:
                        function = functools.partial(function, self._graphdef)
                    jitted = jax.jit(function, donate_argnums=donated)
                    self._compiled[key] = jitted.lower(*args).compile()
                    return self._compiled[key](*args)
            return self._compiled[key](*args)

    def _cache_len(self, positions: int) -> int:
        chunk = PREFILL_CHUNKS[-1]
        # More than the context and a padded chunk is never used.
        largest = -(-self.cfg.context // chunk) * chunk + chunk
        return min(max(next_power_of_two(positions), 2 * chunk), largest)

    def _check_memory(self, size: str, positions: int) -> None:
        """Raise MemoryError before allocating a cache that does not fit in memory with the weights.

        Args:
          size: of the cache, for the message.
          positions: of all rows.
        """
        caches = self._bytes_per_position * positions
        devices = self.devices()
        available = device_memory(devices[0], len(devices))
        if available is not None and (self.weight_bytes + caches) / len(devices) > available:
            gb = lambda x: f"{x / 1e9:.1f} GB"
            raise MemoryError(
                f"a cache of {size} takes {gb(caches / len(devices))} per device in addition to "
                f"{gb(self.weight_bytes / len(devices))} of weights, and "
                f"{devices[0].device_kind} has {gb(available)}: give fewer prompts at once, "
                'fewer new tokens, load with cache="int8" or quantize="int8", or with a mesh over '
                "more devices"
            )


def device_memory(device: jax.Device, num_devices: int = 1) -> float | None:
    """Bytes of memory for arrays on one device, if known; devices of a CPU share its memory."""
    if device.platform == "cpu" and hasattr(os, "sysconf"):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / num_devices
    return (device.memory_stats() or {}).get("bytes_limit")


def next_power_of_two(n: int) -> int:
    """The smallest power of two that is at least ``n``."""
    return 1 << max(n - 1, 0).bit_length()


@contextlib.contextmanager
def _compile_notice(name: str):
    """On a terminal, show that a program is being compiled, which takes seconds to minutes."""
    notice = f"compiling {name} ..." if sys.stderr.isatty() else ""
    print(notice, end="", file=sys.stderr, flush=True)
    try:
        yield
    finally:  # erase the notice alone: the line may hold a prompt
        erase = "\b" * len(notice) + "\033[K" if notice else ""
        print(erase, end="", file=sys.stderr, flush=True)


def prefill(
    graphdef: Any,
    params: Params,
    tokens_1T: jax.Array,
    count: jax.Array,
    cache: KVCache,
    remaining: jax.Array,
) -> tuple[jax.Array, KVCache]:
    """Read the first ``count`` tokens of ``tokens_1T`` into a cache of one row.

    Args:
      graphdef: structure of the model.
      params: its weights.
      tokens_1T: int32; those beyond ``count`` are padding.
      count: int32 scalar.
      cache: of one row.
      remaining: int32 scalar, tokens of the prompt from this chunk to its end. Dynamic rotary
        frequencies depend on the length of the whole prompt in each of its chunks.

    Returns:
      float32 logits [V] of the token after them, and the cache, whose length excludes padding.
    """
    llama = merge(graphdef, params)
    length = cache.lengths_B[0] + remaining
    hidden, cache = llama.hidden(tokens_1T, cache=cache, counts_B=count[None], rope_length=length)
    last = jax.lax.dynamic_slice_in_dim(hidden, count - 1, 1, axis=1)
    return reshard(llama.logits(last), P())[0, 0], cache


def decode(
    graphdef: Any,
    params: Params,
    state: DecodeState,
    settings: Settings,
    stop_ids: jax.Array,
    count: jax.Array,
    logprobs: jax.Array,
    num_top: int = 0,
) -> tuple[DecodeState, Drawn]:
    """Add up to ``count`` tokens to each row, fewer if all rows have ended.

    Args:
      graphdef: structure of the model.
      params: its weights.
      state: the batch.
      settings: the sampler.
      stop_ids: int32, ids that end a row, padded with -1.
      count: int32 scalar, at most DECODE_STEPS_PER_CALL.
      logprobs: bool scalar, whether to compute log p, a sum over the vocabulary per token.
      num_top: compute this many alternatives per token; static.

    Returns:
      The state, and what was drawn: arrays of DECODE_STEPS_PER_CALL steps.
    """
    llama = merge(graphdef, params)
    B = state.done_B.shape[0]

    def unfinished(carry):
        i, state, _ = carry
        return (i < count) & ~jnp.all(state.done_B)

    def step(carry):
        i, state, drawn = carry
        keys_B = jax.vmap(jax.random.fold_in, (0, None))(state.keys_B, state.num_generated)
        token_B = choose(state.logits_BV, state.in_context_BV, keys_B, settings)
        zeros_B = jnp.zeros(B, jnp.float32)
        logprob_B = jax.lax.cond(logprobs, _logprob, lambda *_: zeros_B, state.logits_BV, token_B)
        top = top_logprobs(state.logits_BV, num_top)
        done_B = state.done_B | jnp.any(token_B[:, None] == stop_ids, axis=-1)
        logits_BTV, cache = llama(token_B[:, None], cache=state.cache)
        # The cache of a row that has ended does not grow.
        lengths_B = jnp.where(done_B, state.cache.lengths_B, cache.lengths_B)
        state = DecodeState(
            cache._replace(lengths_B=lengths_B),
            reshard(logits_BTV[:, 0], P()),
            state.in_context_BV.at[jnp.arange(B), token_B].set(True),
            state.keys_B,
            done_B,
            state.num_generated + 1,
        )
        new = Drawn(token_B, logprob_B, *top)
        return i + 1, state, jax.tree.map(lambda all_T, x: all_T.at[i].set(x), drawn, new)

    zeros = lambda dtype, *shape: jnp.zeros((DECODE_STEPS_PER_CALL, B, *shape), dtype)
    top = zeros(jnp.int32, num_top), zeros(jnp.float32, num_top)
    drawn = Drawn(zeros(jnp.int32), zeros(jnp.float32), *top)
    _, state, drawn = jax.lax.while_loop(unfinished, step, (0, state, drawn))
    return state, drawn


def _logprob(logits_BV, token_B):
    picked_B = jnp.take_along_axis(logits_BV, token_B[:, None], axis=-1)[:, 0]
    return picked_B - jax.nn.logsumexp(logits_BV, axis=-1)


def top_logprobs(logits_BV: jax.Array, num_top: int) -> tuple[jax.Array, jax.Array]:
    """The most likely tokens of each row: int32 ids and float32 log p, both [B, num_top]."""
    if not num_top:
        return jnp.zeros((len(logits_BV), 0), jnp.int32), jnp.zeros((len(logits_BV), 0))
    top_BN, ids_BN = jax.lax.top_k(logits_BV, num_top)
    return ids_BN, top_BN - jax.nn.logsumexp(logits_BV, axis=-1, keepdims=True)


def _empty_cache(compute: ComputeConfig, cfg: ModelConfig, cache_len: int) -> KVCache:
    """A cache of one row."""
    dtype = compute.cache_dtype or compute.dtype
    return KVCache.empty(cfg, 1, cache_len, dtype).shard(compute.rules)


def _empty_state(
    compute: ComputeConfig, batch: int, logits_V: jax.Array, cache: KVCache
) -> DecodeState:
    """A batch of rows that have all ended, with the shapes of a prefilled prompt."""
    widen = lambda x: jnp.zeros((x.shape[0], batch, *x.shape[2:]), x.dtype)
    k, v, scales = jax.tree.map(widen, (cache.k_LBKSH, cache.v_LBKSH, cache.scales))
    caches = KVCache(k, v, jnp.zeros(batch, jnp.int32), scales)
    V = logits_V.shape[0]
    return DecodeState(
        caches.shard(compute.rules),
        jnp.zeros((batch, V), jnp.float32),
        jnp.zeros((batch, V), bool),
        jax.random.split(jax.random.key(0), batch),
        jnp.ones(batch, bool),
        jnp.int32(0),
    )


def insert(
    state: DecodeState,
    b: jax.Array,
    logits_V: jax.Array,
    cache: KVCache,
    in_context_V: jax.Array,
    key: jax.Array,
) -> DecodeState:
    """Put a prefilled prompt in row ``b``.

    Args:
      state: the batch.
      b: index of the row.
      logits_V: logits of the next token, float32.
      cache: of one row.
      in_context_V: bool, tokens of the prompt.
      key: random key of the row.
    """
    put = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=b, axis=1)
    lengths_B = state.cache.lengths_B.at[b].set(cache.lengths_B[0])
    arrays = [(x.k_LBKSH, x.v_LBKSH, x.scales) for x in (state.cache, cache)]
    k, v, scales = jax.tree.map(put, *arrays)
    return state._replace(
        cache=KVCache(k, v, lengths_B, scales),
        logits_BV=state.logits_BV.at[b].set(logits_V),
        in_context_BV=state.in_context_BV.at[b].set(in_context_V),
        keys_B=state.keys_B.at[b].set(key),
        done_B=state.done_B.at[b].set(False),
    )
