"""Conformance: which of the properties that always hold (docs/conformance.md) hold for a given model, of lamina or of
transformers.

Every property is tried on the model itself, on few random tokens. Where two ways of computing one number are compared,
they may differ by `FACTOR` units of the dtype's precision, relative to the largest number; elsewhere by nothing at all.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn

from lamina.conformance import attention, decoding, files, learning, own, refusals, state, tokens
from lamina.conformance.opened import open_with_transformers
from lamina.conformance.ours import Ours
from lamina.conformance.pretrained import Pretrained
from lamina.conformance.report import FACTOR, RAISED, Report, Row, failed
from lamina.conformance.retrieval import retrieval
from lamina.conformance.subject import Subject
from lamina.errors import LaminaError
from lamina.model import Model

CHECKS: tuple[Callable[[Subject], Iterator[Row]], ...] = (
    state.finite_weights,
    state.memoryless,
    state.repeated_forward,
    state.backends,
    decoding.cached_decoding,
    tokens.padding,
    tokens.order,
    tokens.packing,
    tokens.placing,
    tokens.empty_rows,
    tokens.hidden_nan,
    tokens.causality,
    refusals.refusals,
    decoding.repeated_generation,
    learning.router_losses,
    learning.going_on,
    files.casting,
    files.saving,
)
"""What every model is asked. Those that change what a model keeps to itself, if it does, come first."""

OWN: tuple[Callable[[Model], Iterator[Row]], ...] = (
    own.spec_as_json,
    own.documents,
    own.blind_rows,
    retrieval,
    attention.reach,
    attention.blindness,
    own.compiled_step,
)
"""What only a model of lamina can be asked."""


@torch.no_grad()
def verify(model: Any, *, progress: Callable[[Row], None] | None = None) -> Report:
    """Try every property on `model`, in evaluation mode. `progress` is called with each row as it comes.

    `model` is of lamina, or any of transformers that reads ids; that one is asked what can be asked from outside. A
    model of yet another library comes as a `Subject` that answers for it.
    A property that fails is a row of the report, and nothing is raised. The model is not changed.
    Raises LaminaError for what is no such model.
    """
    clock, rows, subject = time.perf_counter(), [], subject_of(model)
    training = subject.model.training
    subject.model.eval()
    try:
        checks: Iterable[tuple[Callable[[Any], Iterator[Row]], Any]] = (
            *((check, subject) for check in CHECKS),
            *((check, subject.model) for check in (OWN if isinstance(subject, Ours) else ())),
        )
        for check, asked in checks:
            for row in _tried(check, asked):
                rows.append(row)
                if progress is not None:
                    progress(row)
    finally:
        subject.model.train(training)
    return Report(tuple(rows), time.perf_counter() - clock)


def subject_of(model: Any) -> Subject:
    """What answers the checks for `model`."""
    if all(hasattr(type(model), name) for name in ("facts", "read", "new_cache", "trained")):
        return model
    if isinstance(model, Model):
        return Ours(model)
    if isinstance(model, nn.Module) and all(
        hasattr(model, name) for name in ("config", "save_pretrained", "can_generate")
    ):
        return Pretrained(model)
    raise LaminaError(f"verify takes a model of lamina or of transformers; this is a {type(model).__name__}")


def _tried(check: Callable[[Any], Iterator[Row]], asked: Any) -> Iterator[Row]:
    """The rows of a check. What a model raises on sound input is a property that fails."""
    rows = check(asked)
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        except RAISED as error:
            yield failed(check.__name__.replace("_", " "), error)
            return
        yield row


__all__ = ["CHECKS", "FACTOR", "OWN", "Report", "Row", "Subject", "open_with_transformers", "subject_of", "verify"]
