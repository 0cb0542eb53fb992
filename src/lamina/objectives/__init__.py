"""What a model is trained to do: each file an objective, as published."""

from __future__ import annotations

from lamina.objectives.causal import CausalLM
from lamina.objectives.contrastive import Contrastive
from lamina.objectives.denoising import Denoising
from lamina.objectives.distillation import Distillation, Taught
from lamina.objectives.loss import IGNORE, Losses, cross_entropy, label_cross_entropy
from lamina.objectives.masked import MaskedLM
from lamina.objectives.objective import Batch, ByIndex, Example, Examples, Neighbours, Objective, Opening, Task, Total
from lamina.objectives.pairs import SequenceToSequence
from lamina.objectives.prefix import PrefixLM
from lamina.objectives.retrieval import RetrievalLM, Retrieving
from lamina.objectives.sequence_classes import SequenceClassification
from lamina.objectives.spans import SpanCorruption
from lamina.objectives.token_classes import TokenClassification

Asking = (
    CausalLM
    | PrefixLM
    | MaskedLM
    | SpanCorruption
    | Denoising
    | SequenceToSequence
    | SequenceClassification
    | TokenClassification
    | Contrastive
    | Distillation
    | RetrievalLM
)
"""Every objective that a configuration can name."""

__all__ = [
    "IGNORE",
    "Asking",
    "Batch",
    "ByIndex",
    "CausalLM",
    "Contrastive",
    "Denoising",
    "Distillation",
    "Example",
    "Examples",
    "Losses",
    "MaskedLM",
    "Neighbours",
    "Objective",
    "Opening",
    "PrefixLM",
    "RetrievalLM",
    "Retrieving",
    "SequenceClassification",
    "SequenceToSequence",
    "SpanCorruption",
    "Task",
    "Taught",
    "TokenClassification",
    "Total",
    "cross_entropy",
    "label_cross_entropy",
]
