"""Segment recurrence: each segment also reads the last `size` positions before it (Transformer-XL, arXiv:1901.02860,
section 3.2).

    segment s reads [SG(k, v of the `size` positions before it), its own k, v], in one softmax

SG stops the gradient: what a segment learns is of its own tokens. The paper stops it at the hidden states of the memory
and projects them anew, so that W_k and W_v also learn from memories; here keys and values are kept, as decoding needs
them, and give no gradient at all. So training on consecutive pieces, cut between segments, with the cache carried over,
has the gradients of the whole text read at once.

Positions must be relative (TransformerXLSpec, rotary phases, a bias). In a trained model nothing changes as long as a
text fits into one segment; a gate cannot make more exact, since there is one softmax: for that, see MemorizingSpec.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import nn

from lamina.attend import Request
from lamina.errors import LaminaError
from lamina.layers.attention import AttentionSpec
from lamina.patterns import Global, Pattern, Prefix, Retained, SegmentWindow, Without
from lamina.specs import Spec
from lamina.tokens import Tokens, join


@dataclass(frozen=True, kw_only=True)
class RecurrenceSpec(Spec):
    """Segments of `length` positions, which read `size` more before them."""

    length: int  # 128 to 512 in the paper
    size: int  # 150 in training, up to 1600 in evaluation

    def check(self) -> None:
        for name in ("length", "size"):
            if getattr(self, name) < 1:
                raise LaminaError(f"RecurrenceSpec.{name} is {getattr(self, name)}; it must be at least 1")

    def build(self, attention: AttentionSpec) -> Recurrence:
        return Recurrence(self, attention)


class Recurrence(nn.Module):
    """Who reads what, and what a request becomes while gradients are computed."""

    def __init__(self, spec: RecurrenceSpec, attention: AttentionSpec) -> None:
        super().__init__()
        refuse_marks(attention.pattern)
        self.spec = spec
        self.own: Pattern = attention.pattern & SegmentWindow(length=spec.length, back=0)
        self.earlier: Pattern = SegmentWindow(length=spec.length, back=spec.size, gap=0)
        self.pattern = self.own | self.earlier

    def kept(self) -> Retained:
        """What a cache has to keep for the layer, in its one slot."""
        return replace(self.pattern.retained(), pattern=self.pattern, segment=self.spec.length)

    def forward(self, request: Request) -> Request:
        """The same attention, through which no gradient leaves a segment."""
        return stopped(request, self.own, self.earlier)


def refuse_marks(pattern: Pattern) -> None:
    """Raise LaminaError for a pattern that goes by marks, with which keys are told apart here."""
    for _, part in pattern.walk():
        if (isinstance(part, Prefix) and part.length is None) or (isinstance(part, Global) and not part.positions):
            raise LaminaError(
                f"a recurrence cannot be beside marked tokens ({type(part).__name__}); give them positions"
            )


def stopped(request: Request, own: Pattern, earlier: Pattern) -> Request:
    """A request under own | earlier. While gradients are computed, keys come twice: as they are, for their own segment,
    and marked and without a gradient, for later ones."""
    if not (torch.is_grad_enabled() and (request.key.requires_grad or request.value.requires_grad)):
        return request
    bias, table = request.bias, request.value_table
    return replace(
        request,
        key=torch.cat([request.key, request.key.detach()], dim=2),
        value=torch.cat([request.value, request.value.detach()], dim=2),
        keys=_twice(request),
        pattern=Without(first=own, second=Prefix()) | (earlier & Prefix()),
        bias=None if bias is None else torch.cat([bias, bias], dim=-1),
        value_table=None if table is None else (table[0], torch.cat([table[1], table[1]], dim=-1)),
    )


def _twice(request: Request) -> Tokens:
    """The tokens of the keys, then the same ones marked; made once a forward."""
    name = ("twice", id(request.keys))
    if name not in request.memo:
        none = torch.zeros_like(request.keys.position, dtype=torch.bool)
        first, second = (Tokens(request.keys.position, request.keys.document, mark) for mark in (none, ~none))
        request.memo[name] = (join(first, second), request.keys)  # kept beside it: an id is unique while it lives
    return request.memo[name][0]
