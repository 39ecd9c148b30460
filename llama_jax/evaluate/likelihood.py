"""Log-probabilities of continuations, with every shared prefix computed once.

The inputs of all requests form a tree of segments (:mod:`prefix_tree`). A call of the model reads
one segment in each row of a batch. The keys and values of the tokens before it are in pages of the
cache that all segments share; only a page that a prefix does not fill is copied.
"""

import bisect
import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from llama_jax.evaluate.prefix_tree import TARGETS_PER_POSITION, Segment, build_tree
from llama_jax.generate.decode import MAX_BATCH, Engine, next_power_of_two
from llama_jax.model.cache import KVCache
from llama_jax.model.llama import Rows
from llama_jax.model.params import merge
from llama_jax.model.sharding import reshard

PAGE = 128
"""Positions of a page of the cache; longer sequences are read in several segments."""
LENGTHS = (8, 16, 24, 32, 48, 64, 96, 128)
"""Lengths of the rows of a batch: in attention, a segment is padded to the next one. On a mesh, it
is padded everywhere."""
TOKENS_PER_CALL = (64, 128, 256, 512)
"""Numbers of tokens of a batch: their sum is padded to the next one."""
SHORT = 512
"""Positions up to which attention takes little time, so that a batch may have empty rows."""
POSITIONS = 32768
"""Positions of the cache, if that is enough for every sequence."""
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
    if not len(requests):
        return
    rope_lengths = [_rope_length(engine, len(x) + len(y) - 1) for x, y in requests]
    segments = build_tree(requests, rope_lengths, PAGE, TOKENS_PER_CALL[-1])
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
    # Segments with children first, the deepest first, so that many leaves are left to fill up the
    # last batches.
    order = lambda s: (-s.depth if s.children else 1, -_row_length(s), -s.start)
    ready = sorted((segment for segment in segments if segment.parent is None), key=order)
    table = next_power_of_two(max(-(-segment.end // PAGE) for segment in segments))
    cache = _Cache(engine, max(segment.num_pages for segment in ready), table)
    while ready:
        rows, T = cache.choose(ready)
        chosen = set(map(id, rows))
        ready = [segment for segment in ready if id(segment) not in chosen]
        yield from zip(rows, cache.read(rows, T), strict=True)
        for child in (child for segment in rows for child in segment.children):
            bisect.insort(ready, child, key=order)


def _row_length(segment: Segment) -> int:
    """The tokens of a segment with padding."""
    return next(n for n in LENGTHS if n >= segment.length)


class _Batch(NamedTuple):
    """The rows of a call of the model."""

    tokens: np.ndarray
    """[1, X], those of all rows one after the other; on a mesh [B, T]"""
    rows: Rows | None
    """where they stand in the rows; None on a mesh"""
    counts_B: np.ndarray
    """tokens that are not padding"""
    lengths_B: np.ndarray
    """number of tokens before"""
    pages_BM: np.ndarray
    sources_B: np.ndarray
    """pages of the cache to copy first"""
    copies_B: np.ndarray
    """pages that they are copied to"""
    num_copied: np.int32
    positions_P: np.ndarray
    """positions to score, indices of ``tokens`` flattened"""
    targets_PN: np.ndarray
    """next tokens to score there"""
    num_positions: np.int32
    rope_length: np.int32


class _Cache:
    """Pages of keys and values.

    Args:
      engine: the model.
      min_pages: smallest number of pages.
      table: largest number of pages of a sequence.
    """

    def __init__(self, engine: Engine, min_pages: int, table: int):
        self.engine, self.table = engine, table
        num_pages = 1 + max(POSITIONS // PAGE, min_pages)  # page 0 belongs to no row
        engine._check_memory(f"{num_pages * PAGE} positions", num_pages * PAGE)
        make = functools.partial(_empty_pages, engine.compute, engine.cfg, num_pages)
        self.arrays = engine.run(f"{num_pages} pages", make, ())
        self.free = list(range(1, num_pages))
        self.uses = [0] * num_pages

    def most_rows(self, T: int) -> int:
        """Largest number of rows of a batch whose longest row has this length."""
        tokens = TOKENS_PER_CALL[-1]
        if self.engine.mesh is None:  # twice: most rows are shorter than the longest
            return 2 * tokens // T
        return min(MAX_BATCH, 1 << (tokens // T).bit_length() - 1)

    def num_rows(self, rows: list[Segment], T: int) -> int:
        """Rows of a batch with those that stay empty; few sizes, because each is compiled."""
        most = self.most_rows(T)
        if self.engine.mesh is not None or (self.table * PAGE <= SHORT and len(rows) > 1):
            return most
        return min(most, next_power_of_two(len(rows)))

    def choose(self, ready: list[Segment]) -> tuple[list[Segment], int]:
        """Rows for a batch, in the order of ``ready``, and their length.

        A segment is chosen only if the pages that are free then suffice for all below it. So the
        last one that was chosen can always be finished, and then the one before.
        """
        T, free, positions, tokens = 0, len(self.free), TOKENS_PER_CALL[-1], TOKENS_PER_CALL[-1]
        rows: list[Segment] = []
        for segment in ready:
            if segment.num_pages > free:
                continue
            T = T or _row_length(segment)
            if len(rows) == self.most_rows(T):
                break
            same = not rows or segment.rope_length == rows[0].rope_length
            fits = segment.length <= min(T, tokens) and len(segment.positions()) <= positions
            if same and fits:
                rows.append(segment)
                free -= segment.own_pages(PAGE)
                tokens -= segment.length
                positions -= len(segment.positions())
        return rows, T

    def read(self, rows: list[Segment], T: int) -> list[list[tuple]]:
        """Compute a batch; returns (position, token, log p, most likely token) of each row."""
        args = (self.engine.params, self.arrays, self._batch(rows, T))
        out = self.engine.run("score continuations", _score_program, args, donated=(1,))
        self.arrays, *scored = out
        logprobs, best = (x.tolist() for x in map(np.asarray, scored))
        made: list[list[tuple]] = [[] for _ in rows]
        p = 0
        for b, segment in enumerate(rows):
            for position, tokens in segment.positions():
                for token, logprob in zip(tokens, logprobs[p], strict=False):
                    made[b].append((position, token, logprob, best[p]))
                p += 1
            if not segment.children:
                self._release(segment)
            if (parent := segment.parent) is not None:
                parent.unread -= 1
                if not parent.unread:
                    self._release(parent)
        return made

    def _allocate(self, segment: Segment) -> tuple[int, int]:
        """Give a segment its pages; returns a page to copy and where to, or zeros."""
        full, partial = divmod(segment.start, PAGE)
        before = segment.parent.pages if segment.parent is not None else []
        own = [self.free.pop() for _ in range(segment.own_pages(PAGE))]
        segment.pages = [*before[:full], *own]
        for page in segment.pages:
            self.uses[page] += 1
        return (before[full], own[0]) if partial else (0, 0)

    def _release(self, segment: Segment) -> None:
        for page in segment.pages:
            self.uses[page] -= 1
            if not self.uses[page]:
                self.free.append(page)

    def _batch(self, rows: list[Segment], T: int) -> _Batch:
        B = self.num_rows(rows, T)
        counts_B, lengths_B, sources_B, copies_B = np.zeros((4, B), np.int32)
        pages_BM = np.zeros((B, self.table), np.int32)
        positions_P = np.zeros(TOKENS_PER_CALL[-1], np.int32)
        targets_PN = np.zeros((TOKENS_PER_CALL[-1], TARGETS_PER_POSITION), np.int32)
        tokens, places, first_B = self._places(rows, T)
        p = copied = 0
        for b, segment in enumerate(rows):
            X = first_B[b] + np.arange(segment.length)
            tokens.reshape(-1)[X] = segment.ids[segment.start : segment.end]
            counts_B[b], lengths_B[b] = segment.length, segment.start
            source, copy = self._allocate(segment)
            if copy:
                sources_B[copied], copies_B[copied] = source, copy
                copied += 1
            pages_BM[b, : len(segment.pages)] = segment.pages
            for position, targets in segment.positions():
                positions_P[p] = first_B[b] + position - segment.start
                targets_PN[p, : len(targets)] = targets
                p += 1
        return _Batch(
            tokens, places, counts_B, lengths_B, pages_BM, sources_B, copies_B, np.int32(copied),
            positions_P, targets_PN, np.int32(p), np.int32(max(rows[0].rope_length, 1)),
        )  # fmt: skip

    def _places(self, rows: list[Segment], T: int) -> tuple[np.ndarray, Rows | None, np.ndarray]:
        """Zeros for the tokens of a batch, where they stand in its rows, and the index of the
        first token of each row."""
        B, lengths = self.num_rows(rows, T), [segment.length for segment in rows]
        if self.engine.mesh is not None:
            return np.zeros((B, T), np.int32), None, T * np.arange(B)
        X = next(n for n in TOKENS_PER_CALL if n >= sum(lengths))
        first_B = np.cumsum([0, *lengths])
        token_BT, place_X = np.zeros((B, T), np.int32), np.zeros(X, np.int32)
        for b, length in enumerate(lengths):
            token_BT[b, :length] = first_B[b] + np.arange(length)
            place_X[token_BT[b, :length]] = b * T + np.arange(length)
        return np.zeros((1, X), np.int32), Rows(token_BT, place_X), first_B


# The compiled program -----------------------------------------------------------------------------


def _empty_pages(compute, cfg, num_pages: int) -> tuple:
    cache = KVCache.paged(cfg, num_pages, PAGE, 1, 1, compute.cache_dtype or compute.dtype)
    return _arrays(cache.shard(compute.rules))


def _score_program(graphdef, params, arrays: tuple, batch: _Batch):
    """The pages, log p [P, N] of targets, and the most likely ids [P]."""
    llama = merge(graphdef, params)
    k, v, scales = _copy_pages(arrays, batch)
    cache = KVCache(k, v, jnp.asarray(batch.lengths_B), scales, jnp.asarray(batch.pages_BM))
    hidden, cache = llama.hidden(
        batch.tokens, cache=cache, counts_B=batch.counts_B, rope_length=batch.rope_length,
        rows=batch.rows,
    )  # fmt: skip
    hidden_XD = reshard(hidden, P()).reshape(-1, hidden.shape[-1])
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
    return _arrays(cache), *scored


def _arrays(cache: KVCache) -> tuple:
    """Those with pages as axis 1."""
    return cache.k_LBKSH, cache.v_LBKSH, cache.scales


def _copy_pages(arrays: tuple, batch: _Batch) -> tuple:
    """Copy pages one by one: XLA on CPU would copy all of them for a scatter."""

    def copy(i, arrays):
        def page(x):
            source = jax.lax.dynamic_slice_in_dim(x, batch.sources_B[i], 1, axis=1)
            return jax.lax.dynamic_update_slice_in_dim(x, source, batch.copies_B[i], axis=1)

        return jax.tree.map(page, arrays)

    return jax.lax.fori_loop(0, batch.num_copied, copy, arrays)
