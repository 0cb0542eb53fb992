"""The model of a spec and its weights, where the spec may ask for some that are not there: those of new layers."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lamina.errors import LaminaError
from lamina.layers import Draw
from lamina.model import Model, ModelSpec, initialise


def build(spec: ModelSpec, state: Mapping[str, Tensor], *, seed: int = 0) -> tuple[Model, list[str]]:
    """The model, in evaluation mode, and the names of the weights that begin as `spec.initial` says, from `seed`.

    The tensors of `state` are its weights themselves, and not copies. Raises LaminaError for a tensor that the spec has
    no place for, or that has another shape.
    """
    model = spec.build(device="meta")
    wanted = dict(model.named_parameters())
    held: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name not in wanted:
            raise LaminaError(f"the state has {name!r}, and the spec no such parameter")
        if tensor.shape != wanted[name].shape:
            raise LaminaError(f"{name} is {tuple(tensor.shape)}; the spec asks for {tuple(wanted[name].shape)}")
        held[name] = tensor
    new = [name for name in wanted if name not in held]
    like = next(iter(held.values()), torch.empty(0))
    model.load_state_dict({**begun(spec, new, seed=seed, dtype=like.dtype, device=like.device), **held}, assign=True)
    return model.eval(), new


def begun(
    spec: ModelSpec, names: list[str], *, seed: int, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> dict[str, Tensor]:
    """These weights of a model at their initial values, without making the others.

    They are drawn one module after the other in float32, and those of a module together.
    """
    if not names:
        return {}
    model, wanted = spec.build(device="meta"), set(names)
    fresh = {
        path: module
        for path, module in model.named_modules()
        if any(f"{path}.{name}".removeprefix(".") in wanted for name, _ in module.named_parameters(recurse=False))
    }
    for module in fresh.values():
        module.to_empty(device=device, recurse=False)
    draw = Draw(torch.Generator(device=device).manual_seed(seed), spec.initial, model)
    for module in fresh.values():
        initialise(module, draw)
    return {name: model.get_parameter(name).detach().to(dtype) for name in names}
