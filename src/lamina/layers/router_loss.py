"""Auxiliary losses of a router, which keep its experts busy and its logits small."""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lamina.layers.call import Call
from lamina.layers.router import Routing
from lamina.specs import Spec


@dataclass(frozen=True, kw_only=True)
class RouterLossSpec(Spec):
    """Auxiliary losses of a router, over real tokens. P_i: mean probability of expert i; f_i: tokens that chose it.

    balance * E sum_i f_i P_i; z * mean(logsumexp(logits)^2) (ST-MoE, arXiv:2202.08906, equation 5); importance and
    load: CV^2 of the sum of gates and of the smooth load (Shazeer et al., equations 7 and 11). f is constant: the
    gradient goes through P. f counts choices before any capacity.

    They are those of one forward. Over several forwards whose gradients add up each is balanced by itself, which asks
    for more than a balance of them all: divide the sum by their number, as with the loss of the tokens.
    """

    balance: float = 0.0  # 0.01 in Switch, GLaM and GShard
    choices: Literal["all", "first", "mean"] = "all"  # f of all k choices (uniform: k), the first, or all over k
    each_row: bool = False  # of each row by itself, then the mean over the rows: DeepSeek's sequence loss
    pooled: bool = False  # f, P and z over all layers of a stack together: transformers' Mixtral and Qwen
    z: float = 0.0  # 0.001 in ST-MoE
    importance: float = 0.0  # Shazeer et al.: 0.1
    load: float = 0.0  # for a noisy router


def record_losses(spec: RouterLossSpec, routing: Routing, chosen: int, path: str, call: Call) -> None:
    """Write down the losses that have a coefficient, under `path` and their names."""
    name = path if not spec.pooled else path.partition(".")[0]
    for kind, value in _losses(spec, routing, chosen, name, call.memo).items():
        call.record.losses[f"{name if spec.pooled else call.record.called(path)}.{kind}"] = value


def sums_of(spec: RouterLossSpec, experts: int, rows: int) -> list[tuple[int, ...]]:
    """The shapes of what pooled losses of a batch of so many rows are made of: sums over the layers so far."""
    rows = rows if spec.each_row else 1
    return [(rows,), *([(rows, experts)] * 2 if spec.balance else []), *([(rows,)] if spec.z else [])]


def _losses(
    spec: RouterLossSpec, routing: Routing, chosen: int, name: str, memo: MutableMapping[Any, Any]
) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    rows = routing.span[0] if spec.each_row else 1
    real = torch.ones_like(routing.logits[:, 0]) if routing.real is None else routing.real.to(routing.logits.dtype)
    real = real.view(rows, -1, 1)
    sums = [real.sum((1, 2))]  # tokens of each row
    if spec.balance:
        expert = routing.expert.view(rows, -1, chosen)
        counts = F.one_hot(expert[..., :1] if spec.choices == "first" else expert, routing.experts + 1).sum((1, 2))
        counts = counts[:, :-1] / (chosen if spec.choices == "mean" else 1)
        sums += [counts.to(real.dtype), (routing.scores.view(rows, -1, routing.experts) * real).sum(1)]
    if spec.z:
        sums.append((routing.logits.logsumexp(-1).view_as(real).square() * real).sum((1, 2)))
    if spec.pooled:
        sums = [a + b for a, b in zip(sums, memo[name, spec], strict=True)] if (name, spec) in memo else sums
        memo[name, spec] = sums
    tokens, *rest = sums
    count = tokens.clamp(min=1)
    if spec.balance:
        shares, means = rest[0] / count[:, None], rest[1] / count[:, None]
        each = routing.experts * (shares * means).sum(-1)  # of each row; 0 where there is no token
        found["balance"] = spec.balance * each.sum() / (tokens > 0).sum().clamp(min=1)
    if spec.z:
        found["z"] = spec.z * rest[-1].sum() / tokens.sum().clamp(min=1)
    if spec.importance:
        gates = routing.gate.new_zeros(routing.experts + 1).index_add(0, routing.expert, routing.gate)
        found["importance"] = spec.importance * _variation(gates[:-1])
    if spec.load and routing.clean is not None:
        found["load"] = spec.load * _variation((_chances(*routing.clean, chosen) * real.view(-1, 1)).sum(0))
    return found


def _variation(x: Tensor) -> Tensor:
    """CV(x)^2: variance over the square of the mean."""
    return x.var(correction=0) / (x.mean().square() + 1e-10)


def _chances(clean: Tensor, noisy: Tensor, deviation: Tensor, chosen: int) -> Tensor:
    """(N, E): the chance of each expert to be among the chosen if its noise were drawn anew (Shazeer et al., eq. 9)."""
    best = noisy.topk(chosen + 1, dim=-1).values
    inside = noisy >= best[:, -2:-1]  # the others' k-th best is then the k + 1st of all
    threshold = torch.where(inside, best[:, -1:], best[:, -2:-1])
    return torch.special.ndtr((clean - threshold) / deviation)
