"""Normalisation over the features: LayerNorm (arXiv:1607.06450) and RMSNorm (arXiv:1910.07467)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lamina.errors import LaminaError
from lamina.layers.initial import Draw
from lamina.specs import Spec


@dataclass(frozen=True, kw_only=True)
class LayerNormSpec(Spec):
    """y = weight (x - mean) / sqrt(variance + eps) + bias, with the biased variance."""

    eps: float = 1e-5  # GPT-2, RoBERTa, BART; 1e-12 in BERT
    bias: bool = True  # False in PaLM
    weight: bool = (
        True  # False, with the bias, in OPT's layer_norm_elementwise_affine=false and OLMo (arXiv:2402.00838)
    )

    def check(self) -> None:
        if self.bias and not self.weight:
            raise LaminaError("a LayerNorm with a bias has a weight too: weight=False needs bias=False")

    def build(self, width: int) -> LayerNorm:
        return LayerNorm(self, width)


@dataclass(frozen=True, kw_only=True)
class RMSNormSpec(Spec):
    """y = x / sqrt(mean(x^2) + eps) * weight, the root in float32."""

    eps: float = 1e-6  # T5, LLaMA 1, Qwen, Gemma; 1e-5 in Llama 2 and 3, Mistral
    plus_one: bool = False  # Gemma: the factor is 1 + weight, and weight starts at zero
    wide_product: bool = False  # Gemma: the product is taken in float32 before the cast; LLaMA casts first
    weight: bool = True  # False: no product at all, on the heads of DiffLlama

    def check(self) -> None:
        if self.plus_one and not self.weight:
            raise LaminaError("RMSNormSpec(plus_one=True, weight=False): 1 + weight needs a weight")

    def build(self, width: int) -> RMSNorm:
        return RMSNorm(self, width)


NormSpec = LayerNormSpec | RMSNormSpec


class LayerNorm(nn.Module):
    """LayerNorm with or without weight and bias. (..., width) -> (..., width)."""

    def __init__(self, spec: LayerNormSpec, width: int) -> None:
        super().__init__()
        self.eps = spec.eps
        self.width = (width,)
        self.weight = nn.Parameter(torch.ones(width)) if spec.weight else None
        self.bias = nn.Parameter(torch.zeros(width)) if spec.bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.width, self.weight, self.bias, self.eps)

    def initialise(self, draw: Draw) -> None:
        if self.weight is not None:
            nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class RMSNorm(nn.Module):
    """RMSNorm, in both published orders of cast and product. (..., width) -> (..., width)."""

    def __init__(self, spec: RMSNormSpec, width: int) -> None:
        super().__init__()
        self.spec, self.width = spec, width
        start = torch.zeros(width) if spec.plus_one else torch.ones(width)
        self.weight = nn.Parameter(start) if spec.weight else None

    def forward(self, x: Tensor) -> Tensor:
        spec = self.spec
        if x.dtype == torch.float32 and not spec.plus_one and (self.weight is None or self.weight.dtype == x.dtype):
            return F.rms_norm(x, (self.width,), self.weight, spec.eps)
        wide = x.float() if x.dtype != torch.float64 else x
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + spec.eps)
        if self.weight is None:
            return wide.to(x.dtype)
        if spec.wide_product:
            weight = self.weight.to(wide.dtype)
            return (wide * (1.0 + weight if spec.plus_one else weight)).to(x.dtype)
        return wide.to(x.dtype) * (1.0 + self.weight if spec.plus_one else self.weight)

    def initialise(self, draw: Draw) -> None:
        if self.weight is not None:
            nn.init.constant_(self.weight, 0.0 if self.spec.plus_one else 1.0)
