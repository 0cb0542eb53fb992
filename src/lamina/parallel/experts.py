"""Experts on several ranks: rows go to the rank that has their expert, results come back (arXiv:2006.16668).

Every rank has the router, its own tokens and E / ranks of the experts. Two exchanges a layer, two in its backward. A
router's losses are those of its rank's own tokens, as they are those of a micro-batch where gradients add up.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from lamina.layers.dispatch import Groups
from lamina.layers.experts import Experts
from lamina.parallel.tensor import Region


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


def spread(model: nn.Module, mesh: DeviceMesh, group: dist.ProcessGroup) -> None:
    """Leave this rank its share of every layer of experts, as DTensors, and let tokens travel.

    The first axis of `mesh` is that of the experts; a second one is for what tensor parallelism will cut.
    """
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    for module in list(model.modules()):
        if not isinstance(module, Experts):
            continue
        assert module.spec.router.experts % ranks == 0
        module.exchange = AllToAll(group)
        region = Region(module.experts, module.experts.forward)
        for part in module.experts.modules():
            for leaf, parameter in list(part._parameters.items()):
                if parameter is None:
                    continue
                kept = parameter.detach().chunk(ranks)[rank].clone()
                placements = [Shard(0), Replicate()][: mesh.ndim]
                shape, stride = parameter.shape, parameter.stride()
                made = DTensor.from_local(kept, mesh, placements, run_check=False, shape=shape, stride=stride)
                part._parameters[leaf] = nn.Parameter(made, requires_grad=parameter.requires_grad)
                region.views[part, leaf] = lambda x: x
        if mesh.ndim == 1:  # else the region of tensor parallelism does it
            module.experts.forward = region  # pyright: ignore[reportAttributeAccessIssue]
