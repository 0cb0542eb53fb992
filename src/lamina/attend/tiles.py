"""What FlexAttention is told of a pattern: which tiles of the scores it has to compute, and the predicate for one pair.

The pattern is first asked about whole tiles (`plan.states`); only tiles of which it cannot say "none" or "all" are
looked at pair by pair. So a mask costs what its pattern does, and never T * S, as with torch's `create_block_mask`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from lamina.attend.plan import alike, row_of, states, tiles
from lamina.attend.request import Request
from lamina.patterns import Pattern, Predicate, Span, allowed
from lamina.tokens import Tokens, plain

SIZE = 128
"""Queries, and keys, of a tile: what FlexAttention's kernels are tuned for."""
AT_ONCE = 2**24
"""Pairs that are looked at at once."""


@dataclass(frozen=True, eq=False)
class Tiled:
    """A block mask, and which keys nobody sees, (B or 1, 1, S, 1) bool; None where there are none."""

    mask: BlockMask
    blind: Tensor | None


def tiled(request: Request) -> Tiled:
    """That of the request: made once a pattern and forward, and where the tokens are plain, once a shape."""
    queries, keys, pattern, device = request.queries, request.keys, request.pattern, request.query.device
    if queries.span and keys.span and queries.marked is None and keys.marked is None:
        return _plain(pattern, queries.span, keys.span, device)
    name = ("tiles", pattern, id(queries), id(keys))
    if name not in request.memo:
        # The tokens are kept beside it: an id is only unique while its object lives.
        request.memo[name] = (_tiled(pattern, queries, keys, device), queries, keys)
    return request.memo[name][0]


@lru_cache(maxsize=64)
def _plain(pattern: Pattern, queries: Span, keys: Span, device: torch.device) -> Tiled:
    with torch.inference_mode(False):  # it may be made while generating, and used while training
        query, key = (plain(1, stop - start, start=start, device=device) for start, stop in (queries, keys))
        return _tiled(pattern, query, key, device)


def _tiled(pattern: Pattern, queries: Tokens, keys: Tokens, device: torch.device) -> Tiled:
    near = [_on(one, torch.device("cpu")) for one in (queries, keys)]  # to plan; tiles are few
    largest = max(int(one.position.amax()) for one in near)
    predicate = pattern.drawn(largest + 1, device)
    groups = alike(*near)
    if len(groups) == 1:
        queries, keys = row_of(queries, 0), row_of(keys, 0)
    batch = queries.position.shape[0]
    shape = (batch, *(-(-one.position.shape[1] // SIZE) for one in (queries, keys)))
    state = torch.zeros(shape, dtype=torch.int8, device=device)
    seen = torch.zeros(batch, keys.position.shape[1], dtype=torch.bool, device=device)
    for rows in groups:
        rows = rows if batch > 1 else [0]
        here = [row_of(one, rows[0]) for one in near]
        found = torch.cat([part for _, part in states(pattern, *(tiles(one, SIZE) for one in here))])
        state[rows], seen[rows] = _settled(predicate, row_of(queries, rows[0]), row_of(keys, rows[0]), found.to(device))
    mask = BlockMask.from_kv_blocks(
        *_listed(state == 1),
        *_listed(state == 2),
        BLOCK_SIZE=SIZE,
        mask_mod=_of_pair(predicate, queries, keys),
        seq_lengths=(queries.position.shape[1], keys.position.shape[1]),
    )
    return Tiled(mask, None if bool(seen.all()) else ~seen[:, None, :, None])


def _settled(predicate: Predicate, queries: Tokens, keys: Tokens, state: Tensor) -> tuple[Tensor, Tensor]:
    """(tiles, tiles): 0 none, 1 some, 2 every pair, of one row, and (S,): keys that somebody sees."""
    length, columns = queries.position.shape[1], keys.position.shape[1]
    # A tile that is cut off, or has a hole among its keys, is never whole.
    real = torch.nn.functional.pad(keys.real[0], (0, -columns % SIZE)).view(-1, SIZE)
    state[length // SIZE :].clamp_(max=1)
    state[:, ~real.all(dim=1)] = state[:, ~real.all(dim=1)].clamp(max=1)
    within = torch.arange(SIZE, device=state.device)
    seen = torch.zeros(columns, dtype=torch.bool, device=state.device)
    whole = (state == 2).any(dim=0).nonzero() * SIZE + within  # (tiles, SIZE)
    seen[whole] = True
    for some in (state == 1).nonzero().split(AT_ONCE // SIZE**2):
        query, key = some[:, :1] * SIZE + within, some[:, 1:] * SIZE + within  # (P, SIZE)
        inside = (query < length)[:, :, None] & (key < columns)[:, None, :]
        query, key = query.clamp(max=length - 1), key.clamp(max=columns - 1)
        mask = allowed(predicate, _at(queries, 0, query).query(), _at(keys, 0, key).key()) & inside  # (P, SIZE, SIZE)
        state[some[:, 0], some[:, 1]] = mask.any(2).any(1).to(torch.int8) + mask.all(2).all(1).to(torch.int8)
        seen[key[mask.any(dim=1)]] = True
    return state, seen


def _of_pair(predicate: Predicate, queries: Tokens, keys: Tokens) -> Callable[..., Tensor]:
    """The mask of one pair, by its row, head, query and key."""
    several = queries.position.shape[0] > 1

    def mask_mod(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        where = row if several else 0
        return allowed(predicate, _at(queries, where, query), _at(keys, where, key))

    return mask_mod


def _listed(which: Tensor) -> tuple[Tensor, Tensor]:
    """(B, tiles, tiles) bool -> how many tiles of keys each tile of queries has, and which ones, first."""
    order = which.to(torch.int8).argsort(dim=2, descending=True, stable=True)
    count, order = which.sum(dim=2).to(torch.int32), order.to(torch.int32)
    return count[:, None].contiguous(), order[:, None].contiguous()


def _at(tokens: Tokens, row: Tensor | int, index: Tensor) -> Tokens:
    marked = None if tokens.marked is None else tokens.marked[row, index]
    return Tokens(tokens.position[row, index], tokens.document[row, index], marked)


def _on(tokens: Tokens, device: torch.device) -> Tokens:
    marked = None if tokens.marked is None else tokens.marked.to(device)
    return Tokens(tokens.position.to(device), tokens.document.to(device), marked, tokens.span)
