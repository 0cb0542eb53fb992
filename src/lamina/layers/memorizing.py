"""Memorizing: the nearest of many stored keys, read by a softmax of their own (arXiv:2203.08913, section 3).

    s_j = c_h q . k_j,  q and k_j of length 1     j among the keys of earlier segments that the local pattern hides
    A = softmax of the `count` largest s_j, times their values
    y = local + g (A - local),  g = sigmoid(b) for each head

The memory holds the last `size` positions before the token's segment, first in, first out; what it holds gives no
gradient (section 3.2). Its keys have neither rotary phases nor position biases (section 3.1), nor the local attention's
soft-cap, which scores of length 1 have no need of. c_h is learned. Local and memory attention are two softmaxes, as in
the paper; where nothing is in the memory yet, y = local.

Search is exact, or approximate (`clusters`): keys are sorted into clusters, and a query looks into the `probes`
nearest. What an approximate search misses depends on the other keys, so there decoding in pieces need not equal the
whole.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lamina.attend.request import grouped
from lamina.errors import LaminaError
from lamina.layers.attention import AttentionSpec
from lamina.layers.call import Call
from lamina.layers.gated_memory import GatedMemory, GateKind
from lamina.layers.initial import Draw
from lamina.patterns import Causal, Retained, SegmentWindow, Without, allowed
from lamina.specs import Spec
from lamina.tokens import Tokens

SCORES = 1 << 24
"""Numbers that one chunk of queries may hold at once."""


@dataclass(frozen=True, kw_only=True)
class MemorizingSpec(Spec):
    """The `count` nearest of the last `size` keys of earlier segments."""

    length: int  # of a segment, in positions: 512
    size: int  # positions of the memory: 8192 to 262,144
    count: int = 32  # keys that a query reads
    gate: GateKind = "sigmoid"  # "zero": exact when added to a trained model
    sharpness: float = 1.0  # c_h at the start
    clusters: int | None = None  # of keys, for an approximate search; None: an exact one
    probes: int = 4  # clusters that a query looks into

    def check(self) -> None:
        for name in ("length", "size", "count", "probes", *(["clusters"] if self.clusters is not None else [])):
            if getattr(self, name) < 1:
                raise LaminaError(f"MemorizingSpec.{name} is {getattr(self, name)}; it must be at least 1")

    def build(self, attention: AttentionSpec) -> Memorizing:
        if attention.pattern == Causal():
            raise LaminaError(
                "attention.pattern is Causal(), which sees every earlier key and leaves nothing to a MemorizingSpec;"
                " give it a window: Causal() & Window(back=512)"
            )
        return Memorizing(self, attention)


class Memorizing(GatedMemory):
    """(B, H, T, D) of the local attention -> the same with the memory mixed in."""

    SHARD = {"gate": "heads", "sharpness": "heads"}

    def __init__(self, spec: MemorizingSpec, attention: AttentionSpec) -> None:
        super().__init__(spec.gate, attention.heads)
        self.spec = spec
        self.sharpness = nn.Parameter(torch.full((attention.heads,), spec.sharpness))
        earlier = SegmentWindow(length=spec.length, back=spec.size, gap=0)
        self.pattern = Without(first=earlier, second=attention.pattern)

    def retained(self) -> Retained:
        """What a cache has to keep for the memory: the segment that is not over yet lies beside it."""
        return Retained(self.spec.size + self.spec.length, segment=self.spec.length)

    def forward(self, local: Tensor, query: Tensor, key: Tensor, value: Tensor, call: Call) -> Tensor:
        """local, query (B, H, T, D), key and value (B, G, T, D), without rotary phases."""
        query, key, value = F.normalize(query, dim=-1), F.normalize(key.detach(), dim=-1), value.detach()
        keys = call.tokens
        if call.cache is not None:
            key, value, keys = call.cache.slot(self.path).extend(key, value, call.tokens)
        value = value.masked_fill(~keys.real[:, None, :, None], 0.0)
        each = max(key.shape[2], self.spec.count * key.shape[3])  # scores of a query, or numbers of the keys it reads
        chunk = max(1, SCORES // (query.shape[0] * query.shape[1] * each))
        parts = [
            self._read(part, _columns(call.tokens, start, part.shape[2]), key, value, keys)
            for start, part in _chunks(query, chunk)
        ]
        found, some = (torch.cat(part, dim=2) for part in zip(*parts, strict=True))
        return self.mix(local, found, some)

    def _read(self, query: Tensor, queries: Tokens, key: Tensor, value: Tensor, keys: Tokens) -> tuple[Tensor, Tensor]:
        """(B, H, t, V) of some queries, and where anything was found (B, H, t, 1)."""
        mask = allowed(self.pattern, queries.query(), keys.key())[:, None].expand(query.shape[0], -1, -1, -1)
        with torch.no_grad():
            if self.spec.clusters is None:
                index = nearest(query, key, mask, self.spec.count)
            else:
                index = nearest_clustered(query, key, mask, self.spec.count, self.spec.clusters, self.spec.probes)
        batch, groups, _, size = key.shape
        heads, length, count = index.shape[1:]
        flat = index.clamp(min=0).view(batch, groups, -1, 1)  # (B, G, R * t * k, 1)
        chosen = key.gather(2, flat.expand(-1, -1, -1, size)).view(batch, heads, length, count, size)
        scores = (chosen @ query[..., None])[..., 0]  # (B, H, t, k)
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32)) * self.sharpness[:, None, None]
        missing = index < 0
        shares = scores.masked_fill(missing, torch.finfo(scores.dtype).min).softmax(dim=-1).to(value.dtype)
        read = value.gather(2, flat.expand(-1, -1, -1, value.shape[-1])).view(batch, heads, length, count, -1)
        return (shares[..., None, :] @ read)[..., 0, :], ~missing.all(dim=-1, keepdim=True)

    def initialise(self, draw: Draw) -> None:
        super().initialise(draw)
        nn.init.constant_(self.sharpness, self.spec.sharpness)


def nearest(query: Tensor, key: Tensor, mask: Tensor, count: int) -> Tensor:
    """(B, H, T, k): which keys have the largest products with each query (B, H, T, D); key (B, G, S, D), mask
    (B, 1, T, S). -1 where fewer than k = min(count, S) may be read."""
    scores = grouped(query, key.shape[1]) @ key.mT
    scores = scores.view(*query.shape[:3], key.shape[2]).masked_fill(~mask, float("-inf"))
    best, index = scores.topk(min(count, key.shape[2]), dim=-1)
    return index.masked_fill(best == float("-inf"), -1)


def nearest_clustered(query: Tensor, key: Tensor, mask: Tensor, count: int, clusters: int, probes: int) -> Tensor:
    """`nearest`, among the keys of the `probes` clusters whose means are nearest to the query alone."""
    batch, groups, total, size = key.shape
    clusters = min(clusters, total)
    probes = min(probes, clusters)
    means, cluster = _clusters(key, clusters, mask.any(dim=2))
    order = cluster.argsort(dim=-1, stable=True)  # (B, G, S): the keys of cluster 0, of cluster 1, ...
    sizes = torch.zeros(batch, groups, clusters + 1, dtype=torch.int64, device=key.device)
    sizes = sizes.scatter_add(2, cluster, torch.ones_like(cluster))[..., :clusters]
    starts, longest = sizes.cumsum(-1) - sizes, max(int(sizes.max()), 1)
    asking = grouped(query, groups)  # (B, G, R * T, D)
    probed = (asking @ means.mT).topk(probes, dim=-1).indices.flatten(2)  # (B, G, R * T * probes)
    offset = torch.arange(longest, device=key.device)
    places = starts.gather(2, probed)[..., None] + offset  # (B, G, R * T * probes, longest)
    inside = offset < sizes.gather(2, probed)[..., None]
    candidate = order.gather(2, places.clamp(max=total - 1).flatten(2)).view(*asking.shape[:3], -1)
    inside = inside.view_as(candidate)
    chosen = key.gather(2, candidate.flatten(2)[..., None].expand(-1, -1, -1, size))
    scores = (chosen.view(*candidate.shape, size) @ asking[..., None])[..., 0]
    rows = mask.expand(-1, groups, -1, -1).repeat(1, 1, query.shape[1] // groups, 1)  # (B, G, R * T, S)
    scores = scores.masked_fill(~(inside & rows.gather(3, candidate)), float("-inf"))
    best, at = scores.topk(min(count, scores.shape[-1]), dim=-1)
    index = candidate.gather(3, at).masked_fill(best == float("-inf"), -1)
    return index.view(*query.shape[:3], -1)


def _clusters(key: Tensor, clusters: int, used: Tensor, rounds: int = 5) -> tuple[Tensor, Tensor]:
    """Means (B, G, clusters, D) of length 1, and the cluster of each key (B, G, S); `clusters` for keys not `used`."""
    batch, groups, _total, size = key.shape
    used = used.expand(-1, groups, -1)
    # The first means are keys at even distances among those that are used.
    order = (~used).to(torch.int8).argsort(dim=-1, stable=True)
    pick = torch.arange(clusters, device=key.device) * used.sum(-1, keepdim=True) // clusters
    means = key.gather(2, order.gather(2, pick)[..., None].expand(-1, -1, -1, size))
    cluster = torch.zeros_like(order)
    for _ in range(rounds):
        cluster = (key @ means.mT).argmax(dim=-1).masked_fill(~used, clusters)
        sums = key.new_zeros(batch, groups, clusters + 1, size)
        sums = sums.scatter_add(2, cluster[..., None].expand_as(key), key)[:, :, :clusters]
        means = torch.where(sums.norm(dim=-1, keepdim=True) > 0, F.normalize(sums, dim=-1), means)
    return means, cluster


def _chunks(query: Tensor, chunk: int) -> list[tuple[int, Tensor]]:
    return [(start, query[:, :, start : start + chunk]) for start in range(0, query.shape[2], chunk)]


def _columns(tokens: Tokens, start: int, length: int) -> Tokens:
    at = slice(start, start + length)
    return Tokens(
        tokens.position[:, at], tokens.document[:, at], None if tokens.marked is None else tokens.marked[:, at]
    )
