"""What attention is asked to do: the tensors, whose they are, and every modifier of the scores."""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lamina.patterns import Pattern, Reach, allowed
from lamina.tokens import Tokens


@dataclass(frozen=True, eq=False)
class Request:
    """One call of attention. H query heads share G key heads: query head i reads key head i // (H / G)."""

    query: Tensor  # (B, H, T, D)
    key: Tensor  # (B, G, S, D)
    value: Tensor  # (B, G, S, value size)
    queries: Tokens  # (B, T)
    keys: Tokens  # (B, S)
    pattern: Pattern
    scale: float
    bias: Tensor | None = None  # broadcasts to (B, H, T, S), added after scaling: T5, ALiBi, Transformer-XL
    value_table: tuple[Tensor, Tensor] | None = None  # (buckets, value size) and (B, T, S) bucket of each pair: Shaw
    softcap: float | None = None  # c tanh(z / c), after the bias and before the mask: Gemma 2
    sink: Tensor | None = None  # (H,): a logit that takes probability and gives no value: GPT-OSS
    dropout: float = 0.0  # on the probabilities; the caller sets 0 in evaluation
    step: bool = False  # one new token a row, keys from a cache, which keeps its holes at zero: none has to be copied
    memo: MutableMapping[Any, Any] = field(
        default_factory=dict
    )  # lives for one forward: masks are built once a pattern

    def reach(self) -> Reach:
        """What is known of the mask without building it."""
        if self.queries.span is None or self.keys.span is None:
            return None
        return self.pattern.reach(self.queries.span, self.keys.span)

    def mask(self) -> Tensor:
        """(B, 1, T, S) bool: True where attention may look."""
        name = ("mask", self.pattern, id(self.queries), id(self.keys))
        if name not in self.memo:
            mask = allowed(self.pattern, self.queries.query(), self.keys.key())[:, None]
            # The tokens are kept beside the mask: an id is only unique while its object lives.
            self.memo[name] = (mask, self.queries, self.keys)
        return self.memo[name][0]

    def blind(self) -> Tensor:
        """(B, 1, S, 1) bool: keys that no query sees; what they hold (even NaN) must not leak through a zero weight."""
        name = ("blind", self.pattern, id(self.queries), id(self.keys))
        if name not in self.memo:
            self.memo[name] = (~self.mask().any(dim=2)[:, :, :, None], self.queries, self.keys)
        return self.memo[name][0]


def grouped(query: Tensor, groups: int) -> Tensor:
    """(B, H, T, D) -> (B, G, H / G * T, D): the query heads of one key head, one after the other."""
    batch, heads, length, size = query.shape
    return query.reshape(batch, groups, heads // groups * length, size)


def spread(tensor: Tensor, heads: int) -> Tensor:
    """(B, G, S, D) -> (B, H, S, D): each key head repeated for its query heads (repeat_interleave, not tile)."""
    return tensor if tensor.shape[1] == heads else torch.repeat_interleave(tensor, heads // tensor.shape[1], dim=1)
