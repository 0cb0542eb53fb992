"""Which examples a step reads, on this rank: a function of the step, so that nothing has to be remembered."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import numpy as np

from lamina.errors import LaminaError
from lamina.layers import CapacitySpec, ExpertChoiceSpec, RouterLossSpec
from lamina.model import ModelSpec
from lamina.objectives import Batch, Contrastive, Example, Examples, Task
from lamina.train.specs import TrainSpec


class Placing(Protocol):
    """The example at each place of an endless sequence."""

    def __getitem__(self, position: int, /) -> int: ...


class Loader:
    """Batches of a step: of positions [step * batch, (step + 1) * batch) of the order those of this rank, `micro` at a
    time, the shorter first.

    The random numbers of an example are its own: Philox, keyed by the seed and the position. So the world, the number
    of workers and what came before change nothing.
    """

    def __init__(
        self,
        objective: Task,
        examples: Examples,
        order: Placing,
        *,
        batch: int,
        micro: int,
        seed: int,
        rank: int = 0,
        ranks: int = 1,
        workers: int = 1,
    ) -> None:
        if len(examples) < 1:
            raise LaminaError("the data has no whole example of this length: use more text, or a shorter length")
        if batch % ranks or batch // ranks % micro:
            raise LaminaError(
                f"batch={batch} examples cannot be shared out evenly: {ranks} ranks x micro-batches of {micro}"
                f" = {ranks * micro} at a time"
            )
        self.objective, self.examples, self.order = objective, examples, order
        self.batch, self.micro, self.seed = batch, micro, seed
        self.share, self.first = batch // ranks, rank * (batch // ranks)
        self.ahead: dict[int, Future[list[Batch]]] = {}
        self.pool = ThreadPoolExecutor(workers, "lamina-data") if workers else None

    def step(self, step: int) -> list[Batch]:
        """The micro-batches of a step; those of the next are made meanwhile."""
        if self.pool is None:
            return self._make(step)
        found = self.ahead.pop(step, None) or self.pool.submit(self._make, step)
        if step + 1 not in self.ahead:
            self.ahead = {step + 1: self.pool.submit(self._make, step + 1)}
        return found.result()

    def close(self) -> None:
        """Stop the workers."""
        if self.pool is not None:
            self.pool.shutdown(wait=True, cancel_futures=True)

    def _make(self, step: int) -> list[Batch]:
        start = step * self.batch + self.first
        rows = [self.example(position) for position in range(start, start + self.share)]
        rows.sort(key=lambda row: sum(one.size for one in row.values()))  # those of a length together: least padding
        return [self.objective.collate(rows[i : i + self.micro]) for i in range(0, self.share, self.micro)]

    def example(self, position: int) -> Example:
        """The example at a place of the endless sequence."""
        return self.examples.example(self.order[position], randomness(self.seed, position))


def rows_at_once(spec: TrainSpec, model: ModelSpec, share: int) -> int:
    """Rows of one forward where `loop.micro` leaves them open, of the `share` that a rank reads in a step.

    On a pipeline, as many micro-batches as stages, or as many fewer as divide the share, so that no stage waits for the
    whole batch. But all rows at once where they are compared with each other, or balanced over experts: in parts the
    loss would be another one.
    """
    together = isinstance(spec.objective, Contrastive) or any(
        isinstance(part, RouterLossSpec | CapacitySpec | ExpertChoiceSpec) for _, part in model.walk()
    )
    most = 1 if together else spec.mesh.pipeline
    return share // max(count for count in range(1, most + 1) if share % count == 0)


def randomness(seed: int, position: int) -> np.random.Generator:
    """The random numbers of one example."""
    return np.random.Generator(np.random.Philox(key=[seed, position]))


def held_out(objective: Task, examples: Examples, *, rows: int | None, micro: int, seed: int) -> Iterator[Batch]:
    """`rows` examples from all over a validation set, or all, always the same and with the same random numbers."""
    count = len(examples) if rows is None else min(rows, len(examples))
    for start in range(0, count, micro):
        places = [i * len(examples) // count for i in range(start, min(start + micro, count))]
        yield objective.collate([examples.example(place, randomness(seed, place)) for place in places])
