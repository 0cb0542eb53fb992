"""Attaching a LoRA to a model, merging it into the weights, and taking it off again (arXiv:2106.09685, section 4)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lamina.adapters.places import FACTORS, Place, chosen
from lamina.adapters.spec import LoRASpec
from lamina.errors import LaminaError, UnsupportedError
from lamina.layers.lowrank import LowRank, merged
from lamina.model import Model


@dataclass
class Attached:
    """What is known of the adapter of a model, as `model.adapter`."""

    spec: LoRASpec
    thawed: frozenset[str] = field(default_factory=frozenset)  # what was trained before the adapter came
    file: Any = None  # what it was read from, as `lamina.adapters.peft` keeps it


def attach(model: Model, spec: LoRASpec, seed: int = 0, table: Iterable[Place] = ()) -> list[tuple[str, nn.Parameter]]:
    """Put a change of low rank beside each layer that `spec.targets` names, freeze everything else, and return what is
    trained: (name, parameter), such as decoder.layers.0.attention.op.q.lora_a.

    The model computes what it did: B begins at 0, and A uniformly within 1 / sqrt(in), as in the authors' code. `table`
    (from `places`) allows the checkpoint's names in targets. Raises LaminaError for targets of nothing and where an
    adapter is attached already; UnsupportedError for a compiled or 8-bit model.
    """
    refuse(model)
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for name, layer in chosen(model, spec.targets, table).items():
        dtype = torch.promote_types(layer.weight.dtype, torch.float32)
        made = {"dtype": dtype, "device": layer.weight.device}
        first = torch.empty(spec.rank, layer.in_features, **made)
        if not first.is_meta:
            bound = 1 / math.sqrt(layer.in_features)
            values = torch.empty(first.shape).uniform_(-bound, bound, generator=generator)  # the same on every device
            first.copy_(values)
        factors[name] = (first, torch.zeros(layer.out_features, spec.rank, **made), spec.scale)
    return wrap(model, Attached(spec), factors)


def refuse(model: Model) -> None:
    """Raise where `model` cannot take an adapter."""
    if model.adapter is not None:
        raise LaminaError("an adapter is attached already: merge it or detach it first")
    if model.engine is not None:
        raise UnsupportedError("a compiled or 8-bit model takes no adapter: give load(..., adapter=) before it is one")


def wrap(
    model: Model, attached: Attached, factors: Mapping[str, tuple[Tensor, Tensor, float]]
) -> list[tuple[str, nn.Parameter]]:
    """Freeze the model, and put A, B and the scale beside each layer that `factors` names."""
    attached.thawed = frozenset(name for name, weight in model.named_parameters() if weight.requires_grad)
    model.requires_grad_(False)
    for name, (first, second, scale) in factors.items():
        layer = model.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        _put(model, name, LowRank(layer, first, second, scale, attached.spec.dropout))
    model.adapter = attached
    return [(name, weight) for name, weight in model.named_parameters() if name.rpartition(".")[2] in FACTORS]


def adapted(model: nn.Module) -> dict[str, LowRank]:
    """The layers that an adapter changes, by path."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LowRank)}


def detach(model: Model) -> None:
    """Take the adapter off: every weight is, bit for bit, what it was. Raises LaminaError where there is none."""
    for name, layer in _layers(model).items():
        _put(model, name, layer.detached())
    _thaw(model)


def merge(model: Model) -> None:
    """Fold the adapter into the weights, W + s B A in float32 and rounded once to the dtype of W.

    Raises LaminaError where there is none.
    """
    for name, layer in _layers(model).items():
        weight = merged(layer.weight, layer.lora_a, layer.lora_b, layer.scale)
        base = layer.detached()
        base.weight = nn.Parameter(weight, requires_grad=False)
        _put(model, name, base)
    _thaw(model)


def merged_tensors(model: Model, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights that merging would give, by their names in the model without the adapter, which stays as it is.

    values: what stands for the model's own parameters of these names, such as their moving average.
    """
    tensors = {name: values.get(name, tensor) for name, tensor in model.state_dict().items()}
    for name, layer in _layers(model).items():
        first, second = (tensors.pop(f"{name}.{factor}") for factor in FACTORS)
        tensors[f"{name}.weight"] = merged(tensors[f"{name}.weight"], first, second, layer.scale)
    return tensors


def _layers(model: Model) -> dict[str, LowRank]:
    if model.adapter is None:
        raise LaminaError("no adapter is attached")
    return adapted(model)


def _put(model: Model, name: str, layer: nn.Module) -> None:
    path, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(path), leaf, layer)


def _thaw(model: Model) -> None:
    for name, weight in model.named_parameters():
        weight.requires_grad_(name in model.adapter.thawed)
    model.adapter = None
