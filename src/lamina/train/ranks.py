"""What a loop asks of the other ranks. Alone, it asks nobody."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from lamina.model import Model
from lamina.objectives import Batch

if TYPE_CHECKING:
    from lamina.parallel import Mesh


class Ranks(Protocol):
    """The ranks of a run, as the loop sees them. `data` of `data_ranks` reads its own examples."""

    world: int
    first: bool  # whether this one writes what there is one of: files, lines on the screen
    data: int
    data_ranks: int
    stream: int  # which random numbers it draws
    asks: bool  # whether it has the head, and so the losses; on a pipeline the last stage alone does
    whole: bool  # whether a forward is its own business; on a pipeline all take part in each

    def sum(self, values: list[float]) -> list[float]:
        """Of each value, over the ranks that count different tokens."""
        ...

    def norm(self, parameters: Iterable[nn.Parameter]) -> Tensor:
        """The norm of the gradient of the whole model."""
        ...

    def batch(self, batch: Batch) -> Batch:
        """What this rank is asked of a batch that it reads."""
        ...

    def through(self, micros: Sequence[Batch], work: Callable[[int], Tensor | None]) -> None:
        """Run `work`, a forward, on the number of each micro-batch, and the backward of what it returns; gradients of
        all ranks are added up in the last one."""
        ...

    def agreed(self, figures: Any) -> Any:
        """What JSON can say of the losses, as those ranks found it that have them."""
        ...

    def write(self, tensors: Mapping[str, Tensor], write: Callable[[Mapping[str, Tensor]], None]) -> None:
        """Run `write` where `first` is true, with whole tensors, each put together when it is asked for."""
        ...

    def parts(self, tensors: Mapping[str, Tensor], save: Callable[[Callable[[Path], None]], None]) -> None:
        """Run `save` where `first` is true, with what has every rank write its part of the tensors into a folder."""
        ...

    def read_parts(self, folder: Path, tensors: Mapping[str, Tensor]) -> None:
        """Fill tensors from such a folder, whoever wrote it."""
        ...

    def put(self, place: Tensor, whole: Tensor) -> None:
        """Copy this rank's part of a tensor."""
        ...

    def settle(self) -> None:
        """Before weights are changed by hand: let go of what a forward has gathered of them."""
        ...


class Alone:
    """One process."""

    world, first, data, data_ranks, stream, asks, whole = 1, True, 0, 1, 0, True, True

    def sum(self, values: list[float]) -> list[float]:
        return values

    def norm(self, parameters: Iterable[nn.Parameter]) -> Tensor:
        found = local(parameter.grad for parameter in parameters if parameter.grad is not None)
        return torch.nn.utils.get_total_norm(found) if found else torch.zeros(())

    def batch(self, batch: Batch) -> Batch:
        return batch

    def through(self, micros: Sequence[Batch], work: Callable[[int], Tensor | None]) -> None:
        for number in range(len(micros)):
            _backward(work(number))

    def agreed(self, figures: Any) -> Any:
        return figures

    def write(self, tensors: Mapping[str, Tensor], write: Callable[[Mapping[str, Tensor]], None]) -> None:
        write(tensors)

    def parts(self, tensors: Mapping[str, Tensor], save: Callable[[Callable[[Path], None]], None]) -> None:
        from lamina.parallel.checkpoint import write_tensors

        save(lambda folder: write_tensors(folder, tensors, None))

    def read_parts(self, folder: Path, tensors: Mapping[str, Tensor]) -> None:
        from lamina.parallel.checkpoint import read_tensors

        read_tensors(folder, tensors, None)

    def put(self, place: Tensor, whole: Tensor) -> None:
        place.copy_(whole)

    def settle(self) -> None:
        pass


class Together:
    """The ranks of a mesh, over which the model lies."""

    def __init__(self, mesh: Mesh, model: Model) -> None:
        self.mesh, self.model = mesh, model
        self.world, self.first = mesh.spec.ranks, mesh.first
        self.data, self.data_ranks, self.stream = mesh.reader, mesh.readers, mesh.stream
        self.asks = mesh.stage == mesh.spec.pipeline - 1
        self.whole = mesh.spec.pipeline == 1

    def sum(self, values: list[float]) -> list[float]:
        return self.mesh.total(torch.tensor(values, dtype=torch.float64)).tolist()

    def norm(self, parameters: Iterable[nn.Parameter]) -> Tensor:
        from lamina.parallel import gradient_norm

        return gradient_norm(self.model)

    def batch(self, batch: Batch) -> Batch:
        return replace(batch, labels={kind: self.mesh.labels(one) for kind, one in batch.labels.items()})

    def through(self, micros: Sequence[Batch], work: Callable[[int], Tensor | None]) -> None:
        from lamina.parallel import synchronise, through

        if not self.whole:
            shapes = [(len(ids), ids.shape[1]) for ids in (batch.inputs["input_ids"] for batch in micros)]
            through(self.model, shapes, work, lambda last: synchronise(self.model, last))
            return
        for number in range(len(micros)):
            synchronise(self.model, number == len(micros) - 1)
            _backward(work(number))

    def agreed(self, figures: Any) -> Any:
        return figures if self.whole else json.loads(self.mesh.said(json.dumps(figures), self.mesh.spec.pipeline - 1))

    def write(self, tensors: Mapping[str, Tensor], write: Callable[[Mapping[str, Tensor]], None]) -> None:
        self.settle()
        tensors = tensors if self.whole else self.mesh.listed(tensors)
        self.mesh.together(
            tensors, lambda name: self.mesh.whole(tensors[name]).cpu(), lambda read: write(_Whole(tensors, read))
        )

    def parts(self, tensors: Mapping[str, Tensor], save: Callable[[Callable[[Path], None]], None]) -> None:
        from lamina.parallel.checkpoint import write_tensors

        place = [""]

        def into(name: str) -> Tensor:  # on all ranks, once the first asks for it
            write_tensors(Path(self.mesh.said(place[0])), tensors, self.mesh)
            return torch.empty(0)

        def write(ask: Callable[[str], Tensor]) -> None:
            def told(folder: Path) -> None:
                place[0] = str(folder)
                ask("parts")

            save(told)

        self.settle()
        self.mesh.together(["parts"], into, write)

    def read_parts(self, folder: Path, tensors: Mapping[str, Tensor]) -> None:
        from lamina.parallel.checkpoint import read_tensors

        read_tensors(folder, tensors, self.mesh)

    def put(self, place: Tensor, whole: Tensor) -> None:
        from lamina.parallel.state import put

        put(place, whole)

    def settle(self) -> None:
        self.mesh.reshard(self.model)


class _Whole(dict[str, Tensor]):
    """Tensors whose shapes are known and whose values are put together when they are asked for."""

    def __init__(self, tensors: Mapping[str, Tensor], read: Callable[[str], Tensor]) -> None:
        super().__init__(tensors)
        self.read = read

    def __getitem__(self, name: str) -> Tensor:
        return self.read(name)


def _backward(loss: Tensor | None) -> None:
    if loss is not None and loss.requires_grad:
        loss.backward()


def local(tensors: Iterable[Tensor]) -> list[Tensor]:
    """The parts of tensors that lie here; of sparse ones the rows that they have."""
    return [_local(tensor) for tensor in tensors]


def _local(tensor: Tensor) -> Tensor:
    if tensor.is_sparse:
        return tensor.coalesce().values()
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor  # pyright: ignore
