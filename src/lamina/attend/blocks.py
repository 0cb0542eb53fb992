"""Attention block by block, on the CPU: it costs what the pattern asks for, and holds the scores of one block only.

For each block of queries the keys that it needs are brought together (`plan`), which for a window is a view; scores,
softmax and the mean of values are products of matrices over all heads. The backward pass computes each block's
probabilities again instead of keeping them (arXiv:2205.14135, section 3.1), so memory is linear in the length.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lamina.attend.plan import Part, Plan, Step, plan
from lamina.attend.request import Request
from lamina.patterns import Pattern

SCORES = 2**20
"""Scores that are computed at once, beyond which heads and then queries are taken in turns: 4 MB of float32."""
WORTH = 0.7
"""The share of all pairs below which blocks are faster than the fused kernel under a mask."""
LEAST = 2**16
"""Pairs of tokens below which there is nothing to save."""


def refuses(request: Request) -> str | None:
    """What is not built block by block."""
    if request.value_table is not None:
        return "relative terms on the values"
    if request.query.device.type != "cpu":
        return "tensors that are not on the CPU"
    return None


def suits(request: Request) -> bool:
    """Whether much less than all pairs are needed: for that the pattern is asked about blocks, and no mask is built."""
    if request.queries.position.shape[1] * request.keys.position.shape[1] < LEAST or request.query.shape[2] < 2:
        return False
    if torch.compiler.is_compiling():
        return False
    if request.reach() is not None:  # nothing to leave out; what the fused kernel cannot do, blocks do in less memory
        return request.softcap is not None or request.sink is not None
    share = planned(request).pairs / (request.queries.position.numel() * request.keys.position.shape[1])
    return share < WORTH or request.softcap is not None or request.sink is not None


def planned(request: Request) -> Plan:
    """The plan of the request, made once a pattern and forward."""
    name = ("plan", request.pattern, id(request.queries), id(request.keys))
    if name not in request.memo:
        # The tokens are kept beside it: an id is only unique while its object lives.
        found = plan(request.pattern, request.queries, request.keys)
        request.memo[name] = (found, request.queries, request.keys)
    return request.memo[name][0]


def attend(request: Request) -> Tensor:
    """The same function as `dense.attend`; softmax and sums in float32 or wider."""
    job = _Job(
        planned(request),
        request.pattern,
        request.scale,
        request.softcap,
        request.dropout,
        int(torch.randint(2**62, ())) if request.dropout else 0,
    )
    found = _Blocks.apply(request.query, request.key, request.value, request.bias, request.sink, job)
    assert isinstance(found, Tensor)
    return found


@dataclass(frozen=True)
class _Job:
    """What is not a tensor."""

    plan: Plan
    pattern: Pattern
    scale: float
    softcap: float | None
    dropout: float
    seed: int  # of the dropout: the backward pass draws the same again


@dataclass
class _Piece:
    """Some query heads that share key heads, and some queries of a step."""

    start: int  # queries, in order
    stop: int
    groups: slice
    heads: slice
    step: Step
    number: int


class _Row:
    """One row of the batch, in float32 or wider: queries (G, H / G, T, D), keys and values (G, S, D), all in order."""

    def __init__(self, job: _Job, part: Part, row: int, query: Tensor, key: Tensor, value: Tensor) -> None:
        self.job, self.part, self.row = job, part, row
        self.dtype = query.dtype if query.dtype == torch.float64 else torch.float32
        self.query = _ordered(query[row].to(self.dtype), part.query_order, 1)
        self.query = self.query.unflatten(0, (key.shape[1], -1))
        self.key = _ordered(key[row].to(self.dtype), part.key_order, 1)
        self.value = _ordered(value[row].to(self.dtype), part.key_order, 1)
        self.memory: dict[str, Tensor] = {}

    def room(self, name: str, *shape: int) -> Tensor:
        """A tensor to write to, which lies where the last one of this name did: new pages cost more than sums."""
        size = math.prod(shape)
        if name not in self.memory or self.memory[name].numel() < size:
            self.memory[name] = self.query.new_empty(size)
        return self.memory[name][:size].view(shape)

    def pieces(self) -> Iterator[_Piece]:
        """Everything that is to be computed, a bounded number of scores at a time."""
        groups, shared = self.query.shape[:2]
        number = 0
        for step in self.part.steps:
            step = self.part.masked(step, self.job.pattern, self.dtype)
            if not step.runs:
                continue  # queries that see nothing: their zeros stand already
            wide = step.keys * shared
            length = min(step.stop - step.start, max(1, SCORES // wide))
            some = max(1, min(groups, SCORES // (wide * length)))
            for start in range(step.start, step.stop, length):
                stop = min(start + length, step.stop)
                for group in range(0, groups, some):
                    last = min(group + some, groups)
                    heads = slice(group * shared, last * shared)
                    yield _Piece(start, stop, slice(group, last), heads, step, number)
                    number += 1

    def gathered(self, name: str, piece: _Piece) -> Tensor:
        """(g, K, D): the keys or values that the piece needs; a view where they lie together."""
        runs, x = piece.step.runs, (self.key if name == "key" else self.value)[piece.groups]
        if all(a[1] == b[0] for a, b in pairwise(runs)):
            found = x[:, runs[0][0] : runs[-1][1]]
        else:
            room = self.room(name, x.shape[0], piece.step.keys, x.shape[2])
            found = torch.cat([x[:, a:b] for a, b, _ in runs], dim=1, out=room)
        blind = piece.step.blind
        return found if blind is None else found.masked_fill(blind[:, None], 0.0)

    def queries(self, piece: _Piece) -> Tensor:
        """(g, r n, D): the queries of the piece, scaled."""
        return (self.query[piece.groups, :, piece.start : piece.stop] * self.job.scale).flatten(1, 2)

    def scores(self, piece: _Piece, query: Tensor, key: Tensor, bias: Tensor | None, sink: Tensor | None) -> Tensor:
        """(g, r n, K), or (g, r n, K + 1) with a sink as the last column; softly capped, masked."""
        groups, rows, _ = query.shape
        length, columns = piece.stop - piece.start, key.shape[1]
        z = torch.bmm(query, key.transpose(1, 2), out=self.room("scores", groups, rows, columns))
        if bias is not None:
            z += self.bias(bias, piece).flatten(0, 1).reshape(z.shape)
        if self.job.softcap is not None:
            z = z.div_(self.job.softcap).tanh_().mul_(self.job.softcap)
        by_head = z.view(groups, -1, length, columns)
        within = slice(piece.start - piece.step.start, piece.stop - piece.step.start)
        for first, last, hidden in piece.step.masks or ():
            by_head[..., first:last] += hidden[within]
        if sink is not None:
            last = sink[piece.heads].to(z.dtype).view(groups, -1, 1, 1).expand(groups, -1, length, 1)
            z = torch.cat([z, last.reshape(groups, rows, 1)], dim=2)
        return z

    def bias(self, bias: Tensor, piece: _Piece) -> Tensor:
        """The bias of a piece, (heads, n, K), from one that broadcasts to (B, H, T, S)."""
        return self.part_of(bias, piece).expand(piece.heads.stop - piece.heads.start, piece.stop - piece.start, -1)

    def part_of(self, bias: Tensor, piece: _Piece) -> Tensor:
        """The place of a piece in the bias: a view where keys lie together and in order."""
        x = bias[self.row if bias.shape[0] > 1 else 0]
        x = x if x.shape[0] == 1 else x[piece.heads]
        if x.shape[1] > 1:
            order = self.part.query_order
            x = x[:, piece.start : piece.stop] if order is None else x[:, order[piece.start : piece.stop]]
        columns = self.columns(piece)
        if x.shape[2] == 1:
            x = x.expand(-1, -1, len(columns))
        else:
            x = x[:, :, columns]
        return x.to(self.dtype)

    def columns(self, piece: _Piece) -> Tensor:
        """(K,): where the keys of a piece lie in the request."""
        found = torch.cat([torch.arange(a, b) for a, b, _ in piece.step.runs])
        return found if self.part.key_order is None else self.part.key_order[found]

    def probabilities(self, piece: _Piece, z: Tensor, sink: bool) -> tuple[Tensor, Tensor | None]:
        """(g, r n, K) and, where there is a sink, its own (g, r n, 1)."""
        p = torch.softmax(z, dim=-1, out=self.room("probabilities", *z.shape))
        if piece.step.empty is not None and not sink:
            empty = piece.step.empty[piece.start - piece.step.start : piece.stop - piece.step.start]
            p.view(p.shape[0], -1, len(empty), p.shape[-1]).masked_fill_(empty[:, None], 0.0)  # it was NaN until here
        return (p[..., :-1], p[..., -1:]) if sink else (p, None)

    def kept(self, piece: _Piece, shape: torch.Size) -> Tensor | None:
        """What dropout multiplies probabilities with; the same in the forward and the backward pass."""
        rate = self.job.dropout
        if not rate:
            return None
        if rate == 1.0:
            return torch.zeros(shape, dtype=self.dtype)
        seed = (self.job.seed + 1_000_003 * self.row + 7_919 * self.part.rows[0] + piece.number) % 2**62
        draw = torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=self.dtype)
        return (draw >= rate).to(self.dtype) / (1 - rate)

    def put(self, out: Tensor, piece: _Piece, value: Tensor) -> None:
        """Write (g, r n, D) of a piece into (H, T, D), which lies as the request does."""
        value = value.view(-1, piece.stop - piece.start, value.shape[-1])
        order = self.part.query_order
        where = slice(piece.start, piece.stop) if order is None else order[piece.start : piece.stop]
        out[piece.heads, where] = value.to(out.dtype)

    def take(self, x: Tensor, piece: _Piece, groups: int) -> Tensor:
        """The inverse: (H, T, D) -> (g, r n, D)."""
        order = self.part.query_order
        where = slice(piece.start, piece.stop) if order is None else order[piece.start : piece.stop]
        return x[piece.heads, where].to(self.dtype).reshape(groups, -1, x.shape[-1])


def _ordered(x: Tensor, order: Tensor | None, dim: int) -> Tensor:
    return x if order is None else x.index_select(dim, order)


class _Blocks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, sink: Tensor | None, job: _Job
    ) -> Tensor:
        out = query.new_zeros(*query.shape[:3], value.shape[-1])
        for part in job.plan.parts:
            for number in part.rows:
                row = _Row(job, part, number, query, key, value)
                for piece in row.pieces():
                    some = row.queries(piece)
                    z = row.scores(piece, some, row.gathered("key", piece), bias, sink)
                    p, _ = row.probabilities(piece, z, sink is not None)
                    kept = row.kept(piece, p.shape)
                    p = p if kept is None else p * kept
                    row.put(out[number], piece, torch.bmm(p, row.gathered("value", piece)))
        ctx.save_for_backward(query, key, value, bias, sink, out)
        ctx.job = job
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, bias, sink, out = ctx.saved_tensors
        job: _Job = ctx.job
        (given,) = upstream
        wide = query.dtype if query.dtype == torch.float64 else torch.float32
        grads = tuple(torch.zeros_like(x, dtype=wide) for x in (query, key, value))
        grad_bias = torch.zeros_like(bias, dtype=wide) if bias is not None and ctx.needs_input_grad[3] else None
        grad_sink = None if sink is None else torch.zeros_like(sink, dtype=wide)
        for part in job.plan.parts:
            for number in part.rows:
                row = _Row(job, part, number, query, key, value)
                into = (*(grad[number] for grad in grads), grad_bias, grad_sink)
                _row_backward(row, bias, sink, out[number], given[number], into)
        found = [grad.to(x.dtype) for grad, x in zip(grads, (query, key, value), strict=True)]
        rest = [None if g is None or x is None else g.to(x.dtype) for g, x in ((grad_bias, bias), (grad_sink, sink))]
        return (*found, *rest, None)


def _row_backward(
    row: _Row, bias: Tensor | None, sink: Tensor | None, out: Tensor, given: Tensor, into: tuple[Any, ...]
) -> None:
    """Add the gradients of one row. With o = p v: dv = p^T do, ds = p (do v^T - sum(do o)), dq = ds k, dk = ds^T q."""
    grad_query, grad_key, grad_value, grad_bias, grad_sink = into
    job, order = row.job, row.part.key_order
    key_sum, value_sum = torch.zeros_like(row.key), torch.zeros_like(row.value)
    for piece in row.pieces():
        query, key, value = row.queries(piece), row.gathered("key", piece), row.gathered("value", piece)
        z = row.scores(piece, query, key, bias, sink)
        p, rest = row.probabilities(piece, z, sink is not None)
        groups = query.shape[0]
        do = row.take(given, piece, groups)
        delta = (do * row.take(out, piece, groups)).sum(dim=-1, keepdim=True)
        kept = row.kept(piece, p.shape)
        dp = torch.bmm(do, value.transpose(1, 2), out=row.room("slopes", *do.shape[:2], value.shape[1]))
        dp = dp if kept is None else dp.mul_(kept)
        _add(value_sum[piece.groups], piece, torch.bmm((p if kept is None else p * kept).transpose(1, 2), do))
        if grad_sink is not None and rest is not None:
            grad_sink[piece.heads] -= (rest * delta).view(piece.heads.stop - piece.heads.start, -1).sum(dim=1)
        ds = dp.sub_(delta).mul_(p)
        if job.softcap is not None:
            capped = z[..., : ds.shape[-1]]
            slope = 1 - (capped / job.softcap).square()
            ds = ds * slope.masked_fill_(capped == float("-inf"), 0.0)
        if grad_bias is not None:
            _add_bias(row, piece, grad_bias, ds)
        row.put(grad_query, piece, torch.bmm(ds, key) * job.scale)
        _add(key_sum[piece.groups], piece, torch.bmm(ds.transpose(1, 2), query))
    for grad, total in ((grad_key, key_sum), (grad_value, value_sum)):
        if order is None:
            grad.copy_(total)
        else:
            grad.index_copy_(1, order, total)


def _add(total: Tensor, piece: _Piece, new: Tensor) -> None:
    """Add (g, K, D) of a piece to (g, S, D). What nobody sees has a probability of zero, and so a gradient of zero."""
    at = 0
    for start, stop, _ in piece.step.runs:
        total[:, start:stop] += new[:, at : at + stop - start]
        at += stop - start


def _add_bias(row: _Row, piece: _Piece, grad: Tensor, ds: Tensor) -> None:
    """Add (g, r n, K) to a gradient that broadcasts to (B, H, T, S)."""
    ds = ds.view(-1, piece.stop - piece.start, ds.shape[-1])
    into = grad[row.row if grad.shape[0] > 1 else 0]
    ds = ds.sum(0, keepdim=True) if into.shape[0] == 1 else ds
    ds = ds.sum(1, keepdim=True) if into.shape[1] == 1 else ds
    ds = ds.sum(2, keepdim=True) if into.shape[2] == 1 else ds
    heads = torch.arange(into.shape[0]) if into.shape[0] == 1 else torch.arange(piece.heads.start, piece.heads.stop)
    rows = torch.arange(piece.start, piece.stop)
    rows = rows if row.part.query_order is None else row.part.query_order[rows]
    rows = torch.zeros(1, dtype=torch.int64) if into.shape[1] == 1 else rows
    columns = torch.zeros(1, dtype=torch.int64) if into.shape[2] == 1 else row.columns(piece)
    into.index_put_((heads[:, None, None], rows[:, None], columns), ds, accumulate=True)
