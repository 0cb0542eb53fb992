"""Attention with a memory of what lies beyond its own keys: Infini-attention and Memorizing.

The memory is put around an attention and takes nothing away from it: the parameters keep their names, and the pattern
stays what its own keys obey. So one can be added to a trained model by editing its spec (docs/memory.md).

Segments are counted by position within the document. How a text is cut into forwards, padding, and what lies beside it
in the batch or the row change nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lamina.attend import attend, weights
from lamina.errors import LaminaError
from lamina.layers.attention import Attention, AttentionSpec
from lamina.layers.call import Call
from lamina.layers.infini import InfiniSpec
from lamina.layers.memorizing import MemorizingSpec
from lamina.specs import Spec


@dataclass(frozen=True, kw_only=True)
class MemoryAttentionSpec(Spec):
    """An attention and its memory."""

    attention: AttentionSpec
    memory: InfiniSpec | MemorizingSpec

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
        self.memory = spec.memory.build(spec.attention)

    def forward(self, x: Tensor, call: Call) -> Tensor:
        query, key, value = self.project(x)
        request = self.request(query, key, value, call)
        call.record.keep(f"{self.path}.weights", lambda: weights(request))
        local = attend(request, call.backend)  # (B, H, T, D)
        return self.joined(self.memory(local, query, key, value, call))
