"""BigBird's attention as its published checkpoints are run: windows of blocks and global end blocks (arXiv:2007.14062,
section 2), without random blocks, in whose stead the first block counts several times.

Transformers draws random blocks in training only; in evaluation each of the `repeats` draws is block 0, whose keys so
stand in the softmax once more for each. That is what published scores were measured with, and what is computed here. A
pattern with `RandomBlocks` on an AttentionSpec is the paper's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lamina.attend import Request
from lamina.errors import LaminaError
from lamina.layers.attention import Attention, AttentionSpec
from lamina.layers.call import Call
from lamina.patterns import BlockWindow, Global, Pattern
from lamina.specs import Spec
from lamina.tokens import Tokens


@dataclass(frozen=True, kw_only=True)
class BigBirdSpec(Spec):
    """Tokens see their block of `size` positions, the ones beside it, and the marked tokens; those see everything. For
    tokens that are not marked the first block counts 1 + `repeats` times."""

    heads: int
    head_dim: int
    size: int = 64
    repeats: int = 3  # num_random_blocks
    bias: Literal["none", "qkv", "all", "qvo"] = "all"
    dropout: float = 0.0  # on the probabilities

    def check(self) -> None:
        if self.size < 1 or self.repeats < 0:
            raise LaminaError(f"size={self.size} must be 1 or more, repeats={self.repeats} 0 or more")

    @property
    def pattern(self) -> Pattern:
        """Who sees whom."""
        return BlockWindow(size=self.size, back=2, ahead=1) | Global()

    @property
    def key_heads(self) -> int:
        """As many as there are heads."""
        return self.heads

    @property
    def dense(self) -> AttentionSpec:
        """The attention that has the same weights."""
        return AttentionSpec(
            heads=self.heads,
            key_heads=self.heads,
            head_dim=self.head_dim,
            pattern=self.pattern,
            bias=self.bias,
            dropout=self.dropout,
        )

    def build(self, width: int) -> BigBird:
        return BigBird(self, width)


class BigBird(Attention):
    """(B, T, width) -> (B, T, width)."""

    def __init__(self, spec: BigBirdSpec, width: int) -> None:
        super().__init__(spec.dense, width)
        self.size, self.repeats = spec.size, spec.repeats

    def _request(self, query: Tensor, key: Tensor, value: Tensor, queries: Tokens, keys: Tokens, call: Call) -> Request:
        # A key that stands in a softmax n times is one with log n added to its scores: one more feature, that of the
        # queries being log n where the token is not marked and that of the keys 1 in the first block.
        if self.repeats:
            usual = torch.ones_like(queries.position) if queries.marked is None else ~queries.marked
            more = usual.to(query.dtype) * (math.log(1 + self.repeats) / self.scale)
            first = ((keys.position >= 0) & (keys.position < self.size)).to(key.dtype)
            query = torch.cat([query, more[:, None, :, None].expand(*query.shape[:3], 1)], dim=3)
            key = torch.cat([key, first[:, None, :, None].expand(*key.shape[:3], 1)], dim=3)
        return super()._request(query, key, value, queries, keys, call)
