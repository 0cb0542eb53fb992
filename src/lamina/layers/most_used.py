"""The most-used memories of a Compressive Transformer (arXiv:1911.05507, section 3.1): of the `length` memories that a
segment pushes out, the length / rate that were attended to most are kept as they are.

How much a memory was used is the attention that it received, over all heads and all queries that had it as a memory.
Memories that leave together were read by the same queries, so sums are in the order of averages. Among equals the
earlier one is kept.

    length 4, size 4, rate 2: segment 0 is read by segment 1 and leaves when segment 2 begins; two of its four stay

Fused attention does not say what it gave to whom, so the probabilities of one segment after the other are computed
beside it: they depend on what was kept before. A cache holds the sums of what has not left yet, and the keys that were
kept: layers keep different ones, so they have no ledger in common.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lamina.attend import Request, weights
from lamina.cache.summed import SummedSlot
from lamina.errors import UnsupportedError
from lamina.layers.call import Call
from lamina.layers.recurrence import Kept
from lamina.layers.segments import Segments, segments
from lamina.patterns import Pattern, Retained, allowed
from lamina.tokens import HOLE, Tokens

if TYPE_CHECKING:
    from lamina.layers.compressive import CompressiveSpec


Asked = Callable[[Tensor, Tokens, Kept, Kept], Request]
"""What some queries (B, H, t, D) ask of keys and of compressed ones."""


class MostUsed(nn.Module):
    """Chooses what is kept of each segment. It has no parameters."""

    def __init__(self, spec: CompressiveSpec, earlier: Pattern) -> None:
        super().__init__()
        self.path = ""  # set by the model: the slot of the sums and of what was kept
        self.spec = spec
        self.earlier = earlier  # what a query has in its memory, not yet compressed

    def retained(self) -> Retained:
        """What a cache has to keep: a state. No keys go through its slot."""
        return Retained(self.spec.length, segment=self.spec.length, of="summed")

    @torch.no_grad()
    def forward(self, query: Tensor, keys: Kept, call: Call, asked: Asked) -> Kept:
        """What is kept when these queries (B, H, T, D) have been read, of all keys that there are."""
        length, rate = self.spec.length, self.spec.rate
        kept, used, left, slot = self._begun(query, keys, call)
        groups, asking = segments(keys.tokens, length, call.memo), segments(call.tokens, length, call.memo)
        ends = (groups.number + 1) * length
        index = groups.number[:, :, None].repeat(1, 1, length // rate).zero_()  # (B, count, length / rate)
        there = torch.zeros_like(index, dtype=torch.bool)
        spread, real = asking.laid_out(query), asking.there()
        place = torch.arange(length, device=index.device)
        for i in range(asking.count):  # each needs what the ones before have kept
            number, document = asking.number[:, i, None], asking.document[:, i, None]
            leaves = (groups.document == document) & (ends <= number * length - self.spec.size) & ~left
            best, found = _best(groups, used, length // rate)
            index, there = (torch.where(leaves[:, :, None], *both) for both in ((best, index), (found, there)))
            left = left | leaves
            position = torch.where(real[:, i], number * length + place, HOLE)
            queries = Tokens(position, document.expand_as(position))
            request = asked(spread[:, :, i], queries, keys, kept.beside(keys.at(index.flatten(1), there.flatten(1))))
            read = weights(request)[..., : used.shape[1]].sum(dim=1, dtype=used.dtype)  # (B, length, S)
            memory = allowed(self.earlier, queries.query(), keys.tokens.key())  # of none where there is no token
            used = used + torch.where(memory, read, 0.0).sum(dim=1)
        kept = kept.beside(keys.at(index.flatten(1), there.flatten(1)))
        if slot is not None:
            slot.state = self._ended(kept, used, keys.tokens, slot, call.tokens)
        return kept

    def _begun(self, query: Tensor, keys: Kept, call: Call) -> tuple[Kept, Tensor, Tensor, SummedSlot | None]:
        """What was kept before this forward, how much keys (B, S) were used, which of their segments (B, count) have
        left already, and the slot."""
        tokens = keys.tokens
        used = torch.zeros_like(tokens.position, dtype=torch.promote_types(query.dtype, torch.float32))
        groups = segments(tokens, self.spec.length, call.memo)
        none = torch.zeros_like(groups.number, dtype=torch.bool)
        first = torch.zeros_like(tokens.position[:, :1])
        nothing = keys.at(first, first > 0)
        if call.cache is None:
            return nothing, used, none, None
        slot = call.cache.slot(self.path)
        if not isinstance(slot, SummedSlot):
            raise UnsupportedError(f"{self.path} reads a text in order, and this rank has a part of it (context)")
        slot.extend(query[:, :1, :, :0], query[:, :1, :, :0], call.tokens)
        if not slot.state:
            return nothing, used, none, slot
        sums, latest, position, key, value, *inputs = slot.state
        held = slot.ledger.held
        mine = (tokens.document == held) & (tokens.position <= latest) & (tokens.position > latest - sums.shape[1])
        used = torch.where(mine, sums.gather(1, tokens.position % sums.shape[1]), 0.0)
        begin = latest // self.spec.length * self.spec.length  # of the segment that was read last
        left = (groups.document == held) & ((groups.number + 1) * self.spec.length <= begin - self.spec.size)
        kept = Kept(Tokens(position, held.expand_as(position)), key, value, inputs[0] if inputs else None)
        return kept, used, left, slot

    def _ended(self, kept: Kept, used: Tensor, keys: Tokens, slot: SummedSlot, queries: Tokens) -> tuple[Tensor, ...]:
        """The state of the document that goes on: sums by position, the last position, and what may still be read."""
        document, room = slot.ledger.document, self.spec.size + 2 * self.spec.length
        mine = queries.real & (queries.document == document)
        latest = torch.where(mine, queries.position, HOLE).amax(dim=1, keepdim=True)
        if slot.state:
            latest = torch.where(mine.any(dim=1, keepdim=True), latest, slot.state[1])
        live = keys.real & (keys.document == document) & (keys.position > latest - room)
        sums = used.new_zeros(used.shape[0], room + 1)
        sums = sums.scatter(1, torch.where(live, keys.position % room, room), used)[:, :room]
        live = kept.tokens.real & (kept.tokens.document == document)
        order = torch.where(live, kept.tokens.position, HOLE).argsort(dim=1, descending=True)[:, : self.spec.count]
        kept = kept.at(order, live.gather(1, order))
        return sums, latest, kept.tokens.position, *kept.parts()


def _best(groups: Segments, used: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """(B, groups, count): the columns that were used most in each segment, and whether there are so many."""
    column = torch.arange(used.shape[1], device=used.device).expand_as(used)
    laid = groups.laid_out(used[:, None, :, None])[:, 0, ..., 0]  # (B, groups, length)
    there = groups.there()
    best = laid.masked_fill(~there, -1.0).sort(dim=2, descending=True, stable=True).indices[..., :count]
    return groups.laid_out(column[:, None, :, None])[:, 0, ..., 0].gather(2, best), there.gather(2, best)
