"""Which linear layers an adapter can change, under our names and under those of the checkpoint's layout."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

from lamina.errors import LaminaError
from lamina.model import Model
from lamina.specs import unknown
from lamina.weights import rules
from lamina.weights.rules import Fused, Rule, Same

FACTORS = ("lora_a", "lora_b")
"""The last parts of the names of an adapter's parameters."""


@dataclass(frozen=True)
class Place:
    """A matrix of the checkpoint's layout, and our linear layers that it holds: one, or q, k and v in turn."""

    theirs: str  # model.layers.0.self_attn.q_proj
    ours: tuple[str, ...]  # decoder.layers.0.attention.op.q
    outputs: Same | Fused  # how they lie along the output
    turned: bool  # the file's matrix is [in, out]


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers that an adapter can change, by path: all but those whose matrix a layer also reads whole."""
    found = {}
    for name, module in model.named_modules():
        whole = getattr(module, "READ_WHOLE", ())
        for child, layer in module.named_children():
            if isinstance(layer, nn.Linear) and child not in whole:
                found[f"{name}.{child}" if name else child] = layer
    return found


def places(model: Model, table: Iterable[Rule]) -> tuple[Place, ...]:
    """What `table`, the weight rules of the model's layout, calls each of its linear layers."""
    shapes = {
        name: tuple(weight.shape) for name, weight in model.named_parameters() if name.rpartition(".")[2] not in FACTORS
    }
    layers, found = linears(model), []
    for move in rules.bind(table, shapes):
        ours = tuple(name.removesuffix(".weight") for name in move.ours)
        outputs = rules.outputs(move.op)
        if len(move.theirs) == 1 and outputs is not None and all(name in layers for name in ours):
            turned = move.op != outputs
            found.append(Place(move.theirs[0].removesuffix(".weight"), ours, outputs, turned))
    return tuple(found)


def chosen(model: Model, targets: tuple[str, ...] | None, table: Iterable[Place]) -> dict[str, nn.Linear]:
    """The layers that `targets` name, in the order of the model; for None all that are inside an attention.

    A target is a path or the beginning of one, its last part ("q"), or a pattern with * and ?, in our names or, by
    `table`, in those of the checkpoint ("q_proj", "c_attn"). Raises LaminaError for one that names nothing.
    """
    layers = linears(model)
    if targets is None:
        inside = [f"{name}." for name, module in model.named_modules() if hasattr(module, "retained")]
        picked = {name for name in layers if name.startswith(tuple(inside))}
        if not picked:
            raise LaminaError("this model has no attention with linear layers: name the targets of the adapter")
        return {name: layer for name, layer in layers.items() if name in picked}
    names = {name: (name,) for name in layers} | {place.theirs: place.ours for place in table}
    picked = set()
    for target in targets:
        hits = [ours for name, ours in names.items() if _names(target, name)]
        if not hits:
            ends = dict.fromkeys(name.rpartition(".")[2] for name in names)
            raise LaminaError(unknown("target of an adapter", target, [*ends, *names]))
        picked.update(name for ours in hits for name in ours)
    return {name: layer for name, layer in layers.items() if name in picked}


def _names(target: str, name: str) -> bool:
    return f".{name}.".endswith(f".{target}.") or name.startswith(f"{target}.") or fnmatchcase(name, target)
