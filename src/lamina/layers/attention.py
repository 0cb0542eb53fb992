"""Multi-head self-attention with any number of key heads (arXiv:1706.03762, section 3.2; MQA arXiv:1911.02150;
GQA arXiv:2305.13245)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from lamina.attend import Request, attend, weights
from lamina.errors import LaminaError
from lamina.layers.cached import retained, with_cache
from lamina.layers.call import Call
from lamina.layers.initial import Draw
from lamina.layers.linear import Linear, together
from lamina.layers.norm import LayerNormSpec, RMSNormSpec
from lamina.layers.relative import ShawSpec, TransformerXLSpec
from lamina.layers.rotary import RotarySpec, check_width, prepare
from lamina.patterns import Causal, Pattern, Retained
from lamina.specs import Spec
from lamina.tokens import Tokens


@dataclass(frozen=True, kw_only=True)
class AttentionSpec(Spec):
    """softmax(scale q k^T + bias) v o. MHA: key_heads = heads; MQA: 1; GQA: between, heads a multiple of it."""

    heads: int
    key_heads: int
    head_dim: int  # need not be width / heads: 128 on 1024 in Qwen3-0.6B, 256 on 3072 in Gemma-7B
    pattern: Pattern = field(default_factory=Causal)
    rotary: RotarySpec | None = None  # LLaMA and its like
    relative: ShawSpec | TransformerXLSpec | None = None
    scale: float | None = None  # None: head_dim^-0.5; 1.0 in T5; 144^-0.5 in Gemma-2 27B
    softcap: float | None = None  # 50 in Gemma 2
    qk_norm: LayerNormSpec | RMSNormSpec | None = None  # on each head, before the rotary phases: Qwen 3, Gemma 3
    bias: Literal["none", "qkv", "all", "qvo"] = "none"  # "qkv" in Qwen 2; "all" in GPT-2, BERT; "qvo" in Whisper
    sink: bool = False  # a learned logit for each head that takes probability and gives no value: GPT-OSS
    dropout: float = 0.0  # on the probabilities: 0.1 in BERT and GPT-2

    def check(self) -> None:
        if self.key_heads < 1 or self.heads < 1 or self.heads % self.key_heads:
            raise LaminaError(f"heads={self.heads} must be a multiple of key_heads={self.key_heads}, both at least 1")
        if self.head_dim < 1 or not 0 <= self.dropout <= 1:
            raise LaminaError(f"head_dim={self.head_dim} must be at least 1, dropout={self.dropout} within 0 and 1")
        check_width(self.rotary, self.head_dim)
        if self.softcap is not None and self.softcap <= 0:
            raise LaminaError(f"softcap is {self.softcap}; it must be above 0, or None")

    def build(self, width: int) -> Attention:
        return Attention(self, width)


class Attention(nn.Module):
    """(B, T, width) -> (B, T, width)."""

    SHARD = {"q": "out", "k": "keys", "v": "keys", "o": "in", "sink": "heads"}

    def __init__(self, spec: AttentionSpec, width: int) -> None:
        super().__init__()
        self.spec = spec
        self.path = ""  # set by the model: the name of this layer's slot and records
        self.scale = spec.head_dim**-0.5 if spec.scale is None else spec.scale
        if spec.rotary is not None:
            prepare(spec.rotary, spec.head_dim)
        bias = spec.bias != "none"
        self.q = Linear(width, spec.heads * spec.head_dim, bias=bias)
        self.k = Linear(width, spec.key_heads * spec.head_dim, bias=spec.bias in ("qkv", "all"))
        self.v = Linear(width, spec.key_heads * spec.head_dim, bias=bias)
        self.q_norm = None if spec.qk_norm is None else spec.qk_norm.build(spec.head_dim)
        self.k_norm = None if spec.qk_norm is None else spec.qk_norm.build(spec.head_dim)
        self.relative = None if spec.relative is None else spec.relative.build(width, spec.heads, spec.head_dim)
        self.sink = nn.Parameter(torch.zeros(spec.heads)) if spec.sink else None
        self.o = Linear(spec.heads * spec.head_dim, width, bias=spec.bias in ("all", "qvo"))

    def gains(self) -> dict[str, float]:
        """What queries have in their initial deviation where scores are not divided by sqrt(head_dim): T5."""
        return {"q": self.spec.head_dim**-0.5 / self.spec.scale} if self.spec.scale else {}

    def retained(self) -> Retained:
        """What a cache has to keep for this layer. Raises UnsupportedError where tokens see later ones."""
        return retained(self.path, self.spec.pattern)

    def forward(self, x: Tensor, call: Call) -> Tensor:
        request = self.request(*self.project(x), call)
        call.record.keep(f"{self.path}.weights", lambda: weights(request))
        return self.joined(attend(request, call.backend))

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B, H, T, D), keys and values (B, G, T, D), without rotary phases."""
        query, key, value = map(self._split, together(x, (self.q, self.k, self.v)))
        if self.q_norm is not None and self.k_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        return query, key, value

    def request(self, query: Tensor, key: Tensor, value: Tensor, call: Call) -> Request:
        """What the new queries ask of all keys there are, those of the cache too."""
        query, key, value, queries, keys = with_cache(
            self.path, call, query, key, value, self.spec.rotary, self.spec.head_dim
        )
        return self._request(query, key, value, queries, keys, call)

    def joined(self, heads: Tensor) -> Tensor:
        """(B, H, T, D) -> (B, T, width)."""
        return self.o(heads.transpose(1, 2).flatten(2))

    def _request(self, query: Tensor, key: Tensor, value: Tensor, queries: Tokens, keys: Tokens, call: Call) -> Request:
        bias = None if call.bias is None else call.bias(queries, keys, call.memo)
        value_table = None
        if self.relative is not None:
            query, relative, value_table = self.relative(query, queries, keys, self.scale)
            bias = relative if bias is None else bias + relative
        return Request(
            query=query,
            key=key,
            value=value,
            queries=queries,
            keys=keys,
            pattern=self.spec.pattern,
            scale=self.scale,
            bias=bias,
            value_table=value_table,
            softcap=self.spec.softcap,
            sink=self.sink,
            dropout=self.spec.dropout if self.training else 0.0,
            memo=call.memo,
        )

    def _split(self, x: Tensor) -> Tensor:
        """(B, T, heads * D) -> (B, heads, T, D); the count comes from the shape, so a shard of the heads works too."""
        return x.unflatten(-1, (-1, self.spec.head_dim)).transpose(1, 2)

    def initialise(self, draw: Draw) -> None:
        if self.sink is not None:
            nn.init.zeros_(self.sink)
