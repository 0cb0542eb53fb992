"""A run, from its configuration to its report: the loop with everything around it."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
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
from lamina.train.building import (
    Beside,
    data_of,
    filled,
    fingerprint,
    fits,
    flops,
    model_of,
    spec_of,
    trained,
    unlike,
    write,
)
from lamina.train.directory import ADAPTER, CHECKPOINTS, CONFIG, MODEL, PARTS
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
from lamina.train.ranks import Alone, Ranks, Together
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
    mesh = _mesh(spec, data, device)
    model = model_of(spec.model, data, seed=spec.seed, device=device if mesh is None else mesh.device)
    fits(spec, model)
    trained(spec, model)
    base = None if spec.adapter is None else fingerprint(model)
    if found is not None and base is not None:
        _refuse_another(spec, model, found, base)
    ranks: Ranks = Alone()
    if mesh is not None:
        from lamina.parallel import distribute

        half = None if spec.loop.precision == "float32" else spec.loop.precision
        ranks = Together(mesh, distribute(model, mesh, precision=half))
        device = str(mesh.device)
    task = spec.objective.ready(Beside(data, spec.loop.precision, device))
    task.fits(model.spec)
    examples = task.examples(data, spec.data.length)
    loop = spec.loop
    loader = Loader(
        task,
        examples,
        Order(max(len(examples), 1), spec.seed),
        batch=loop.batch,
        micro=loop.micro or max(loop.batch // ranks.data_ranks, 1),
        seed=spec.seed,
        rank=ranks.data,
        ranks=ranks.data_ranks,
        workers=spec.data.workers,
    )
    trainer = Trainer(
        model, task, loader, spec.optimiser, spec.schedule, loop, seed=spec.seed, ranks=ranks, device=device
    )
    if found is not None:
        _resume(trainer, found)
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
        around = _Around(spec, trainer, run, data, held, show if ranks.first else lambda said: None, base)
        if run is not None:
            config = {"config": text_of(spec)}
            around.metrics = stack.enter_context(
                Metrics(run.record, spec.log.adapters, run.directory, config, run.warn)
            )
        watchdog = stack.enter_context(Watchdog(QUIET, directory / "events.log"))
        last = around.go(signals, watchdog)
        ended = trainer.progress.step >= loop.steps
        validation = around.evaluated
        kept: Path | None = None
        if ended:
            weights = trainer.tensors()
            chosen: Mapping[str, Any] = weights[trainer.kept] | weights.get("average", {})
            if spec.adapter is not None:
                kept = folder = directory / ADAPTER
                ranks.write(chosen, lambda whole: write_adapter(model, folder, values=_read(whole), force=True))
                around.say(f"the adapter is in {kept}")
            if spec.adapter is None or spec.adapter.merge:
                kept = place = directory / MODEL
                ranks.write(
                    {**model.state_dict(), **chosen},
                    lambda whole: around.say(
                        f"the model is in {place} ({write(model, _plain(model, whole), place, data)})"
                    ),
                )
        seconds = time.perf_counter() - begun
        figures = {} if validation is None else {"validation loss": validation.loss, **around.more(validation)}
        around.say(f"ended at step {trainer.progress.step} of {loop.steps} after {seconds:.1f} s")
        report = None if run is None else write_report(run.directory, figures)
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
        run: Run | None,
        data: Prepared,
        held: Prepared | None,
        show: Show,
        base: str | None,
    ) -> None:
        self.spec, self.trainer, self.run, self.ranks = spec, trainer, run, trainer.ranks
        self.metrics: Metrics | None = None
        self.data, self.held, self.show, self.base = data, held, show, base
        self.finite = Finite(spec.loop.max_skips, None if run is None else run.directory)
        trainer.check = self.finite.check
        self.spikes = Spikes()
        self.evaluated: Evaluated | None = None
        self.rate = 0.0
        self.flops = _flops(spec, trainer)
        self.best = 0.0  # FLOP/s of the machine's best product

    def go(self, signals: Signals, watchdog: Watchdog) -> Step | None:
        """Steps, until there are no more or somebody asks to stop."""
        trainer, spec = self.trainer, self.spec
        step: Step | None = None
        clock, tokens, timed = time.perf_counter(), 0, 0.0
        stop = False
        while trainer.progress.step < spec.loop.steps and not stop:
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
                self._evaluate(step.step)
            due = spec.checkpoints.every and step.step % spec.checkpoints.every == 0
            # All ranks do what any of them was asked.
            stop, save = (asked > 0 for asked in self.ranks.sum([signals.asked == "stop", signals.asked == "save"]))
            if last or due or save or stop:
                self._save()
                signals.done()
            watchdog.beat()
        return step

    def say(self, text: str) -> None:
        """Into the events of the run."""
        if self.run is not None:
            self.run.event(text)

    def _record(self, record: dict[str, Any]) -> None:
        if self.metrics is not None:
            self.metrics.record(record)

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
        self._record(record)
        remaining = (self.spec.loop.steps - step.step) * step.seconds
        self.show(Tick(step, self.spec.loop.steps, self.rate, used, remaining))

    def _evaluate(self, step: int) -> None:
        chosen, spec = self.spec.evaluation, self.spec
        if self.held is not None:
            task = self.trainer.objective
            examples = task.examples(self.held, spec.data.length)
            if len(examples) == 0:
                raise LaminaError(f"{spec.data.validation}: holds no example of {spec.data.length} tokens")
            micro = spec.loop.micro or spec.loop.batch
            batches = held_out(task, examples, rows=chosen.rows, micro=micro, seed=spec.seed)
            self.evaluated = self.trainer.evaluate(batches)
            figures = {"loss": self.evaluated.loss, **self.more(self.evaluated)}
            self._record({"step": step, "validation": figures})
            self.show(f"step {step}: validation loss {self.evaluated.loss:.4f}")
        if chosen.prompts:
            model = self.trainer.model
            if self.ranks.world == 1:
                self._sample(step, model)
            else:  # of what ranks hold, the first makes a model that it runs by itself
                self.ranks.write(
                    model.state_dict(), lambda whole: self._sample(step, filled(model, _plain(model, whole)))
                )

    def more(self, found: Evaluated) -> dict[str, float]:
        """Figures of an evaluation beside the loss."""
        figures = {name: value for name, value in found.parts.items() if name != "next_token"}
        if self.held is not None and self.held.kind == "text" and "next_token" in found.parts:
            figures["bits_per_byte"] = found.loss / math.log(2) / self.bytes_per_token
        return figures

    @cached_property
    def bytes_per_token(self) -> float:
        """How much text a held-out token stands for, in up to a million of them."""
        assert self.held is not None
        ids = self.held.column("text").slice(0, min(self.held.tokens, 1_000_000)).tolist()
        return max(len(self.held.tokenizer().decode(ids).encode("utf-8", "replace")), 1) / len(ids)

    def _sample(self, step: int, model: Model) -> None:
        if self.run is not None:
            for number, text in enumerate(self._samples(model)):
                self.run.sample(step, text, number)
                self.show(f"step {step}: {text}")

    def _samples(self, model: Model) -> Iterator[str]:
        words, training = self.data.tokenizer(), model.training
        model.eval()
        try:
            for number, prompt in enumerate(self.spec.evaluation.prompts):
                ids = torch.tensor([words.encode(prompt)], device=model.embedding.weight.device)
                pair = model.spec.two_stacks  # which reads the prompt, and writes a text of its own
                room = (model.spec.context or 1 << 30) - (1 if pair else ids.shape[1])
                new = min(self.spec.evaluation.tokens, room)
                if new < 1 or ids.shape[1] == 0:
                    raise LaminaError(f"evaluation.prompts.{number} has {ids.shape[1]} tokens: nothing can follow")
                out = generate(model, ids, max_new_tokens=new, temperature=0.8, seed=self.spec.seed)
                text = words.decode(out[0].tolist())
                yield f"{prompt} -> {text}" if pair else text
        finally:
            model.train(training)

    def _save(self) -> None:
        step, parts = self.trainer.progress.step, self.trainer.tensors()
        flat = {f"{file}/{name}": tensor for file, part in parts.items() for name, tensor in part.items()}
        if self.spec.checkpoints.layout == "whole":
            self.ranks.write(
                flat, lambda whole: self._keep(step, self._content({file: _Part(file, whole) for file in parts}))
            )
            return
        content, size = self._content({}), sum(tensor.numel() * tensor.itemsize for tensor in flat.values())

        def save(write: Callable[[Path], None]) -> None:
            def fill(folder: Path) -> None:
                write(folder / PARTS)
                content.write(folder)

            self._keep(step, fill, size)

        self.ranks.parts(flat, save)

    def _content(self, parts: Mapping[str, Mapping[str, Any]]) -> checkpoint.Content:
        files = {"config.yaml": text_of(self.spec).encode()}
        if parts and self.base is None:  # else the folder holds no model
            files["spec.json"] = self.trainer.model.spec.to_json().encode()
        return checkpoint.Content(
            tensors=parts,
            state={"progress": self.trainer.progress.to_dict(), "generators": generators(), "base": self.base},
            files=files,
        )

    def _keep(self, step: int, content: checkpoint.Content | checkpoint.Write, estimate: int | None = None) -> None:
        """Where this rank is the first: write it down."""
        assert self.run is not None
        mesh = {name: getattr(self.spec.mesh, name) for name in self.spec.mesh.__dataclass_fields__}
        about = {
            "spec": _hash(self.trainer.model.spec),
            "data": self.data.hash,
            "world": self.ranks.world,
            "mesh": mesh,
        }
        keep = self.spec.checkpoints.keep
        path = checkpoint.save(self.run.checkpoints, step, content, about=about, estimate=estimate, keep=keep)
        self.run.event(f"checkpoint {path.name}")


class _Part(dict[str, Any]):
    """One file of a checkpoint, of tensors that are put together when they are asked for."""

    def __init__(self, file: str, whole: Mapping[str, Any]) -> None:
        self.file, self.whole = file, whole
        names = [name for name in whole if name.startswith(f"{file}/")]
        super().__init__({name.partition("/")[2]: dict.get(whole, name) for name in names})  # pyright: ignore

    def __getitem__(self, name: str) -> Any:
        return self.whole[f"{self.file}/{name}"]


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


def _read(whole: Mapping[str, Any]) -> dict[str, Any]:
    """Tensors that are put together when they are asked for, all of them."""
    return {name: whole[name] for name in whole}


def _plain(model: Model, whole: Mapping[str, Any]) -> Mapping[str, Any]:
    """Those of the model without its adapter, which is folded into them."""
    return whole if model.adapter is None else merged_tensors(model, _read(whole))


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
    if any(name.startswith(f"{PARTS}/") for name in found.manifest.files):
        _resume_parts(trainer, found)
        return
    needed = {trainer.kept, "optimiser"} | ({"average"} if trainer.average is not None else set())
    if missing := needed - set(found.files):
        raise CheckpointError(f"{found.path}: holds no {sorted(missing)[0]}.safetensors")
    tensors: Mapping[str, Any] = {name: found.tensors(name) for name in needed}
    trainer.load(tensors, found.state["progress"])


def _resume_parts(trainer: Trainer, found: checkpoint.Saved) -> None:
    """From a checkpoint of which each rank has written its part: each reads what it needs."""
    from lamina.parallel.checkpoint import METADATA_FILE, read_metadata

    folder = found.path / PARTS
    tensors: dict[str, dict[str, torch.Tensor]] = {trainer.kept: {}, "optimiser": {}, "average": {}}
    names: dict[int, str] = {}
    for key, entry in read_metadata(folder / METADATA_FILE).state_dict_metadata.items():
        file, _, name = key.partition("/")
        like = torch.empty(entry.size, dtype=entry.properties.dtype, device="meta")  # pyright: ignore
        tensors.setdefault(file, {})[name] = like
        names[id(like)] = key
    trainer.load(
        tensors,
        found.state["progress"],
        lambda pairs: trainer.ranks.read_parts(folder, {names[id(like)]: place for place, like in pairs}),
    )
