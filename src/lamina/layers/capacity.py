"""The places of an expert: what comes when all are taken is dropped (GShard, arXiv:2006.16668, section 2.2)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lamina.errors import LaminaError
from lamina.layers.router import TINY, Routing
from lamina.specs import Spec


@dataclass(frozen=True, kw_only=True)
class CapacitySpec(Spec):
    """Places of an expert: what comes when all are taken gets 0 from it, and goes on by the residual alone.

    C = max(least, round(factor * tokens / experts)) for the real tokens of a group, without a factor k, as in Google's
    code: 2.0 with top-2 is one place a choice. Tokens take places in their order, first choices before all second ones.
    """

    training: float = 1.25  # factor; with `places` the number of places itself
    evaluation: float | None = None  # None: in evaluation nothing is dropped, so a token's fate is its own
    places: bool = False  # the two numbers are places of an expert in a row: transformers' expert_capacity
    least: int = 4  # GShard, Switch, Pax
    group: Literal["row", "batch"] = "row"  # the tokens that compete: those of a row, or of all rows
    second: float | None = None  # GShard: in training a second choice is kept with probability min(1, gate / 0.2)
    certain_first: bool = False  # the most probable first choice takes its places first (arXiv:2106.05974): NLLB may
    normalise: bool = False  # gates of what is left sum to what all did; `second` is of shares then: NLLB

    def check(self) -> None:
        factors = [one for one in (self.training, self.evaluation, self.second) if one is not None]
        if min(factors) <= 0 or self.least < 0:
            raise LaminaError(
                f"training={self.training}, evaluation={self.evaluation} and second={self.second} must be above 0,"
                f" least={self.least} at least 0"
            )
        if self.places and any(one != int(one) for one in (self.training, self.evaluation or 1)):
            raise LaminaError(f"with places=True training={self.training} and evaluation must be whole numbers")


def limited(routing: Routing, spec: CapacitySpec, chosen: int, training: bool) -> Routing:
    """The routing of tokens that chose, with what is beyond the capacity of an expert taken out."""
    factor = spec.training if training else spec.evaluation
    if factor is None or routing.token.is_meta:  # what is dropped there is not known; it is counted as if none were
        return routing
    (batch, length), experts = routing.span, routing.experts
    rows = batch if spec.group == "row" else 1
    expert = routing.expert.view(rows, -1, chosen)  # (rows, tokens, k)
    if spec.second is not None and training and chosen > 1:
        gate = routing.gate
        if spec.normalise:
            gate = routing.scores.gather(1, routing.expert.view(-1, chosen).clamp(max=experts - 1))
        gate = gate.detach().view_as(expert)
        lost = torch.rand_like(gate) >= gate / spec.second
        lost[..., 0] = False
        expert = expert.masked_fill(lost, experts)
    if spec.certain_first:
        best = routing.scores.detach().amax(-1).view(rows, -1)
        order = best.argsort(dim=1, descending=True, stable=True)[..., None].expand_as(expert)
        place = torch.empty_like(expert).scatter_(1, order, _places(expert.gather(1, order), experts))
    else:
        place = _places(expert, experts)
    if spec.places:
        most: Tensor | int = int(factor)
    else:
        tokens = (
            routing.real.view(rows, -1).sum(1) if routing.real is not None else torch.tensor(batch * length // rows)
        )
        most = (tokens * factor / experts).round().clamp(min=spec.least).to(place.device).view(-1, 1, 1)
    expert = expert.masked_fill(place > most, experts)
    gate = routing.gate
    if spec.normalise:
        whole, left = (one.view(-1, chosen) for one in (gate, gate.masked_fill(expert.flatten() == experts, 0.0)))
        gate = (left * whole.sum(-1, keepdim=True) / (left.sum(-1, keepdim=True) + TINY)).flatten()
    return replace(routing, expert=expert.flatten(), gate=gate, limited=True)


def _places(expert: Tensor, experts: int) -> Tensor:
    """(rows, tokens, k): which place of its expert each choice takes, from 1 on; all first choices before second ones.

    Tokens that choose 0 1, 0 2 and 2 0: their first choices take places 1, 2 and 1, their second ones 1, 2 and 3.
    """
    line = expert.transpose(1, 2).flatten(1)
    taken = F.one_hot(line, experts + 1).cumsum(1)
    return taken.gather(2, line[..., None]).view(len(expert), expert.shape[2], -1).transpose(1, 2)
