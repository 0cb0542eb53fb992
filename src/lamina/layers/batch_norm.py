"""Batch normalisation of queries (arXiv:1502.03167, algorithms 1 and 2): by feature, over the tokens of a batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lamina.errors import LaminaError
from lamina.layers.call import Call
from lamina.layers.initial import Draw
from lamina.specs import Spec


@dataclass(frozen=True, kw_only=True)
class BatchNormSpec(Spec):
    """y = weight (x - mean) / sqrt(variance + eps) + bias, of each feature: in training with those of the batch, in
    evaluation with their running averages. In training a token then depends on its whole batch, later tokens too."""

    eps: float = 1e-5
    momentum: float = 0.1  # weight of the newest batch in the averages

    def check(self) -> None:
        if self.eps <= 0 or not 0 < self.momentum <= 1:
            raise LaminaError(f"eps={self.eps} must be above 0, momentum={self.momentum} above 0 and at most 1")

    def build(self, width: int) -> BatchNorm:
        return BatchNorm(self, width)


class BatchNorm(nn.Module):
    """(B, T, width) -> (B, T, width). Padding is in no statistic.

    The averages are parameters without a gradient, so they are saved and loaded like any weight. They move with each
    forward that records gradients, once where layers are recomputed in the backward, and not where they are not
    finite. Where the weight is frozen they stand still, and are what is normalised with.
    """

    def __init__(self, spec: BatchNormSpec, width: int) -> None:
        super().__init__()
        self.spec = spec
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))
        self.mean = nn.Parameter(torch.zeros(width), requires_grad=False)
        self.variance = nn.Parameter(torch.ones(width), requires_grad=False)

    def forward(self, x: Tensor, call: Call) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        if self.training and self.weight.requires_grad:
            mean, variance = self._of_batch(wide, call)
        else:
            mean, variance = self.mean.to(wide.dtype), self.variance.to(wide.dtype)
        wide = (wide - mean) * torch.rsqrt(variance + self.spec.eps)
        return (wide * self.weight.to(wide.dtype) + self.bias.to(wide.dtype)).to(x.dtype)

    def _of_batch(self, x: Tensor, call: Call) -> tuple[Tensor, Tensor]:
        """The mean and the biased variance (width,) over real tokens; the averages move towards them."""
        if call.tokens.span is not None:
            count = torch.full((), x.shape[0] * x.shape[1], dtype=x.dtype, device=x.device)
            mean = x.mean((0, 1))
            variance = (x - mean).square().mean((0, 1))
        else:
            hole = ~call.tokens.real[:, :, None]
            count = (~hole).sum().to(x.dtype)
            mean = x.masked_fill(hole, 0.0).sum((0, 1)) / count.clamp(min=1)
            variance = (x - mean).masked_fill(hole, 0.0).square().sum((0, 1)) / count.clamp(min=1)
        if torch.is_grad_enabled() and torch._C._current_graph_task_id() == -1:  # not again in the backward
            self._move(mean.detach(), variance.detach() * count / (count - 1).clamp(min=1), count)
        return mean, variance

    @torch.no_grad()
    def _move(self, mean: Tensor, variance: Tensor, count: Tensor) -> None:
        """Towards the mean and the unbiased variance of a batch."""
        sound = mean.isfinite() & variance.isfinite() & (count > 0)
        for average, new in ((self.mean, mean), (self.variance, variance)):
            moved = torch.lerp(average.to(new.dtype), new, self.spec.momentum)
            average.copy_(torch.where(sound, moved, average.to(new.dtype)))

    def initialise(self, draw: Draw) -> None:
        for parameter, value in ((self.weight, 1.0), (self.bias, 0.0), (self.mean, 0.0), (self.variance, 1.0)):
            nn.init.constant_(parameter, value)
