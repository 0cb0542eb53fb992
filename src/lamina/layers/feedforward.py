"""Feed-forward layers: two matrices (arXiv:1706.03762, section 3.3) or gated (arXiv:2002.05202, equation 6)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lamina.errors import LaminaError
from lamina.layers.call import Call
from lamina.layers.dropout import dropout
from lamina.layers.gelu import gelu_tanh
from lamina.layers.linear import Linear, together
from lamina.specs import Spec

Activation = Literal["relu", "gelu", "gelu_tanh", "quick_gelu", "silu", "relu_squared", "sigmoid", "identity", "tanh"]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,  # x Phi(x), exact
    "gelu_tanh": gelu_tanh,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "silu": F.silu,
    "relu_squared": lambda x: F.relu(x).square(),  # Primer, arXiv:2109.08668
    "sigmoid": torch.sigmoid,
    "identity": lambda x: x,
    "tanh": torch.tanh,
}


@dataclass(frozen=True, kw_only=True)
class FeedForwardSpec(Spec):
    """Plain: down(act(up x)). Gated: down(act(gate x) * up x). The gated names: GLU sigmoid, bilinear identity,
    ReGLU relu, GEGLU gelu or gelu_tanh, SwiGLU silu."""

    hidden: int
    act: Activation = "silu"  # LLaMA; gelu_tanh in GPT-2 and Gemma, gelu in BERT, relu in T5
    gated: bool = True  # False in GPT-2, BERT, T5 v1.0
    bias: bool = False  # True in GPT-2, BERT
    dropout: float = 0.0  # after the activation: T5

    def check(self) -> None:
        if self.hidden < 1 or not 0 <= self.dropout <= 1:
            raise LaminaError(f"hidden={self.hidden} must be at least 1, dropout={self.dropout} within 0 and 1")

    def build(self, width: int) -> FeedForward:
        return FeedForward(self, width)


class FeedForward(nn.Module):
    """(B, T, width) -> (B, T, width), each position by itself."""

    SHARD = {"gate": "out", "up": "out", "down": "in"}

    def __init__(self, spec: FeedForwardSpec, width: int) -> None:
        super().__init__()
        self.spec = spec
        self.act = ACTIVATIONS[spec.act]
        self.gate = Linear(width, spec.hidden, bias=spec.bias) if spec.gated else None
        self.up = Linear(width, spec.hidden, bias=spec.bias)
        self.down = Linear(spec.hidden, width, bias=spec.bias)

    def forward(self, x: Tensor, call: Call) -> Tensor:
        if self.gate is None:
            h = self.act(self.up(x))  # (B, T, hidden)
        else:
            gate, h = together(x, (self.gate, self.up))
            h = self.act(gate) * h
        return self.down(dropout(h, self.spec.dropout, self.training))
