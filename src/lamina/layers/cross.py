"""Cross-attention: the queries are those of a decoder, keys and values come from what an encoder read
(arXiv:1706.03762, section 3.2.3)."""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from lamina.attend import Request, attend, weights
from lamina.cache import MemorySlot, NeighbourSlot
from lamina.errors import LaminaError
from lamina.layers.cached import turn
from lamina.layers.call import Call
from lamina.layers.linear import Linear
from lamina.layers.norm import LayerNormSpec, RMSNormSpec
from lamina.layers.relative import TransformerXLSpec
from lamina.layers.rotary import RotarySpec, check_width, prepare
from lamina.patterns import Everything, Retained
from lamina.specs import Spec
from lamina.tokens import Tokens, plain


@dataclass(frozen=True, kw_only=True)
class CrossAttentionSpec(Spec):
    """softmax(scale q k^T) v o with k and v of the memory. Padding of the source is never seen; nothing is causal."""

    heads: int
    key_heads: int
    head_dim: int
    memory_width: int | None = None  # of what is read, where it is not the model's own
    relative: TransformerXLSpec | RotarySpec | None = None  # positions of what is read count from the same 0: RETRO
    scale: float | None = None  # None: head_dim^-0.5; 1.0 in T5
    qk_norm: LayerNormSpec | RMSNormSpec | None = None  # on each head: Llama 3.2 Vision
    bias: Literal["none", "qkv", "all", "qvo"] = "none"  # "all" in BART; "qvo" in Whisper
    dropout: float = 0.0  # on the probabilities

    def check(self) -> None:
        if self.key_heads < 1 or self.heads < 1 or self.heads % self.key_heads:
            raise LaminaError(f"heads={self.heads} must be a multiple of key_heads={self.key_heads}, both at least 1")
        if self.head_dim < 1 or not 0 <= self.dropout <= 1:
            raise LaminaError(f"head_dim={self.head_dim} must be at least 1, dropout={self.dropout} within 0 and 1")
        check_width(self.rotary, self.head_dim)

    @property
    def rotary(self) -> RotarySpec | None:
        return self.relative if isinstance(self.relative, RotarySpec) else None

    def build(self, width: int) -> CrossAttention:
        return CrossAttention(self, width)


class CrossAttention(nn.Module):
    """x (B, T, width) and call.memory (B, S, memory width) -> (B, T, width).

    With a cache the memory's keys and values are computed at the first step; later ones find them there. Where the
    batch is n beams of each text, the n beams are read as n T queries of one text, and no key is repeated.
    """

    SHARD = {"q": "out", "k": "keys", "v": "keys", "o": "in"}

    def __init__(self, spec: CrossAttentionSpec, width: int) -> None:
        super().__init__()
        self.spec = spec
        self.path = ""  # set by the model: the name of this layer's slot and records
        self.scale = spec.head_dim**-0.5 if spec.scale is None else spec.scale
        if spec.rotary is not None:
            prepare(spec.rotary, spec.head_dim)
        source = width if spec.memory_width is None else spec.memory_width
        bias = spec.bias != "none"
        self.q = Linear(width, spec.heads * spec.head_dim, bias=bias)
        self.k = Linear(source, spec.key_heads * spec.head_dim, bias=spec.bias in ("qkv", "all"))
        self.v = Linear(source, spec.key_heads * spec.head_dim, bias=bias)
        self.q_norm = None if spec.qk_norm is None else spec.qk_norm.build(spec.head_dim)
        self.k_norm = None if spec.qk_norm is None else spec.qk_norm.build(spec.head_dim)
        term = spec.relative if isinstance(spec.relative, TransformerXLSpec) else None
        self.relative = None if term is None else term.build(width, spec.heads, spec.head_dim)
        self.o = Linear(spec.heads * spec.head_dim, width, bias=spec.bias in ("all", "qvo"))

    def gains(self) -> dict[str, float]:
        """What queries have in their initial deviation where scores are not divided by sqrt(head_dim): T5."""
        return {"q": self.spec.head_dim**-0.5 / self.spec.scale} if self.spec.scale else {}

    def retained(self) -> Retained:
        """What a cache has to keep for this layer: the memory, whole."""
        return Retained(None, of="memory")

    def reads(self, call: Call) -> bool:
        """Whether there is anything to read; where there is not, the step is left out."""
        return isinstance(call.memory, Tensor)

    def forward(self, x: Tensor, call: Call, apart: tuple[int, int] | None = None) -> Tensor:
        """x (B n, T, width), n beams of each text. apart: as `TransformerXL` takes it."""
        query = self._split(self.q(x))  # (B n, H, T, D)
        query = query if self.q_norm is None else self.q_norm(query)
        query = turn(query, call.tokens, self.spec.rotary, self.spec.head_dim, call.memo)
        key, value, keys = self._memory(call)
        beams, queries, bias = x.shape[0] // key.shape[0], call.tokens, None
        if self.relative is not None and apart is None:
            apart = self.relative.apart(queries, keys)
        if beams > 1:
            query, queries = _gather(query, beams), _gathered(queries, beams, self.relative is None, call.memo)
        if self.relative is not None:
            query, bias, _ = self.relative(query, queries, keys, self.scale, apart)
        request = Request(
            query=query,
            key=key,
            value=value,
            queries=queries,
            keys=keys,
            pattern=Everything(),
            scale=self.scale,
            bias=bias,
            dropout=self.spec.dropout if self.training else 0.0,
            step=x.shape[1] == 1 and call.cache is not None,
            memo=call.memo,
        )
        call.record.keep(f"{self.path}.weights", lambda: _scatter(weights(request), beams))
        out = _scatter(attend(request, call.backend), beams)  # (B, H, T, D)
        return self.o(out.transpose(1, 2).flatten(2))

    def _memory(self, call: Call) -> tuple[Tensor, Tensor, Tokens]:
        """Keys (B, G, S, D), values, and whose they are."""
        slot = None if call.cache is None else call.cache.slot(self.path)
        kept = slot.kept(call.memory_tokens) if isinstance(slot, MemorySlot | NeighbourSlot) else None
        if kept is not None:
            return kept
        if not isinstance(call.memory, Tensor) or call.memory_tokens is None:
            raise LaminaError(f"{self.path or 'cross-attention'} has nothing to read: no encoder output was given")
        key, value = self._split(self.k(call.memory)), self._split(self.v(call.memory))
        key = key if self.k_norm is None else self.k_norm(key)
        key = turn(key, call.memory_tokens, self.spec.rotary, self.spec.head_dim, call.memo)
        if slot is not None:
            return slot.extend(key, value, call.memory_tokens)
        return key, value, call.memory_tokens

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.spec.head_dim)).transpose(1, 2)


def _gather(x: Tensor, beams: int) -> Tensor:
    """(B n, H, T, D) -> (B, H, n T, D)."""
    return x.unflatten(0, (-1, beams)).transpose(1, 2).flatten(2, 3)


def _scatter(x: Tensor, beams: int) -> Tensor:
    """The inverse of `_gather`."""
    return x if beams == 1 else x.unflatten(2, (beams, -1)).transpose(1, 2).flatten(0, 1)


def _gathered(tokens: Tokens, beams: int, anew: bool, memo: MutableMapping[Any, Any]) -> Tokens:
    """Tokens (B n, T) as (B, n T). `anew`: only documents are asked for, so plain ones may be numbered anew."""
    name = ("gathered", id(tokens), beams, anew)
    if name not in memo:
        rows, length = tokens.position.shape
        if anew and tokens.span is not None:
            gathered = plain(rows // beams, beams * length, device=tokens.position.device)
        else:
            position, document = (each.reshape(-1, beams * length) for each in (tokens.position, tokens.document))
            gathered = Tokens(position, document)
        memo[name] = (gathered, tokens)
    return memo[name][0]
