"""Pipeline parallelism: each rank has a run of the layers, and micro-batches go through the ranks one behind the other
(GPipe, arXiv:1811.06965; a forward and a backward in turn: PipeDream-Flush, arXiv:2006.09503, section 2.2).

Every rank reads the same ids, so tokens, masks and phases are its own, and what goes from rank to rank is two vectors a
micro-batch: the hidden states, and what routers have lost so far. They are as long as the longest micro-batch needs.
Parameters of other ranks' layers stay in the model, by name and shape, without storage (on "meta").
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from lamina.errors import LaminaError, UnsupportedError
from lamina.layers import Call, Experts, RouterLossSpec, Stack
from lamina.layers.router_loss import sums_of
from lamina.model import Model, Output

Work = Callable[[int], Tensor | None]
"""Runs the model on the micro-batch of this number, and returns its loss where the model returns logits, or where the
objective says one; on all stages but the last what it returns is not looked at."""


def owners(model: Model, stages: int) -> dict[str, tuple[int, ...]]:
    """For each parameter the stages that use it: those of n layers on P stages lie on stage i P // n for layer i, what
    comes before them on the first, what comes after on the last. A tied table lies on both; its gradients are added."""
    stack, name = _stack(model)
    first, last, layers = 0, stages - 1, len(stack.layers)
    tied = model.head is not None and model.head.weight is None
    found: dict[str, tuple[int, ...]] = {}
    for path, _ in model.named_parameters():
        part = path.removeprefix(f"{name}.").split(".")
        if path.startswith(f"{name}.layers."):
            found[path] = (int(part[1]) * stages // layers,)
        elif path.startswith((f"{name}.norm.", "head.", "pooler.", "labels.")):
            found[path] = (last,)
        elif path.startswith(f"{name}.score_bias."):
            found[path] = tuple(range(stages))
        else:
            found[path] = (first, last) if path == "embedding.weight" and tied else (first,)
    return found


@dataclass(eq=False)
class Stage:
    """What lies on this rank, and what it is being handed while `through` runs."""

    number: int
    stages: int
    group: dist.ProcessGroup  # the ranks that have the other stages, in order
    ends: dist.ProcessGroup  # the first and the last of them
    device: torch.device
    dtype: torch.dtype  # of the hidden states
    width: int
    path: str  # of the stack
    owners: dict[str, tuple[int, ...]]
    router: tuple[RouterLossSpec, int] | None  # losses that are pooled over the layers, and how many experts
    routers: bool  # whether there are router losses at all
    running: bool = False
    received: list[Tensor] = field(default_factory=list)
    handed: list[Tensor] = field(default_factory=list)
    schedules: dict[Any, Any] = field(default_factory=dict)  # by whether they learn: (what it was made for, torch's)

    @property
    def first(self) -> bool:
        return self.number == 0

    @property
    def last(self) -> bool:
        return self.number == self.stages - 1

    def holders(self, name: str) -> int:
        """On how many stages a parameter lies."""
        return len(self.owners[name])

    def sizes(self, shapes: Sequence[tuple[int, int]]) -> list[int]:
        """Of the two vectors, for micro-batches of (rows, columns)."""
        hidden = max(rows * columns for rows, columns in shapes) * self.width
        return [hidden] + ([max(self._losses(rows) for rows, _ in shapes)] if self.routers else [])

    def _kinds(self) -> list[str]:
        """The names of the pooled losses."""
        if self.router is None:
            return []
        kinds = ("balance", "z", "importance", "load")
        return [f"{self.path}.{kind}" for kind in kinds if getattr(self.router[0], kind)]

    def _sums(self, rows: int) -> list[tuple[int, ...]]:
        return [] if self.router is None else sums_of(*self.router, rows)

    def _losses(self, rows: int) -> int:
        return 1 + len(self._kinds()) + sum(map(prod, self._sums(rows)))

    def embed(self, ids: Tensor) -> Tensor:
        """In place of the embedding: what came from the stage before."""
        rows, columns = ids.shape
        return self.received[0][: rows * columns * self.width].view(rows, columns, self.width)

    def begin(self, x: Tensor, call: Call, segments: Tensor | None) -> Tensor:
        """In place of what comes before the layers: the sums of the routers before them."""
        if self.router is not None:
            _, sums = self._parts(x.shape[0])
            call.memo[self.path, self.router[0]] = sums
        return x

    def _parts(self, rows: int) -> tuple[list[Tensor], list[Tensor]]:
        """What was received of losses: [of single layers, pooled ones...], and the sums that they are made of."""
        shapes, count = self._sums(rows), 1 + len(self._kinds())
        if self.first:
            vector = torch.zeros(self._losses(rows), dtype=self.wide, device=self.device)
        else:
            vector = self.received[1][: self._losses(rows)]
        sums = vector[count:].split([prod(shape) for shape in shapes])
        return [one.clone() for one in vector[:count]], [
            one.view(shape) for one, shape in zip(sums, shapes, strict=True)
        ]

    @property
    def wide(self) -> torch.dtype:
        """In which losses are counted."""
        return torch.promote_types(self.dtype, torch.float32)

    def hand(self, x: Tensor, call: Call) -> Tensor:
        """In place of what comes after the layers: what the next stage is given."""
        given = [x.to(self.dtype).flatten()]
        if self.routers:
            rows, losses = x.shape[0], call.record.losses
            (before, *pooled), sums = self._parts(rows)
            own = [loss for name, loss in losses.items() if name not in self._kinds()]
            sums = call.memo.get((self.path, self.router[0]), sums) if self.router is not None else []
            found = [losses.get(name, loss) for name, loss in zip(self._kinds(), pooled, strict=True)]
            single = torch.stack([before, *(loss.to(self.wide) for loss in own)]).sum()
            given.append(torch.cat([one.to(self.wide).flatten() for one in (single, *found, *sums)]))
        self.handed = given
        return x

    def finish(self, call: Call) -> None:
        """On the last stage: the losses of the routers of all of them."""
        if self.routers and torch.is_grad_enabled():
            (before, *pooled), _ = self._parts(call.tokens.position.shape[0])
            call.record.losses[f"{self.path}.before"] = before
            for name, loss in zip(self._kinds(), pooled, strict=True):
                call.record.losses.setdefault(name, loss)


def _stack(model: Model) -> tuple[Stack, str]:
    """The one stack, and its path."""
    if model.decoder is not None:
        return model.decoder, "decoder"
    assert model.encoder is not None
    return model.encoder, "encoder"


def cut_layers(
    model: Model,
    places: tuple[int, int],
    groups: tuple[dist.ProcessGroup, dist.ProcessGroup],
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    """Leave this rank the layers of its stage, `places` = (number, of how many), and let it be handed the rest."""
    number, stages = places
    stack, path = _stack(model)
    losses = [part for part in stack.modules() if isinstance(part, Experts) and part.spec.losses is not None]
    pooled = {(part.spec.losses, part.spec.router.experts) for part in losses if part.spec.losses.pooled}  # pyright: ignore
    stage = Stage(
        number=number,
        stages=stages,
        group=groups[0],
        ends=groups[1],
        device=device,
        dtype=dtype,
        width=model.spec.width,
        path=path,
        owners=owners(model, stages),
        router=next(iter(pooled), None),  # pyright: ignore[reportArgumentType]
        routers=bool(losses),
    )
    for name, parameter in list(model.named_parameters()):
        if number not in stage.owners[name]:
            home, _, leaf = name.rpartition(".")
            empty = torch.empty_like(parameter, device="meta")
            model.get_submodule(home)._parameters[leaf] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
    for i, layer in enumerate(stack.layers):
        if i * stages // len(stack.layers) != number:
            layer.forward = _passed
    if not stage.first:
        model.embedding.forward = stage.embed
        stack.begin = stage.begin
    if stage.last:
        end = stack.end

        def finish(x: Tensor, call: Call) -> Tensor:
            stage.finish(call)
            return end(x, call)

        stack.end = finish
    else:
        stack.end = stage.hand
        model.heads = _no_heads
    model.stage = stage
    model.register_forward_pre_hook(_refuse, with_kwargs=True)


def _refuse(model: nn.Module, args: tuple[Any, ...], given: dict[str, Any]) -> None:
    if not model.stage.running:  # pyright: ignore[reportAttributeAccessIssue]
        raise LaminaError("this model lies on several ranks by pipeline: run it by lamina.parallel.through")
    if given.get("cache") is not None:
        raise UnsupportedError("cache is for whole models; this one lies on several ranks by pipeline")


def _passed(x: Tensor, call: Call) -> Tensor:
    """A layer of another stage."""
    return x


def _no_heads(hidden: Tensor, call: Call, keep_logits: int | None, answers: Tensor | None) -> Output:
    return Output(None, hidden)


def absent(model: nn.Module) -> set[nn.Parameter]:
    """The parameters that lie on other stages only."""
    stage: Stage | None = getattr(model, "stage", None)
    if stage is None:
        return set()
    return {one for name, one in model.named_parameters() if stage.number not in stage.owners[name]}


def through(
    model: Model, shapes: Sequence[tuple[int, int]], work: Work, last: Callable[[bool], None] = lambda last: None
) -> None:
    """Run `work` on each of the micro-batches, whose ids have these shapes (rows, columns); all ranks must call it,
    with the same shapes. Where gradients are enabled each has its backward too, and gradients of what several stages
    share are added up at the end.

    last: told before each backward whether it is the last one. Fewer micro-batches than stages leave some idle.
    """
    from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe

    stage: Stage = model.stage
    learn, count, sizes = torch.is_grad_enabled(), len(shapes), stage.sizes(shapes)
    made, held = stage.schedules.get(learn, (None, None))
    if made != (count, sizes):
        vectors = [
            torch.empty(size, device="meta", dtype=dtype) for size, dtype in zip(sizes, _dtypes(stage), strict=False)
        ]
        numbers, one = torch.zeros(1, dtype=torch.int64), torch.zeros(())
        part = _Part(stage)
        given = PipelineStage(
            part,
            stage.number,
            stage.stages,
            stage.device,
            input_args=(numbers,) if stage.first else tuple(vector.requires_grad_() for vector in vectors),
            output_args=(one.requires_grad_(),) if stage.last else tuple(vector.requires_grad_() for vector in vectors),
            group=stage.group,
        )
        kind = Schedule1F1B if count >= stage.stages and learn else ScheduleGPipe
        schedule = kind(given, count, loss_fn=(lambda loss, number: loss) if learn else None, scale_grads=False)
        stage.schedules[learn] = ((count, sizes), (part, schedule))
        held = part, schedule
    part, schedule = held
    part.work, part.told, part.sizes = work, lambda number: last(number == count - 1), sizes
    numbers = torch.arange(count)
    try:
        schedule.step(
            *((numbers,) if stage.first else ()),
            target=numbers if stage.last else None,
            return_outputs=False,
            number=numbers,
        )
    except RuntimeError as error:  # torch puts what a stage raises into one of its own
        if isinstance(error.__cause__, LaminaError):
            raise error.__cause__ from None
        raise
    finally:
        stage.running, stage.received, stage.handed = False, [], []
        part.work = None
    if learn:
        _share(model, stage)


def _dtypes(stage: Stage) -> tuple[torch.dtype, torch.dtype]:
    return stage.dtype, stage.wide


class _Part(nn.Module):
    """A stage as torch's schedules call it. It holds no parameters: FSDP is told by `through` when to do what."""

    def __init__(self, stage: Stage) -> None:
        super().__init__()
        self.stage = stage
        self.work: Work | None = None
        self.told: Callable[[int], None] = lambda number: None
        self.sizes: list[int] = []

    def forward(self, *received: Tensor, number: Tensor) -> Any:
        assert self.work is not None
        stage, index = self.stage, int(number)
        stage.received = [] if stage.first else list(received)
        stage.running = True
        loss = self.work(index)
        if stage.last:
            loss = torch.zeros((), device=stage.device) if loss is None else loss
            if loss.requires_grad:
                loss.register_hook(lambda gradient: self.told(index))
            return loss
        vectors = [F.pad(one, (0, size - one.numel())) for one, size in zip(stage.handed, self.sizes, strict=True)]
        if vectors[0].requires_grad:
            vectors[0].register_hook(lambda gradient: self.told(index))
        return tuple(vectors)


@torch.no_grad()
def _share(model: Model, stage: Stage) -> None:
    """Add up the gradients of what several stages hold."""
    for name, parameter in model.named_parameters():
        owners = stage.owners[name]
        if len(owners) == 1 or stage.number not in owners or not parameter.requires_grad:
            continue
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        gradient: Any = parameter.grad
        mine = gradient.to_local() if hasattr(gradient, "to_local") else gradient
        dist.all_reduce(mine, group=stage.group if len(owners) == stage.stages else stage.ends)
