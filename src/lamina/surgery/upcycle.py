"""Dense to experts: every expert begins as a copy of the network that it replaces (arXiv:2212.05055, section 3), or as
a slice of one (arXiv:2410.07524, section 3.2), and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from lamina.errors import LaminaError
from lamina.layers import CapacitySpec, Draw, ExpertsSpec, FeedForwardSpec, RouterLossSpec, TopKSpec
from lamina.model import ModelSpec
from lamina.specs import Spec
from lamina.surgery.operation import Changed, Operation, Promise
from lamina.surgery.places import EVERYWHERE, Place, edited, places
from lamina.surgery.weights import Made, Weights, own_generator


@dataclass(frozen=True, kw_only=True)
class Upcycle(Operation):
    """Experts in place of feed-forward networks: `experts` copies, of which each token uses `chosen`.

    Gates that sum to 1 over equal experts give what the one network gave, whatever the router says; it is new, and
    begins as `spec.initial` says. slices: each copy is cut into so many experts, along its hidden units; the router's
    rows begin equal within a copy, so that a token chooses whole copies, whose slices add up to the network. shared: so
    many of the slices are one network for all tokens, in place of experts.
    noise: experts begin apart, by so many deviations of each weight. redrawn: in each expert so much of the hidden
    units, others in each, is drawn from the mean and deviation of what it was (drop-upcycling, arXiv:2502.19261,
    section 3). With either the model is another one.
    """

    NAME = "experts"

    experts: int
    chosen: int = 2
    slices: int = 1
    shared: int = 0
    normalise: bool = True  # gates sum to 1; Switch's do not, and the model is then another one
    capacity: CapacitySpec | None = None  # None: nothing is dropped
    losses: RouterLossSpec | None = None
    noise: float = 0.0
    redrawn: float = 0.0
    seed: int = 0
    at: tuple[str, ...] = EVERYWHERE

    def check(self) -> None:
        if not 1 <= self.chosen <= self.experts or self.noise < 0:
            raise LaminaError(
                f"chosen={self.chosen} must be from 1 to experts={self.experts}, and noise={self.noise} at least 0"
            )
        if not 0 <= self.shared < self.slices or not 0 <= self.redrawn <= 1:
            raise LaminaError(
                f"shared={self.shared} must be from 0 to below slices={self.slices}, and redrawn={self.redrawn} within"
                " 0 and 1"
            )

    def change(self, spec: ModelSpec, weights: Mapping[str, Tensor]) -> Changed:
        found = networks(spec, self.at)
        made: dict[str, Made] = {}
        gone: list[str] = []
        for place in found:
            if place.part.hidden % self.slices:
                raise LaminaError(f"{place.shown} has {place.part.hidden} hidden units, no multiple of {self.slices}")
            new, old = self._made(spec, place, weights)
            made |= new
            gone += old
        chosen = {place.path for place in found}

        def change(path: str, part: Spec) -> Spec:
            return self._experts(part) if path in chosen and isinstance(part, FeedForwardSpec) else part

        return Changed(edited(spec, change), Weights(weights, made, gone), self._promise(), self._undo(sorted(chosen)))

    def _made(
        self, spec: ModelSpec, place: Place[FeedForwardSpec], weights: Mapping[str, Tensor]
    ) -> tuple[dict[str, Made], list[str]]:
        made: dict[str, Made] = {}
        gone: list[str] = []
        each = f" of {self.slices - self.shared} slices" if self.slices > 1 else ""
        more = (f" with noise {self.noise:g}" if self.noise else "") + (", in part anew" if self.redrawn else "")
        for part in ("gate", "up", "down"):
            for kind in ("weight", "bias"):
                name = place.weight(f"{part}.{kind}")
                if name not in weights:
                    continue
                begun = partial(self._begun, name=f"{part}.{kind}", path=place.path)
                made[place.weight(f"experts.{part}.{kind}")] = Made(
                    (name,), f"{self.experts} copies{each}{more}", begun
                )
                gone.append(name)
                if self.shared:
                    some = partial(self._shared, name=f"{part}.{kind}")
                    made[place.weight(f"shared.{part}.{kind}")] = Made((name,), f"{self.shared} slices", some)
        if self.slices - self.shared > 1:
            rows = partial(self._rows, spec=spec, path=place.path)
            how = f"drawn, {self.slices - self.shared} equal rows a copy"
            made[place.weight("router.weight")] = Made((place.weight("up.weight"),), how, rows)
        return made, gone

    def _experts(self, part: FeedForwardSpec) -> ExpertsSpec:
        each, slice = self.slices - self.shared, part.hidden // self.slices
        router = TopKSpec(
            experts=self.experts * each, chosen=self.chosen * each, normalise=self.normalise, scale=float(each)
        )
        return ExpertsSpec(
            router=router,
            expert=part.replace(hidden=slice),
            shared=part.replace(hidden=slice * self.shared) if self.shared else None,
            capacity=self.capacity,
            losses=self.losses,
        )

    def _promise(self) -> Promise:
        if self.noise or self.redrawn:
            return Promise("lossy", "experts begin with noise" if self.noise else "experts begin in part anew")
        if not self.normalise:
            return Promise("lossy", "gates do not sum to 1")
        if self.capacity is not None and self.capacity.evaluation is not None:
            return Promise("lossy", "what is beyond the places of an expert is dropped")
        dropped = "; in training what is beyond the places of an expert is dropped" if self.capacity else ""
        return Promise("exact", f"equal experts, and gates that sum to 1{dropped}")

    def _undo(self, at: list[str]) -> tuple[Operation, ...] | None:
        kept = self._promise().kept == "exact"
        return (PickExpert(expert=0, slices=self.slices, at=tuple(at)),) if kept else None

    def _begun(self, x: Tensor, name: str, path: str) -> Tensor:
        """The experts, (E r, ...), with noise where it is asked for."""
        slices = _cut(x, name, self.slices)[self.shared :]  # (r, ...)
        copies = slices.expand(self.experts, *slices.shape).flatten(0, 1).contiguous()
        if self.redrawn and name != "down.bias":
            copies = self._anew(copies, name, path)
        if not self.noise:
            return copies
        drawn = torch.randn(copies.shape, generator=own_generator(f"{path}.{name}", self.seed))
        return (copies.float() + self.noise * x.float().std() * drawn).to(x.dtype)

    def _anew(self, copies: Tensor, name: str, path: str) -> Tensor:
        """Hidden units, the same of gate, up and down, from the mean and the deviation of what they were."""
        dim = 2 if name == "down.weight" else 1
        experts, hidden = len(copies), copies.shape[dim]
        order = torch.rand(experts, hidden, generator=own_generator(path, self.seed)).argsort(dim=1).argsort(dim=1)
        chosen = order < round(self.redrawn * hidden)  # (E r, hidden)
        chosen = chosen.view(experts, *(hidden if one == dim else 1 for one in range(1, copies.dim())))
        wide, dims = copies.float(), tuple(range(1, copies.dim()))
        count = chosen.expand_as(wide).sum(dims, keepdim=True).clamp(min=1)
        mean = (wide * chosen).sum(dims, keepdim=True) / count
        deviation = (((wide - mean).square() * chosen).sum(dims, keepdim=True) / count).sqrt()
        drawn = torch.randn(copies.shape, generator=own_generator(f"{path}.{name}.anew", self.seed))
        return torch.where(chosen, mean + deviation * drawn, wide).to(copies.dtype)

    def _shared(self, x: Tensor, name: str) -> Tensor:
        return _joined(_cut(x, name, self.slices)[: self.shared], name)

    def _rows(self, up: Tensor, spec: ModelSpec, path: str) -> Tensor:
        """The router: as `spec.initial` says, but that the rows of a copy are equal."""
        rows = torch.empty(self.experts, up.shape[1])
        Draw(own_generator(f"{path}.router", self.seed), spec.initial).matrix(rows)
        return rows.repeat_interleave(self.slices - self.shared, dim=0).to(up.dtype)


@dataclass(frozen=True, kw_only=True)
class PickExpert(Operation):
    """One network in place of experts: expert number `expert`, or their mean. With `slices` so many experts, those of
    the shared network among them, are one network: number `expert` of those."""

    NAME = "dense"

    expert: int | None = None  # None: the mean of all
    slices: int = 1
    at: tuple[str, ...] = EVERYWHERE

    def change(self, spec: ModelSpec, weights: Mapping[str, Tensor]) -> Changed:
        found = places(spec, ExpertsSpec, self.at)
        made: dict[str, Made] = {}
        gone: list[str] = []
        for place in found:
            each = self._each(place)
            inside = [name for name in weights if name.startswith(f"{place.path}.")]
            gone += inside
            begin, shared = place.weight("experts."), place.weight("shared.")
            for name in inside:
                if name.startswith(begin):
                    which = "mean of the experts" if self.expert is None else f"expert {self.expert}"
                    how = which + (f", of {self.slices} slices" if self.slices > 1 else "")
                    part = name.removeprefix(begin)
                    sources = [name] + [f"{shared}{part}"] * (f"{shared}{part}" in weights)
                    made[place.weight(part)] = Made(tuple(sources), how, partial(self._picked, each=each, name=part))
        chosen = {place.path for place in found}

        def change(path: str, part: Spec) -> Spec:
            if path not in chosen or not isinstance(part, ExpertsSpec):
                return part
            return part.expert.replace(hidden=part.expert.hidden * self.slices)

        return Changed(
            edited(spec, change), Weights(weights, made, gone), Promise("lossy", "what other experts know goes")
        )

    def _each(self, place: Place[ExpertsSpec]) -> int:
        """The experts that are one network, the shared one aside."""
        part, experts = place.part, place.part.router.experts
        if part.shared is not None and (self.slices == 1 or part.shared_gate):
            raise LaminaError(f"{place.shown} has a shared network beside its experts, which would be lost")
        each = self.slices - (0 if part.shared is None else part.shared.hidden // part.expert.hidden)
        if each < 1 or experts % each:
            raise LaminaError(f"slices={self.slices} do not fit the {experts} experts at {place.shown}")
        if self.expert is not None and not 0 <= self.expert < experts // each:
            raise LaminaError(f"expert={self.expert} must be from 0 to {experts // each - 1} at {place.shown}")
        return each

    def _picked(self, x: Tensor, shared: Tensor | None = None, *, each: int, name: str) -> Tensor:
        copies = x.unflatten(0, (-1, each))
        slices = copies.float().mean(dim=0).to(x.dtype) if self.expert is None else copies[self.expert]
        own = _joined(slices, name)
        if shared is None:
            return own
        return shared + own if name == "down.bias" else torch.cat([shared, own], dim=int(name == "down.weight"))


def _cut(x: Tensor, name: str, slices: int) -> Tensor:
    """A weight of a network as those of its slices, (slices, ...). The first one has the bias of down, so that it
    counts once."""
    if name == "down.bias":
        return torch.cat([x[None], x.new_zeros(slices - 1, len(x))])
    return x.unflatten(1, (slices, -1)).transpose(0, 1) if name == "down.weight" else x.unflatten(0, (slices, -1))


def _joined(slices: Tensor, name: str) -> Tensor:
    """The inverse of `_cut`."""
    if name == "down.bias":
        return slices[0] if len(slices) == 1 else slices.sum(dim=0)
    return slices.transpose(0, 1).flatten(1) if name == "down.weight" else slices.flatten(0, 1)


def networks(spec: ModelSpec, at: tuple[str, ...]) -> list[Place[FeedForwardSpec]]:
    """The feed-forward networks there that are no experts. Raises LaminaError where there are none."""
    some = any(isinstance(part, ExpertsSpec) for _, part in spec.walk())
    inside = tuple(f"{place.path}." for place in places(spec, ExpertsSpec)) if some else ()
    found = [place for place in places(spec, FeedForwardSpec, at) if not place.path.startswith(inside)]
    if not found:
        raise LaminaError("every feed-forward network of this model is an expert already")
    return found
