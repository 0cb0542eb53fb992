"""The loop: what one step is. It knows no files, no signals and no screen; `run.py` has those."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lamina.adapters import FACTORS, adapted
from lamina.layers import Record
from lamina.layers.experts import Experts, rebalance
from lamina.layers.router import TopK
from lamina.model import Model
from lamina.objectives import Batch, Task, Total
from lamina.objectives.objective import forward
from lamina.train.loader import Loader
from lamina.train.optimiser import Average, Optimiser, Optimising
from lamina.train.precision import NAMES, Masters, Scale
from lamina.train.ranks import Alone, Ranks, local
from lamina.train.recompute import recompute
from lamina.train.schedule import Schedule
from lamina.train.specs import LoopSpec
from lamina.train.sums import Sums, loss_of


@dataclass
class Step:
    """What happened in a step."""

    step: int  # counted from 1: how many have been made
    loss: float  # what was minimised: the means over each kind of label; without the auxiliary losses
    parts: dict[str, float]  # by kind of label, a mean in nats, and what else is summed; auxiliary losses as they are
    gradient_norm: float
    rate: float
    tokens: int  # read in this step, in the whole world
    seconds: float
    skipped: bool = False  # its gradient was not finite, and no weight was changed


@dataclass
class Progress:
    """How far a run has come: everything that the next step depends on but tensors."""

    step: int = 0
    tokens: int = 0
    skipped: int = 0  # steps without an effect
    scale: float = 65536.0  # of a float16 loss
    good: int = 0  # steps since it changed
    reached: dict[str, float] = field(default_factory=dict)  # what the held-out loss was to come down to, once it has

    def to_dict(self) -> dict[str, Any]:
        return dict(vars(self))


@dataclass
class Evaluated:
    """What a model loses on held-out examples: in nats for each label, without smoothing and z-loss."""

    loss: float
    asked: int
    parts: dict[str, float] = field(default_factory=dict)


Fill = Callable[[list[tuple[Tensor, Tensor]]], None]
Check = Callable[[int, float, float, nn.Module, Callable[[], Any] | None], bool]


def _finite(step: int, loss: float, norm: float, model: nn.Module, again: Callable[[], Any] | None) -> bool:
    return math.isfinite(loss) and math.isfinite(norm)


class Trainer:
    """A model, an objective and an optimiser, and one method that makes a step of them.

    The loss of a step is, for each kind of label, the sum over all micro-batches of all ranks by the labels of the
    whole global batch, and a router's loss, which is a mean over a micro-batch, weighs as much as its tokens. So
    accumulation, rows of different lengths and ranks change nothing. Nothing random depends on what came before:
    torch's generator is set anew for each micro-batch, from the seed, the step, its number and the rank.
    """

    def __init__(
        self,
        model: Model,
        objective: Task,
        loader: Loader,
        optimiser: Optimising,
        schedule: Schedule,
        loop: LoopSpec,
        *,
        seed: int = 0,
        ranks: Ranks | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.model, self.objective, self.loader = model, objective, loader
        self.schedule, self.loop, self.seed = schedule, loop, seed
        self.ranks: Ranks = Alone() if ranks is None else ranks
        self.device = torch.device(device)
        self.progress = Progress()
        self.check: Check = _finite
        """Whether a step may be taken, by its loss and the norm of its gradient."""
        trained = [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]
        dtype = NAMES[loop.precision]
        half = dtype.itemsize == 2
        self.masters = Masters(model, trained, dtype) if half and self.ranks.world == 1 else None
        self.scale = Scale() if loop.precision == "float16" else None
        self.parameters: Mapping[str, nn.Parameter] = self.masters.masters if self.masters else dict(trained)
        alone = self.ranks.world == 1 and self.masters is None
        self.optimiser = Optimiser(optimiser, model, self.parameters.items(), sparse=alone)
        self.average = Average(self.parameters, loop.average) if loop.average is not None else None
        self.adapts = bool(adapted(model))
        self.balances = not self.adapts and any(
            isinstance(part, Experts) and isinstance(part.router, TopK) and part.router.correction is not None
            for part in model.modules()
        )
        if loop.recompute:
            recompute(model)
        self.model.train()

    def step(self) -> Step:
        """Read a batch, and change the weights, unless the gradient is not finite."""
        clock, number = time.perf_counter(), self.progress.step
        micros = [self.ranks.batch(batch) for batch in self.loader.step(number)]
        asked, tokens = self._counted(micros)
        sums = Sums()
        loads: Record | None = None

        def work(index: int) -> Tensor | None:
            nonlocal loads
            torch.manual_seed(_mixed(self.seed, number, index, self.ranks.stream))
            record = Record("*.load") if self.balances else None
            total, share = self._total(micros[index], record), micros[index].tokens / max(tokens, 1.0)
            loads = _added(loads, record)
            if total is None:
                return None
            sums.add(total, share)
            return self._loss(total, asked, share)

        self.ranks.through(micros, work)
        loss, _, parts = self.ranks.agreed(sums.figures(asked, self.ranks.sum))
        norm = self._norm()
        skipped = not self._may(number + 1, loss, norm, micros[0])
        factor = self.schedule.factor(number, self.loop.steps)
        rate = self.optimiser.spec.rate * factor
        if skipped:
            self.progress.skipped += 1
        else:
            self._change(factor, norm)
            if loads is not None:
                rebalance(self.model, self._everywhere(loads))
        if self.scale is not None:
            self.scale.update(not skipped)
            self.progress.scale, self.progress.good = self.scale.value, self.scale.good
        self.optimiser.clear()
        self.progress.step += 1
        self.progress.tokens += int(tokens)
        return Step(number + 1, loss, parts, norm, rate, int(tokens), time.perf_counter() - clock, skipped)

    def _may(self, step: int, loss: float, norm: float, batch: Batch) -> bool:
        """Whether the step may be taken. That float16 overflows until its scale is found is no fault."""
        if self.scale is not None and self.scale.value > 1 and math.isfinite(loss):
            return math.isfinite(norm)
        again = (lambda: self._total(batch, None)) if self.ranks.whole else None
        return self.check(step, loss, norm, self.model, again)

    def _total(self, batch: Batch, record: Record | None) -> Total | None:
        """What the objective asks of a batch; nothing where the model's head lies on another rank."""
        batch = batch.to(self.device)
        if self.ranks.asks:
            return self.objective.total(self.model, batch, record)
        forward(self.model, batch, record)
        return None

    def _counted(self, micros: list[Batch]) -> tuple[dict[str, float], float]:
        """Labels of each kind, and tokens that are read, in the whole global batch."""
        kinds = sorted(micros[0].labels)
        counts = [batch.asked for batch in micros]
        own = [float(sum(count[kind] for count in counts)) for kind in kinds]
        *asked, tokens = self.ranks.sum([*own, float(sum(batch.tokens for batch in micros))])
        return dict(zip(kinds, asked, strict=True)), tokens

    def _loss(self, total: Total, asked: Mapping[str, float], share: float) -> Tensor:
        """What a micro-batch adds to the loss of the step."""
        loss = loss_of(total, asked)
        if total.auxiliary is not None:
            loss = loss + total.auxiliary * share
        return loss if self.scale is None else loss * self.scale.value

    def _norm(self) -> float:
        """Of the whole gradient, after the scale of float16 has been taken out."""
        for one in self.parameters.values():
            if one.grad is not None and one.grad.is_sparse:  # a row that was read twice stands twice
                one.grad = one.grad.coalesce()
        if self.scale is not None:
            gradients = local(one.grad for one in self.parameters.values() if one.grad is not None)
            torch._foreach_mul_(gradients, 1 / self.scale.value)  # pyright: ignore
        return float(self.ranks.norm(self.parameters.values()))

    def _change(self, factor: float, norm: float) -> None:
        clip = self.loop.clip
        if clip is not None and norm > clip:
            gradients = local(one.grad for one in self.parameters.values() if one.grad is not None)
            torch._foreach_mul_(gradients, clip / (norm + 1e-6))  # pyright: ignore
        self.optimiser.step(factor)
        if self.masters is not None:
            self.masters.publish()
        if self.average is not None:
            self.average.update()

    def _everywhere(self, loads: Record) -> Record:
        """The loads of experts of all ranks together."""
        names = sorted(loads.values)
        sizes = [loads.values[name].numel() for name in names]
        summed = self.ranks.sum([float(load) for name in names for load in loads.values[name]])
        for name, part in zip(names, torch.tensor(summed, dtype=torch.float64).split(sizes), strict=True):
            loads.values[name] = part.to(self.device)
        return loads

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Batch]) -> Evaluated:
        """The mean loss on held-out batches, of the moving average of the weights where there is one.

        All ranks give the same batches. Each reads its own, and as many as the others: where they do not come out even,
        some read the last one once more, and are asked nothing of it.
        """
        self.model.eval()
        self._swap()
        try:
            sums = Sums()
            counts: dict[str, float] = {}
            own = [self.ranks.batch(batch) for batch in self._own(list(batches))]

            def work(index: int) -> None:
                total = self._total(own[index], None)
                if total is None:
                    return
                sums.add(total, 1.0)
                for kind, losses in total.kinds.items():
                    counts[kind] = counts.get(kind, 0.0) + losses.asked

            self.ranks.through(own, work)
        finally:
            self._swap()
            self.model.train()
        kinds = sorted(counts)
        asked = dict(zip(kinds, self.ranks.sum([counts[kind] for kind in kinds]), strict=True))
        asked, (_, plain, parts) = self.ranks.agreed([asked, sums.figures(asked, self.ranks.sum)])
        return Evaluated(plain, int(sum(asked.values())), parts)

    def _own(self, batches: list[Batch]) -> list[Batch]:
        """Those that this rank reads."""
        rank, ranks = self.ranks.data, self.ranks.data_ranks
        mine = batches[rank::ranks]
        if len(mine) < -(-len(batches) // ranks):
            mine.append(batches[-1].unasked())
        return mine

    def _swap(self) -> None:
        if self.average is not None:
            self.ranks.settle()
            self.average.swap()
            if self.masters is not None:
                self.masters.publish()

    @property
    def kept(self) -> str:
        """The file of the weights that a run changes."""
        return "adapter" if self.adapts else "model"

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Everything that a checkpoint holds, by file: the model, what the optimiser remembers, the moving average.

        Of a model with an adapter only that: its own weights are where they came from, and do not change.
        """
        weights: dict[str, Tensor] = dict(self.model.named_parameters())
        weights |= {name: buffer for name, buffer in self.model.named_buffers() if name in self.model.state_dict()}
        masters = self.masters
        weights |= (
            self.parameters
            if masters is None
            else {name: masters.kept(name, weight) for name, weight in self.model.named_parameters()}
        )
        if self.adapts:
            weights = {name: weight for name, weight in weights.items() if name.rpartition(".")[2] in FACTORS}
        found = {
            self.kept: {name: weight.detach() for name, weight in weights.items()},
            "optimiser": self.optimiser.state(),
        }
        if self.average is not None:
            found["average"] = self.average.values
        return found

    @torch.no_grad()
    def load(
        self, tensors: Mapping[str, Mapping[str, Tensor]], progress: Mapping[str, Any], fill: Fill | None = None
    ) -> None:
        """Go on from there: the inverse of `tensors` and of `progress.to_dict()`. Given whole tensors, each rank takes
        its part; `fill`, which is given all places each with its tensor, may do so in its stead."""
        self.ranks.settle()
        pairs: list[tuple[Tensor, Tensor]] = []
        state: dict[str, Tensor] = {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}
        for name, value in tensors[self.kept].items():
            pairs.append((self.parameters.get(name, state[name]), value))
        self.optimiser.load(tensors["optimiser"], lambda place, value: pairs.append((place, value)))
        if self.average is not None:
            pairs += [(place, tensors["average"][name]) for name, place in self.average.values.items()]
        if fill is not None:
            fill(pairs)
        else:
            for place, value in pairs:
                self.ranks.put(place, value)
        if self.masters is not None:
            self.masters.publish()
        self.progress = Progress(**progress)
        if self.scale is not None:
            self.scale.value, self.scale.good = self.progress.scale, self.progress.good


def _mixed(*numbers: int) -> int:
    """One seed of several numbers, so that neighbours have nothing to do with each other (splitmix64)."""
    state = 0
    for number in numbers:
        state = (state ^ number) + 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
        state = (state ^ state >> 27) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return state >> 1


def _added(before: Record | None, record: Record | None) -> Record | None:
    """The loads of several forwards together."""
    if record is None or before is None:
        return record
    for name, value in record.values.items():
        before.values[name] = before.values[name] + value
    return before
