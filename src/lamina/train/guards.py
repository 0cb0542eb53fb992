"""What keeps a run from ending badly: signals, steps that are not finite, spikes, a watchdog, too little memory."""

from __future__ import annotations

import faulthandler
import json
import math
import os
import signal
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from lamina.errors import LaminaError, TrainingError
from lamina.train.directory import NONFINITE
from lamina.train.records import without_infinities
from lamina.weights.saving import write_file

STOPPING = (signal.SIGTERM, signal.SIGINT)


class Signals:
    """Inside, signals ask the loop for something instead of ending it where it stands.

    SIGTERM and SIGINT: `asked` becomes "stop"; the loop finishes its step, saves and leaves with `status`. A second one
    stops at once, as KeyboardInterrupt or by the signal itself. SIGUSR1: `asked` becomes "save", until `done()`.
    In a thread that is not the main one, where Python gives no signals, nothing is ever asked.
    """

    def __init__(self) -> None:
        self.asked: str | None = None  # "stop" or "save"
        self.signal: int | None = None  # which one asked to stop
        self._before: dict[int, Any] = {}

    @property
    def status(self) -> int:
        """What the process should exit with: 143 after SIGTERM, 130 after SIGINT, 0 if nothing asked it to stop."""
        return 0 if self.signal is None else 128 + self.signal

    def done(self) -> None:
        """The checkpoint that was asked for is saved."""
        if self.asked == "save":
            self.asked = None

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            for number in (*STOPPING, signal.SIGUSR1):
                self._before[number] = signal.signal(number, self._heard)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def _heard(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGUSR1:
            self.asked = self.asked or "save"
        elif self.signal is None:
            self.asked, self.signal = "stop", number
        elif number == signal.SIGINT:
            raise KeyboardInterrupt
        else:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)


class Finite:
    """Counts the steps whose loss or gradient norm is not finite; those are to be skipped.

    `check` says whether a step may be taken. Where it may not, `nonfinite/step-N.json` below `directory` names the
    first part of the model whose output is not finite. After `most` such steps the next one raises TrainingError,
    which ends the run; its last checkpoint is good, since what is not finite was never added to a weight.
    """

    def __init__(self, most: int = 3, directory: str | os.PathLike[str] | None = None) -> None:
        self.most = most
        self.directory = None if directory is None else Path(directory) / NONFINITE
        self.skipped = 0
        self.said: str | None = None  # of the last one, in words

    def check(
        self,
        step: int,
        loss: float,
        norm: float,
        model: nn.Module | None = None,
        again: Callable[[], Any] | None = None,
    ) -> bool:
        """Whether loss and gradient norm are finite. `again` runs the forward pass of the same batch once more, so
        that the first bad part of `model` can be named."""
        if math.isfinite(loss) and math.isfinite(norm):
            return True
        self.skipped += 1
        found = self._found(model, again)
        self.said = f"step {step} is skipped: loss {loss:g}, gradient norm {norm:g}; {found['words']}"
        if self.directory is not None:
            self.directory.mkdir(parents=True, exist_ok=True)
            numbers = {"step": step, "loss": loss, "gradient_norm": norm, "skipped": self.skipped}
            text = json.dumps(without_infinities(numbers | found), indent=1)
            write_file(self.directory / f"step-{step}.json", f"{text}\n".encode())
        if self.skipped > self.most:
            raise TrainingError(
                f"{self.said}; that is the {self.skipped}th such step, and max_skips allows {self.most}: lower the "
                "learning rate, warm up for longer or clip harder, and go on from the last checkpoint"
            )
        return False

    def _found(self, model: nn.Module | None, again: Callable[[], Any] | None) -> dict[str, Any]:
        if model is None:
            return {"words": "its model was not looked at"}
        for name, parameter in model.named_parameters():
            if not bool(parameter.isfinite().all()):
                return {"parameter": name, **_counts(parameter), "words": f"parameter {name} holds what is not finite"}
        if again is not None:
            part = first_bad(model, again)
            if part is not None:
                return part | {"words": f"the first part whose output is not finite is {part['part']}"}
        for name, parameter in model.named_parameters():
            if parameter.grad is not None and not bool(parameter.grad.isfinite().all()):
                words = f"the forward pass is finite; the gradient of {name} is not"
                return {"gradient": name, **_counts(parameter.grad), "words": words}
        return {"words": "nothing in the model is, when the batch is read again"}


def first_bad(model: nn.Module, again: Callable[[], Any]) -> dict[str, Any] | None:
    """The first part of the model, innermost first, whose output is not finite when `again` runs it: its path, what is
    wrong with its output, and whether its input was finite. None where all are."""
    found: list[dict[str, Any]] = []

    def look(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            bad = next((t for t in _tensors(output) if not bool(t.isfinite().all())), None)
            if bad is not None and not found:
                fed = all(bool(t.isfinite().all()) for t in _tensors(inputs))
                kind = type(module).__name__
                found.append({"part": name or "the model", "kind": kind, "input_finite": fed, **_counts(bad)})

        return hook

    handles = [module.register_forward_hook(look(name)) for name, module in model.named_modules()]
    try:
        with torch.no_grad():
            again()
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


def _counts(tensor: Tensor) -> dict[str, Any]:
    tensor = tensor.detach()
    return {
        "shape": list(tensor.shape),
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "nan": int(tensor.isnan().sum()),
        "inf": int(tensor.isinf().sum()),
    }


class Spikes:
    """Notices a loss far above those before it. A spike is said, and never changes the run.

    A loss is a spike where it exceeds the median of the last `window` by more than `factor` times their spread (the
    median distance from the median), and by more than 10 %.
    """

    def __init__(self, window: int = 64, factor: float = 8.0) -> None:
        self.factor = factor
        self.count = 0
        self._losses: deque[float] = deque(maxlen=window)

    def check(self, step: int, loss: float) -> str | None:
        """A line to be shown where this loss is a spike."""
        said = None
        if len(self._losses) == self._losses.maxlen and math.isfinite(loss):
            middle = statistics.median(self._losses)
            spread = statistics.median(abs(each - middle) for each in self._losses)
            if loss - middle > max(self.factor * spread, 0.1 * abs(middle)):
                self.count += 1
                said = f"step {step}: the loss is {loss:.4g}, and {middle:.4g} in the middle of the last "
                said += f"{len(self._losses)} steps"
        if math.isfinite(loss):
            self._losses.append(loss)
        return said


class Watchdog:
    """Writes the stacks of all threads to a file when no step ends for `seconds`; again and again, until one does.

    The run itself is left alone: whoever reads the file decides. Where the file cannot be written any more, they go to
    standard error. A clock that is set meanwhile changes nothing.
    """

    def __init__(self, seconds: float, path: str | os.PathLike[str]) -> None:
        if not seconds > 0:
            raise LaminaError(f"watchdog is {seconds:g}, and must be more than 0 seconds")
        self.seconds = seconds
        self.fired = 0
        self._path = path
        self._beat = time.monotonic()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def beat(self) -> None:
        """A step has ended."""
        self._beat = time.monotonic()

    def __enter__(self) -> Watchdog:
        self.beat()
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._end.set()
        self._thread.join()

    def _watch(self) -> None:
        said = self._beat
        while not self._end.wait(min(self.seconds / 4, 1.0)):
            said = max(said, self._beat)
            if time.monotonic() - said >= self.seconds:
                self._say(time.monotonic() - self._beat)
                self.fired += 1
                said = time.monotonic()

    def _say(self, quiet: float) -> None:
        line = f"{time.strftime('%Y-%m-%dT%H:%M:%S%z')} no step for {quiet:.1f} s; what every thread is doing:\n"
        try:
            with open(self._path, "a") as file:
                file.write(line)
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
        except OSError:
            if sys.__stderr__ is not None:
                sys.__stderr__.write(line)
                faulthandler.dump_traceback(sys.__stderr__, all_threads=True)


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
