"""The whole of a model that lies on several ranks: gathered to rank 0, sent out from it, and its gradients' norm."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from lamina.errors import LaminaError
from lamina.model import Model
from lamina.parallel.mesh import Mesh, RankError


def full_state(model: Model) -> dict[str, Tensor]:
    """Every parameter by name, whole and on the CPU, on rank 0; nothing on the others. One is gathered at a time, and
    all ranks must call it."""
    mesh: Mesh = model.mesh
    mesh.reshard(model)
    state = {}
    for name, parameter in model.named_parameters():
        whole = mesh.whole(parameter.detach())
        if mesh.first:
            state[name] = whole.cpu()
    return state


def load_full_state(model: Model, state: Mapping[str, Tensor] | None) -> None:
    """Fill the model with what rank 0 has; the others give None. A rank holds one whole tensor at a time.

    Raises LaminaError on rank 0, before anything is changed, for names, shapes and dtypes that are not those of the
    model; RankError on the others.
    """
    mesh: Mesh = model.mesh
    wanted = dict(model.named_parameters())
    agree(mesh, lambda: _check(state, wanted))
    _fill(model, lambda name: None if state is None else state[name])


def materialise(model: Model, seed: int = 0) -> None:
    """Give a model that was built on "meta" storage for its part, initialised as `ModelSpec.build` does from `seed`.

    Rank 0 builds the whole once and sends it out tensor by tensor; the others never have more than one.
    """
    mesh: Mesh = model.mesh
    model.to_empty(device=mesh.device)
    source = None
    if mesh.first:
        source = model.spec.build(seed=seed, dtype=next(model.parameters()).dtype).state_dict()
    load_full_state(model, source)


def gradient_norm(model: Model) -> Tensor:
    """The 2-norm of all gradients, a scalar that is the same on every rank."""
    mesh: Mesh = model.mesh
    total = torch.zeros((), dtype=torch.float64, device=mesh.device)
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        if gradient is not None:
            mine = gradient.to_local() if isinstance(gradient, DTensor) else gradient
            stages = 1 if model.stage is None else model.stage.holders(name)
            copies = mesh.spec.ranks // mesh.spec.pipeline * stages // _parts(gradient)
            total += mine.double().square().sum() / copies
    dist.all_reduce(total)
    return total.sqrt()


@torch.no_grad()
def clip_gradients(model: Model, limit: float) -> Tensor:
    """Scale all gradients so that their norm is at most `limit`; the norm before. As torch's clip_grad_norm_, which
    cannot add up tensors of different meshes."""
    norm = gradient_norm(model)
    factor = (limit / (norm + 1e-6)).clamp(max=1.0)
    for parameter in model.parameters():
        if parameter.grad is not None:
            grad = parameter.grad
            mine = grad.to_local() if isinstance(grad, DTensor) else grad
            mine.mul_(factor.to(mine.dtype))
    return norm


def _parts(tensor: Tensor) -> int:
    """Into how many parts a tensor is divided; every other rank has a copy."""
    if not isinstance(tensor, DTensor):
        return 1
    parts = 1
    for axis, placement in enumerate(tensor.placements):
        parts *= 1 if placement.is_replicate() else tensor.device_mesh.size(axis)
    return parts


def agree(mesh: Mesh, check: Callable[[], None]) -> None:
    """Rank 0 looks, and all stop where it finds something wrong."""
    error = None
    if mesh.first:
        try:
            check()
        except LaminaError as found:
            error = found
    said = torch.tensor([int(error is not None)])
    dist.broadcast(said, 0, group=mesh.control)
    if error is not None:
        raise error
    if int(said):
        raise RankError("rank 0 refuses what it was given, and says why")


def _check(state: Mapping[str, Tensor] | None, wanted: Mapping[str, Tensor]) -> None:
    if state is None:
        raise LaminaError("rank 0 needs the state of the model; it was given None")
    for name, parameter in wanted.items():
        if name not in state:
            raise LaminaError(f"the state lacks {name}")
        found, needed = (f"{one.dtype} {list(one.shape)}" for one in (state[name], parameter))
        if found != needed:
            raise LaminaError(f"{name} is {found} in the state; the model needs {needed}")
    if more := [name for name in state if name not in wanted]:
        raise LaminaError(f"the state has {more[0]}, and the model has none of that name")


@torch.no_grad()
def _fill(model: Model, get: Callable[[str], Tensor | None]) -> None:
    mesh: Mesh = model.mesh
    mesh.reshard(model)
    for name, parameter in model.named_parameters():
        given = get(name)
        if given is None:
            whole = torch.empty(parameter.shape, dtype=parameter.dtype, device=mesh.device)
        else:
            whole = given.detach().to(mesh.device, copy=True).contiguous()
        dist.broadcast(whole, 0)
        put(parameter, whole)


def put(parameter: Tensor, whole: Tensor) -> None:
    """Copy this rank's part of `whole` into a parameter."""
    if not isinstance(parameter, DTensor):
        parameter.copy_(whole)
        return
    shape, offset = compute_local_shape_and_global_offset(whole.shape, parameter.device_mesh, parameter.placements)
    part = whole
    for dim, (size, start) in enumerate(zip(shape, offset, strict=True)):
        part = part.narrow(dim, min(start, part.shape[dim]), size)
    parameter.to_local().copy_(part)
