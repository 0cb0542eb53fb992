"""Memories at the size of a page, and what every test of them needs: a model of them, and attention in loops."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.memory import decoder
from lamina.layers import (
    AttentionSpec,
    CompressiveSpec,
    InfiniSpec,
    MemorizingSpec,
    MemoryAttentionSpec,
    RecurrenceSpec,
    RotarySpec,
)
from lamina.model import Model, ModelSpec
from lamina.patterns import BlockWindow, Causal, Pattern, Window
from tests import small

LENGTH = 3  # of a segment
OWN = Causal() & BlockWindow(size=LENGTH, back=1)  # the token's own segment
NEAR = Causal() & Window(back=2)

MEMORIES: dict[str, tuple[Any, Pattern]] = {
    "recurrence": (RecurrenceSpec(length=LENGTH, size=4), Causal()),
    "recurrence, short": (RecurrenceSpec(length=LENGTH, size=2), NEAR),
    "compressive": (CompressiveSpec(length=4, size=2, count=3, rate=2), Causal()),
    "compressive, mean": (CompressiveSpec(length=3, size=3, count=2, rate=3, by="mean"), Causal()),
    "compressive, max": (CompressiveSpec(length=2, size=4, count=2, rate=2, by="max"), NEAR),
    "compressive, most used": (CompressiveSpec(length=4, size=4, count=2, rate=2, by="most-used"), Causal()),
    "compressive, used twice": (CompressiveSpec(length=3, size=6, count=3, rate=3, by="most-used"), NEAR),
    "infini": (InfiniSpec(length=LENGTH), OWN),
    "infini, delta": (InfiniSpec(length=LENGTH, update="delta"), OWN),
    "infini beside all keys": (InfiniSpec(length=LENGTH), Causal()),
    "memorizing": (MemorizingSpec(length=LENGTH, size=5, count=2, sharpness=3.0), OWN),
    "memorizing beyond a window": (MemorizingSpec(length=LENGTH, size=7, count=3, sharpness=3.0), NEAR),
}
UNBOUNDED = ("infini beside all keys",)
"""Those whose own keys reach everything."""
NO_FIXED = {name: "compresses what has passed" for name in MEMORIES if name.startswith("compressive")}
NO_FIXED |= {name: "sums up what has passed" for name in MEMORIES if "infini" in name or "used" in name}
"""What a fixed cache says of a memory."""


def spec(memory: Any, pattern: Pattern, layers: int = 2, **fields: Any) -> ModelSpec:
    """A pre-norm decoder whose attentions have this memory."""
    given = {"heads": 4, "key_heads": 2, "head_dim": 6, "rotary": RotarySpec(base=100.0)} | fields
    op = MemoryAttentionSpec(attention=AttentionSpec(pattern=pattern, **given), memory=memory)
    return decoder(op, small.VOCABULARY, 16, 24, layers)


def build(name: str, seed: int = 0, **fields: Any) -> Model:
    memory, pattern = MEMORIES[name]
    return small.build(spec(memory, pattern, **fields), seed=seed)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def heads_of(layer: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of one row (T, width) as (H, T, D), key heads repeated for their query heads."""
    size, heads = layer.spec.head_dim, layer.spec.heads

    def split(weight: Tensor) -> Tensor:
        part = (x @ weight.T).unflatten(-1, (-1, size)).transpose(0, 1)
        return part.repeat_interleave(heads // part.shape[0], dim=0)

    return split(layer.q.weight), split(layer.k.weight), split(layer.v.weight)


def soft(query: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """One query of some keys."""
    return (keys @ query * scale).softmax(dim=0) @ values
