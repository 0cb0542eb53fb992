"""Positions added to the input: learned (GPT, BERT) and sinusoidal, in both published orderings."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lamina.errors import LaminaError
from lamina.layers.initial import Draw
from lamina.layers.parameter import parameter
from lamina.specs import Spec
from lamina.tokens import Tokens


@dataclass(frozen=True, kw_only=True)
class LearnedPositionSpec(Spec):
    """One trained vector a position."""

    size: int  # positions that a text can have: 1024 in GPT-2, 512 in BERT and RoBERTa
    offset: int = 0  # rows before position 0: RoBERTa and BART 2 (arXiv:1907.11692, fairseq)

    def check(self) -> None:
        if self.size < 1 or self.offset < 0:
            raise LaminaError(f"LearnedPositionSpec(size={self.size}, offset={self.offset}): size >= 1, offset >= 0")

    def build(self, width: int) -> LearnedPosition:
        return LearnedPosition(self, width)


@dataclass(frozen=True, kw_only=True)
class SinusoidalPositionSpec(Spec):
    """sin and cos of the position. "interleaved": sin, cos, sin, cos with 10000^(-2i / width) (arXiv:1706.03762,
    section 3.5). "halves": all sin then all cos with 10000^(-i / (width / 2 - 1)) (tensor2tensor, fairseq)."""

    order: Literal["interleaved", "halves"] = "interleaved"
    base: float = 10_000.0
    offset: int = 0  # what position 0 counts as: 2 in M2M-100 and NLLB (fairseq counts from the id of padding, 1)

    def check(self) -> None:
        if self.offset < 0:
            raise LaminaError(f"SinusoidalPositionSpec(offset={self.offset}): offset >= 0")

    def build(self, width: int) -> SinusoidalPosition:
        return SinusoidalPosition(self, width)


class LearnedPosition(nn.Module):
    """Tokens (B, T) -> (B, T, width). Padding reads row offset - 1, which RoBERTa keeps for it."""

    def __init__(self, spec: LearnedPositionSpec, width: int) -> None:
        super().__init__()
        self.spec = spec
        self.weight = parameter(spec.size + spec.offset, width)

    def forward(self, tokens: Tokens) -> Tensor:
        size, position = self.spec.size, tokens.position
        if tokens.span is not None:
            most = tokens.span[1] - 1
        elif position.device.type == "cpu" and not torch.compiler.is_compiling() and position.numel():
            most = int(position.max())  # looking at the data is free on the CPU
        else:
            most = -1
        if most >= size:
            raise LaminaError(f"position {most} is beyond this model: it has learned {size} positions")
        return F.embedding((tokens.position + self.spec.offset).clamp(min=0), self.weight)

    def initialise(self, draw: Draw) -> None:
        draw.table(self.weight, "position")


class SinusoidalPosition(nn.Module):
    """Tokens (B, T) -> (B, T, width), computed from the positions; an odd width ends in a zero."""

    def __init__(self, spec: SinusoidalPositionSpec, width: int) -> None:
        super().__init__()
        self.spec, self.width = spec, width

    def forward(self, tokens: Tokens) -> Tensor:
        halves = self.spec.order == "halves"
        pairs = self.width // 2 if halves else (self.width + 1) // 2
        step = math.log(self.spec.base) / (max(pairs - 1, 1) if halves else self.width / 2)
        index = torch.arange(pairs, dtype=torch.float32, device=tokens.position.device)
        position = tokens.position.clamp(min=0) + self.spec.offset
        angle = position.to(torch.float32)[:, :, None] * torch.exp(-step * index)
        sin, cos = angle.sin(), angle.cos()  # (B, T, pairs)
        if halves:
            return F.pad(torch.cat([sin, cos], dim=-1), (0, self.width % 2))
        return torch.stack([sin, cos], dim=-1).flatten(-2)[..., : self.width]
