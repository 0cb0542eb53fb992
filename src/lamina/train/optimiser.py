"""Optimisers: torch's own, over weights grouped by what they are for. Their state goes by the weights' names."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lamina.errors import LaminaError
from lamina.layers.product_keys import Values
from lamina.specs import Spec, unknown
from lamina.train.ranks import local
from lamina.train.roles import ROLES, role

Named = tuple[str, nn.Parameter]


@dataclass(frozen=True, kw_only=True)
class Group(Spec):
    """Weights with a rate or a decay of their own. Of several groups the first that fits is taken."""

    roles: tuple[str, ...] = ()  # matrix, embedding, head, expert, router, norm, bias, value, other; none: all
    paths: tuple[str, ...] = ()  # beginnings or patterns of parameter names; none: all
    rate: float = 1.0  # times the optimiser's
    decay: float | None = None  # in place of the optimiser's

    def check(self) -> None:
        for name in self.roles:
            if name not in ROLES:
                raise LaminaError(unknown("role of a weight", name, ROLES))
        if self.rate < 0 or (self.decay is not None and self.decay < 0):
            raise LaminaError(f"rate={self.rate} and decay={self.decay} must not be below 0")

    def fits(self, role: str, name: str) -> bool:
        """Whether a weight belongs here."""
        known = any(name == p or name.startswith(f"{p}.") or fnmatchcase(name, p) for p in self.paths)
        return (not self.roles or role in self.roles) and (not self.paths or known)


STILL = ("norm", "bias", "value", "other")
"""Roles without weight decay where no group says otherwise (GPT-2, BERT, LLaMA: nothing that is no matrix)."""

ROWS = "rows"
"""The role, for an optimiser, of tables whose gradients have only the rows that were read."""


@dataclass(frozen=True, kw_only=True)
class AdamW(Spec):
    """Adam with decoupled weight decay (arXiv:1711.05101, algorithm 2), in torch's fused form.

    Tables of product-key memories get torch's SparseAdam, which changes the rows that were read and no others, in one
    process, in float32 and without decay: a step costs what was read, and the moments of other rows wait.
    """

    NAME = "adamw"

    rate: float = 3e-4
    betas: tuple[float, ...] = (0.9, 0.95)  # LLaMA, GPT-3; (0.9, 0.999) in BERT
    eps: float = 1e-8
    decay: float = 0.1
    groups: tuple[Group, ...] = ()

    def check(self) -> None:
        _positive(self, "rate", "eps")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise LaminaError(f"betas is {list(self.betas)}; two numbers from 0 to below 1 were expected")

    def build(self, groups: list[dict[str, Any]]) -> list[torch.optim.Optimizer]:
        """Over `groups` of parameters as torch takes them, each with its lr and weight_decay."""
        betas = (self.betas[0], self.betas[1])
        # Lists of DTensors and tensors together have no fused form.
        mixed = any(type(one.data) is not Tensor for group in groups for one in group["params"])
        tables = [group for group in groups if group["role"] == ROWS]
        others = [group for group in groups if group["role"] != ROWS]
        made: list[torch.optim.Optimizer] = []
        if others:
            made.append(torch.optim.AdamW(others, lr=self.rate, betas=betas, eps=self.eps, fused=not mixed))
        if tables:
            made.append(torch.optim.SparseAdam(tables, lr=self.rate, betas=betas, eps=self.eps))
        return made


@dataclass(frozen=True, kw_only=True)
class Adafactor(Spec):
    """Second moments as rows and columns (arXiv:1804.04235, algorithm 4); no first moment: T5, PaLM."""

    NAME = "adafactor"

    rate: float = 1e-2
    decay_rate: float = 0.8  # second moments are averaged with 1 - step^-decay_rate
    clip: float = 1.0  # of the root mean square of an update
    decay: float = 0.0
    groups: tuple[Group, ...] = ()

    def check(self) -> None:
        _positive(self, "rate", "decay_rate", "clip")

    def build(self, groups: list[dict[str, Any]]) -> list[torch.optim.Optimizer]:
        """Over `groups` of parameters."""
        return [torch.optim.Adafactor(groups, lr=self.rate, beta2_decay=-self.decay_rate, d=self.clip)]


@dataclass(frozen=True, kw_only=True)
class Muon(Spec):
    """Orthogonalised momentum for the matrices inside the layers (Jordan 2024), AdamW for everything else.

    Rates fit AdamW's (arXiv:2502.16982, equation 4). Experts, which are three-dimensional, get AdamW.
    """

    NAME = "muon"

    rate: float = 3e-4
    momentum: float = 0.95
    decay: float = 0.1
    adjust: Literal["match_rms_adamw", "original"] = "match_rms_adamw"
    betas: tuple[float, ...] = (0.9, 0.95)  # of AdamW
    groups: tuple[Group, ...] = ()

    def check(self) -> None:
        _positive(self, "rate")
        AdamW(rate=self.rate, betas=self.betas)

    def build(self, groups: list[dict[str, Any]]) -> list[torch.optim.Optimizer]:
        """Over `groups` of parameters."""
        matrices, rest = [], []
        for group in groups:
            turned = group["role"] == "matrix"
            flat = [one for one in group["params"] if turned and one.dim() == 2]
            others = [one for one in group["params"] if not (turned and one.dim() == 2)]
            matrices += [{**group, "params": flat}] if flat else []
            rest += [{**group, "params": others}] if others else []
        made: list[torch.optim.Optimizer] = []
        if matrices:
            made.append(torch.optim.Muon(matrices, lr=self.rate, momentum=self.momentum, adjust_lr_fn=self.adjust))
        if rest:
            made += AdamW(rate=self.rate, betas=self.betas).build(rest)
        return made


Optimising = AdamW | Adafactor | Muon


class Optimiser:
    """The optimisers of a run as one. `parameters`: what is trained, by name. sparse: gradients of tables of values may
    have only the rows that were read."""

    def __init__(self, spec: Optimising, model: nn.Module, parameters: Iterable[Named], sparse: bool = False) -> None:
        self.spec = spec
        self.parameters = dict(parameters)
        sparse = sparse and not isinstance(spec, Adafactor)  # whose moments are of rows and columns
        groups: dict[tuple[float, float, str], list[nn.Parameter]] = {}
        for name, parameter in self.parameters.items():
            kind = role(model, name)
            own = next((group for group in spec.groups if group.fits(kind, name)), Group())
            decay = own.decay if own.decay is not None else 0.0 if kind in STILL else spec.decay
            which = "matrix" if kind == "matrix" else ROWS if kind == "value" and sparse and not decay else "rest"
            if kind == "value":
                _table(model, name).sparse = which == ROWS
            groups.setdefault((own.rate, decay, which), []).append(parameter)
        for number, group in enumerate(spec.groups):
            if not any(group.fits(role(model, name), name) for name in self.parameters):
                raise LaminaError(
                    f"optimiser.groups.{number} (roles {list(group.roles)}, paths {list(group.paths)}) fits no weight"
                )
        listed = [
            {"params": members, "lr": spec.rate * rate, "weight_decay": decay, "share": rate, "role": which}
            for (rate, decay, which), members in groups.items()
        ]
        self.optimisers = spec.build(listed)

    def step(self, factor: float) -> float:
        """One step at `factor` of every rate; returns the rate of a group without a rate of its own."""
        rate = self.spec.rate * factor
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = rate * group["share"]
            optimiser.step()
        return rate

    def clear(self) -> None:
        """Forget the gradients."""
        for optimiser in self.optimisers:
            optimiser.zero_grad(set_to_none=True)

    def state(self) -> dict[str, Tensor]:
        """What the optimisers remember, as tensors: "decoder.layers.0.attention.op.q.weight:exp_avg"."""
        found: dict[str, Tensor] = {}
        for name, parameter in self.parameters.items():
            for optimiser in self.optimisers:
                for key, value in optimiser.state.get(parameter, {}).items():
                    if value is not None:
                        found[f"{name}:{key}"] = value if isinstance(value, Tensor) else torch.tensor(value)
        return found

    def load(self, state: Mapping[str, Tensor], put: Callable[[Tensor, Tensor], None]) -> None:
        """The inverse of `state`; `put` fills a tensor with what belongs there.

        Raises LaminaError for a weight that is not trained here, or has another shape."""
        homes = {id(p): one for one in self.optimisers for group in one.param_groups for p in group["params"]}
        for key, value in state.items():
            name, _, what = key.rpartition(":")
            if name not in self.parameters:
                raise LaminaError(f"the state of the optimiser is of {unknown('weight', name, self.parameters)}")
            parameter = self.parameters[name]
            if parameter.is_meta:  # it lies on another rank
                continue
            if what in ("exp_avg", "exp_avg_sq", "momentum_buffer") and value.shape != parameter.shape:
                raise LaminaError(
                    f"the optimiser's {what} of {name} has shape {tuple(value.shape)};"
                    f" the weight {tuple(parameter.shape)}"
                )
            if what == "step" and isinstance(homes[id(parameter)], torch.optim.SparseAdam):
                homes[id(parameter)].state.setdefault(parameter, {})[what] = int(value)  # it counts in Python
                continue
            if value.shape == parameter.shape:
                place = torch.zeros_like(parameter, dtype=value.dtype)
            else:
                place = torch.zeros(value.shape, dtype=value.dtype)
            put(place, value)
            homes[id(parameter)].state.setdefault(parameter, {})[what] = place


def _table(model: nn.Module, name: str) -> Values:
    """The table of values that a parameter belongs to."""
    table = model.get_submodule(name.rpartition(".")[0])
    assert isinstance(table, Values)
    return table


class Average:
    """Exponential moving average of the weights: average += (1 - decay) (weight - average) (arXiv:1706.03762 averages
    checkpoints; arXiv:1412.6980, section 7.2)."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float) -> None:
        self.decay = decay
        here = {name: parameter for name, parameter in parameters.items() if not parameter.is_meta}
        self.parameters = here  # and not those that lie on other ranks
        self.values = {name: parameter.detach().float().clone() for name, parameter in here.items()}

    @torch.no_grad()
    def update(self) -> None:
        """After each step."""
        new = [part.float() for part in local(parameter.detach() for parameter in self.parameters.values())]
        torch._foreach_lerp_(local(self.values.values()), new, 1 - self.decay)  # pyright: ignore

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the weights and their average; once more puts them back."""
        for name, parameter in self.parameters.items():
            held = parameter.detach().clone()
            parameter.copy_(self.values[name])
            self.values[name].copy_(held)


def _positive(spec: Spec, *names: str) -> None:
    for name in names:
        if getattr(spec, name) <= 0:
            raise LaminaError(f"{name} is {getattr(spec, name)}; it must be above 0")
    if getattr(spec, "decay", 0.0) < 0:
        raise LaminaError(f"decay is {spec.decay}; it must not be below 0")  # pyright: ignore
