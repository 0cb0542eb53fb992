"""Compressive memory: what leaves the memory of a recurrence is kept at a rate of `rate` to 1 (Compressive Transformer,
arXiv:1911.05507, section 3).

    segment s reads [compressed, the `size` positions before it, its own], in one softmax
    compressed = W_k f(h), W_v f(h),  h the layer's inputs at `rate` positions in a row

What is compressed is older than `size`; the last `count` of it are kept. Groups lie at multiples of `rate` in the
document and are compressed when they are over, which gives what compressing them at their eviction would. A compressed
key stands at the last position of its group. Where positions have gaps, a group is compressed of what there is (zeros
in a convolution). With `by="most-used"` nothing is computed anew: see most_used.py.

As in a recurrence W_k and W_v learn from what is remembered, and nothing before them does, so not f either. A
convolution learns from its own loss alone (section 3.2, equation 1), which `Record.losses` and `Output.losses` have
under the layer's path and `.reconstruction`:

    loss * mean over queries, heads and features of (attn(h, old) - attn(h, f(old)))^2

attn is the layer's, by content alone, with its weights and inputs held constant; old are the keys that a segment pushes
out: at most size + length and more than `size` before it. The loss is of what one forward reads, so rows of training
need more than size + length positions.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lamina.attend import Request, attend
from lamina.cache.summed import SummedSlot
from lamina.errors import LaminaError, UnsupportedError
from lamina.layers.attention import AttentionSpec
from lamina.layers.cached import turn
from lamina.layers.call import Call
from lamina.layers.most_used import Asked, MostUsed
from lamina.layers.recurrence import Anew, Inputs, Kept, refuse_marks, stopped
from lamina.layers.segments import Segments, segments
from lamina.patterns import Pattern, Retained, SegmentWindow, allowed
from lamina.specs import Spec
from lamina.tokens import HOLE, Tokens, join

if TYPE_CHECKING:
    from lamina.layers.memory_attention import MemoryAttention

FAR = 1 << 30
"""Added, for the mask alone, to the position of a compressed key: no pattern that looks back sees it there."""


@dataclass(frozen=True, kw_only=True)
class CompressiveSpec(Spec):
    """Segments of `length` positions, which read `size` more before them, and `count` compressed ones before those."""

    length: int  # 512
    size: int  # 512 to 1024
    count: int  # 512 to 1536
    rate: int  # positions that become one: 2 to 4
    by: Literal["mean", "max", "convolution", "most-used"] = "convolution"
    loss: float = 1.0  # of the convolution

    def check(self) -> None:
        for name, least in (("length", 1), ("size", 1), ("count", 1), ("rate", 2)):
            if getattr(self, name) < least:
                raise LaminaError(f"CompressiveSpec.{name} is {getattr(self, name)}; it must be at least {least}")
        for name in ("length", "size"):
            if getattr(self, name) % self.rate:
                raise LaminaError(
                    f"CompressiveSpec.{name} is {getattr(self, name)}; it must be a multiple of rate={self.rate}"
                )
        if self.by == "most-used":  # memories leave a segment at a time
            kept = self.length // self.rate
            for name, one in (("size", self.length), ("count", kept)):
                if getattr(self, name) % one:
                    what = f"length={self.length}" if name == "size" else f"length / rate = {kept}"
                    raise LaminaError(
                        f"CompressiveSpec.{name} is {getattr(self, name)}; by='most-used' needs a multiple of {what}"
                    )

    def build(self, attention: AttentionSpec, width: int) -> Compressive:
        return Compressive(self, attention, width)


class Compression(nn.Module):
    """(B, n, rate, width) -> (B, n, width); `there` (B, n, rate) says where there is a token."""

    def __init__(self, spec: CompressiveSpec, width: int) -> None:
        super().__init__()
        self.path = ""  # set by the model: the slot of the inputs that are not compressed yet
        self.spec = spec
        self.convolution = nn.Linear(spec.rate * width, width) if spec.by == "convolution" else None

    def retained(self) -> Retained:
        """What a cache has to keep of the layer's inputs."""
        return Retained(self.spec.rate, segment=self.spec.rate, of="summed")

    def forward(self, x: Tensor, there: Tensor) -> Tensor:
        there = there[..., None]
        if self.convolution is not None:
            return self.convolution(x.masked_fill(~there, 0.0).flatten(2))
        if self.spec.by == "max":
            return x.masked_fill(~there, float("-inf")).amax(dim=2).masked_fill(~there.any(dim=2), 0.0)
        return x.masked_fill(~there, 0.0).sum(dim=2) / there.sum(dim=2).clamp(min=1)


class Compressive(nn.Module):
    """The compressed keys of a layer, who reads them, and what a request becomes while gradients are computed."""

    def __init__(self, spec: CompressiveSpec, attention: AttentionSpec, width: int) -> None:
        super().__init__()
        refuse_marks(attention.pattern)
        self.path = ""  # set by the model: the slot of the compressed keys
        self.spec = spec
        length, size, reach = spec.length, spec.size, spec.rate * spec.count
        self.own: Pattern = attention.pattern & SegmentWindow(length=length, back=0)
        self.earlier: Pattern = SegmentWindow(length=length, back=size, gap=0)
        self.older: Pattern = SegmentWindow(length=length, back=size + reach - FAR, gap=size - FAR)
        self.pattern = self.own | self.earlier | self.older
        self.evicted: Pattern = SegmentWindow(length=length, back=size + length, gap=size)
        self.chosen = MostUsed(spec, self.earlier) if spec.by == "most-used" else None
        self.compress = Compression(spec, width) if spec.by != "most-used" else None
        self.inputs = Inputs(self.kept())
        self.shorter = None if self.compress is None else Inputs(self._older())

    def kept(self) -> Retained:
        """What a cache has to keep for the layer itself."""
        if self.chosen is not None:  # what a segment pushes out is looked at when the segment has begun
            return Retained(self.spec.size + 2 * self.spec.length, segment=self.spec.length)
        pattern = self.own | self.earlier
        return replace(pattern.retained(), pattern=pattern, segment=self.spec.length)

    def retained(self) -> Retained | dict[str, Retained]:
        """What a cache has to keep of the compressed keys. What was chosen is kept there."""
        return {} if self.compress is None else self._older()

    def _older(self) -> Retained:
        """Those that are not old enough to be read, too."""
        spec = self.spec
        return Retained(spec.count + (spec.size + spec.length) // spec.rate, segment=spec.length, every=spec.rate)

    def remembered(
        self, layer: MemoryAttention, x: Tensor, query: Tensor, keys: Kept, call: Call, asked: Asked
    ) -> Kept:
        """All compressed keys, those of the cache too; `keys`: those that are not compressed."""
        if self.chosen is not None:
            return self.chosen(query, keys, call, asked)
        return self._made(layer, x, call)

    @torch.no_grad()
    def _made(self, layer: MemoryAttention, x: Tensor, call: Call) -> Kept:
        assert self.compress is not None and self.shorter is not None
        inputs, tokens = x.detach()[:, None], call.tokens
        if call.cache is not None:
            slot = call.cache.slot(self.compress.path)
            if not isinstance(slot, SummedSlot):
                raise UnsupportedError(f"{self.path} reads a text in order, and this rank has a part of it (context)")
            inputs, _, tokens = slot.extend(inputs, inputs[..., :0], tokens)
        groups = segments(tokens, self.spec.rate, call.memo)
        made = compressed(groups, tokens, call)
        short = self.compress(groups.laid_out(inputs)[:, 0], groups.there())
        key, value = layer.keys_of(short)
        key = turn(key, made, layer.spec.rotary, layer.spec.head_dim, call.memo)
        short = self.shorter(short, made, call)
        if call.cache is not None:
            key, value, made = call.cache.slot(self.path).extend(key, value, made)
        return Kept(made, key, value, short)

    def forward(self, request: Request, anew: Anew) -> Request:
        """The same attention, through which no gradient leaves a segment."""
        return stopped(request, self.own, self.earlier | self.older, anew)

    def learn(self, layer: MemoryAttention, x: Tensor, parts: tuple[Tensor, Tensor, Tensor], call: Call) -> None:
        """Write down the loss of a convolution in training; `parts`: queries, keys and values without phases."""
        if layer.training and self.spec.by == "convolution" and self.spec.loss:
            constant = tuple(part.detach() for part in parts)
            loss = self.spec.loss * self._reconstruction(layer, x.detach(), constant, call)
            call.record.losses[f"{call.record.called(self.path)}.reconstruction"] = loss

    def _reconstruction(self, layer: MemoryAttention, x: Tensor, parts: tuple[Tensor, ...], call: Call) -> Tensor:
        tokens, memo = call.tokens, call.memo
        groups = segments(tokens, self.spec.rate, memo)
        assert self.compress is not None
        shorter = self.compress(groups.laid_out(x[:, None])[:, 0], groups.there())
        constant = {name: p.detach() for name, p in layer.named_parameters()}
        query, key, value = parts
        short_key, short_value = functional_call(_Keys(layer), {f"layer.{n}": p for n, p in constant.items()}, shorter)
        made = compressed(groups, tokens, call)
        means = [
            attend(
                Request(
                    query=query,
                    key=one,
                    value=other,
                    queries=tokens,
                    keys=keys,
                    pattern=self.evicted,
                    scale=layer.scale,
                    memo=memo,
                ),
                call.backend,
            )
            for one, other, keys in ((key, value, tokens), (short_key, short_value, made))
        ]
        some = allowed(self.evicted, tokens.query(), made.key()).any(dim=2) & tokens.real  # (B, T)
        error = (means[0] - means[1]).square().mean(dim=-1).sum(dim=1) / layer.spec.heads  # (B, T)
        return torch.where(some, error, 0.0).sum() / some.sum().clamp(min=1)


class _Keys(nn.Module):
    """`keys_of` of a layer, as a module whose parameters can be others."""

    def __init__(self, layer: MemoryAttention) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.layer.keys_of(x)


def compressed(groups: Segments, tokens: Tokens, call: Call) -> Tokens:
    """(B, n) where the compressed keys stand: at the ends of groups that are over, those that another one follows."""
    name = ("compressed", id(groups))
    if name not in call.memo:
        over = torch.zeros_like(groups.document, dtype=torch.bool)
        over[:, :-1] = groups.document[:, 1:] == groups.document[:, :-1]
        over &= groups.there().any(dim=2)
        end = (groups.number + 1) * groups.length - 1
        made = Tokens(torch.where(over, end, HOLE), groups.document)
        call.memo[name] = (made, groups)  # kept beside it: an id is only unique while its object lives
    return call.memo[name][0]


def beside(keys: Tokens, made: Tokens, call: Call) -> tuple[Tokens, Tokens]:
    """The tokens of the keys and of the compressed ones, where they stand; and as the mask knows them."""
    name = ("beside", id(keys), id(made))
    if name not in call.memo:
        far = Tokens(torch.where(made.real, made.position + FAR, HOLE), made.document)
        call.memo[name] = (join(keys, made), join(keys, far), keys, made)
    return call.memo[name][:2]
