"""Where the figures of a run go besides its own file: TensorBoard, trackio, Weights & Biases.

An adapter can neither stop nor slow a run. It lives in a thread of its own behind a queue; what finds the queue full is
dropped and counted; an adapter that fails is said once and then left alone; one that hangs is left behind.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from lamina.errors import LaminaError
from lamina.specs import unknown

WAITING = 1000  # records that may wait for an adapter
PATIENCE = 10.0  # seconds that the end of a run waits for what is still in the queue


class Adapter(Protocol):
    """What shows the figures of a run."""

    def write(self, record: Mapping[str, Any]) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files in tensorboard/ below the run, for `tensorboard --logdir`."""

    def __init__(self, directory: Path, name: str, config: Mapping[str, Any]) -> None:
        writer = import_module("torch.utils.tensorboard").SummaryWriter
        self._writer = writer(str(directory / "tensorboard"))
        self._writer.add_text("config", str(dict(config)))

    def write(self, record: Mapping[str, Any]) -> None:
        for key, value in figures(record):
            self._writer.add_scalar(key, value, record["step"])
        if "sample" in record:
            self._writer.add_text("sample", record["sample"], record["step"])
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class Trackio:
    """trackio, which keeps its figures in a database of the user's."""

    def __init__(self, directory: Path, name: str, config: Mapping[str, Any]) -> None:
        self._trackio = import_module("trackio")
        self._trackio.init(project=directory.parent.name, name=name, config=dict(config))

    def write(self, record: Mapping[str, Any]) -> None:
        self._trackio.log(dict(figures(record)), step=record["step"])

    def close(self) -> None:
        self._trackio.finish()


class WeightsAndBiases:
    """wandb. Its own settings (WANDB_MODE=offline, ...) hold."""

    def __init__(self, directory: Path, name: str, config: Mapping[str, Any]) -> None:
        self._run = import_module("wandb").init(
            project=directory.parent.name, name=name, dir=str(directory), config=dict(config), resume="allow"
        )

    def write(self, record: Mapping[str, Any]) -> None:
        self._run.log(dict(figures(record)), step=record["step"])

    def close(self) -> None:
        self._run.finish()


ADAPTERS: Mapping[str, Callable[[Path, str, Mapping[str, Any]], Adapter]] = {
    "tensorboard": TensorBoard,
    "trackio": Trackio,
    "wandb": WeightsAndBiases,
}
"""By the name that the configuration gives them. Their packages are imported when they are used, in their threads."""


def figures(record: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, float]]:
    """The numbers of a record by their paths: {"validation": {"loss": 2.0}} -> ("validation/loss", 2.0)."""
    for key, value in record.items():
        if isinstance(value, Mapping):
            yield from figures(value, f"{above}{key}/")
        elif isinstance(value, int | float) and not isinstance(value, bool) and key != "step":
            yield f"{above}{key}", float(value)


class Behind:
    """An adapter behind a queue. `make` is called in its thread, and `warn` at most once, with one line, from there."""

    def __init__(
        self, name: str, make: Callable[[], Adapter], warn: Callable[[str], None], waiting: int = WAITING
    ) -> None:
        self.name = name
        self.failed: str | None = None  # why nothing more is sent
        self.dropped = 0
        self._make, self._warn = make, warn
        self._queue: queue.Queue[Mapping[str, Any] | None] = queue.Queue(waiting)
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._work, name=f"metrics to {name}", daemon=True)
        self._thread.start()

    def send(self, record: Mapping[str, Any]) -> None:
        """Returns at once, whatever the adapter does."""
        if self.failed is None:
            try:
                self._queue.put_nowait(dict(record))
            except queue.Full:
                self.dropped += 1

    def close(self, patience: float = PATIENCE) -> None:
        """Waits for what is queued, but no longer than `patience` seconds; then the thread is left to itself."""
        self._end.set()
        self._thread.join(patience)
        if self.failed is None and (self._thread.is_alive() or self.dropped):
            left = self._queue.qsize() + self.dropped
            self._fail(f"{self.name}: {left} records were not taken in time and are left out; metrics.jsonl has all")

    def _work(self) -> None:
        try:
            adapter = self._make()
            while (record := self._next()) is not None and self.failed is None:
                adapter.write(record)
            adapter.close()
        except (Exception, SystemExit) as error:  # whatever another's code may raise, the run goes on; and it is said
            why = f"{type(error).__name__}: {error}".splitlines()[0][:300]
            self._fail(f"{self.name}: {why}; the run goes on without it, and metrics.jsonl has all")

    def _next(self) -> Mapping[str, Any] | None:
        """The next record; None once the run has ended and the queue is empty."""
        while True:
            try:
                return self._queue.get(timeout=0.05)
            except queue.Empty:
                if self._end.is_set():
                    return None

    def _fail(self, line: str) -> None:
        if self.failed is None:
            self.failed = line
            self._warn(line)


class Metrics:
    """Every record to the run's own file first, then to the adapters.

    `own` writes the record (`Run.record`), and its errors do stop the run. `names`: of ADAPTERS. Raises LaminaError for
    a name that is none.
    """

    def __init__(
        self,
        own: Callable[[Mapping[str, Any]], None],
        names: tuple[str, ...] = (),
        directory: Path = Path(),
        config: Mapping[str, Any] | None = None,
        warn: Callable[[str], None] = lambda line: None,
    ) -> None:
        for name in names:
            if name not in ADAPTERS:
                raise LaminaError(unknown("metrics adapter", name, ADAPTERS))

        def maker(name: str) -> Callable[[], Adapter]:
            return lambda: ADAPTERS[name](directory, directory.name, config or {})

        self._own = own
        self.behind = tuple(Behind(name, maker(name), warn) for name in names)

    def record(self, record: Mapping[str, Any]) -> None:
        self._own(record)
        for each in self.behind:
            each.send(record)

    def close(self, patience: float = PATIENCE) -> None:
        for each in self.behind:
            each.close(patience)

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
