"""The model of a spec and a state, where the spec may ask for weights that the state has not: those of new layers."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lamina.errors import LaminaError
from lamina.model import Model, ModelSpec


def build(spec: ModelSpec, state: Mapping[str, Tensor], *, seed: int = 0) -> tuple[Model, list[str]]:
    """The model, in evaluation mode, and the names of the weights that begin as `spec.initial` says, from `seed`.

    The tensors of `state` are its weights themselves, and not copies. Raises LaminaError for a tensor that the spec has
    no place for, or that has another shape.
    """
    model = spec.build(device="meta")
    wanted = dict(model.named_parameters())
    for name, tensor in state.items():
        if name not in wanted:
            raise LaminaError(f"the state has {name!r}, and the spec no such parameter")
        if tensor.shape != wanted[name].shape:
            raise LaminaError(f"{name} is {tuple(tensor.shape)}; the spec asks for {tuple(wanted[name].shape)}")
    new = [name for name in wanted if name not in state]
    like = next(iter(state.values()), torch.empty(0))
    fresh = spec.build(device=like.device, dtype=like.dtype, seed=seed).state_dict() if new else {}
    model.load_state_dict({**{name: fresh[name] for name in new}, **state}, assign=True)
    return model.eval(), new
