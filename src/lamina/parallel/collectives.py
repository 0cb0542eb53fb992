"""Sums and gathers over a group of ranks through which gradients flow."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable


def enter(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The same tensor, of which each rank uses another part: forward nothing, backward the sum of the gradients
    (Megatron's f, arXiv:1909.08053, section 3)."""
    return _Enter.apply(x, group) if x.requires_grad else x  # pyright: ignore[reportReturnType]


def leave(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum of what the ranks have: backward nothing (Megatron's g)."""
    return _Leave.apply(x, group)  # pyright: ignore[reportReturnType]


def gather(x: Tensor, dim: int, group: dist.ProcessGroup, summed: bool) -> Tensor:
    """The ranks' tensors, of one shape, side by side along `dim`.

    Backward a rank gets the gradient of its own part: where each rank makes something else of the whole, the sum over
    the ranks (`summed`), and where all do the same with it, that of one of them.
    """
    return _Gather.apply(x, dim, group, summed)  # pyright: ignore[reportReturnType]


def _added(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    out = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(out, group=group)
    return out


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _added(gradient, ctx.group), None


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        return _added(x, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, group: Any, summed: bool) -> Tensor:
        ctx.dim, ctx.group, ctx.summed = dim, group, summed
        ranks = dist.get_world_size(group)
        out = x.new_empty(ranks * x.shape[0], *x.shape[1:])
        dist.all_gather_single(out, x.contiguous(), group=group)
        return torch.cat(out.chunk(ranks), dim=dim)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        parts = gradient.chunk(dist.get_world_size(ctx.group), dim=ctx.dim)
        mine = parts[dist.get_rank(ctx.group)]
        if ctx.summed:
            out = torch.empty_like(mine, memory_format=torch.contiguous_format)
            dist.reduce_scatter_single(out, torch.cat(parts), group=ctx.group)
            mine = out
        return mine.contiguous(), None, None, None
