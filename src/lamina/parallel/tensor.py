"""Tensor parallelism: the heads, hidden features and vocabulary of each layer shared out by what it declares
(Megatron-LM, arXiv:1909.08053, section 3).

A *region* is a module whose `SHARD` says how its parts are shared. Its input is the same on all ranks, each computes
with its part of the weights, and the sum of the results is again the same on all. Parameters that are shared out are
DTensors, so that FSDP, optimisers and checkpoints know what they are; while a region runs, its modules hold this rank's
part as a plain tensor, so layers compute as they do on one rank.

    "out"             rows: whole heads, or features              "in"   columns; the results are summed
    "keys"            as "out" for key heads; where there are fewer than ranks, several ranks have one
    "halves"          each half of the rows as "out" (differential attention); "key_halves" for key heads
    "heads"           the last dimension, or a list: one entry a head
    "vocabulary.in"   rows of a table that ids are looked up in   "vocabulary.out"   rows that give logits, gathered
    "experts.out"     matrices (experts, out, in) by out          "experts.in"       by in

A parameter of a region that no role names, and a part that is no block of rows ("halves", copied key heads), lies
whole on every rank, and its gradient is summed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from lamina.errors import UnsupportedError
from lamina.layers import Call
from lamina.parallel.collectives import enter, gather, leave

View = Callable[[Tensor], Tensor]

ROWS = ("out", "keys", "halves", "key_halves", "experts.out")
COLUMNS = ("in", "experts.in")


@dataclass(frozen=True)
class Axis:
    """The ranks that share layers out."""

    mesh: DeviceMesh
    group: dist.ProcessGroup
    rank: int
    size: int

    def share(self, of: int) -> tuple[int, int]:
        """(i, n): this rank has the i-th of n equal parts of `of` heads; with fewer heads than ranks, i of all."""
        return (self.rank, self.size) if of % self.size == 0 else (self.rank * of // self.size, of)


@dataclass
class Region:
    """The forward of a module that is shared out."""

    module: nn.Module
    forward: Callable[..., Any]
    views: dict[tuple[nn.Module, str], View] = field(default_factory=dict)  # what this rank sees of each parameter

    def __call__(self, x: Any, *args: Any) -> Any:
        with self._local():
            return self.forward(x, *args)

    @contextmanager
    def _local(self) -> Iterator[None]:
        """While it runs, parameters are this rank's part."""
        kept = {place: place[0]._parameters[place[1]] for place in self.views}
        try:
            for (module, leaf), view in self.views.items():
                whole = kept[module, leaf]
                assert whole is not None
                module._parameters[leaf] = view(local(whole))  # pyright: ignore[reportArgumentType]
            yield
        finally:
            for (module, leaf), parameter in kept.items():
                module._parameters[leaf] = parameter


@dataclass
class Shared(Region):
    """A region of an axis. By itself it is for what has no vectors as input: biases of the scores."""

    axis: Axis = field(kw_only=True)


class Summed(Shared):
    """Attention, feed-forward networks: the sum of the ranks' results."""

    def __call__(self, x: Tensor, *args: Any) -> Tensor:
        group = self.axis.group
        entered = [
            replace(one, memory=enter(one.memory, group))
            if isinstance(one, Call) and isinstance(one.memory, Tensor)
            else one
            for one in args
        ]
        return leave(super().__call__(enter(x, group), *entered), group)


class Table(Shared):
    """An embedding: the rank that has an id gives its vector, the others zeros."""

    def __call__(self, x: Tensor, *args: Any) -> Tensor:
        parameter = self.module._parameters["weight"]
        assert parameter is not None
        total = parameter.shape[0]
        size = total // self.axis.size
        torch._assert_async(((x >= 0) & (x < total)).all())  # pyright: ignore[reportPrivateImportUsage]
        ids = x - self.axis.rank * size
        mine = (ids >= 0) & (ids < size)
        found = super().__call__(ids.clamp(0, size - 1), *args)
        return leave(found.masked_fill(~mine[..., None], 0.0), self.axis.group)


class Scores(Shared):
    """A head: each rank has the logits of its part of the vocabulary, and all get the whole."""

    def __call__(self, x: Tensor, *args: Any) -> Tensor:
        group = self.axis.group
        args = tuple(local(one) if isinstance(one, Tensor) else one for one in args)  # the table of a tied head
        return gather(super().__call__(enter(x, group), *args), -1, group, summed=False)


def local(x: Tensor) -> Tensor:
    """This rank's part of a parameter, as a plain tensor through which gradients flow."""
    return x.to_local() if isinstance(x, DTensor) else x


def share(model: nn.Module, axis: Axis, vocabulary: int) -> None:
    """Share every region out. A vocabulary that the ranks cannot have in equal parts stays whole on each."""
    inside: set[nn.Module] = set()
    for module in list(model.modules()):
        roles: dict[str, str] = getattr(module, "SHARD", {})
        if not roles or module in inside:
            continue
        if any(role.startswith("vocabulary") for role in roles.values()):
            if vocabulary % axis.size:
                continue
            kind = Table if "vocabulary.in" in roles.values() else Scores
        else:
            kind = Summed if any(role in COLUMNS for role in roles.values()) else Shared
        region = kind(module, module.forward, axis=axis)
        for part in module.modules():
            inside.add(part)
            for name, role in getattr(part, "SHARD", {}).items():
                _place(region, part, name, role)
        for part in module.modules():  # what no role names
            for leaf, parameter in part._parameters.items():
                if parameter is not None and (part, leaf) not in region.views:
                    region.views[part, leaf] = _whole(axis)
        module.forward = region


def _place(region: Shared, module: nn.Module, name: str, role: str) -> None:
    """Cut the part called `name`: a linear layer, a parameter, or a list."""
    axis, part = region.axis, getattr(module, name, None)
    spec: Any = getattr(region.module, "spec", None)
    if part is None:
        return
    if isinstance(part, list):
        size = len(part) // axis.size
        setattr(module, name, part[axis.rank * size : (axis.rank + 1) * size])
        return
    sides: dict[str, str] = getattr(part, "SIDES", {})
    if isinstance(part, nn.Module) and {leaf for leaf, _ in part.named_parameters()} - {"weight", "bias", *sides}:
        raise UnsupportedError(
            f"{getattr(region.module, 'path', '')}.{name} holds more than a weight and a bias, and tensor"
            " above 1 cannot share it out; use shard"
        )
    home, leaves = (part, ("weight", "bias", *sides)) if isinstance(part, nn.Module) else (module, (name,))
    share = axis.share(spec.key_heads if role in ("keys", "key_halves") else axis.size)
    for leaf in leaves:
        parameter = home._parameters.get(leaf)
        if parameter is None or sides.get(leaf) == ("out" if role in COLUMNS else "in"):
            continue  # the factor on the side that is not shared out lies whole
        if role in COLUMNS and leaf == "bias":
            region.views[home, leaf] = _once(axis)
        elif role in ("halves", "key_halves") or share[1] != axis.size:
            region.views[home, leaf] = _cut(axis, share, 2 if "halves" in role else 1)
        else:
            _shard(home, leaf, axis, _dim(role, leaf, parameter))
            region.views[home, leaf] = lambda x: x
    if role == "vocabulary.in":
        _localise_padding(module, axis)


def _dim(role: str, leaf: str, parameter: Tensor) -> int:
    """The dimension that a role cuts."""
    if role.startswith("experts"):
        return parameter.dim() - 1 if role == "experts.in" or leaf == "bias" else 1
    return {"in": 1, "heads": parameter.dim() - 1}.get(role, 0)


def _shard(module: nn.Module, leaf: str, axis: Axis, dim: int) -> None:
    """Make a parameter this rank's part of it, as a DTensor; one whose experts are shared out already is cut again."""
    parameter: Any = module._parameters[leaf]
    assert parameter.shape[dim] % axis.size == 0
    if isinstance(parameter, DTensor):
        mesh = parameter.device_mesh
        placements = [*parameter.placements[:-1], Shard(dim)]
        part = parameter.to_local().chunk(axis.size, dim)[axis.rank].clone()
        made = DTensor.from_local(
            part, mesh, placements, run_check=False, shape=parameter.shape, stride=parameter.stride()
        )
    else:
        made = distribute_tensor(parameter.detach(), axis.mesh, [Shard(dim)], src_data_rank=None)
    module._parameters[leaf] = nn.Parameter(made, requires_grad=parameter.requires_grad)


def _whole(axis: Axis) -> View:
    return lambda x: enter(x, axis.group)


def _once(axis: Axis) -> View:
    """A bias is added by the first rank alone, since the results are summed."""
    return lambda x: enter(x, axis.group) * float(axis.rank == 0)


def _cut(axis: Axis, share: tuple[int, int], halves: int) -> View:
    """Part i of n of the rows, or of each half of them."""
    i, n = share

    def view(x: Tensor) -> Tensor:
        return enter(x, axis.group).unflatten(0, (halves, n, -1))[:, i].flatten(0, 1)

    return view


def _localise_padding(module: nn.Module, axis: Axis) -> None:
    """The spec of an embedding as that of this rank's rows: its padding has another number here, or is elsewhere."""
    spec: Any = module.spec
    size = spec.vocabulary // axis.size
    first = axis.rank * size
    here = spec.padding is not None and first <= spec.padding < first + size
    module.spec = spec.replace(vocabulary=size, padding=spec.padding - first if here else None)
