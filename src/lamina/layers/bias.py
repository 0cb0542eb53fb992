"""Position biases on the scores, shared by the layers of a stack: T5's buckets and ALiBi's slopes."""

from __future__ import annotations

import math
from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lamina.errors import LaminaError
from lamina.layers.initial import Draw
from lamina.layers.parameter import parameter
from lamina.specs import Spec
from lamina.tokens import Tokens


@dataclass(frozen=True, kw_only=True)
class BucketBiasSpec(Spec):
    """T5: a learned scalar for each head and each bucket of key - query distances (arXiv:1910.10683, section 2.1)."""

    heads: int
    buckets: int = 32
    distance: int = 128  # from here on all distances share the last bucket
    bidirectional: bool = False  # True in encoders: half of the buckets for keys after the query

    def check(self) -> None:
        exact = self.buckets // (4 if self.bidirectional else 2)  # buckets for the nearest distances, one each
        if self.heads < 1 or exact < 1 or self.distance <= exact:
            raise LaminaError(
                f"BucketBiasSpec(heads={self.heads}, buckets={self.buckets}, distance={self.distance}): needs a head,"
                f" {4 if self.bidirectional else 2} buckets or more, and a distance above {max(exact, 1)}"
            )

    def build(self) -> BucketBias:
        return BucketBias(self)


@dataclass(frozen=True, kw_only=True)
class AlibiSpec(Spec):
    """ALiBi: minus a slope for each head times the distance (arXiv:2108.12409, section 3)."""

    heads: int
    bias_max: float = 8.0  # slopes fall to 2^-bias_max: 16 in MPT-7B-StoryWriter
    scale: float = 1.0  # of the whole bias: head_dim^-0.5 in Falcon
    rounded: bool = False  # slope times key position, in bfloat16 whatever the dtype of the model: Falcon

    def check(self) -> None:
        if self.heads < 1 or self.bias_max <= 0 or self.scale <= 0:
            raise LaminaError(
                f"AlibiSpec(heads={self.heads}, bias_max={self.bias_max}, scale={self.scale}): heads must be at least"
                " 1, and the others above 0"
            )

    def build(self) -> Alibi:
        return Alibi(self)


def bucket(relative: Tensor, buckets: int, distance: int, bidirectional: bool) -> Tensor:
    """key - query positions -> bucket numbers: exact up to half of the buckets, then logarithmic to `distance`."""
    base: Tensor | int = 0
    if bidirectional:
        buckets //= 2
        base = (relative > 0).long() * buckets
        far = relative.abs()
    else:
        far = (-relative).clamp(min=0)
    exact = buckets // 2
    # The clamp keeps log(0) out; its cast to an integer would be undefined even though `where` drops it.
    ratio = torch.log(far.clamp(min=1).float() / exact) / math.log(distance / exact)
    large = (exact + (ratio * (buckets - exact)).long()).clamp(max=buckets - 1)
    return base + torch.where(far < exact, far, large)


def slopes(heads: int, most: float = 8.0) -> list[float]:
    """ALiBi's slopes: 2^(-most i / n), n a power of 2; else those of the power below, then every other of the next."""
    power = 2 ** math.floor(math.log2(heads))
    first = [2.0 ** (-most * (i + 1) / power) for i in range(power)]
    return first + [2.0 ** (-most * (i + 1) / (2 * power)) for i in range(0, 2 * (heads - power), 2)]


class BucketBias(nn.Module):
    """Queries (B, T), keys (B, S) -> (B, H, T, S)."""

    SHARD = {"weight": "heads"}

    def __init__(self, spec: BucketBiasSpec) -> None:
        super().__init__()
        self.spec = spec
        self.weight = parameter(spec.buckets, spec.heads)

    def forward(self, queries: Tokens, keys: Tokens, memo: MutableMapping[Any, Any]) -> Tensor:
        name = ("bias", id(self), id(queries), id(keys))
        if name not in memo:
            spec, relative = self.spec, distance(queries, keys)
            index = bucket(relative, spec.buckets, spec.distance, spec.bidirectional)
            memo[name] = (F.embedding(index, self.weight).permute(0, 3, 1, 2), queries, keys)
        return memo[name][0]

    def initialise(self, draw: Draw) -> None:
        draw.table(self.weight, "relative")


class Alibi(nn.Module):
    """Queries (B, T), keys (B, S) -> (B, H, T, S), or (B, H, 1, S) where `rounded`. No parameters.

    A softmax does not see what all keys of a query have in common, so slope * key does what -slope * (query - key) does
    for keys before the query. Falcon was published with the former in bfloat16, which has 8 bits: from position 256 on
    neighbours share a bias. That is part of the model, so it is done here too; elsewhere near keys stay exact.
    """

    SHARD = {"slopes": "heads"}

    def __init__(self, spec: AlibiSpec) -> None:
        super().__init__()
        self.spec = spec
        self.slopes = slopes(spec.heads, spec.bias_max)

    def forward(self, queries: Tokens, keys: Tokens, memo: MutableMapping[Any, Any]) -> Tensor:
        name = ("bias", id(self), id(queries), id(keys))
        if name not in memo:
            slope = torch.tensor(self.slopes, dtype=torch.float32, device=keys.position.device)[:, None, None]
            if self.spec.rounded:
                position = keys.position[:1] if keys.span is not None else keys.position
                bias = (slope.bfloat16() * position[:, None, None]).float()
            else:
                bias = -slope * distance(queries, keys).abs()[:, None].float()
            memo[name] = (bias if self.spec.scale == 1.0 else bias * self.spec.scale, queries, keys)
        return memo[name][0]


def distance(queries: Tokens, keys: Tokens) -> Tensor:
    """key - query positions: (B, T, S), or (1, T, S) where all rows are alike."""
    q, k = queries.position, keys.position
    if queries.span is not None and keys.span is not None:
        q, k = q[:1], k[:1]
    return k[:, None, :] - q[:, :, None]
