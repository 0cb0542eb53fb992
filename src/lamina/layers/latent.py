"""Multi-head latent attention: keys and values of all heads come from one small vector a token, and only that is cached
(DeepSeek-V2, arXiv:2405.04434, section 2.1; DeepSeek-V3, arXiv:2412.19437, section 2.1.1).

    c = RMSNorm(W_DKV x),  r = RoPE(W_KR x)        kept by a cache: key_rank + rope_dim numbers, for all heads together
    k_h = [W_UK,h c, r],   v_h = W_UV,h c          the naive form: keys and values written out
    q_h . k_h = (W_UK,h^T q_nope,h) . c + q_rope,h . r,   sum_s a_s v_h,s = W_UV,h sum_s a_s c_s     the absorbed form

Both are the same function. Absorbed, all heads read one key (multi-query attention with wide heads) and none is
written out. Which form multiplies less follows from the number of queries and keys. Example, each head of DeepSeek-V3:
to write a key and a value out takes 512 (128 + 128) = 131,072 products, to absorb a query the same; a pair of query and
key then takes 128 + 64 + 128 = 320 where written out, 512 + 64 + 512 = 1,088 absorbed. One query of 1,000 keys takes
131 million or 1.2 million; 1,000 queries of 1,000 keys 0.45 or 1.2 billion.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lamina.attend import Request, attend, weights
from lamina.errors import LaminaError
from lamina.layers.cached import retained, with_cache
from lamina.layers.call import Call
from lamina.layers.linear import Linear
from lamina.layers.norm import RMSNormSpec
from lamina.layers.rotary import RotarySpec, YarnScaling, prepare
from lamina.patterns import Causal, Pattern, Retained
from lamina.specs import Spec


@dataclass(frozen=True, kw_only=True)
class LatentAttentionSpec(Spec):
    """Heads of nope_dim features without a position and rope_dim with one; values of value_dim. DeepSeek-V2 and V3."""

    heads: int
    query_rank: int | None = None  # queries from a small vector too: 1536; None in V2-Lite
    key_rank: int  # of the vector that is cached: 512
    nope_dim: int  # 128
    rope_dim: int  # 64, one vector for all heads; 0 where nothing turns
    value_dim: int  # 128
    rotary: RotarySpec | None = None  # on the rope_dim features, interleaved in DeepSeek's files
    pattern: Pattern = field(default_factory=Causal)
    norm: RMSNormSpec | None = field(
        default_factory=RMSNormSpec
    )  # of the small vectors; None: what surgery makes of GQA
    scale: float | None = None  # None: (nope_dim + rope_dim)^-0.5, with YaRN times temperature(scale_all)^2
    bias: bool = False  # on the maps to the small vectors and on the output
    dropout: float = 0.0  # on the probabilities

    def check(self) -> None:
        sizes = ("heads", "key_rank", "nope_dim", "value_dim")
        for name in (*sizes, *(["query_rank"] if self.query_rank is not None else [])):
            if getattr(self, name) < 1:
                raise LaminaError(f"{name} is {getattr(self, name)}; it must be at least 1")
        turned = 0 if self.rotary is None else self.rotary.width or self.rope_dim
        if self.rope_dim < 0 or (self.rotary is not None and self.rope_dim == 0):
            raise LaminaError(f"rope_dim is {self.rope_dim}; it must be at least 1, or 0 with rotary=None")
        if turned > self.rope_dim or turned % 2:
            raise LaminaError(f"rotary.width={turned} must be even and at most rope_dim={self.rope_dim}")
        if not 0 <= self.dropout <= 1:
            raise LaminaError(f"dropout={self.dropout} must lie within 0 and 1")

    def build(self, width: int) -> LatentAttention:
        return LatentAttention(self, width)


class LatentAttention(nn.Module):
    """(B, T, width) -> (B, T, width)."""

    SHARD = {"q": "out", "k": "out", "v": "out", "o": "in"}

    READ_WHOLE = ("k", "v")
    """Matrices that are also read as such, by head, and not only multiplied with: they are not rounded to 8 bits."""

    def __init__(self, spec: LatentAttentionSpec, width: int) -> None:
        super().__init__()
        self.spec = spec
        self.path = ""  # set by the model: the name of this layer's slot and records
        self.scale = scale_of(spec)
        if spec.rotary is not None:
            prepare(spec.rotary, spec.rope_dim)
        rank, size = spec.query_rank, spec.nope_dim + spec.rope_dim
        self.q_down = None if rank is None else Linear(width, rank, bias=spec.bias)
        self.q_norm = None if rank is None or spec.norm is None else spec.norm.build(rank)
        self.q = Linear(width if rank is None else rank, spec.heads * size, bias=False)
        self.kv_down = Linear(width, spec.key_rank + spec.rope_dim, bias=spec.bias)
        self.kv_norm = None if spec.norm is None else spec.norm.build(spec.key_rank)
        self.k = Linear(spec.key_rank, spec.heads * spec.nope_dim, bias=False)
        self.v = Linear(spec.key_rank, spec.heads * spec.value_dim, bias=False)
        self.o = Linear(spec.heads * spec.value_dim, width, bias=spec.bias)

    def retained(self) -> Retained:
        """What a cache has to keep for this layer. Raises UnsupportedError where tokens see later ones."""
        return retained(self.path, self.spec.pattern)

    def forward(self, x: Tensor, call: Call) -> Tensor:
        small = x if self.q_down is None else self.q_down(x)
        small = small if self.q_norm is None else self.q_norm(small)
        query = self._heads(self.q(small), self.spec.nope_dim + self.spec.rope_dim)  # (B, H, T, nope + rope)
        latent, shared = self.kv_down(x).split([self.spec.key_rank, self.spec.rope_dim], dim=-1)
        latent = latent if self.kv_norm is None else self.kv_norm(latent)
        key = torch.cat([latent, shared], dim=-1)[:, None]  # (B, 1, T, rank + rope)
        # The value is part of the key, so a cache keeps an empty one beside it.
        query, key, _, queries, keys = with_cache(
            self.path, call, query, key, key[..., :0], self.spec.rotary, self.spec.rope_dim
        )
        absorbed = self.absorbs(query.shape[2], key.shape[2])
        query, key, value = self.absorb(query, key) if absorbed else self.expand(query, key)
        request = Request(
            query=query,
            key=key,
            value=value,
            queries=queries,
            keys=keys,
            pattern=self.spec.pattern,
            scale=self.scale,
            bias=None if call.bias is None else call.bias(queries, keys, call.memo),
            dropout=self.spec.dropout if self.training else 0.0,
            memo=call.memo,
        )
        call.record.keep(f"{self.path}.weights", lambda: weights(request))
        out = attend(request, call.backend)  # (B, H, T, value), or (B, H, T, rank) absorbed
        out = out @ self._by_head(self.v).mT if absorbed else out
        return self.o(out.transpose(1, 2).flatten(2))

    def absorbs(self, queries: int, keys: int) -> bool:
        """Whether the absorbed form takes fewer multiplications for so many queries of so many keys."""
        spec = self.spec
        written = spec.key_rank * (spec.nope_dim + spec.value_dim)  # to expand a key, or to absorb a query
        naive = keys * written + queries * keys * (spec.nope_dim + spec.rope_dim + spec.value_dim)
        return queries * written + queries * keys * (2 * spec.key_rank + spec.rope_dim) < naive

    def expand(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The naive form: (B, 1, S, rank + rope) as keys (B, H, S, nope + rope) and values (B, H, S, value)."""
        latent, shared = key.split([self.spec.key_rank, self.spec.rope_dim], dim=-1)
        own = self._heads(self.k(latent[:, 0]), self.spec.nope_dim)
        value = self._heads(self.v(latent[:, 0]), self.spec.value_dim)
        return query, torch.cat([own, shared.expand(-1, own.shape[1], -1, -1)], dim=-1), value

    def absorb(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The absorbed form: queries (B, H, T, rank + rope); all heads read the key as it is, and its rank as value."""
        own, turned = query.split([self.spec.nope_dim, self.spec.rope_dim], dim=-1)
        own = own @ self._by_head(self.k)  # (B, H, T, rank)
        return torch.cat([own, turned], dim=-1), key, key[..., : self.spec.key_rank]

    def _by_head(self, up: nn.Linear) -> Tensor:
        """(H size, rank) -> (H, size, rank)."""
        return up.weight.unflatten(0, (self.q.weight.shape[0] // (self.spec.nope_dim + self.spec.rope_dim), -1))

    def _heads(self, x: Tensor, size: int) -> Tensor:
        """(B, T, H * size) -> (B, H, T, size)."""
        return x.unflatten(-1, (-1, size)).transpose(1, 2)


def scale_of(spec: LatentAttentionSpec) -> float:
    """What scores are multiplied by."""
    if spec.scale is not None:
        return spec.scale
    scaling = None if spec.rotary is None else spec.rotary.scaling
    sharpened = (
        scaling.temperature(scaling.scale_all) if isinstance(scaling, YarnScaling) and scaling.scale_all else 1.0
    )
    return (spec.nope_dim + spec.rope_dim) ** -0.5 * sharpened**2
