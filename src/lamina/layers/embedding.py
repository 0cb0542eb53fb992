"""Embeddings: token ids to vectors, and what is added to them (arXiv:1706.03762, section 3.4)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lamina.errors import LaminaError
from lamina.layers.initial import Draw
from lamina.layers.linear import Linear
from lamina.layers.parameter import parameter
from lamina.specs import Spec


@dataclass(frozen=True, kw_only=True)
class EmbeddingSpec(Spec):
    """A table of `vocabulary` rows. The head may share it (tied)."""

    vocabulary: int
    scale: Literal["none", "root", "rounded_root"] = "none"  # sqrt(width): Vaswani 2017; rounded to the dtype in Gemma
    padding: int | None = None  # this row gets no gradient: BERT, RoBERTa
    inner: int | None = None  # width of the table, where a matrix takes its rows to the model's: OPT-350m

    def check(self) -> None:
        if self.vocabulary < 1 or (self.padding is not None and not 0 <= self.padding < self.vocabulary):
            raise LaminaError(f"vocabulary={self.vocabulary} must be at least 1 and hold padding={self.padding}")

    def build(self, width: int) -> Embedding:
        return Embedding(self, width)


class Embedding(nn.Module):
    """(B, T) ids -> (B, T, width)."""

    SHARD = {"weight": "vocabulary.in"}

    def __init__(self, spec: EmbeddingSpec, width: int) -> None:
        super().__init__()
        self.spec = spec
        self.root = math.sqrt(width)
        self.weight = parameter(spec.vocabulary, width if spec.inner is None else spec.inner)
        self.up = None if spec.inner is None else Linear(spec.inner, width, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.scaled(F.embedding(ids, self.weight, padding_idx=self.spec.padding))
        return x if self.up is None else self.up(x)

    def scaled(self, x: Tensor) -> Tensor:
        """Rows of the table, times what the model multiplies its input with."""
        if self.spec.scale == "none":
            return x
        # A Python number multiplies exactly; a tensor of the dtype has been rounded first: bfloat16(sqrt(3072)) = 55.5
        return x * (self.root if self.spec.scale == "root" else torch.tensor(self.root, dtype=x.dtype, device=x.device))

    def initialise(self, draw: Draw) -> None:
        draw.table(self.weight)
        if self.spec.padding is not None:
            with torch.no_grad():
                self.weight[self.spec.padding].zero_()


@dataclass(frozen=True, kw_only=True)
class SegmentSpec(Spec):
    """A vector for each segment of the input: sentence A, sentence B (BERT, arXiv:1810.04805, section 3)."""

    count: int

    def build(self, width: int) -> Segment:
        return Segment(self, width)


class Segment(nn.Module):
    """(B, T) segment ids -> (B, T, width)."""

    def __init__(self, spec: SegmentSpec, width: int) -> None:
        super().__init__()
        self.weight = parameter(spec.count, width)

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.weight)

    def initialise(self, draw: Draw) -> None:
        draw.table(self.weight)
