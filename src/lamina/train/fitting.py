"""Too little memory: what would fit, found by trying, and the same step in smaller pieces."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from lamina.errors import TrainingError


@dataclass(frozen=True)
class Fit:
    """How the samples of a step are read: `micro` at a time, `times` times over. Their product is the batch."""

    micro: int
    times: int

    @property
    def smaller(self) -> Fit | None:
        """The same batch in smaller pieces: half as many at a time, twice as often, or a third of an odd number that
        three divides, and so on. None where it is one at a time."""
        part = next((n for n in range(2, self.micro + 1) if self.micro % n == 0), None)
        return None if part is None else Fit(self.micro // part, self.times * part)


def fitting(
    fit: Fit, attempt: Callable[[Fit], Any], *, auto: bool = False, budget: Callable[[], str] | None = None
) -> tuple[Fit, Any]:
    """Runs `attempt(fit)`; where memory runs out, finds by trying the largest micro-batch that fits.

    Returns what fitted and what its attempt returned. Without `auto` nothing else is accepted than what was asked for:
    TrainingError says what was too large, what `budget` says in words of where memory goes, and what would fit; with
    it too, where nothing does. An attempt that fails must leave nothing behind, so that it can be made again.
    """
    tried = fit
    while True:
        try:
            result = attempt(tried)
            break
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
        # Here the error is gone, and with it the frames that held what was allocated.
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        smaller = tried.smaller
        if smaller is None:
            raise TrainingError(f"{_too_large(fit, budget)}; not even one sample at a time fits: a shorter length, "
                                "activation checkpointing or a smaller model needs less")  # fmt: skip
        tried = smaller
    if tried != fit and not auto:
        raise TrainingError(
            f"{_too_large(fit, budget)}; the largest that fits is {tried.micro}: set micro_batch to {tried.micro}, "
            f"read {tried.times} times a step, or let --auto-fit do so"
        )
    return tried, result


def _too_large(fit: Fit, budget: Callable[[], str] | None) -> str:
    needs = "" if budget is None else f" ({budget()})"
    return f"a step with micro-batches of {fit.micro} does not fit into memory{needs}"


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out. torch's allocator of the CPU says so only in words."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator: can't allocate memory" in str(error)
