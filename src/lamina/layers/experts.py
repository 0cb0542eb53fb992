"""A mixture of experts: a router sends each token to a few of many feed-forward networks (arXiv:1701.06538, section 2).

y = sum over the chosen e of gate_e F_e(x) (+ shared networks, which every token goes through: DeepSeekMoE, 2401.06066).
It stands wherever a feed-forward network stands. Where tokens choose and nothing limits them (evaluation, or no
capacity) each token's result is its own: caches, padding and the rest of the batch change nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lamina.errors import LaminaError
from lamina.layers.call import Call, Record
from lamina.layers.capacity import CapacitySpec, limited
from lamina.layers.dispatch import Exchange, Groups, dispatch, one, parts, product
from lamina.layers.dropout import dropout
from lamina.layers.expert_choice import ExpertChoiceSpec
from lamina.layers.feedforward import ACTIVATIONS, FeedForwardSpec
from lamina.layers.initial import Draw
from lamina.layers.linear import Linear
from lamina.layers.parameter import parameter
from lamina.layers.router import Routing, TopK, TopKSpec
from lamina.layers.router_loss import RouterLossSpec, record_losses
from lamina.specs import Spec


@dataclass(frozen=True, kw_only=True)
class ExpertsSpec(Spec):
    """A router and as many networks as it says, all of one shape."""

    router: TopKSpec | ExpertChoiceSpec
    expert: FeedForwardSpec
    shared: FeedForwardSpec | None = None  # for every token: DeepSeek (its shared experts are one network), Qwen2-MoE
    shared_gate: bool = False  # the shared result times sigmoid(x w): Qwen2-MoE
    capacity: CapacitySpec | None = None  # None: nothing is dropped (Mixtral, DeepSeek, MegaBlocks)
    losses: RouterLossSpec | None = None
    masked: float = 0.0  # in training a result is 0 with this chance, in evaluation all count 1 - masked: NLLB

    def check(self) -> None:
        if self.shared_gate and self.shared is None:
            raise LaminaError("shared_gate=True needs shared=, the network whose result it weighs")
        if not 0 <= self.masked < 1:
            raise LaminaError(f"masked={self.masked} must be from 0 to below 1")
        if isinstance(self.router, ExpertChoiceSpec):
            if self.capacity is not None or (self.losses is not None and self.losses != _z_alone(self.losses)):
                raise LaminaError("experts that choose are all as busy: capacity and losses but z are for a TopKSpec")
        elif self.losses is not None and self.losses.load and not self.router.smooth:
            raise LaminaError("losses.load needs a router with noise=True that leaves some experts out")

    def build(self, width: int) -> Experts:
        return Experts(self, width)


def _z_alone(losses: RouterLossSpec) -> RouterLossSpec:
    return RouterLossSpec(z=losses.z, pooled=losses.pooled)


class Experts(nn.Module):
    """(B, T, width) -> (B, T, width)."""

    def __init__(self, spec: ExpertsSpec, width: int) -> None:
        super().__init__()
        self.spec = spec
        self.path = ""
        self.exchange: Exchange | None = None  # experts on several ranks
        self.router = spec.router.build(width)
        self.experts = Networks(spec, width)
        self.shared = None if spec.shared is None else spec.shared.build(width)
        self.shared_gate = Linear(width, 1, bias=False) if spec.shared_gate else None

    def forward(self, x: Tensor, call: Call) -> Tensor:
        spec = self.spec
        routing = self.router(x, call)
        learns = torch.is_grad_enabled() and not x.is_meta  # where nothing learns, nothing is balanced
        if isinstance(spec.router, TopKSpec):
            chosen = spec.router.chosen
            call.record.keep(f"{self.path}.load", lambda: _load(routing.expert, routing.experts))
            if spec.losses is not None and learns:
                record_losses(spec.losses, routing, chosen, self.path, call)
            if spec.capacity is not None:
                routing = limited(routing, spec.capacity, chosen, self.training)
        elif spec.losses is not None and learns:
            record_losses(spec.losses, routing, 1, self.path, call)
        call.record.keep(f"{self.path}.scores", lambda: routing.scores.unflatten(0, routing.span))
        call.record.keep(f"{self.path}.used", lambda: _load(routing.expert, routing.experts))
        if spec.masked:
            routing = _masked(routing, spec.masked, self.training)
        y = dispatch(x.flatten(0, 1), routing, self.experts, self.exchange).view_as(x)
        if self.shared is not None:
            common = self.shared(x, call)
            y = y + (common if self.shared_gate is None else self.shared_gate(x).sigmoid() * common)
        return y


def _masked(routing: Routing, chance: float, training: bool) -> Routing:
    """Expert output masking (NLLB, arXiv:2207.04672): by pair, and unlike in dropout what is left is not enlarged."""
    kept = torch.rand_like(routing.gate) >= chance if training else 1 - chance
    return replace(routing, gate=routing.gate * kept)


def _load(expert: Tensor, experts: int) -> Tensor:
    """(E,): how many pairs each expert has."""
    return torch.bincount(expert, minlength=experts + 1)[:-1]


class Networks(nn.Module):
    """The feed-forward networks of all experts: (M, width), sorted by expert -> (M, width)."""

    SHARD = {"gate": "experts.out", "up": "experts.out", "down": "experts.in"}

    def __init__(self, spec: ExpertsSpec, width: int) -> None:
        super().__init__()
        one, experts = spec.expert, spec.router.experts
        self.dropout = one.dropout
        self.act = ACTIVATIONS[one.act]
        self.used = spec.router.chosen if isinstance(spec.router, TopKSpec) else spec.router.capacity
        self.gate = Matrices(experts, width, one.hidden, one.bias) if one.gated else None
        self.up = Matrices(experts, width, one.hidden, one.bias)
        self.down = Matrices(experts, one.hidden, width, one.bias)

    def idle(self) -> int:
        """Parameters that a token does not use."""
        experts = len(self.up.weight)
        each = sum(parameter.numel() for parameter in self.parameters()) // experts
        return round(each * (experts - self.used))

    def forward(self, x: Tensor, groups: Groups) -> Tensor:
        if groups.sizes is not None and not torch.is_grad_enabled() and not torch.is_autocast_enabled(x.device.type):
            out = torch.empty_like(x)
            for start, stop, e in parts(groups.sizes):  # what lies between the products then stays in the cache
                out[start:stop] = self._one(x[start:stop], e)
            return out
        h = self.up(x, groups)  # (M, hidden)
        h = self.act(h) if self.gate is None else self.act(self.gate(x, groups)) * h
        return self.down(dropout(h, self.dropout, self.training), groups)

    def _one(self, x: Tensor, e: int) -> Tensor:
        """The network of one expert, without a gradient."""
        h = self.up.one(x, e)
        h = self.act(h) if self.gate is None else self.act(self.gate.one(x, e)).mul_(h)
        return self.down.one(dropout(h, self.dropout, self.training), e)


class Matrices(nn.Module):
    """A linear layer for each expert."""

    def __init__(self, experts: int, inputs: int, outputs: int, bias: bool) -> None:
        super().__init__()
        self.weight = parameter(experts, outputs, inputs)
        self.bias = nn.Parameter(torch.zeros(experts, outputs)) if bias else None

    def initialise(self, draw: Draw) -> None:
        draw.matrix(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor, groups: Groups) -> Tensor:
        return product(x, self.weight, self.bias, groups)

    def one(self, x: Tensor, e: int) -> Tensor:
        """That of one expert, without a gradient."""
        return one(x, self.weight[e], None if self.bias is None else self.bias[e])


@torch.no_grad()
def rebalance(model: nn.Module, record: Record, rate: float = 0.001) -> None:
    """After a step: correction_i += rate * sign(mean load - load_i) (DeepSeek-V3, arXiv:2412.19437, section 2.1.2).

    `record` is that of the step's forward, asked for "*.load"; add up the loads of several forwards before. Raises
    LaminaError where a router with a correction has no load in the record.
    """
    for module in model.modules():
        if isinstance(module, Experts) and isinstance(module.router, TopK) and module.router.correction is not None:
            if module.router.correction.is_meta:  # it lies on another rank
                continue
            name = f"{module.path}.load"
            if name not in record.values:
                raise LaminaError(f"the record has no {name}: pass record=Record('*.load') to the forward")
            load = record.values[name].to(module.router.correction.dtype)
            module.router.correction.add_((load.mean() - load).sign(), alpha=rate)
