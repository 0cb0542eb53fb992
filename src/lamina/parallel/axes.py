"""Which ranks do what: one function decides the mesh, and refuses what cannot be before anything is built."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from lamina.errors import LaminaError, UnsupportedError
from lamina.layers import (
    BatchNormSpec,
    CapacitySpec,
    ChunkedCrossAttentionSpec,
    CompressiveSpec,
    ExpertChoiceSpec,
    ExpertsSpec,
    FeedForwardSpec,
    LongformerSpec,
    ProductKeySpec,
    RecurrentMemorySpec,
    RotarySpec,
)
from lamina.model import ModelSpec
from lamina.specs import Spec


@dataclass(frozen=True, kw_only=True)
class MeshSpec(Spec):
    """How many ranks each axis has. Their product is the number of processes; every rank has a place on each axis.

    Ranks on replicate, shard and expert read different texts, those on context different parts of the same texts, and
    those on tensor and pipeline the same.
    """

    replicate: int = 1  # copies of all that follows, which only add up gradients (HSDP)
    shard: int = 1  # parameters, gradients and optimiser state are shared out by layer (FSDP); -1: whatever is left
    context: int = 1  # each text is cut
    tensor: int = 1  # heads, hidden features and the vocabulary are shared out
    expert: int = 1  # experts are shared out
    pipeline: int = 1  # the layers are shared out, and micro-batches go through the ranks in turn

    def check(self) -> None:
        for name in self.__dataclass_fields__:
            count = getattr(self, name)
            if count < 1 and not (name == "shard" and count == -1):
                raise LaminaError(f"{name} is {count}; it must be at least 1{', or -1' * (name == 'shard')}")

    @property
    def ranks(self) -> int:
        """The product."""
        return math.prod(getattr(self, axis) for axis in self.__dataclass_fields__)


def plan(mesh: MeshSpec, world: int, model: ModelSpec) -> MeshSpec:
    """The mesh of `world` processes for a model, with shard = -1 filled in.

    Raises LaminaError where the product is not `world`, and where the model cannot be shared out so; UnsupportedError
    for what is not built. Nothing is built here, and no process group is needed.
    """
    if mesh.shard == -1:
        rest = mesh.replace(shard=1)
        if world % rest.ranks:
            raise LaminaError(f"shard is what is left, but {_product(rest)} do not divide the {world} of this run")
        mesh = mesh.replace(shard=world // rest.ranks)
    if mesh.ranks != world:
        raise LaminaError(f"{_product(mesh)}; this run has {world}")
    if mesh.pipeline > 1:
        _pipeline(mesh, model)
    _experts(mesh, model)
    if mesh.ranks > 1:
        _statistics(model)
    if mesh.ranks > mesh.tensor:
        _segments(model)
    if mesh.tensor > 1:
        for path, part in model.walk():
            _shared(path, part, mesh.tensor)
    if mesh.context > 1:
        _contexts(model)
    return mesh


def _product(mesh: MeshSpec) -> str:
    """replicate 2 x shard 2 x tensor 2 = 8 ranks."""
    named = [f"{axis} {getattr(mesh, axis)}" for axis in mesh.__dataclass_fields__ if getattr(mesh, axis) > 1]
    return f"{' x '.join(named) or 'shard 1'} = {mesh.ranks} rank{'s' * (mesh.ranks > 1)}"


def _pipeline(mesh: MeshSpec, model: ModelSpec) -> None:
    """Refuse what has no one row of layers that can be cut into runs."""
    if beside := [axis for axis in ("context", "tensor", "expert") if getattr(mesh, axis) > 1]:
        raise UnsupportedError(f"{_product(mesh)}: beside pipeline, {beside[0]} is not built; use replicate or shard")
    if model.two_stacks or model.stem is not None:
        what = "an encoder and a decoder" if model.two_stacks else "a stem"
        raise UnsupportedError(f"pipeline is {mesh.pipeline}, and this model has {what}; use shard or tensor")
    stack = model.encoder if model.decoder is None else model.decoder
    assert stack is not None
    if len(stack.layers) < mesh.pipeline:
        raise LaminaError(f"{len(stack.layers)} layers cannot be shared by pipeline = {mesh.pipeline}")
    pooled = {
        (part.losses, part.router.experts)
        for _, part in stack.walk()
        if isinstance(part, ExpertsSpec) and part.losses is not None and part.losses.pooled
    }
    if len(pooled) > 1:
        raise UnsupportedError("pipeline hands on one kind of pooled router losses, and layers of this model differ")


def _experts(mesh: MeshSpec, model: ModelSpec) -> None:
    if mesh.expert == 1:
        return
    layers = [(path, part) for path, part in model.walk() if isinstance(part, ExpertsSpec)]
    if not layers:
        raise LaminaError(f"expert is {mesh.expert}, and this model has no experts; use shard in its stead")
    for path, part in layers:
        if part.router.experts % mesh.expert:
            raise LaminaError(f"{path}: {part.router.experts} experts cannot be shared by expert = {mesh.expert}")


def _statistics(model: ModelSpec) -> None:
    """Refuse averages over a batch, which each rank would take over its own part of it."""
    for path, part in model.walk():
        if isinstance(part, BatchNormSpec):
            raise UnsupportedError(
                f"{path}: batch normalisation counts the tokens of a whole batch, and ranks read parts of it; use an"
                " RMSNormSpec, or no norm"
            )


def _segments(model: ModelSpec) -> None:
    """Refuse layers that run once a segment where ranks read different texts: they would not run equally often."""
    for path, part in model.walk():
        if isinstance(part, RecurrentMemorySpec):
            raise UnsupportedError(
                f"{path}: layers run once for each segment, and ranks whose texts have different numbers of them would"
                " wait for each other for ever; use tensor alone"
            )


def _shared(path: str, part: Any, ranks: int) -> None:
    """Refuse heads and features that `ranks` cannot have in equal parts."""
    where = f"{path}: " if path else ""
    if isinstance(part, ProductKeySpec):  # whole on every rank
        return
    if isinstance(part, CompressiveSpec) and part.by == "most-used":
        raise UnsupportedError(
            f"{where}what was used most is counted over all heads, and tensor = {ranks} shares them out; by='mean' can"
        )
    heads, key_heads = (getattr(part, name, None) for name in ("heads", "key_heads"))
    if isinstance(heads, int) and heads % ranks:
        raise LaminaError(f"{where}{heads} heads cannot be shared by tensor = {ranks}")
    if isinstance(key_heads, int) and key_heads % ranks and ranks % key_heads:
        raise LaminaError(f"{where}{key_heads} key heads cannot be shared, nor copied, by tensor = {ranks}")
    if isinstance(part, FeedForwardSpec) and part.hidden % ranks:
        raise LaminaError(f"{where}{part.hidden} hidden features cannot be shared by tensor = {ranks}")


def _contexts(model: ModelSpec) -> None:
    """Refuse what looks at all of a text, other than attention, whose keys are gathered."""
    if model.pooler is not None or (model.two_stacks and model.labels is not None):
        raise UnsupportedError("context above 1 cuts each text, and a pooled head reads one token of the whole")
    for path, part in model.walk():
        if isinstance(part, LongformerSpec | ExpertChoiceSpec | CapacitySpec | ChunkedCrossAttentionSpec):
            what = type(part).__name__.removesuffix("Spec")
            raise UnsupportedError(f"{path}: {what} counts or reads the tokens of a whole text, and context cuts it")
        if isinstance(part, RotarySpec) and part.limit:
            raise UnsupportedError(f"{path}: its phases depend on the length of a text, and context cuts it")
