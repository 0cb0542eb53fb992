"""A run, from its configuration to its report: the loop with everything around it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lamina.adapters import merged_tensors
from lamina.adapting import write_adapter
from lamina.data import Order, Prepared
from lamina.errors import CheckpointError, LaminaError, UnsupportedError
from lamina.generation import generate
from lamina.model import Model
from lamina.specs import Spec
from lamina.train import checkpoint
from lamina.train.building import data_of, fingerprint, fits, flops, model_of, trained, unlike, write
from lamina.train.directory import ADAPTER, CHECKPOINTS, CONFIG, MODEL
from lamina.train.document import decode, parse
from lamina.train.document import write as text_of
from lamina.train.finite import Finite
from lamina.train.generators import generators
from lamina.train.guards import Signals, Spikes, Watchdog
from lamina.train.loader import Loader, held_out
from lamina.train.loop import Evaluated, Step, Trainer
from lamina.train.metrics import Metrics
from lamina.train.peak import peak
from lamina.train.precision import NAMES
from lamina.train.report import write_report
from lamina.train.run import Run
from lamina.train.specs import TrainSpec

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


@dataclass(frozen=True)
class Tick:
    """What is shown after a step."""

    step: Step
    steps: int
    tokens_per_second: float
    utilisation: float | None  # of the machine's best product
    left: float  # seconds


Show = Callable[[Tick | str], None]


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
    found = _checkpoint(directory, resume, show)
    if found is not None:
        _refuse_changes(directory, spec, found, data)
    model = model_of(spec.model, data, seed=spec.seed, device=device)
    fits(spec, model)
    trained(spec, model)
    base = None if spec.adapter is None else fingerprint(model)
    if found is not None and base is not None:
        _refuse_another(spec, model, found, base)
    examples = spec.objective.examples(data, spec.data.length)
    loop = spec.loop
    loader = Loader(
        spec.objective,
        examples,
        Order(max(len(examples), 1), spec.seed),
        batch=loop.batch,
        micro=loop.micro or loop.batch,
        seed=spec.seed,
        workers=spec.data.workers,
    )
    trainer = Trainer(model, spec.objective, loader, spec.optimiser, spec.schedule, loop, seed=spec.seed, device=device)
    if found is not None:
        _resume(trainer, found)
    with ExitStack() as stack:
        stack.callback(loader.close)
        run = stack.enter_context(
            Run(directory, text_of(spec), command=command, spec=model.spec.to_json(), resume=resume != "none")
        )
        if found is not None:
            run.cut_back(trainer.progress.step)
        signals = stack.enter_context(Signals())
        metrics = stack.enter_context(
            Metrics(run.record, spec.log.adapters, run.directory, {"config": text_of(spec)}, run.warn)
        )
        around = _Around(spec, trainer, run, metrics, data, held, show, base)
        watchdog = stack.enter_context(Watchdog(QUIET, run.directory / "events.log"))
        last = around.go(signals, watchdog)
        ended = trainer.progress.step >= loop.steps
        validation = around.evaluated
        kept = None
        if ended:
            weights = trainer.tensors()
            chosen = weights[trainer.kept] | weights.get("average", {})
            if spec.adapter is not None:
                kept = run.directory / ADAPTER
                write_adapter(model, kept, values=chosen, force=True)
                run.event(f"the adapter is in {kept}")
                chosen = merged_tensors(model, chosen)
            if spec.adapter is None or spec.adapter.merge:
                kept = run.directory / MODEL
                layout = write(model, chosen, kept, data)
                run.event(f"the model is in {kept} ({layout} layout)")
        seconds = time.perf_counter() - begun
        figures = {} if validation is None else {"validation loss": validation.loss, **around.more(validation)}
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


class _Around:
    """What happens around the steps: figures, evaluations, samples, checkpoints."""

    def __init__(
        self,
        spec: TrainSpec,
        trainer: Trainer,
        run: Run,
        metrics: Metrics,
        data: Prepared,
        held: Prepared | None,
        show: Show,
        base: str | None,
    ) -> None:
        self.spec, self.trainer, self.run, self.metrics = spec, trainer, run, metrics
        self.data, self.held, self.show, self.base = data, held, show, base
        self.finite = Finite(spec.loop.max_skips, run.directory)
        trainer.check = self.finite.check
        self.spikes = Spikes()
        self.evaluated: Evaluated | None = None
        self.rate = 0.0
        self.flops = _flops(spec, trainer)
        self.saved = trainer.progress.step

    def go(self, signals: Signals, watchdog: Watchdog) -> Step | None:
        """Steps, until there are no more or somebody asks to stop."""
        trainer, spec = self.trainer, self.spec
        step: Step | None = None
        clock, tokens, timed = time.perf_counter(), 0, 0.0
        while trainer.progress.step < spec.loop.steps and signals.asked != "stop":
            step = trainer.step()
            watchdog.beat()
            tokens, timed = tokens + step.tokens, timed + step.seconds
            for said in (self.finite.said if step.skipped else None, self.spikes.check(step.step, step.loss)):
                if said:
                    self.run.warn(said)
                    self.show(f"warning: {said}")
            last = step.step == spec.loop.steps
            if step.step % spec.log.every == 0 or last or step.step == 1:
                self._log(step, tokens, timed, time.perf_counter() - clock)
                tokens, timed = 0, 0.0
            if last or (spec.evaluation.every and step.step % spec.evaluation.every == 0):
                self._evaluate(step.step)
            due = spec.checkpoints.every and step.step % spec.checkpoints.every == 0
            if last or due or signals.asked == "save":
                self._save()
                signals.done()
            watchdog.beat()
        if signals.asked == "stop" and self.saved != trainer.progress.step:
            self._save()
        return step

    def _log(self, step: Step, tokens: int, seconds: float, since: float) -> None:
        self.rate = tokens / seconds if seconds else 0.0
        best = peak(self.trainer.device.type, NAMES[self.spec.loop.precision])
        used = None if self.flops is None else self.rate * self.flops / best
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
        self.metrics.record(record)
        remaining = (self.spec.loop.steps - step.step) * step.seconds
        self.show(Tick(step, self.spec.loop.steps, self.rate, used, remaining))

    def _evaluate(self, step: int) -> None:
        chosen, spec = self.spec.evaluation, self.spec
        if self.held is not None:
            examples = spec.objective.examples(self.held, spec.data.length)
            if len(examples) == 0:
                raise LaminaError(f"{spec.data.validation}: holds no example of {spec.data.length} tokens")
            micro = spec.loop.micro or spec.loop.batch
            batches = held_out(spec.objective, examples, rows=chosen.rows, micro=micro, seed=spec.seed)
            self.evaluated = self.trainer.evaluate(batches)
            figures = {"loss": self.evaluated.loss, **self.more(self.evaluated)}
            self.metrics.record({"step": step, "validation": figures})
            self.show(f"step {step}: validation loss {self.evaluated.loss:.4f}")
        if chosen.prompts:
            for text in self._samples():
                self.run.sample(step, text)
                self.show(f"step {step}: {text}")

    def more(self, found: Evaluated) -> dict[str, float]:
        """Figures of an evaluation beside the loss."""
        figures = {name: value for name, value in found.parts.items() if name != "nats"}
        if self.held is not None and self.held.kind == "text" and "nats" in found.parts:
            size = sum(source.bytes for source in self.held.manifest.sources)
            if size:
                figures["bits_per_byte"] = found.loss / math.log(2) * self.held.tokens / size
        return figures

    def _samples(self) -> Iterator[str]:
        model, words = self.trainer.model, self.data.tokenizer()
        if model.decoder is None or model.head is None or model.spec.two_stacks:
            raise UnsupportedError("evaluation.prompts are for models that continue a text")
        model.eval()
        try:
            for number, prompt in enumerate(self.spec.evaluation.prompts):
                ids = torch.tensor([words.encode(prompt)], device=self.trainer.device)
                room = (model.spec.context or 1 << 30) - ids.shape[1]
                new = min(self.spec.evaluation.tokens, room)
                if new < 1 or ids.shape[1] == 0:
                    raise LaminaError(f"evaluation.prompts.{number} has {ids.shape[1]} tokens: nothing can follow")
                out = generate(model, ids, max_new_tokens=new, temperature=0.8, seed=self.spec.seed)
                yield words.decode(out[0].tolist())
        finally:
            model.train()

    def _save(self) -> None:
        step = self.trainer.progress.step
        files = {"config.yaml": text_of(self.spec).encode()}
        if self.base is None:  # with an adapter the folder holds no model
            files["spec.json"] = self.trainer.model.spec.to_json().encode()
        content = checkpoint.Content(
            tensors=self.trainer.tensors(),
            state={"progress": self.trainer.progress.to_dict(), "generators": generators(), "base": self.base},
            files=files,
        )
        about = {"spec": _hash(self.trainer.model.spec), "data": self.data.hash}
        path = checkpoint.save(self.run.checkpoints, step, content, about=about, keep=self.spec.checkpoints.keep)
        self.saved = step
        self.run.event(f"checkpoint {path.name}")


def _flops(spec: TrainSpec, trainer: Trainer) -> int | None:
    """Arithmetic of a token in training; None for models that `account` cannot run, such as those without ids."""
    try:
        return flops(spec, trainer.model.spec)
    except UnsupportedError:
        return None


def _memory(device: torch.device) -> int:
    """Bytes at the peak so far: of the device, or of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _hash(spec: Spec) -> str:
    import hashlib

    return hashlib.sha256(spec.to_json().encode()).hexdigest()


def _checkpoint(directory: Path, resume: str, show: Show) -> checkpoint.Saved | None:
    """The checkpoint to go on from, if any; what was skipped on the way to it is said."""
    if resume == "none":
        return None
    if resume != "auto":
        return checkpoint.read(resume)
    path, skipped = checkpoint.newest_valid(directory / CHECKPOINTS)
    for other, why in skipped:
        show(f"warning: {other.name} is skipped: {why}")
    return None if path is None else checkpoint.read(path)


def _refuse_changes(directory: Path, spec: TrainSpec, found: checkpoint.Saved, data: Prepared) -> None:
    """A run goes on as what it was: another model, optimiser or text would be another run."""
    text = (found.path / CONFIG).read_text(encoding="utf-8")
    before = decode(TrainSpec, parse(text, str(found.path / CONFIG)))
    rows = unlike(before, spec)
    if rows:
        raise LaminaError(f"{directory} cannot go on with another configuration: {'; '.join(rows)}")
    if found.manifest.data != data.hash:
        raise LaminaError(
            f"{spec.data.train}: its content differs from what {found.path.name} of {directory} was trained on"
        )


def _refuse_another(spec: TrainSpec, model: Model, found: checkpoint.Saved, base: str) -> None:
    """A checkpoint of an adapter is of use with the model that it was trained on, and with no other."""
    said = found.state.get("base")
    if found.manifest.spec != _hash(model.spec) or said != base:
        what = "spec" if found.manifest.spec != _hash(model.spec) else "weights"
        source = spec.model.source or "the model"
        raise LaminaError(f"{source}: its {what} differ from those that the adapter of {found.path} was trained on")


def _resume(trainer: Trainer, found: checkpoint.Saved) -> None:
    needed = {trainer.kept, "optimiser"} | ({"average"} if trainer.average is not None else set())
    if missing := needed - set(found.files):
        raise CheckpointError(f"{found.path}: holds no {sorted(missing)[0]}.safetensors")
    tensors: Mapping[str, Any] = {name: found.tensors(name) for name in needed}
    trainer.load(tensors, found.state["progress"])
