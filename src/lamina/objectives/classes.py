"""What classifying texts and classifying tokens have in common."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from lamina.errors import LaminaError, UnsupportedError
from lamina.model import ModelSpec
from lamina.objectives.objective import Batch, Example, inputs_of


def check_smoothing(smoothing: float) -> None:
    """Raise LaminaError for a label smoothing that leaves nothing of the labels."""
    if not 0 <= smoothing < 1:
        raise LaminaError(f"smoothing is {smoothing}; it must lie within 0 and 1")


def needs_labels(spec: ModelSpec, task: Literal["sequence", "token"]) -> None:
    """Raise UnsupportedError where a model has no label head for this."""
    if spec.labels is None or spec.labels.task != task:
        raise UnsupportedError(f"an objective of {task} classes needs a label head for {task}s")


def class_batch(examples: Sequence[Example], labels: Tensor) -> Batch:
    """The texts of some examples, and their classes (B,) or (B, T)."""
    return Batch(inputs_of([one["input_ids"] for one in examples]), {"class": labels})
