"""What a model is trained to do: each file an objective, as published."""

from __future__ import annotations

from lamina.objectives.causal import CausalLM
from lamina.objectives.loss import IGNORE, Losses, cross_entropy, label_cross_entropy
from lamina.objectives.objective import Batch, ByIndex, Example, Examples, Objective, Total

__all__ = [
    "IGNORE",
    "Batch",
    "ByIndex",
    "CausalLM",
    "Example",
    "Examples",
    "Losses",
    "Objective",
    "Total",
    "cross_entropy",
    "label_cross_entropy",
]
