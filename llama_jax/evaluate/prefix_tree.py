"""Token sequences as a tree of segments, in which a prefix that sequences share occurs once."""

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np

MIN_SHARED = 8
"""Shortest prefix, in tokens, that is read once; shorter ones are read again, which takes less time
than another segment and the copy of a page."""
TARGETS_PER_POSITION = 8
"""Largest number of next tokens that are scored with one computation of the logits."""


@dataclasses.dataclass(eq=False)
class Segment:
    """Tokens ``ids[start:end]``, read after those of the parents, which are ``ids[:start]``."""

    ids: Sequence[int]
    start: int
    end: int
    parent: "Segment | None"
    rope_length: int
    """length for dynamic rotary frequencies; 0 if they do not depend on it"""
    targets: dict[int, dict[int, list[int]]] = dataclasses.field(default_factory=dict)
    """position -> next token to score there -> requests that contain it"""
    children: "list[Segment]" = dataclasses.field(default_factory=list)
    num_pages: int = 0
    """pages that suffice to read this segment and, one after the other, those below"""
    pages: list[int] = dataclasses.field(default_factory=list)
    """those with the positions before ``end``, in order, once it has been read"""
    unread: int = 0
    """children that have not been read"""

    @property
    def length(self) -> int:
        return self.end - self.start

    def own_pages(self, page: int) -> int:
        """Number of pages to which it writes; the first one may begin with tokens of its parent."""
        return -(-self.end // page) - self.start // page

    @functools.cached_property
    def depth(self) -> int:
        """Number of parents."""
        return 0 if self.parent is None else 1 + self.parent.depth

    def positions(self) -> list[tuple[int, list[int]]]:
        """(position, at most TARGETS_PER_POSITION next tokens), for each computation of logits."""
        size = TARGETS_PER_POSITION
        return [
            (position, tokens[i : i + size])
            for position, by_token in self.targets.items()
            for tokens in [list(by_token)]
            for i in range(0, len(tokens), size)
        ]


def build_tree(
    requests: Sequence[tuple[Sequence[int], Sequence[int]]],
    rope_lengths: Sequence[int],
    page: int,
    max_positions: int,
) -> list[Segment]:
    """The segments whose computation scores every continuation, parents before children.

    Args:
      requests: (context, continuation), ids.
      rope_lengths: of each request; requests with different ones share no segment.
      page: positions of a page of the cache, and most tokens of a segment.
      max_positions: most computations of logits in a segment, at least ``page``.
    """
    by_inputs: dict[tuple, list[int]] = {}
    for i, (context, continuation) in enumerate(requests):
        inputs = (*context, *continuation[:-1])
        by_inputs.setdefault((rope_lengths[i], inputs), []).append(i)
    out: list[Segment] = []
    keys = sorted(by_inputs)
    for rope_length in sorted(set(rope_lengths)):
        sequences = [inputs for length, inputs in keys if length == rope_length]
        segments, last = _segments(sequences, rope_length, page)
        for inputs, segment in zip(sequences, last, strict=True):
            for i in by_inputs[rope_length, inputs]:
                _add_targets(segment, i, *requests[i])
        out += segments
    out += [copy for segment in out for copy in _split_targets(segment, max_positions)]
    for segment in out:
        if segment.parent is not None:
            segment.parent.children.append(segment)
    for segment in sorted(out, key=lambda s: -s.end):
        segment.unread = len(segment.children)
        below = max((child.num_pages for child in segment.children), default=0)
        segment.num_pages = segment.own_pages(page) + below
    return out


def _segments(
    sequences: list[tuple[int, ...]], rope_length: int, max_length: int
) -> tuple[list[Segment], list[Segment]]:
    """The segments of sorted sequences, and the last segment of each sequence."""
    arrays = [np.asarray(ids) for ids in sequences]
    common = np.zeros(len(arrays), np.int64)  # length of the prefix shared with the sequence before
    for i in range(1, len(arrays)):
        n = min(len(arrays[i - 1]), len(arrays[i]))
        differ = np.flatnonzero(arrays[i - 1][:n] != arrays[i][:n])
        common[i] = differ[0] if len(differ) else n
    out: list[Segment] = []
    last: dict[int, Segment] = {}

    def chain(i: int, start: int, end: int, parent: Segment | None) -> Segment:
        for first in range(start, end, max_length):
            stop = min(first + max_length, end)
            parent = Segment(sequences[i], first, stop, parent, rope_length)
            out.append(parent)
        assert parent is not None
        return parent

    groups: list[tuple[int, int, int, Segment | None]] = [(0, len(sequences), 0, None)]
    while groups:  # sequences [low, high) share `start` tokens, which `parent` and its parents read
        low, high, start, parent = groups.pop()
        shared = len(sequences[low]) if high - low == 1 else int(common[low + 1 : high].min())
        ends_here = len(sequences[low]) == shared
        if high - low == 1 or shared - start >= MIN_SHARED:
            parent = chain(low, start, shared, parent)
            start = shared
        if ends_here and start < shared:
            last[low] = chain(low, start, shared, parent)
        elif ends_here and parent is not None:
            last[low] = parent
        cuts = [low + 1 + int(i) for i in np.flatnonzero(common[low + 1 : high] == shared)]
        bounds = [low, *cuts, high]
        for a, b in zip(bounds[ends_here:-1], bounds[ends_here + 1 :], strict=True):
            groups.append((a, b, start, parent))
    return out, [last[i] for i in range(len(sequences))]


def _add_targets(segment: Segment, i: int, context: Sequence[int], continuation: Sequence[int]):
    """Add the tokens of a continuation to the segments of the positions before them."""
    at: Segment | None = segment
    for offset in reversed(range(len(continuation))):
        position = len(context) - 1 + offset
        while at is not None and position < at.start:
            at = at.parent
        assert at is not None
        at.targets.setdefault(position, {}).setdefault(continuation[offset], []).append(i)


def _split_targets(segment: Segment, max_positions: int) -> list[Segment]:
    """Leave at most ``max_positions`` computations of logits; copies of the segment do the rest."""
    positions = segment.positions()
    if len(positions) <= max_positions:
        return []
    whole, copies = segment.targets, []
    for first in range(0, len(positions), max_positions):
        part: dict[int, dict[int, list[int]]] = {}
        for position, tokens in positions[first : first + max_positions]:
            part.setdefault(position, {}).update({t: whole[position][t] for t in tokens})
        if first:
            copies.append(dataclasses.replace(segment, targets=part, children=[]))
        else:
            segment.targets = part
    return copies
