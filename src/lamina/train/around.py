"""What happens around the steps of a run: figures, evaluations, checkpoints, and what signals ask for."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from lamina.errors import UnsupportedError
from lamina.train.building import flops
from lamina.train.evaluating import Evaluator
from lamina.train.finite import Finite
from lamina.train.guards import Signals, Spikes, Watchdog
from lamina.train.loop import Step, Trainer
from lamina.train.peak import peak
from lamina.train.precision import NAMES
from lamina.train.run import Run
from lamina.train.saving import Saver
from lamina.train.specs import TrainSpec


@dataclass(frozen=True)
class Tick:
    """What is shown after a step."""

    step: Step
    steps: int
    tokens_per_second: float
    utilisation: float | None  # of the machine's best product
    left: float  # seconds


Show = Callable[[Tick | str], None]


class Around:
    """Makes the steps, and does between them what is due."""

    def __init__(
        self,
        spec: TrainSpec,
        trainer: Trainer,
        run: Run | None,
        evaluator: Evaluator,
        saver: Saver,
        record: Callable[[dict[str, Any]], None],
        show: Show,
    ) -> None:
        self.spec, self.trainer, self.run, self.ranks = spec, trainer, run, trainer.ranks
        self.evaluator, self.saver, self.record, self.show = evaluator, saver, record, show
        self.finite = Finite(spec.loop.max_skips, None if run is None else run.directory)
        trainer.check = self.finite.check
        self.spikes = Spikes()
        self.rate = 0.0
        self.flops = _flops(spec, trainer)
        self.best = 0.0  # FLOP/s of the machine's best product

    def go(self, signals: Signals, watchdog: Watchdog) -> Step | None:
        """Steps, until there are no more or somebody asks to stop."""
        trainer, spec = self.trainer, self.spec
        step: Step | None = None
        clock, tokens, timed = time.perf_counter(), 0, 0.0
        stop = False
        while not self.ended and not stop:
            step = trainer.step()
            watchdog.beat()
            tokens, timed = tokens + step.tokens, timed + step.seconds
            for said in (self.finite.said if step.skipped else None, self.spikes.check(step.step, step.loss)):
                if said and self.run is not None:
                    self.run.warn(said)
                    self.show(f"warning: {said}")
            last = step.step == spec.loop.steps
            if step.step % spec.log.every == 0 or last or step.step == 1:
                self._log(step, tokens, timed, time.perf_counter() - clock)
                tokens, timed = 0, 0.0
            if last or (spec.evaluation.every and step.step % spec.evaluation.every == 0):
                self.evaluator.evaluate(step.step)
                if self.evaluator.reached:
                    trainer.progress.reached, last = dict(spec.evaluation.until), True
                    self.show(f"step {step.step}: {spec.evaluation.until} is reached")
            due = spec.checkpoints.every and step.step % spec.checkpoints.every == 0
            # All ranks do what any of them was asked.
            stop, save = (asked > 0 for asked in self.ranks.sum([signals.asked == "stop", signals.asked == "save"]))
            if last or due or save or stop:
                self.saver.save()
                signals.done()
            watchdog.beat()
        return step

    @property
    def ended(self) -> bool:
        """Whether there is nothing left to do: all steps are made, or what they were for is reached."""
        until, progress = self.spec.evaluation.until, self.trainer.progress
        return progress.step >= self.spec.loop.steps or (bool(until) and progress.reached == until)

    def _log(self, step: Step, tokens: int, seconds: float, since: float) -> None:
        self.rate = tokens / seconds if seconds else 0.0
        used = None
        if self.run is not None and self.flops is not None:
            done = self.rate * self.flops / self.ranks.world
            if done > self.best:  # nothing was measured yet, or while others used the machine
                self.best = max(self.best, peak(self.trainer.device.type, NAMES[self.spec.loop.precision]))
            used = done / self.best
        record: dict[str, Any] = {
            "step": step.step,
            "samples": step.step * self.spec.loop.batch,
            "tokens": self.trainer.progress.tokens,
            "loss": step.loss,
            "parts": step.parts,
            "rate": step.rate,
            "gradient_norm": step.gradient_norm,
            "tokens_per_second": self.rate,
            "seconds": since,
            "memory_bytes": _memory(self.trainer.device),
        }
        if used is not None:
            record["utilisation"] = used
        self.record(record)
        remaining = (self.spec.loop.steps - step.step) * step.seconds
        self.show(Tick(step, self.spec.loop.steps, self.rate, used, remaining))


def _flops(spec: TrainSpec, trainer: Trainer) -> int | None:
    """Arithmetic of a token in training; None for models that `account` cannot run, such as those without ids."""
    try:
        return flops(spec, trainer.model.spec, trainer.model.origin, trainer.objective)
    except UnsupportedError:
        return None


def _memory(device: torch.device) -> int:
    """Bytes at the peak so far: of the device, or of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
