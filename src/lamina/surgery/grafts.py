"""Grafts: new parts of a trained model, gated from zero (arXiv:2204.14198, section 2.2), so that it stays what it was
until they are trained, and their gates have a gradient from the first step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Literal

import torch
from torch import Tensor

from lamina.errors import LaminaError
from lamina.layers import (
    AttentionSpec,
    CompressiveSpec,
    ExpertsSpec,
    FeedForwardSpec,
    InfiniSpec,
    LayerNormSpec,
    LayerSpec,
    MemorizingSpec,
    MemoryAttentionSpec,
    ProductKeySpec,
    RecurrenceSpec,
    RMSNormSpec,
    StepSpec,
    SumSpec,
    neighbour_encoder,
)
from lamina.model import ModelSpec
from lamina.specs import Spec, unknown
from lamina.surgery.operation import Changed, Operation, Promise
from lamina.surgery.patterns import Restore
from lamina.surgery.places import EVERYWHERE, Place, edited, places
from lamina.surgery.retrofit import retrofit

GATED = Promise("exact", "what is new is gated from zero", bits=True)


@dataclass(frozen=True, kw_only=True)
class NewStep(Operation):
    """One step more in each of some layers, behind the step called `after`, or the last.

    A feed-forward network narrower than the model is an adapter (arXiv:1902.00751, section 2.1), product keys are a
    memory (arXiv:1907.05242).
    """

    NAME = "step"

    name: str  # part of the names of its weights
    part: FeedForwardSpec | ProductKeySpec | ExpertsSpec
    after: str | None = None
    at: tuple[str, ...] = EVERYWHERE  # layers

    def change(self, spec: ModelSpec, weights: Mapping[str, Tensor]) -> Changed:
        chosen = {place.path for place in layers_of(spec, self.at)}

        def change(path: str, part: Spec) -> Spec:
            if path not in chosen or not isinstance(part, LayerSpec):
                return part
            return with_step(Place(path, part), self.name, self.part, self.after)

        return Changed(edited(spec, change), weights, GATED, (Restore(spec=spec.to_json()),))


@dataclass(frozen=True, kw_only=True)
class NewMemory(Operation):
    """Attention with a memory of what lies beyond its own keys, whose pattern stays what it is (docs/memory.md)."""

    NAME = "memory"

    memory: InfiniSpec | MemorizingSpec | RecurrenceSpec | CompressiveSpec
    at: tuple[str, ...] = EVERYWHERE

    def change(self, spec: ModelSpec, weights: Mapping[str, Tensor]) -> Changed:
        chosen = {place.path: place for place in places(spec, AttentionSpec, self.at)}
        if any(isinstance(part, MemoryAttentionSpec) for _, part in spec.walk()):
            for place in places(spec, MemoryAttentionSpec):
                if place.path in chosen:
                    raise LaminaError(f"{place.shown} has a memory already")
        for place in chosen.values():
            try:
                with torch.device("meta"):
                    MemoryAttentionSpec(attention=place.part, memory=self.memory).build(spec.width)
            except LaminaError as error:
                raise type(error)(f"{place.shown}: {error}") from None

        def change(path: str, part: Spec) -> Spec:
            return MemoryAttentionSpec(attention=part, memory=self.memory) if path in chosen else part  # pyright: ignore[reportArgumentType]

        return Changed(edited(spec, change), weights, self._promise(), (Restore(spec=spec.to_json()),))

    def _promise(self) -> Promise:
        if isinstance(self.memory, RecurrenceSpec | CompressiveSpec):
            return Promise("bounded", f"the same for texts of up to {self.memory.length} tokens")
        if self.memory.gate == "zero":
            return GATED
        return Promise("lossy", "the gate begins at a half; with gate: zero it begins at nothing")


@dataclass(frozen=True, kw_only=True)
class NeighbourEncoderSize(Spec):
    """How large an encoder of neighbours is, as in all sizes of RETRO (arXiv:2112.04426, table 10)."""

    width: int = 896
    heads: int = 16
    head_dim: int = 64
    hidden: int = 3584
    layers: int = 2


@dataclass(frozen=True, kw_only=True)
class Retrieval(Operation):
    """Layers that read what was retrieved: RETRO-fitting (arXiv:2112.04426, section 4.4), as `retrofit` does it."""

    NAME = "retrieval"

    chunk: int = 64  # tokens
    encoder: NeighbourEncoderSize | None = None  # None: as published
    begin: Literal["new", "copied"] = "new"  # copied: heads read neighbours as they read their own text, from the start
    at: tuple[str, ...] | None = None  # layers; None: every third from the sixth on

    def change(self, spec: ModelSpec, weights: Mapping[str, Tensor]) -> Changed:
        layers = None
        if self.at is not None:
            layers = tuple(sorted(int(place.path.split(".")[-1]) for place in layers_of(spec, self.at)))
        size = None if self.encoder is None else asdict(self.encoder)
        made = None if size is None else neighbour_encoder(spec.width, spec.embedding.vocabulary, **size)
        new, state = retrofit(spec, weights, layers=layers, chunk=self.chunk, encoder=made, begin=self.begin)
        return Changed(new, state, GATED, (Restore(spec=spec.to_json()),))


def layers_of(spec: ModelSpec, at: tuple[str, ...]) -> list[Place[LayerSpec]]:
    """The layers of the model's own stacks that `at` names, and not those of an encoder inside one of them."""
    return [place for place in places(spec, LayerSpec, at) if place.path.count(".") == 2]


def with_step(place: Place[LayerSpec], name: str, op: Spec, after: str | None) -> LayerSpec:
    """A layer with a gated step more. Its norm stands before it where that of the step that it follows does; after a
    norm, as in BERT, it reads what that gives."""
    names = [step.name for step in place.part.steps]
    if after is not None and after not in names:
        raise LaminaError(f"{place.shown}: {unknown('step', after, names)}")
    if name in names:
        raise LaminaError(f"{place.shown} has a step {name!r} already; steps of a layer have names of their own")
    number = len(names) if after is None else names.index(after) + 1
    before = place.part.steps[number - 1]
    step = StepSpec(name=name, op=op, pre=_norm_before(before), dropout=before.dropout, gate=True)
    return LayerSpec(steps=(*place.part.steps[:number], step, *place.part.steps[number:]))


def _norm_before(step: StepSpec) -> LayerNormSpec | RMSNormSpec | None:
    """What the step reads through; parallel branches may have one each."""
    if step.pre is None and isinstance(step.op, SumSpec):
        return step.op.branches[0].pre
    return step.pre
