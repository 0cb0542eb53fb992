"""Attention with a memory of what lies beyond its own keys: recurrence, compressive, Memorizing, Infini.

The memory is put around an attention: the parameters keep their names, and the pattern stays what its own keys obey. So
one can be added to a trained model by editing its spec (docs/memory.md). A memory is read in the same softmax as the
keys (recurrence, compressive), or by itself, and mixed in by a gate for each head.

Segments are counted by position within the document. How a text is cut into forwards, padding, and what lies beside it
in the batch or the row change nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lamina.attend import Request, attend, weights
from lamina.errors import LaminaError
from lamina.layers.attention import Attention, AttentionSpec
from lamina.layers.cached import turn, with_cache
from lamina.layers.call import Call
from lamina.layers.compressive import Compressive, CompressiveSpec, beside
from lamina.layers.gated_memory import GatedMemory
from lamina.layers.infini import InfiniSpec
from lamina.layers.memorizing import MemorizingSpec
from lamina.layers.recurrence import Anew, Kept, RecurrenceSpec
from lamina.patterns import Retained
from lamina.specs import Spec
from lamina.tokens import Tokens


@dataclass(frozen=True, kw_only=True)
class MemoryAttentionSpec(Spec):
    """An attention and its memory."""

    attention: AttentionSpec
    memory: RecurrenceSpec | CompressiveSpec | MemorizingSpec | InfiniSpec

    def check(self) -> None:
        if self.attention.pattern.looks_ahead():
            found = type(self.attention.pattern).__name__
            raise LaminaError(
                f"a memory holds what came before, and attention.pattern ({found}) looks ahead; use Causal()"
            )

    def build(self, width: int) -> MemoryAttention:
        return MemoryAttention(self, width)


class MemoryAttention(Attention):
    """(B, T, width) -> (B, T, width)."""

    def __init__(self, spec: MemoryAttentionSpec, width: int) -> None:
        super().__init__(spec.attention, width)
        self.memory = (
            spec.memory.build(spec.attention, width)
            if isinstance(spec.memory, CompressiveSpec)
            else spec.memory.build(spec.attention)
        )

    def retained(self) -> Retained:
        """What a cache has to keep for the layer itself; what a memory keeps besides has slots of its own."""
        return super().retained() if isinstance(self.memory, GatedMemory) else self.memory.kept()

    def forward(self, x: Tensor, call: Call) -> Tensor:
        query, key, value = self.project(x)
        if isinstance(self.memory, GatedMemory):
            request = self.request(query, key, value, call)
            call.record.keep(f"{self.path}.weights", lambda: weights(request))
            return self.joined(self.memory(attend(request, call.backend), query, key, value, call))
        query, own, older = self._with_memory(x, query, key, value, call)
        request = self._asked(query, call.tokens, own, older, call)
        call.record.keep(f"{self.path}.weights", lambda: weights(request))
        return self.joined(attend(self.memory(request, self._anew(own, older, call)), call.backend))

    def _with_memory(
        self, x: Tensor, query: Tensor, key: Tensor, value: Tensor, call: Call
    ) -> tuple[Tensor, Kept, Kept | None]:
        """Queries, the keys that there are, and compressed ones."""
        memory, spec = self.memory, self.spec
        assert not isinstance(memory, GatedMemory)
        if isinstance(memory, Compressive):
            memory.learn(self, x, (query, key, value), call)
        query, key, value, _, keys = with_cache(self.path, call, query, key, value, spec.rotary, spec.head_dim)
        own = Kept(keys, key, value, memory.inputs(x, call.tokens, call))
        if not isinstance(memory, Compressive):
            return query, own, None

        def asked(query: Tensor, queries: Tokens, own: Kept, older: Kept) -> Request:
            return self._asked(query, queries, own, older, replace(call, memo={}))  # masks of one segment alone

        return query, own, memory.remembered(self, x, query, own, call, asked)

    def _asked(self, query: Tensor, queries: Tokens, own: Kept, older: Kept | None, call: Call) -> Request:
        """What is asked in the one softmax."""
        keys, masked = (own.tokens, own.tokens) if older is None else beside(own.tokens, older.tokens, call)
        every = own if older is None else own.beside(older)
        request = self._request(query, every.key, every.value, queries, keys, call)
        return replace(request, keys=masked, pattern=self.memory.pattern)  # pyright: ignore[reportArgumentType]

    def _anew(self, own: Kept, older: Kept | None, call: Call) -> Anew:
        """How to make those keys and values anew, where what they are made of is kept."""
        parts = [one for one in (own, older) if one is not None]
        if any(one.inputs is None for one in parts):
            return None

        def made() -> tuple[Tensor, Tensor]:
            pairs = [self._made(one, call) for one in parts]
            key, value = (torch.cat(both, dim=2) for both in zip(*pairs, strict=True))
            return key, value

        return made

    def _made(self, kept: Kept, call: Call) -> tuple[Tensor, Tensor]:
        assert kept.inputs is not None
        key, value = self.keys_of(kept.inputs[:, 0])
        return turn(key, kept.tokens, self.spec.rotary, self.spec.head_dim, call.memo), value

    def keys_of(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, n, width) -> keys and values (B, G, n, D), without rotary phases."""
        key, value = self._split(self.k(x)), self._split(self.v(x))
        return key if self.k_norm is None else self.k_norm(key), value
