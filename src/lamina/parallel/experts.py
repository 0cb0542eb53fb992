"""Experts on several ranks: rows go to the rank that has their expert, results come back (arXiv:2006.16668).

Every rank has the router, its own tokens and E / ranks of the experts. Two exchanges a layer, two in its backward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lamina.errors import LaminaError
from lamina.layers.dispatch import Groups
from lamina.layers.experts import Experts


class AllToAll:
    """An `Exchange`: of E experts rank r has those from r E / ranks on."""

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group

    def __call__(self, rows: Tensor, sizes: list[int], network: Callable[[Tensor, Groups], Tensor]) -> Tensor:
        ranks = dist.get_world_size(self.group)
        mine = torch.tensor(sizes, device=rows.device)
        theirs = torch.empty_like(mine)  # of each rank in turn, how many rows it has for each of our experts
        dist.all_to_all_single(theirs, mine, group=self.group)
        sent, got = (counts.view(ranks, -1).sum(1).tolist() for counts in (mine, theirs))
        come = _Exchanged.apply(rows, sent, got, self.group)
        expert = torch.arange(len(sizes) // ranks, device=rows.device).repeat(ranks).repeat_interleave(theirs)
        expert, order = expert.sort(stable=True)
        local = theirs.view(ranks, -1).sum(0).tolist()
        results = network(come.index_select(0, order), Groups(sizes=local, expert=expert))  # pyright: ignore
        back = results.new_zeros(results.shape).index_copy(0, order, results)
        return _Exchanged.apply(back, got, sent, self.group)  # pyright: ignore[reportReturnType]


class _Exchanged(torch.autograd.Function):
    """Rows cut by `sent` to the ranks, for rows cut by `got`; gradients go the other way."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, sent: list[int], got: list[int], group: Any) -> Tensor:
        ctx.sent, ctx.got, ctx.group = sent, got, group
        out = rows.new_empty(sum(got), *rows.shape[1:])
        dist.all_to_all_single(out, rows.contiguous(), got, sent, group=group)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        out = gradient.new_empty(sum(ctx.sent), *gradient.shape[1:])
        dist.all_to_all_single(out, gradient.contiguous(), ctx.sent, ctx.got, group=ctx.group)
        return out, None, None, None


def spread_experts(model: nn.Module, group: dist.ProcessGroup | None = None) -> None:
    """Leave this rank its share of every layer of experts, and let tokens travel. Raises LaminaError where the experts
    cannot be shared out evenly. Losses of the routers stay those of each rank's own tokens."""
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    for name, module in model.named_modules():
        if isinstance(module, Experts):
            experts = module.spec.router.experts
            if experts % ranks:
                raise LaminaError(f"{name} has {experts} experts, which {ranks} ranks cannot share out evenly")
            module.exchange = AllToAll(group)
            share = slice(rank * experts // ranks, (rank + 1) * experts // ranks)
            for part in module.experts.modules():
                for leaf, parameter in list(part._parameters.items()):
                    if parameter is not None:
                        kept = parameter.detach()[share].clone()
                        part._parameters[leaf] = nn.Parameter(kept, requires_grad=parameter.requires_grad)
