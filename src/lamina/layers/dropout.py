"""Dropout of activations (arXiv:1207.0580) and of whole residual branches (stochastic depth, arXiv:1603.09382)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def dropout(x: Tensor, rate: float, training: bool) -> Tensor:
    """Zero each activation with probability `rate` and scale the others by 1 / (1 - rate); nothing in evaluation."""
    return F.dropout(x, rate, training=True) if training and rate > 0 else x


def drop_branch(x: Tensor, rate: float, training: bool) -> Tensor:
    """Zero the branch (B, T, width) for each row with probability `rate`, scale the rows that stay."""
    if not training or rate == 0:
        return x
    keep = torch.rand(x.shape[0], 1, 1, device=x.device) >= rate
    return x * keep.to(x.dtype) / ((1 - rate) or 1)  # rate 1 keeps nothing: zeros, also for gradients, not 0 / 0
