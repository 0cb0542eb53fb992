"""Infini-attention: all segments before a token's own, summed up in one matrix a head (arXiv:2404.07143, section 2.1).

    phi(x) = elu(x) + 1
    A = phi(q) M / (phi(q) z),  of M and z before the token's segment     read, and only then:
    M <- M + phi(K)^T V,        z <- z + sum_t phi(k_t)                    linear
    M <- M + phi(K)^T (V - phi(K) M / (phi(K) z))                          delta
    y = local + g (A - local),  g = sigmoid(b) for each head

Queries and keys of the memory have no rotary phases (section 2.2.1: it holds what is global). The published layer is

    MemoryAttentionSpec(
        attention=AttentionSpec(..., pattern=Causal() & BlockWindow(size=2048, back=1)),
        memory=InfiniSpec(length=2048),
    )

whose own attention sees the token's segment. The state is float32 or wider. It is D (D + 1) numbers for each key head,
however long the text; key heads that several query heads share have one memory. In the first segment of a document the
equations say 0 / 0: there y = local.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lamina.cache.summed import SummedSlot
from lamina.errors import LaminaError, UnsupportedError
from lamina.layers.attention import AttentionSpec
from lamina.layers.call import Call
from lamina.layers.gated_memory import GatedMemory, GateKind
from lamina.layers.segments import Segments, segments
from lamina.patterns import Retained
from lamina.specs import Spec
from lamina.tokens import Tokens


@dataclass(frozen=True, kw_only=True)
class InfiniSpec(Spec):
    """A memory of all earlier segments of a document, of fixed size."""

    length: int  # of a segment, in positions: 2048
    update: Literal["linear", "delta"] = "linear"  # delta adds only what the memory does not give back already
    gate: GateKind = "sigmoid"  # "zero": exact when added to a trained model

    def check(self) -> None:
        if self.length < 1:
            raise LaminaError(f"InfiniSpec.length is {self.length}; it must be at least 1")

    def build(self, attention: AttentionSpec) -> Infini:
        return Infini(self, attention.heads)


class Infini(GatedMemory):
    """(B, H, T, D) of the local attention -> the same with the memory mixed in."""

    def __init__(self, spec: InfiniSpec, heads: int) -> None:
        super().__init__(spec.gate, heads)
        self.spec = spec

    def retained(self) -> Retained:
        """What a cache has to keep for the memory."""
        return Retained(self.spec.length, segment=self.spec.length, of="summed")

    def forward(self, local: Tensor, query: Tensor, key: Tensor, value: Tensor, call: Call) -> Tensor:
        """local, query (B, H, T, D), key and value (B, G, T, D), without rotary phases."""
        slot = None if call.cache is None else call.cache.slot(self.path)
        tokens, state = call.tokens, None
        if slot is not None:
            if not isinstance(slot, SummedSlot):
                raise UnsupportedError(f"{self.path} reads a text in order, and this rank has a part of it (context)")
            key, value, tokens = slot.extend(key, value, call.tokens)
            state = slot.state or None
        groups = segments(tokens, self.spec.length, call.memo)
        wide = torch.promote_types(query.dtype, torch.float32)
        query, key, value = (part.to(wide) for part in (query, key, value))
        held = None if slot is None else groups.document == slot.ledger.held
        before = self._before(groups, key, value, state, held)
        if slot is not None:
            slot.state = _at(before, _last(groups, tokens))
        found, some = _read(groups, query, before)
        return self.mix(local, found.to(local.dtype), some)

    def _before(
        self, groups: Segments, key: Tensor, value: Tensor, state: tuple[Tensor, ...] | None, held: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """M (B, G, count, D, V) and z (B, G, count, D) as each segment finds them."""
        batch, heads, _, size = key.shape
        if state is None or held is None:
            empty = key.new_zeros(batch, heads, 1, size, value.shape[-1]), key.new_zeros(batch, heads, 1, size)
            matrix, total = (x.expand(-1, -1, groups.count, *x.shape[3:]) for x in empty)
        else:
            mine = held[:, None, :, None]
            total = torch.where(mine, state[1][:, :, None], 0.0)
            matrix = torch.where(mine[..., None], state[0][:, :, None], 0.0)
        if groups.count == 1:
            return matrix, total  # no segment is over: nothing is added
        there = groups.there()[:, None, :, :, None]
        key = torch.where(there, phi(groups.laid_out(key)), 0.0)  # (B, G, count, length, D)
        value = groups.laid_out(value)
        same = groups.document[:, :, None] == groups.document[:, None, :]
        earlier = (same.tril(-1))[:, None].to(key.dtype)  # (B, 1, count, count): segments that count for each
        sums = key.sum(dim=3)
        total = total + earlier @ sums
        if self.spec.update == "linear":
            added = key.mT @ value  # (B, G, count, D, V)
            return matrix + (earlier @ added.flatten(3)).view_as(added), total
        found = [matrix[:, :, 0]]
        for i in range(1, groups.count):  # each segment needs what the one before left
            past, one = found[-1], key[:, :, i - 1]
            known, _ = _divided(one @ past, (one @ total[:, :, i - 1, :, None])[..., 0])
            past = past + one.mT @ (value[:, :, i - 1] - known)
            found.append(torch.where(same[:, i, i - 1, None, None, None], past, matrix[:, :, i]))
        return torch.stack(found, dim=2), total


def phi(x: Tensor) -> Tensor:
    """elu(x) + 1, as x + 1 above 0 and exp(x) below: nothing is lost to the sum with 1."""
    return x.clamp(min=0) + x.clamp(max=0).exp()


def _divided(numerator: Tensor, denominator: Tensor) -> tuple[Tensor, Tensor]:
    """(..., D) by (...), 0 where that is 0; and where it is not, (..., 1)."""
    some = (denominator > 0)[..., None]
    return torch.where(some, numerator / torch.where(some, denominator[..., None], 1.0), 0.0), some


def _read(groups: Segments, query: Tensor, before: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """phi(q) M / (phi(q) z) (B, H, T, V), and whether there was anything to read (B, H, T, 1)."""
    matrix, total = before
    batch, heads, length, size = query.shape
    query = phi(query).view(batch, matrix.shape[1], -1, length, size)  # (B, G, R, T, D)
    if groups.count == 1:
        spread = query.flatten(2, 3)[:, :, None]
    else:
        spread = groups.laid_out(query.flatten(1, 2), length)  # (B, H, count, length, D)
        spread = spread.unflatten(1, (matrix.shape[1], -1)).transpose(2, 3).flatten(3, 4)
    found, some = _divided(spread @ matrix, (spread @ total[..., None])[..., 0])  # (B, G, count, R * length, V)
    if groups.count == 1:
        return tuple(x.reshape(batch, heads, length, -1) for x in (found, some))  # pyright: ignore[reportReturnType]
    found, some = (
        groups.in_order(x.unflatten(3, (-1, groups.length)).transpose(2, 3).flatten(1, 2), length)
        for x in (found, some)
    )
    return found, some


def _last(groups: Segments, tokens: Tokens) -> Tensor:
    """(B,) the group of the last token of each row, 0 where there is none."""
    column = torch.arange(groups.group.shape[1], device=groups.group.device).expand_as(groups.group)
    last = torch.where(tokens.real, column, 0).amax(dim=1, keepdim=True)
    return groups.group.gather(1, last)[:, 0].clamp(max=groups.count - 1)


def _at(before: tuple[Tensor, Tensor], group: Tensor) -> tuple[Tensor, Tensor]:
    """The memory before the group of each row."""
    row = torch.arange(len(group), device=group.device)
    return before[0][row, :, group], before[1][row, :, group]
