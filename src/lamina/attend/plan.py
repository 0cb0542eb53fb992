"""What a pattern leaves to be computed: for each block of queries, the blocks of keys that it needs.

The pattern is asked of blocks (`Pattern.over`), never by name, so that tables of blocks cost (T / 128) * (S / 64) small
numbers and not T * S. Tokens are put in the order in which the pattern wants them (`Pattern.groups`): marked tokens
beside each other, or those of one residue. Padding and documents only change the tokens, and with them the blocks.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lamina.patterns import Extent, Pattern, allowed
from lamina.tokens import Tokens

QUERIES, KEYS = 128, 64
"""Tokens of a block, as fast as any on the CPU: with fewer, products are thin; with more, much is masked."""
AT_ONCE = 2**20
"""Pairs of blocks that are asked at once."""


@dataclass
class Step:
    """One block of queries: columns start..stop of the ordered queries, and runs of the ordered keys."""

    start: int
    stop: int
    runs: list[tuple[int, int, bool]]  # (start, stop, whether every pair is allowed) of the ordered keys, ascending
    masks: list[tuple[int, int, Tensor]] | None = None  # (first, last, 0 or -inf) of the gathered keys, once asked for
    blind: Tensor | None = None  # (K,) bool: gathered keys that no query of the block sees
    empty: Tensor | None = None  # (queries,) bool: queries that see nothing

    @property
    def keys(self) -> int:
        return sum(stop - start for start, stop, _ in self.runs)


@dataclass
class Part:
    """Rows of the batch that are alike, and the steps that serve them."""

    rows: list[int]
    queries: Tokens  # (1, T), in their order
    keys: Tokens  # (1, S)
    query_order: Tensor | None  # (T,) where to find them; None: as they lie
    key_order: Tensor | None
    steps: list[Step] = field(default_factory=list)

    def masked(self, step: Step, pattern: Pattern, dtype: torch.dtype) -> Step:
        """The step with its masks, which are made once a forward."""
        if step.masks is None:
            query = _slice(self.queries, step.start, step.stop).query()
            found, length = [], step.stop - step.start
            for start, stop, every in step.runs:
                mask = None
                if not every:
                    mask = allowed(pattern, query, _slice(self.keys, start, stop).key())[0].expand(length, stop - start)
                found.append((start, stop, mask))
            _settle(step, found, dtype)
        return step


def _settle(step: Step, found: list[tuple[int, int, Tensor | None]], dtype: torch.dtype) -> None:
    """Write down the runs and their masks: without what nobody sees at the ends, and with what nobody sees between."""
    length = step.stop - step.start
    seen = [torch.ones(b - a, dtype=torch.bool) if mask is None else mask.any(dim=0) for a, b, mask in found]
    step.runs, step.masks, blind = [], [], []
    sees = torch.zeros(length, dtype=torch.bool)
    at = 0
    for (start, stop, mask), some in zip(found, seen, strict=True):
        places = some.nonzero()[:, 0]
        if len(places) == 0:
            continue
        first, last = int(places[0]), int(places[-1]) + 1
        start, stop = start + first, start + last
        step.runs.append((start, stop, mask is None))
        blind.append(~some[first:last])
        if mask is not None:
            mask = mask[:, first:last]
            hidden = torch.zeros(mask.shape, dtype=dtype).masked_fill_(~mask, float("-inf"))
            step.masks.append((at, at + stop - start, hidden))
            if len(step.masks) == len(step.runs):
                sees |= mask.any(dim=1)
        at += stop - start
    unseen = torch.cat(blind) if blind else torch.zeros(0, dtype=torch.bool)
    step.blind = unseen if bool(unseen.any()) else None
    if len(step.masks) == len(step.runs) and not bool(sees.all()):
        step.empty = ~sees


@dataclass
class Plan:
    """All that is to be computed."""

    parts: list[Part]
    pairs: int  # scores of one head, all rows together


def plan(pattern: Pattern, queries: Tokens, keys: Tokens) -> Plan:
    """The plan of a pattern for tokens (B, T) and (B, S)."""
    parts, pairs = [], 0
    for rows in alike(queries, keys):
        part = _part(pattern, row_of(queries, rows[0]), row_of(keys, rows[0]), rows)
        pairs += len(rows) * sum((step.stop - step.start) * step.keys for step in part.steps)
        parts.append(part)
    return Plan(parts, pairs)


def alike(queries: Tokens, keys: Tokens) -> list[list[int]]:
    """Rows of the batch whose tokens are the same."""
    batch = queries.position.shape[0]
    both = (queries, keys) if keys is not queries else (queries,)
    if all(one.span is not None and one.marked is None for one in both):
        return [list(range(batch))]
    fields = [x for one in both for x in (one.position, one.document, one.marked) if x is not None]
    found: list[list[int]] = []
    for row in range(batch):
        for rows in found:
            if all(torch.equal(x[row], x[rows[0]]) for x in fields):
                rows.append(row)
                break
        else:
            found.append([row])
    return found


def row_of(tokens: Tokens, row: int) -> Tokens:
    marked = None if tokens.marked is None else tokens.marked[row : row + 1]
    return Tokens(tokens.position[row : row + 1], tokens.document[row : row + 1], marked, tokens.span)


def _slice(tokens: Tokens, start: int, stop: int) -> Tokens:
    marked = None if tokens.marked is None else tokens.marked[:, start:stop]
    return Tokens(tokens.position[:, start:stop], tokens.document[:, start:stop], marked)


@dataclass
class Blocks:
    """One row of tokens in order, and its blocks."""

    tokens: Tokens
    order: Tensor | None
    starts: list[int]
    stops: list[int]
    block: Tensor  # (T,): of each token

    def bound(self, value: Tensor, largest: bool) -> Tensor:
        """The smallest or largest of a block's values; where there are none, what bounds nothing."""
        limit = torch.iinfo(torch.int64)
        out = torch.full((len(self.starts),), limit.min // 4 if largest else limit.max // 4)
        return out.scatter_reduce(0, self.block, value, "amax" if largest else "amin")


def _blocks(pattern: Pattern, tokens: Tokens, size: int) -> Blocks:
    group = pattern.groups(tokens)
    order = None
    cut = torch.zeros(tokens.position.shape[1], dtype=torch.bool)
    if group is not None:
        order = group[0].argsort(stable=True)
        if bool((order[1:] > order[:-1]).all()):
            order = None
        else:
            marked = None if tokens.marked is None else tokens.marked[:, order]
            tokens = Tokens(tokens.position[:, order], tokens.document[:, order], marked)
        ordered = group[0] if order is None else group[0][order]
        cut[1:] |= ordered[1:] != ordered[:-1]
    if tokens.span is None:
        real, document = tokens.real[0], tokens.document[0]
        cut[1:] |= real[1:] != real[:-1]
        elsewhere = document[1:] != document[:-1]
        if int(elsewhere.sum()) * size <= 4 * len(document):  # many short documents are better read together
            cut[1:] |= elsewhere
    return _cut(tokens, order, [0, *cut.nonzero()[:, 0].tolist(), len(cut)], size)


def tiles(tokens: Tokens, size: int) -> Blocks:
    """One row of tokens as it lies, in blocks of that size, whatever is in them."""
    return _cut(tokens, None, [0, tokens.position.shape[1]], size)


def _cut(tokens: Tokens, order: Tensor | None, ends: list[int], size: int) -> Blocks:
    starts = [start for a, b in itertools.pairwise(ends) for start in range(a, b, size)]
    stops = [*starts[1:], ends[-1]]
    lengths = torch.tensor([b - a for a, b in zip(starts, stops, strict=True)])
    block = torch.repeat_interleave(torch.arange(len(starts)), lengths)
    return Blocks(tokens, order, starts, stops, block)


def _extent(blocks: Blocks, keys: bool) -> tuple[Extent, dict[str, Tensor]]:
    """What is known of each block, and of its documents and holes."""
    position, document = blocks.tokens.position[0], blocks.tokens.document[0]
    real = position >= 0
    counted = real if keys else torch.ones_like(real)
    limit = torch.iinfo(torch.int64).max // 4

    def bounds(value: Tensor) -> tuple[Tensor, Tensor]:
        low, high = torch.where(counted, value, limit), torch.where(counted, value, -limit)
        return blocks.bound(low, False), blocks.bound(high, True)

    first, last = bounds(position)
    marked = blocks.tokens.marked
    marks = torch.zeros_like(position) if marked is None else marked[0].to(torch.int64)
    low, high = bounds(marks)
    extent = Extent(
        first,
        last,
        residues=lambda modulus: bounds(position % modulus),
        has=lambda one: bounds((position == one).to(torch.int64))[1] > 0,
        some_marked=high > 0,
        all_marked=low > 0,
    )
    one, other = bounds(document)
    return extent, {"first": one, "last": other}  # of holes, which are blocks by themselves: bounds that meet nothing


def _part(pattern: Pattern, queries: Tokens, keys: Tokens, rows: list[int]) -> Part:
    query_blocks, key_blocks = _blocks(pattern, queries, QUERIES), _blocks(pattern, keys, KEYS)
    part = Part(rows, query_blocks.tokens, key_blocks.tokens, query_blocks.order, key_blocks.order)
    for number, runs in _needed(pattern, query_blocks, key_blocks):
        part.steps.append(Step(query_blocks.starts[number], query_blocks.stops[number], runs))
    return part


def _needed(
    pattern: Pattern, query_blocks: Blocks, key_blocks: Blocks
) -> Iterator[tuple[int, list[tuple[int, int, bool]]]]:
    """(number of a block of queries, its runs of keys) for each."""
    columns = len(key_blocks.starts)
    for begin, state in states(pattern, query_blocks, key_blocks):
        edge = torch.ones_like(state, dtype=torch.bool)
        edge[:, 1:] = state[:, 1:] != state[:, :-1]
        edges: list[list[tuple[int, int]]] = [[] for _ in range(state.shape[0])]
        at = edge.nonzero()
        for (row, column), what in zip(at.tolist(), state[at[:, 0], at[:, 1]].tolist(), strict=True):
            edges[row].append((column, what))
        for row, found in enumerate(edges):
            runs = []
            for (column, what), (after, _) in zip(found, [*found[1:], (columns, 0)], strict=True):
                if what:
                    runs.append((key_blocks.starts[column], key_blocks.stops[after - 1], what == 2))
            yield begin + row, runs


def states(pattern: Pattern, query_blocks: Blocks, key_blocks: Blocks) -> Iterator[tuple[int, Tensor]]:
    """Some blocks of queries at a time: the first one, and (blocks of queries, blocks of keys), what is allowed between
    them: 0 no pair, 1 perhaps some, 2 every one."""
    query, whose = _extent(query_blocks, False)
    key, theirs = _extent(key_blocks, True)
    chunk = max(1, AT_ONCE // max(len(key_blocks.starts), 1))
    for begin in range(0, len(query_blocks.starts), chunk):
        here = slice(begin, begin + chunk)
        some, every = pattern.over(_chosen(query, here), key)
        first, last = whose["first"][here, None], whose["last"][here, None]
        some = (first <= theirs["last"]) & (theirs["first"] <= last) & some
        same = (first == last) & (theirs["first"] == theirs["last"]) & (first == theirs["first"])
        every = some & same & every
        yield begin, some.to(torch.int8) + every.to(torch.int8)


def _chosen(extent: Extent, here: slice) -> Extent:
    """Some blocks of queries, to be compared with all blocks of keys."""

    def residues(modulus: int) -> tuple[Tensor, Tensor]:
        low, high = extent.residues(modulus)
        return low[here, None], high[here, None]

    parts = (extent.first, extent.last, extent.some_marked, extent.all_marked)
    first, last, some, every = (x[here, None] for x in parts)
    return Extent(first, last, residues, lambda position: extent.has(position)[here, None], some, every)
