"""Dispatch: tokens to their experts and back. One function; its products come in a few forms, chosen by the device.

Pairs of a token and an expert are sorted by expert, so that the tokens of each lie side by side, and one product of
groups of rows with a matrix each does the work (MegaBlocks, arXiv:2211.15841, without its padding). Cost grows with the
pairs, not with the number of experts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from lamina.layers.linear import FEW, linear
from lamina.layers.router import Routing


@dataclass(frozen=True)
class Groups:
    """Whose the rows are that an expert network gets: `sizes[e]` rows of expert 0, then of expert 1, ...

    Exactly one of the first three says it. With none, only shapes matter (the meta device).
    """

    sizes: list[int] | None = None  # known to the host: the CPU
    ends: Tensor | None = None  # (E,) int32, where each expert's rows end: CUDA, which must not wait for the host
    each: Tensor | None = None  # (M,) the expert of each row, in any order: few rows, or a program that is exported
    expert: Tensor | None = None  # (M,) the expert of each row, where rows need more than the product: biases
    nobody: Tensor | None = None  # (M, 1) bool: rows at the end that no expert has


class Exchange(Protocol):
    """Experts that lie on several ranks: rows sorted by expert go to the ranks that have them, results come back."""

    def __call__(self, rows: Tensor, sizes: list[int], network: Callable[[Tensor, Groups], Tensor]) -> Tensor:
        """The results of `rows`, in their order, by whichever rank has their expert."""
        ...


def dispatch(
    x: Tensor, routing: Routing, network: Callable[[Tensor, Groups], Tensor], exchange: Exchange | None = None
) -> Tensor:
    """x (N, d) -> (N, d): for each token the sum of gate * network(x) over its pairs; 0 for a token that has none."""
    if x.is_meta:
        y = network(x[routing.token], Groups())
        return x.new_zeros(x.shape).index_add(0, routing.token, y)
    if torch.compiler.is_exporting():  # no shape may depend on values; rows are few there
        y = network(x[routing.token], Groups(each=routing.expert.clamp(max=routing.experts - 1)))
        gate = routing.gate.masked_fill(routing.expert == routing.experts, 0.0)
        return x.new_zeros(x.shape).index_add(0, routing.token, y * gate[:, None].to(y.dtype))
    expert, order = routing.expert.sort(stable=True)
    if exchange is not None or _waits(x):  # ranks have to tell each other how many rows come
        counts = torch.bincount(expert, minlength=routing.experts + 1)[:-1]
        sizes: list[int] = counts.tolist()
        kept = sum(sizes)  # nobody's pairs are the last
        expert, order = expert[:kept], order[:kept]
        token = routing.token[order]
        rows = x.index_select(0, token)
        groups = Groups(sizes=sizes, expert=expert)
        y = network(rows, groups) if exchange is None else exchange(rows, sizes, network)
        y = y * routing.gate[order, None].to(y.dtype)
    else:
        token = routing.token[order]
        ends = torch.searchsorted(expert, torch.arange(routing.experts, device=x.device), right=True)
        nobody = (expert == routing.experts)[:, None] if routing.partial else None
        rows = _zeroed(x.index_select(0, token), nobody)
        y = network(rows, Groups(ends=ends.to(torch.int32), expert=expert, nobody=nobody))
        y = y * routing.gate[order, None].to(y.dtype)
    return x.new_zeros(x.shape).index_add(0, token, y.to(x.dtype))


def _zeroed(rows: Tensor, nobody: Tensor | None) -> Tensor:
    """Rows that are nobody's as zeros, and their gradient too: a grouped product leaves whatever it finds in both."""
    return rows if nobody is None else rows.masked_fill(nobody, 0.0)


def _waits(x: Tensor) -> bool:
    """Whether the host may look at how many rows each expert has: it costs nothing on the CPU, and a wait on a GPU."""
    return not (torch.compiler.is_compiling() or (x.is_cuda and x.dtype == torch.bfloat16))


def product(x: Tensor, weight: Tensor, bias: Tensor | None, groups: Groups) -> Tensor:
    """x (M, in), sorted by expert; weight (E, out, in) -> (M, out): each row times the matrix of its expert."""
    if not x.is_meta and torch.is_autocast_enabled(x.device.type):
        x, weight = (one.to(torch.get_autocast_dtype(x.device.type)) for one in (x, weight))
    if groups.sizes is not None:
        y: Any = _slices(x, weight, groups.sizes)
    elif groups.ends is not None and x.shape[1] * x.itemsize % 16:  # which torch's product demands
        y = _slices(x, weight, groups.ends.diff(prepend=groups.ends.new_zeros(1)).tolist())
    elif groups.ends is not None:
        y = F.grouped_mm(x, weight.transpose(1, 2), offs=groups.ends)
    elif groups.each is not None:
        y = (weight[groups.each] * x[:, None]).sum(-1)
    else:
        y = F.linear(x, weight[0])
    if bias is None:
        return _zeroed(y, groups.nobody)
    which = groups.each if groups.expert is None else groups.expert.clamp(max=len(weight) - 1)
    return _zeroed(y + (bias[0] if which is None else bias.index_select(0, which)).to(y.dtype), groups.nobody)


def _slices(x: Tensor, weight: Tensor, sizes: list[int]) -> Tensor:
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return _Slices.apply(x, weight, sizes)  # pyright: ignore[reportReturnType]
    return _forward(x, weight, sizes)


def _forward(x: Tensor, weight: Tensor, sizes: list[int]) -> Tensor:
    out = x.new_empty(x.shape[0], weight.shape[1])
    for start, stop, e in parts(sizes):
        if stop - start < MANY:
            out[start:stop] = one(x[start:stop], weight[e])
        else:
            torch.mm(x[start:stop], weight[e].t(), out=out[start:stop])
    return out


MANY = 512
"""From so many rows on torch's product is as fast as oneDNN's, which does not repack the matrix for each product."""


def one(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (n, in) times W (out, in) transposed, without a gradient: the fastest there is for few rows and a cold matrix.

    128 rows of 512 to 1,792 features, 64 matrices in turn, on two cores: 96 ms by oneDNN, 144 ms by MKL.
    """
    if x.shape[0] <= FEW.get(weight.dtype, 0) or not _onednn(x, weight):
        return linear(x, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _onednn(x: Tensor, weight: Tensor) -> bool:
    known = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    same = x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32
    return known and same and type(x) is Tensor and weight.is_contiguous()


def parts(sizes: list[int]) -> list[tuple[int, int, int]]:
    """(start, stop, expert) of every expert that has rows."""
    found, start = [], 0
    for e, size in enumerate(sizes):
        if size:
            found.append((start, start + size, e))
        start += size
    return found


class _Slices(torch.autograd.Function):
    """A matrix product for each expert that has rows, written where its result belongs.

    The same by autograd would stack E gradients of E matrices anew. On the CPU torch's grouped_mm does about this.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, sizes: list[int]) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.sizes = sizes
        return _forward(x, weight, sizes)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        gradient = gradient.contiguous()
        of_x = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        of_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        for start, stop, e in parts(ctx.sizes):
            if of_x is not None:
                torch.mm(gradient[start:stop], weight[e], out=of_x[start:stop])
            if of_weight is not None:
                torch.mm(gradient[start:stop].t(), x[start:stop], out=of_weight[e])
        if of_weight is not None:
            for e, size in enumerate(ctx.sizes):
                if not size:
                    of_weight[e].zero_()  # zero and not None: every rank has a gradient to share
        return of_x, of_weight, None
