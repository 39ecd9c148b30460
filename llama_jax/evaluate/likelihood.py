"""Log-probabilities of continuations, with every shared prefix computed once.

The inputs of all requests form a tree of segments (:mod:`prefix_tree`). A call of the model reads
one segment in each row of a batch: it copies the keys and values of the tokens before it from a
pool of caches, and keeps its own there if further segments follow.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from llama_jax.evaluate.prefix_tree import TARGETS_PER_POSITION, Segment, build_tree
from llama_jax.generate.decode import MAX_BATCH, Engine
from llama_jax.model.cache import KVCache
from llama_jax.model.params import merge
from llama_jax.model.sharding import no_mesh, reshard

LENGTHS = (8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
"""Lengths of the rows of a batch: a segment is padded to the next one."""
TOKENS_PER_CALL = 512
"""Largest number of tokens of a batch, with their padding."""
CACHE_LENS = tuple(256 * 4**i for i in range(10))
"""Positions of the caches; the memory of a cache is proportional to it."""
CACHE_POSITIONS = 16384
"""Positions of all rows of the pool, and of all rows of a batch."""
COPY_BLOCK = 64
"""Positions that are copied at a time."""
LOGITS_PER_CHUNK = 64
"""Positions whose logits are in memory at once."""


def score_continuations(
    engine: Engine, requests: Sequence[tuple[Sequence[int], Sequence[int]]]
) -> Iterator[tuple[int, float, bool]]:
    """Log p of each continuation given its context.

    Args:
      engine: the model.
      requests: (context, continuation), ids; neither is empty.

    Yields:
      (index of the request, sum of log p over the continuation in nats, whether every token of the
      continuation is the most likely one), in the order in which they are computed.

    Raises:
      ValueError: an empty context or continuation, an id that the model does not have, a request
        longer than the model's context, or logits that are not finite.
      MemoryError: the caches do not fit in memory with the weights.
    """
    for i, request in enumerate(requests):
        _check(engine, i, *request)
    rope_lengths = [_rope_length(engine, len(x) + len(y) - 1) for x, y in requests]
    segments = build_tree(requests, rope_lengths, LENGTHS[-1], TOKENS_PER_CALL)
    missing = [len(continuation) for _, continuation in requests]
    sums, greedy = [0.0] * len(requests), [True] * len(requests)
    for segment, scored in _read(engine, segments):
        for position, token, logprob, best in scored:
            for i in segment.targets[position][token]:
                if not np.isfinite(logprob):
                    raise ValueError(
                        f"request {i}: the model's logits after token {position + 1} are NaN or "
                        "infinite: its weights are damaged, or its dtype is too narrow for it"
                    )
                sums[i] += logprob
                greedy[i] &= best == token
                missing[i] -= 1
                if not missing[i]:
                    yield i, sums[i], greedy[i]


def _check(engine: Engine, i: int, context: Sequence[int], continuation: Sequence[int]) -> None:
    if not len(context) or not len(continuation):
        which = "continuation" if len(context) else "context"
        raise ValueError(f"request {i}: the {which} has no tokens")
    low, high = min(*context, *continuation), max(*context, *continuation)
    if low < 0 or high >= engine.cfg.vocab_size:
        raise ValueError(
            f"request {i}: id {low if low < 0 else high} is not in the model's vocabulary of "
            f"{engine.cfg.vocab_size}"
        )
    if (length := len(context) + len(continuation) - 1) > engine.cfg.context:
        raise ValueError(
            f"request {i}: {length} input tokens are more than the model's context of "
            f"{engine.cfg.context}: remove tokens at the start of the context"
        )


def _rope_length(engine: Engine, length: int) -> int:
    """The length for dynamic rotary frequencies; 0 if they do not depend on it."""
    rope = engine.cfg.rope
    original = rope.original_context or engine.cfg.context
    return length if rope.type == "dynamic" and length > original else 0


# The order of the segments ------------------------------------------------------------------------


def _read(engine: Engine, segments: list[Segment]) -> Iterator[tuple[Segment, list[tuple]]]:
    """Compute all segments; yields each with its (position, token, log p, most likely token)."""
    cache_len = {}
    # More than the context and a padded segment is never used.
    largest = -(-(engine.cfg.context + TOKENS_PER_CALL) // COPY_BLOCK) * COPY_BLOCK
    for root in (s for s in segments if s.parent is None):
        below = [root]
        for segment in below:
            below += segment.children
        positions = max(s.start + _row_length(s) for s in below)
        cache_len[root] = min(next(n for n in CACHE_LENS if n >= positions), largest)
    for n in sorted(set(cache_len.values()), reverse=True):
        roots = [root for root in cache_len if cache_len[root] == n]
        yield from _read_trees(engine, roots, n)


def _read_trees(
    engine: Engine, roots: list[Segment], cache_len: int
) -> Iterator[tuple[Segment, list[tuple]]]:
    caches = _Caches(engine, cache_len, max(2, *(root.num_caches for root in roots)))
    leaves: list[Segment] = []
    inner: dict[int, list[Segment]] = {}  # by depth
    add = lambda s: (inner.setdefault(s.depth, []) if s.children else leaves).append(s)
    for root in roots:
        add(root)
    order = lambda s: (s.rope_length, s.length)
    while leaves or any(inner.values()):
        # Inner segments first: a choice among many leaves finds some of similar length.
        ready = [inner[depth] for depth in sorted(inner, reverse=True) if inner[depth]]
        ready.append(leaves)
        for group in ready:
            group.sort(key=order)
        batches = [caches.choose(group) for group in ready]
        full = (i for i, (rows, T) in enumerate(batches) if rows and len(rows) == caches.batch(T))
        some = (i for i, (rows, _) in enumerate(batches) if rows)
        i = next(full, None)
        i = next(some) if i is None else i
        rows, T = batches[i]
        ready[i][:] = (segment for segment in ready[i] if segment not in rows)
        yield from zip(rows, caches.read(rows, T), strict=True)
        for segment in rows:
            for child in segment.children:
                add(child)


def _row_length(segment: Segment) -> int:
    """The tokens of a segment with padding."""
    return next(n for n in LENGTHS if n >= segment.length)


class _Batch(NamedTuple):
    """The rows of a call of the model."""

    tokens_BT: np.ndarray
    counts_B: np.ndarray
    """tokens that are not padding"""
    parents_B: np.ndarray
    """rows of the pool with the tokens before"""
    lengths_B: np.ndarray
    """number of tokens before"""
    rows_B: np.ndarray
    """rows of the pool that keep the result"""
    positions_P: np.ndarray
    """positions to score, indices of tokens_BT flattened"""
    targets_PN: np.ndarray
    """next tokens to score there"""
    num_kept: np.int32
    """number of rows to keep, all or none"""
    copied: np.int32
    """number of positions to copy from the pool"""
    rope_length: np.int32
    num_positions: np.int32


class _Caches:
    """The pool, whose rows are caches of segments with children, and the caches of a batch."""

    def __init__(self, engine: Engine, cache_len: int, min_rows: int):
        self.engine, self.cache_len = engine, cache_len
        rows = max(CACHE_POSITIONS // cache_len, min_rows)
        engine._check_memory(rows + self.batch(1), cache_len)
        self.pool = self._empty(rows, pool=True)
        self.free = list(range(rows))
        self.of_batch: dict[int, KVCache] = {}

    def _empty(self, rows: int, pool: bool = False) -> KVCache:
        compute, cfg = self.engine.compute, self.engine.cfg
        make = functools.partial(_empty_caches, compute, cfg, rows, self.cache_len, pool)
        return self.engine.run(f"caches {rows} x {self.cache_len}, {pool}", make, ())

    def batch(self, T: int) -> int:
        """Rows of a batch of this length, a power of two."""
        most = max(1, min(MAX_BATCH, TOKENS_PER_CALL // T, CACHE_POSITIONS // self.cache_len))
        return 1 << (most.bit_length() - 1)

    def choose(self, ready: list[Segment]) -> tuple[list[Segment], int]:
        """Rows for a batch out of sorted segments, the longest first, and their length."""
        T, free, positions = 0, len(self.free), TOKENS_PER_CALL
        rows: list[Segment] = []
        for segment in reversed(ready):
            replaces = segment.parent is not None and segment.parent.unread == 1
            if segment.num_caches > free + replaces:  # its tree could not be read to the end
                continue
            T = T or _row_length(segment)
            if rows and (len(rows) == self.batch(T) or segment.rope_length != rows[0].rope_length):
                break
            positions -= len(segment.positions())
            if positions < 0:
                break
            if segment.start + T <= self.cache_len:
                rows.append(segment)
                free -= bool(segment.children) and not replaces
        return rows, T

    def read(self, rows: list[Segment], T: int) -> list[list[tuple]]:
        """Compute a batch; returns (position, token, log p, most likely token) of each row."""
        batch = self._batch(rows, T)
        B = len(batch.counts_B)
        caches = self.of_batch.pop(B, None)
        caches = self._empty(B) if caches is None else caches
        args = (self.engine.params, self.pool, caches, batch)
        out = self.engine.run("score continuations", _score_program, args, donated=(1, 2))
        self.pool, self.of_batch[B], *scored = out
        logprobs, best = (x.tolist() for x in map(np.asarray, scored))
        made: list[list[tuple]] = [[] for _ in rows]
        p = 0
        for b, segment in enumerate(rows):
            for position, tokens in segment.positions():
                for token, logprob in zip(tokens, logprobs[p], strict=False):
                    made[b].append((position, token, logprob, best[p]))
                p += 1
        return made

    def _batch(self, rows: list[Segment], T: int) -> _Batch:
        B = self.batch(T)
        tokens_BT = np.zeros((B, T), np.int32)
        counts_B, parents_B, lengths_B, rows_B = np.zeros((4, B), np.int32)
        positions_P = np.zeros(TOKENS_PER_CALL, np.int32)
        targets_PN = np.zeros((TOKENS_PER_CALL, TARGETS_PER_POSITION), np.int32)
        p = 0
        for b, segment in enumerate(rows):
            tokens_BT[b, : segment.length] = segment.ids[segment.start : segment.end]
            counts_B[b], lengths_B[b] = segment.length, segment.start
            if (parent := segment.parent) is not None:
                parents_B[b] = parent.row
                parent.unread -= 1
                if not parent.unread:
                    self.free.append(parent.row)
            if segment.children:
                segment.row = rows_B[b] = self.free.pop()
            for position, tokens in segment.positions():
                positions_P[p] = b * T + position - segment.start
                targets_PN[p, : len(tokens)] = tokens
                p += 1
        kept = len(rows) if rows[0].children else 0
        numbers = map(np.int32, (kept, lengths_B.max(), max(rows[0].rope_length, 1), p))
        return _Batch(
            tokens_BT, counts_B, parents_B, lengths_B, rows_B, positions_P, targets_PN, *numbers
        )


# The compiled program -----------------------------------------------------------------------------


def _empty_caches(compute, cfg, rows: int, cache_len: int, pool: bool) -> KVCache:
    caches = KVCache.empty(cfg, rows, cache_len, compute.cache_dtype or compute.dtype)
    return caches.with_arrays(*_shard(compute, _arrays(caches), pool))


def _shard(compute, arrays: tuple, pool: bool) -> tuple:
    """Rows of a batch as the rules say; each device has all rows of the pool."""
    return jax.tree.map(lambda x: reshard(x, _spec(compute, x, pool)), arrays)


def _spec(compute, x: jax.Array, pool: bool) -> P:
    rows, *rest = compute.rules.activation("BKSH")
    return P(*(None, None if pool else rows, *rest)[: x.ndim])


def _score_program(graphdef, params, pool: KVCache, caches: KVCache, batch: _Batch):
    """The pool, the caches of the batch, log p [P, N] of targets, and the most likely ids [P]."""
    llama = merge(graphdef, params)
    caches = _copy_prefixes(llama.compute, pool, caches, batch)
    hidden_BTD, caches = llama.hidden(
        batch.tokens_BT, cache=caches, counts_B=batch.counts_B, rope_length=batch.rope_length
    )
    hidden_XD = reshard(hidden_BTD, P()).reshape(-1, hidden_BTD.shape[-1])
    C = min(LOGITS_PER_CHUNK, len(batch.positions_P))
    logprob_PN = jnp.zeros(batch.targets_PN.shape, jnp.float32)
    best_P = jnp.zeros(batch.positions_P.shape, jnp.int32)

    def score_chunk(i, scored):
        position_C = jax.lax.dynamic_slice_in_dim(batch.positions_P, i * C, C)
        target_CN = jax.lax.dynamic_slice_in_dim(batch.targets_PN, i * C, C)
        hidden_1CD = hidden_XD[position_C][None]
        hidden_1CD = reshard(hidden_1CD, llama.compute.rules.activation_without_tensor("BTD"))
        logits_CV = reshard(llama.logits(hidden_1CD), P())[0]
        logprob_CV = jax.nn.log_softmax(logits_CV, axis=-1)
        logprob_CN = jnp.take_along_axis(logprob_CV, target_CN, axis=-1)
        finite_C1 = jnp.all(jnp.isfinite(logits_CV), axis=-1, keepdims=True)
        new = jnp.where(finite_C1, logprob_CN, jnp.nan), jnp.argmax(logits_CV, axis=-1)
        put = lambda x, y: jax.lax.dynamic_update_slice_in_dim(x, y.astype(x.dtype), i * C, 0)
        return jax.tree.map(put, scored, new)

    chunks = (batch.num_positions + C - 1) // C
    scored = jax.lax.fori_loop(0, chunks, score_chunk, (logprob_PN, best_P))
    return _keep(llama.compute, pool, caches, batch), caches, *scored


def _arrays(cache: KVCache) -> tuple:
    """Those with positions as axis 3."""
    return cache.k_LBKSH, cache.v_LBKSH, cache.scales


def _copy_prefixes(compute, pool: KVCache, caches: KVCache, batch: _Batch) -> KVCache:
    """Copy the first positions of the parents' rows."""

    def copy(i, arrays):
        def block(new, old):
            part = jax.lax.dynamic_slice_in_dim(old, i * COPY_BLOCK, COPY_BLOCK, axis=3)
            if no_mesh():
                part = part[:, batch.parents_B]
            else:
                spec = _spec(compute, part, False)
                part = part.at[:, batch.parents_B].get(out_sharding=spec)
            return jax.lax.dynamic_update_slice_in_dim(new, part, i * COPY_BLOCK, axis=3)

        return jax.tree.map(block, arrays, _arrays(pool))

    blocks = (batch.copied + COPY_BLOCK - 1) // COPY_BLOCK
    k, v, scales = jax.lax.fori_loop(0, blocks, copy, _arrays(caches))
    return KVCache(k, v, jnp.asarray(batch.lengths_B), scales)


def _keep(compute, pool: KVCache, caches: KVCache, batch: _Batch) -> KVCache:
    """Copy the rows of a batch to the pool, one by one: XLA on CPU would copy it for a scatter."""

    def copy(b, arrays):
        def row(old, new):
            new = jax.lax.dynamic_slice_in_dim(new, b, 1, axis=1)
            return jax.lax.dynamic_update_slice_in_dim(old, new, batch.rows_B[b], axis=1)

        return jax.tree.map(row, arrays, new)

    new = _shard(compute, _arrays(caches), True)
    k, v, scales = jax.lax.fori_loop(0, batch.num_kept, copy, _arrays(pool))
    return KVCache(k, v, pool.lengths_B, scales)
