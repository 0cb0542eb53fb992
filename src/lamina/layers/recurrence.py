"""Segment recurrence: each segment also reads the last `size` positions before it (Transformer-XL, arXiv:1901.02860,
section 3.2).

    segment s reads [W_k SG(h), W_v SG(h) of the `size` positions before it, its own k, v], in one softmax

SG stops the gradient: no earlier layer learns from a memory, but W_k and W_v do, which are what finds something there.
So keys come twice while gradients are computed: with a gradient to h for their own segment, without for later ones.

Training on consecutive pieces, cut between segments, with the cache carried over, has the gradients of the whole text
read at once. For that a cache that was made while the model was in training keeps h beside keys and values. One that
was made in evaluation does not, and what it holds gives no gradient at all.

Positions must be relative (TransformerXLSpec, rotary phases, a bias). In a trained model nothing changes as long as a
text fits into one segment; a gate cannot make more exact, since there is one softmax: for that, see MemorizingSpec.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lamina.attend import Request
from lamina.errors import LaminaError
from lamina.layers.attention import AttentionSpec
from lamina.layers.call import Call
from lamina.patterns import Global, Pattern, Prefix, Retained, SegmentWindow, Without
from lamina.specs import Spec
from lamina.tokens import HOLE, Tokens, join


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
        self.inputs = Inputs(self.kept())

    def kept(self) -> Retained:
        """What a cache has to keep for the layer itself."""
        return replace(self.pattern.retained(), pattern=self.pattern, segment=self.spec.length)

    def forward(self, request: Request, anew: Anew) -> Request:
        """The same attention, through which no gradient leaves a segment."""
        return stopped(request, self.own, self.earlier, anew)


class Inputs(nn.Module):
    """The slot of a layer's inputs, of which keys and values are made anew in training. In evaluation there is none."""

    def __init__(self, kept: Retained) -> None:
        super().__init__()
        self.path = ""  # set by the model: the name of the slot
        self.kept = kept

    def retained(self) -> dict[str, Retained]:
        """What a cache has to keep: as many as there are keys, so that both lie in the same places."""
        return {"": self.kept} if self.training else {}

    def forward(self, x: Tensor, tokens: Tokens, call: Call) -> Tensor | None:
        """(B, T, width) -> all there are (B, 1, S, width), those of the cache too; None where it keeps none."""
        x = x.detach()[:, None]
        if call.cache is None:
            return x
        slot = call.cache.find(self.path)
        return None if slot is None else slot.extend(x, x[..., :0], tokens)[0]


@dataclass(frozen=True, eq=False)
class Kept:
    """Keys of a memory; holes are places without one."""

    tokens: Tokens  # (B, n)
    key: Tensor  # (B, G, n, D)
    value: Tensor  # (B, G, n, V)
    inputs: Tensor | None = None  # (B, 1, n, width): what they are made of, where that is kept

    def beside(self, other: Kept) -> Kept:
        """These, and then the others."""
        parts = (torch.cat(pair, dim=2) for pair in zip(self.parts(), other.parts(), strict=True))
        return Kept(join(self.tokens, other.tokens), *parts)

    def at(self, index: Tensor, there: Tensor) -> Kept:
        """Those at `index` (B, n), and holes where nothing is `there`."""
        position = torch.where(there, self.tokens.position.gather(1, index), HOLE)
        picked = (x.gather(2, index[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3])) for x in self.parts())
        return Kept(Tokens(position, self.tokens.document.gather(1, index)), *picked)

    def parts(self) -> tuple[Tensor, ...]:
        """Keys, values, and inputs where there are any."""
        return (self.key, self.value) if self.inputs is None else (self.key, self.value, self.inputs)


Anew = Callable[[], tuple[Tensor, Tensor]] | None
"""Makes keys and values (B, G, S, D) of inputs that give no gradient, to those of a request; None: there are none."""


def refuse_marks(pattern: Pattern) -> None:
    """Raise LaminaError for a pattern that goes by marks, with which keys are told apart here."""
    for _, part in pattern.walk():
        if (isinstance(part, Prefix) and part.length is None) or (isinstance(part, Global) and not part.positions):
            raise LaminaError(
                f"a recurrence cannot be beside marked tokens ({type(part).__name__}); give them positions"
            )


def stopped(request: Request, own: Pattern, earlier: Pattern, anew: Anew) -> Request:
    """A request under own | earlier. While gradients are computed, keys come twice: as they are, for their own segment,
    and marked and made of inputs without a gradient, for later ones."""
    if not (torch.is_grad_enabled() and (request.key.requires_grad or request.value.requires_grad)):
        return request
    bias, table = request.bias, request.value_table
    key, value = (request.key.detach(), request.value.detach()) if anew is None else anew()
    return replace(
        request,
        key=torch.cat([request.key, key], dim=2),
        value=torch.cat([request.value, value], dim=2),
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
