"""A linear layer with a low-rank change beside it, y = W x + b + s B A x (LoRA; arXiv:2106.09685, section 4.1)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lamina.layers.dropout import dropout
from lamina.layers.linear import Linear, linear


class LowRank(Linear):
    """(..., in) -> (..., out). Weight and bias are those of `base`, under their own names; beside them lie `lora_a`
    (rank, in) and `lora_b` (out, rank), whose product is scaled by `scale`; `rate` is the dropout of what A reads.

    The factors may have another dtype than the weight: their product is computed in it.
    """

    SIDES = {"lora_a": "in", "lora_b": "out"}
    """Along which side of the weight a factor lies: where ranks share that side out, they share the factor out too."""

    def __init__(self, base: nn.Linear, lora_a: Tensor, lora_b: Tensor, scale: float, rate: float) -> None:
        nn.Module.__init__(self)  # and not Linear's, which would make a weight
        self.in_features, self.out_features = base.in_features, base.out_features
        self.base = [base]  # in a list, so that it is no part of this module: its parameters have their names here
        self.scale, self.rate = scale, rate
        self.weight, self.bias = base.weight, base.bias
        for name in ("weight", "bias"):  # ranks that share them out must not find the whole kept alive here
            base.register_parameter(name, None)
        self.lora_a, self.lora_b = nn.Parameter(lora_a), nn.Parameter(lora_b)
        self.train(base.training)

    def forward(self, input: Tensor) -> Tensor:
        low = dropout(input.to(self.lora_a.dtype), self.rate, self.training)
        change = linear(linear(low, self.lora_a), self.lora_b)  # (..., rank), (..., out)
        out = super().forward(input)
        return out + (change * self.scale).to(out.dtype)

    def detached(self) -> nn.Linear:
        """The layer that this one was made of, with the weight as it is now."""
        (base,) = self.base
        base.weight, base.bias = self.weight, self.bias
        return base.train(self.training)


def merged(weight: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float) -> Tensor:
    """W + s B A, computed in float32 (float64 for a weight in that) and rounded once, to the dtype of the weight."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    change = lora_b.detach().to(wide) @ lora_a.detach().to(wide)
    return (weight.detach().to(wide) + scale * change).to(weight.dtype)
