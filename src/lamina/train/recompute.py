"""Activation checkpointing (arXiv:1604.06174): layers keep only what they were given, and run again in the backward."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from lamina.layers import Stack


def recompute(model: nn.Module) -> None:
    """Let every layer of every stack run again in the backward. Names of parameters stay."""
    for module in model.modules():
        if isinstance(module, Stack):
            for layer in module.layers:
                layer.forward = _again(layer.forward)


def _again(run: Any) -> Any:
    def forward(*args: Any) -> Any:
        return checkpoint(run, *args, use_reentrant=False)

    return forward
