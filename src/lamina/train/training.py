"""A run, from its configuration to its report: the loop with everything around it."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lamina.data import Order, Prepared
from lamina.document import write as text_of
from lamina.train.around import Around, Show, Tick
from lamina.train.building import Beside, data_of, fingerprint, fits, model_of, spec_of, trained
from lamina.train.evaluating import Evaluator, check_goal
from lamina.train.guards import Signals, Watchdog
from lamina.train.loader import Loader, rows_at_once
from lamina.train.loop import Evaluated, Trainer
from lamina.train.metrics import Metrics
from lamina.train.ranks import Alone, Ranks, Together
from lamina.train.report import write_report
from lamina.train.run import Run
from lamina.train.saving import Saver, found_checkpoint, go_on, refuse_another, refuse_changes
from lamina.train.specs import TrainSpec

__all__ = ["Result", "Show", "Tick", "train"]

QUIET = 600.0
"""Seconds without a step after which the watchdog writes down what every thread does."""


@dataclass
class Result:
    """How a run ended."""

    directory: Path
    step: int
    tokens: int
    loss: float | None  # of the last step made here
    validation: Evaluated | None  # at the end
    seconds: float
    tokens_per_second: float
    skipped: int
    status: int  # 0; 143 after SIGTERM, 130 after SIGINT
    model: Path | None = None  # where the trained model lies, once the run is through
    report: Path | None = None


def train(
    spec: TrainSpec,
    directory: Path,
    *,
    resume: str = "none",
    command: Sequence[str] = (),
    show: Show = lambda said: None,
    device: str = "cpu",
) -> Result:
    """Train as `spec` says, in `directory`, which keeps all that is known of the run.

    resume: "none" needs a directory without a run; "auto" goes on from its newest whole checkpoint where it has one;
    else the path of a checkpoint. Raises LaminaError for what does not fit, TrainingError where a run cannot go on.
    """
    begun = time.perf_counter()
    data, held = data_of(spec.data)
    found = found_checkpoint(directory, resume, show)
    if found is not None:
        refuse_changes(directory, spec, found, data)
    mesh = _mesh(spec, data, device)
    model = model_of(spec.model, data, seed=spec.seed, device=device if mesh is None else mesh.device)
    fits(spec, model)
    trained(spec, model)
    base = None if spec.adapter is None else fingerprint(model)
    if found is not None and base is not None:
        refuse_another(spec, model, found, base)
    ranks: Ranks = Alone()
    if mesh is not None:
        from lamina.parallel import distribute

        half = None if spec.loop.precision == "float32" else spec.loop.precision
        ranks = Together(mesh, distribute(model, mesh, precision=half))
        device = str(mesh.device)
    task = spec.objective.ready(Beside(data, spec.loop.precision, device))
    task.fits(model.spec)
    examples = task.examples(data, spec.data.length)
    check_goal(spec, task, held)
    loop = spec.loop
    loader = Loader(
        task,
        examples,
        Order(max(len(examples), 1), spec.seed),
        batch=loop.batch,
        micro=loop.micro or rows_at_once(spec, model.spec, max(loop.batch // ranks.data_ranks, 1)),
        seed=spec.seed,
        rank=ranks.data,
        ranks=ranks.data_ranks,
        workers=spec.data.workers,
    )
    trainer = Trainer(
        model, task, loader, spec.optimiser, spec.schedule, loop, seed=spec.seed, ranks=ranks, device=device
    )
    if found is not None:
        go_on(trainer, found)
    with ExitStack() as stack:
        stack.callback(loader.close)
        if mesh is not None:
            from lamina.parallel import close_mesh

            stack.callback(close_mesh)
        run = None
        if ranks.first:
            run = stack.enter_context(
                Run(directory, text_of(spec), command=command, spec=model.spec.to_json(), resume=resume != "none")
            )
        if found is not None and run is not None:
            run.cut_back(trainer.progress.step)
        signals = stack.enter_context(Signals())
        said, record = show if ranks.first else lambda said: None, lambda record: None
        if run is not None:
            config = {"config": text_of(spec)}
            metrics = stack.enter_context(Metrics(run.record, spec.log.adapters, run.directory, config, run.warn))
            record = metrics.record
        evaluator = Evaluator(spec, trainer, run, data, held, record, said)
        saver = Saver(spec, trainer, run, data, base)
        around = Around(spec, trainer, run, evaluator, saver, record, said)
        watchdog = stack.enter_context(Watchdog(QUIET, directory / "events.log"))
        last = around.go(signals, watchdog)
        kept = saver.finish(directory) if around.ended else None
        validation = evaluator.last
        seconds = time.perf_counter() - begun
        figures = {} if validation is None else {"validation loss": validation.loss, **evaluator.more(validation)}
        report = None
        if run is not None:
            run.event(f"ended at step {trainer.progress.step} of {loop.steps} after {seconds:.1f} s")
            report = write_report(run.directory, figures)
    return Result(
        directory=directory,
        step=trainer.progress.step,
        tokens=trainer.progress.tokens,
        loss=None if last is None else last.loss,
        validation=validation,
        seconds=seconds,
        tokens_per_second=around.rate,
        skipped=trainer.progress.skipped,
        status=signals.status,
        model=kept,
        report=report,
    )


def _mesh(spec: TrainSpec, data: Prepared, device: str) -> Any:
    """The mesh of a run on several ranks; None for a process by itself. Refused before anything is built."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1 and spec.mesh.replace(shard=max(spec.mesh.shard, 1)).ranks == 1:
        return None
    from lamina.parallel import open_mesh, plan
    from lamina.source import spec as described

    found = spec_of(spec.model, data) or described(str(spec.model.source))
    plan(spec.mesh, world, found)
    return open_mesh(spec.mesh, found, device=device)
