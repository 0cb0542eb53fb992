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
from lamina.layers.cached import with_cache
from lamina.layers.call import Call
from lamina.layers.compressive import Compressive, CompressiveSpec, beside
from lamina.layers.gated_memory import GatedMemory
from lamina.layers.infini import InfiniSpec
from lamina.layers.memorizing import MemorizingSpec
from lamina.layers.recurrence import RecurrenceSpec
from lamina.patterns import Retained
from lamina.specs import Spec


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
        request = self._asked(x, query, key, value, call)
        call.record.keep(f"{self.path}.weights", lambda: weights(request))
        if isinstance(self.memory, GatedMemory):
            return self.joined(self.memory(attend(request, call.backend), query, key, value, call))
        return self.joined(attend(self.memory(request), call.backend))

    def _asked(self, x: Tensor, query: Tensor, key: Tensor, value: Tensor, call: Call) -> Request:
        """What is asked in the layer's own softmax."""
        memory, spec = self.memory, self.spec
        if isinstance(memory, GatedMemory):
            return self.request(query, key, value, call)
        if isinstance(memory, Compressive):
            memory.learn(self, x, (query, key, value), call)
        query, key, value, queries, keys = with_cache(self.path, call, query, key, value, spec.rotary, spec.head_dim)
        masked = keys
        if isinstance(memory, Compressive):
            short_key, short_value, made = memory.keys(self, x, call)
            keys, masked = beside(keys, made, call)
            key, value = torch.cat([key, short_key], dim=2), torch.cat([value, short_value], dim=2)
        request = self._request(query, key, value, queries, keys, call)
        return replace(request, keys=masked, pattern=memory.pattern)

    def keys_of(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, n, width) -> keys and values (B, G, n, D), without rotary phases."""
        key, value = self._split(self.k(x)), self._split(self.v(x))
        return key if self.k_norm is None else self.k_norm(key), value
