"""Steps that are not finite: skipped, looked into, counted and bounded."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lamina.durable import write_file
from lamina.errors import TrainingError
from lamina.train.directory import NONFINITE
from lamina.train.ranks import local
from lamina.train.records import without_infinities


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
        here = [(name, parameter) for name, parameter in model.named_parameters() if not parameter.is_meta]
        for name, parameter in here:
            if not bool(parameter.isfinite().all()):
                return {"parameter": name, **_counts(parameter), "words": f"parameter {name} holds what is not finite"}
        if again is not None:
            part = first_bad(model, again)
            if part is not None:
                return part | {"words": f"the first part whose output is not finite is {part['part']}"}
        for name, parameter in here:
            gradient = None if parameter.grad is None else local([parameter.grad])[0]
            if gradient is not None and not bool(gradient.isfinite().all()):
                words = f"the forward pass is finite; the gradient of {name} is not"
                words = f"the gradient of {name} is not finite" if again is None else words
                return {"gradient": name, **_counts(gradient), "words": words}
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
