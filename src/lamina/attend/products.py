"""Attention of short texts in training, on the CPU: plain products of matrices that keep the probabilities.

torch's fused kernel computes every score twice, and its backward pass is four times as slow as its forward. A short
text's probabilities take less room than the activations beside them, so they are kept; of a causal triangle the
blocks above the diagonal are left out. Scores and softmax are in float32 or wider, as in the fused kernel, and the
probabilities, in the dtype of the query, multiply the values: in bfloat16 the errors are within twice those of the
fused kernel.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lamina.attend.request import Request

LONGEST = 512
"""Keys beyond which the probabilities would be the largest thing that is kept."""
QUERIES = 64
"""Queries of a block."""
SCORES = 3 << 18
"""Scores that are computed at once: 3 MB of float32, about what two cores keep."""


def refuses(request: Request) -> str | None:
    """Everything that is not softmax(scale q k^T) v over all keys or a causal triangle of them."""
    if request.value_table is not None:
        return "relative terms on the values"
    for name, value in (("a bias", request.bias), ("a soft-cap", request.softcap), ("a learned sink", request.sink)):
        if value is not None:
            return f"{name} on the scores"
    if request.dropout:
        return "dropout on the probabilities"
    if request.query.device.type != "cpu":
        return "tensors that are not on the CPU"
    return "a mask" if request.reach() is None else None


def suits(request: Request) -> bool:
    """Whether something learns from a short text."""
    inputs = (request.query, request.key, request.value)
    if not torch.is_grad_enabled() or not any(x.requires_grad for x in inputs) or torch.compiler.is_compiling():
        return False
    length, keys = request.query.shape[2], request.key.shape[2]
    return length >= QUERIES and keys <= LONGEST and request.query.dtype in (torch.float32, torch.bfloat16)


def attend(request: Request) -> Tensor:
    """The same function as `dense.attend`."""
    causal = request.reach() == "causal" and request.query.shape[2] > 1
    found = _Products.apply(request.query, request.key, request.value, request.scale, causal)
    assert isinstance(found, Tensor)
    return found


def _pieces(rows: int, shared: int, length: int, keys: int, causal: bool) -> Iterator[tuple[slice, slice, int]]:
    """(key heads, queries, keys that they see), of some heads the last queries first: they see all keys."""
    some = max(1, SCORES // (shared * min(QUERIES, length) * keys))
    for first in range(0, rows, some):
        for start in reversed(range(0, length, QUERIES)):
            stop = min(start + QUERIES, length)
            yield slice(first, min(first + some, rows)), slice(start, stop), stop if causal else keys


class _Products(torch.autograd.Function):
    """query (B, H, T, D), key (B, G, S, D), value (B, G, S, V) -> (B, H, T, V)."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool) -> Tensor:
        wide = torch.float64 if query.dtype == torch.float64 else torch.float32
        q, k, v = _folded(query.to(wide) * scale, key), key.to(wide).flatten(0, 1), value.flatten(0, 1)
        rows, shared, length, _ = q.shape  # (B G, H / G, T, D)
        out = query.new_empty(rows, shared, length, v.shape[-1])
        above = torch.full((QUERIES, QUERIES), -math.inf, dtype=wide).triu(1)
        rooms: tuple[Tensor, Tensor] = (q.new_empty(0), q.new_empty(0))  # new pages cost more than sums
        kept = []
        for heads, queries, seen in _pieces(rows, shared, length, k.shape[1], causal):
            some = q[heads, :, queries]
            many = some.shape[2]
            shape = (len(some), shared * many, seen)
            z, p = (_room(room, shape) for room in rooms)
            torch.bmm(some.flatten(1, 2), k[heads, :seen].transpose(1, 2), out=z)
            if causal:
                z.unflatten(1, (shared, -1))[..., seen - many :] += above[:many, :many]
            p = torch.softmax(z, dim=-1, out=p).to(query.dtype, copy=True)
            out[heads, :, queries] = torch.bmm(p, v[heads, :seen]).unflatten(1, (shared, -1))
            kept.append(p)
        ctx.save_for_backward(query, key, value, *kept)
        ctx.scale, ctx.causal = scale, causal
        return out.view(*query.shape[:3], v.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, *kept = ctx.saved_tensors
        wide = torch.float64 if query.dtype == torch.float64 else torch.float32
        given, q = _folded(upstream[0], key), _folded(query, key)
        k, v = key.flatten(0, 1), value.flatten(0, 1)
        rows, shared, length, _ = q.shape
        of_query = torch.empty_like(q, memory_format=torch.contiguous_format)
        of_key, of_value = (torch.empty(x.shape, dtype=wide) for x in (k, v))
        pieces = _pieces(rows, shared, length, k.shape[1], ctx.causal)
        for p, (heads, queries, seen) in zip(kept, pieces, strict=True):
            do, some = (x[heads, :, queries].flatten(1, 2) for x in (given, q))  # (b g, r n, V or D)
            _add(of_value[heads, :seen], torch.bmm(p.transpose(1, 2), do), queries.stop == length)
            dp = torch.bmm(do, v[heads, :seen].transpose(1, 2))
            ds = torch.ops.aten._softmax_backward_data(dp, p, -1, p.dtype)  # p (dp - sum(p dp))
            of_query[heads, :, queries] = torch.bmm(ds, k[heads, :seen]).unflatten(1, (shared, -1))
            _add(of_key[heads, :seen], torch.bmm(ds.transpose(1, 2), some), queries.stop == length)
        found = (of_query.mul_(ctx.scale), of_key.mul_(ctx.scale), of_value)
        return *(x.view(y.shape).to(y.dtype) for x, y in zip(found, (query, key, value), strict=True)), None, None


def _add(total: Tensor, new: Tensor, first: bool) -> None:
    """Add `new`, or begin with it."""
    total.copy_(new) if first else total.add_(new)


def _room(room: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The beginning of `room`, which grows where it is too small."""
    size = math.prod(shape)
    return (room if room.numel() >= size else room.resize_(size))[:size].view(shape)


def _folded(query: Tensor, key: Tensor) -> Tensor:
    """(B, H, T, D) -> (B G, H / G, T, D): the query heads of each key head."""
    return query.unflatten(1, (key.shape[1], -1)).flatten(0, 1)
