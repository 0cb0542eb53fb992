"""Routers: which experts a token goes to, and the weights of their results. All are `router(x, call) -> Routing`.

Here tokens choose (`TopKSpec`: Shazeer et al. arXiv:1701.06538, GShard 2006.16668, Switch 2101.03961, GLaM 2112.06905,
Mixtral 2401.04088, DeepSeek-V2 2405.04434 and V3 2412.19437, NLLB 2207.04672); in `expert_choice.py` experts do.
Routers count in float32 at least. Padding goes to no expert, takes no place in one and is in no loss.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lamina.errors import LaminaError
from lamina.layers.call import Call
from lamina.layers.initial import Draw
from lamina.layers.parameter import parameter
from lamina.specs import Spec

TINY = 1e-20
"""Added to sums that divide, so that scores which are all 0 give 0."""


@dataclass(frozen=True, kw_only=True)
class GroupLimitSpec(Spec):
    """Experts lie in groups (on a machine each), and a token may use those of the best groups only: DeepSeek."""

    groups: int
    kept: int  # groups that a token may use
    best: int = 1  # a group counts as the sum of its best so many scores: 1 in V2, 2 in V3

    def check(self) -> None:
        if not 1 <= self.kept <= self.groups or self.best < 1:
            raise LaminaError(f"kept={self.kept} must be 1 to groups={self.groups}, and best={self.best} at least 1")


@dataclass(frozen=True, kw_only=True)
class TopKSpec(Spec):
    """Each token chooses its best `chosen` of `experts`.

    gates: softmax or sigmoid scores of the chosen, normalised or not, times `scale`. softmax over the chosen logits
    (Mixtral; Shazeer's KeepTopK) is softmax over all, normalised.
    """

    experts: int
    chosen: int = 2  # 1 in Switch, 2 in GShard, GLaM and Mixtral, 8 in DeepSeek-V3 and Qwen3-MoE
    score: Literal["softmax", "sigmoid"] = "softmax"  # sigmoid: DeepSeek-V3
    normalise: bool = True  # gates sum to 1: GShard, Mixtral, DeepSeek-V3; not in Switch, Qwen2-MoE, DeepSeek-V2
    scale: float = 1.0  # of the gates: 16 in DeepSeek-V2, 2.5 in V3
    limit: GroupLimitSpec | None = None
    correction: bool = False  # a bias on the choice alone, which `balance` moves after a step: DeepSeek-V3
    bias: bool = False  # of the logits
    jitter: float = 0.0  # in training the router's input times U(1 - jitter, 1 + jitter): 0.01 in Switch
    drawn: bool = False  # in training choices after the first are drawn with the scores of the rest: NLLB may
    noise: bool = False  # in training N(0, 1) softplus(x W_noise) is added to the logits: Shazeer et al., equation 4

    def check(self) -> None:
        if not 1 <= self.chosen <= self.experts or not 0 <= self.jitter < 1:
            raise LaminaError(
                f"chosen={self.chosen} must be 1 to experts={self.experts}, jitter={self.jitter} from 0 to below 1"
            )
        if self.limit is not None:
            size = self.experts // self.limit.groups
            if self.experts % self.limit.groups or self.limit.best > size or self.limit.kept * size < self.chosen:
                raise LaminaError(
                    f"experts={self.experts} must be a multiple of groups={self.limit.groups}, a group hold"
                    f" best={self.limit.best} experts and the kept ones chosen={self.chosen}"
                )

    @property
    def smooth(self) -> bool:
        """Whether the chance of an expert to be chosen is between 0 and 1."""
        return self.noise and self.chosen < self.experts

    def build(self, width: int) -> TopK:
        return TopK(self, width)


@dataclass
class Routing:
    """M pairs of a token and an expert: the token's row in (N, width), the expert, and the weight of the result.

    A pair whose expert is `experts`, one more than there are, is nobody's: of padding, or beyond a capacity.
    """

    experts: int
    token: Tensor  # (M,) int64
    expert: Tensor  # (M,) int64
    gate: Tensor  # (M,), float32 at least
    span: tuple[int, int]  # (B, T), N = B T
    logits: Tensor  # (N, E)
    scores: Tensor  # (N, E): shares of the experts in a token, which sum to 1
    real: Tensor | None = None  # (N,) bool: where there is a token; None: everywhere
    limited: bool = False  # a capacity may have taken some out
    clean: tuple[Tensor, Tensor, Tensor] | None = None  # logits without noise, with it, and the noise's deviation

    @property
    def partial(self) -> bool:
        """Whether some pairs may be nobody's."""
        return self.limited or self.real is not None


class Router(nn.Module):
    """What all routers have: a matrix, and logits in float32 at least."""

    def __init__(self, experts: int, width: int, bias: bool = False) -> None:
        super().__init__()
        self.path = ""
        self.weight = parameter(experts, width)
        self.bias = nn.Parameter(torch.zeros(experts)) if bias else None

    def initialise(self, draw: Draw) -> None:
        draw.matrix(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def logits(self, x: Tensor) -> Tensor:
        """x (N, d) as floats of 32 bits or more -> (N, E)."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


class TopK(Router):
    """Tokens choose."""

    SHARD: dict[str, str] = {}  # small, and every rank needs all of it

    def __init__(self, spec: TopKSpec, width: int) -> None:
        super().__init__(spec.experts, width, spec.bias)
        self.spec = spec
        self.noise = parameter(spec.experts, width) if spec.noise else None
        self.correction = nn.Parameter(torch.zeros(spec.experts), requires_grad=False) if spec.correction else None

    def initialise(self, draw: Draw) -> None:
        super().initialise(draw)
        if self.noise is not None:
            nn.init.zeros_(self.noise)  # as published: at the start all experts have about the same chance
        if self.correction is not None:
            nn.init.zeros_(self.correction)

    def forward(self, x: Tensor, call: Call) -> Routing:
        spec, (batch, length) = self.spec, x.shape[:2]
        wide = widened(x)
        if self.training and spec.jitter:
            wide = wide * torch.empty_like(wide).uniform_(1 - spec.jitter, 1 + spec.jitter)
        clean = logits = self.logits(wide)  # (N, E)
        deviation = None
        if self.noise is not None and self.training:
            deviation = F.softplus(F.linear(wide, self.noise.to(wide.dtype)))
            logits = clean + torch.randn_like(clean) * deviation
        scores = logits.softmax(-1) if spec.score == "softmax" else logits.sigmoid()
        chosen = self._choose(scores).flatten(1)  # (N, k)
        gates = scores.gather(1, chosen)
        if spec.normalise:
            gates = gates / (gates.sum(-1, keepdim=True) + TINY)
        shares = scores if spec.score == "softmax" else scores / (scores.sum(-1, keepdim=True) + TINY)
        real = real_tokens(call)
        token = torch.arange(batch * length, device=x.device).repeat_interleave(spec.chosen)
        expert = chosen if real is None else chosen.masked_fill(~real[:, None], spec.experts)
        return Routing(
            experts=spec.experts,
            token=token,
            expert=expert.flatten(),
            gate=(gates * spec.scale).flatten(),
            span=(batch, length),
            logits=logits,
            scores=shares,
            real=real,
            clean=None if deviation is None else (clean, logits, deviation),
        )

    def _choose(self, scores: Tensor) -> Tensor:
        """(N, E) -> (N, k) numbers of experts, the best first."""
        spec = self.spec
        scores = scores.detach()
        if self.correction is not None:
            scores = scores + self.correction.to(scores.dtype)
        if spec.limit is not None:
            inside = scores.unflatten(1, (spec.limit.groups, -1))  # (N, groups, E / groups)
            value = inside.topk(spec.limit.best, dim=-1).values.sum(-1)
            kept = torch.zeros_like(value, dtype=torch.bool)
            kept = kept.scatter(1, value.topk(spec.limit.kept, dim=-1).indices, True)
            scores = inside.masked_fill(~kept[..., None], -torch.inf).flatten(1)
        if spec.chosen == 1:
            return scores.argmax(-1, keepdim=True)
        if spec.drawn and self.training:  # the best of log p + Gumbel noise is a draw; that of infinity is the first
            drawn = scores.log() - torch.empty_like(scores).exponential_().log()
            scores = drawn.scatter(1, scores.argmax(-1, keepdim=True), torch.inf)
        return scores.topk(spec.chosen, dim=-1).indices


def widened(x: Tensor) -> Tensor:
    """(B, T, d) -> (N, d) in float32, or float64 where it is: a router in bfloat16 diverges (Switch, table 2)."""
    return x.flatten(0, 1).to(torch.promote_types(x.dtype, torch.float32))


def real_tokens(call: Call) -> Tensor | None:
    """(N,) where there is a token; None where the tokens are known to have no holes."""
    return None if call.tokens.span is not None else call.tokens.real.flatten()
