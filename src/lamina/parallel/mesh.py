"""The ranks of a run, where each stands, and what they do together outside a model's forward."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import distributed_c10d
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Shard

from lamina.errors import LaminaError
from lamina.model import ModelSpec
from lamina.parallel.axes import MeshSpec, plan
from lamina.parallel.context import Cut
from lamina.parallel.tensor import Axis

PLACES = ("pipeline", "replicate", "expert", "shard", "context", "tensor")
"""The axes of the mesh, from the outermost: ranks that differ in `tensor` alone are neighbours, and talk most."""


class RankError(RuntimeError):
    """A rank has died or hangs. It says which, where that is known."""


@dataclass(eq=False)
class Mesh:
    """This process's place in the mesh."""

    spec: MeshSpec
    device: torch.device
    places: DeviceMesh  # pipeline, replicate, expert, shard, context, tensor
    layers: DeviceMesh  # pipeline, replicate, layers, tensor: `layers` are the ranks among which FSDP shares layers out
    experts: DeviceMesh  # pipeline, replicate, expert, experts, tensor: `experts` are the ranks with the same experts
    readers_group: dist.ProcessGroup  # ranks that differ in anything but tensor and pipeline
    ends: dist.ProcessGroup  # the first and the last of the ranks that differ in pipeline alone
    control: dist.ProcessGroup  # all ranks, on the CPU: what is said beside the tensors
    timeout: float  # seconds after which a collective gives up
    run: int  # a number that these processes alone have: others may have met at the same place before
    barriers: int = 0  # that this rank has come to
    signed: str | None = None  # where it signed at the last one

    @property
    def rank(self) -> int:
        """The number of this process."""
        return dist.get_rank()

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which writes what is written once."""
        return self.rank == 0

    @property
    def readers(self) -> int:
        """Into how many parts a batch is divided: replicate x expert x shard."""
        return self.spec.replicate * self.spec.expert * self.spec.shard

    @property
    def reader(self) -> int:
        """Which of these parts this rank reads. Ranks on pipeline, context and tensor read the same."""
        place = {name: self.places.get_local_rank(name) for name in ("replicate", "expert", "shard")}
        return (place["replicate"] * self.spec.expert + place["expert"]) * self.spec.shard + place["shard"]

    @property
    def stream(self) -> int:
        """Which random numbers this rank draws: ranks on tensor have to drop the same places, all others have other
        tokens, or layers. (The heads of two ranks on tensor then drop alike in their attentions.)"""
        return (self.stage * self.readers + self.reader) * self.spec.context + self.cut.rank

    @property
    def stage(self) -> int:
        """Which run of the layers is this rank's."""
        return self.places.get_local_rank("pipeline")

    @property
    def cut(self) -> Cut:
        """Which tokens of a text are this rank's."""
        return Cut(self.places.get_local_rank("context"), self.spec.context)

    @property
    def tensor(self) -> Axis:
        """The ranks that share layers out."""
        axis = self.layers["tensor"]
        return Axis(axis, axis.get_group(), axis.get_local_rank(), axis.size())

    def labels(self, labels: Tensor, ignore: int = -100) -> Tensor:
        """(B, T, ...) labels, or anything else of each token -> those of the tokens whose logits this rank gets.

        With context = 1 they are the same; else (B, L, ...), filled up with `ignore`.
        """
        return labels if self.spec.context == 1 else self.cut.mine(labels, ignore)

    def total(self, value: Tensor) -> Tensor:
        """The sum over all tokens of the global batch of what each rank has counted for its own: losses, labels that
        count, loads of experts. Ranks on tensor and pipeline, which count the same, count once."""
        out = value.detach().to(self.device, copy=True)
        dist.all_reduce(out, group=self.readers_group)
        return out

    def barrier(self, name: str, timeout: float | None = None) -> None:
        """Wait until all ranks come here. Raises RankError, on every rank that has come, naming those that do not
        within `timeout` seconds."""
        seconds = self.timeout if timeout is None else timeout
        store = distributed_c10d._get_default_store()
        self.barriers += 1
        keys = [f"lamina/{self.run}/{self.barriers}/{rank}" for rank in range(self.spec.ranks)]
        try:
            # A barrier breaks at the first closed connection and does not know whose it was, so ranks sign a list.
            store.set(keys[self.rank], "here")
            dist.monitored_barrier(self.control, timedelta(seconds=seconds), wait_all_ranks=self.first)
        except (dist.DistStoreError, dist.DistNetworkError) as error:
            raise RankError(f"{name}: the process where ranks meet cannot be reached: {_line(error)}") from error
        except RuntimeError as error:
            raise RankError(f"{name}: {self._missing(store, keys, seconds, error)}") from error
        if self.signed is not None:
            store.delete_key(self.signed)  # all have left that one
        self.signed = keys[self.rank]

    def _missing(self, store: Any, keys: list[str], seconds: float, error: RuntimeError) -> str:
        """Who has not signed, `seconds` later."""
        until = time.monotonic() + seconds
        while not store.check(keys) and time.monotonic() < until:
            time.sleep(0.05)
        missing = [rank for rank, key in enumerate(keys) if not store.check([key])]
        if not missing:
            return f"all ranks are there, and their connection broke ({_line(error)})"
        ranks = f"rank{'s' * (len(missing) > 1)} {', '.join(map(str, missing))}"
        return f"{ranks} did not come within {seconds:g} seconds: died, or hangs"

    @contextmanager
    def watched(self, name: str, patience: float = 10.0) -> Iterator[None]:
        """Say which rank is missing where a collective inside fails or runs out of time."""
        try:
            yield
        except (dist.DistError, RuntimeError) as error:
            if isinstance(error, RankError) or not _of_ranks(error):
                raise
            try:
                self.barrier(name, patience)
            except RankError as named:
                raise named from error
            raise

    def whole(self, tensor: Tensor) -> Tensor:
        """A parameter from the parts that all ranks have. All ranks must ask for it."""
        if self.spec.pipeline == 1:
            return self._whole(tensor)
        owner = torch.tensor(self.spec.pipeline if tensor.is_meta else self.stage, device=self.device)
        column = self.places["pipeline"].get_group()
        dist.all_reduce(owner, dist.ReduceOp.MIN, group=column)
        if int(owner) == self.stage:
            whole = self._whole(tensor).to(self.device).contiguous()
        else:
            whole = torch.empty(tensor.shape, dtype=tensor.dtype, device=self.device)
        dist.broadcast(whole, group=column, group_src=int(owner))
        return whole

    def said(self, text: str, stage: int | None = None) -> str:
        """What rank 0 says; or what that of a stage says, with which this one differs in pipeline alone."""
        group, device = self.control, torch.device("cpu")
        if stage is not None:
            group, device = self.places["pipeline"].get_group(), self.device
        data = torch.frombuffer(bytearray(text.encode() + b" "), dtype=torch.uint8).to(device)
        size = torch.tensor(len(data), device=device)
        dist.broadcast(size, group=group, group_src=stage or 0)
        if len(data) != int(size) or dist.get_rank(group) != (stage or 0):
            data = torch.empty(int(size), dtype=torch.uint8, device=device)
        dist.broadcast(data, group=group, group_src=stage or 0)
        return bytes(data.tolist()).decode()[:-1]

    def listed(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of all stages by name, in one order on all ranks; those of others without storage."""
        found: dict[str, Tensor] = {}
        for stage in range(self.spec.pipeline):
            own = {name: (str(one.dtype).removeprefix("torch."), list(one.shape)) for name, one in tensors.items()}
            for name, (dtype, shape) in json.loads(self.said(json.dumps(own), stage)).items():
                elsewhere = torch.empty(shape, dtype=getattr(torch, dtype), device="meta")
                found.setdefault(name, tensors.get(name, elsewhere))
        return found

    def _whole(self, tensor: Tensor) -> Tensor:
        """The same within a stage."""
        if not isinstance(tensor, DTensor):
            return tensor
        names, placements = tensor.device_mesh.mesh_dim_names or (), tensor.placements
        inner = [name for name in names if name in ("layers", "experts")]
        outer = [(name, place) for name, place in zip(names, placements, strict=True) if name in ("expert", "tensor")]
        if not inner or not outer:
            return tensor.full_tensor()
        # FSDP has cut again what the other axes had cut, so its axis is put together first.
        home, place = getattr(self, inner[0]), placements[names.index(inner[0])]
        shape = list(tensor.shape)
        for name, other in outer:
            if isinstance(other, Shard):
                shape[other.dim] //= home[name].size()
        part = _joined(tensor.to_local(), home[inner[0]], [Shard(place.dim)], shape)  # pyright: ignore
        axes, places = zip(*outer, strict=True)
        return _joined(part, home[axes], places, tensor.shape)

    def together(
        self, names: Iterable[str], read: Callable[[str], Tensor], write: Callable[[Callable[[str], Tensor]], None]
    ) -> None:
        """Rank 0 runs `write(read)`, and all others help it to read whatever it asks for next.

        Raises what `write` raises on rank 0, and RankError on the others.
        """
        names = list(names)
        number = {name: i for i, name in enumerate(names)}
        done, failed = -1, -2

        def ask(what: int) -> int:
            said = torch.tensor([what])
            dist.broadcast(said, 0, group=self.control)
            return int(said)

        def asked(name: str) -> Tensor:
            ask(number[name])
            return read(name)

        if self.first:
            end = failed
            try:
                write(asked)
                end = done
            finally:
                ask(end)
            return
        while (what := ask(0)) >= 0:
            read(names[what])
        if what == failed:
            raise RankError("rank 0 could not write it, and says why")

    def reshard(self, model: nn.Module) -> None:
        """Leave every rank nothing but its part of each parameter: what a forward has gathered is let go."""
        reshard = getattr(model, "reshard", None)
        for module in [] if reshard is None else model.modules():
            if hasattr(module, "reshard"):
                module.reshard()  # pyright: ignore


def _joined(part: Tensor, mesh: DeviceMesh, placements: Sequence[Placement], shape: Sequence[int]) -> Tensor:
    shape = torch.Size(shape)
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(part, mesh, placements, run_check=False, shape=shape, stride=stride).full_tensor()


def open_mesh(spec: MeshSpec, model: ModelSpec, *, device: torch.device | str = "cpu", timeout: float = 600.0) -> Mesh:
    """Join the run that torchrun (or whoever set RANK, WORLD_SIZE and MASTER_ADDR) started, as `plan` says.

    With `device="cuda"` each process takes the GPU LOCAL_RANK. Every collective gives up after `timeout` seconds.
    Raises LaminaError where there is no such run, or the mesh does not fit it.
    """
    world = dist.get_world_size() if dist.is_initialized() else _number("WORLD_SIZE")
    spec = plan(spec, world, model)
    device = torch.device(device)
    limit = timedelta(seconds=timeout)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", _number("LOCAL_RANK"))
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=limit)

    def over(**sizes: int) -> DeviceMesh:
        return init_device_mesh(device.type, tuple(sizes.values()), mesh_dim_names=tuple(sizes))

    same, stages = spec.shard * spec.context, spec.pipeline
    places = over(**{axis: getattr(spec, axis) for axis in PLACES})
    control = dist.new_group(backend="gloo", timeout=limit)
    assert isinstance(control, dist.ProcessGroup)
    run = torch.tensor([time.time_ns()])
    dist.broadcast(run, 0, group=control)
    return Mesh(
        spec=spec,
        device=device,
        places=places,
        layers=over(pipeline=stages, replicate=spec.replicate, layers=spec.expert * same, tensor=spec.tensor),
        experts=over(pipeline=stages, replicate=spec.replicate, expert=spec.expert, experts=same, tensor=spec.tensor),
        readers_group=over(pipeline=stages, readers=world // spec.tensor // stages, tensor=spec.tensor)[
            "readers"
        ].get_group(),
        ends=_ends(stages, world) if stages > 2 else places["pipeline"].get_group(),
        control=control,
        timeout=timeout,
        run=int(run),
    )


def _ends(stages: int, world: int) -> Any:
    """The group of the first and the last stage that this rank is in, or any where it is in the middle."""
    columns = torch.arange(world).view(stages, -1)[[0, -1]].T.tolist()
    groups = [dist.new_group(column) for column in columns]
    return groups[dist.get_rank() % len(groups)]


def close_mesh() -> None:
    """Leave the run. A process that ends without it may abort."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _number(name: str) -> int:
    value = os.environ.get(name, "")
    if not value.isdigit():
        raise LaminaError(f"{name} is not set: several ranks are started by torchrun, as `lamina train --nproc 2` does")
    return int(value)


def _of_ranks(error: BaseException) -> bool:
    """Whether an error is of the ranks and not of what they compute."""
    text = str(error).lower()
    signs = ("connection", "timed out", "timeout", "gloo", "nccl", "process group", "monitoredbarrier", "aborted")
    return isinstance(error, dist.DistError) or any(sign in text for sign in signs)


def _line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
