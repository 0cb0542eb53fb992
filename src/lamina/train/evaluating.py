"""What a run is measured by on the way: the loss on held-out text, and texts that it writes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any

import torch

from lamina.data import Prepared
from lamina.errors import LaminaError
from lamina.generation import generate
from lamina.model import Model
from lamina.objectives import Task
from lamina.specs import unknown
from lamina.train.building import filled
from lamina.train.loader import held_out
from lamina.train.loop import Evaluated, Trainer
from lamina.train.run import Run
from lamina.train.saving import plain
from lamina.train.specs import TrainSpec


def check_goal(spec: TrainSpec, task: Task, held: Prepared | None) -> None:
    """Raise LaminaError where `evaluation.until` asks for a loss that nothing measures."""
    until = spec.evaluation.until
    if not until:
        return
    if held is None:
        raise LaminaError("evaluation.until needs data.validation: it is about the loss of held-out text")
    batch = next(held_out(task, task.examples(held, spec.data.length), rows=1, micro=1, seed=spec.seed), None)
    if batch is None:
        return  # the first evaluation says so
    for name in until:
        if name not in (known := ("loss", *batch.labels)):
            raise LaminaError(f"evaluation.until: {unknown('loss', name, known)}")


class Evaluator:
    """Evaluates and samples. `held`: the held-out data, if there is any; `record` and `show` get what was found."""

    def __init__(
        self,
        spec: TrainSpec,
        trainer: Trainer,
        run: Run | None,
        data: Prepared,
        held: Prepared | None,
        record: Callable[[dict[str, Any]], None],
        show: Callable[[str], None],
    ) -> None:
        self.spec, self.trainer, self.run, self.ranks = spec, trainer, run, trainer.ranks
        self.data, self.held, self.record, self.show = data, held, record, show
        self.last: Evaluated | None = None

    def evaluate(self, step: int) -> None:
        """Of what is held out, and then a text for each prompt."""
        chosen, spec = self.spec.evaluation, self.spec
        if self.held is not None:
            task = self.trainer.objective
            examples = task.examples(self.held, spec.data.length)
            if len(examples) == 0:
                raise LaminaError(f"{spec.data.validation}: holds no example of {spec.data.length} tokens")
            micro = spec.loop.micro or spec.loop.batch
            batches = held_out(task, examples, rows=chosen.rows, micro=micro, seed=spec.seed)
            self.last = self.trainer.evaluate(batches)
            figures = {"loss": self.last.loss, **self.more(self.last)}
            self.record({"step": step, "validation": figures})
            self.show(f"step {step}: validation loss {self.last.loss:.4f}")
        if chosen.prompts:
            model = self.trainer.model
            if self.ranks.world == 1:
                self._sample(step, model)
            else:  # of what ranks hold, the first makes a model that it runs by itself
                self.ranks.write(
                    model.state_dict(), lambda whole: self._sample(step, filled(model, plain(model, whole)))
                )

    @property
    def reached(self) -> bool:
        """Whether held-out losses have come down to what the run is to go on for."""
        until, last = self.spec.evaluation.until, self.last
        if not until or last is None:
            return False
        return all({"loss": last.loss, **last.parts}[name] <= goal for name, goal in until.items())

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
