"""Fewer layers, more, or another order: depth up-scaling (SOLAR, arXiv:2312.15166, section 2) and new layers that add
nothing at first (LLaMA-Pro, arXiv:2401.02415, section 3.2)."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lamina.errors import LaminaError, UnsupportedError
from lamina.layers import ChunkedCrossAttentionSpec, LayerSpec, StackSpec
from lamina.model import ModelSpec
from lamina.surgery.operation import Changed, Operation, Promise
from lamina.surgery.places import StackName, stack_of
from lamina.surgery.stream import writers
from lamina.surgery.weights import Made, Weights, moved

RANGE = re.compile(r"(\d+)-(\d+)")


@dataclass(frozen=True, kw_only=True)
class OrderLayers(Operation):
    """The layers of a stack that `order` names, in that order: some may be left out, and some stand there repeatedly.

    An entry is the number of a layer, from 0, or a range with both ends: ["0-23", "8-31"] is SOLAR's up-scaling of 32
    layers to 48. Where a layer is repeated, each has weights of its own.
    """

    NAME = "layers"

    order: tuple[int | str, ...]
    stack: StackName | None = None  # None: the only one

    def change(self, spec: ModelSpec, weights: Mapping[str, Tensor]) -> Changed:
        path, stack = stack_of(spec, self.stack)
        count, order = len(stack.layers), _numbers("order", self.order, len(stack.layers))
        rows = [_Row(number, stack.layers[number], number in order[:at]) for at, number in enumerate(order)]
        new, state = _arranged(spec, weights, path, stack, rows)
        left, copies = count - len(set(order)), len(order) - len(set(order))
        if order == list(range(count)):
            promise = Promise("exact", "the layers as they were", bits=True)
        elif left or copies:
            said = (f"{left} of {count} layers go" if left else "", f"{copies} are copies" if copies else "")
            promise = Promise("lossy", ", ".join(one for one in said if one))
        else:
            promise = Promise("lossy", "the layers stand in another order")
        undo = None if left else (OrderLayers(order=tuple(map(order.index, range(count))), stack=self.stack),)
        return Changed(new, state, promise, undo)


@dataclass(frozen=True, kw_only=True)
class NewLayers(Operation):
    """Directly after each layer of `after` a copy of it that adds nothing to the residual stream at first.

    "zero": what its steps write with is zero, the output projections and their biases (LLaMA-Pro). "gate": each of its
    steps has a gate that is zero (arXiv:2204.14198, section 2.2), which training opens. After post-norm layers (BERT) a
    new one has no norms after its steps: a norm of what has been normed with a weight is another vector.
    """

    NAME = "new_layers"

    after: tuple[int | str, ...]
    begin: Literal["zero", "gate"] = "zero"
    stack: StackName | None = None  # None: the only one

    def change(self, spec: ModelSpec, weights: Mapping[str, Tensor]) -> Changed:
        path, stack = stack_of(spec, self.stack)
        after = _numbers("after", self.after, len(stack.layers))
        if len(set(after)) < len(after):
            raise LaminaError(f"after={list(self.after)} names a layer twice; one new layer follows each")
        rows: list[_Row] = []
        for number, layer in enumerate(stack.layers):
            rows.append(_Row(number, layer, False))
            if number in after:
                rows.append(self._new(f"{path}.layers.{number}", number, layer, spec.width))
        new, state = _arranged(spec, weights, path, stack, rows)
        kept = tuple(at for at, row in enumerate(rows) if not row.copy)
        promise = Promise("exact", "the new layers add nothing to what passes them", bits=True)
        return Changed(new, state, promise, (OrderLayers(order=kept, stack=self.stack),))

    def _new(self, path: str, number: int, layer: LayerSpec, width: int) -> _Row:
        zeros: list[str] = []
        for step in layer.steps:
            where = f"{path}.{step.name}"
            if step.residual != 1.0:
                raise UnsupportedError(
                    f"{where} multiplies what passes by {step.residual}: a layer there changes the stream even if it"
                    " adds nothing"
                )
            zeros.append(f"{step.name}.gate")
            found = writers(step.op, width)
            if self.begin == "zero" and (step.post is not None or not found):
                why = "has a norm after its output" if found else "has no output projection"
                raise UnsupportedError(f"{where} {why}, which cannot begin at zero; use begin: gate")
            if self.begin == "zero":
                zeros += [f"{step.name}.op.{name}.{kind}" for name in found for kind in ("weight", "bias")]
        gated = {"gate": True} if self.begin == "gate" else {}
        layer = layer.replace(steps=tuple(step.replace(after=None, **gated) for step in layer.steps))
        return _Row(number, layer, True, frozenset(zeros))


@dataclass(frozen=True)
class _Row:
    """A layer of the new stack."""

    number: int  # of the old one whose weights it has
    layer: LayerSpec
    copy: bool  # the old one stands there too
    zeros: frozenset[str] = frozenset()  # weights that begin at zero instead


def _arranged(
    spec: ModelSpec, weights: Mapping[str, Tensor], path: str, stack: StackSpec, rows: Sequence[_Row]
) -> tuple[ModelSpec, Weights]:
    """The model with these layers, and its weights. What layers share stays one for as long as one of them is left."""
    layers = _one_encoder(stack, [row.layer for row in rows])
    new = spec.replace(**{path: stack.replace(layers=layers)})
    wanted = {name for name, _ in new.build(device="meta").named_parameters()}
    made: dict[str, Made] = {}
    for at, row in enumerate(rows):
        begin, made_of = f"{path}.layers.{at}.", f"{path}.layers.{row.number}."
        for old in [name for name in weights if name.startswith(made_of)]:
            rest = old.removeprefix(made_of)
            if rest in row.zeros:
                made[begin + rest] = Made((old,), "zeros", torch.zeros_like)
            elif row.copy:
                made[begin + rest] = Made((old,), f"copy of layer {row.number}", torch.clone)
            else:
                made[begin + rest] = moved(old)
    before, now = _encoder_at(path, stack.layers), _encoder_at(path, layers)
    if before is not None and now is not None:
        inside = [name for name in weights if name.startswith(before)]
        made |= {now + name.removeprefix(before): moved(name) for name in inside}
    made |= {name: moved(name) for name in weights if name.startswith(f"{path}.tables.")}
    made = {name: one for name, one in made.items() if name in wanted}
    stays = {name for name, one in made.items() if one == moved(name)}
    there = [name for name in weights if name.startswith((f"{path}.layers.", f"{path}.tables."))]
    made = {name: one for name, one in made.items() if name not in stays}
    return new, Weights(weights, made, [name for name in there if name not in stays])


def _one_encoder(stack: StackSpec, layers: Sequence[LayerSpec]) -> tuple[LayerSpec, ...]:
    """The layers with the encoder of neighbours in the first that reads them, whichever that is now."""
    found = [part for _, part in stack.walk() if isinstance(part, ChunkedCrossAttentionSpec)]
    encoder = found[0].encoder if found else None
    changed: list[LayerSpec] = []
    for layer in layers:
        steps = list(layer.steps)
        for at, step in enumerate(steps):
            if isinstance(step.op, ChunkedCrossAttentionSpec):
                steps[at] = step.replace(op=step.op.replace(encoder=encoder))
                encoder = None
        changed.append(layer.replace(steps=tuple(steps)))
    return tuple(changed)


def _encoder_at(path: str, layers: Sequence[LayerSpec]) -> str | None:
    """Where the weights of the encoder of neighbours are."""
    for number, layer in enumerate(layers):
        for step in layer.steps:
            if isinstance(step.op, ChunkedCrossAttentionSpec) and step.op.encoder is not None:
                return f"{path}.layers.{number}.{step.name}.op.encoder."
    return None


def _numbers(field: str, entries: Sequence[int | str], layers: int) -> list[int]:
    """Numbers and ranges as numbers. Raises LaminaError for one that no layer has, and for none at all."""
    found: list[int] = []
    for entry in entries:
        ends = RANGE.fullmatch(entry) if isinstance(entry, str) else None
        first, last = (entry, entry) if ends is None else (int(ends[1]), int(ends[2]))
        if isinstance(first, str) or isinstance(last, str) or not 0 <= first <= last < layers:
            raise LaminaError(f"{field} has {entry!r}; a layer from 0 to {layers - 1}, or a range such as '0-1', fits")
        found += range(first, last + 1)
    if not found:
        raise LaminaError(f"{field} is empty; it names layers, from 0 to {layers - 1}")
    return found
