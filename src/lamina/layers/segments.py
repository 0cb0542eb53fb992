"""Segments: the tokens of a block in groups of `length` positions of one document, for memories that go by segments.

Example, length 3, a row of two documents: positions 0 1 2 3 0 1 are the groups 0 0 0 1 2 2, at the places 0 1 2 0 0 1.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lamina.tokens import Tokens


@dataclass(frozen=True, eq=False)
class Segments:
    """Whose each token is. Groups are in order: by document, the one that ends last at the end, then by position."""

    group: Tensor  # (B, S): 0, ..., count - 1; `count` for holes
    place: Tensor  # (B, S): the position within the segment
    count: int  # of the row that has most
    length: int
    document: Tensor  # (B, count) of each group; where a row has fewer, that of no token
    number: Tensor  # (B, count): which segment of its document each group is

    def laid_out(self, x: Tensor, last: int | None = None) -> Tensor:
        """(B, G, S, D) -> (B, G, count, length, D): each token at its place, zeros where there is none.

        `last`: x holds that many last tokens only.
        """
        index = self._index(last)[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3])
        places = self.count * self.length
        out = x.new_zeros(x.shape[0], x.shape[1], places + 1, x.shape[3]).scatter(2, index, x)
        return out[:, :, :places].unflatten(2, (self.count, self.length))

    def there(self) -> Tensor:
        """(B, count, length) bool: where there is a token."""
        places = self.count * self.length
        out = torch.zeros((self.group.shape[0], places + 1), dtype=torch.bool, device=self.group.device)
        return out.scatter(1, self._index(), True)[:, :places].unflatten(1, (self.count, self.length))

    def in_order(self, x: Tensor, last: int | None = None) -> Tensor:
        """The inverse of `laid_out`: (B, G, count, length, D) -> (B, G, S, D); holes get what the last place has."""
        index = self._index(last).clamp(max=self.count * self.length - 1)
        return x.flatten(2, 3).gather(2, index[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[4]))

    def _index(self, last: int | None = None) -> Tensor:
        index = torch.where(self.group < self.count, self.group * self.length + self.place, self.count * self.length)
        return index if last is None else index[:, index.shape[1] - last :]


def segments(tokens: Tokens, length: int, memo: MutableMapping[Any, Any]) -> Segments:
    """The groups of tokens (B, S), computed once a forward."""
    name = ("segments", length, id(tokens))
    if name not in memo:
        memo[name] = (_segments(tokens, length), tokens)  # kept beside it: an id is only unique while its object lives
    return memo[name][0]


def _segments(tokens: Tokens, length: int) -> Segments:
    segment, place = tokens.position // length, tokens.position % length
    if tokens.span is not None:
        first, count = tokens.span[0] // length, (tokens.span[1] - 1) // length - tokens.span[0] // length + 1
        number = torch.arange(first, first + count, device=segment.device).expand(segment.shape[0], -1)
        return Segments(segment - first, place, count, length, tokens.document[:, :1].expand(-1, count), number)
    # Sorted by segment, then by document, then with the holes last, which have no group and would only cost one: stable
    # sorts, the least important first.
    order = segment.argsort(dim=1, stable=True)
    for key in (_ends(tokens.document), (~tokens.real).to(torch.int8)):
        order = order.gather(1, key.gather(1, order).argsort(dim=1, stable=True))
    real, document, ordered = (x.gather(1, order) for x in (tokens.real, tokens.document, segment))
    new = (document[:, 1:] != document[:, :-1]) | (ordered[:, 1:] != ordered[:, :-1])
    number = torch.nn.functional.pad(new, (1, 0), value=True).cumsum(1) - 1
    if segment.device.type == "meta":  # only counted: as many as a plain text has
        count = -(-segment.shape[1] // length)
    else:
        count = int(torch.where(real, number, 0).max()) + 1
    number = torch.where(real, number, count)
    group = torch.empty_like(number).scatter_(1, order, number)
    none = torch.iinfo(torch.int64).min
    documents = torch.full((group.shape[0], count + 1), none, dtype=torch.int64, device=group.device)
    documents = documents.scatter(1, group, tokens.document)[:, :count]
    numbers = torch.zeros((group.shape[0], count + 1), dtype=torch.int64, device=group.device)
    return Segments(group, place, count, length, documents, numbers.scatter(1, group, segment)[:, :count])


def _ends(document: Tensor) -> Tensor:
    """(B, S): the last column of each token's document."""
    order = document.argsort(dim=1, stable=True)
    ordered = document.gather(1, order)
    run = torch.nn.functional.pad(ordered[:, 1:] != ordered[:, :-1], (1, 0), value=True).cumsum(1) - 1
    last = torch.zeros_like(order).scatter_reduce(1, run, order, "amax")
    return torch.empty_like(order).scatter_(1, order, last.gather(1, run))
