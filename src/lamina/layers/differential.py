"""Differential attention: the difference of two softmax maps cancels what both see (arXiv:2410.05258, section 2.1).

    (softmax(s q1 k1^T) - lambda softmax(s q2 k2^T)) v,   then RMSNorm on each head, times 1 - start
    lambda = exp(a1 . b1) - exp(a2 . b2) + start,         start = 0.8 - 0.6 exp(-0.3 depth), depth from 0

A head has two queries, two keys, and one value of twice their size. In the projections the first queries of all heads
stand before the second ones, the same for keys, and the first halves of all values before the second halves (DiffLlama;
the paper's code has the two of a head side by side).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lamina.attend import Request, attend, weights
from lamina.errors import LaminaError
from lamina.layers.cached import retained, with_cache
from lamina.layers.call import Call
from lamina.layers.initial import Draw
from lamina.layers.linear import Linear
from lamina.layers.norm import RMSNormSpec
from lamina.layers.parameter import parameter
from lamina.layers.rotary import RotarySpec, prepare
from lamina.patterns import Causal, Pattern, Retained
from lamina.specs import Spec


@dataclass(frozen=True, kw_only=True)
class DifferentialSpec(Spec):
    """Heads of two maps each; heads may share keys and values, as in grouped-query attention."""

    heads: int  # half of DiffLlama's num_attention_heads, which counts maps
    key_heads: int
    head_dim: int  # of a query or key; values have 2 head_dim features
    start: float  # lambda at the start of training: `start_at(depth)`
    pattern: Pattern = field(default_factory=Causal)
    rotary: RotarySpec | None = None
    scale: float | None = None  # None: head_dim^-0.5
    norm: RMSNormSpec = field(default_factory=lambda: RMSNormSpec(eps=1e-5))  # on each head; weight=False in DiffLlama
    bias: bool = False

    def check(self) -> None:
        if self.key_heads < 1 or self.heads < 1 or self.heads % self.key_heads:
            raise LaminaError(f"heads={self.heads} must be a multiple of key_heads={self.key_heads}, both at least 1")
        turned = 0 if self.rotary is None else self.rotary.width or self.head_dim
        if self.head_dim < 1 or turned > self.head_dim or turned % 2:
            raise LaminaError(f"rotary.width={turned} must be even and at most head_dim={self.head_dim}, at least 1")

    def build(self, width: int) -> Differential:
        return Differential(self, width)


class Differential(nn.Module):
    """(B, T, width) -> (B, T, width)."""

    SHARD = {"q": "halves", "k": "key_halves", "v": "key_halves", "o": "in"}  # each half by its output

    def __init__(self, spec: DifferentialSpec, width: int) -> None:
        super().__init__()
        self.spec = spec
        self.path = ""  # set by the model: the name of this layer's slot and records
        self.scale = spec.head_dim**-0.5 if spec.scale is None else spec.scale
        if spec.rotary is not None:
            prepare(spec.rotary, spec.head_dim)
        size, bias = 2 * spec.head_dim, spec.bias
        self.q = Linear(width, spec.heads * size, bias=bias)
        self.k = Linear(width, spec.key_heads * size, bias=bias)
        self.v = Linear(width, spec.key_heads * size, bias=bias)
        self.a1, self.b1, self.a2, self.b2 = (parameter(spec.head_dim) for _ in range(4))
        self.norm = spec.norm.build(size)
        self.o = Linear(spec.heads * size, width, bias=bias)

    def retained(self) -> Retained:
        """What a cache has to keep for this layer. Raises UnsupportedError where tokens see later ones."""
        return retained(self.path, self.spec.pattern)

    def forward(self, x: Tensor, call: Call) -> Tensor:
        query, key, value = (self._split(project(x)) for project in (self.q, self.k, self.v))  # (B, 2 H or G, T, D)
        value = torch.cat(value.chunk(2, dim=1), dim=-1)  # (B, G, T, 2 D)
        query, key, value, queries, keys = with_cache(
            self.path, call, query, key, value, self.spec.rotary, self.spec.head_dim
        )
        bias = None if call.bias is None else call.bias(queries, keys, call.memo)
        maps = [
            Request(
                query=one,
                key=other,
                value=value,
                queries=queries,
                keys=keys,
                pattern=self.spec.pattern,
                scale=self.scale,
                bias=bias,
                memo=call.memo,
            )
            for one, other in zip(query.chunk(2, dim=1), key.chunk(2, dim=1), strict=True)
        ]
        call.record.keep(f"{self.path}.weights", lambda: torch.cat([weights(one) for one in maps], dim=1))
        first, second = (attend(one, call.backend) for one in maps)  # (B, H, T, 2 D)
        out = self.norm(first - self.mix().to(x.dtype) * second) * (1 - self.spec.start)
        return self.o(out.transpose(1, 2).flatten(2))

    def mix(self) -> Tensor:
        """lambda: how much of the second map is taken from the first."""
        wide = torch.float64 if self.a1.dtype == torch.float64 else torch.float32
        first, second = ((a * b).sum(dtype=wide).exp() for a, b in ((self.a1, self.b1), (self.a2, self.b2)))
        return first - second + self.spec.start

    def _split(self, x: Tensor) -> Tensor:
        """(B, T, heads * D) -> (B, heads, T, D)."""
        return x.unflatten(-1, (-1, self.spec.head_dim)).transpose(1, 2)

    def initialise(self, draw: Draw) -> None:
        for vector in (self.a1, self.b1, self.a2, self.b2):
            draw.normal(vector, std=0.1)


def start_at(depth: int) -> float:
    """lambda at the start of training in the layer `depth`, counted from 0."""
    return 0.8 - 0.6 * math.exp(-0.3 * depth)
