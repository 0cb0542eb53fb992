"""Routers: which experts a token goes to, and the weights of their results. All are `router(x, call) -> Routing`.

Tokens choose (`TopKSpec`: Shazeer et al. arXiv:1701.06538, GShard 2006.16668, Switch 2101.03961, GLaM 2112.06905,
Mixtral 2401.04088, DeepSeek-V2 2405.04434 and V3 2412.19437), or experts do (`ExpertChoiceSpec`, 2202.09368). Routers
count in float32 at least. Padding goes to no expert, takes no place in one and is in no loss.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lamina.errors import LaminaError
from lamina.layers.call import Call
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

    def check(self) -> None:
        factors = [one for one in (self.training, self.evaluation, self.second) if one is not None]
        if min(factors) <= 0 or self.least < 0:
            raise LaminaError(
                f"training={self.training}, evaluation={self.evaluation} and second={self.second} must be above 0,"
                f" least={self.least} at least 0"
            )
        if self.places and any(one != int(one) for one in (self.training, self.evaluation or 1)):
            raise LaminaError(f"with places=True training={self.training} and evaluation must be whole numbers")


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


@dataclass(frozen=True, kw_only=True)
class ExpertChoiceSpec(Spec):
    """Each expert chooses its best n c / E of the n tokens of a text, by softmax over the experts.

    What is chosen depends on later tokens: a causal stack is refused unless `causal` says that this is meant.
    """

    experts: int
    capacity: float = 2.0  # c: experts a token has on average
    causal: bool = False

    def check(self) -> None:
        if self.experts < 1 or not 0 < self.capacity <= self.experts:
            raise LaminaError(f"capacity={self.capacity} must be above 0 and at most experts={self.experts}")

    def build(self, width: int) -> ExpertChoice:
        return ExpertChoice(self, width)


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

    def initialise(self, generator: torch.Generator) -> None:
        nn.init.normal_(self.weight, std=0.02, generator=generator)
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

    def initialise(self, generator: torch.Generator) -> None:
        super().initialise(generator)
        if self.noise is not None:
            nn.init.zeros_(self.noise)  # as published: at the start all experts have about the same chance
        if self.correction is not None:
            nn.init.zeros_(self.correction)

    def forward(self, x: Tensor, call: Call) -> Routing:
        spec, (batch, length) = self.spec, x.shape[:2]
        wide = _wide(x)
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
        real = _real(call)
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
        return scores.argmax(-1, keepdim=True) if spec.chosen == 1 else scores.topk(spec.chosen, dim=-1).indices


class ExpertChoice(Router):
    """Experts choose, in each document of each row by itself: other texts and padding change nothing."""

    SHARD: dict[str, str] = {}

    def __init__(self, spec: ExpertChoiceSpec, width: int) -> None:
        super().__init__(spec.experts, width)
        self.spec = spec

    def forward(self, x: Tensor, call: Call) -> Routing:
        spec, (batch, length) = self.spec, x.shape[:2]
        logits = self.logits(_wide(x))
        scores = logits.softmax(-1)  # (N, E)
        real = _real(call)
        if real is None:
            rows = scores.unflatten(0, (batch, length))
            gate, at = rows.topk(min(length, self._places(length)), dim=1)  # (B, places, E)
            token = at + length * torch.arange(batch, device=x.device)[:, None, None]
            expert = torch.arange(spec.experts, device=x.device).expand_as(at)
            pairs = (token.flatten(), expert.flatten(), gate.flatten())
        else:
            text = _texts(call)
            sizes = torch.bincount(text, weights=real.to(scores.dtype))
            places = torch.tensor([self._places(int(size)) for size in sizes], device=x.device)
            rank = _ranks(scores.detach(), text)
            token, expert = ((rank < places[text, None]) & real[:, None]).nonzero(as_tuple=True)
            pairs = (token, expert, scores[token, expert])
        return Routing(spec.experts, *pairs, span=(batch, length), logits=logits, scores=scores, real=real)

    def _places(self, tokens: int) -> int:
        return max(1, round(tokens * self.spec.capacity / self.spec.experts))


def _texts(call: Call) -> Tensor:
    """(N,) the number of each token's text: a document of a row, without its padding."""
    tokens = call.tokens
    row = torch.arange(len(tokens.document), device=tokens.document.device)[:, None].expand_as(tokens.document)
    whose = torch.stack([row, tokens.document, tokens.real.to(row.dtype)], dim=-1)
    return whose.flatten(0, 1).unique(dim=0, return_inverse=True)[1]


def _ranks(scores: Tensor, text: Tensor) -> Tensor:
    """(N, E): how many tokens of its text an expert (column) likes better."""
    order = scores.argsort(dim=0, descending=True, stable=True)
    order = order.gather(0, text[order].argsort(dim=0, stable=True))  # by text, the best of each first
    sizes = torch.bincount(text)
    start = (sizes.cumsum(0) - sizes)[text[order]]
    rank = torch.arange(len(text), device=text.device)[:, None] - start
    return torch.empty_like(order).scatter_(0, order, rank)


def _wide(x: Tensor) -> Tensor:
    """(B, T, d) -> (N, d) in float32, or float64 where it is: a router in bfloat16 diverges (Switch, table 2)."""
    return x.flatten(0, 1).to(torch.promote_types(x.dtype, torch.float32))


def _real(call: Call) -> Tensor | None:
    """(N,) where there is a token; None where the tokens are known to have no holes."""
    return None if call.tokens.span is not None else call.tokens.real.flatten()


def limited(routing: Routing, spec: CapacitySpec, chosen: int, training: bool) -> Routing:
    """The routing of tokens that chose, with what is beyond the capacity of an expert taken out."""
    factor = spec.training if training else spec.evaluation
    if factor is None or routing.token.is_meta:  # what is dropped there is not known; it is counted as if none were
        return routing
    (batch, length), experts = routing.span, routing.experts
    rows = batch if spec.group == "row" else 1
    expert = routing.expert.view(rows, -1, chosen)  # (rows, tokens, k)
    if spec.second is not None and training and chosen > 1:
        gate = routing.gate.detach().view_as(expert)
        lost = torch.rand_like(gate) >= gate / spec.second
        lost[..., 0] = False
        expert = expert.masked_fill(lost, experts)
    queue = F.one_hot(expert.transpose(1, 2).flatten(1), experts + 1).cumsum(1)  # first choices before second ones
    place = queue.gather(2, expert.transpose(1, 2).flatten(1)[..., None]).view(rows, chosen, -1).transpose(1, 2)
    if spec.places:
        most: Tensor | int = int(factor)
    else:
        tokens = (
            routing.real.view(rows, -1).sum(1) if routing.real is not None else torch.tensor(batch * length // rows)
        )
        most = (tokens * factor / experts).round().clamp(min=spec.least).to(place.device).view(-1, 1, 1)
    return replace(routing, expert=expert.masked_fill(place > most, experts).flatten(), limited=True)


def record_losses(spec: RouterLossSpec, routing: Routing, chosen: int, path: str, call: Call) -> None:
    """Write down the losses that have a coefficient, under `path` and their names."""
    name = path if not spec.pooled else path.partition(".")[0]
    for kind, value in _losses(spec, routing, chosen, name, call.memo).items():
        call.record.losses[f"{name if spec.pooled else call.record.called(path)}.{kind}"] = value


def _losses(spec: RouterLossSpec, routing: Routing, chosen: int, name: str, memo: dict[Any, Any]) -> dict[str, Tensor]:
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
